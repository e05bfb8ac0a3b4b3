//! Laws of the policies, and a cluster in miniature to hold them to.

use proptest::prelude::*;

use super::{
    policies::{decode_load, prefill_load},
    *,
};

fn load(tokens: u64) -> Load {
    Load { tokens, requests: tokens % 3 }
}

fn pools() -> impl Strategy<Value = Pool> {
    let speed = prop_oneof![Just(Speed::default()), (1u32..5000, 1u32..100, 1u32..1000).prop_map(speed)];
    let prefill = prop::collection::vec((0u64..4, 0u32..200, speed.clone()), 0..6);
    let decode = prop::collection::vec((0u64..4, 0u32..200, speed, 0usize..3), 0..6);
    let pairings = prop::collection::vec(prop::collection::vec(any::<bool>(), 6), 3);
    (prefill, decode, pairings).prop_map(|(prefill, decode, pairings)| {
        let option = |(key, (tokens, cached_tokens, speed, pairing)): (usize, (u64, u32, Speed, usize))| {
            let (key, next_step) = (key as u64, (tokens % 7) as f32 / 50.0);
            DecodeOption {
                key,
                load: load(tokens),
                cached_tokens,
                speed,
                pairing,
                next_step,
                ..DecodeOption::default()
            }
        };
        let pairings = pairings.into_iter().map(|fits| (0..prefill.len()).filter(|&at| fits[at]).collect());
        Pool {
            decode: decode.into_iter().enumerate().map(option).collect(),
            pairings: pairings.collect(),
            prefill: prefill
                .into_iter()
                .enumerate()
                .map(|(key, (tokens, cached_tokens, speed))| PrefillOption {
                    key: key as u64,
                    load: load(tokens),
                    cached_tokens,
                    speed,
                })
                .collect(),
        }
    })
}

fn speed((prefill, step, handoff): (u32, u32, u32)) -> Speed {
    Speed {
        prefill_tokens_per_second: prefill as f32,
        step_seconds: step as f32 / 1000.0,
        handoff_bytes_per_second: handoff as f32 * 1e6,
    }
}

fn ask(prompt_tokens: usize, ticket: u64) -> Ask {
    Ask { prompt_tokens, token_bytes: 1024, ticket, ..Ask::default() }
}

/// So many workers of each kind, all the same.
fn even(prefill: usize, decode: usize) -> Pool {
    let option = |key| DecodeOption { key, ..DecodeOption::default() };
    Pool {
        decode: (0..decode as u64).map(option).collect(),
        prefill: (0..prefill as u64).map(|key| PrefillOption { key, ..PrefillOption::default() }).collect(),
        pairings: [(0..prefill).collect()].into(),
    }
}

