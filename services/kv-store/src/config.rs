//! Configuration of a store node, checked once at start.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, anyhow, ensure};
use kvasir_cluster::{RegistryConfig, StoreInfo};
use kvasir_runtime::{AdminConfig, LogConfig, ShutdownConfig, TraceConfig};
use kvasir_types::{MemberId, Role};
use serde::{Deserialize, Serialize};

use crate::{
    disk::DiskConfig,
    store::{Limits, Policies, Policy, Settings},
};

/// A KV store node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name in the cluster. It decides which blocks the node gets: keep it over restarts. Default: kv-store and a random
    /// number.
    pub id: Option<String>,
    /// Where the gRPC server listens; port 0 takes a free one. Default 127.0.0.1:0.
    pub listen: SocketAddr,
    /// `host:port` that others reach the gRPC server at. Default: the address it listens on.
    pub advertise: Option<String>,
    /// File to write the actual addresses to once the node is ready (JSON).
    pub port_file: Option<PathBuf>,
    /// Threads of the async runtime. Default: 2; bytes are moved by the transfer engine's own.
    pub threads: Option<usize>,
    /// Health, readiness and metrics over HTTP.
    pub admin: AdminConfig,
    /// Logging.
    pub log: LogConfig,
    /// Spans of requests, for OpenTelemetry.
    pub trace: TraceConfig,
    /// Shutdown.
    pub shutdown: ShutdownConfig,
    /// Where the cluster's metadata is.
    pub registry: RegistryConfig,
    /// How processes call one another: certificates, if they are to prove who they are.
    pub rpc: kvasir_rpc::Config,
    /// Who may change what this process does, while it runs.
    pub operator: kvasir_rpc::operator::Config,
    /// Memory for blocks, in bytes, taken at start. Rounded down to whole slabs. Default 268435456 (256 MiB).
    pub capacity_bytes: u64,
    /// Memory is given to block sizes in slabs of so many bytes, a multiple of 4096: the largest block that can be stored,
    /// and at most this much of the memory lies idle for each block size in use. Default 16777216 (16 MiB).
    pub slab_bytes: u64,
    /// The node's share of the blocks beside that of other nodes, above 0. Default: its memory in MiB.
    pub weight: Option<f64>,
    /// Nodes of one zone may fail together (a rack, a host): copies of a block go to different ones. Up to 64 bytes.
    /// Default: empty, which is a zone like any other.
    pub zone: String,
    /// Consecutive blocks of a prompt that are placed on the same node, 1 to 1024; the same on all nodes, or most decide.
    /// Changed, blocks are looked for elsewhere than they are. Default 32.
    pub group_blocks: u32,
    /// On how many nodes each block is kept, 1 to 8; the same on all nodes, or most decide. Default 1.
    pub replicas: u32,
    /// For how long after its start the node tells readers that others may have what it lacks, in milliseconds: those who
    /// had its share before. It costs them a second lookup. Default 60000.
    pub warm_ms: u64,
    /// Handing blocks over to other nodes.
    pub handover: HandoverConfig,
    /// More copies of what is asked for often.
    pub replication: ReplicationConfig,
    /// How long a block that a reader was told of stays where it is, in milliseconds. Default 5000.
    pub lease_ms: u64,
    /// How long a writer may take from reserving to committing, in milliseconds. Default 5000.
    pub reservation_ms: u64,
    /// Whether written blocks are compared with their writer's checksum, as soon as they can be found. A reader compares too;
    /// this keeps a broken writer's blocks from taking room. Default true.
    pub verify_on_commit: bool,
    /// Blocks on disk: those that memory has no room for any more, and all of them after a restart.
    pub disk: DiskConfig,
    /// Of the memory, what hard pins may keep, in percent. Default 50.
    pub max_pinned_percent: u8,
    /// Size of the index that clients on fast ways (same host, RDMA) read by themselves instead of asking, beside
    /// `capacity_bytes`; 32 bytes tell one block. 0: there is none. Default: a 512th of `capacity_bytes`, which tells
    /// nearly all blocks from 64 KiB on.
    pub published_bytes: Option<u64>,
    /// Which blocks go first when there is no room.
    pub eviction: EvictionConfig,
    /// How much room tenants may take.
    pub quotas: QuotasConfig,
    /// Limits; past them a caller is refused.
    pub limits: LimitsConfig,
    /// Moving blocks.
    pub transfer: kvasir_transfer::Settings,
}

