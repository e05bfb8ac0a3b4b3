//! What it costs to send a request to a pair of workers, in seconds of somebody's time.
//!
//! ```text
//!   compute   tokens that neither holds ÷ the prefill worker's speed
//!   wait      tokens that it is to compute before ÷ its speed
//!   move      bytes that the decode worker lacks, and those that the prefill worker must read from it, ÷ bandwidth
//!   decode    requests at the decode worker × its time for a step × how many steps another request costs one
//!             (and, should it have no room, what a place takes to become free)
//! ```
//!
//! What would miss the model's targets (`slo`) costs more: every second after the time for the first token counts as
//! [`LATE`], and so does what an answer of 128 tokens takes longer than it should.
//!
//! A speed that was not measured yet is taken to be the mean of those that were, or else a guess; prompts' speeds that are not
//! far from the mean are, too. The decode worker may also compute the rest itself ([`Cost::local`]): then nothing is moved,
//! and all that run there wait meanwhile.

use super::{Ask, Decision, DecodeOption, Pool, PrefillOption, prices::number};

/// Prompt tokens in a second, before any worker has measured it: as the workers' own guess has it.
const GUESSED_PREFILL: f32 = 2000.0;
/// Prefill workers whose speeds are within this factor of the mean are taken to be equally fast: what a worker measured lately
/// depends on its last few prompts (of a long one each token takes longer) more than on the worker. Taken at its word, a
/// worker that happened to have short prompts looks worth waiting for, and the mean time to the first token is a tenth longer
/// (the recorded conversations in kvasir-simulate, 16 + 16 equal workers).
const ALIKE: f32 = 1.5;
/// From one token of an answer to its next, before any worker has measured it.
const GUESSED_STEP: f32 = 0.02;
/// Bytes handed over in a second, before any worker has measured it.
const GUESSED_HANDOFF: f32 = 1e9;
/// What a request at a decode worker costs the next one, in steps: an answer of 128 tokens, each step of which takes a
/// sixteenth longer.
const STEPS_PER_REQUEST: f32 = 8.0;
/// For room to become free at a decode worker that has none, in steps: half an answer of 128 tokens.
const STEPS_WITHOUT_ROOM: f32 = 64.0;
/// Seconds too late, beside others.
pub(super) const LATE: f32 = 3.0;
/// Tokens of an answer.
const ANSWER: f32 = 128.0;
/// Handing a prompt over at all: two calls and a grant.
pub(super) const HANDOFF_SECONDS: f32 = 0.001;
/// A decode worker that has part of a prompt may be asked to compute up to so many tokens of the rest, though it would
/// leave that to others: a few steps' worth.
pub(super) const LOCAL_TOKENS: u32 = 256;

/// The parts of a cost, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Computing what neither has.
    pub compute: f32,
    /// What is to be computed before.
    pub wait: f32,
    /// Moving blocks.
    pub transfer: f32,
    /// The decode worker's load, and what its answers would be late.
    pub decode: f32,
    /// What the first token would be late.
    pub late: f32,
    /// The decode worker computes the rest itself.
    pub local: bool,
}

impl Cost {
    /// With what it would be late.
    fn judged(self, ask: &Ask) -> Self {
        let first = self.compute + self.wait + self.transfer;
        let late = if ask.ttft > 0.0 { (first - ask.ttft).max(0.0) * LATE } else { 0.0 };
        Self { late, ..self }
    }

    /// All of it.
    pub fn total(&self) -> f32 {
        self.compute + self.wait + self.transfer + self.decode + self.late
    }
}

/// A pair that may be chosen, and what it would cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Index into [`Pool::decode`].
    pub decode: usize,
    /// Index into [`Pool::prefill`]; `None`: the decode worker computes the prompt.
    pub prefill: Option<usize>,
    /// Tokens that either of them has.
    pub cached_tokens: u32,
    /// What it would cost.
    pub cost: Cost,
}

/// Tokens found that are of use: the last one of a prompt is always computed, for what follows it.
pub(super) fn usable(ask: &Ask, tokens: u32) -> u32 {
    tokens.min((ask.prompt_tokens as u32).saturating_sub(1))
}

/// What takes the place of speeds that were not measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Defaults {
    pub prefill: f32,
    pub step: f32,
    pub handoff: f32,
}

impl Defaults {
    pub(super) fn of(pool: &Pool) -> Self {
        let prefill = pool.prefill.iter().map(|option| option.speed.prefill_tokens_per_second);
        let handoff = pool.prefill.iter().map(|option| option.speed.handoff_bytes_per_second);
        let step = pool.decode.iter().map(|option| option.speed.step_seconds);
        Self {
            prefill: mean(prefill).unwrap_or(GUESSED_PREFILL),
            step: mean(step).unwrap_or(GUESSED_STEP),
            handoff: mean(handoff).unwrap_or(GUESSED_HANDOFF),
        }
    }
}

