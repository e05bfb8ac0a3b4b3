//! `kvasirctl top`: the workers, live. On a terminal a screen that is drawn again and again, with keys to sort; on a pipe one
//! table of what happened within one interval.
//!
//! Rates are differences of counters on workers' metrics pages between two looks.

mod screen;

use std::{collections::HashMap, io::IsTerminal as _, time::Duration};

use clap::{Args, ValueEnum};
use futures_util::{StreamExt, stream};
use kvasir_types::Role;
use serde::Serialize;
use tokio::time::Instant;

use crate::{
    gather,
    output::{Answer, Output},
    probe::{self, Way},
    render::Table,
    report::{Live, Report},
    session::Session,
};

/// Metrics pages asked for at a time.
const AT_ONCE: usize = 64;

/// How it is shown.
#[derive(Clone, Debug, Args)]
pub(crate) struct TopArgs {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// What the first line is the most of; on a terminal, keys change it
    #[arg(long, value_enum, default_value_t = Sort::Load)]
    sort: Sort,
}

/// What rows are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sort {
    /// Requests running and waiting
    Load,
    /// Blocks in use
    Blocks,
    /// Tokens written a second
    Tokens,
    /// Time to the first token
    Ttft,
    /// Time of each further token
    Tpot,
    /// Their name
    Name,
}

/// A worker in an interval.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    worker: String,
    works_as: Role,
    state: crate::report::State,
    running: u64,
    waiting: u64,
    /// Of all blocks, in percent.
    in_use_percent: f64,
    cached_percent: f64,
    requests_per_s: Option<f64>,
    prompt_tokens_per_s: Option<f64>,
    output_tokens_per_s: Option<f64>,
    /// Means of the interval.
    ttft_ms: Option<f64>,
    tpot_ms: Option<f64>,
}

/// Counters of a worker's life.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Counters {
    prefilled: f64,
    sampled: f64,
    ttft: [f64; 2],
    inter_token: [f64; 2],
}

/// All workers at a moment.
struct Look {
    at: Instant,
    report: Report,
    counters: HashMap<String, Counters>,
}

/// Shows them until it is told to stop, or once.
pub(crate) async fn run(args: TopArgs, session: &Session) -> anyhow::Result<Answer> {
    let (way, interval) = (session.way()?, Duration::from_secs(args.interval));
    let mut before = look(session, &way).await?;
    let live = std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
    if !live || !matches!(session.output(), Output::Table | Output::Wide) {
        tokio::time::sleep_until(before.at + interval).await;
        let rows = sorted(rows(&before, &look(session, &way).await?), args.sort);
        return Ok(session.output().show(&rows, || table(&rows)).into());
    }
    let mut screen = screen::Screen::open()?;
    let mut sort = args.sort;
    let mut shown = Vec::new();
    let mut trouble: Option<String>;
    loop {
        match look(session, &way).await {
            Ok(now) => {
                shown = rows(&before, &now);
                trouble = None;
                before = now;
            }
            Err(error) => trouble = Some(kvasir_runtime::chain(error.as_ref())),
        }
        let next = Instant::now() + interval;
        loop {
            shown = sorted(shown, sort);
            screen.draw(&head(&shown, sort, trouble.as_deref()), &table(&shown))?;
            let key = tokio::select! {
                key = screen.key() => key,
                () = tokio::time::sleep_until(next) => break,
            };
            match key {
                Some(b'l') => sort = Sort::Load,
                Some(b'b') => sort = Sort::Blocks,
                Some(b't') => sort = Sort::Tokens,
                Some(b'f') => sort = Sort::Ttft,
                Some(b'p') => sort = Sort::Tpot,
                Some(b'n') => sort = Sort::Name,
                // q, Escape, Ctrl-C, and the keyboard's end.
                Some(b'q' | 27 | 3) | None => return Ok(Answer::default()),
                Some(_) => {}
            }
        }
    }
}

async fn look(session: &Session, way: &Way) -> anyhow::Result<Look> {
    let view = session.view().await?;
    let report = gather::ask_all(&view, way).await;
    let workers =
        report.members.iter().filter(|member| member.live.as_ref().is_some_and(|live| live.worker().is_some()));
    let pages = stream::iter(workers).map(async |member| {
        let page = probe::text(&member.admin, "/metrics", way.limit).await.ok()?;
        Some((member.id.clone(), counters(&page)))
    });
    let counters: Vec<Option<(String, Counters)>> = pages.buffer_unordered(AT_ONCE).collect().await;
    Ok(Look { at: Instant::now(), report, counters: counters.into_iter().flatten().collect() })
}

