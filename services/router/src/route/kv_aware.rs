//! The pair that costs least.
//!
//! All decode workers that have equally much of the prompt want the same prefill worker, so pairs need not be looked at one
//! by one: decode workers are put into groups by what they have (most have nothing), and for each group that may still win,
//! the prefill workers are gone through once. What costs about the same is the same: what was measured is not that exact, and
//! of equals the one with the least to do is taken, of these the one that holds more, of these the one whose turn it is.

use std::cmp::Reverse;

use super::{
    Ask, Decision, DecodeOption, MAX_PREFILL, Policy, Pool, PrefillOption, Reason,
    cost::{Defaults, decode_seconds, local, usable},
    policies::turns,
    prices::{Prices, least, least_of, lesser},
};

/// What costs less than this part more, or so many seconds more, costs the same.
const SAME: f32 = 0.02;
const SAME_SECONDS: f32 = 50e-6;

/// The pair that costs least: for computing what neither holds, for waiting, moving and answering.
#[derive(Clone, Copy, Debug, Default)]
pub struct KvAware;

/// Decode workers that have equally much, and the same prefill workers.
struct Group {
    pairing: usize,
    /// There are prefill workers for it.
    paired: bool,
    cached_tokens: u32,
    /// The least of their own parts.
    least: f32,
    /// The prefill workers' part, once it is looked at.
    before: f32,
}

impl Policy for KvAware {
    fn decide(&self, ask: &Ask, pool: &Pool) -> Option<Decision> {
        let defaults = Defaults::of(pool);
        let mut own = Own::of(ask, pool, &defaults);
        let prices = Prices::of(ask, pool, &defaults);
        let mut all = Vec::with_capacity(pool.prefill.len());
        let best = price(ask, pool, &mut own, &prices, &mut all);
        let limit = best + best * SAME + SAME_SECONDS;

        let equals = turns(pool.decode.len(), ask.ticket).filter(|&at| own.total(at) <= limit);
        let decode = equals.min_by_key(|&at| {
            let DecodeOption { load, cached_tokens, .. } = pool.decode[at];
            (load.requests, Reverse(cached_tokens), load.tokens)
        })?;
        let option = &pool.decode[decode];
        // Proposing nobody is for what the decode worker would leave to others; what it does itself anyway, it does, and
        // should its blocks be gone by then, others are there.
        let local = own.local(decode);
        let alone = local < f32::INFINITY && local <= own.before(decode) && option.local_tokens < left(ask, option);
        let prefill = if alone { Vec::new() } else { in_order(ask, pool, option, &prices, &mut all) };
        let mut decision = Decision { decode, prefill, reason: Reason::Load };
        let cached = decision.cached_tokens(ask, pool);
        if cached > 0 {
            decision.reason = Reason::Cache;
        } else if pool.decode.iter().any(|option| option.cached_tokens > 0)
            || pool.prefill.iter().any(|option| option.cached_tokens > 0)
        {
            decision.reason = Reason::Busy;
        }
        Some(decision)
    }

    fn wants_cache(&self) -> bool {
        true
    }
}

fn left(ask: &Ask, option: &DecodeOption) -> u32 {
    (ask.prompt_tokens as u32).saturating_sub(usable(ask, option.cached_tokens))
}

/// The decode workers' own parts, in columns.
struct Own {
    groups: Vec<Group>,
    /// Which group each is in.
    group: Vec<u32>,
    seconds: Vec<f32>,
    /// What comes before if it computes the prompt itself; infinite: it does not. Empty: none does.
    local: Vec<f32>,
}

impl Own {
    fn of(ask: &Ask, pool: &Pool, defaults: &Defaults) -> Self {
        let seconds: Vec<f32> = pool.decode.iter().map(|option| decode_seconds(ask, option, defaults)).collect();
        let mut groups: Vec<Group> = Vec::new();
        let mut group = Vec::with_capacity(pool.decode.len());
        // Neighbours are alike more often than not.
        let mut now = usize::MAX;
        for option in &pool.decode {
            let (pairing, cached_tokens) = (option.pairing, option.cached_tokens);
            let same = |group: &Group| group.pairing == pairing && group.cached_tokens == cached_tokens;
            if !groups.get(now).is_some_and(same) {
                now = groups.iter().position(same).unwrap_or_else(|| {
                    let paired = pool.pairings.get(pairing).is_some_and(|pairs| !pairs.is_empty());
                    groups.push(Group { pairing, paired, cached_tokens, least: f32::INFINITY, before: f32::INFINITY });
                    groups.len() - 1
                });
            }
            group.push(now as u32);
        }
        let mut rest = &seconds[..];
        for run in group.chunk_by(|a, b| a == b) {
            let (these, others) = rest.split_at(run.len());
            let group = &mut groups[run[0] as usize];
            (group.least, rest) = (lesser(group.least, least(these)), others);
        }
        let mut local = Vec::new();
        for (at, option) in pool.decode.iter().enumerate() {
            let paired = groups[group[at] as usize].paired;
            // Most may not, and that is soon found.
            if paired && option.cached_tokens == 0 && option.local_tokens == 0 {
                continue;
            }
            if let Some(cost) = alone(ask, option, paired, defaults) {
                local.resize(pool.decode.len(), f32::INFINITY);
                local[at] = cost;
            }
        }
        Self { groups, group, seconds, local }
    }

