//! A decode worker and a prefill worker, both real.

use kvasir_engine::choice_seed;
use kvasir_proto::v1::{Finished, GenerateRequest};
use kvasir_types::Sampling;

use crate::harness::{Cluster, config, golden, goldens};

/// Every reference answer, prefilled remotely, alone and eight at a time.
async fn answers_are_the_references(local: bool, chunk_tokens: usize) {
    let cluster = Cluster::with_decode().await;
    let mut prefill = config();
    prefill.engine.chunk_tokens = chunk_tokens;
    let prefill = cluster.add_prefill(prefill, local).await;
    let goldens = goldens();
    for at_once in [1, 8] {
        for (round, batch) in goldens.chunks(at_once).enumerate() {
            let answers = batch.iter().enumerate().map(|(i, golden)| {
                let salt = format!("{at_once} {round} {i}"); // computed, not found
                cluster.answer(GenerateRequest { cache_salt: salt, ..cluster.request(golden, vec![prefill.clone()]) })
            });
            let answers = futures_util::future::join_all(answers).await;
            for (golden, answer) in batch.iter().zip(answers) {
                let (tokens, finished) = answer.unwrap();
                assert_eq!(tokens, golden.output_ids);
                assert_eq!((finished.prefill_member.as_str(), finished.cached_tokens), ("prefill-1", 0));
            }
        }
    }
    cluster.assert_no_leak().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_the_references_over_the_local_transport() {
    answers_are_the_references(true, 512).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_the_references_over_tcp() {
    answers_are_the_references(false, 512).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_the_references_in_small_chunks_over_tcp() {
    answers_are_the_references(false, 16).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_choices_of_a_request_are_those_of_its_seed_wherever_its_prompt_was_computed() {
    let (cluster, golden) = (Cluster::with_decode().await, golden());
    let prefill = cluster.add_prefill(config(), false).await;
    let seeded = |seed| Sampling { max_tokens: 40, temperature: 2.0, ignore_eos: true, seed, ..Sampling::default() };
    let request = |seed, choices, prefill, salt: &str| GenerateRequest {
        sampling: Some((&seeded(seed)).into()),
        choices,
        cache_salt: salt.into(),
        ..cluster.request(&golden, prefill)
    };
    let tokens = |choices: Vec<(Vec<u32>, Finished)>| choices.into_iter().map(|(tokens, _)| tokens).collect::<Vec<_>>();

    let remote = cluster.choices(request(5, 4, vec![prefill.clone()], "remote")).await;
    for (tokens, finished) in &remote {
        assert_eq!((finished.prefill_member.as_str(), finished.cached_tokens), ("prefill-1", 0));
        assert_eq!(finished.output_tokens as usize, tokens.len());
    }
    let remote = tokens(remote);
    assert!((1..4).all(|choice| remote[choice] != remote[0]), "they are drawn apart: {remote:?}");
    assert_eq!(tokens(cluster.choices(request(5, 4, vec![], "here")).await), remote);
    assert_eq!(tokens(cluster.choices(request(5, 4, vec![prefill], "remote")).await), remote, "from the cache");
    for (choice, tokens) in (0..).zip(&remote) {
        let alone = cluster.answer(request(choice_seed(5, choice), 1, vec![], "alone")).await.unwrap();
        assert_eq!(&alone.0, tokens, "choice {choice}");
    }
    cluster.assert_no_leak().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_seen_before_is_not_computed_again_wherever_its_blocks_are() {
    let (cluster, golden) = (Cluster::with_decode().await, golden());
    let [first, second] = [cluster.add_prefill(config(), false).await, cluster.add_prefill(config(), false).await];
    let full_blocks = (golden.prompt_ids.len() - 1) / 16 * 16;

    let computed = cluster.answer(cluster.request(&golden, vec![first])).await.unwrap();
    assert_eq!((computed.0, computed.1.cached_tokens), (golden.output_ids.clone(), 0));
    // The second prefill worker has nothing, but the decode worker's blocks are open to it for reading.
    let read = cluster.answer(cluster.request(&golden, vec![second])).await.unwrap();
    assert_eq!((read.0, read.1.cached_tokens as usize), (golden.output_ids.clone(), full_blocks));
    let here = cluster.answer(cluster.request(&golden, vec![])).await.unwrap();
    assert_eq!((here.0, here.1.cached_tokens as usize), (golden.output_ids, full_blocks));
    cluster.assert_no_leak().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_worker_whose_blocks_look_otherwise_refuses_and_is_passed_over() {
    let (cluster, golden) = (Cluster::with_decode().await, golden());
    let mut other = config();
    other.kv.block_size = 32;
    let other = cluster.add_prefill(other, false).await;
    let (tokens, finished) = cluster.answer(cluster.request(&golden, vec![other])).await.unwrap();
    assert_eq!((tokens, finished.prefill_member.as_str()), (golden.output_ids, ""));
    cluster.assert_no_leak().await;
    cluster.stop().await;
}
