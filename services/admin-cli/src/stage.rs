//! `kvasirctl workers show|cordon|uncordon|drain|undrain`: a worker in detail, and taking it out of service and back.
//!
//! A drain goes on in the worker: leaving this program while it waits changes nothing.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};
use clap::{Args, Subcommand};
use kvasir_cluster::{Member, View};
use kvasir_proto::{convert, v1};
use kvasir_types::{PROTOCOL_VERSION, Role, Stage};
use serde::Serialize;

use crate::{
    kv::time,
    output::{Answer, Output},
    probe::{self, Way},
    render::duration,
    session::Session,
    worker::find,
};

/// Between two looks at a worker that drains.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// What is to become of a worker, or to be known of it.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum StageCommand {
    /// One worker: where it is, what it does, how far it is on its way out of service
    Show {
        /// The worker's name
        name: String,
    },
    /// Give it no new requests; what it has goes on
    Cordon(CordonArgs),
    /// Give it requests again
    Uncordon {
        /// The worker's name
        name: String,
    },
    /// Take it out of service: no new requests, those it has end here or, after the deadline, go on at other workers, what it
    /// has computed goes to the KV store. Waits until it is drained, safe to delete
    Drain(DrainArgs),
    /// Take a drain back, at any time: it serves again
    Undrain {
        /// The worker's name
        name: String,
    },
}

/// Which worker.
#[derive(Clone, Debug, Args)]
pub(crate) struct CordonArgs {
    /// The worker's name
    name: String,
    /// Though it is the last one of its role and model
    #[arg(long)]
    force: bool,
}

/// Which worker, and how patiently.
#[derive(Clone, Debug, Args)]
pub(crate) struct DrainArgs {
    /// The worker's name
    name: String,
    /// Though it is the last one of its role and model
    #[arg(long)]
    force: bool,
    /// Requests that still run after so long go on at other workers: 90s, 15m [default: the worker's shutdown.grace_ms]
    #[arg(long, value_name = "TIME", value_parser = time)]
    deadline: Option<Duration>,
    /// How long to wait: 90s, 15m
    #[arg(long = "for", value_name = "TIME", default_value = "10m", value_parser = time)]
    patience: Duration,
    /// Wait until it is drained (what is done unless --no-wait says otherwise)
    #[arg(long, conflicts_with = "no_wait")]
    wait: bool,
    /// Begin, and don't wait for the end
    #[arg(long)]
    no_wait: bool,
}

/// How far a worker is.
#[derive(Debug, PartialEq, Serialize)]
struct Progress {
    worker: String,
    stage: Stage,
    /// On its way to drained.
    leaving: bool,
    in_stage_ms: u64,
    requests_left: u32,
    blocks_left: u64,
    deadline_ms: u64,
    moved: u32,
    blocks_lost: u64,
}

impl Progress {
    fn of(member: &Member, lifecycle: Option<v1::Lifecycle>) -> Self {
        let of = lifecycle.unwrap_or_default();
        Self {
            worker: member.id.to_string(),
            stage: convert::stage(of.stage),
            leaving: of.leaving,
            in_stage_ms: of.in_stage_ms,
            requests_left: of.requests_left,
            blocks_left: of.blocks_left,
            deadline_ms: of.deadline_ms,
            moved: of.moved,
            blocks_lost: of.blocks_lost,
        }
    }

    /// What changes while somebody waits.
    fn line(&self) -> String {
        match self.stage {
            Stage::Draining if self.requests_left > 0 => {
                let moved = if self.deadline_ms > 0 { "" } else { ", going on elsewhere" };
                format!("draining: {}{moved}", count(self.requests_left.into(), "request", "left"))
            }
            Stage::Draining => format!("draining: {}", count(self.blocks_left, "block", "to write back")),
            Stage::Drained => "drained, safe to delete".to_owned(),
            Stage::Cordoned if self.leaving => "cordoned, about to drain".to_owned(),
            stage => stage.to_string(),
        }
    }

