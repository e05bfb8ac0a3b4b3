//! Arguments of the live modes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::ensure;
use clap::Args;
use kvasir_cluster::EtcdConfig;

use super::{Pace, Plan, router, store};

/// Bytes of a block of the trace that is put into a store, unless asked otherwise: enough to move something, little enough for a laptop.
const BLOCK_BYTES: u64 = 64 << 10;
/// Requests at a time, one after the other in each lane.
const CLOSED_LANES: usize = 8;
/// Requests at a time by the trace's clock.
const OPEN_LANES: usize = 64;
/// Most requests at a time.
const MAX_LANES: u64 = 4096;
/// How long a store node has for an answer.
const STORE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a whole answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);

/// Arguments of the live modes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Live modes")]
pub struct LiveArgs {
    /// Replay against the store nodes of a running cluster, without a model: each request looks its prompt's blocks up, reads
    /// and compares those that are there, and writes the others.
    #[arg(long, group = "live", conflicts_with_all = ["simulate", "generate"])]
    pub store: bool,

    /// Replay against a router, and so a whole cluster: prompts made of the trace's ids, answers token by token.
    #[arg(long, value_name = "URL", group = "live", conflicts_with_all = ["simulate", "generate"])]
    pub router: Option<String>,

    /// Requests at a time: as soon as one ends, the next begins [default: 8]. With --speed: at most so many, what is due
    /// beyond that starts late, which counts as its time [default: 64].
    #[arg(long, value_name = "N", requires = "live", value_parser = clap::value_parser!(u64).range(1..=MAX_LANES))]
    pub concurrency: Option<u64>,

    /// Send requests when the trace's clock says, so many times as fast: 1 is the trace's own pace.
    #[arg(long, value_name = "N", requires = "live")]
    pub speed: Option<f64>,

    /// No more than the first N requests of each trace.
    #[arg(long, value_name = "N", requires = "live")]
    pub limit: Option<usize>,

    /// Replay each trace N times, with the same names: all but the first find what was left of those before.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "live", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeat: u32,

    /// What this run's blocks are named after. The same name again finds the blocks of the run before; without it, each run
    /// has a name of its own, and finds nothing of another's.
    #[arg(long, value_name = "NAME", requires = "live")]
    pub namespace: Option<String>,

    /// How long a store node has for an answer (moving a request's bytes may take ten times as long), or a router for a whole
    /// one, in milliseconds [default: 1000 for --store, 600000 for --router].
    #[arg(long, value_name = "MS", requires = "live", value_parser = clap::value_parser!(u64).range(1..=86_400_000))]
    pub timeout: Option<u64>,

    /// Blocks of the store for each block of the trace, which --block-bytes is divided among [default: as many as the nodes
    /// place together, group_blocks in their settings].
    #[arg(long, value_name = "N", requires = "live", conflicts_with = "router", value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub split: Option<u64>,

    /// etcd endpoints of the cluster, with commas between them [default: $KVASIR_ETCD, else 127.0.0.1:2379].
    #[arg(long, value_name = "HOST:PORT,…", requires = "live", conflicts_with = "router")]
    pub etcd: Option<String>,

    /// What the cluster's keys in etcd begin with.
    #[arg(long, value_name = "PREFIX", default_value = "/kvasir/v1", requires = "live", conflicts_with = "router")]
    pub prefix: String,

    /// The model to ask for [default: the router's first].
    #[arg(long, value_name = "NAME", requires = "live", conflicts_with = "store")]
    pub model: Option<String>,

    /// Tokens of a prompt for each block of the trace. A prompt has one more, so that all its blocks can be found.
    #[arg(long, value_name = "N", default_value_t = 16, requires = "live", conflicts_with = "store", value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub block_tokens: u32,

    /// Most tokens of an answer: the trace's answers are cut to that.
    #[arg(long, value_name = "N", default_value_t = 16, requires = "live", conflicts_with = "store", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_output_tokens: u32,

    /// Prompts are made of token ids below this, which the model must have.
    #[arg(long, value_name = "N", default_value_t = 1024, requires = "live", conflicts_with = "store", value_parser = clap::value_parser!(u32).range(512..))]
    pub vocabulary: u32,
}

