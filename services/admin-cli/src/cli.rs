//! Arguments.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::{
    bench::BenchArgs,
    bundle::BundleArgs,
    config::ConfigCommand,
    context::ContextCommand,
    doctor::DoctorArgs,
    engine::EngineCommand,
    events::EventsArgs,
    kv::KvCommand,
    output::Output,
    reference::{CompletionArgs, DocsArgs, ManArgs},
    requests::RequestsCommand,
    route::RouteCommand,
    status::StatusArgs,
    top::TopArgs,
    trace::TraceArgs,
    transfer::TransferCommand,
    via::Via,
    worker::WorkerCommand,
    workers::WorkersArgs,
};

/// Shows what a Kvasir cluster is doing, and changes it.
#[derive(Debug, Parser)]
#[command(name = "kvasirctl", version, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What all verbs take.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "For all commands")]
pub(crate) struct Globals {
    /// Which cluster, of those that `kvasirctl context` knows [default: $KVASIR_CONTEXT, else the current one]
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) context: Option<String>,

    /// etcd endpoints, with commas between them [default: $KVASIR_ETCD, else the context's, else 127.0.0.1:2379]
    #[arg(long, global = true, value_name = "HOST:PORT,…")]
    pub(crate) etcd: Option<String>,

    /// The authorities that etcd's certificate may come from: etcd is then called by TLS [default:
    /// $KVASIR_REGISTRY__ETCD__TLS__AUTHORITY (so with what follows), else the context's]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) etcd_authority: Option<PathBuf>,

    /// The certificate to show to etcd, if it wants to see one
    #[arg(long, global = true, value_name = "FILE", requires_all = ["etcd_authority", "etcd_key"])]
    pub(crate) etcd_certificate: Option<PathBuf>,

    /// Its private key
    #[arg(long, global = true, value_name = "FILE", requires = "etcd_certificate")]
    pub(crate) etcd_key: Option<PathBuf>,

    /// The name that etcd's certificates bear, if it is not the endpoint's
    #[arg(long, global = true, value_name = "NAME", requires = "etcd_authority")]
    pub(crate) etcd_server_name: Option<String>,

    /// The user as which etcd is called, if it wants to know
    #[arg(long, global = true, value_name = "NAME", requires = "etcd_password_file")]
    pub(crate) etcd_username: Option<String>,

    /// A file with that user's password
    #[arg(long, global = true, value_name = "FILE", requires = "etcd_username")]
    pub(crate) etcd_password_file: Option<PathBuf>,

    /// What the cluster's keys in etcd begin with [default: the context's, else /kvasir/v1]
    #[arg(long, global = true, value_name = "PREFIX")]
    pub(crate) prefix: Option<String>,

    /// Another way to members than the addresses they advertise, as for `kubectl port-forward`: NAME/grpc=HOST:PORT (or
    /// /admin, /http), HOST:PORT=HOST:PORT or HOST=HOST; may be repeated
    #[arg(long, global = true, value_name = "FROM=TO", value_delimiter = ',')]
    pub(crate) via: Vec<Via>,

    /// A file with the operator's token, where changes need one [default: $KVASIR_TOKEN, else the context's]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,

    /// Form of the answer
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,

    /// How long etcd, and then each member, may take to answer, in milliseconds
    #[arg(long, global = true, value_name = "MS", default_value_t = 3_000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub(crate) timeout: u64,

    /// Don't ask before what can't be undone
    #[arg(long, short, global = true)]
    pub(crate) yes: bool,
}

/// What is asked.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Command {
    /// All members: who is ready, what is loaded, what does not fit together
    Status(StatusArgs),
    /// Workers, live: load, queues, blocks, tokens a second, TTFT, TPOT; keys sort
    Top(TopArgs),
    /// Workers and store nodes in detail: addresses, blocks, work done; and what workers work as
    Workers(WorkersArgs),
    /// Models: who serves them, and how their KV blocks are laid out
    Models,
    /// How KV blocks move: from and to whom, over which transport and why, how fast, what fails
    Transfers,
    /// Over what members reach one another and how fast: as it was lately, and measured now
    #[command(subcommand)]
    Transfer(TransferCommand),
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
    /// Requests under way: whose, how far, on which workers; and an end to one
    #[command(subcommand)]
    Requests(RequestsCommand),
    /// The way of one request through the services, with times: also for a while after its end
    Trace(TraceArgs),
    /// What happened in the cluster: who came and went, what was moved, drained, changed, and by whom
    Events(EventsArgs),
    /// What services run with, where each value comes from, and changing it while they run
    #[command(subcommand)]
    Config(ConfigCommand),
    /// How routers choose workers: by which policy, and why a request goes where it goes
    #[command(subcommand)]
    Route(RouteCommand),
    /// Load against a router, or any server that speaks OpenAI's HTTP: TTFT, TPOT, goodput
    Bench(Box<BenchArgs>),
    /// What is wrong with the cluster or this machine, and what to do about it
    Doctor(DoctorArgs),
    /// Everything that somebody else needs to see what is wrong, in a file: status, metrics, versions; no prompts, keys or tokens
    SupportBundle(BundleArgs),
    /// Clusters by name: where their etcd is, and how they are reached
    #[command(subcommand)]
    Context(ContextCommand),
    /// A script for a shell that completes kvasirctl's words
    Completion(CompletionArgs),
    /// Man pages, into a folder
    Man(ManArgs),
    /// docs/kvasirctl.md
    #[command(hide = true)]
    Docs(DocsArgs),
}

pub(crate) const EXAMPLES: &str = "Examples:
  kvasirctl status                                   who is there and ready
  kvasirctl --etcd 10.0.0.5:2379,10.0.0.6:2379 workers
  kvasirctl doctor                                   what to mend, in the cluster and on this machine
  kvasirctl context set prod --etcd 10.0.0.5:2379    `prod` is that cluster from now on
  kvasirctl models --output json | jq '.[].name'
  kvasirctl kv stats                                 how full the KV store is, and how often it had what was asked for
  kvasirctl kv lookup --text prompt.txt --tokenizer model/tokenizer.json
  kvasirctl kv evict --tenant acme
  kvasirctl route explain --chat request.json        where that request would go, and why
  kvasirctl route policy least-loaded
  kvasirctl config set router limits.max_inflight=1000   all routers let in so many from now on
  kvasirctl config diff decode-3                     what is not as by default there, and where it comes from
  kvasirctl engine add vllm-d0 --kind vllm --role decode --url http://10.0.0.2:8200 --model qwen
  kvasirctl planner                                  what TTFT and TPOT are expected, and with which split
  kvasirctl workers drain decode-3                   out of service, until it is safe to delete
  kvasirctl requests list --state queued             who waits
  kvasirctl trace 5e1c0c9f                           the way of that request (its x-request-id)
  kvasirctl events --since 2h --kind role,stage
  kvasirctl workers role decode-3 prefill --pin      it reads prompts from now on, and no planner changes that
  kvasirctl bench --rate 10 --duration 1m --slo-ttft 2000 --slo-tpot 100
  kvasirctl bench http://127.0.0.1:8000 --concurrency 64 --prompt-tokens 100-2000
  KVASIR_ETCD=10.0.0.5:2379 kvasirctl status --timeout 500

Exit status:
  0  answered; members that could not be reached are shown as such
  1  etcd could not be reached, or what was to be done was not
  2  wrong usage
  3  answered, and something is wrong (status --check, doctor, a bench without an answer)";

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn arguments_do_not_contradict_one_another() {
        Cli::command().debug_assert();
    }
}
