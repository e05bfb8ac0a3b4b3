//! Whether reading blocks from the store beats computing them, judged by how long both have taken lately.
//!
//! ```text
//!   computing tokens a..b   ∫ (intercept + slope · position)      a line through what the engine's steps took
//!   reading n blocks        lookup + n · bytes / bandwidth        two moving averages over the reads made here
//! ```
//!
//! Both can be done at once, if the engine has nothing else to do: it computes the first chunks while the blocks behind them
//! are read ([`Verdict::head`]).
//!
//! Pure: measurements and the time come in as arguments. What has been measured lately counts more than what was measured
//! before, and before anything was, a guess stands in that favours trying. An estimate of reading that came out too high
//! (the store was busy for a while) would never be corrected by reads that are not made: so now and then a few blocks
//! are read all the same ([`Choice::Probe`]).

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use kvasir_engine::PrefillTimes;

/// Computing, before any prompt was: seconds for a token.
const GUESSED_TOKEN: f64 = 0.5e-3;
/// Tokens after which what was measured before counts half.
const HALF_LIFE_TOKENS: f64 = 16_384.0;
/// How far apart, in tokens, samples must be for the difference between them to be more than noise.
const SPREAD: f64 = 512.0;
/// A lookup, before any was made.
const GUESSED_LOOKUP: f64 = 1e-3;
/// Reading, before any read was made: 500 MB/s, and what that weighs, in bytes.
const GUESSED_BYTE: f64 = 2e-9;
const GUESS_BYTES: f64 = 4e6;
/// What a measurement leaves of those before it.
const FADE: f64 = 0.7;
/// Without a read for so long, one is made although it seems not worth it.
const PROBE_EVERY: Duration = Duration::from_secs(5);
/// Blocks that are read then.
pub(crate) const PROBE_BLOCKS: usize = 8;

/// A head is computed if the request waits for no more than this part of what reading alone takes.
const WORTH_COMPUTING: f64 = 0.9;

/// What to do about blocks that the store may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Reading takes longer.
    Compute,
    /// Computing takes longer.
    Read,
    /// Reading seems to take longer, but that was found out long ago: read [`PROBE_BLOCKS`] and see.
    Probe,
}

/// A choice, and the estimates it was made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) choice: Choice,
    /// Blocks to compute while those behind them are read.
    pub(crate) head: usize,
    /// Computing all of them.
    pub(crate) compute: Duration,
    /// Reading them, or all but the head.
    pub(crate) read: Duration,
}

/// How long things take on this worker.
pub(crate) struct Costs {
    block_tokens: usize,
    block_bytes: u64,
    compute: Line,
    /// The engine's totals when they were last looked at.
    seen: PrefillTimes,
    lookup: f64,
    /// Bytes read and the seconds it took, faded.
    read_bytes: f64,
    read_seconds: f64,
    last_read: Instant,
}

impl Costs {
    pub(crate) fn new(block_tokens: usize, block_bytes: u64, now: Instant) -> Self {
        Self {
            block_tokens,
            block_bytes,
            compute: Line::default(),
            seen: PrefillTimes::default(),
            lookup: GUESSED_LOOKUP,
            read_bytes: GUESS_BYTES,
            read_seconds: GUESS_BYTES * GUESSED_BYTE,
            last_read: now,
        }
    }

    /// What the engine has computed so far, in all its life.
    pub(crate) fn computed(&mut self, total: PrefillTimes) {
        let (tokens, positions) = (total.tokens - self.seen.tokens, total.positions - self.seen.positions);
        let time = total.time.saturating_sub(self.seen.time);
        self.seen = total;
        if tokens > 0 {
            let tokens = tokens as f64;
            self.compute.add(positions as f64 / tokens, time.as_secs_f64() / tokens, tokens);
        }
    }

    /// A lookup took so long, or was given up after so long.
    pub(crate) fn looked_up(&mut self, took: Duration) {
        self.lookup = FADE * self.lookup + (1.0 - FADE) * took.as_secs_f64();
    }

    /// A read brought so many good bytes, perhaps none, and took so long.
    pub(crate) fn read(&mut self, bytes: u64, took: Duration, now: Instant) {
        self.read_bytes = FADE * self.read_bytes + bytes as f64;
        self.read_seconds = FADE * self.read_seconds + took.as_secs_f64();
        self.last_read = now;
    }

    /// Computing the tokens of these blocks of a prompt.
    pub(crate) fn compute_time(&self, blocks: Range<usize>) -> Duration {
        let (start, end) = ((blocks.start * self.block_tokens) as f64, (blocks.end * self.block_tokens) as f64);
        seconds(self.compute.between(start, end))
    }