fn counters(page: &str) -> Counters {
    let mut counters = Counters::default();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let name = series.split('{').next().unwrap_or_default();
        let to = match name {
            "kvasir_worker_prefilled_tokens_total" => &mut counters.prefilled,
            "kvasir_worker_sampled_tokens_total" => &mut counters.sampled,
            "kvasir_worker_ttft_seconds_sum" => &mut counters.ttft[0],
            "kvasir_worker_ttft_seconds_count" => &mut counters.ttft[1],
            "kvasir_worker_inter_token_seconds_sum" => &mut counters.inter_token[0],
            "kvasir_worker_inter_token_seconds_count" => &mut counters.inter_token[1],
            _ => continue,
        };
        *to += value.parse::<f64>().ok().filter(|value| value.is_finite()).unwrap_or_default();
    }
    counters
}

fn rows(before: &Look, now: &Look) -> Vec<Row> {
    let seconds = (now.at - before.at).as_secs_f64();
    let requests_before: HashMap<&str, u64> = before
        .report
        .members
        .iter()
        .filter_map(|member| Some((member.id.as_str(), member.live.as_ref().and_then(Live::worker)?.requests_total)))
        .collect();
    let workers = now.report.members.iter().filter(|member| matches!(member.role, Role::Prefill | Role::Decode));
    let row = |member: &crate::report::MemberReport| {
        let numbers = member.live.as_ref().and_then(Live::worker);
        let blocks = numbers.map(|numbers| numbers.blocks).unwrap_or_default();
        let percent = |part: u64| if blocks.total > 0 { part as f64 * 100.0 / blocks.total as f64 } else { 0.0 };
        let pair = before.counters.get(&member.id).zip(now.counters.get(&member.id));
        // A worker that was started again counts from zero: what is less than before says nothing.
        let rate = |pick: fn(&Counters) -> f64| {
            let (before, now) = pair?;
            Some((pick(now) - pick(before)) / seconds).filter(|rate| *rate >= 0.0 && rate.is_finite())
        };
        let mean = |pick: fn(&Counters) -> [f64; 2]| {
            let ([sum_before, count_before], [sum, count]) = pair.map(|(before, now)| (pick(before), pick(now)))?;
            (count > count_before && sum >= sum_before).then(|| (sum - sum_before) / (count - count_before) * 1e3)
        };
        let requests = numbers.zip(requests_before.get(member.id.as_str()));
        Row {
            worker: member.id.clone(),
            works_as: member.works_as,
            state: member.state,
            running: numbers.map_or(0, |numbers| numbers.running),
            waiting: numbers.map_or(0, |numbers| numbers.waiting),
            in_use_percent: percent(blocks.in_use),
            cached_percent: percent(blocks.cached),
            requests_per_s: requests
                .and_then(|(now, before)| Some(now.requests_total.checked_sub(*before)? as f64 / seconds)),
            prompt_tokens_per_s: rate(|counters| counters.prefilled),
            output_tokens_per_s: rate(|counters| counters.sampled),
            ttft_ms: mean(|counters| counters.ttft),
            tpot_ms: mean(|counters| counters.inter_token),
        }
    };
    workers.map(row).collect()
}

fn sorted(mut rows: Vec<Row>, sort: Sort) -> Vec<Row> {
    let key = |row: &Row| match sort {
        Sort::Load => row.running.saturating_add(row.waiting) as f64,
        Sort::Blocks => row.in_use_percent,
        Sort::Tokens => row.output_tokens_per_s.unwrap_or(-1.0),
        Sort::Ttft => row.ttft_ms.unwrap_or(-1.0),
        Sort::Tpot => row.tpot_ms.unwrap_or(-1.0),
        Sort::Name => 0.0,
    };
    rows.sort_by(|a, b| key(b).total_cmp(&key(a)).then_with(|| a.worker.cmp(&b.worker)));
    rows
}

fn head(rows: &[Row], sort: Sort, trouble: Option<&str>) -> String {
    let sum = |pick: fn(&Row) -> Option<f64>| rows.iter().filter_map(pick).sum::<f64>();
    let [running, waiting] =
        [|row: &Row| row.running, |row: &Row| row.waiting].map(|pick| rows.iter().map(pick).sum::<u64>());
    let sort = format!("{sort:?}").to_lowercase();
    let mut head = format!(
        "{} workers: {running} running, {waiting} waiting, {:.0} tokens/s written, {:.0} read\n",
        rows.len(),
        sum(|row| row.output_tokens_per_s),
        sum(|row| row.prompt_tokens_per_s)
    );
    head += &trouble.map(|why| format!("as of the last answer: {why}\n")).unwrap_or_default();
    head + &format!("by {sort}; keys: l load, b blocks, t tokens/s, f TTFT, p TPOT, n name, q quit\n\n")
}

