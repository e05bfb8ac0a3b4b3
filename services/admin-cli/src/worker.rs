//! `kvasirctl worker`: what a worker works as.

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand, ValueEnum};
use kvasir_cluster::{Member, View};
use kvasir_proto::v1::{Pin, SetDutyRequest};
use kvasir_types::{PROTOCOL_VERSION, Role};
use serde::Serialize;

use crate::{output::Answer, probe, session::Session};

/// What is to become of a worker.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum WorkerCommand {
    /// Have it work as this from now on. What is under way there goes on to its end; until it is started again
    Role(RoleArgs),
    /// Keep it in its role, whatever the routers' planner thinks; until it is started again (`pinned: true` in its configuration
    /// is for ever)
    Pin {
        /// The worker's name
        name: String,
    },
    /// Let the planner move it again
    Unpin {
        /// The worker's name
        name: String,
    },
}

/// Which worker, and as what.
#[derive(Clone, Debug, Args)]
pub(crate) struct RoleArgs {
    /// The worker's name
    name: String,
    /// What it is to work as
    #[arg(value_enum)]
    role: Wanted,
    /// Pin it there, too: without, a planner may move it again
    #[arg(long)]
    pin: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Wanted {
    /// Reads prompts
    Prefill,
    /// Writes answers
    Decode,
    /// What its name was made for
    Home,
}

/// What came of it.
#[derive(Debug, Serialize)]
struct Became {
    worker: String,
    works_as: String,
    before: String,
    pinned: bool,
}

/// Does what is asked and says what came of it.
pub(crate) async fn run(command: WorkerCommand, session: &Session) -> anyhow::Result<Answer> {
    let (way, view) = (session.way()?, session.view().await?);
    let (name, role, pin) = match &command {
        WorkerCommand::Role(RoleArgs { name, role, pin }) => (name, Some(*role), pin.then_some(Pin::Set)),
        WorkerCommand::Pin { name } => (name, None, Some(Pin::Set)),
        WorkerCommand::Unpin { name } => (name, None, Some(Pin::Clear)),
    };
    let member = find(&view, name)?;
    let role = match role {
        None => String::new(),
        Some(Wanted::Prefill) => Role::Prefill.to_string(),
        Some(Wanted::Decode) => Role::Decode.to_string(),
        Some(Wanted::Home) => member.role.to_string(),
    };
    if !role.is_empty() {
        keep_one(&view, member, &role)?;
    }
    let request = SetDutyRequest {
        protocol_version: PROTOCOL_VERSION,
        incarnation: member.incarnation.0,
        role,
        pin: pin.unwrap_or(Pin::Unspecified).into(),
        term: 0,
        reason: "asked for with kvasirctl".to_owned(),
    };
    let done =
        probe::ask_worker(&member.grpc, &way, async |mut client| client.set_duty(way.signed(request)).await).await;
    let done = done.map_err(|why| anyhow::anyhow!("{}: {why}", member.id))?;
    let became = Became {
        worker: member.id.to_string(),
        works_as: probe::printable(&done.role),
        before: probe::printable(&done.former_role),
        pinned: done.pinned,
    };
    let table = || {
        let Became { worker, works_as, before, pinned } = &became;
        let changed = if works_as == before { "still works" } else { "now works" };
        format!("{worker} {changed} as {works_as}{}\n", if *pinned { ", pinned" } else { "" })
    };
    Ok(session.output().show(&became, table).into())
}

/// The worker of that name.
pub(crate) fn find<'a>(view: &'a View, name: &str) -> anyhow::Result<&'a Member> {
    let workers = || view.members.iter().filter(|member| matches!(member.role, Role::Prefill | Role::Decode));
    let named: Vec<&Member> = workers().filter(|member| member.id.as_str() == name).collect();
    match named[..] {
        [member] => Ok(member),
        [] => {
            let names: Vec<&str> = workers().map(|member| member.id.as_str()).collect();
            bail!("no worker is called {name:?}, there are: {}", names.join(", "))
        }
        _ => bail!("a prefill worker and a decode worker are both called {name:?}: give them different ids"),
    }
}

/// Without a decode worker nobody answers. (Without a prefill worker decode workers read prompts themselves.)
fn keep_one(view: &View, member: &Member, role: &str) -> anyhow::Result<()> {
    if role != "prefill" || member.works_as() == Role::Prefill {
        return Ok(());
    }
    let model = |member: &Member| member.model.as_ref().map(|model| model.name.clone());
    let others = view.working_as(Role::Decode).filter(|other| other.id != member.id && !other.draining);
    others
        .filter(|other| model(other) == model(member))
        .map(drop)
        .next()
        .with_context(|| format!("{} is the last decode worker of its model: nobody would answer", member.id))
}