proptest! {
    #[test]
    fn every_policy_decides_whenever_there_is_a_decode_worker(
        pool in pools(), ticket: u64, dice: u64, session: Option<u64>, prompt in 1usize..5000,
    ) {
        for name in PolicyName::ALL {
            let decision = name.build().decide(&Ask { dice, session, ..ask(prompt, ticket) }, &pool);
            prop_assert_eq!(decision.is_some(), !pool.decode.is_empty(), "{:?}", name);
        }
    }

    #[test]
    fn only_workers_that_fit_are_paired_and_none_twice(pool in pools(), ticket: u64, dice: u64, session: Option<u64>) {
        for name in PolicyName::ALL {
            let ask = Ask { dice, session, ..ask(300, ticket) };
            let Some(decision) = name.build().decide(&ask, &pool) else { continue };
            let pairs = pool.pairs(decision.decode);
            let alone = decision.prefill.is_empty() && pool.decode[decision.decode].cached_tokens > 0;
            prop_assert!(alone || decision.prefill.len() == pairs.len().min(MAX_PREFILL), "{name:?} {decision:?}");
            let mut seen = decision.prefill.clone();
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), decision.prefill.len());
            prop_assert!(decision.prefill.iter().all(|at| pairs.contains(at)));
        }
    }

    #[test]
    fn least_loaded_never_passes_over_a_less_loaded_worker(pool in pools(), ticket: u64) {
        let Some(decision) = LeastLoaded.decide(&ask(1, ticket), &pool) else { return Ok(()) };
        let chosen = &pool.decode[decision.decode];
        prop_assert!(pool.decode.iter().all(|option| decode_load(chosen.load) <= decode_load(option.load)));
        let cost = |&at: &usize| prefill_load(pool.prefill[at].load);
        prop_assert!(decision.prefill.is_sorted_by_key(cost));
        if let Some(first) = decision.prefill.first().map(cost) {
            prop_assert!(pool.pairs(decision.decode).iter().all(|at| first <= cost(at)));
        }
    }

    #[test]
    fn kv_aware_takes_no_pair_that_costs_noticeably_more_than_another(pool in pools(), ticket: u64, prompt in 1usize..3000) {
        let ask = Ask { ttft: 0.05, tpot: 0.06, ..ask(prompt, ticket) };
        let Some(decision) = KvAware.decide(&ask, &pool) else { return Ok(()) };
        // Every pair, one by one.
        let all = candidates(&ask, &pool, &decision, usize::MAX);
        let (chosen, others) = all.split_first().unwrap();
        let least = others.iter().map(|other| other.cost.total()).fold(chosen.cost.total(), f32::min);
        // Within its tolerance twice: once for the decode worker, once for the prefill worker.
        prop_assert!(chosen.cost.total() <= least * 1.05 + 2e-4, "{chosen:?} costs more than {least}: {all:?}");
    }

    #[test]
    fn where_nothing_is_shared_kv_aware_does_what_least_loaded_does(
        decode in prop::collection::vec(0u64..50, 1..20),
        prefill in prop::collection::vec(0u64..50, 1..20),
        ticket: u64,
        prompt in 1usize..3000,
    ) {
        let mut pool = even(prefill.len(), decode.len());
        for (option, requests) in pool.decode.iter_mut().zip(&decode) {
            option.load = Load { requests: *requests, tokens: requests * 100 };
        }
        // Prompts that differ by more than what counts as the same.
        for (option, tokens) in pool.prefill.iter_mut().zip(&prefill) {
            option.load = Load { requests: *tokens, tokens: tokens * 1000 };
        }
        let ask = ask(prompt, ticket);
        let (ours, theirs) = (KvAware.decide(&ask, &pool).unwrap(), LeastLoaded.decide(&ask, &pool).unwrap());
        prop_assert_eq!(pool.decode[ours.decode].load, pool.decode[theirs.decode].load);
        prop_assert_eq!(pool.prefill[ours.prefill[0]].load, pool.prefill[theirs.prefill[0]].load);
        prop_assert_eq!(ours.reason, Reason::Load);
    }

    #[test]
    fn a_session_stays_where_it_is_when_others_come_and_go(session: u64, gone in 0usize..8) {
        let pool = even(4, 8);
        let ask = Ask { session: Some(session), ..ask(100, 0) };
        let before = SessionSticky.decide(&ask, &pool).unwrap();
        prop_assert_eq!(before.reason, Reason::Session);
        let mut fewer = pool.clone();
        fewer.decode.remove(gone);
        let after = SessionSticky.decide(&ask, &fewer).unwrap();
        if gone != before.decode {
            prop_assert_eq!(fewer.decode[after.decode].key, pool.decode[before.decode].key);
        }
        // Overloaded, it is passed over; the prefill workers, which have nothing to do, stay.
        let mut busy = pool.clone();
        busy.decode[before.decode].load.requests = 40;
        let elsewhere = SessionSticky.decide(&ask, &busy).unwrap();
        prop_assert!(elsewhere.decode != before.decode && elsewhere.reason == Reason::SessionBusy);
        prop_assert_eq!(elsewhere.prefill, before.prefill);
    }
}

#[test]
fn idle_workers_take_turns_under_every_policy_that_counts() {
    let pool = even(2, 3);
    for name in [PolicyName::KvAware, PolicyName::LeastLoaded, PolicyName::RoundRobin] {
        let decisions: Vec<_> = (0..6).filter_map(|ticket| name.build().decide(&ask(100, ticket), &pool)).collect();
        assert_eq!(decisions.iter().map(|d| d.decode).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2], "{name:?}");
        assert_eq!(decisions.iter().map(|d| d.prefill[0]).collect::<Vec<_>>(), [0, 1, 0, 1, 0, 1], "{name:?}");
    }
}

