//! What all prefill workers would take, worked out together: the same sums as [`remote`](super::cost::remote), laid out so that
//! the processor does several workers at a time and divides once for each, not once for each group.

use super::{
    Ask, Pool,
    cost::{Defaults, HANDOFF_SECONDS, LATE, alike, or, usable},
};

/// The prefill workers of a pool as a request sees them: a column for each part of the sum, in the pool's order.
#[derive(Debug)]
pub(super) struct Prices {
    prompt: f32,
    stored: f32,
    /// For the first token, in seconds; infinite: there is no target.
    ttft: f32,
    /// Tokens that it has.
    here: Vec<f32>,
    /// Seconds to compute a token.
    token: Vec<f32>,
    /// Seconds until it begins.
    wait: Vec<f32>,
    /// Seconds to move a token.
    moved: Vec<f32>,
}

impl Prices {
    pub(super) fn of(ask: &Ask, pool: &Pool, defaults: &Defaults) -> Self {
        let none = || vec![0.0; pool.prefill.len()];
        let (mut here, mut token, mut wait, mut moved) = (none(), none(), none(), none());
        let columns = here.iter_mut().zip(&mut token).zip(&mut wait).zip(&mut moved);
        for (option, (((here, token), wait), moved)) in pool.prefill.iter().zip(columns) {
            *here = usable(ask, option.cached_tokens) as f32;
            *token = alike(option.speed.prefill_tokens_per_second, defaults.prefill).recip();
            *wait = number(option.load.tokens) * *token;
            *moved = ask.token_bytes as f32 / or(option.speed.handoff_bytes_per_second, defaults.handoff);
        }
        let (prompt, stored) = (ask.prompt_tokens as f32, usable(ask, ask.stored_tokens) as f32);
        let ttft = if ask.ttft > 0.0 { ask.ttft } else { f32::INFINITY };
        Self { prompt, stored, ttft, here, token, wait, moved }
    }

    /// What comes before answering at a decode worker that has `there` tokens, for each of them, into `all`.
    pub(super) fn remote(&self, ask: &Ask, there: u32, all: &mut Vec<f32>) {
        let there = usable(ask, there) as f32;
        let &Self { prompt, stored, ttft, .. } = self;
        let columns = self.here.iter().zip(&self.token).zip(&self.wait).zip(&self.moved);
        all.clear();
        all.extend(columns.map(|(((&here, &token), &wait), &moved)| {
            let had = greater(here, there);
            let stored = greater(stored - had, 0.0);
            let bytes = prompt - there + greater(there - here, 0.0) + stored;
            let first = (prompt - had - stored) * token + wait + HANDOFF_SECONDS + bytes * moved;
            first + greater(first - ttft, 0.0) * LATE
        }));
    }

    /// No decode worker is served by these sooner: they would have nothing left to do but the last token.
    pub(super) fn floor(&self, ask: &Ask, pairs: &[usize]) -> f32 {
        let left = self.prompt - usable(ask, u32::MAX) as f32;
        let all: Vec<f32> = self.token.iter().zip(&self.wait).map(|(token, wait)| token * left + wait).collect();
        least_of(&all, pairs)
    }
}

/// The least of those with these places.
pub(super) fn least_of(all: &[f32], pairs: &[usize]) -> f32 {
    // Usually they are all of them.
    if pairs.len() == all.len() {
        return least(all);
    }
    pairs.iter().filter_map(|&at| all.get(at).copied()).fold(f32::INFINITY, lesser)
}

/// The least of all.
pub(super) fn least(all: &[f32]) -> f32 {
    let mut lanes = [f32::INFINITY; 8];
    let (eights, rest) = all.as_chunks::<8>();
    for eight in eights {
        for (lane, value) in lanes.iter_mut().zip(eight) {
            *lane = lesser(*lane, *value);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::INFINITY, lesser)
}

/// The lesser of two numbers: one instruction, which `f32::min` is not, since that knows of what is no number.
pub(super) fn lesser(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// A load as a number: one instruction, for what is more than any load is not told apart.
pub(super) fn number(load: u64) -> f32 {
    load.min(u64::from(u32::MAX)) as u32 as f32
}
