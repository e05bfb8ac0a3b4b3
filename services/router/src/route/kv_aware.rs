//! The pair that costs least.
//!
//! All decode workers that have equally much of the prompt want the same prefill worker, so pairs need not be looked at one
//! by one: decode workers are put into groups by what they have (most have nothing), and for each group that may still win,
//! the prefill workers are gone through once. What costs about the same is the same: what was measured is not that exact, and
//! of equals the one with the least to do is taken, of these the one that holds more, of these the one whose turn it is.

use std::cmp::Reverse;

use super::{
    Ask, Decision, DecodeOption, MAX_PREFILL, Policy, Pool, PrefillOption, Reason,
    cost::{Defaults, decode_seconds, local, remote, usable},
    policies::turns,
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
    cached_tokens: u32,
    /// The least of their own parts.
    least: f32,
    /// The prefill workers' part, once it is looked at.
    before: f32,
}

impl Policy for KvAware {
    fn decide(&self, ask: &Ask, pool: &Pool) -> Option<Decision> {
        let defaults = Defaults::of(pool);
        let (mut groups, own) = group(ask, pool, &defaults);
        let best = price(ask, pool, &mut groups, &own, &defaults);
        let limit = best + best * SAME + SAME_SECONDS;

        let total = |at: usize| {
            let Own { group, seconds, local, .. } = own[at];
            seconds + local.unwrap_or(f32::INFINITY).min(groups[group].before)
        };
        let equals = turns(pool.decode.len(), ask.ticket).filter(|&at| total(at) <= limit);
        let decode = equals.min_by_key(|&at| {
            let DecodeOption { load, cached_tokens, .. } = pool.decode[at];
            (load.requests, Reverse(cached_tokens), load.tokens)
        })?;
        let Own { group, local, .. } = own[decode];
        let option = &pool.decode[decode];
        // Proposing nobody is for what the decode worker would leave to others; what it does itself anyway, it does, and
        // should its blocks be gone by then, others are there.
        let alone = local.is_some_and(|local| local <= groups[group].before) && option.local_tokens < left(ask, option);
        let prefill = if alone { Vec::new() } else { in_order(ask, pool, option, &defaults) };
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

/// A decode worker's own part.
struct Own {
    group: usize,
    seconds: f32,
    local: Option<f32>,
}

fn group(ask: &Ask, pool: &Pool, defaults: &Defaults) -> (Vec<Group>, Vec<Own>) {
    let mut groups: Vec<Group> = Vec::new();
    let mut own = Vec::with_capacity(pool.decode.len());
    let mut last = 0;
    for (at, option) in pool.decode.iter().enumerate() {
        let (pairing, cached_tokens) = (option.pairing, option.cached_tokens);
        let same = |group: &Group| group.pairing == pairing && group.cached_tokens == cached_tokens;
        // Neighbours are alike more often than not.
        let known = if groups.get(last).is_some_and(same) { Some(last) } else { groups.iter().position(same) };
        let seconds = decode_seconds(ask, option, defaults);
        last = known.unwrap_or_else(|| {
            groups.push(Group { pairing, cached_tokens, least: f32::INFINITY, before: f32::INFINITY });
            groups.len() - 1
        });
        groups[last].least = groups[last].least.min(seconds);
        let local = local(ask, option, !pool.pairs(at).is_empty(), defaults).map(|cost| cost.total());
        own.push(Own { group: last, seconds, local });
    }
    (groups, own)
}

/// Finds what the cheapest pair costs, and the prefill workers' part for all groups that come near it.
fn price(ask: &Ask, pool: &Pool, groups: &mut [Group], own: &[Own], defaults: &Defaults) -> f32 {
    let alone = own.iter().filter_map(|own| own.local.map(|local| own.seconds + local));
    let mut best = alone.fold(f32::INFINITY, f32::min);
    let mut order: Vec<usize> = (0..groups.len()).collect();
    order.sort_unstable_by(|&a, &b| groups[a].least.total_cmp(&groups[b].least));
    // No group can do better than if it had the whole prompt.
    let floor = |pairing: usize| {
        let all = pool.pairings.get(pairing).map_or(&[][..], Vec::as_slice);
        let whole = ask.prompt_tokens as u32;
        all.iter()
            .filter_map(|&at| pool.prefill.get(at))
            .map(|option| {
                let cost = remote(ask, option, whole, defaults);
                cost.compute + cost.wait
            })
            .fold(f32::INFINITY, f32::min)
    };
    let floors: Vec<f32> = (0..pool.pairings.len()).map(floor).collect();
    for at in order {
        let group = &mut groups[at];
        let floor = floors.get(group.pairing).copied().unwrap_or(f32::INFINITY);
        if group.least + floor > best + best * SAME + SAME_SECONDS {
            continue;
        }
        let pairs = pool.pairings.get(group.pairing).map_or(&[][..], Vec::as_slice);
        let costs = pairs.iter().filter_map(|&at| pool.prefill.get(at));
        let costs = costs.map(|option| remote(ask, option, group.cached_tokens, defaults).total());
        group.before = costs.fold(f32::INFINITY, f32::min);
        best = best.min(group.least + group.before);
    }
    best
}

/// The prefill workers for this decode worker, cheapest first; those that cost the same by load, then by turns.
fn in_order(ask: &Ask, pool: &Pool, option: &DecodeOption, defaults: &Defaults) -> Vec<usize> {
    let pairs = pool.pairings.get(option.pairing).map_or(&[][..], Vec::as_slice);
    let costs = turns(pairs.len(), ask.ticket).filter_map(|at| {
        let prefill = pool.prefill.get(pairs[at])?;
        Some((pairs[at], remote(ask, prefill, option.cached_tokens, defaults).total()))
    });
    let costs: Vec<_> = costs.collect();
    let least = costs.iter().map(|cost| cost.1).fold(f32::INFINITY, f32::min);
    let limit = least + least * SAME + SAME_SECONDS;
    let equals = costs.iter().filter(|cost| cost.1 <= limit);
    let best = equals.min_by_key(|(at, ..)| {
        let PrefillOption { load, cached_tokens, .. } = pool.prefill[*at];
        (load.tokens, Reverse(cached_tokens), load.requests)
    });
    let Some(&(first, _)) = best else { return Vec::new() };
    let mut best: Vec<(usize, f32)> = Vec::with_capacity(MAX_PREFILL);
    for &(at, cost) in costs.iter().filter(|cost| cost.0 != first) {
        let place = best.partition_point(|other| other.1 <= cost);
        if place < MAX_PREFILL - 1 {
            best.truncate(MAX_PREFILL - 2);
            best.insert(place, (at, cost));
        }
    }
    std::iter::once(first).chain(best.into_iter().map(|(at, _)| at)).collect()
}