#[test]
fn a_prompt_goes_where_its_blocks_are_until_that_costs_more_than_computing_it() {
    let mut pool = even(4, 4);
    pool.prefill[2].cached_tokens = 1600;
    pool.decode[1].cached_tokens = 1600;
    let chosen = |pool: &Pool| KvAware.decide(&ask(2000, 0), pool).unwrap();
    let decision = chosen(&pool);
    assert_eq!((decision.decode, decision.prefill[0], decision.reason), (1, 2, Reason::Cache));
    assert_eq!(decision.cached_tokens(&ask(2000, 0), &pool), 1600);
    // The decode worker has the blocks: so any prefill worker is as good as the one that has them, but must read them.
    pool.prefill[2].load.tokens = 4000;
    assert_eq!(chosen(&pool).decode, 1);
    assert_ne!(chosen(&pool).prefill[0], 2);
    // Now that one is overloaded as well, and the prompt is computed where nobody waits.
    pool.decode[1].load.requests = 200;
    let decision = chosen(&pool);
    assert!(decision.decode != 1 && decision.prefill[0] != 2);
    assert_eq!(decision.reason, Reason::Busy);
}

#[test]
fn a_decode_worker_that_lacks_little_computes_it_itself_unless_many_would_wait() {
    let mut pool = even(2, 2);
    pool.decode[0].cached_tokens = 1984;
    let decide = |pool: &Pool| KvAware.decide(&ask(2000, 1), pool).unwrap();
    assert_eq!((decide(&pool).decode, decide(&pool).prefill.len()), (0, 0));
    pool.decode[0].load.requests = 3;
    pool.decode[1].load.requests = 3;
    // 16 tokens are 8 ms, which three others would wait too: a hand-over is cheaper.
    assert_eq!((decide(&pool).decode, decide(&pool).prefill.len()), (0, 2));
    // A long rest is for prefill workers.
    pool.decode[0].load.requests = 0;
    pool.decode[0].cached_tokens = 1600;
    assert_eq!((decide(&pool).decode, decide(&pool).prefill.len()), (0, 2));
}

#[test]
fn what_is_stored_is_cheaper_than_what_is_computed() {
    let pool = even(1, 1);
    let cost = |stored_tokens| {
        let ask = Ask { stored_tokens, ..ask(2000, 0) };
        candidates(&ask, &pool, &KvAware.decide(&ask, &pool).unwrap(), 1)[0].cost
    };
    assert!(cost(1600).total() < cost(0).total() / 3.0);
    assert!(cost(1600).transfer > cost(0).transfer);
}

#[test]
fn targets_weigh_more_than_caches() {
    let mut pool = even(1, 2);
    pool.decode[0].cached_tokens = 64;
    pool.decode[0].next_step = 0.08;
    pool.decode[1].next_step = 0.02;
    let ask = ask(128, 0);
    let goes = |ask: &Ask, pool: &Pool| KvAware.decide(ask, pool).unwrap();
    assert_eq!(goes(&ask, &pool).decode, 0, "it has half of the prompt");
    assert_eq!(goes(&Ask { tpot: 0.1, ..ask }, &pool).decode, 0, "and is fast enough");
    assert_eq!(goes(&Ask { tpot: 0.05, ..ask }, &pool).decode, 1, "it is not");
    // A prefill worker that holds the prompt, but would have the first token late.
    let mut pool = even(2, 1);
    pool.prefill[0] =
        PrefillOption { cached_tokens: 2000, load: Load { tokens: 1500, requests: 1 }, ..pool.prefill[0] };
    let ask = Ask { prompt_tokens: 2400, ..ask };
    assert_eq!(goes(&ask, &pool).prefill[0], 0);
    let tight = Ask { ttft: 0.5, ..ask };
    let late = candidates(&tight, &pool, &goes(&tight, &pool), 1)[0].cost.late;
    assert!(late > 0.0, "both would be late, the first one by less");
    assert_eq!(goes(&tight, &pool).prefill[0], 0);
}

