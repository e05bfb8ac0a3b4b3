//! `kvasir-simulate`: the router's policies in front of modelled workers. See `--help`.

#![forbid(unsafe_code)]

use std::{
    fs::File,
    io::{BufReader, IsTerminal, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, bail};
use clap::Parser;
use kvasir_replay::{CONVERSATION, generate, trace::Trace};
use kvasir_router::route::PolicyName;
use kvasir_simulate::{
    Plan, Profile, Shape, Steering, Workload,
    figures::{Figures, Slo},
    plot, profile,
    report::{Real, Report, Sent},
    run, tides,
};

/// Runs the router's own policies against modelled workers on a virtual clock, and tells what each would have done with the
/// same requests: how long they took, how many were good, what was found in caches, how even the load was.
///
/// A trace is a file in Mooncake's format (JSON lines with timestamp, input_length, output_length and hash_ids, one id for
/// each block of the prompt; equal ids mean equal prefixes), or the name of one that comes with the program: conversation
/// (one hour of an online service, recorded), chat, agents, documents, batch, shift, tides (made up from --seed).
///
/// Same trace, arguments and seed: same figures. Only decisions/s and what is said of the run's own speed differ.
#[derive(Debug, Parser)]
#[command(
    name = "kvasir-simulate",
    after_help = "Columns:
  TTFT, TPOT, E2E     to the first token; from one token to the next; to the last token
  good, good/s        requests that kept --ttft-slo-ms and --tpot-slo-ms: share of all, and in a second
  hits, of bound      prompt tokens that workers had: share of all, and of what a single cache without limit would have had
  store               prompt tokens that were read from the KV store
  max/mean, cv, busy  over workers, of tokens computed: greatest by mean, variation; share of the time that they computed
  decisions/s         of the real router code, in real time, on this machine

Examples:
  # 16 prefill and 16 decode workers, the recorded hour at three times its pace, by three policies
  kvasir-simulate conversation --speed 3

  # where nothing is shared: does knowing caches cost anything?
  kvasir-simulate conversation --speed 2 --unique --policy kv-aware,least-loaded

  # a large cluster: the hour 64 times over, each by users of its own
  kvasir-simulate conversation --copies 64 --prefill 512 --decode 512 --policy kv-aware

  # other workers: a profile with some values changed, or a file (--print-profile shows one to begin with)
  kvasir-simulate chat --profile h100-llama-8b --set kv.room_tokens=200000 --set decode.max_running=64
  kvasir-simulate my.jsonl --profile my.yaml --json out.json

  # what moving workers between prefill and decode gains where the mix changes
  kvasir-simulate tides --prefill 8 --decode 8 --policy kv-aware --planner

Exit status: 0 simulated; 1 not; 2 wrong usage"
)]
struct Args {
    /// A file, or the name of a trace that comes with the program.
    #[arg(value_name = "TRACE", required_unless_present = "print_profile")]
    trace: Option<String>,

    /// Policies to compare: kv-aware, session-sticky, least-loaded, round-robin, random, or all.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_values = ["kv-aware", "least-loaded", "round-robin"])]
    policy: Vec<String>,

    /// Prefill workers. 0: decode workers compute all prompts.
    #[arg(long, default_value_t = 16)]
    prefill: usize,

    /// Decode workers.
    #[arg(long, default_value_t = 16)]
    decode: usize,

    /// How fast and large a worker is: a YAML file, or h100-llama-8b, a800x8-llama-70b, h200x8-deepseek-v3.
    #[arg(long, value_name = "NAME|FILE", default_value = profile::DEFAULT)]
    profile: String,

    /// Another value for a field of the profile; may be given several times.
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,

    /// Show the profile and leave.
    #[arg(long)]
    print_profile: bool,

    /// So many times the trace's own pace. Caches see less time between two uses of a block, and no fewer others.
    #[arg(long, default_value_t = 1.0)]
    speed: f64,

    /// So many populations of users do what the trace says, each with prompts of its own, within a minute of one another.
    #[arg(long, default_value_t = 1)]
    copies: u32,

    /// Only the trace's first requests.
    #[arg(long, value_name = "REQUESTS")]
    limit: Option<usize>,

