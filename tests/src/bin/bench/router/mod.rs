//! Our router beside others: what a request, a chat and a streamed token cost of processor time, how long requests take,
//! and ten thousand streams at once.
//!
//! Every router has workers of its own kind behind it that compute nothing ([`worker`]), in processes of their own; the same
//! clients ask all of them ([`load`]). What counts is the router's own processor time, so that clients and workers, which
//! share the machine with it, don't. Routers take turns within a repetition, and who goes first changes; ratios are taken
//! within a repetition. smg and sglang-router pass bodies on without tokenizing; Dynamo's frontend does the same work as
//! ours, in front of its own simulated worker.
//!
//! More rows: a [`Load`] for what all routers are given, with its row in [`goals`]; or a function beside
//! [`hold::run`] for what only ours does: [`moved`] kills workers, [`alone`](mod@alone) runs parts of ours by themselves. How good our choices of
//! workers are, [`simulated`] tells, without a clock.
//!
//! All of it runs in a network namespace of its own where one can be had: a part of Dynamo listens on every address.

mod alone;
mod goals;
mod hold;
mod load;
mod moved;
mod plan;
mod sides;
mod simulated;
pub mod worker;

use std::{
    collections::HashMap,
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kvasir_tests::workspace;
use serde_json::json;

pub use self::hold::raise_limit;
use self::{
    load::{Plan, Until},
    plan::{Figure, Found, Load, PROMPT_TOKENS, ROUNDS, SECONDS, STEP_MS, Side, VARIANTS},
    sides::Router,
    worker::Pace,
};
use crate::{Options, child::Child, report::Report};

/// As many repetitions as keep a whole run below a quarter of an hour.
const REPETITIONS: usize = 5;
/// How often the tokenizer library goes over all texts.
const TOKENIZER_ROUNDS: usize = 20;

/// Installs the rivals, as far as they can be: there is no network where they are measured.
pub fn install() {
    for side in Side::ALL.into_iter().filter(|side| *side != Side::Ours) {
        if let Err(error) = sides::python(side) {
            println!("{} can't be installed: {error:#}", side.name());
        }
    }
}

/// Measures, and says how far it is: a run takes minutes.
pub async fn run(options: &Options) -> Result<Report> {
    let repetitions = options.repetitions.min(REPETITIONS);
    raise_limit()?;
    let dir = tempfile::tempdir()?;
    let (mut found, started) = (Found::default(), Instant::now());
    let mut tokenizer = start_tokenizer(dir.path())?;
    let texts = texts(&mut tokenizer)?;
    let routers = start(dir.path(), &mut found).await?;
    let requests = requests(&texts);
    for &side in routers.keys() {
        for load in Load::ALL.into_iter().filter(|load| load.sides().contains(&side)) {
            // Connections, page tables, code: not counted.
            let warm = Plan { until: Until::Answers(1), ..plan(load) };
            if let Err(error) = load::run(&routers[&side].address, &requests[&(side, load)], warm).await.all_well() {
                ensure!(side != Side::Ours, "{}: {error:#}", load.name());
                say_missing(side, &error.context(load.name()), &mut found);
            }
        }
    }
    for repetition in 0..repetitions {
        for load in Load::ALL {
            let mut turn = load.sides().to_vec();
            turn.rotate_left(repetition % load.sides().len());
            for side in turn.into_iter().filter(|side| routers.contains_key(side)) {
                if found.missing(side).is_some() {
                    continue;
                }
                match measure(side, &routers[&side], load, &requests[&(side, load)]).await {
                    Ok(figure) => found.add(side, load, figure),
                    // A rival may break; its row says how, and the others go on.
                    Err(error) if side != Side::Ours => say_missing(side, &error.context(load.name()), &mut found),
                    Err(error) => return Err(error.context(load.name())),
                }
            }
            println!("        {}: {}", load.name(), middles(&found, load));
        }
        found.tokenizer_us.push(alone(&mut tokenizer, &texts)?);
        println!("{:>4} s  {} of {repetitions}", started.elapsed().as_secs(), repetition + 1);
    }
    let mut report = Report::new("router");
    goals::rows(&found).into_iter().for_each(|row| report.push(row));
    let held = hold::run(&routers[&Side::Ours], options.smoke).await?;
    held.into_iter().for_each(|row| report.push(row));
    drop(routers);
    for rows in [moved::rows(repetitions).await?, alone::rows()?, simulated::rows()?] {
        rows.into_iter().for_each(|row| report.push(row));
    }
    println!("{:>4} s  done", started.elapsed().as_secs());
    Ok(report)
}

/// Starts all routers that can be.
async fn start(dir: &Path, found: &mut Found) -> Result<HashMap<Side, Router>> {
    let mut routers = HashMap::new();
    for side in Side::ALL {
        match Router::start(side, dir).await {
            Ok(router) => drop(routers.insert(side, router)),
            Err(error) if side == Side::Ours => return Err(error),
            Err(error) => say_missing(side, &error, found),
        }
    }
    Ok(routers)
}

fn say_missing(side: Side, error: &anyhow::Error, found: &mut Found) {
    println!("{} is left out: {error:#}", side.name());
    found.miss(side, &format!("{error:#}"));
}

type Requests = HashMap<(Side, Load), Arc<Vec<Vec<u8>>>>;

/// All requests of all loads.
fn requests(texts: &[String]) -> Requests {
    let mut requests = Requests::new();
    for load in Load::ALL {
        let pace = if load == Load::Stream { Pace { every_ms: STEP_MS, phase_ms: 0 } } else { Pace::AT_ONCE };
        for &side in load.sides() {
            let variant = |variant: usize| {
                let (path, body) = match load {
                    Load::Chat => plan::chat(&texts[variant]),
                    _ => plan::ids(side, variant, pace, load.tokens(), load.streams()),
                };
                load::request(path, &body)
            };
            requests.insert((side, load), Arc::new((0..VARIANTS).map(variant).collect()));
        }
    }
    requests
}

fn plan(load: Load) -> Plan {
    let until = match load {
        Load::Stream | Load::Burst => Until::Answers(ROUNDS),
        Load::Ids { .. } | Load::Chat => Until::After(Duration::from_secs_f64(SECONDS)),
    };
    Plan { clients: load.clients(), until, spread: Duration::ZERO }
}

async fn measure(side: Side, router: &Router, load: Load, requests: &Arc<Vec<Vec<u8>>>) -> Result<Figure> {
    // Tokens at once are over soon: processor time is told in steps of ten milliseconds.
    let rounds = if load == Load::Burst { 5 } else { 1 };
    let before = router.cpu_seconds();
    let (mut answers, mut latencies_us) = (0, Vec::new());
    for _ in 0..rounds {
        let outcome = load::run(&router.address, requests, plan(load)).await.all_well()?;
        // Dynamo puts several tokens into an event now and then.
        let each = if side == Side::Dynamo { 1 } else { load.tokens() as usize };
        let least = if load.streams() { outcome.answers * each } else { 0 };
        ensure!(outcome.answers > 0 && outcome.events >= least, "{} events", outcome.events);
        answers += outcome.answers;
        latencies_us.extend(outcome.latencies_us);
    }
    let cpu = router.cpu_seconds() - before;
    latencies_us.sort_by(f64::total_cmp);
    let outcome = load::Outcome { latencies_us, ..load::Outcome::default() };
    let done = answers as f64 * f64::from(load.tokens());
    Ok(Figure { per_cpu_second: done / cpu, p50_us: outcome.percentile_us(50), p99_us: outcome.percentile_us(99) })
}

fn middles(found: &Found, load: Load) -> String {
    let sides = load.sides().iter().filter_map(|&side| {
        let middle = |pick| Some(found.of(side, load, pick)).filter(|all| !all.is_empty()).map(crate::report::median);
        let (rate, p50) = (middle(|figure| figure.per_cpu_second)?, middle(|figure| figure.p50_us)?);
        Some(format!("{} {rate:.0} per CPU second, p50 {p50:.0} µs", side.name()))
    });
    sides.collect::<Vec<_>>().join("; ")
}

/// The program that tokenizes and does nothing else.
fn start_tokenizer(dir: &Path) -> Result<Child> {
    let mut command = Command::new(workspace::binary("tokenize")?);
    command.arg(workspace::demo_model().join("tokenizer.json"));
    Child::start("tokenize", command, dir)
}

/// Texts of about as many tokens as a prompt is to have.
fn texts(tokenizer: &mut Child) -> Result<Vec<String>> {
    const PROBE: usize = 1000;
    let answer = tokenizer.ask(&json!({"texts": [plan::text(0, PROBE)], "rounds": 1}))?;
    let tokens = answer["tokens"].as_u64().context("it counts tokens")?;
    let words = PROBE * PROMPT_TOKENS / tokens as usize;
    Ok((0..VARIANTS).map(|variant| plan::text(variant, words)).collect())
}

/// Processor time of the tokenizer library for one text, in µs.
fn alone(tokenizer: &mut Child, texts: &[String]) -> Result<f64> {
    let before = tokenizer.cpu_seconds();
    tokenizer.ask(&json!({"texts": texts, "rounds": TOKENIZER_ROUNDS}))?;
    Ok((tokenizer.cpu_seconds() - before) * 1e6 / (texts.len() * TOKENIZER_ROUNDS) as f64)
}