/// Of those that are known. In several sums, since each addition to one waits for the one before.
fn mean(mut values: impl Iterator<Item = f32>) -> Option<f32> {
    let (mut sums, mut counts) = ([0.0; 4], [0u32; 4]);
    'all: loop {
        for (sum, count) in sums.iter_mut().zip(&mut counts) {
            let Some(value) = values.next() else { break 'all };
            let known = value > 0.0 && value.is_finite();
            *sum += if known { value } else { 0.0 };
            *count += u32::from(known);
        }
    }
    let count: u32 = counts.iter().sum();
    (count > 0).then(|| sums.iter().sum::<f32>() / count as f32)
}

pub(super) fn or(measured: f32, default: f32) -> f32 {
    if measured > 0.0 && measured.is_finite() { measured } else { default }
}

/// The same; what is near the default is the default.
pub(super) fn alike(measured: f32, default: f32) -> f32 {
    let speed = or(measured, default);
    if speed <= default * ALIKE && speed * ALIKE >= default { default } else { speed }
}

/// The decode worker's part, whoever computes the prompt.
pub(super) fn decode_seconds(ask: &Ask, option: &DecodeOption, defaults: &Defaults) -> f32 {
    let step = or(option.speed.step_seconds, defaults.step);
    let lacking = (ask.prompt_tokens as u64).saturating_sub(option.cached_tokens.into());
    let full = option.room_tokens.is_some_and(|room| room < lacking);
    let slow = if ask.tpot > 0.0 { (option.next_step - ask.tpot).max(0.0) * ANSWER * LATE } else { 0.0 };
    slow + step * (number(option.load.requests) * STEPS_PER_REQUEST + if full { STEPS_WITHOUT_ROOM } else { 0.0 })
}

/// What comes before answering if this prefill worker is proposed to a decode worker that has `there` tokens.
pub(super) fn remote(ask: &Ask, prefill: &PrefillOption, there: u32, defaults: &Defaults) -> Cost {
    let speed = alike(prefill.speed.prefill_tokens_per_second, defaults.prefill);
    let bandwidth = or(prefill.speed.handoff_bytes_per_second, defaults.handoff);
    let prompt = ask.prompt_tokens as f32;
    let (here, there) = (usable(ask, prefill.cached_tokens), usable(ask, there));
    let had = here.max(there);
    let stored = usable(ask, ask.stored_tokens).saturating_sub(had);
    let moved = prompt - there as f32 + (there.saturating_sub(here) + stored) as f32;
    Cost {
        compute: (prompt - (had + stored) as f32) / speed,
        wait: prefill.load.tokens as f32 / speed,
        transfer: HANDOFF_SECONDS + moved * ask.token_bytes as f32 / bandwidth,
        ..Cost::default()
    }
    .judged(ask)
}

/// The same if the decode worker computes the rest itself, and whether it may be asked to: it has little left, or nobody
/// else can.
pub(super) fn local(ask: &Ask, option: &DecodeOption, paired: bool, defaults: &Defaults) -> Option<Cost> {
    let there = usable(ask, option.cached_tokens);
    let left = (ask.prompt_tokens as u32).saturating_sub(there);
    let anyway = left <= option.local_tokens || !paired;
    if !anyway && (there == 0 || left > LOCAL_TOKENS) {
        return None;
    }
    let speed = or(option.speed.prefill_tokens_per_second, defaults.prefill);
    let compute = left as f32 / speed;
    let wait = option.prefilling_tokens as f32 / speed;
    let alone = Cost { compute, wait, local: true, ..Cost::default() }.judged(ask);
    // Those that are answered there wait as long.
    Some(Cost { compute: compute * (1.0 + option.load.requests as f32), ..alone })
}

/// The chosen pair, then the cheapest other ones, at most `limit` in all: the best of each decode worker. For people: it looks
/// at every pair.
pub fn candidates(ask: &Ask, pool: &Pool, decision: &Decision, limit: usize) -> Vec<Candidate> {
    let defaults = Defaults::of(pool);
    let price = |decode: usize, prefill: Option<usize>| -> Option<Candidate> {
        let option = pool.decode.get(decode)?;
        let seconds = decode_seconds(ask, option, &defaults);
        let (cost, here) = match prefill.and_then(|at| pool.prefill.get(at)) {
            Some(prefill) => (remote(ask, prefill, option.cached_tokens, &defaults), prefill.cached_tokens),
            None => (local(ask, option, false, &defaults)?, 0),
        };
        let cached_tokens = usable(ask, here.max(option.cached_tokens));
        Some(Candidate { decode, prefill, cached_tokens, cost: Cost { decode: seconds, ..cost } })
    };
    let best = |decode: usize| -> Option<Candidate> {
        let pairs = pool.pairs(decode);
        let remote = pairs.iter().filter_map(|&at| price(decode, Some(at)));
        let may = local(ask, &pool.decode[decode], !pairs.is_empty(), &defaults).is_some();
        let here = may.then(|| price(decode, None)).flatten();
        remote.chain(here).min_by(|a, b| a.cost.total().total_cmp(&b.cost.total()))
    };
    let mut others: Vec<Candidate> =
        (0..pool.decode.len()).filter(|&decode| decode != decision.decode).filter_map(best).collect();
    others.sort_by(|a, b| a.cost.total().total_cmp(&b.cost.total()));
    let chosen = price(decision.decode, decision.prefill.first().copied());
    chosen.into_iter().chain(others).take(limit).collect()
}