#[test]
fn a_worker_without_room_is_passed_over() {
    let mut pool = even(1, 2);
    pool.decode[0].room_tokens = Some(100);
    pool.decode[1].room_tokens = Some(10_000);
    for ticket in 0..4 {
        assert_eq!(KvAware.decide(&ask(2000, ticket), &pool).unwrap().decode, 1);
    }
}

#[test]
fn a_load_is_what_was_told_and_what_was_sent_since() {
    let load = |requests, tokens| Load { requests, tokens };
    // Others' requests are in what was told, ours since then are not.
    assert_eq!(Load::estimate(load(5, 500), load(2, 200), load(3, 300)), load(7, 700));
    // Told before any of ours arrived.
    assert_eq!(Load::estimate(load(0, 0), load(0, 0), load(3, 300)), load(3, 300));
}

/// A cluster in which prefill workers compute one prompt after the other, decode workers hold what they answer, and each
/// keeps the first blocks of the last few conversations.
struct Miniature {
    pool: Pool,
    /// Until when each prefill worker is busy.
    until: Vec<f64>,
    /// When each decode worker's answers end.
    answers: Vec<Vec<f64>>,
    prefill_has: Vec<Vec<(u64, u32)>>,
    decode_has: Vec<Vec<(u64, u32)>>,
    /// Requests sent to each decode worker.
    sent: Vec<u32>,
}

const TOKENS_PER_SECOND: f64 = 4000.0;
const ANSWER_SECONDS: f64 = 3.0;
const KEPT: usize = 30;

impl Miniature {
    fn new(prefill: usize, decode: usize) -> Self {
        let mut pool = even(prefill, decode);
        let measured = Speed {
            prefill_tokens_per_second: TOKENS_PER_SECOND as f32,
            step_seconds: 0.02,
            handoff_bytes_per_second: 1e9,
        };
        pool.prefill.iter_mut().for_each(|option| option.speed = measured);
        pool.decode.iter_mut().for_each(|option| option.speed = measured);
        Self {
            pool,
            until: vec![0.0; prefill],
            answers: vec![Vec::new(); decode],
            prefill_has: vec![Vec::new(); prefill],
            decode_has: vec![Vec::new(); decode],
            sent: vec![0; decode],
        }
    }

    /// Seconds to the first token, and tokens that were found.
    fn send(&mut self, policy: &dyn Policy, now: f64, conversation: u64, prompt: u32, ticket: u64) -> (f64, u32) {
        let has = |kept: &[(u64, u32)]| {
            kept.iter().find(|known| known.0 == conversation).map_or(0, |known| known.1.min(prompt - 1))
        };
        for (at, option) in self.pool.prefill.iter_mut().enumerate() {
            option.load.tokens = ((self.until[at] - now).max(0.0) * TOKENS_PER_SECOND) as u64;
            option.cached_tokens = has(&self.prefill_has[at]);
        }
        for (at, option) in self.pool.decode.iter_mut().enumerate() {
            self.answers[at].retain(|&end| end > now);
            option.load.requests = self.answers[at].len() as u64;
            option.cached_tokens = has(&self.decode_has[at]);
        }
        let ask = ask(prompt as usize, ticket);
        let decision = policy.decide(&ask, &self.pool).unwrap();
        let found = decision.cached_tokens(&ask, &self.pool);
        let compute = f64::from(prompt - found) / TOKENS_PER_SECOND;
        let done = match decision.prefill.first() {
            Some(&first) => {
                let done = self.until[first].max(now) + compute;
                self.until[first] = done;
                keep(&mut self.prefill_has[first], conversation, prompt);
                done
            }
            None => now + compute,
        };
        keep(&mut self.decode_has[decision.decode], conversation, prompt);
        // An answer takes longer the more of them there are.
        let together = self.answers[decision.decode].len() as f64;
        self.answers[decision.decode].push(done + ANSWER_SECONDS * (1.0 + together / 16.0));
        self.sent[decision.decode] += 1;
        (done - now, found)
    }
}