/// Blocks in memory that other nodes are to have, because nodes came or this one goes, are given to them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HandoverConfig {
    /// How much of them in a second, in MiB; 0: none at all. Default 256.
    pub mib_per_s: u64,
    /// How long a node that is told to stop goes on handing over, in milliseconds, within `shutdown.grace_ms`. To wait until
    /// all is done, drain it first. Default 5000.
    pub on_shutdown_ms: u64,
}

/// A placement group that is asked for often is given to the next nodes in its order, too, and readers are told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReplicationConfig {
    /// How many lookups of one group in a second are too many for one node; 0: never. Default 50.
    pub hot_lookups_per_s: f64,
    /// Most copies of such a group, 1 to 8. Default 3.
    pub max_copies: usize,
}

impl Default for HandoverConfig {
    fn default() -> Self {
        Self { mib_per_s: 256, on_shutdown_ms: 5_000 }
    }
}

impl Default for ReplicationConfig {
    fn default() -> Self {
        Self { hot_lookups_per_s: 50.0, max_copies: 3 }
    }
}

/// Which blocks go first: `hit-density`, `lru` or `s3-fifo` (docs/eviction.md).
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvictionConfig {
    /// From memory. Default hit-density, which takes some 40 bytes for each block that memory has room for.
    pub memory: Policy,
    /// From the disk. Default lru, which takes 8 bytes a block: a disk has room for many, and the larger a tier is, the less
    /// the order matters.
    pub disk: Policy,
    /// How often the node asks others what they have learned of which blocks come back, in milliseconds, up to an hour; 0:
    /// never. Default 15000.
    pub exchange_ms: u64,
}

impl Default for EvictionConfig {
    fn default() -> Self {
        Self { memory: Policy::HitDensity, disk: Policy::Lru, exchange_ms: 15_000 }
    }
}

/// Quotas: a tenant who has one may take so many percent of the memory, and of the disk; past that, new blocks displace his
/// own old ones. Blocks without a tenant have no quota.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuotasConfig {
    /// By the tenant's name, 1 to 100 percent. At most 100 tenants. Default: none.
    pub tenants: BTreeMap<String, u8>,
    /// Of each tenant that is not named. Default: no limit.
    pub default_percent: Option<u8>,
}

/// Limits of a store node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Leases open at the same time. Default 4096.
    pub max_leases: usize,
    /// Reservations open at the same time. Default 1024.
    pub max_reservations: usize,
    /// Calls of one client connection served at the same time. Default 256.
    pub max_calls_per_connection: usize,
    /// How long serving one call may take, in milliseconds. Default 10000.
    pub call_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            id: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            port_file: None,
            threads: Some(2),
            admin: AdminConfig::default(),
            log: LogConfig::default(),
            trace: TraceConfig::default(),
            shutdown: ShutdownConfig::default(),
            registry: RegistryConfig::default(),
            rpc: kvasir_rpc::Config::default(),
            operator: kvasir_rpc::operator::Config::default(),
            capacity_bytes: 256 << 20,
            slab_bytes: 16 << 20,
            weight: None,
            zone: String::new(),
            group_blocks: 32,
            replicas: 1,
            warm_ms: 60_000,
            handover: HandoverConfig::default(),
            replication: ReplicationConfig::default(),
            lease_ms: 5_000,
            reservation_ms: 5_000,
            verify_on_commit: true,
            disk: DiskConfig::default(),
            max_pinned_percent: 50,
            published_bytes: None,
            eviction: EvictionConfig::default(),
            quotas: QuotasConfig::default(),
            limits: LimitsConfig::default(),
            transfer: kvasir_transfer::Settings::default(),
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self { max_leases: 4_096, max_reservations: 1_024, max_calls_per_connection: 256, call_timeout_ms: 10_000 }
    }
}

