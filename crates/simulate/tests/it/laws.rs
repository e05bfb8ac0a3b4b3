//! Laws of runs, on a small trace: the first minutes of the recorded one.

use kvasir_replay::{CONVERSATION, trace::Trace};
use kvasir_router::route::PolicyName;
use kvasir_simulate::{
    Outcome, Plan, Profile, Shape, Steering, Workload,
    figures::{Figures, Slo},
    profile, run, tides,
};
use proptest::prelude::*;

const SLO: Slo = Slo { ttft_ms: 5000.0, tpot_ms: 50.0 };

fn plan(prefill: usize, decode: usize) -> Plan {
    let text = Profile::named(profile::DEFAULT).expect("it comes with the program");
    let profile = Profile::read(text, &[]).expect("it can be used");
    Plan { prefill, decode, profile, index_delay_ms: 20, load_interval_ms: 100, store_tokens: 0, steering: None }
}

fn conversation(shape: Shape) -> Workload {
    let trace = Trace::read(CONVERSATION.as_bytes()).expect("it comes with the program");
    Workload::new(trace, shape).expect("it can be used")
}

fn small() -> Shape {
    Shape { limit: Some(1500), speed: 2.0, ..Shape::default() }
}

fn figures(workload: &Workload, plan: &Plan, policy: PolicyName) -> (Outcome, Figures) {
    let outcome = run(workload, plan, policy, |_| {}).expect("it can be simulated");
    let figures = Figures::of(policy.as_str(), workload, plan, SLO, &outcome);
    (outcome, figures)
}

/// Every request ends once, in the order of things, and every token was computed by somebody or found.
fn check(workload: &Workload, plan: &Plan, outcome: &Outcome) {
    let (mut computed, mut answered) = (0, 0);
    for (at, fate) in outcome.fates.iter().enumerate() {
        if fate.end == 0 {
            let all = u64::from(workload.prompt(at)) + u64::from(workload.answer(at));
            assert!(all > plan.profile.kv.room_tokens, "request {at} got lost");
            continue;
        }
        assert!(workload.at(at) < fate.first && fate.first <= fate.end, "{at}: {fate:?}");
        assert!(fate.found + fate.stored < workload.prompt(at), "{at}: {fate:?}");
        let workers = (plan.prefill + plan.decode) as u32;
        assert!(fate.decode < workers && fate.prefill < workers, "{at}: {fate:?}");
        // Whoever is never moved does one thing only.
        assert!(plan.steering.is_some() || fate.decode >= plan.prefill as u32, "{at}: {fate:?}");
        computed += u64::from(workload.prompt(at) - fate.found - fate.stored);
        // The first token is the prompt's.
        answered += u64::from(workload.answer(at) - 1);
    }
    assert_eq!(outcome.totals.iter().map(|totals| totals.prompt_tokens).sum::<u64>(), computed);
    assert_eq!(outcome.totals.iter().map(|totals| totals.answer_tokens).sum::<u64>(), answered);
}

#[test]
fn the_same_again_is_the_same_and_every_request_ends_once() {
    let (workload, plan) = (conversation(small()), plan(4, 4));
    for policy in PolicyName::ALL {
        let (first, figures_of_first) = figures(&workload, &plan, policy);
        let (again, figures_again) = figures(&conversation(small()), &plan, policy);
        assert_eq!((first.fates.as_slice(), first.events), (again.fates.as_slice(), again.events), "{policy:?}");
        assert_eq!(figures_of_first, figures_again);
        check(&workload, &plan, &first);
    }
}

#[test]
fn no_policy_finds_more_than_a_cache_without_limit_and_one_worker_with_room_for_all_finds_all_of_it() {
    let workload = conversation(small());
    for policy in PolicyName::ALL {
        let (_, row) = figures(&workload, &plan(6, 3), policy);
        assert!(row.of_bound <= 1.0 && row.hit_rate <= row.bound, "{policy:?}: {} of {}", row.hit_rate, row.bound);
    }
    let mut one = plan(1, 1);
    one.profile.kv.room_tokens = 1 << 40;
    let (outcome, row) = figures(&workload, &one, PolicyName::KvAware);
    check(&workload, &one, &outcome);
    assert!(row.of_bound > 0.999, "{}", row.of_bound);
    // Nor does the store, together with the workers.
    let mut stored = plan(4, 4);
    stored.store_tokens = 1 << 40;
    let (outcome, row) = figures(&workload, &stored, PolicyName::RoundRobin);
    check(&workload, &stored, &outcome);
    assert!(row.stored_rate > 0.0 && row.hit_rate + row.stored_rate <= row.bound + 1e-9, "{}", row.stored_rate);
}

#[test]
fn more_workers_are_not_worse_where_nothing_is_shared() {
    let workload = conversation(Shape { unique: true, ..small() });
    for policy in [PolicyName::KvAware, PolicyName::LeastLoaded] {
        let mean = |workers| figures(&workload, &plan(workers, workers), policy).1.ttft_ms.mean;
        let means: Vec<f64> = [2, 4, 8, 16, 32].into_iter().map(mean).collect();
        assert!(means.windows(2).all(|pair| pair[1] <= pair[0]), "{policy:?}: {means:?}");
    }
}

