//! Where the cluster's metadata is: the section `registry` of every service's configuration.

use serde::{Deserialize, Serialize};

/// Where the cluster's metadata is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// In etcd.
    pub etcd: EtcdConfig,
}

/// How etcd is used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EtcdConfig {
    /// `host:port` of each etcd node. Default 127.0.0.1:2379.
    pub endpoints: Vec<String>,
    /// What our keys begin with; clusters that share an etcd have different ones. Default /kvasir/v1.
    pub prefix: String,
    /// How long a member that fell silent stays in the view, in seconds; 1 to 3600. Default 5.
    pub lease_ttl_s: u32,
    /// How long etcd may take to answer when a service starts, in milliseconds. Default 5000.
    pub connect_timeout_ms: u64,
    /// How long etcd may take to answer later on, in milliseconds. Default 2000.
    pub request_timeout_ms: u64,
    /// How many events of the cluster's history are kept (2 KiB each at most, 300 bytes as a rule), up to 100000; 0: this
    /// process writes none. Default 4096.
    pub max_events: u32,
    /// How long events are kept, in seconds. Default 86400.
    pub events_ttl_s: u32,
}

impl Default for EtcdConfig {
    fn default() -> Self {
        Self {
            endpoints: vec!["127.0.0.1:2379".to_owned()],
            prefix: "/kvasir/v1".to_owned(),
            lease_ttl_s: 5,
            connect_timeout_ms: 5_000,
            request_timeout_ms: 2_000,
            max_events: 4_096,
            events_ttl_s: 86_400,
        }
    }
}
