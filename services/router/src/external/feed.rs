//! An engine's load, and its place in the router's index.
//!
//! vLLM tells on `/metrics` how many requests run and wait, which is asked for every so often; of SGLang, which tells only
//! when started to, the load is what this router gives it. Neither tells what its cache holds: see `remembered`.

use std::{sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::Instant};
use tracing::debug;

use super::{config::EngineKind, engine::Engine, http::Ask};
use crate::{cache::Number, fleet::Worker};

/// Between two looks at an engine's metrics.
const LOOK: Duration = Duration::from_secs(1);
/// For a page to come.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest page that is read: those of a server with many models have some 100 kB.
const MAX_PAGE_BYTES: usize = 4 << 20;

/// Follows an engine until it is `stopped`; `number`: its in the index, if that has one left. The caller sweeps the index
/// afterwards.
pub(crate) async fn feed(worker: &Arc<Worker>, engine: &Engine, number: Number, stopped: oneshot::Receiver<()>) {
    if engine.remembered.remembers() {
        engine.remembered.open(number);
    }
    tokio::select! {
        // Whatever a look has not finished, the next engine's life does not need.
        () = looks(worker, engine) => {}
        _ = stopped => {}
    }
    engine.remembered.close();
    worker.pulse.silent();
}

async fn looks(worker: &Worker, engine: &Engine) {
    if engine.kind != EngineKind::Vllm {
        return std::future::pending().await;
    }
    loop {
        let ask = Ask { engine, worker: &worker.member.id, path: "/metrics", until: Instant::now() + PATIENCE };
        match ask.whole(None, None, MAX_PAGE_BYTES).await {
            Ok(page) => match load(&String::from_utf8_lossy(&page)) {
                Some((running, waiting)) => {
                    worker.pulse.told_requests(u64::from(running) + u64::from(waiting));
                }
                None => worker.pulse.silent(),
            },
            Err(error) => {
                debug!(worker = %worker.member.id, error = kvasir_runtime::chain(&error), "no metrics");
                worker.pulse.silent();
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Requests that run and wait, of all models (a server has one), as a page of metrics tells them.
fn load(page: &str) -> Option<(u32, u32)> {
    let sum = |name: &str| {
        let values = page.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            // Labels hold anything; the value is behind them.
            let value = match rest.strip_prefix('{') {
                Some(labelled) => labelled.rsplit_once('}')?.1,
                None => rest.strip_prefix(' ')?,
            };
            let value: f64 = value.split_whitespace().next()?.parse().ok()?;
            (value.is_finite() && value >= 0.0).then_some(value)
        });
        values.fold(None, |sum: Option<f64>, value| Some(sum.unwrap_or(0.0) + value))
    };
    let small = |value: f64| value.min(f64::from(u32::MAX / 2)) as u32;
    Some((small(sum("vllm:num_requests_running")?), small(sum("vllm:num_requests_waiting")?)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_load_is_found_on_a_page_of_metrics() {
        let page = "# HELP vllm:num_requests_running Number of requests.\n# TYPE vllm:num_requests_running gauge\n\
            vllm:num_requests_running{engine=\"0\",model_name=\"a}b\"} 3.0\n\
            vllm:num_requests_running{engine=\"1\",model_name=\"a\"} 2\n\
            vllm:num_requests_waiting 1e1 1700000000\n\
            vllm:num_requests_waiting_by_reason{reason=\"capacity\"} 7.0\n";
        assert_eq!(load(page), Some((5, 10)));
        for bad in ["", "vllm:num_requests_running 1", "vllm:num_requests_running NaN\nvllm:num_requests_waiting 1"] {
            assert_eq!(load(bad), None, "{bad}");
        }
        let wild = "vllm:num_requests_running 1e300\nvllm:num_requests_waiting 1\n";
        assert_eq!(load(wild), Some((u32::MAX / 2, 1)));
    }

    proptest! {
        #[test]
        fn no_page_panics(tail in "[{} a-z0-9.\"=\n]{0,60}") {
            let _any = load(&tail);
            let _any = load(&format!("vllm:num_requests_running{tail}\nvllm:num_requests_waiting{tail}"));
        }
    }
}
