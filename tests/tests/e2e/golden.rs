//! Correct means: what the reference implementation answers, token for token, whatever way the prompt was computed.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt, stream};
use kvasir_tests::{
    Builder, Client, Cluster, Service,
    golden::{self, KvDtype, Line, MARGIN, Vocabulary},
    workspace,
};
use serde_json::{Value, json};

/// More than any prompt: the decode worker computes all of them itself.
const ALWAYS_LOCAL: usize = 1_000_000;

#[tokio::test]
async fn remote_prefill_in_one_chunk_says_what_the_reference_says() -> Result<()> {
    matrix(&workspace::demo_model(), 512, 0).await
}

#[tokio::test]
async fn remote_prefill_in_chunks_of_16_says_what_the_reference_says() -> Result<()> {
    matrix(&workspace::demo_model(), 16, 0).await
}

#[tokio::test]
async fn local_prefill_in_one_chunk_says_what_the_reference_says() -> Result<()> {
    matrix(&workspace::demo_model(), 512, ALWAYS_LOCAL).await
}

#[tokio::test]
async fn local_prefill_in_chunks_of_16_says_what_the_reference_says() -> Result<()> {
    matrix(&workspace::demo_model(), 16, ALWAYS_LOCAL).await
}

#[tokio::test]
async fn keys_and_values_in_other_types_say_what_the_reference_says() -> Result<()> {
    let folder = workspace::demo_model();
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        uncached(&folder, 16, 0, dtype).run(async |cluster| agree(cluster, &folder, 8, dtype).await).await?;
    }
    Ok(())
}

#[tokio::test]
async fn blocks_that_come_by_sockets_say_what_the_reference_says() -> Result<()> {
    over("tcp").await
}

#[tokio::test]
async fn blocks_that_come_by_shared_memory_say_what_the_reference_says() -> Result<()> {
    over("shm").await
}

#[tokio::test]
async fn blocks_that_come_by_ucx_say_what_the_reference_says() -> Result<()> {
    over("ucx").await
}