#[test]
fn nothing_shared_nothing_found() {
    let (_, row) = figures(&conversation(Shape { unique: true, ..small() }), &plan(4, 4), PolicyName::KvAware);
    assert_eq!((row.hit_rate, row.bound, row.of_bound), (0.0, 0.0, 1.0));
}

#[test]
fn knowing_what_workers_hold_pays_where_prompts_come_back() {
    let workload = conversation(Shape { speed: 1.0, ..small() });
    let of = |plan, policy| {
        let (_, row) = figures(&workload, &plan, policy);
        (row.ttft_ms.mean, row.hit_rate)
    };
    let ours = of(plan(10, 10), PolicyName::KvAware);
    let theirs = of(plan(10, 10), PolicyName::RoundRobin);
    assert!(ours.0 * 1.3 < theirs.0 && ours.1 > theirs.1 * 1.3, "{ours:?} beside {theirs:?}");
    // The later the router knows, the less it finds.
    let late = of(Plan { index_delay_ms: 300_000, ..plan(10, 10) }, PolicyName::KvAware);
    assert!(late.1 < ours.1, "{late:?} beside {ours:?}");
}

#[test]
fn a_request_alone_takes_as_long_as_its_parts() {
    let workload = Workload::new(Trace::read("0 10000 101 0-19".as_bytes()).unwrap(), Shape::default()).unwrap();
    let plan = plan(1, 1);
    let Profile { prefill, decode, handover, kv, hop_seconds, .. } = &plan.profile;
    let (outcome, _) = figures(&workload, &plan, PolicyName::KvAware);
    let fate = outcome.fates[0];
    // Two chunks; two hops there and two back.
    let tokens = prefill.token_seconds * 10_000.0 + prefill.context_seconds * 10_000.0 * 5000.0;
    let first = 2.0 * prefill.step_seconds + tokens + 4.0 * hop_seconds;
    assert!((fate.first as f64 / 1e9 - first).abs() < 1e-6, "{fate:?}, expected {first}");
    // The last layer of the second chunk is still to be written; then 100 steps.
    let last = (10_000.0 - 8192.0) * f64::from(kv.token_bytes) / handover.bytes_per_second / f64::from(handover.layers);
    let context = decode.context_seconds * (100.0 * 10_001.0 + 99.0 * 100.0 / 2.0);
    let answer = 100.0 * (decode.step_seconds + decode.sequence_seconds) + context;
    let end = first - 2.0 * hop_seconds + last + hop_seconds + answer + hop_seconds;
    assert!((fate.end as f64 / 1e9 - end).abs() < 1e-6, "{fate:?}, expected {end}");
}

#[test]
fn moving_workers_pays_where_the_mix_changes_and_nobody_is_lost() {
    let workload = Workload::new(tides::tides(1), Shape { limit: Some(14_000), ..Shape::default() }).unwrap();
    let (still, fixed) = figures(&workload, &plan(8, 8), PolicyName::KvAware);
    check(&workload, &plan(8, 8), &still);
    let steering = Steering { ttft_seconds: 5.0, tpot_seconds: 0.05, look_seconds: 2.0, switch_seconds: 0.5 };
    let steered = Plan { steering: Some(steering), ..plan(8, 8) };
    let (moved, ours) = figures(&workload, &steered, PolicyName::KvAware);
    check(&workload, &steered, &moved);
    assert_eq!(run(&workload, &steered, PolicyName::KvAware, |_| {}).unwrap().fates, moved.fates);
    assert!(!moved.moves.is_empty() && ours.good > fixed.good, "{} beside {}", ours.good, fixed.good);
    let back_and_forth = moved.moves.windows(2).filter(|pair| pair[0].to != pair[1].to).count();
    assert!(back_and_forth <= 4, "{:?}", moved.moves);
}

#[test]
fn what_no_worker_has_room_for_is_refused_and_nobody_else_suffers() {
    let text = "0 1000 10 0-1\n1 2000000 10 2-4000\n2 1000 10 0-1\n";
    let workload = Workload::new(Trace::read(text.as_bytes()).unwrap(), Shape::default()).unwrap();
    let (outcome, row) = figures(&workload, &plan(1, 1), PolicyName::LeastLoaded);
    check(&workload, &plan(1, 1), &outcome);
    assert_eq!((row.answered, row.refused), (2, 1));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn whatever_the_trace_every_request_ends(
        requests in prop::collection::vec((0u64..3000, 0u32..6000, 0u32..50, prop::collection::vec(0u64..20, 0..9)), 1..60),
        prefill in 0usize..4, decode in 1usize..4, room in 200u64..20_000, running in 1u32..6, store in 0u64..9000,
    ) {
        let lines = requests.iter().map(|(at, prompt, answer, ids)| format!(
            r#"{{"timestamp": {at}, "input_length": {prompt}, "output_length": {answer}, "hash_ids": {ids:?}}}"#
        ));
        let text = lines.collect::<Vec<_>>().join("\n");
        let workload = Workload::new(Trace::read(text.as_bytes()).unwrap(), Shape::default()).unwrap();
        let mut plan = Plan { store_tokens: store, ..plan(prefill, decode) };
        (plan.profile.kv.room_tokens, plan.profile.decode.max_running) = (room, running);
        for policy in PolicyName::ALL {
            let (outcome, _) = figures(&workload, &plan, policy);
            check(&workload, &plan, &outcome);
        }
    }
}
