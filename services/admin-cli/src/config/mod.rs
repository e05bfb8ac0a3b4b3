//! `kvasirctl config`: what services run with, and changing it while they run.
//!
//! Nothing is written from here: a running member of the kind checks a change and writes it (`POST /config` of its admin
//! port), so what it would not run with does not get into the cluster. What is set and what was changed is read in etcd.

mod show;

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Subcommand};
use kvasir_cluster::{Change, Found, Member, Scope, View};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    output::Answer,
    probe::{self, Way},
    session::Session,
};

/// For members to act on what was set.
const ACT: Duration = Duration::from_secs(5);
/// Between two looks at whether they do.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What is asked about configuration.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// What a member runs with, and where each value comes from; without a name: what is set in the cluster
    Get {
        /// router, prefill, decode, kv-store (the first of them that answers), or a member's name
        whom: Option<String>,
        /// This key, or this section
        key: Option<String>,
    },
    /// Sets keys while services run, for all members of a role or for one of them. A running member checks it
    Set(SetArgs),
    /// What services were started with counts again
    Unset(UnsetArgs),
    /// What is not as by default; with two members: what differs between them
    Diff {
        /// router, prefill, decode, kv-store (the first of them that answers), or a member's name
        one: String,
        /// Another member's name
        other: Option<String>,
    },
    /// What was set and unset, when, and by whom: the last 256 changes
    History {
        /// Only what was set for these: router, prefill, decode, kv-store, or a member's name
        whom: Option<String>,
        /// So many at most, the latest
        #[arg(long, value_name = "COUNT", default_value_t = 50)]
        last: usize,
    },
}

/// How something is changed.
#[derive(Clone, Debug, Args)]
pub(crate) struct How {
    /// Say what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Only if nobody has changed anything since this revision (of `config get --output json`; 0: nothing was set yet)
    #[arg(long, value_name = "REVISION")]
    if_revision: Option<u64>,
    /// Also if what is set now can't be used, as it is another version's or broken: it is lost then
    #[arg(long)]
    replace: bool,
}

/// What is to be set.
#[derive(Clone, Debug, Args)]
pub(crate) struct SetArgs {
    /// router, prefill, decode, kv-store (all members of that role), or a member's name
    whom: String,
    /// What to set: values are YAML
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = assignment)]
    set: Vec<(String, String)>,
    #[command(flatten)]
    how: How,
}

/// What is not to be set any more.
#[derive(Clone, Debug, Args)]
pub(crate) struct UnsetArgs {
    /// router, prefill, decode, kv-store (all members of that role), or a member's name
    whom: String,
    /// Which keys
    #[arg(required = true, value_name = "KEY")]
    keys: Vec<String>,
    #[command(flatten)]
    how: How,
}

/// A member's configuration.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Running {
    pub(crate) member: String,
    pub(crate) role: String,
    pub(crate) revision: u64,
    pub(crate) member_revision: u64,
    pub(crate) refused: Option<String>,
    pub(crate) keys: Vec<Entry>,
}

/// One key of it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) value: Value,
    pub(crate) from: String,
    pub(crate) default: Value,
    pub(crate) live: bool,
}

/// What is set for somebody.
#[derive(Debug, Serialize)]
pub(crate) struct SetFor {
    pub(crate) scope: String,
    pub(crate) revision: u64,
    pub(crate) at_ms: u64,
    pub(crate) who: String,
    pub(crate) set: BTreeMap<String, Value>,
    /// Why it can't be used, as far as that can be said from here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) unusable: Option<String>,
    /// It is for a member that does not run now. If one of that name comes back, it counts.
    pub(crate) gone: bool,
}

/// What was changed.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Done {
    pub(crate) scope: String,
    pub(crate) revision: u64,
    pub(crate) changes: Vec<Change>,
    /// Members that have something else set for themselves.
    #[serde(default)]
    pub(crate) exceptions: Vec<String>,
    /// Whom it was for, and who acts on it.
    #[serde(default)]
    pub(crate) acting: Vec<String>,
    /// Who does not yet, and why.
    #[serde(default)]
    pub(crate) not_yet: BTreeMap<String, String>,
}

/// A key that two have otherwise.
#[derive(Debug, Serialize)]
pub(crate) struct Difference {
    pub(crate) key: String,
    pub(crate) one: Value,
    pub(crate) other: Value,
    pub(crate) from: String,
}

fn assignment(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE, as in limits.max_inflight=1000")?;
    let key = key.trim();
    if key.is_empty() { Err("expected a key before the =".to_owned()) } else { Ok((key.to_owned(), value.to_owned())) }
}

