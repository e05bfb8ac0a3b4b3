//! `kvasirctl route`: how routers choose workers, why, and choosing otherwise.
//!
//! Routers decide each by itself, by what each knows: `policy` asks and changes all of them, `explain` asks one.

mod show;

use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use clap::{ArgGroup, Args, Subcommand};
use kvasir_cluster::{Member, View};
use kvasir_types::Role;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    config,
    kv::{content, numbers},
    output::Answer,
    probe::{self, Way},
    session::Session,
};

/// What is asked about routing.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum RouteCommand {
    /// Where a request would go now, what that would cost and what else was possible. Nothing is sent to a worker
    Explain(ExplainArgs),
    /// Which policy the routers choose by; with a name: choose by that from now on (`config set router policy=NAME`)
    Policy {
        /// kv-aware, session-sticky, least-loaded, round-robin, random
        name: Option<String>,
        /// This router only
        #[arg(long, value_name = "NAME")]
        router: Option<String>,
    },
}

/// Which request.
#[derive(Clone, Debug, Args)]
#[command(group(ArgGroup::new("prompt").required(true).args(["text", "tokens", "chat"])))]
pub(crate) struct ExplainArgs {
    /// The prompt's text in a file ("-": standard input), as it would be sent to /v1/completions
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// The prompt's token ids in a file ("-": standard input): numbers with anything between them
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// The body of a request to /v1/chat/completions in a file ("-": standard input)
    #[arg(long, value_name = "FILE")]
    chat: Option<PathBuf>,
    /// The model's name, if several are served
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// The tenant's cache salt
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    salt: String,
    /// Ask this router: each has its own view of loads and caches
    #[arg(long, value_name = "NAME")]
    router: Option<String>,
}

/// A router's answer to `explain`.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Explanation {
    #[serde(default)]
    pub(crate) router: String,
    pub(crate) policy: String,
    pub(crate) reason: String,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) decode: String,
    pub(crate) prefill: Vec<String>,
    pub(crate) candidates: Vec<Candidate>,
}

/// A pair, and what it would cost.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Candidate {
    pub(crate) decode: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prefill: Option<String>,
    pub(crate) cached_tokens: u64,
    pub(crate) total_ms: f32,
    pub(crate) compute_ms: f32,
    pub(crate) wait_ms: f32,
    pub(crate) transfer_ms: f32,
    pub(crate) decode_ms: f32,
    #[serde(default)]
    pub(crate) late_ms: f32,
}

/// A router and its policy, or why it did not say.
#[derive(Debug, Serialize)]
pub(crate) struct Chooses {
    pub(crate) router: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) policy: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// Does what is asked and says what came of it.
pub(crate) async fn run(command: RouteCommand, session: &Session) -> anyhow::Result<Answer> {
    let (way, view) = (session.way()?, session.view().await?);
    match &command {
        RouteCommand::Explain(args) => {
            let routers = routers(&view, args.router.as_deref())?;
            let router = routers.first().context("no router is running")?;
            let explanation = explain(args, &view, router, &way).await?;
            Ok(session.output().show(&explanation, || show::explanation(&explanation)).into())
        }
        RouteCommand::Policy { name, router } => {
            let mut all = Vec::new();
            let routers = routers(&view, router.as_deref())?;
            // Of all of them it is one setting; of one of them, its own.
            let own = if router.is_some() { name.as_deref() } else { None };
            if let (Some(name), None) = (name, router) {
                let how = config::How::at_once();
                let done = config::change(session, "router", &json!({ "set": { "policy": name } }), &how).await?;
                for exception in done.exceptions {
                    let scope = format!("router/{exception}");
                    config::change(session, &scope, &json!({ "unset": ["policy"] }), &how).await?;
                }
            }
            for router in routers {
                all.push(policy(router, own, &way).await);
            }
            if name.is_some()
                && let Some(failed) = all.iter().find_map(|one| Some((&one.router, one.error.as_ref()?)))
            {
                bail!("{}: {}", failed.0, failed.1);
            }
            Ok(session.output().show(&all, || show::policies(&all)).into())
        }
    }
}

fn routers<'a>(view: &'a View, name: Option<&str>) -> anyhow::Result<Vec<&'a Member>> {
    let all: Vec<&Member> = view.role(Role::Router).collect();
    ensure!(!all.is_empty(), "no router is running (or --prefix names another cluster)");
    let Some(name) = name else { return Ok(all) };
    let names = all.iter().map(|router| router.id.as_str()).collect::<Vec<_>>().join(", ");
    let named: Vec<&Member> = all.into_iter().filter(|router| router.id.as_str() == name).collect();
    ensure!(!named.is_empty(), "no router is called {name:?}, there are: {names}");
    Ok(named)
}

async fn policy(router: &Member, name: Option<&str>, way: &Way) -> Chooses {
    let body = name.map(|name| json!({ "policy": name }));
    let told = probe::admin(&router.admin, "/route/policy", body.as_ref(), way).await;
    let told = told.and_then(|answer| match answer["policy"].as_str() {
        Some(policy) => Ok(probe::printable(policy)),
        None => Err("did not say its policy".to_owned()),
    });
    let (policy, error) = match told {
        Ok(policy) => (Some(policy), None),
        Err(why) => (None, Some(why)),
    };
    Chooses { router: router.id.to_string(), policy, error }
}

async fn explain(args: &ExplainArgs, view: &View, router: &Member, way: &Way) -> anyhow::Result<Explanation> {
    let mut question = json!({ "salt": args.salt });
    let mut model = args.model.clone();
    if let Some(text) = &args.text {
        question["text"] = content(text)?.into();
    } else if let Some(tokens) = &args.tokens {
        let ids = numbers(&content(tokens)?).with_context(|| tokens.display().to_string())?;
        question["tokens"] = ids.iter().map(|id| id.0).collect();
    } else if let Some(chat) = &args.chat {
        let mut body: Value = serde_json::from_str(&content(chat)?).with_context(|| chat.display().to_string())?;
        ensure!(body.is_object(), "{}: not a request's body", chat.display());
        model = model.or_else(|| body["model"].as_str().map(str::to_owned));
        if body["model"].is_null() {
            body["model"] = json!(model.clone().unwrap_or_default());
        }
        question["chat"] = body;
    }
    question["model"] = match model {
        Some(model) => model.into(),
        None => only_model(view)?.into(),
    };
    let told = probe::admin(&router.admin, "/route/explain", Some(&question), way).await;
    let told = told.map_err(|why| anyhow::anyhow!("router {}: {why}", router.id))?;
    let mut explanation: Explanation = serde_json::from_value(told).context("an answer that makes no sense")?;
    explanation.router = router.id.to_string();
    Ok(explanation)
}

fn only_model(view: &View) -> anyhow::Result<String> {
    let mut names: Vec<&str> =
        view.members.iter().filter_map(|member| Some(member.model.as_ref()?.name.as_str())).collect();
    names.sort_unstable();
    names.dedup();
    match names[..] {
        [name] => Ok(name.to_owned()),
        [] => bail!("no worker is running"),
        _ => bail!("--model is needed, there are: {}", names.join(", ")),
    }
}
