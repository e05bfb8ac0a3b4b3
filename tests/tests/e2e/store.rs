//! The KV store as requests meet it: what goes there, when it is asked, and what it costs when it fails.

use anyhow::{Result, bail, ensure};
use futures_util::future;
use kvasir_tests::{
    Builder, Cluster, Process, Service,
    golden::KvDtype,
    metrics::Metrics,
    namespace::Namespace,
    net::Net,
    wait::{self, SOON},
    workspace,
};

use crate::{
    golden::answers_agree,
    prompts::{cached_tokens, chat, long, text},
    spill::{BLOCK_BYTES, BLOCKS},
};

/// Warnings of workers whose store fails.
const WITHOUT: [&str; 3] = ["store not read, going on without", "blocks not written back to the store", "transfer"];

/// Two prefill workers that ask the store for all it has, and a decode worker that keeps nothing.
fn asking() -> Builder {
    Cluster::builder()
        .prefill(2)
        .worker("store.fetch", "always")
        .set(Service::Decode, "engine.prefix_cache", false)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
}

async fn of(cluster: &Cluster, service: Service, index: usize) -> Result<Metrics> {
    cluster.node(service, index).metrics().await
}

async fn committed(cluster: &Cluster) -> Result<u64> {
    Ok(cluster.node(Service::KvStore, 0).store_status().await?.committed_blocks_total)
}

async fn until_committed(cluster: &Cluster, blocks: u64) -> Result<()> {
    wait::until(&format!("{blocks} blocks are in the store"), SOON, async || {
        (committed(cluster).await.ok()? >= blocks).then_some(())
    })
    .await
}

#[tokio::test]
async fn answers_are_the_same_when_the_store_is_killed_in_the_middle() -> Result<()> {
    failing(Process::kill).await
}

#[tokio::test]
async fn answers_are_the_same_when_the_store_stops_answering_in_the_middle() -> Result<()> {
    failing(Process::pause).await
}