    /// What comes before if it computes the prompt itself; infinite: it does not.
    fn local(&self, decode: usize) -> f32 {
        self.local.get(decode).copied().unwrap_or(f32::INFINITY)
    }

    /// What comes before if others do.
    fn before(&self, decode: usize) -> f32 {
        self.groups[self.group[decode] as usize].before
    }

    fn total(&self, decode: usize) -> f32 {
        self.seconds[decode] + lesser(self.local(decode), self.before(decode))
    }
}

/// Rare, and kept out of the loop around it.
#[inline(never)]
fn alone(ask: &Ask, option: &DecodeOption, paired: bool, defaults: &Defaults) -> Option<f32> {
    local(ask, option, paired, defaults).map(|cost| cost.total())
}

/// Finds what the cheapest pair costs, and the prefill workers' part for all groups that come near it.
fn price(ask: &Ask, pool: &Pool, own: &mut Own, prices: &Prices, all: &mut Vec<f32>) -> f32 {
    let alone = own.local.iter().zip(&own.seconds).map(|(local, seconds)| local + seconds);
    let mut best = alone.fold(f32::INFINITY, lesser);
    let mut order: Vec<usize> = (0..own.groups.len()).collect();
    order.sort_unstable_by(|&a, &b| own.groups[a].least.total_cmp(&own.groups[b].least));
    // No group can do better than if it had the whole prompt.
    let floors: Vec<f32> = pool.pairings.iter().map(|pairs| prices.floor(ask, pairs)).collect();
    for at in order {
        let group = &mut own.groups[at];
        let floor = floors.get(group.pairing).copied().unwrap_or(f32::INFINITY);
        if group.least + floor > best + best * SAME + SAME_SECONDS {
            continue;
        }
        prices.remote(ask, group.cached_tokens, all);
        group.before = least_of(all, pool.pairings.get(group.pairing).map_or(&[][..], Vec::as_slice));
        best = lesser(best, group.least + group.before);
    }
    best
}

/// The prefill workers for this decode worker, cheapest first; those that cost the same by load, then by turns.
fn in_order(ask: &Ask, pool: &Pool, option: &DecodeOption, prices: &Prices, all: &mut Vec<f32>) -> Vec<usize> {
    let pairs = pool.pairings.get(option.pairing).map_or(&[][..], Vec::as_slice);
    prices.remote(ask, option.cached_tokens, all);
    let least = least_of(all, pairs);
    let limit = least + least * SAME + SAME_SECONDS;
    // The best of equals, and the cheapest few; the first of them is most likely to be the best of equals.
    let mut best: Option<(usize, _)> = None;
    let mut few: Vec<(usize, f32)> = Vec::with_capacity(MAX_PREFILL + 1);
    let mut enough = f32::INFINITY;
    for at in turns(pairs.len(), ask.ticket).map(|at| pairs[at]) {
        let Some(&cost) = all.get(at) else { continue };
        if cost <= limit {
            let PrefillOption { load, cached_tokens, .. } = pool.prefill[at];
            let key = (load.tokens, Reverse(cached_tokens), load.requests);
            if best.is_none_or(|(_, known)| key < known) {
                best = Some((at, key));
            }
        }
        if cost < enough {
            few.insert(few.partition_point(|other| other.1 <= cost), (at, cost));
            few.truncate(MAX_PREFILL);
            enough = if few.len() == MAX_PREFILL { few[MAX_PREFILL - 1].1 } else { f32::INFINITY };
        }
    }
    let Some((first, _)) = best else { return Vec::new() };
    let others = few.into_iter().map(|(at, _)| at).filter(|&at| at != first);
    std::iter::once(first).chain(others).take(MAX_PREFILL).collect()
}