/// Does what is asked and says what came of it.
pub(crate) async fn run(command: ConfigCommand, session: &Session) -> anyhow::Result<Answer> {
    let output = session.output();
    match command {
        ConfigCommand::Get { whom: None, .. } => {
            let all = set_for(session).await?;
            Ok(output.show(&all, || show::documents(&all)).into())
        }
        ConfigCommand::Get { whom: Some(whom), key } => {
            let (way, view) = (session.way()?, session.view().await?);
            let mut running = ask(&view, &whom, &way).await?.1;
            if let Some(key) = &key {
                let below = format!("{key}.");
                running.keys.retain(|entry| entry.key == *key || entry.key.starts_with(&below));
                ensure!(!running.keys.is_empty(), "{} has no key {key:?}", running.member);
            }
            Ok(output.show(&running, || show::running(&running)).into())
        }
        ConfigCommand::Set(SetArgs { whom, set, how }) => {
            let set: BTreeMap<String, String> = set.into_iter().collect();
            let done = change(session, &whom, &json!({ "set": set }), &how).await?;
            Ok(output.show(&done, || show::done(&done, how.dry_run)).into())
        }
        ConfigCommand::Unset(UnsetArgs { whom, keys, how }) => {
            let done = change(session, &whom, &json!({ "unset": keys }), &how).await?;
            Ok(output.show(&done, || show::done(&done, how.dry_run)).into())
        }
        ConfigCommand::Diff { one, other } => {
            let (way, view) = (session.way()?, session.view().await?);
            let running = ask(&view, &one, &way).await?.1;
            let other = match &other {
                Some(other) => Some(ask(&view, other, &way).await?.1),
                None => None,
            };
            let differences = differences(&running, other.as_ref());
            Ok(output.show(&differences, || show::differences(&running, other.as_ref(), &differences)).into())
        }
        ConfigCommand::History { whom, last } => {
            let (registry, _) = kvasir_cluster::connect_etcd(session.etcd()?).await?;
            let mut changes = registry.changes().await?;
            if let Some(whom) = whom {
                let view = View::clone(&registry.view().borrow());
                let wanted = match scope(&view, &whom) {
                    Ok(scope) => scope.to_string(),
                    Err(_) => whom, // it may be gone, its history is not
                };
                let end = format!("/{wanted}");
                changes.retain(|change| change.scope == wanted || change.scope.ends_with(&end));
            }
            changes.drain(..changes.len().saturating_sub(last));
            let changes: Vec<Change> = changes.into_iter().map(show::shown).collect();
            Ok(output.show(&changes, || show::history(&changes)).into())
        }
    }
}

/// Whom a name means.
pub(crate) fn scope(view: &View, whom: &str) -> anyhow::Result<Scope> {
    if let Ok(scope) = whom.strip_suffix("-worker").unwrap_or(whom).parse::<Scope>() {
        return Ok(scope);
    }
    let named = || members(view).filter(|member| member.id.as_str() == whom);
    match named().collect::<Vec<_>>()[..] {
        [member] => Ok(Scope::one(member.role, member.id.clone())),
        [] => {
            let all: Vec<&str> = members(view).map(|member| member.id.as_str()).collect();
            let all = if all.is_empty() { "nobody is running".to_owned() } else { all.join(", ") };
            bail!("{whom:?} is neither router, prefill, decode or kv-store nor a member's name ({all})")
        }
        _ => bail!("several members are called {whom:?}: name one as ROLE/{whom}"),
    }
}

/// Those that have a configuration of ours.
fn members(view: &View) -> impl Iterator<Item = &Member> {
    view.members.iter().filter(|member| member.engine.is_none() && !member.admin.is_empty())
}

fn members_of<'a>(view: &'a View, scope: &Scope) -> Vec<&'a Member> {
    let is =
        |member: &&Member| member.role == scope.role && scope.member.as_ref().is_none_or(|wanted| *wanted == member.id);
    members(view).filter(is).collect()
}

/// The first of them that answers, and what it runs with.
async fn ask<'a>(view: &'a View, whom: &str, way: &Way) -> anyhow::Result<(&'a Member, Running)> {
    let scope = scope(view, whom)?;
    let mut why = Vec::new();
    for member in members_of(view, &scope) {
        match running(member, way).await {
            Ok(running) => return Ok((member, running)),
            Err(error) => why.push(format!("{}: {error}", member.id)),
        }
    }
    ensure!(!why.is_empty(), "no {scope} is running");
    bail!("no {scope} answers ({})", why.join("; "))
}