    /// No prompt shares anything with another one.
    #[arg(long)]
    unique: bool,

    /// Requests come up to so many milliseconds late, by chance: the recorded trace has times of 3 s only.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    spread_ms: u64,

    /// Tokens of a block of the trace.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    block_tokens: u32,

    /// Tokens that the KV store has room for; 0: there is none.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    store_tokens: u64,

    /// The router knows so many milliseconds later what a worker holds.
    #[arg(long, value_name = "MS", default_value_t = 20)]
    index_delay_ms: u64,

    /// Workers tell the router their loads every so many milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 100)]
    load_interval_ms: u64,

    /// A good request has its first token within so many milliseconds …
    #[arg(long, value_name = "MS", default_value_t = 5000.0)]
    ttft_slo_ms: f64,

    /// … and then one each so many, in the mean.
    #[arg(long, value_name = "MS", default_value_t = 50.0)]
    tpot_slo_ms: f64,

    /// Run each policy a second time with the router's planner, which moves workers between prefill and decode so that the
    /// objectives are kept.
    #[arg(long)]
    planner: bool,

    /// Between two looks of the planner.
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    planner_look_ms: u64,

    /// A worker that is moved gets nothing new for so many milliseconds; what it has, it goes on with.
    #[arg(long, value_name = "MS", default_value_t = 500)]
    switch_ms: u64,