/// All questions with the store, all while it fails, all without it.
async fn failing(fail: fn(&mut Process)) -> Result<()> {
    let folder = workspace::demo_model();
    asking()
        .set(Service::Prefill, "engine.prefix_cache", false)
        .worker("store.lookup_timeout_ms", 50)
        .run(async |cluster| {
            WITHOUT.into_iter().for_each(|warning| cluster.expect_warning(warning));
            let (client, model) = (cluster.client(), cluster.model().to_owned());
            let all = || answers_agree(&client, &model, &folder, 4, KvDtype::default());
            all().await?;
            let before = cluster.node(Service::KvStore, 0).store_status().await?.hit_blocks_total;
            let fails = async {
                wait::until("blocks are read from the store", SOON, async || {
                    let status = cluster.node(Service::KvStore, 0).store_status().await.ok()?;
                    (status.hit_blocks_total > before + 10).then_some(())
                })
                .await?;
                fail(&mut cluster.node_mut(Service::KvStore, 0).process);
                anyhow::Ok(())
            };
            let (agreed, failed) = future::join(all(), fails).await;
            agreed?;
            failed?;
            all().await?;
            cluster.node_mut(Service::KvStore, 0).process.resume();
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_store_that_stops_answering_is_asked_once_and_then_left_alone() -> Result<()> {
    asking()
        .prefill(1)
        .set(Service::Prefill, "engine.prefix_cache", false)
        .worker("store.lookup_timeout_ms", 50)
        .worker("store.write_back.policy", "off")
        .run(async |cluster| {
            WITHOUT.into_iter().for_each(|warning| cluster.expect_warning(warning));
            cluster.node_mut(Service::KvStore, 0).process.pause();
            let client = cluster.client();
            for number in 0..40 {
                client.chat(&chat(cluster.model(), &format!("{number}: {}", long(40)))).await?;
            }
            let log = cluster.node(Service::Prefill, 0).process.log();
            let waited = log.lines().filter(|line| line.contains("did not answer within")).count();
            let metrics = of(cluster, Service::Prefill, 0).await?;
            let missed = metrics.sum_where("kvasir_worker_store_decisions_total", &[("decision", "miss")]);
            cluster.node_mut(Service::KvStore, 0).process.resume();
            ensure!(missed == 40.0, "asked for each prompt: {missed}");
            ensure!((1..40).contains(&waited), "{waited} of 40 requests waited for a store that does not answer");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_decode_worker_that_computes_a_prompt_asks_the_store() -> Result<()> {
    Cluster::builder()
        .prefill(0)
        .decode(2)
        .worker("store.fetch", "always")
        .run(async |cluster| {
            let (client, body) = (cluster.client(), chat(cluster.model(), &long(100)));
            let first = client.chat(&body).await?;
            until_committed(cluster, 6).await?;
            let computed = usize::from(cluster.node(Service::Decode, 0).status().await?.requests_total == 0);
            cluster.expect_warning("a worker did not begin an answer");
            let process = &mut cluster.node_mut(Service::Decode, computed).process;
            process.terminate();
            process.wait(SOON).await?;
            let second = client.chat(&body).await?;
            ensure!(cached_tokens(&second) >= 96, "the store's blocks count as cached: {second}");
            ensure!(text(&first) == text(&second), "the same question has the same answer");
            let tokens = of(cluster, Service::Decode, 1 - computed).await?;
            let tokens = tokens.sum_where("kvasir_worker_prompt_tokens_total", &[("source", "Store")]);
            ensure!(tokens >= 96.0, "{tokens} tokens came from the store");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn what_was_answered_goes_to_the_store_like_what_was_asked() -> Result<()> {
    Cluster::builder()
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .run(async |cluster| {
            let mut body = chat(cluster.model(), &long(40));
            (body["max_tokens"], body["min_tokens"]) = (100.into(), 100.into());
            let answer = cluster.client().chat(&body).await?;
            let prompt = answer["usage"]["prompt_tokens"].as_u64().unwrap_or_default();
            // All full blocks of both; the last token of the answer is never computed.
            let blocks = (prompt + 100 - 1) / 16;
            until_committed(cluster, blocks).await?;
            let written = async |service| {
                let metrics = of(cluster, service, 0).await?;
                anyhow::Ok(metrics.sum_where("kvasir_worker_write_back_blocks_total", &[("outcome", "written")]))
            };
            wait::until("both have counted", SOON, async || {
                let counted = [written(Service::Prefill).await.ok()?, written(Service::Decode).await.ok()?];
                (counted == [(prompt / 16) as f64, (blocks - prompt / 16) as f64]).then_some(())
            })
            .await
        })
        .await
}

#[tokio::test]
async fn with_reused_once_a_block_is_written_when_it_is_asked_for_again() -> Result<()> {
    Cluster::builder()
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .set(Service::Decode, "engine.prefix_cache", false)
        .worker("store.write_back.policy", "reused-once")
        .run(async |cluster| {
            let client = cluster.client();
            client.chat(&chat(cluster.model(), &format!("one {}", long(60)))).await?;
            let body = chat(cluster.model(), &format!("two {}", long(90)));
            let first = client.chat(&body).await?;
            let before = committed(cluster).await?;
            client.chat(&body).await?;
            let blocks = first["usage"]["prompt_tokens"].as_u64().unwrap_or_default() / 16;
            until_committed(cluster, blocks).await?;
            let after = committed(cluster).await?;
            // They have the template's beginning in common, which the second prompt had asked for again.
            ensure!(before < 4 && after == blocks, "{before}, then {after} of {blocks} blocks");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn with_on_evict_the_store_has_what_the_workers_cache_has_no_room_for() -> Result<()> {
    asking()
        .prefill(1)
        .set(Service::Prefill, "kv.memory_bytes", BLOCKS * BLOCK_BYTES)
        .worker("store.write_back.policy", "on-evict")
        .run(async |cluster| {
            let (client, model) = (cluster.client(), cluster.model().to_owned());
            let body = |number: usize| chat(&model, &format!("{number} {}", long(200)));
            let first = client.chat(&body(0)).await?;
            ensure!(committed(cluster).await? == 0, "there was room for all of it");
            for number in 1..8 {
                client.chat(&body(number)).await?;
            }
            let blocks = first["usage"]["prompt_tokens"].as_u64().unwrap_or_default() / 16;
            until_committed(cluster, blocks).await?;
            let source = async |source| {
                let metrics = of(cluster, Service::Prefill, 0).await?;
                anyhow::Ok(metrics.sum_where("kvasir_worker_prompt_tokens_total", &[("source", source)]))
            };
            wait::until("what was evicted is written", SOON, async || {
                let metrics = of(cluster, Service::Prefill, 0).await.ok()?;
                (metrics.sum("kvasir_worker_write_back_queued_blocks") == 0.0).then_some(())
            })
            .await?;
            let (cache, store) = (source("Cache").await?, source("Store").await?);
            let again = client.chat(&body(0)).await?;
            ensure!(text(&again) == text(&first), "the same question has the same answer");
            let (cached, stored) = (source("Cache").await? - cache, source("Store").await? - store);
            ensure!(stored > 0.0 && cached + stored >= (blocks - 1) as f64 * 16.0, "{cached} and {stored} tokens");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn what_finds_no_room_in_the_queue_is_counted_and_forgotten() -> Result<()> {
    asking()
        .prefill(1)
        .set(Service::Prefill, "store.write_back.max_queued_blocks", 3)
        .set(Service::Prefill, "store.write_back.mib_per_s", 1)
        .run(async |cluster| {
            let answer = cluster.client().chat(&chat(cluster.model(), &long(100))).await?;
            let blocks = (answer["usage"]["prompt_tokens"].as_u64().unwrap_or_default() / 16) as f64;
            until_committed(cluster, 3).await?;
            let metrics = of(cluster, Service::Prefill, 0).await?;
            let dropped =
                |reason| metrics.sum_where("kvasir_worker_write_back_dropped_blocks_total", &[("reason", reason)]);
            ensure!(dropped("queue_full") == blocks - 3.0, "{} of {blocks} blocks dropped", dropped("queue_full"));
            ensure!(committed(cluster).await? == 3, "no more were written than found room");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn with_fetch_off_nothing_is_asked_or_read_and_answers_are_the_same() -> Result<()> {
    let folder = workspace::demo_model();
    asking()
        .prefill(1)
        .set(Service::Prefill, "engine.prefix_cache", false)
        .worker("store.fetch", "off")
        .run(async |cluster| {
            let (client, model) = (cluster.client(), cluster.model().to_owned());
            // Everything is in the store when it is asked for the second time.
            for _ in 0..2 {
                answers_agree(&client, &model, &folder, 4, KvDtype::default()).await?;
                until_committed(cluster, 10).await?;
            }
            let store = of(cluster, Service::KvStore, 0).await?;
            ensure!(store.sum("kvasir_kv_store_lookups_total") == 0.0, "the store was asked");
            for service in [Service::Prefill, Service::Decode] {
                let metrics = of(cluster, service, 0).await?;
                let read = metrics.sum_where("kvasir_worker_prompt_tokens_total", &[("source", "Store")]);
                let decided = metrics.sum("kvasir_worker_store_decisions_total");
                ensure!((read, decided) == (0.0, 0.0), "{service:?} read {read} tokens in {decided} decisions");
            }
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_prompts_beginning_is_computed_while_the_rest_is_read() -> Result<()> {
    if !Namespace::Network.entered("store::a_prompts_beginning_is_computed_while_the_rest_is_read")? {
        return Ok(());
    }
    // A store from which a block takes about as long as computing it.
    let net = Net::new(1).await?;
    net.slow(0, 40)?;
    Cluster::builder()
        .etcd(Net::here())
        .place(Service::KvStore, 0, net.place(0))
        .set(Service::KvStore, "transfer.transports", "tcp")
        .worker("engine.chunk_tokens", 16)
        .worker("engine.prefix_cache", false)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .run(async |cluster| {
            let (client, model) = (cluster.client(), cluster.model().to_owned());
            let mut blocks = 0;
            // How long reading takes it learns by reading.
            for number in 0..20 {
                let body = chat(&model, &format!("{number} {}", long(300)));
                let computed = client.chat(&body).await?;
                blocks += computed["usage"]["prompt_tokens"].as_u64().unwrap_or_default() / 16;
                until_committed(cluster, blocks).await?;
                let read = client.chat(&body).await?;
                ensure!(text(&read) == text(&computed), "the same question has the same answer");
                let metrics = of(cluster, Service::Prefill, 0).await?;
                let meanwhile = metrics.sum("kvasir_worker_store_meanwhile_tokens_total");
                if meanwhile > 0.0 {
                    let read = metrics.sum_where("kvasir_worker_prompt_tokens_total", &[("source", "Store")]);
                    ensure!(read > 0.0, "and the rest was read");
                    return Ok(());
                }
            }
            bail!("nothing was computed while blocks were read")
        })
        .await
}

#[tokio::test]
async fn with_write_back_off_the_store_gets_nothing() -> Result<()> {
    asking()
        .worker("store.write_back.policy", "off")
        .run(async |cluster| {
            let client = cluster.client();
            for _ in 0..2 {
                client.chat(&chat(cluster.model(), &long(100))).await?;
            }
            ensure!(committed(cluster).await? == 0, "something was written");
            let asked = of(cluster, Service::Prefill, 0).await?.sum("kvasir_worker_store_decisions_total")
                + of(cluster, Service::Prefill, 1).await?.sum("kvasir_worker_store_decisions_total");
            ensure!(asked > 0.0, "the store was not even asked");
            Ok(())
        })
        .await
}
