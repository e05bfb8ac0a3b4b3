//! What an engine is doing and has done.

use std::time::Duration;

use kvasir_kv_cache::Counts;

/// A snapshot, as of the end of the last step. The totals only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Blocks by state.
    pub blocks: Counts,
    /// Requests that wait for their blocks.
    pub waiting: usize,
    /// Sequences that had blocks, lost them, and wait for some again; and choices that found none when they began.
    pub preempted: usize,
    /// Sequences whose blocks are reserved and that wait for their caller.
    pub held: usize,
    /// Sequences being computed, prompt or answer.
    pub running: usize,
    /// Prefilled sequences that wait for their release.
    pub parked: usize,
    /// Tokens of those that wait for blocks, preempted ones included: what of them will be found is not known yet.
    pub waiting_tokens: u64,
    /// Tokens that the sequences being computed lack before their next one can be sampled.
    pub prefilling_tokens: u64,
    /// Whether the device it computes on failed, and nothing will be computed any more.
    pub broken: bool,
    /// Steps that computed something.
    pub steps: u64,
    /// Prompt tokens computed (after a preemption: again).
    pub prefilled_tokens: u64,
    /// Prompts whose last token was computed.
    pub prefilled_prompts: u64,
    /// How long prompts take.
    pub prefill: PrefillTimes,
    /// How long steps with answers in them take.
    pub decode: DecodeTimes,
    /// Prompt tokens found in the prefix cache when their sequence was admitted for the first time.
    pub cached_tokens: u64,
    /// Prompt tokens that landed from elsewhere.
    pub landed_tokens: u64,
    /// Tokens sampled.
    pub sampled_tokens: u64,
    /// Tokens drafted and checked.
    pub drafted_tokens: u64,
    /// Of those, how many were what the model chose: steps saved.
    pub accepted_tokens: u64,
    /// Times a proposer gave up; it is asked no more then.
    pub proposer_failures: u64,
    /// Prompt tokens taken over from a sequence that was computing the same ones.
    pub shared_tokens: u64,
    /// Sequences that ended with their last `Finished`.
    pub finished: u64,
    /// Sequences that ended with `Failed`.
    pub failed: u64,
    /// Times a sequence lost its blocks to an older or more urgent one.
    pub preemptions: u64,
    /// Offline sequences that waited long enough to count as online.
    pub promotions: u64,
    /// Further choices that began by sharing the first one's blocks.
    pub forks: u64,
    /// Preempted sequences whose blocks were brought back from where they were moved to.
    pub recalls: u64,
}

/// Prompt tokens that were computed and timed: totals, of which the differences between two moments tell how fast it went.
///
/// Of steps with a handful of prompt tokens only (the rest of a prompt that was found) the tokens cost more each than
/// anybody who thinks of computing many should expect: such steps are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefillTimes {
    /// Tokens.
    pub tokens: u64,
    /// The sum of their places in their prompts: divided by their number, how far in the average one was.
    pub positions: u64,
    /// How long their steps took, divided between prompts and answers by their tokens.
    pub time: Duration,
}

/// Steps that computed a next token for somebody: totals, of which the differences between two moments tell how long an
/// answer waits for its next token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodeTimes {
    /// Steps.
    pub steps: u64,
    /// How long they took, the prompts computed in them included.
    pub time: Duration,
    /// Of these, the ones in which no prompt was computed: what an answer costs when nothing else does.
    pub plain: PlainTimes,
}

/// Steps that computed next tokens and nothing else: totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlainTimes {
    /// Steps.
    pub steps: u64,
    /// How long they took.
    pub time: Duration,
    /// Answers in them: the sum over the steps.
    pub answers: u64,
    /// Tokens that those answers looked back at, prompts included: the sum over the steps.
    pub context: u64,
}
