//! The policies that look at loads, or at nothing.

use super::{Ask, Decision, Load, MAX_PREFILL, Policy, Pool};

/// The least loaded decode worker, and the least loaded of its prefill workers first. Equals take turns.
///
/// A decode step costs about the same whatever the contexts, so decode workers compare by requests; computing a prompt
/// costs by its length, so prefill workers compare by tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastLoaded;

fn decode_cost(load: Load) -> (u64, u64) {
    (load.requests, load.tokens)
}

fn prefill_cost(load: Load) -> (u64, u64) {
    (load.tokens, load.requests)
}

impl Policy for LeastLoaded {
    fn decide(&self, ask: &Ask, pool: &Pool) -> Option<Decision> {
        // Idle workers are all equal: without taking turns the first would get every request of a quiet cluster.
        let decode = turns(pool.decode.len(), ask.ticket).min_by_key(|&at| decode_cost(pool.decode[at].load))?;
        let pairs = &pool.decode[decode].pairs;
        let mut prefill: Vec<usize> = turns(pairs.len(), ask.ticket).map(|at| pairs[at]).collect();
        prefill.sort_by_key(|&at| pool.prefill.get(at).map(|option| prefill_cost(option.load)));
        prefill.truncate(MAX_PREFILL);
        Some(Decision { decode, prefill })
    }
}

/// One after the other, whatever their loads.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundRobin;

impl Policy for RoundRobin {
    fn decide(&self, ask: &Ask, pool: &Pool) -> Option<Decision> {
        rotate(ask.ticket, ask.ticket, pool)
    }
}

/// Any worker, whatever its load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random;

impl Policy for Random {
    fn decide(&self, ask: &Ask, pool: &Pool) -> Option<Decision> {
        // Two independent halves of one number: the choice of the decode worker says nothing about the prefill worker.
        rotate(ask.dice >> 32, ask.dice & u64::from(u32::MAX), pool)
    }
}

fn rotate(decode: u64, prefill: u64, pool: &Pool) -> Option<Decision> {
    let decode = turns(pool.decode.len(), decode).next()?;
    let pairs = &pool.decode[decode].pairs;
    let prefill = turns(pairs.len(), prefill).map(|at| pairs[at]).take(MAX_PREFILL).collect();
    Some(Decision { decode, prefill })
}

/// `0..len`, beginning at `ticket` and going round.
fn turns(len: usize, ticket: u64) -> impl Iterator<Item = usize> {
    let start = if len == 0 { 0 } else { (ticket % len as u64) as usize };
    (start..len).chain(0..start)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{DecodeOption, PolicyName, PrefillOption},
        *,
    };

    const ALL: [PolicyName; 3] = [PolicyName::LeastLoaded, PolicyName::RoundRobin, PolicyName::Random];

    fn load(tokens: u64) -> Load {
        Load { tokens, requests: tokens % 3 }
    }

    fn pools() -> impl Strategy<Value = Pool> {
        let prefill = prop::collection::vec(0u64..4, 0..6);
        let decode = prop::collection::vec((0u64..4, prop::collection::vec(any::<bool>(), 6)), 0..6);
        (prefill, decode).prop_map(|(prefill, decode)| Pool {
            decode: decode
                .into_iter()
                .map(|(tokens, fits)| DecodeOption {
                    load: load(tokens),
                    pairs: (0..prefill.len()).filter(|&at| fits[at]).collect(),
                })
                .collect(),
            prefill: prefill.into_iter().map(|tokens| PrefillOption { load: load(tokens) }).collect(),
        })
    }

    proptest! {
        #[test]
        fn every_policy_decides_whenever_there_is_a_decode_worker(pool in pools(), ticket: u64, dice: u64) {
            for name in ALL {
                let decision = name.build().decide(&Ask { prompt_tokens: 1, ticket, dice }, &pool);
                prop_assert_eq!(decision.is_some(), !pool.decode.is_empty());
            }
        }

        #[test]
        fn only_workers_that_fit_are_paired_and_none_twice(pool in pools(), ticket: u64, dice: u64) {
            for name in ALL {
                let Some(decision) = name.build().decide(&Ask { prompt_tokens: 1, ticket, dice }, &pool) else { continue };
                let pairs = &pool.decode[decision.decode].pairs;
                prop_assert_eq!(decision.prefill.len(), pairs.len().min(MAX_PREFILL));
                let mut seen = decision.prefill.clone();
                seen.sort_unstable();
                seen.dedup();
                prop_assert_eq!(seen.len(), decision.prefill.len());
                prop_assert!(decision.prefill.iter().all(|at| pairs.contains(at)));
            }
        }

        #[test]
        fn least_loaded_never_passes_over_a_less_loaded_worker(pool in pools(), ticket: u64) {
            let Some(decision) = LeastLoaded.decide(&Ask { ticket, ..Ask::default() }, &pool) else { return Ok(()) };
            let chosen = &pool.decode[decision.decode];
            prop_assert!(pool.decode.iter().all(|option| decode_cost(chosen.load) <= decode_cost(option.load)));
            let cost = |&at: &usize| prefill_cost(pool.prefill[at].load);
            prop_assert!(decision.prefill.is_sorted_by_key(cost));
            if let Some(first) = decision.prefill.first().map(cost) {
                prop_assert!(chosen.pairs.iter().all(|at| first <= cost(at)));
            }
        }
    }

    #[test]
    fn idle_workers_take_turns_under_every_policy_that_counts() {
        let option = DecodeOption { load: Load::default(), pairs: vec![0, 1] };
        let pool = Pool { decode: vec![option; 3], prefill: vec![PrefillOption::default(); 2] };
        for name in [PolicyName::LeastLoaded, PolicyName::RoundRobin] {
            let decisions: Vec<_> =
                (0..6).filter_map(|ticket| name.build().decide(&Ask { ticket, ..Ask::default() }, &pool)).collect();
            assert_eq!(decisions.iter().map(|d| d.decode).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2], "{name:?}");
            assert_eq!(decisions.iter().map(|d| d.prefill[0]).collect::<Vec<_>>(), [0, 1, 0, 1, 0, 1], "{name:?}");
        }
    }
}
