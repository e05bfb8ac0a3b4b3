//! A prompt computed once is not computed again, wherever it comes next.

use anyhow::{Result, ensure};
use kvasir_tests::{
    Cluster, Service,
    wait::{self, SOON},
};

use crate::prompts::{cached_tokens, chat, long, text};

#[tokio::test]
async fn a_repeated_prompt_comes_from_the_decode_workers_own_cache() -> Result<()> {
    Cluster::builder()
        .run(async |cluster| {
            let (client, body) = (cluster.client(), chat(cluster.model(), &long(100)));
            let first = client.chat(&body).await?;
            let second = client.chat(&body).await?;
            ensure!(cached_tokens(&first) == 0, "nothing was cached yet: {first}");
            ensure!(cached_tokens(&second) >= 96, "all full blocks but perhaps the last are cached: {second}");
            ensure!(text(&first) == text(&second), "the same question has the same answer");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn what_one_prefill_worker_computed_another_reads_from_the_store() -> Result<()> {
    // The decode worker keeps nothing, so that its own cache can't be where the blocks come from.
    Cluster::builder()
        .prefill(2)
        .worker("store.fetch", "always")
        .set(Service::Decode, "engine.prefix_cache", false)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .run(async |cluster| {
            let (client, body) = (cluster.client(), chat(cluster.model(), &long(100)));
            let first = client.chat(&body).await?;
            ensure!(cached_tokens(&first) == 0, "nothing was cached yet: {first}");
            let store = cluster.node(Service::KvStore, 0);
            wait::until("the prompt's full blocks are in the store", SOON, async || {
                store.store_status().await.is_ok_and(|status| status.committed_blocks_total >= 6).then_some(())
            })
            .await?;

            // The other prefill worker has nothing of its own. The router may not yet have heard that the first has left.
            let first_did_it = cluster.node(Service::Prefill, 0).status().await?.requests_total == 1;
            let (computed, other) = if first_did_it { (0, 1) } else { (1, 0) };
            cluster.expect_warning("prefill failed, trying next");
            let process = &mut cluster.node_mut(Service::Prefill, computed).process;
            process.terminate();
            process.wait(SOON).await?;

            let second = client.chat(&body).await?;
            ensure!(cached_tokens(&second) >= 96, "the store's blocks count as cached: {second}");
            ensure!(text(&first) == text(&second), "the same question has the same answer");
            let asked = cluster.node(Service::Prefill, other).status().await?.requests_total;
            ensure!(asked == 1, "the other prefill worker did it: {asked}");
            let hits = cluster.node(Service::KvStore, 0).store_status().await?.hit_blocks_total;
            ensure!(hits >= 6, "the store counted its hits: {hits}");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn tenants_do_not_see_one_anothers_cache() -> Result<()> {
    Cluster::builder()
        .run(async |cluster| {
            let client = cluster.client();
            let mut body = chat(cluster.model(), &long(100));
            for (salt, cached) in [("one", false), ("two", false), ("one", true)] {
                body["cache_salt"] = salt.into();
                let answer = client.chat(&body).await?;
                ensure!((cached_tokens(&answer) > 0) == cached, "tenant {salt}: {answer}");
            }
            Ok(())
        })
        .await
}