/// What may be changed while a node runs.
const LIVE: &[(&str, &str)] = &[
    ("log.filter", "at once"),
    ("trace.sample", "from the next request on"),
    ("shutdown.grace_ms", "when it leaves"),
    ("handover", "with the next group that is handed over"),
    ("replication", "from the next lookup on"),
    ("max_pinned_percent", "from the next pin on"),
];

impl kvasir_runtime::Config for Config {
    const LIVE: &'static [(&'static str, &'static str)] = LIVE;

    fn verify(&self) -> Result<(), String> {
        let checked = self.settings(0).and_then(|settings| self.store_info(settings.capacity_bytes));
        checked.map(drop).map_err(|error| error.to_string())
    }
}

/// Slabs are whole pages, so that a slab's memory can be given to a device or given back to the system by itself.
const PAGE: u64 = 4096;

impl Config {
    /// What the store is made with; an error names the key and what is allowed.
    pub(crate) fn settings(&self, seed: u64) -> anyhow::Result<Settings> {
        let &Self { capacity_bytes, slab_bytes, lease_ms, reservation_ms, .. } = self;
        let &LimitsConfig { max_leases, max_reservations, max_calls_per_connection, call_timeout_ms } = &self.limits;
        ensure!(
            slab_bytes >= PAGE && slab_bytes.is_multiple_of(PAGE),
            "slab_bytes: {slab_bytes}, allowed is a multiple of {PAGE}"
        );
        ensure!(
            capacity_bytes >= slab_bytes,
            "capacity_bytes: {capacity_bytes}, allowed is at least one slab (slab_bytes: {slab_bytes})"
        );
        for (key, value) in [("lease_ms", lease_ms), ("reservation_ms", reservation_ms)] {
            ensure!((1..=MAX_HOLD_MS).contains(&value), "{key}: {value}, allowed is 1 to {MAX_HOLD_MS}");
        }
        for (key, value) in [
            ("max_leases", max_leases as u64),
            ("max_reservations", max_reservations as u64),
            ("max_calls_per_connection", max_calls_per_connection as u64),
            ("call_timeout_ms", call_timeout_ms),
        ] {
            ensure!(value > 0, "limits.{key}: 0, allowed is at least 1");
        }
        let exchange_ms = self.eviction.exchange_ms;
        ensure!(exchange_ms <= MAX_HOLD_MS, "eviction.exchange_ms: {exchange_ms}, allowed is 0 to {MAX_HOLD_MS}");
        let percent = self.max_pinned_percent;
        ensure!(percent <= 100, "max_pinned_percent: {percent}, allowed is 0 to 100");
        let published_bytes = self.published_bytes.unwrap_or(capacity_bytes / 512);
        ensure!(
            published_bytes <= capacity_bytes,
            "published_bytes: {published_bytes}, allowed is up to capacity_bytes ({capacity_bytes})"
        );
        let QuotasConfig { tenants, default_percent } = &self.quotas;
        ensure!(tenants.len() <= 100, "quotas.tenants: {} tenants, allowed are at most 100", tenants.len());
        for (tenant, percent) in tenants.iter().map(|(name, percent)| (name.as_str(), percent)) {
            ensure!((1..=100).contains(percent), "quotas.tenants.{tenant}: {percent}, allowed is 1 to 100");
        }
        if let Some(percent) = default_percent {
            ensure!((1..=100).contains(percent), "quotas.default_percent: {percent}, allowed is 1 to 100");
        }
        let disk = self.disk.settings(slab_bytes)?;
        Ok(Settings {
            capacity_bytes: capacity_bytes / slab_bytes * slab_bytes,
            slab_bytes,
            disk_bytes: disk.map_or(0, |disk| disk.capacity_bytes),
            // The disk takes as many reads, and as many writes, as may wait: none is refused for that.
            max_moves: self.disk.queue,
            max_pinned_percent: percent,
            published_bytes,
            policies: Policies { memory: self.eviction.memory, disk: self.eviction.disk },
            quotas: Limits {
                tenants: tenants.iter().map(|(name, &percent)| (name.clone(), percent)).collect(),
                others: *default_percent,
            },
            lease: Duration::from_millis(lease_ms),
            reservation: Duration::from_millis(reservation_ms),
            max_leases,
            max_reservations,
            seed,
        })
    }