fn keep(kept: &mut Vec<(u64, u32)>, conversation: u64, tokens: u32) {
    kept.retain(|known| known.0 != conversation);
    kept.push((conversation, tokens));
    if kept.len() > KEPT {
        kept.remove(0);
    }
}

/// Mean seconds to the first token of `count` requests, the share of tokens found, and how many the busiest decode worker got.
fn drive(name: PolicyName, count: u64, conversations: u64, seed: u64) -> (f64, f64, u32) {
    let (policy, mut cluster) = (name.build(), Miniature::new(4, 4));
    let mut state = seed;
    let mut random = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut turns = std::collections::HashMap::new();
    let (mut waited, mut found, mut all, mut now) = (0.0, 0u64, 0u64, 0.0);
    for ticket in 0..count {
        // Four fifths of what the prefill workers can do if nothing is found.
        now += 2.0 * (random() % 1000) as f64 / 1000.0 * 1500.0 / (4.0 * TOKENS_PER_SECOND * 0.8);
        let conversation = if conversations == 0 { ticket } else { random() % conversations };
        let turn = turns.entry(conversation).or_insert(0u32);
        let prompt = 500 + (random() % 2000) as u32 * u32::from(conversations == 0) + *turn % 8 * 250;
        *turn += 1;
        let (seconds, cached) = cluster.send(&*policy, now, conversation, prompt, ticket);
        waited += seconds;
        found += u64::from(cached);
        all += u64::from(prompt);
    }
    (waited / count as f64, found as f64 / all as f64, cluster.sent.iter().copied().max().unwrap_or(0))
}

#[test]
fn kv_aware_is_no_worse_than_least_loaded_where_nothing_is_shared() {
    for seed in 0..5 {
        let (ours, found, _) = drive(PolicyName::KvAware, 3000, 0, seed);
        let (theirs, ..) = drive(PolicyName::LeastLoaded, 3000, 0, seed);
        assert_eq!(found, 0.0);
        assert!(ours <= theirs * 1.02, "{ours} s against {theirs} s");
    }
}

#[test]
fn kv_aware_finds_conversations_again_and_spreads_them() {
    for seed in 0..5 {
        let (ours, found, busiest) = drive(PolicyName::KvAware, 3000, 60, seed);
        let (theirs, scattered, _) = drive(PolicyName::RoundRobin, 3000, 60, seed);
        assert!(
            found > scattered + 0.1 && ours * 1.3 < theirs,
            "{found} and {ours} s against {scattered} and {theirs} s"
        );
        assert!(busiest < 3000 / 4 * 3 / 2, "the busiest of four decode workers got {busiest} of 3000");
    }
}

#[test]
fn one_hot_prompt_is_not_sent_to_one_worker_only() {
    // All requests at one moment, all of one prompt that one pair has.
    let mut cluster = Miniature::new(4, 4);
    cluster.prefill_has[0].push((7, 2000));
    cluster.decode_has[0].push((7, 2000));
    for ticket in 0..200 {
        cluster.send(&KvAware, 0.0, 7, 2001, ticket);
    }
    assert!(cluster.sent.iter().all(|&sent| (30..90).contains(&sent)), "{:?}", cluster.sent);
}

#[test]
fn who_only_looks_faster_is_not_waited_for_and_who_is_faster_by_far_is() {
    // The first computes a long prompt; its last few prompts went somewhat faster than the others'.
    let pool = |speeds: [u32; 4]| {
        let mut pool = even(4, 1);
        for (option, tokens_per_second) in pool.prefill.iter_mut().zip(speeds) {
            option.speed = speed((tokens_per_second, 20, 1000));
        }
        pool.prefill[0].load = Load { requests: 1, tokens: 2000 };
        pool
    };
    let first = |speeds| KvAware.decide(&ask(20_000, 0), &pool(speeds)).unwrap().prefill[0];
    assert_ne!(first([5000, 4000, 4000, 4000]), 0);
    assert_eq!(first([16_000, 4000, 4000, 4000]), 0);
    // One that is slower by far is left alone though it has nothing to do.
    let slow = KvAware.decide(&ask(20_000, 0), &pool([4000, 500, 500, 4000])).unwrap().prefill;
    assert_eq!(slow[0], 3);
}
