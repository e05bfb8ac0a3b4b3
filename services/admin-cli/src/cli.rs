//! Arguments.

use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use kvasir_cluster::EtcdConfig;

use crate::{engine::EngineCommand, kv::KvCommand, route::RouteCommand, worker::WorkerCommand};

/// Where etcd listens unless somebody says otherwise.
const DEFAULT_ETCD: &str = "127.0.0.1:2379";

/// Shows what a Kvasir cluster is doing.
#[derive(Debug, Parser)]
#[command(name = "kvasirctl", version, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// etcd endpoints, with commas between them [default: $KVASIR_ETCD, else 127.0.0.1:2379]
    #[arg(long, global = true, value_name = "HOST:PORT,…")]
    etcd: Option<String>,

    /// What the cluster's keys in etcd begin with
    #[arg(long, global = true, value_name = "PREFIX", default_value = "/kvasir/v1")]
    prefix: String,

    /// Form of the answer
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,

    /// How long etcd, and then each member, may take to answer, in milliseconds
    #[arg(long, global = true, value_name = "MS", default_value_t = 3_000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    timeout: u64,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What is asked.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Command {
    /// All members: who is ready, what is loaded, what does not fit together
    Status,
    /// Workers and store nodes in detail: addresses, blocks, work done
    Workers,
    /// Models: who serves them, and how their KV blocks are laid out
    Models,
    /// How KV blocks move: from and to whom, over which transport and why, how fast, what fails
    Transfers,
    /// The KV store: what it holds, where a prompt's blocks are; pinning and evicting them
    #[command(subcommand)]
    Kv(KvCommand),
    /// What a worker works as: moving it between prefill and decode while it runs, pinning it
    #[command(subcommand)]
    Worker(WorkerCommand),
    /// Engines of others (vLLM, SGLang) that routers use as workers: naming them, and taking them out
    #[command(subcommand)]
    Engine(EngineCommand),
    /// Whether there are enough prefill and decode workers for what is asked, and what the routers' planner does about it
    Planner,
    /// How routers choose workers: by which policy, and why a request goes where it goes
    #[command(subcommand)]
    Route(RouteCommand),
}

/// Form of the answer.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

impl Cli {
    /// Time limit of each step.
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout)
    }

    /// Where etcd is: the flag, else the variable, else the default.
    pub(crate) fn etcd(&self, variable: Option<String>) -> Result<EtcdConfig, String> {
        let (from, text) = match (&self.etcd, variable) {
            (Some(flag), _) => ("--etcd", flag.clone()),
            (None, Some(variable)) => ("KVASIR_ETCD", variable),
            (None, None) => ("--etcd", DEFAULT_ETCD.to_owned()),
        };
        let endpoints: Vec<String> = text.split(',').map(|endpoint| endpoint.trim().to_owned()).collect();
        if let Some(bad) = endpoints.iter().find(|endpoint| !is_endpoint(endpoint)) {
            return Err(format!("{from}: {bad:?} is no endpoint, expected host:port"));
        }
        if !self.prefix.starts_with('/') {
            return Err(format!("--prefix: {:?} does not begin with /", self.prefix));
        }
        Ok(EtcdConfig {
            endpoints,
            prefix: self.prefix.clone(),
            connect_timeout_ms: self.timeout,
            request_timeout_ms: self.timeout,
            ..EtcdConfig::default()
        })
    }
}

fn is_endpoint(text: &str) -> bool {
    let address = text.strip_prefix("http://").unwrap_or(text);
    address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty()
            && host.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
            && port.parse::<u16>().is_ok()
    })
}

const EXAMPLES: &str = "Examples:
  kvasirctl status                                   who is there and ready
  kvasirctl --etcd 10.0.0.5:2379,10.0.0.6:2379 workers
  kvasirctl models --output json | jq '.[].name'
  kvasirctl kv stats                                 how full the KV store is, and how often it had what was asked for
  kvasirctl kv lookup --text prompt.txt --tokenizer model/tokenizer.json
  kvasirctl kv evict --tenant acme
  kvasirctl route explain --chat request.json        where that request would go, and why
  kvasirctl route policy least-loaded
  kvasirctl engine add vllm-d0 --kind vllm --role decode --url http://10.0.0.2:8200 --model qwen
  kvasirctl planner                                  what TTFT and TPOT are expected, and with which split
  kvasirctl worker role decode-3 prefill --pin       it reads prompts from now on, and no planner changes that
  KVASIR_ETCD=10.0.0.5:2379 kvasirctl status --timeout 500

Exit status:
  0  answered; members that could not be reached are shown as such
  1  etcd could not be reached, or what was to be done was not
  2  wrong usage";

#[cfg(test)]
mod tests {
    use super::*;

    fn cli(line: &str) -> Cli {
        Cli::try_parse_from(line.split(' ')).unwrap()
    }

    #[test]
    fn a_flag_beats_the_variable_and_the_variable_the_default() {
        let variable = || Some("b:2, http://c:3".to_owned());
        let endpoints = |line: &str, variable| cli(line).etcd(variable).unwrap().endpoints;
        assert_eq!(endpoints("kvasirctl status", None), ["127.0.0.1:2379"]);
        assert_eq!(endpoints("kvasirctl status", variable()), ["b:2", "http://c:3"]);
        assert_eq!(endpoints("kvasirctl status --etcd [::1]:1", variable()), ["[::1]:1"]);
    }

    #[test]
    fn what_is_no_endpoint_is_blamed_on_its_origin() {
        let line = cli("kvasirctl status").etcd(Some("a:1,b".to_owned())).unwrap_err();
        assert_eq!(line, "KVASIR_ETCD: \"b\" is no endpoint, expected host:port");
        for bad in ["", ":1", "a", "a:b", "a:70000", "https://a:1", "a/b:1"] {
            assert!(Cli { etcd: Some(bad.to_owned()), ..cli("kvasirctl status") }.etcd(None).is_err(), "{bad:?}");
        }
        assert!(cli("kvasirctl status --prefix x").etcd(None).is_err());
    }
}
