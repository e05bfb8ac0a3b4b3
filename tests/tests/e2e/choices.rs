//! Several answers to one prompt: the same wherever and in whatever company they are computed.

use anyhow::{Context, Result, ensure};
use kvasir_tests::{Cluster, Service};
use serde_json::Value;

use crate::{
    prompts::{chat, long},
    spill::{BLOCK_BYTES, BLOCKS},
};

const CHOICES: usize = 4;

fn body(cluster: &Cluster) -> Value {
    let mut body = chat(cluster.model(), &long(60));
    for (field, value) in [("n", CHOICES.into()), ("temperature", 2.into()), ("seed", 3.into())] {
        body[field] = value;
    }
    body["max_tokens"] = 250.into();
    body["min_tokens"] = 200.into();
    body
}

fn texts(answer: &Value) -> Result<Vec<String>> {
    let choices = answer["choices"].as_array().context("choices")?;
    ensure!(choices.len() == CHOICES, "{answer}");
    let text = |(index, choice): (usize, &Value)| {
        ensure!(choice["index"] == index, "{choice}");
        Ok(choice["message"]["content"].as_str().context("content")?.to_owned())
    };
    choices.iter().enumerate().map(text).collect()
}

/// The choices of the request in a cluster of its own, whole.
async fn in_cluster(builder: kvasir_tests::Builder, preempted: bool) -> Result<Vec<String>> {
    let mut told = Vec::new();
    builder
        .run(async |cluster| {
            let answer = cluster.client().chat(&body(cluster)).await?;
            told = texts(&answer)?;
            let tokens = answer["usage"]["completion_tokens"].as_u64().context("usage")? as usize;
            ensure!((200 * CHOICES..=250 * CHOICES).contains(&tokens), "all choices count: {tokens}");
            let metrics = cluster.node(Service::Decode, 0).metrics().await?;
            let preemptions = metrics.sum("kvasir_worker_preemptions_total");
            ensure!((preemptions > 0.0) == preempted, "{preemptions} preemptions");
            Ok(())
        })
        .await?;
    Ok(told)
}

#[tokio::test]
async fn choices_do_not_show_who_computed_the_prompt_nor_how_many_blocks_there_were() -> Result<()> {
    let remote = in_cluster(Cluster::builder().set(Service::Decode, "decode.local_prefill_tokens", 0), false).await?;
    ensure!((1..CHOICES).all(|choice| remote[choice] != remote[0]), "they are drawn apart: {remote:?}");
    ensure!(in_cluster(Cluster::builder().prefill(0), false).await? == remote, "the decode worker chose otherwise");
    let tight = Cluster::builder().set(Service::Decode, "kv.memory_bytes", BLOCKS * BLOCK_BYTES);
    ensure!(in_cluster(tight, true).await? == remote, "choices that lost their blocks went on otherwise");
    Ok(())
}

#[tokio::test]
async fn choices_are_streamed_as_they_are_told_whole() -> Result<()> {
    Cluster::builder()
        .run(async |cluster| {
            let mut body = body(cluster);
            let whole = texts(&cluster.client().chat(&body).await?)?;
            body["stream"] = true.into();
            let mut told = vec![String::new(); CHOICES];
            let mut ends = 0;
            for chunk in cluster.client().stream("/v1/chat/completions", &body).await?.chunks().await? {
                let choice = &chunk["choices"][0];
                let index = choice["index"].as_u64().context("index")? as usize;
                told[index].push_str(choice["delta"]["content"].as_str().unwrap_or_default());
                ends += usize::from(choice["finish_reason"].is_string());
            }
            ensure!(ends == CHOICES, "each choice ends once: {ends}");
            ensure!(told == whole, "streamed, they are others");
            Ok(())
        })
        .await
}
