//! What a client notices when a decode worker is killed in the middle of its answer: separate processes, the demo model, streams
//! of some thousand tokens, and the longest time between two tokens of each stream that had to be continued elsewhere.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use kvasir_tests::{Client, Cluster, Service, wait};
use serde_json::{Value, json};

use crate::report::{Row, median};

/// Streams at a time, shared between two decode workers.
const STREAMS: usize = 8;
/// Tokens of each: a second or two, so that the kill finds all of them writing.
const TOKENS: usize = 2000;
/// Tokens that each has got when the worker is killed.
const BEGUN: usize = 100;
/// Goal for the median.
const GOAL_MS: f64 = 1000.0;
/// How long a stream may take to get so far.
const SOON: Duration = Duration::from_secs(30);

/// Kills a worker so many times.
pub async fn rows(times: usize) -> Result<Vec<Row>> {
    let mut cluster = Cluster::builder().prefill(1).decode(2).kv_store(0).start().await?;
    let (mut gaps, mut most) = (Vec::new(), 0);
    for time in 0..times {
        let moved = moves(&cluster).await?;
        let (client, model) = (cluster.client(), cluster.model().to_owned());
        let begun: Vec<_> = (0..STREAMS).map(|_| AtomicUsize::new(0)).collect();
        let streams = begun.iter().enumerate().map(|(stream, begun)| {
            let body = request(&model, time * STREAMS + stream);
            longest_gap(&client, body, begun)
        });
        let victim = &mut cluster.node_mut(Service::Decode, time % 2).process;
        let kill = async {
            let all = async || begun.iter().all(|tokens| tokens.load(Relaxed) >= BEGUN).then_some(());
            wait::until("all streams have begun", SOON, all).await?;
            victim.kill();
            Ok(())
        };
        let (mut longest, ()) = futures_util::try_join!(try_join_all(streams), kill)?;
        // Those that were moved waited longest, and the router says how many that were.
        let moved = moves(&cluster).await? - moved;
        ensure!(moved > 0 && moved <= STREAMS, "{moved} streams were moved");
        longest.sort_by(|one, other| other.total_cmp(one));
        gaps.extend_from_slice(&longest[..moved]);
        most += moved;
        cluster.restart(Service::Decode, time % 2).await?;
    }
    let longest = gaps.iter().copied().fold(0.0, f64::max);
    Ok(vec![
        Row::alone(format!("pause of a stream whose decode worker is killed, {most} streams"), "ms", &gaps)
            .under(GOAL_MS),
        Row::new("the longest of these pauses, over the median", longest, "ms").beside("the median", median(gaps)),
    ])
}

/// Another prompt for each number, so that both workers get some.
fn request(model: &str, number: usize) -> Value {
    let prompt: Vec<usize> = (0..64).map(|at| 300 + (number * 131 + at * 7) % 1200).collect();
    json!({
        "model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true},
    })
}

/// Reads a stream to its end: the longest time between two events, in milliseconds.
async fn longest_gap(client: &Client, body: Value, begun: &AtomicUsize) -> Result<f64> {
    let mut stream = client.stream("/v1/completions", &body).await?;
    let (mut last, mut longest, mut tokens) = (None, Duration::ZERO, 0);
    while let Some(event) = stream.next().await? {
        if event == "[DONE]" {
            continue;
        }
        let chunk: Value = serde_json::from_str(&event)?;
        ensure!(chunk["error"].is_null(), "a stream ended with {chunk}");
        let now = Instant::now();
        longest = longest.max(last.replace(now).map_or(Duration::ZERO, |last| now - last));
        begun.fetch_add(1, Relaxed);
        tokens = chunk["usage"]["completion_tokens"].as_u64().unwrap_or(tokens);
    }
    ensure!(tokens == TOKENS as u64, "{tokens} tokens of {TOKENS}: some were lost");
    Ok(longest.as_secs_f64() * 1e3)
}

/// Answers that the router has continued elsewhere so far.
async fn moves(cluster: &Cluster) -> Result<usize> {
    let metrics = cluster.node(Service::Router, 0).metrics().await.context("the router's metrics")?;
    Ok(metrics.sum("kvasir_router_move_seconds_count") as usize)
}