    /// For all chance, and for made-up traces.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Also write everything to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Also draw a picture: first tokens as a distribution, and requests over time.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn main() -> ExitCode {
    match simulate(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn simulate(args: &Args) -> anyhow::Result<()> {
    let (text, profile) = load_profile(&args.profile, &args.set)?;
    let Some(name) = args.trace.as_ref().filter(|_| !args.print_profile) else {
        print!("{text}");
        return Ok(());
    };
    let policies = policies(&args.policy)?;
    let slo = Slo { ttft_ms: args.ttft_slo_ms, tpot_ms: args.tpot_slo_ms };
    if !(slo.ttft_ms >= 0.0 && slo.tpot_ms >= 0.0) {
        bail!("objectives are numbers of milliseconds");
    }
    let shape = Shape {
        speed: args.speed,
        limit: args.limit,
        copies: args.copies,
        unique: args.unique,
        spread_ms: args.spread_ms,
        block_tokens: args.block_tokens,
        seed: args.seed,
    };
    let workload = Workload::new(load_trace(name, args.seed)?, shape).with_context(|| format!("trace {name}"))?;
    let plan = Plan {
        prefill: args.prefill,
        decode: args.decode,
        profile,
        index_delay_ms: args.index_delay_ms,
        load_interval_ms: args.load_interval_ms,
        store_tokens: args.store_tokens,
        steering: None,
    };
    let steering = args.planner.then_some(Steering {
        ttft_seconds: slo.ttft_ms / 1e3,
        tpot_seconds: slo.tpot_ms / 1e3,
        look_seconds: args.planner_look_ms as f64 / 1e3,
        switch_seconds: args.switch_ms as f64 / 1e3,
    });
    Plan { steering, ..plan.clone() }.check()?;
    // Before the runs, which may take long: a file that can't be written is said at once.
    let json = args.json.as_deref().map(create).transpose()?;
    let svg = args.svg.as_deref().map(create).transpose()?;
    let trace = name.rsplit('/').next().unwrap_or(name).to_owned();
    let sent = Sent::of(&workload);
    let mut report = Report { trace, shape, sent, plan, slo, steering, rows: Vec::new(), real: Vec::new() };
    for policy in policies {
        for steering in [None].into_iter().chain(steering.map(Some)) {
            let plan = Plan { steering, ..report.plan.clone() };
            let (row, real) = one(&workload, &plan, slo, policy)?;
            report.rows.push(row);
            report.real.push(real);
        }
    }
    print!("{}\n{}\n{}", report.head(), report.table(), report.foot());
    if let Some((path, file)) = json {
        let failed = || format!("{} could not be written", path.display());
        serde_json::to_writer_pretty(file, &report).with_context(failed)?;
    }
    if let Some((path, mut file)) = svg {
        file.write_all(plot::svg(&report).as_bytes())
            .with_context(|| format!("{} could not be written", path.display()))?;
    }
    Ok(())
}

fn one(workload: &Workload, plan: &Plan, slo: Slo, policy: PolicyName) -> anyhow::Result<(Figures, Real)> {
    let name = format!("{}{}", policy.as_str(), if plan.steering.is_some() { "+planner" } else { "" });
    let began = Instant::now();
    let on_terminal = std::io::stderr().is_terminal();
    let outcome = run(workload, plan, policy, |came| {
        if on_terminal {
            let seconds = began.elapsed().as_secs();
            eprint!("\r\x1b[K{name}: {:>3} % of requests came, {seconds} s", came * 100 / workload.len());
        }
    })?;
    if on_terminal {
        eprint!("\r\x1b[K");
    }
    let took = began.elapsed().as_secs_f64();
    let figures = Figures::of(&name, workload, plan, slo, &outcome);
    let (decisions, deciding) = outcome.decisions;
    let real = Real {
        policy: name,
        seconds: took,
        decisions_per_second: decisions as f64 / deciding.as_secs_f64().max(1e-9),
        speed: figures.end_seconds / took.max(1e-9),
    };
    Ok((figures, real))
}

fn policies(names: &[String]) -> anyhow::Result<Vec<PolicyName>> {
    let mut policies = Vec::new();
    for name in names {
        let named = match name.as_str() {
            "all" => PolicyName::ALL.to_vec(),
            name => vec![PolicyName::named(name).with_context(|| {
                let all = PolicyName::ALL.map(PolicyName::as_str).join(", ");
                format!("there is no policy {name:?}; there are {all}, all")
            })?],
        };
        policies.extend(named.into_iter().filter(|policy| !policies.contains(policy)).collect::<Vec<_>>());
    }
    Ok(policies)
}

/// A profile's text, and what it says.
fn load_profile(name: &str, settings: &[String]) -> anyhow::Result<(String, Profile)> {
    let text = match Profile::named(name) {
        Some(text) => text.to_owned(),
        None => read_small(Path::new(name)).with_context(|| {
            let all = profile::NAMED.map(|(name, _)| name).join(", ");
            format!("profile {name} is none of {all}, and can't be read as a file")
        })?,
    };
    let profile = Profile::read(&text, settings).with_context(|| format!("profile {name}"))?;
    Ok((text, profile))
}

/// A file that a person wrote.
fn read_small(path: &Path) -> anyhow::Result<String> {
    const MOST: u64 = 1 << 20;
    let mut text = String::new();
    let file = File::open(path)?;
    file.take(MOST + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MOST {
        bail!("it is larger than {MOST} bytes");
    }
    Ok(text)
}

fn load_trace(name: &str, seed: u64) -> anyhow::Result<Trace> {
    if name == "conversation" {
        return Ok(Trace::read(CONVERSATION.as_bytes())?);
    }
    if name == tides::NAME {
        return Ok(tides::tides(seed));
    }
    if let Some(trace) = generate::generate(name, seed) {
        return Ok(trace);
    }
    let file = File::open(name).with_context(|| format!("trace {name} can't be opened"))?;
    Trace::read(BufReader::new(file)).with_context(|| format!("trace {name} can't be used"))
}

fn create(path: &Path) -> anyhow::Result<(&Path, File)> {
    Ok((path, File::create(path).with_context(|| format!("{} could not be written", path.display()))?))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn arguments_are_understood() {
        Args::command().debug_assert();
        let parse = |line: &str| Args::try_parse_from(line.split(' '));
        let args = parse("kvasir-simulate chat --policy all,random --set a=1 --set b=2").unwrap();
        assert_eq!((policies(&args.policy).unwrap().len(), args.set.len()), (PolicyName::ALL.len(), 2));
        assert!(parse("kvasir-simulate --print-profile").is_ok());
        for wrong in ["", " chat --speed fast", " chat --copies -1", " chat --prefill x", " chat more"] {
            assert!(parse(&format!("kvasir-simulate{wrong}")).is_err(), "{wrong}");
        }
        assert!(policies(&["best".to_owned()]).unwrap_err().to_string().contains("kv-aware"));
    }
}