async fn running(member: &Member, way: &Way) -> Result<Running, String> {
    let told = probe::admin(&member.admin, "/config", None, way).await?;
    serde_json::from_value(told).map_err(|_| "an answer that makes no sense".to_owned())
}

async fn set_for(session: &Session) -> anyhow::Result<Vec<SetFor>> {
    let (etcd, view) = (session.etcd()?, session.view().await?);
    let settings = kvasir_cluster::read_settings(&etcd).await?;
    let mut all = Vec::new();
    for (scope, found) in settings.documents {
        let gone = scope.member.is_some() && members_of(&view, &scope).is_empty();
        let scope = scope.to_string();
        match found {
            Found::Unusable { revision, reason } => {
                let (who, set) = (String::new(), BTreeMap::new());
                all.push(SetFor { scope, revision, at_ms: 0, who, set, unusable: Some(reason), gone });
            }
            Found::Document(document) if document.set.is_empty() => {}
            Found::Document(document) => {
                let set = document.set.into_iter().map(show::shown_value).collect();
                let (revision, at_ms, who) = (document.revision, document.at_ms, document.who);
                all.push(SetFor { scope, revision, at_ms, who, set, unusable: None, gone });
            }
        }
    }
    Ok(all)
}

/// Has a running member make a change, and waits until everybody it is for acts on it.
pub(crate) async fn change(session: &Session, whom: &str, what: &Value, how: &How) -> anyhow::Result<Done> {
    let (way, view) = (session.way()?, session.view().await?);
    let scope = scope(&view, whom)?;
    let (checker, _) =
        ask(&view, whom, &way).await.map_err(|error| error.context("nothing was changed, as nobody could check it"))?;
    let mut body = what.clone();
    body["scope"] = scope.to_string().into();
    body["replace"] = how.replace.into();
    if let Some(revision) = how.if_revision {
        body["if_revision"] = revision.into();
    }
    let path = if how.dry_run { "/config/check" } else { "/config" };
    let told = probe::admin(&checker.admin, path, Some(&body), &way).await;
    let told = told.map_err(|why| anyhow::anyhow!("{}: {why}", checker.id))?;
    let mut done: Done = serde_json::from_value(told).context("an answer that makes no sense")?;
    done.changes = done.changes.into_iter().map(show::shown).collect();
    if !how.dry_run {
        await_all(&members_of(&view, &scope), &scope, &mut done, &way).await;
    }
    Ok(done)
}

async fn await_all(members: &[&Member], scope: &Scope, done: &mut Done, way: &Way) {
    let end = Instant::now() + ACT;
    for member in members {
        let why = loop {
            let why = match running(member, way).await {
                Ok(Running { revision, member_revision, refused, .. }) => {
                    let seen = if scope.member.is_some() { member_revision } else { revision };
                    match refused {
                        Some(why) if seen >= done.revision => break Some(why),
                        None if seen >= done.revision => break None,
                        _ => "has not heard of it yet".to_owned(),
                    }
                }
                Err(why) => why,
            };
            if Instant::now() >= end {
                break Some(why);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        };
        match why {
            None => done.acting.push(member.id.to_string()),
            Some(why) => _ = done.not_yet.insert(member.id.to_string(), why),
        }
    }
}

impl How {
    /// Now, whoever has changed something before.
    pub(crate) fn at_once() -> Self {
        Self { dry_run: false, if_revision: None, replace: false }
    }
}

fn differences(one: &Running, other: Option<&Running>) -> Vec<Difference> {
    let difference = |entry: &Entry, against: &Value| {
        let differs = entry.value != *against;
        differs.then(|| Difference {
            key: entry.key.clone(),
            one: entry.value.clone(),
            other: against.clone(),
            from: entry.from.clone(),
        })
    };
    let Some(other) = other else {
        return one.keys.iter().filter_map(|entry| difference(entry, &entry.default)).collect();
    };
    let theirs: BTreeMap<&str, &Entry> = other.keys.iter().map(|entry| (entry.key.as_str(), entry)).collect();
    let ours: BTreeMap<&str, &Entry> = one.keys.iter().map(|entry| (entry.key.as_str(), entry)).collect();
    let mut all: Vec<Difference> = one
        .keys
        .iter()
        .filter_map(|entry| {
            difference(entry, theirs.get(entry.key.as_str()).map_or(&Value::Null, |other| &other.value))
        })
        .collect();
    let lacking = other.keys.iter().filter(|entry| !ours.contains_key(entry.key.as_str()) && !entry.value.is_null());
    all.extend(lacking.map(|entry| Difference {
        key: entry.key.clone(),
        one: Value::Null,
        other: entry.value.clone(),
        from: entry.from.clone(),
    }));
    all
}