fn table(rows: &[Row]) -> String {
    if rows.is_empty() {
        return "no workers\n".to_owned();
    }
    let mut table = Table::new(&[
        "WORKER",
        "ROLE",
        "STATE",
        "RUNNING",
        "WAITING",
        "IN USE",
        "CACHED",
        "REQ/s",
        "READ tok/s",
        "WRITTEN tok/s",
        "TTFT ms",
        "TPOT ms",
    ]);
    let or_dash =
        |value: Option<f64>, digits: usize| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"));
    for row in rows {
        table.row(vec![
            row.worker.clone(),
            row.works_as.to_string(),
            crate::render::state(row.state).to_owned(),
            row.running.to_string(),
            row.waiting.to_string(),
            format!("{:.0} %", row.in_use_percent),
            format!("{:.0} %", row.cached_percent),
            or_dash(row.requests_per_s, 1),
            or_dash(row.prompt_tokens_per_s, 0),
            or_dash(row.output_tokens_per_s, 0),
            or_dash(row.ttft_ms, 0),
            or_dash(row.tpot_ms, 1),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        gather::tests::decode,
        judge,
        report::{Blocks, MemberReport, State, WorkerNumbers},
    };

    fn look(at: Instant, workers: &[(&str, u64, f64)]) -> Look {
        let report = |&(id, requests, _): &(&str, u64, f64)| {
            let member = decode(id, "127.0.0.1:1", "127.0.0.1:1");
            MemberReport {
                role: Role::Decode,
                works_as: Role::Decode,
                pinned: false,
                id: id.to_owned(),
                state: State::Ready,
                reason: String::new(),
                version: String::new(),
                protocol: 1,
                incarnation: String::new(),
                grpc: member.grpc,
                http: String::new(),
                admin: member.admin,
                model: None,
                live: Some(Live::Worker(WorkerNumbers {
                    blocks: Blocks { total: 200, free: 100, cached: 50, in_use: 50 },
                    running: requests % 7,
                    requests_total: requests,
                    ..WorkerNumbers::default()
                })),
            }
        };
        let counted = |&(id, requests, tokens): &(&str, u64, f64)| {
            let (count, sum) = (requests as f64, requests as f64 * 0.5);
            let counters = Counters { prefilled: 0.0, sampled: tokens, ttft: [sum, count], inter_token: [0.0, 0.0] };
            (id.to_owned(), counters)
        };
        Look {
            at,
            report: judge::report(&[], workers.iter().map(report).collect()),
            counters: workers.iter().map(counted).collect(),
        }
    }

    #[test]
    fn rates_are_differences_and_a_worker_that_was_started_again_has_none() {
        let begin = Instant::now();
        let before = look(begin, &[("a", 10, 100.0), ("b", 50, 900.0)]);
        let now = look(begin + Duration::from_secs(2), &[("a", 14, 300.0), ("b", 2, 20.0), ("c", 1, 1.0)]);
        let rows = sorted(rows(&before, &now), Sort::Name);
        assert_eq!((rows[0].requests_per_s, rows[0].output_tokens_per_s), (Some(2.0), Some(100.0)));
        assert_eq!((rows[0].ttft_ms, rows[0].tpot_ms), (Some(500.0), None));
        assert_eq!((rows[1].requests_per_s, rows[1].output_tokens_per_s, rows[1].ttft_ms), (None, None, None));
        assert_eq!((rows[2].requests_per_s, rows[2].output_tokens_per_s), (None, None), "new");
        assert_eq!((rows[0].in_use_percent, rows[0].cached_percent), (25.0, 25.0));
        let by = |sort| sorted(rows.clone(), sort).iter().map(|row| row.worker.clone()).collect::<String>();
        assert_eq!(
            (by(Sort::Tokens).as_str(), by(Sort::Load).as_str(), by(Sort::Name).as_str()),
            ("abc", "bca", "abc")
        );
        assert!(table(&rows).contains("25 %") && head(&rows, Sort::Load, None).starts_with("3 workers: 3 running"));
    }

    #[test]
    fn counters_are_summed_over_their_labels_and_nonsense_is_skipped() {
        let page = "# HELP x\nkvasir_worker_sampled_tokens_total 5\nkvasir_worker_ttft_seconds_sum{a=\"b c\"} 1.5\n\
             kvasir_worker_ttft_seconds_sum{a=\"d\"} 0.5\nkvasir_worker_ttft_seconds_count NaN\nnonsense\nother_total 9\n";
        let read = counters(page);
        assert_eq!((read.sampled, read.ttft), (5.0, [2.0, 0.0]));
    }
}