    /// What came of it.
    fn end(&self) -> String {
        let mut text = format!("{}: {}\n", self.worker, self.line());
        if self.stage == Stage::Cordoned && !self.leaving {
            let left = count(self.requests_left.into(), "request", "left");
            text = format!("{}: cordoned, {left}\n", self.worker);
        }
        if self.moved > 0 && self.stage >= Stage::Draining {
            let _ = writeln!(text, "  {} went on at other workers", count(self.moved.into(), "request", "").trim());
        }
        if self.blocks_lost > 0 && self.stage >= Stage::Draining {
            let lost = count(self.blocks_lost, "block", "");
            let _ =
                writeln!(text, "  {} not taken by the KV store in time: computed again when asked for", lost.trim());
        }
        text
    }
}

fn count(number: u64, what: &str, rest: &str) -> String {
    format!("{number} {what}{} {rest}", if number == 1 { "" } else { "s" })
}

/// Does what is asked and says what came of it.
pub(crate) async fn run(command: StageCommand, session: &Session) -> anyhow::Result<Answer> {
    let view = session.view().await?;
    let (way, output) = (session.way()?, session.output());
    let set = async |member: &Member, stage: v1::Stage, deadline: Option<Duration>| {
        let request = v1::SetStageRequest {
            protocol_version: PROTOCOL_VERSION,
            incarnation: member.incarnation.0,
            stage: stage.into(),
            deadline_ms: deadline.map(|deadline| deadline.as_millis() as u64),
            reason: "asked for with kvasirctl".to_owned(),
        };
        let done =
            probe::ask_worker(&member.grpc, &way, async |mut client| client.set_stage(way.signed(request)).await);
        let done = done.await.map_err(|why| anyhow::anyhow!("{}: {why}", member.id))?;
        anyhow::Ok(Progress::of(member, done.now))
    };
    let progress = match &command {
        StageCommand::Show { name } => return show(ours(&view, name)?, &way, output).await,
        StageCommand::Cordon(CordonArgs { name, force }) => {
            let member = ours(&view, name)?;
            keep_one(&view, member, *force)?;
            set(member, v1::Stage::Cordoned, None).await?
        }
        StageCommand::Uncordon { name } => {
            let member = ours(&view, name)?;
            let now = ask(member, &way).await.map_err(|why| anyhow::anyhow!("{name}: {why}"))?;
            let leaving = now.leaving || now.stage >= Stage::Draining;
            ensure!(!leaving, "{name} is not only cordoned but {}: `undrain` takes that back", now.line());
            set(member, v1::Stage::Serving, None).await?
        }
        StageCommand::Undrain { name } => set(ours(&view, name)?, v1::Stage::Serving, None).await?,
        StageCommand::Drain(args) => {
            let member = ours(&view, &args.name)?;
            keep_one(&view, member, args.force)?;
            let begun = set(member, v1::Stage::Drained, args.deadline).await?;
            if args.no_wait { begun } else { wait(member, &way, args.patience, output, begun).await? }
        }
    };
    Ok(output.show(&progress, || progress.end()).into())
}

/// The worker of that name, which must be one of ours.
fn ours<'a>(view: &'a View, name: &str) -> anyhow::Result<&'a Member> {
    if view.role(Role::KvStore).any(|node| node.id.as_str() == name) {
        bail!("{name} is a node of the KV store: `kvasirctl kv drain {name}`");
    }
    let member = find(view, name)?;
    ensure!(
        member.engine.is_none(),
        "{name} is an engine of somebody else's: `kvasirctl engine remove {name}` takes it out of service"
    );
    Ok(member)
}

/// Who is the last of its kind does not go by mistake.
fn keep_one(view: &View, member: &Member, force: bool) -> anyhow::Result<()> {
    let model = |member: &Member| member.model.as_ref().map(|model| model.name.clone());
    let role = member.works_as();
    let mut others = view.working_as(role).filter(|other| other.id != member.id && !other.draining);
    if force || member.draining || others.any(|other| model(other) == model(member)) {
        return Ok(());
    }
    let then = match role {
        Role::Decode => "nobody would answer",
        _ => "decode workers would have to read all prompts themselves",
    };
    let of = model(member).map_or_else(String::new, |model| format!(" of model {model}"));
    bail!("{} is the last {role} worker{of}: {then}; say --force if that is meant", member.id)
}

