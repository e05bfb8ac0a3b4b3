//! Golden questions, asked by many at a time while something happens.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, future, stream};
use kvasir_tests::{
    Client, Cluster,
    golden::{self, Line, MARGIN},
    openai::text_of,
    wait::{self, SOON},
    workspace,
};
use serde_json::json;

/// So many streams, one question after the other on each.
pub(crate) struct Load {
    client: Client,
    model: String,
    lines: Vec<Line>,
    streams: usize,
    over: AtomicBool,
    answered: AtomicUsize,
}

impl Load {
    /// On the cluster's first router.
    pub(crate) fn new(cluster: &Cluster, streams: usize) -> Result<Self> {
        Self::through(cluster.client(), cluster.model(), streams)
    }

    /// By way of something before the routers.
    pub(crate) fn through(client: Client, model: &str, streams: usize) -> Result<Self> {
        let lines = golden::load(&workspace::demo_model())?.into_iter().filter(|line| line.margin >= MARGIN).collect();
        let model = model.to_owned();
        Ok(Self { client, model, lines, streams, over: AtomicBool::new(false), answered: AtomicUsize::new(0) })
    }

    /// Waits for so many more answers.
    pub(crate) async fn more(&self, what: &str, count: usize) -> Result<()> {
        let goal = self.answered.load(Relaxed) + count;
        wait::until(what, SOON, async || (self.answered.load(Relaxed) >= goal).then_some(())).await
    }

    /// Asks until `meanwhile` is over; every answer must be the golden one.
    pub(crate) async fn run(&self, meanwhile: impl Future<Output = Result<()>>) -> Result<()> {
        let asking = stream::iter(0..self.streams).map(async |first| {
            let mut next = first;
            while !self.over.load(Relaxed) {
                ask(&self.client, &self.model, &self.lines[next % self.lines.len()]).await?;
                self.answered.fetch_add(1, Relaxed);
                next += 7;
            }
            anyhow::Ok(())
        });
        let meanwhile = async {
            let result = meanwhile.await;
            self.over.store(true, Relaxed);
            result
        };
        let (answers, done) = future::join(asking.buffer_unordered(self.streams).collect::<Vec<_>>(), meanwhile).await;
        answers.into_iter().collect::<Result<Vec<_>>>()?;
        done
    }
}

/// Asks for a golden answer as a stream, and compares.
pub(crate) async fn ask(client: &Client, model: &str, line: &Line) -> Result<()> {
    let body = json!({
        "model": model, "messages": line.messages, "temperature": 0, "max_tokens": line.output_ids.len(), "stream": true,
        "stream_options": {"include_usage": true},
    });
    let chunks = client.stream("/v1/chat/completions", &body).await?.chunks().await?;
    let text = text_of(&chunks);
    ensure!(text == line.text, "expected {:?}, got {text:?}", line.text);
    let usage = &chunks.last().context("chunks")?["usage"]["completion_tokens"];
    ensure!(*usage == line.output_ids.len(), "{usage} tokens of {}", line.output_ids.len());
    Ok(())
}