impl LiveArgs {
    /// Whether a live mode is asked for.
    pub fn wanted(&self) -> bool {
        self.store || self.router.is_some()
    }

    pub(super) fn plan(&self) -> anyhow::Result<Plan> {
        let speed = self.speed.unwrap_or(1.0);
        ensure!(speed.is_finite() && speed > 0.0, "--speed {speed}: it must be above 0");
        let (pace, lanes) = match self.speed {
            Some(speed) => (Pace::Clock { speed }, OPEN_LANES),
            None => (Pace::Answers, CLOSED_LANES),
        };
        Ok(Plan {
            pace,
            lanes: self.concurrency.map_or(lanes, |lanes| lanes as usize),
            limit: self.limit.unwrap_or(usize::MAX),
            repeat: self.repeat,
            namespace: self.namespace.clone().unwrap_or_else(own_name),
        })
    }

    pub(super) fn store_settings(&self, block_bytes: Option<u64>) -> anyhow::Result<store::Settings> {
        let block_bytes = block_bytes.unwrap_or(BLOCK_BYTES);
        ensure!(block_bytes > 0, "--block-bytes 0: a block has at least one");
        let variable = std::env::var("KVASIR_ETCD").ok();
        Ok(store::Settings {
            etcd: etcd(self.etcd.as_deref(), variable.as_deref(), &self.prefix)?,
            block_bytes,
            split: self.split,
            timeout: self.timeout.map_or(STORE_TIMEOUT, Duration::from_millis),
            // It is done before certificates change.
            rpc: kvasir_rpc::Rpc::open(&kvasir_rpc::Config::from_variables(|name| std::env::var(name).ok())?)?.0,
        })
    }

    pub(super) fn router_settings(&self, url: &str) -> anyhow::Result<router::Settings> {
        ensure!(url.starts_with("http://"), "--router {url}: it must begin with http://");
        let url = url.trim_end_matches('/');
        Ok(router::Settings {
            url: url.strip_suffix("/v1").unwrap_or(url).to_owned(),
            model: self.model.clone(),
            block_tokens: self.block_tokens,
            max_output_tokens: self.max_output_tokens,
            vocabulary: self.vocabulary,
            timeout: self.timeout.map_or(ANSWER_TIMEOUT, Duration::from_millis),
        })
    }
}

/// Where etcd is: the flag, else the variable, else here.
fn etcd(flag: Option<&str>, variable: Option<&str>, prefix: &str) -> anyhow::Result<EtcdConfig> {
    let mut config = EtcdConfig { prefix: prefix.to_owned(), ..EtcdConfig::default() };
    ensure!(prefix.starts_with('/'), "--prefix {prefix:?}: it must begin with /");
    if let Some(text) = flag.or(variable) {
        config.endpoints = text.split(',').map(|endpoint| endpoint.trim().to_owned()).collect();
        for endpoint in &config.endpoints {
            let address = endpoint.strip_prefix("http://").unwrap_or(endpoint).rsplit_once(':');
            let good = address.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
            ensure!(good, "etcd: {endpoint:?} is no endpoint, expected host:port");
        }
    }
    Ok(config)
}

/// A name that no other run has.
fn own_name() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("run-{:x}-{:x}", now.as_millis(), std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etcd_is_where_the_flag_says_then_where_the_variable_says() {
        let endpoints = |flag, variable| etcd(flag, variable, "/kvasir/v1").unwrap().endpoints;
        assert_eq!(endpoints(Some("a:1, http://b:2"), Some("c:3")), ["a:1", "http://b:2"]);
        assert_eq!(endpoints(None, Some("c:3")), ["c:3"]);
        assert_eq!(endpoints(None, None), ["127.0.0.1:2379"]);
        for bad in ["", "a", ":1", "a:b", "a:1,"] {
            assert!(etcd(Some(bad), None, "/kvasir/v1").is_err(), "{bad:?}");
        }
        assert!(etcd(None, None, "kvasir").is_err());
    }
}