async fn status(member: &Member, way: &Way) -> Result<v1::StatusResponse, String> {
    probe::ask_worker(&member.grpc, way, async |mut client| client.status(v1::StatusRequest {}).await).await
}

async fn ask(member: &Member, way: &Way) -> Result<Progress, String> {
    Ok(Progress::of(member, status(member, way).await?.lifecycle))
}

/// Watches a worker until it is drained.
async fn wait(
    member: &Member,
    way: &Way,
    patience: Duration,
    output: Output,
    begun: Progress,
) -> anyhow::Result<Progress> {
    let (start, id) = (Instant::now(), &member.id);
    let (mut now, mut told) = (begun, String::new());
    loop {
        let line = now.line();
        if line != told && matches!(output, Output::Table | Output::Wide) {
            eprintln!("{id}: {line}");
        }
        told = line;
        match now.stage {
            Stage::Drained => return Ok(now),
            Stage::Serving => bail!("{id} serves again: the drain was taken back"),
            _ => {}
        }
        let patient = start.elapsed() < patience;
        ensure!(patient, "{id} is {told} after {} s; it goes on, ask again", patience.as_secs());
        tokio::time::sleep(LOOK_AGAIN).await;
        match status(member, way).await {
            Ok(status) if status.incarnation != member.incarnation.0 => {
                bail!("{id} was started again meanwhile, and serves")
            }
            Ok(status) => now = Progress::of(member, status.lifecycle),
            // It may be busy for a moment; one that is gone is not asked for ever.
            Err(why) => ensure!(start.elapsed() < patience, "{id}: {why}"),
        }
    }
}

async fn show(member: &Member, way: &Way, output: Output) -> anyhow::Result<Answer> {
    let status = status(member, way).await.map_err(|why| anyhow::anyhow!("{}: {why}", member.id))?;
    let progress = Progress::of(member, status.lifecycle);
    let blocks = status.blocks.unwrap_or_default();
    let model = member.model.as_ref();
    let shown = serde_json::json!({
        "worker": member.id.as_str(),
        "role": member.role,
        "works_as": member.works_as(),
        "pinned": member.duty.pinned,
        "incarnation": member.incarnation.to_string(),
        "version": probe::printable(&status.version),
        "protocol": member.protocol,
        "grpc": member.grpc,
        "admin": member.admin,
        "model": model.map(|model| model.name.clone()),
        "fingerprint": model.map(|model| model.fingerprint.to_string()),
        "max_model_len": model.map(|model| model.max_model_len),
        "uptime_ms": status.uptime_ms,
        "running": status.running,
        "waiting": status.waiting,
        "requests_total": status.requests_total,
        "blocks": {
            "total": blocks.total, "free": blocks.free, "cached": blocks.cached, "in_use": blocks.in_use,
        },
        "peers": status.peers.len(),
        "lifecycle": progress,
    });
    let table = || {
        let moved = if member.works_as() == member.role { String::new() } else { format!(" (was {})", member.role) };
        let pinned = if member.duty.pinned { ", pinned" } else { "" };
        let mut text = format!("{}: {}{moved}{pinned}, {}\n", member.id, member.works_as(), progress.line());
        let mut line = |name: &str, value: String| text.push_str(&format!("  {name:9} {value}\n"));
        if let Some(model) = model {
            line("model", format!("{}, {}, {} tokens", model.name, model.fingerprint, model.max_model_len));
        }
        line("address", format!("grpc {}, admin {}", member.grpc, member.admin));
        line("version", format!("{}, protocol {}, life {}", member.version, member.protocol, member.incarnation));
        line("up", duration(status.uptime_ms));
        line(
            "requests",
            format!("{} running, {} waiting, {} in all", status.running, status.waiting, status.requests_total),
        );
        let v1::BlockCounts { total, free, cached, in_use } = blocks;
        line("blocks", format!("{total}: {free} free, {cached} cached, {in_use} in use"));
        line("peers", format!("{} that it moves blocks to or from", status.peers.len()));
        if progress.stage != Stage::Serving {
            line("stage", format!("{} for {}", progress.line(), duration(progress.in_stage_ms)));
        }
        text
    };
    Ok(output.show(&shown, table).into())
}