    /// Reading so many blocks that are known to be there.
    pub(crate) fn read_time(&self, blocks: usize) -> Duration {
        let bytes = (blocks as u64 * self.block_bytes) as f64;
        // No byte ever came: as many seconds as were lost for each block.
        seconds(bytes * self.read_seconds / self.read_bytes.max(1.0))
    }

    /// Whether it is worth asking the store for these blocks, if it has them all. `chunk`: blocks that the engine computes at a
    /// time, if it has nothing else to do.
    pub(crate) fn ask(&mut self, blocks: Range<usize>, chunk: Option<usize>, now: Instant) -> Verdict {
        let (head, compute, read) = self.best(blocks, chunk);
        let read = seconds(self.lookup) + read;
        let choice = if read < compute {
            Choice::Read
        } else if now.saturating_duration_since(self.last_read) >= PROBE_EVERY {
            self.last_read = now; // one at a time
            Choice::Probe
        } else {
            Choice::Compute
        };
        Verdict { choice, head, compute, read }
    }

    /// Whether it is worth reading these, which the store has.
    pub(crate) fn fetch(&self, blocks: Range<usize>, chunk: Option<usize>) -> Verdict {
        let (head, compute, read) = self.best(blocks, chunk);
        Verdict { choice: if read < compute { Choice::Read } else { Choice::Compute }, head, compute, read }
    }

    /// How much to compute while the rest is read, and how long computing all and that take.
    fn best(&self, blocks: Range<usize>, chunk: Option<usize>) -> (usize, Duration, Duration) {
        let compute = |head| self.compute_time(blocks.start..blocks.start + head);
        let alone = self.read_time(blocks.len());
        let mut best = (0, alone);
        // More to compute and less to read, until the one takes as long as the other.
        for head in (0..blocks.len()).step_by(chunk.unwrap_or(usize::MAX)).skip(1) {
            let both = compute(head).max(self.read_time(blocks.len() - head));
            if both >= best.1 {
                break;
            }
            // What it gains must be worth the work.
            if both < alone.mul_f64(WORTH_COMPUTING) {
                best = (head, both);
            }
        }
        (best.0, compute(blocks.len()), best.1)
    }
}

/// An estimate may be anything, a duration may not.
fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, 86_400.0))
}

/// Seconds for a token as a line over its place in the prompt: weighted least squares over faded samples. Attention looks
/// at all that came before, so later tokens cost more; everything else costs the same at every place.
#[derive(Default)]
struct Line {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Line {
    fn add(&mut self, x: f64, y: f64, tokens: f64) {
        let fade = (-tokens / HALF_LIFE_TOKENS).exp2();
        for sum in [&mut self.weight, &mut self.x, &mut self.y, &mut self.xx, &mut self.xy] {
            *sum *= fade;
        }
        self.weight += tokens;
        self.x += tokens * x;
        self.y += tokens * y;
        self.xx += tokens * x * x;
        self.xy += tokens * x * y;
    }

    /// Intercept and slope; neither is negative, as no token is free and none gets cheaper by what came before it.
    fn fit(&self) -> (f64, f64) {
        if self.weight == 0.0 {
            return (GUESSED_TOKEN, 0.0);
        }
        let (x, y) = (self.x / self.weight, self.y / self.weight);
        let (variance, covariance) = (self.xx / self.weight - x * x, self.xy / self.weight - x * y);
        // Samples that lie closer together than this tell little about other places.
        let slope = (covariance / (variance + SPREAD * SPREAD)).clamp(0.0, y / x.max(1.0));
        (y - slope * x, slope)
    }

