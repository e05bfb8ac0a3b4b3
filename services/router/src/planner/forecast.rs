//! What clients would see if so many workers read prompts and so many wrote answers.
//!
//! Prefill workers are servers of one queue (M/G/c, by Sakasegawa's approximation: "An approximation formula
//! L_q ≅ α·ρ^β/(1−ρ)", 1977), so a prompt takes its own time, the queue's, and what is waiting already takes to be worked off.
//!
//! Decode workers answer all of theirs at the same time, and the more they have the longer each step takes. So many answers are
//! under way as make the tokens that are asked for: with `r` tokens a second for each worker, `n = r · step(n)`, and as a step
//! takes `base + n·each`, it takes `base / (1 − r·each)`.

use super::speeds::{Prompt, Step};

/// A queue is not thought of as fuller than this; beyond, what can't be done piles up.
const FULLEST: f64 = 0.95;
/// For what piles up, seconds of it are counted.
const HORIZON: f64 = 30.0;
/// A worker's blocks are not all of use at every moment.
const ROOM: f64 = 0.9;

/// What is asked of a model's workers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Demand {
    /// Prompt tokens to compute in a second: those that nobody holds.
    pub prompt_tokens_per_second: f64,
    /// Tokens of a prompt that are to be computed, on average.
    pub prompt_tokens: f64,
    /// Tokens of answers in a second.
    pub answer_tokens_per_second: f64,
    /// Tokens that an answer looks back at, on average.
    pub context_tokens: f64,
    /// Prompt tokens that wait at workers now.
    pub backlog_tokens: f64,
}

/// What clients should see.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Targets {
    /// To the first token, in seconds.
    pub ttft: f64,
    /// From one token to the next, in seconds.
    pub tpot: f64,
}

/// How fast the workers are, on average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fleet {
    /// Steps.
    pub step: Step,
    /// Prompts.
    pub prompt: Prompt,
    /// Tokens that a worker has blocks for.
    pub room_tokens: f64,
}

/// How many workers read, and how many write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Split {
    /// Prefill workers.
    pub prefill: usize,
    /// Decode workers.
    pub decode: usize,
}

/// What is expected of a split.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Forecast {
    /// Seconds to the first token.
    pub ttft: f64,
    /// Seconds from one token to the next.
    pub tpot: f64,
    /// Share of the prefill workers' time that is used; above 1 they can't follow.
    pub prefill_load: f64,
    /// The same of the decode workers.
    pub decode_load: f64,
    /// Share of the decode workers' blocks that answers hold.
    pub occupancy: f64,
}

impl Forecast {
    /// How far from its targets: 1 is just met, 2 is twice as slow. The worse of the two.
    pub fn strain(&self, targets: &Targets) -> f64 {
        // Answers that don't fit wait for others to end, and their clients for the first token.
        let crowd = if self.occupancy > ROOM { self.occupancy / ROOM } else { 0.0 };
        (self.ttft / targets.ttft).max(self.tpot / targets.tpot).max(crowd)
    }
}

/// What would be seen with this split.
pub fn forecast(split: Split, demand: &Demand, fleet: &Fleet) -> Forecast {
    let (servers, writers) = (split.prefill.max(1) as f64, split.decode.max(1) as f64);
    // Reading.
    let length = demand.prompt_tokens.max(1.0);
    let service = fleet.prompt.seconds(length, 0.0);
    let prefill_load = demand.prompt_tokens_per_second / length * service / servers;
    let busy = prefill_load.min(FULLEST);
    let queue = service * busy.powf((2.0 * (servers + 1.0)).sqrt() - 1.0) / (servers * (1.0 - busy));
    let backlog = demand.backlog_tokens / length * service / servers;
    let ttft = service + queue.max(backlog) + HORIZON * (prefill_load - FULLEST).max(0.0);
    // Writing.
    let each = fleet.step.each(demand.context_tokens);
    let rate = demand.answer_tokens_per_second / writers;
    let decode_load = rate * each;
    let base = fleet.step.base + each;
    let tpot = base / (1.0 - decode_load.min(FULLEST)) * (1.0 + HORIZON * (decode_load - FULLEST).max(0.0));
    let answers = rate * tpot;
    let occupancy = if fleet.room_tokens > 0.0 { answers * demand.context_tokens / fleet.room_tokens } else { 0.0 };
    Forecast { ttft, tpot, prefill_load, decode_load, occupancy }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fleet() -> Fleet {
        Fleet {
            step: Step { base: 0.01, per_answer: 2e-4, per_context_token: 1e-7 },
            prompt: Prompt { per_token: 5e-5, per_place: 1e-9 },
            room_tokens: 200_000.0,
        }
    }

    #[test]
    fn an_idle_cluster_is_as_fast_as_its_workers() {
        let demand = Demand { prompt_tokens: 1000.0, context_tokens: 1000.0, ..Demand::default() };
        let seen = forecast(Split { prefill: 2, decode: 2 }, &demand, &fleet());
        assert!((seen.ttft - 0.0505).abs() < 1e-9 && (seen.tpot - 0.0103).abs() < 1e-9, "{seen:?}");
        assert_eq!((seen.prefill_load, seen.decode_load, seen.occupancy), (0.0, 0.0, 0.0));
    }

    #[test]
    fn one_server_waits_as_the_formula_for_one_says() {
        // M/M/1: the wait is ρ/(1−ρ) services.
        let demand = Demand { prompt_tokens: 1000.0, prompt_tokens_per_second: 10_000.0, ..Demand::default() };
        let seen = forecast(Split { prefill: 1, decode: 1 }, &demand, &fleet());
        assert!((seen.prefill_load - 0.505).abs() < 1e-9);
        let expected = 0.0505 * (1.0 + 0.505 / 0.495);
        assert!((seen.ttft - expected).abs() < 1e-9, "{} and {expected}", seen.ttft);
    }

    #[test]
    fn answers_under_way_are_as_many_as_make_the_tokens_asked_for() {
        let demand = Demand { context_tokens: 1000.0, answer_tokens_per_second: 2000.0, ..Demand::default() };
        let seen = forecast(Split { prefill: 1, decode: 1 }, &demand, &fleet());
        let answers = 2000.0 * seen.tpot;
        let step = fleet().step.seconds(answers, 1000.0) + fleet().step.each(1000.0);
        assert!((step / seen.tpot - 1.0).abs() < 0.01, "{step} and {}", seen.tpot);
    }

    proptest! {
        #[test]
        fn more_workers_are_never_worse_and_all_is_finite(
            prompts in 0.0..1e6f64, length in 1.0..1e5f64, answers in 0.0..1e6f64, context in 0.0..1e5f64,
            backlog in 0.0..1e7f64, prefill in 1usize..64, decode in 1usize..64,
        ) {
            let demand = Demand {
                prompt_tokens_per_second: prompts, prompt_tokens: length, answer_tokens_per_second: answers,
                context_tokens: context, backlog_tokens: backlog,
            };
            let seen = forecast(Split { prefill, decode }, &demand, &fleet());
            let more = forecast(Split { prefill: prefill + 1, decode: decode + 1 }, &demand, &fleet());
            prop_assert!(seen.ttft.is_finite() && seen.tpot.is_finite() && seen.occupancy.is_finite());
            prop_assert!(more.ttft <= seen.ttft * (1.0 + 1e-9) && more.tpot <= seen.tpot * (1.0 + 1e-9));
            prop_assert!(more.occupancy <= seen.occupancy * (1.0 + 1e-9) + 1e-9);
        }
    }
}