/// Remote prefill in chunks, with KV blocks moved by one transport only, to decode workers and to and from the store.
async fn over(transport: &str) -> Result<()> {
    let folder = workspace::demo_model();
    let mut builder = Cluster::builder()
        .model(&folder)
        .worker("engine.chunk_tokens", 64)
        .worker("engine.prefix_cache", false)
        .worker("store.fetch", "always")
        .set(Service::Decode, "decode.local_prefill_tokens", 0);
    for service in [Service::Prefill, Service::Decode, Service::KvStore] {
        builder = builder
            .set(service, "transfer.transports", transport)
            .set(service, "transfer.ucx.net_devices", "lo")
            .set(service, "transfer.ucx.tls", "tcp");
    }
    builder
        .run(async |cluster| {
            agree(cluster, &folder, 8, KvDtype::default()).await?; // computed, pushed, and written to the store
            agree(cluster, &folder, 8, KvDtype::default()).await?; // read from the store
            let peers = cluster.node(Service::Prefill, 0).status().await?.peers;
            let used: Vec<_> = peers.iter().map(|peer| (peer.name.as_str(), peer.transport.as_str())).collect();
            ensure!(used == [("decode-0", transport), ("kv-store-0", transport)], "{used:?}");
            ensure!(peers.iter().all(|peer| peer.completed > 0 && peer.failed == 0), "{peers:?}");
            ensure!(peers[1].read_bytes > 0 && peers[0].written_bytes > 0, "{peers:?}");
            let store = cluster.node(Service::KvStore, 0).metrics().await?;
            let moved = store.sum_where("kvasir_kv_store_moved_bytes_total", &[("transport", transport)]);
            ensure!(moved > 0.0, "the store counts what peers move: {store:?}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn answers_are_the_same_from_every_cache() -> Result<()> {
    let folder = workspace::demo_model();
    // Two of each: the second pass finds blocks in the decode worker's cache, a prefill worker's, or the store.
    Cluster::builder()
        .prefill(2)
        .decode(2)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .run(async |cluster| {
            agree(cluster, &folder, 8, KvDtype::default()).await?;
            agree(cluster, &folder, 8, KvDtype::default()).await
        })
        .await
}

#[tokio::test]
async fn guesses_from_the_text_change_no_answer() -> Result<()> {
    speculating("ngram").await
}

#[tokio::test]
async fn guesses_of_a_draft_model_change_no_answer() -> Result<()> {
    speculating("draft").await
}

/// Remote prefill to decode workers that guess; the draft model is the model itself, so its guesses are right.
async fn speculating(kind: &str) -> Result<()> {
    let folder = workspace::demo_model();
    uncached(&folder, 64, 0, KvDtype::default())
        .set(Service::Decode, "engine.speculation.kind", kind)
        .set(Service::Decode, "engine.speculation.model", folder.to_string_lossy().into_owned())
        .run(async |cluster| {
            agree(cluster, &folder, 1, KvDtype::default()).await?;
            agree(cluster, &folder, 8, KvDtype::default()).await?;
            let metrics = cluster.node(Service::Decode, 0).metrics().await?;
            let count = |name| metrics.sum(&format!("kvasir_worker_{name}_total"));
            let (drafted, accepted) = (count("drafted_tokens"), count("accepted_tokens"));
            println!("{kind}: {accepted} of {drafted} guesses accepted, {} steps", count("engine_steps"));
            let least = if kind == "draft" { 0.95 } else { 0.3 };
            ensure!(drafted > 100.0 && accepted >= least * drafted, "{kind}: {accepted} of {drafted}");
            ensure!(count("proposer_failures") == 0.0, "the proposer failed");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn every_model_family_says_what_the_reference_says_with_remote_prefill() -> Result<()> {
    families(0).await
}

#[tokio::test]
async fn every_model_family_says_what_the_reference_says_with_local_prefill() -> Result<()> {
    families(ALWAYS_LOCAL).await
}

/// The matrix for a model of each family.
async fn families(local_prefill_tokens: usize) -> Result<()> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(workspace::root().join("models/tiny"))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.join("golden.jsonl").is_file())
        .collect();
    folders.sort();
    ensure!(folders.len() >= 2, "models/tiny holds a model of each family, found {folders:?}");
    for folder in folders {
        for chunk_tokens in [512, 16] {
            matrix(&folder, chunk_tokens, local_prefill_tokens).await.with_context(|| show(&folder))?;
        }
    }
    Ok(())
}

/// One request at a time, then eight; with remote or local prefill, which the workers' own counts must confirm.
async fn matrix(folder: &Path, chunk_tokens: usize, local_prefill_tokens: usize) -> Result<()> {
    let kv_dtype = KvDtype::default();
    uncached(folder, chunk_tokens, local_prefill_tokens, kv_dtype)
        .run(async |cluster| {
            agree(cluster, folder, 1, kv_dtype).await?;
            agree(cluster, folder, 8, kv_dtype).await?;
            let prompts = 2 * golden::load(folder)?.len() as u64;
            let remote = cluster.node(Service::Prefill, 0).status().await?.requests_total;
            let expected = if local_prefill_tokens == 0 { prompts } else { 0 };
            ensure!(remote == expected, "{remote} prompts were prefilled remotely, expected {expected}");
            Ok(())
        })
        .await
}

/// A cluster in which every prompt is computed anew.
fn uncached(folder: &Path, chunk_tokens: usize, local_prefill_tokens: usize, kv_dtype: KvDtype) -> Builder {
    Cluster::builder()
        .model(folder)
        .kv_store(0)
        .worker("engine.prefix_cache", false)
        .worker("engine.chunk_tokens", chunk_tokens)
        .worker("kv.dtype", kv_dtype.name())
        .set(Service::Decode, "decode.local_prefill_tokens", local_prefill_tokens)
}

/// Asks all the folder's questions, so many at a time, and compares every answer with the reference's.
async fn agree(cluster: &Cluster, folder: &Path, in_flight: usize, kv_dtype: KvDtype) -> Result<()> {
    answers_agree(&cluster.client(), cluster.model(), folder, in_flight, kv_dtype).await
}

/// The same of a client, for who does something to the cluster meanwhile.
pub(crate) async fn answers_agree(
    client: &Client,
    model: &str,
    folder: &Path,
    in_flight: usize,
    kv_dtype: KvDtype,
) -> Result<()> {
    let (vocabulary, lines) = (Vocabulary::load(folder)?, golden::load(folder)?);
    let total = lines.len();
    let vocabulary = &vocabulary;
    let ask = |line: Line| async move {
        let outcome = compare(client, model, vocabulary, &line, kv_dtype).await;
        (line, outcome)
    };
    let outcomes: Vec<_> = stream::iter(lines).map(ask).buffer_unordered(in_flight).collect().await;
    let mut excused = 0;
    for (line, outcome) in outcomes {
        match outcome {
            Ok(()) => {}
            Err(difference) if line.margin < MARGIN => {
                excused += 1;
                println!("excused, the reference hesitated (margin {}): {difference:#}", line.margin);
            }
            Err(difference) => return Err(difference.context(format!("{} in flight", in_flight))),
        }
    }
    println!("{}: {} of {total} as the reference, {excused} excused", show(folder), total - excused);
    Ok(())
}

/// Asks so many of the folder's questions that the reference did not hesitate with, one after the other.
pub(crate) async fn some_agree(cluster: &Cluster, folder: &Path, count: usize, kv_dtype: KvDtype) -> Result<()> {
    let (vocabulary, lines) = (Vocabulary::load(folder)?, golden::load(folder)?);
    for line in lines.iter().filter(|line| line.margin >= MARGIN).take(count) {
        compare(&cluster.client(), cluster.model(), &vocabulary, line, kv_dtype).await?;
    }
    Ok(())
}

async fn compare(client: &Client, model: &str, vocabulary: &Vocabulary, line: &Line, kv_dtype: KvDtype) -> Result<()> {
    let answer = client
        .chat(&json!({
            "model": model, "messages": line.messages, "temperature": 0, "max_tokens": line.output_ids.len(),
            "logprobs": true, "top_logprobs": 5,
        }))
        .await?;
    let choice = &answer["choices"][0];
    let question = line.messages.last().map(|message| &message["content"]).unwrap_or(&Value::Null);
    let told = |what: &str| format!("{what} of the answer to {question}");

    let prompt_tokens = answer["usage"]["prompt_tokens"].as_u64().unwrap_or_default();
    ensure!(prompt_tokens == line.prompt_ids.len() as u64, "{}: {prompt_tokens}", told("usage.prompt_tokens"));
    let text = choice["message"]["content"].as_str().unwrap_or_default();
    ensure!(text == line.text, "{}: {text:?}, the reference says {:?}", told("text"), line.text);

    let tokens = choice["logprobs"]["content"].as_array().with_context(|| told("logprobs"))?;
    let said: Vec<Vec<u8>> = tokens.iter().map(bytes).collect::<Result<_>>()?;
    // Special tokens have no text, so they have no place among the logged tokens either; but they are counted.
    let visible: Vec<u32> = line.output_ids.iter().copied().filter(|&id| !vocabulary.is_special(id)).collect();
    let expected: Vec<Vec<u8>> = visible.iter().map(|&id| vocabulary.bytes(id).to_vec()).collect();
    ensure!(said == expected, "{}: {said:?}, expected {expected:?}", told("tokens"));
    let written = answer["usage"]["completion_tokens"].as_u64().unwrap_or_default();
    ensure!(written == line.output_ids.len() as u64, "{}: {written}", told("usage.completion_tokens"));
    if visible.first() != line.output_ids.first() {
        return Ok(()); // the first token, whose likelihood the reference tells, is not shown
    }

    first_logprobs(tokens.first().with_context(|| told("first token"))?, vocabulary, line, kv_dtype)
        .with_context(|| told("start"))
}

/// Whether the likeliest first tokens are as likely as the reference says.
fn first_logprobs(first: &Value, vocabulary: &Vocabulary, line: &Line, kv_dtype: KvDtype) -> Result<()> {
    let (mut ours, tolerance) = (HashMap::new(), kv_dtype.tolerance());
    for top in first["top_logprobs"].as_array().context("no top_logprobs")? {
        ours.insert(bytes(top)?, top["logprob"].as_f64().context("no logprob")?);
    }
    let least = ours.values().copied().fold(f64::INFINITY, f64::min);
    for (&id, &theirs) in &line.first_logprobs {
        match ours.get(vocabulary.bytes(id)) {
            Some(&ours) if (ours - theirs).abs() <= tolerance => {}
            Some(&ours) => bail!("token {id}: log-probability {ours}, the reference has {theirs}"),
            // Where the fifth and the sixth are nearly equal, either may be the fifth.
            None if theirs <= least + tolerance => {}
            None => bail!("token {id} ({theirs}) is not among our likeliest: {first}"),
        }
    }
    Ok(())
}

/// The bytes of a token in a `logprobs` object.
fn bytes(token: &Value) -> Result<Vec<u8>> {
    let bytes = token["bytes"].as_array().with_context(|| format!("no bytes: {token}"))?;
    bytes.iter().map(|byte| Ok(u8::try_from(byte.as_u64().context("no byte")?)?)).collect()
}

fn show(folder: &Path) -> String {
    folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
