//! `kvasirctl` as a tool that must not be in the way: `bench` beside another load generator against a server that costs
//! nothing, as many streams as one core should hold, and `status` of a large cluster.
//!
//! What counts of load generators is their own processor time, all of their processes, so that the server, which shares the
//! machine with them, doesn't. Starting is taken out: each runs with few requests and with many, and what lies between is told.

mod rival;
pub mod server;

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kvasir_tests::{Etcd, workspace};
use serde_json::Value;

use crate::{
    Options,
    child::Child,
    report::{Report, Row},
};

/// As many repetitions as keep a run below ten minutes.
const REPETITIONS: usize = 5;
/// Requests of the short run and of the long one.
const REQUESTS: [usize; 2] = [200, 2200];
/// Requests at a time.
const LANES: usize = 50;
/// Words of prompts, tokens of answers.
const PROMPT: usize = 64;
const TOKENS: usize = 32;
/// Streams held at once; where it is only to be seen that it works, and how their tokens come.
const STREAMS: [usize; 2] = [2000, 100];
const STREAM_TOKENS: usize = 50;
const EVERY_MS: u64 = 100;
/// Workers in the large cluster, and how long `status` of it may take.
const WORKERS: usize = 200;
const STATUS_MS: f64 = 200.0;

/// Measures.
pub async fn run(options: &Options) -> Result<Report> {
    let repetitions = options.repetitions.min(REPETITIONS);
    crate::router::raise_limit()?;
    let dir = tempfile::tempdir()?;
    let mut report = Report::new("ctl");
    let mut server = Child::start("ctl-server", itself(&["ctl", "server"])?, dir.path())?;
    let address = server.line()?;

    let rival = rival::Rival::find();
    if let Err(error) = &rival {
        println!("{} is left out: {error:#}", rival::NAME);
    }
    let requests = if options.smoke { [10, 60] } else { REQUESTS };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut missing = rival.as_ref().err().map(|error| format!("{error:#}"));
    for repetition in 0..repetitions {
        ours.push(per_cpu_second(requests, |requests| our_seconds(&address, requests, dir.path()))?);
        println!("{} of {repetitions}: ours {:.0} requests per CPU second", repetition + 1, ours[repetition]);
        if let Ok(rival) = &rival
            && missing.is_none()
        {
            match per_cpu_second(requests, |requests| rival.seconds(&address, requests, LANES, PROMPT, TOKENS)) {
                Ok(rate) => theirs.push(rate),
                Err(error) => missing = Some(format!("{error:#}")),
            }
            println!("        {} {:?}", rival::NAME, theirs.last());
        }
    }
    let what = format!("load generator: streamed answers of {TOKENS} tokens, per second of one core");
    report.push(match missing {
        None => Row::repeated(what, "requests/s", &ours, rival::NAME, &theirs).at_least(2.0),
        Some(why) => Row::alone(what, "requests/s", &ours).without(rival::NAME, &why).at_least(2.0),
    });
    held(&address, options, dir.path(), &mut report)?;
    drop(server);
    status(repetitions, dir.path(), &mut report).await?;
    Ok(report)
}

/// This program, as something else.
fn itself(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments);
    Ok(command)
}

/// Requests of the long run beyond those of the short one, for each second of processor time that they took.
fn per_cpu_second(requests: [usize; 2], seconds: impl Fn(usize) -> Result<f64>) -> Result<f64> {
    let [few, many] = requests;
    let (short, long) = (seconds(few)?, seconds(many)?);
    ensure!(long > short, "{many} requests took {long} s of processor time, {few} took {short} s");
    Ok((many - few) as f64 / (long - short))
}

