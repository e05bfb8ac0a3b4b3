//! What was found: figures for programs, and the same as a table.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    args::BenchArgs,
    arrivals::Spread,
    drive::Done,
    tally::{Tally, Times},
};
use crate::render::Table;

/// Above this, late sending is worth a warning: a tenth of what a person notices.
const LATE_MS: f64 = 20.0;

/// All that a run has shown. The names are what `--output json` prints.
#[derive(Debug, Serialize)]
pub(super) struct Found {
    url: String,
    model: String,
    load: String,
    seconds: f64,
    interrupted: bool,
    requests: Requests,
    rates: Rates,
    tokens: Tokens,
    #[serde(skip_serializing_if = "Option::is_none")]
    goodput: Option<Goodput>,
    /// How often each error was met.
    errors: BTreeMap<String, u64>,
    /// Milliseconds, from when a request was due.
    ttft_ms: Option<Times>,
    /// Mean time of each further token, by answer.
    tpot_ms: Option<Times>,
    /// Between two events of an answer.
    itl_ms: Option<Times>,
    /// Whole answers.
    e2e_ms: Option<Times>,
    /// How much later than due requests were sent.
    late_ms: Option<Times>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Requests {
    sent: u64,
    warm_up: u64,
    answered: u64,
    failed: u64,
    cut_off: u64,
    not_sent: u64,
    most_open: usize,
}

#[derive(Debug, Serialize)]
struct Rates {
    requests_per_s: f64,
    prompt_tokens_per_s: f64,
    output_tokens_per_s: f64,
}

#[derive(Debug, Serialize)]
struct Tokens {
    prompt: u64,
    cached: u64,
    output: u64,
}

#[derive(Debug, Serialize)]
struct Goodput {
    slo_ttft_ms: Option<f64>,
    slo_tpot_ms: Option<f64>,
    good: u64,
    requests_per_s: f64,
    /// Of all that were sent and counted.
    share: f64,
}

/// Puts it together.
pub(super) fn found(args: &BenchArgs, url: &str, model: &str, done: &Done, rounds: u64) -> Found {
    let Done { tally, sent, warm, not_sent, took, most_open, interrupted } = done;
    let seconds = took.as_secs_f64();
    let per_second = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    let late_ms = tally.late.times();
    let mut warnings = Vec::new();
    if let Some(late) = late_ms.filter(|late| late.p99 > LATE_MS) {
        warnings.push(format!(
            "requests were sent late (p99 {:.0} ms): this program, or --most-open, is the bottleneck; latencies include it",
            late.p99
        ));
    }
    if *not_sent > 0 {
        warnings.push(format!("{not_sent} requests were due and not sent: --most-open {most_open} was reached"));
    }
    if rounds > 0 {
        warnings.push(format!("the dataset was begun again {rounds} times: its prompts may have been cached"));
    }
    if tally.answered > 0 && tally.output_tokens == 0 {
        warnings.push("the server counts no tokens (usage): token rates and TPOT are unknown".to_owned());
    }
    let asks_goodput = args.slo_ttft.is_some() || args.slo_tpot.is_some();
    Found {
        url: url.to_owned(),
        model: model.to_owned(),
        load: load(args),
        seconds,
        interrupted: *interrupted,
        requests: Requests {
            sent: *sent,
            warm_up: *warm,
            answered: tally.answered,
            failed: tally.failed,
            cut_off: tally.cut_off,
            not_sent: *not_sent,
            most_open: *most_open,
        },
        rates: Rates {
            requests_per_s: per_second(tally.answered),
            prompt_tokens_per_s: per_second(tally.prompt_tokens),
            output_tokens_per_s: per_second(tally.output_tokens),
        },
        tokens: Tokens { prompt: tally.prompt_tokens, cached: tally.cached_tokens, output: tally.output_tokens },
        goodput: asks_goodput.then(|| Goodput {
            slo_ttft_ms: args.slo_ttft,
            slo_tpot_ms: args.slo_tpot,
            good: tally.good,
            requests_per_s: per_second(tally.good),
            share: share(tally, *sent + *not_sent),
        }),
        errors: tally.errors.clone(),
        ttft_ms: tally.ttft.times(),
        tpot_ms: tally.tpot.times(),
        itl_ms: tally.itl.times(),
        e2e_ms: tally.whole.times(),
        late_ms,
        warnings,
    }
}

fn share(tally: &Tally, of: u64) -> f64 {
    if of == 0 { 0.0 } else { tally.good as f64 / of as f64 }
}

/// The load in words.
fn load(args: &BenchArgs) -> String {
    let what = match (&args.dataset, &args.trace) {
        (Some(path), _) | (None, Some(path)) => path.display().to_string(),
        (None, None) => {
            let unit = if args.ids.is_some() { "ids" } else { "words" };
            format!("prompts of {} {unit}, answers of {} tokens", args.prompt_tokens, args.output_tokens)
        }
    };
    let pace = match (args.rate, args.concurrency) {
        (Some(rate), _) => {
            let spread = if args.arrivals == Spread::Poisson { "Poisson" } else { "constant" };
            format!("open loop, {rate} requests a second ({spread})")
        }
        (None, Some(lanes)) => format!("closed loop, {lanes} at a time"),
        (None, None) if args.trace.is_some() => format!("at the trace's times × {}", args.speed),
        (None, None) => format!("closed loop, {} at a time", super::CONCURRENCY),
    };
    format!("{pace}; {what}")
}

/// The table.
pub(super) fn table(found: &Found) -> String {
    let Found { url, model, load, seconds, requests, rates, tokens, .. } = found;
    let mut text = format!("{model} at {url}: {load}\n\n");
    let Requests { sent, warm_up, answered, failed, cut_off, .. } = requests;
    let stopped = if found.interrupted { ", stopped" } else { "" };
    text += &format!("{sent} sent in {seconds:.1} s{stopped}: {answered} answered, {failed} failed");
    for (count, what) in [(cut_off, "cut off"), (warm_up, "before that to warm up")] {
        if *count > 0 {
            text += &format!(", {count} {what}");
        }
    }
    text += &format!(
        "\n{:.2} requests/s, {:.0} output tokens/s, {:.0} prompt tokens/s ({} of {} prompt tokens were cached)\n",
        rates.requests_per_s, rates.output_tokens_per_s, rates.prompt_tokens_per_s, tokens.cached, tokens.prompt
    );
    if let Some(goodput) = &found.goodput {
        let limit = |name: &str, limit: Option<f64>| limit.map(|ms| format!("{name} ≤ {ms} ms"));
        let limits = [limit("TTFT", goodput.slo_ttft_ms), limit("TPOT", goodput.slo_tpot_ms)];
        let limits = limits.into_iter().flatten().collect::<Vec<_>>().join(", ");
        let (rate, share) = (goodput.requests_per_s, goodput.share * 100.0);
        text += &format!("goodput {rate:.2} requests/s: {} good ({share:.1} %) by {limits}\n", goodput.good);
    }
    let mut times = Table::new(&["ms", "MEAN", "P50", "P90", "P95", "P99", "MAX"]);
    let rows = [
        ("TTFT", &found.ttft_ms),
        ("TPOT", &found.tpot_ms),
        ("ITL", &found.itl_ms),
        ("E2E", &found.e2e_ms),
        ("sent late", &found.late_ms),
    ];
    for (name, row) in rows {
        if let Some(Times { mean, p50, p90, p95, p99, max }) = row {
            let figures = [mean, p50, p90, p95, p99, max].map(|ms| figure(*ms));
            times.row(std::iter::once(name.to_owned()).chain(figures).collect());
        }
    }
    if !times.is_empty() {
        text += &format!("\n{}", times.render());
    }
    if !found.errors.is_empty() {
        let mut errors = Table::new(&["FAILED", "WHY"]);
        found.errors.iter().for_each(|(why, count)| errors.row(vec![count.to_string(), why.clone()]));
        text += &format!("\n{}", errors.render());
    }
    if !found.warnings.is_empty() {
        text.push('\n');
    }
    found.warnings.iter().for_each(|warning| text += &format!("warning: {warning}\n"));
    text
}

/// Three digits that mean something.
fn figure(ms: f64) -> String {
    match ms {
        ms if ms >= 100.0 => format!("{ms:.0}"),
        ms if ms >= 10.0 => format!("{ms:.1}"),
        _ => format!("{ms:.2}"),
    }
}
