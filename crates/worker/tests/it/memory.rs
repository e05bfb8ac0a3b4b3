//! What a worker's memory holds, and what it refuses for that.

use kvasir_proto::{
    FIELD_METADATA, MAX_TOKENS_FIELD, PROMPT_FIELD,
    v1::{GenerateRequest, Sampling, finished::Reason},
};
use tonic::Code;

use crate::harness::{Cluster, config, golden};

/// Slots of the small decode worker: 12 blocks of 16 tokens.
const SLOTS: usize = 192;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_length_that_was_asked_for_and_can_never_be_held_is_refused_with_the_one_that_can() {
    let mut small = config();
    small.kv.memory_bytes = SLOTS as u64 * 5 * 2 * 2 * 32 * 2; // layers, heads, keys and values, their size, f16
    let (cluster, golden) = (Cluster::with_decode_of(small).await, golden());
    let request = |max_tokens: usize, max_tokens_asked| {
        let request = cluster.request(&golden, vec![]);
        let sampling = Sampling {
            max_tokens: max_tokens as u32,
            max_tokens_asked,
            ignore_eos: true,
            ..request.sampling.clone().unwrap()
        };
        GenerateRequest { sampling: Some(sampling), ..request }
    };
    let prompt = golden.prompt_ids.len();
    let most = SLOTS - prompt + 1; // the last token's KV is never needed

    let refused = cluster.answer(request(most + 1, true)).await.unwrap_err();
    let told = format!(
        "a prompt of {prompt} tokens and an answer of {} may need 13 blocks, there are 12: ask for at most {most} tokens",
        most + 1
    );
    assert_eq!((refused.code(), refused.message()), (Code::InvalidArgument, told.as_str()));
    assert_eq!(refused.metadata().get(FIELD_METADATA).unwrap(), MAX_TOKENS_FIELD);
    // As long as it says, and where nobody asked, as far as the memory goes: in both cases to the last slot.
    for (max_tokens, asked) in [(most, true), (8000, false)] {
        let (tokens, finished) = cluster.answer(request(max_tokens, asked)).await.unwrap();
        assert_eq!((tokens.len(), finished.reason()), (most, Reason::Length));
    }
    // A prompt beyond it is no matter of waiting, either.
    let long = GenerateRequest { prompt: golden.prompt_ids.repeat(4)[..SLOTS].to_vec(), ..request(1, true) };
    let refused = cluster.answer(long).await.unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::InvalidArgument, "a prompt of 192 tokens needs 13 blocks, there are 12")
    );
    assert_eq!(refused.metadata().get(FIELD_METADATA).unwrap(), PROMPT_FIELD);
    cluster.assert_no_leak().await;
    cluster.stop().await;
}
