//! Where the cluster's metadata is: the section `registry` of every service's configuration.

use std::path::PathBuf;

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
    /// Certificates, if etcd is called by TLS. Files are PEM, and read anew for every connection. Default none.
    pub tls: Option<EtcdTls>,
    /// The user as which etcd is called, if it has `auth` enabled and does not know its callers by their certificates.
    /// Default none.
    pub username: Option<String>,
    /// A file that holds that user's password; read anew whenever etcd wants to know it. Default none.
    pub password_file: Option<PathBuf>,
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
            tls: None,
            username: None,
            password_file: None,
            prefix: "/kvasir/v1".to_owned(),
            lease_ttl_s: 5,
            connect_timeout_ms: 5_000,
            request_timeout_ms: 2_000,
            max_events: 4_096,
            events_ttl_s: 86_400,
        }
    }
}

/// TLS with etcd: whom this process believes, and what it shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdTls {
    /// The authorities, one of which etcd's certificates must come from.
    pub authority: PathBuf,
    /// This process's certificate for etcd, and those between it and the authority, if etcd wants to see one
    /// (`--client-cert-auth`). Default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// The certificate's private key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// The name that etcd's certificates must bear. Default: that in the endpoint, or its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
}

/// What tools, which have no configuration files, read of the environment.
const VARIABLES: &str = "KVASIR_REGISTRY__ETCD__";

impl EtcdConfig {
    /// Takes up TLS and the user from the variables that services read, too: `KVASIR_REGISTRY__ETCD__TLS__AUTHORITY`,
    /// `…__TLS__CERTIFICATE`, `…__TLS__KEY`, `…__TLS__SERVER_NAME`, `…__USERNAME` and `…__PASSWORD_FILE`.
    pub fn take_variables(&mut self, variable: impl Fn(&str) -> Option<String>) {
        let find = |name: &str| variable(&format!("{VARIABLES}{name}"));
        if let Some(authority) = find("TLS__AUTHORITY") {
            self.tls = Some(EtcdTls {
                authority: authority.into(),
                certificate: find("TLS__CERTIFICATE").map(PathBuf::from),
                key: find("TLS__KEY").map(PathBuf::from),
                server_name: find("TLS__SERVER_NAME"),
            });
        }
        if let Some(username) = find("USERNAME") {
            self.username = Some(username);
            self.password_file = find("PASSWORD_FILE").map(PathBuf::from);
        }
    }
}
