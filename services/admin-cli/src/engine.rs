//! `kvasirctl engine`: engines of others, named in etcd for all routers. Their records have no lease and stay until they are
//! taken out; each router finds out by itself whether an engine answers.

use clap::{Args, Subcommand, ValueEnum};
use kvasir_cluster::{Duty, EngineInfo, Event, EventKind, Member};
use kvasir_runtime::random_u64;
use kvasir_types::{Incarnation, MemberId, PROTOCOL_VERSION, Role};
use serde_json::json;

use crate::{output::Answer, session::Session};

/// What is done with engines of others.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum EngineCommand {
    /// Names an engine, or says anew what it is
    Add(AddArgs),
    /// Takes an engine out: no router uses it any more
    Remove {
        /// Its name
        #[arg(value_name = "NAME")]
        id: MemberId,
    },
}

/// An engine.
#[derive(Clone, Debug, Args)]
pub(crate) struct AddArgs {
    /// Its name, unique among engines and workers
    #[arg(value_name = "NAME")]
    id: MemberId,
    /// Which protocol it speaks
    #[arg(long, value_enum)]
    kind: Kind,
    /// What it does; both: it needs no partner, and takes none
    #[arg(long, value_enum)]
    role: What,
    /// http://HOST:PORT
    #[arg(long, value_parser = url)]
    url: String,
    /// Which of the routers' models it serves
    #[arg(long, value_name = "NAME")]
    model: String,
    /// What it calls that model [default: the same]
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    served_name: String,
    /// Engines of one kind and group go together and have the same weights
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    group: String,
    /// Where an SGLang prefill server waits for decode servers [default: 8998]
    #[arg(long, value_name = "PORT")]
    bootstrap_port: Option<u16>,
    /// Most tokens of prompt and answer together [default: the model's]
    #[arg(long, value_name = "TOKENS")]
    max_model_len: Option<u32>,
    /// An SGLang server that runs with --enable-deterministic-inference
    #[arg(long)]
    deterministic: bool,
}

/// Whose engine it is.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    Vllm,
    Sglang,
}

/// What it does.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    Prefill,
    Decode,
    Both,
}

fn url(text: &str) -> Result<String, String> {
    let host = text.strip_prefix("http://").map(|rest| rest.trim_end_matches('/')).unwrap_or_default();
    let fine = !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
    if fine { Ok(text.to_owned()) } else { Err("expected http://HOST:PORT".to_owned()) }
}

/// Does it, and says so.
pub(crate) async fn run(command: EngineCommand, session: &Session) -> anyhow::Result<Answer> {
    let etcd = session.etcd()?;
    let (done, id, text) = match &command {
        EngineCommand::Add(args) => {
            let member = member(args);
            let text = format!("{} is {} {} at {}\n", args.id, kind(args.kind), member.role, args.url);
            kvasir_cluster::add_engine(&etcd, member).await?;
            ("added", &args.id, text)
        }
        EngineCommand::Remove { id } => {
            anyhow::ensure!(kvasir_cluster::remove_engine(&etcd, id).await?, "there is no engine {id}");
            ("removed", id, format!("{id} is out\n"))
        }
    };
    // It was done in etcd alone, so nobody else puts it on record.
    let who = session.variable("USER").map_or_else(|| "somebody".to_owned(), |user| format!("{user} (says kvasirctl)"));
    let here = "kvasirctl".parse().expect("a name");
    let event = Event::now(EventKind::Audit, &here, id.as_str(), format!("engine {done}")).by(who);
    if let Err(error) = kvasir_cluster::note_event(&etcd, Event { result: "done".to_owned(), ..event }).await {
        eprintln!("not in the cluster's events: {}", kvasir_runtime::chain(&error));
    }
    Ok(session.output().show(&json!({ done: id.as_str() }), || text).into())
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Vllm => "vllm",
        Kind::Sglang => "sglang",
    }
}

fn member(args: &AddArgs) -> Member {
    let AddArgs { id, url, model, served_name, group, bootstrap_port, max_model_len, deterministic, .. } = args.clone();
    Member {
        id,
        incarnation: Incarnation(random_u64()),
        role: if matches!(args.role, What::Prefill) { Role::Prefill } else { Role::Decode },
        grpc: String::new(),
        admin: String::new(),
        http: String::new(),
        protocol: PROTOCOL_VERSION,
        version: kind(args.kind).to_owned(),
        model: None,
        segment: None,
        store: None,
        engine: Some(EngineInfo {
            kind: kind(args.kind).to_owned(),
            alone: matches!(args.role, What::Both),
            url,
            model,
            served_name,
            group,
            bootstrap_port,
            max_model_len,
            deterministic,
        }),
        draining: false,
        duty: Duty::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_routers_can_reach_is_an_address() {
        for good in ["http://a:1", "http://10.0.0.1:8000/", "http://[::1]:1"] {
            assert_eq!(url(good).unwrap(), good);
        }
        for bad in ["", "a:1", "http://", "https://a:1", "http://a:1/v1", "http://a b:1"] {
            assert!(url(bad).is_err(), "{bad}");
        }
    }
}
