//! The policies that look at loads, or at nothing.

use super::{Ask, Decision, Load, MAX_PREFILL, Policy, Pool, Reason};

/// The least loaded decode worker, and the least loaded of its prefill workers first. Equals take turns.
///
/// A decode step costs about the same whatever the contexts, so decode workers compare by requests; computing a prompt
/// costs by its length, so prefill workers compare by tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastLoaded;

pub(super) fn decode_load(load: Load) -> (u64, u64) {
    (load.requests, load.tokens)
}

pub(super) fn prefill_load(load: Load) -> (u64, u64) {
    (load.tokens, load.requests)
}

impl Policy for LeastLoaded {
    fn decide(&self, ask: &Ask, pool: &Pool) -> Option<Decision> {
        // Idle workers are all equal: without taking turns the first would get every request of a quiet cluster.
        let decode = turns(pool.decode.len(), ask.ticket).min_by_key(|&at| decode_load(pool.decode[at].load))?;
        let pairs = pool.pairs(decode);
        let mut prefill: Vec<usize> = turns(pairs.len(), ask.ticket).map(|at| pairs[at]).collect();
        prefill.sort_by_key(|&at| pool.prefill.get(at).map(|option| prefill_load(option.load)));
        prefill.truncate(MAX_PREFILL);
        Some(Decision { decode, prefill, reason: Reason::Load })
    }
}

/// One after the other, whatever their loads.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundRobin;

impl Policy for RoundRobin {
    fn decide(&self, ask: &Ask, pool: &Pool) -> Option<Decision> {
        rotate(ask.ticket, ask.ticket, pool, Reason::Turn)
    }
}

/// Any worker, whatever its load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random;

impl Policy for Random {
    fn decide(&self, ask: &Ask, pool: &Pool) -> Option<Decision> {
        // Two independent halves of one number: the choice of the decode worker says nothing about the prefill worker.
        rotate(ask.dice >> 32, ask.dice & u64::from(u32::MAX), pool, Reason::Dice)
    }
}

fn rotate(decode: u64, prefill: u64, pool: &Pool, reason: Reason) -> Option<Decision> {
    let decode = turns(pool.decode.len(), decode).next()?;
    let pairs = pool.pairs(decode);
    let prefill = turns(pairs.len(), prefill).map(|at| pairs[at]).take(MAX_PREFILL).collect();
    Some(Decision { decode, prefill, reason })
}

/// `0..len`, beginning at `ticket` and going round.
pub(super) fn turns(len: usize, ticket: u64) -> impl Iterator<Item = usize> {
    let start = if len == 0 { 0 } else { (ticket % len as u64) as usize };
    (start..len).chain(0..start)
}