fn our_bench(address: &str, arguments: &[String], dir: &std::path::Path) -> Result<(Value, f64)> {
    let mut command = Command::new(workspace::binary("kvasirctl")?);
    command.args(["bench", &format!("http://{address}"), "--output", "json", "--may-stop"]).args(arguments);
    let (said, cpu) = Child::start("kvasirctl", command, dir)?.patient(Duration::from_secs(300)).finish()?;
    Ok((serde_json::from_str(&said).with_context(|| said.clone())?, cpu))
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

fn our_seconds(address: &str, requests: usize, dir: &std::path::Path) -> Result<f64> {
    // A hundred times as many, as they are so cheap: processor time is told in steps of ten milliseconds.
    let line = format!(
        "--api chat --concurrency {LANES} --requests {} --prompt-tokens {PROMPT} --output-tokens {TOKENS}",
        requests * 10
    );
    let (found, cpu) = our_bench(address, &words(&line), dir)?;
    ensure!(found["requests"]["answered"] == requests * 10, "{found}");
    ensure!(found["tokens"]["output"] == requests * 10 * TOKENS, "{found}");
    Ok(cpu / 10.0)
}

/// As many streams as one core should hold, each a token every tenth of a second.
fn held(address: &str, options: &Options, dir: &std::path::Path, report: &mut Report) -> Result<()> {
    let streams = STREAMS[usize::from(options.smoke)];
    let began = Instant::now();
    let line = format!(
        "--api completions --concurrency {streams} --requests {streams} --prompt-tokens 16 --output-tokens {STREAM_TOKENS} \
         --model every-{EVERY_MS}"
    );
    let (found, cpu) = our_bench(address, &words(&line), dir)?;
    let seconds = began.elapsed().as_secs_f64();
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    let asked = streams as f64;
    let open = number(&found["requests"]["most_open"]);
    let complete =
        if found["tokens"]["output"] == streams * STREAM_TOKENS { number(&found["requests"]["answered"]) } else { 0.0 };
    report.push(
        Row::new("streams held at once, complete", complete.min(open), "streams")
            .beside("asked for", asked)
            .at_least(1.0),
    );
    report.push(
        Row::new(
            format!("processor, {streams} streams, {} tokens/s", streams as u64 * 1000 / EVERY_MS),
            cpu / seconds * 100.0,
            "% of a core",
        )
        .under(100.0),
    );
    report.push(
        Row::new("time between tokens as measured, p50", number(&found["itl_ms"]["p50"]), "ms")
            .beside("the server's", EVERY_MS as f64),
    );
    Ok(())
}

/// `status` of a cluster of simulated workers in a real etcd.
async fn status(repetitions: usize, dir: &std::path::Path, report: &mut Report) -> Result<()> {
    let etcd = Etcd::start(dir).await?;
    let mut members =
        Child::start("ctl-members", itself(&["ctl", "members", etcd.endpoint(), &WORKERS.to_string()])?, dir)?;
    members.line()?;
    let mut times = Vec::new();
    // Once to warm up.
    for repetition in 0..=repetitions.max(3) {
        let began = Instant::now();
        let output = Command::new(workspace::binary("kvasirctl")?)
            .args(["--etcd", etcd.endpoint(), "status", "--output", "json"])
            .output()?;
        let ms = began.elapsed().as_secs_f64() * 1e3;
        let found: Value = serde_json::from_slice(&output.stdout)?;
        let ready =
            found["members"].as_array().into_iter().flatten().filter(|member| member["state"] == "ready").count();
        ensure!(ready == WORKERS, "{ready} of {WORKERS} are ready");
        if repetition > 0 {
            times.push(ms);
        }
    }
    report.push(Row::alone(format!("kvasirctl status, {WORKERS} workers"), "ms", &times).under(STATUS_MS));
    Ok(())
}

/// The workers' process, until its standard input ends.
pub async fn members(arguments: &[&str]) -> Result<()> {
    let [etcd, count] = arguments else { anyhow::bail!("ctl-members ETCD COUNT") };
    let members = kvasir_tests::Members::start(etcd, count.parse()?).await?;
    println!("there");
    let (held, ended) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        let _held = held;
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())
    });
    tokio::select! {
        () = members.serve() => Ok(()),
        _ = ended => Ok(()),
    }
}