    /// The area under it.
    fn between(&self, start: f64, end: f64) -> f64 {
        let (intercept, slope) = self.fit();
        (end - start) * (intercept + slope * (start + end) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 1 << 20;

    fn costs() -> (Costs, Instant) {
        let now = Instant::now();
        (Costs::new(16, BLOCK, now), now)
    }

    /// Adds a step of `tokens` tokens from `start` on, of which each took `seconds`.
    fn step(costs: &mut Costs, start: u64, tokens: u64, seconds: f64) {
        let mut total = costs.seen;
        total.tokens += tokens;
        total.positions += (start..start + tokens).sum::<u64>();
        total.time += Duration::from_secs_f64(seconds * tokens as f64);
        costs.computed(total);
    }

    fn near(estimate: Duration, seconds: f64) -> bool {
        (estimate.as_secs_f64() / seconds - 1.0).abs() < 0.1
    }

    #[test]
    fn estimates_follow_what_is_measured() {
        let (mut costs, now) = costs();
        for _ in 0..40 {
            step(&mut costs, 0, 512, 0.002);
            costs.read(32 * BLOCK, Duration::from_millis(100), now);
            costs.looked_up(Duration::from_millis(4));
        }
        assert!(near(costs.compute_time(0..125), 2000.0 * 0.002), "{:?}", costs.compute_time(0..125));
        assert!(near(costs.read_time(64), 0.2), "{:?}", costs.read_time(64));
        assert!(near(costs.ask(0..64, None, now).read, 0.204));
        // Twice as fast from now on: known after a few more.
        for _ in 0..60 {
            step(&mut costs, 0, 2048, 0.001);
            costs.read(32 * BLOCK, Duration::from_millis(50), now);
        }
        assert!(near(costs.compute_time(0..125), 2000.0 * 0.001));
        assert!(near(costs.read_time(64), 0.1));
    }

    #[test]
    fn later_tokens_cost_what_attention_takes() {
        let (mut costs, _) = costs();
        let truth = |at: u64| 1e-3 + 1e-7 * at as f64;
        for _ in 0..10 {
            for start in (0..8192).step_by(512) {
                step(&mut costs, start, 512, truth(start + 256));
            }
        }
        let sum = |range: Range<u64>| range.map(truth).sum::<f64>();
        assert!(near(costs.compute_time(0..32), sum(0..512)));
        assert!(near(costs.compute_time(480..512), sum(7680..8192)));
        assert!(near(costs.compute_time(0..512), sum(0..8192)));
    }

    #[test]
    fn noise_makes_no_estimate_negative() {
        let (mut costs, now) = costs();
        // Faster and faster towards the prompt's end, and no byte ever came.
        for start in (0..4096).step_by(512) {
            step(&mut costs, start, 512, 1e-3 / (start + 1) as f64);
            costs.read(0, Duration::from_secs(1), now);
        }
        assert!(costs.compute_time(0..1) > Duration::ZERO && costs.compute_time(1000..1001) > Duration::ZERO);
        assert!(costs.read_time(1) > Duration::ZERO);
    }

    #[test]
    fn the_faster_way_is_chosen() {
        let (mut costs, now) = costs();
        assert_eq!(costs.ask(0..32, None, now).choice, Choice::Read, "nothing is known, so it is tried");
        for _ in 0..40 {
            step(&mut costs, 0, 512, 0.001); // 16 ms a block
            costs.read(BLOCK, Duration::from_millis(10), now);
            costs.looked_up(Duration::from_millis(20));
        }
        assert_eq!(
            costs.ask(0..2, None, now).choice,
            Choice::Compute,
            "a lookup takes longer than what two blocks save"
        );
        assert_eq!(costs.ask(0..32, None, now).choice, Choice::Read);
        assert_eq!(costs.fetch(0..2, None).choice, Choice::Read, "looked up already");
        for _ in 0..40 {
            costs.read(BLOCK, Duration::from_millis(20), now);
        }
        assert_eq!(costs.fetch(0..32, None).choice, Choice::Compute);
    }

    #[test]
    fn the_beginning_is_computed_while_the_rest_is_read_if_that_is_worth_it() {
        let (mut costs, now) = costs();
        let mut learn = |block_ms: u64| {
            for _ in 0..40 {
                step(&mut costs, 0, 512, 0.001); // 16 ms a block
                costs.read(10 * BLOCK, Duration::from_millis(10 * block_ms), now);
            }
            let (alone, both) = (costs.fetch(0..96, None), costs.fetch(0..96, Some(8)));
            assert!(alone.head == 0 && both.read <= alone.read && both.compute == alone.compute);
            (alone.choice, both.choice, both.head)
        };
        assert_eq!(learn(1), (Choice::Read, Choice::Read, 0), "8 blocks computed save 8 ms");
        assert_eq!(learn(17), (Choice::Compute, Choice::Read, 48), "half each");
        let (alone, both, head) = learn(48);
        assert_eq!((alone, both), (Choice::Compute, Choice::Read));
        assert!((64..=72).contains(&head), "three quarters, in whole chunks: {head}");
    }

    #[test]
    fn a_store_that_was_slow_once_is_tried_again() {
        let (mut costs, now) = costs();
        (0..40).for_each(|_| costs.read(0, Duration::from_millis(500), now));
        assert_eq!(costs.ask(0..100, None, now).choice, Choice::Compute);
        let mut later = now + PROBE_EVERY;
        assert_eq!(costs.ask(0..100, None, later).choice, Choice::Probe);
        assert_eq!(costs.ask(0..100, None, later).choice, Choice::Compute, "one probe at a time");
        // It is fast again. How soon is that known?
        let mut probes = 0;
        while costs.ask(0..100, None, later).choice != Choice::Read {
            costs.read(PROBE_BLOCKS as u64 * BLOCK, Duration::from_millis(8), later);
            later += PROBE_EVERY;
            probes += 1;
        }
        assert!(probes < 10, "{probes} probes");
    }
}