    /// What the node's record says about its part in the division of blocks, with its memory as its weight unless another
    /// is configured.
    pub(crate) fn store_info(&self, capacity_bytes: u64) -> anyhow::Result<StoreInfo> {
        let info = StoreInfo {
            weight: self.weight.unwrap_or(capacity_bytes as f64 / (1u64 << 20) as f64),
            zone: self.zone.clone(),
            group_blocks: self.group_blocks,
            replicas: self.replicas,
        };
        info.check().map_err(|reason| anyhow!(reason))?;
        let &ReplicationConfig { hot_lookups_per_s, max_copies } = &self.replication;
        let (max, hot) = (StoreInfo::MAX_REPLICAS as usize, "replication.hot_lookups_per_s");
        ensure!(
            hot_lookups_per_s.is_finite() && hot_lookups_per_s >= 0.0,
            "{hot}: {hot_lookups_per_s}, allowed is 0 or more"
        );
        ensure!((1..=max).contains(&max_copies), "replication.max_copies: {max_copies}, allowed is 1 to {max}");
        Ok(info)
    }

    pub(crate) fn member_id(&self) -> anyhow::Result<MemberId> {
        let random = || format!("{}-{:08x}", Role::KvStore, kvasir_runtime::random_u64() as u32);
        self.id.clone().unwrap_or_else(random).parse().context("id")
    }
}

/// A reader or writer that died keeps its blocks for so long at most.
const MAX_HOLD_MS: u64 = 3_600_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_allowed() {
        let settings = Config::default().settings(1).unwrap();
        assert_eq!(settings.capacity_bytes, 256 << 20);
        assert_eq!(Config::default().store_info(settings.capacity_bytes).unwrap(), StoreInfo::default());
        assert!(Config::default().member_id().unwrap().as_str().starts_with("kv-store-"));
    }

    #[test]
    fn what_no_store_can_run_with_is_refused_by_key() {
        let bad = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.settings(1).and_then(|s| config.store_info(s.capacity_bytes)).unwrap_err().to_string()
        };
        for (key, error) in [
            ("slab_bytes", bad(|c| c.slab_bytes = 5000)),
            ("slab_bytes", bad(|c| c.slab_bytes = 0)),
            ("capacity_bytes", bad(|c| c.capacity_bytes = 1)),
            ("lease_ms", bad(|c| c.lease_ms = 0)),
            ("reservation_ms", bad(|c| c.reservation_ms = u64::MAX)),
            ("eviction.exchange_ms", bad(|c| c.eviction.exchange_ms = u64::MAX)),
            ("weight", bad(|c| c.weight = Some(0.0))),
            ("weight", bad(|c| c.weight = Some(f64::NAN))),
            ("zone", bad(|c| c.zone = "z".repeat(65))),
            ("group_blocks", bad(|c| c.group_blocks = 0)),
            ("replicas", bad(|c| c.replicas = 0)),
            ("limits.max_leases", bad(|c| c.limits.max_leases = 0)),
        ] {
            assert!(error.starts_with(key), "{error}");
        }
    }
}
