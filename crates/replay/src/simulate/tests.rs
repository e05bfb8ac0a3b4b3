use super::*;
use crate::{CONVERSATION, generate, size::Size};

fn conversation() -> Trace {
    Trace::read(CONVERSATION.as_bytes()).unwrap()
}

fn plan(policy: &str, memory_blocks: usize) -> Plan {
    let (policy, disk_policy) = (policy.to_owned(), policy.to_owned());
    Plan { policy, disk_policy, nodes: 1, group_blocks: 1, memory_blocks, disk_blocks: 0, exchange_ms: 15_000 }
}

fn hit_rate(trace: &Trace, policy: &str, percent: f64) -> f64 {
    let blocks = Size::Percent(percent).blocks(trace.distinct, 1);
    simulate(trace, &plan(policy, blocks), |_| {}).unwrap().hit_rate()
}

#[test]
fn the_recorded_trace_is_the_published_one() {
    let trace = conversation();
    assert_eq!((trace.requests.len(), trace.references, trace.distinct), (12_031, 288_500, 182_790));
    assert_eq!(trace.requests.last().unwrap().at_ms, 3_536_999);
}

/// What others measured for LRU on this trace: 0.195, 0.278, 0.358. A policy is compared with the real thing.
#[test]
fn lru_hits_what_it_is_known_to_hit() {
    let trace = conversation();
    for (percent, expected) in [(5.0, 0.195), (10.0, 0.278), (30.0, 0.358)] {
        let rate = hit_rate(&trace, "lru", percent);
        assert!((rate - expected).abs() < 0.002, "{percent}%: {rate}");
    }
}

#[test]
fn hit_density_is_never_below_lru_on_conversations_and_far_above_where_room_is_scarce() {
    let trace = conversation();
    for (percent, least) in
        [(1.0, 1.8), (2.0, 1.7), (5.0, 1.17), (10.0, 1.06), (20.0, 1.0), (30.0, 1.0), (50.0, 1.0), (100.0, 1.0)]
    {
        let (lru, ours) = (hit_rate(&trace, "lru", percent), hit_rate(&trace, "hit-density", percent));
        assert!(ours >= lru * least, "{percent}%: {ours} beside {lru}");
    }
}

#[test]
fn hit_density_is_not_below_lru_on_other_reuse() {
    for name in generate::NAMES {
        let trace = generate::generate(name, 1).unwrap();
        for percent in [1.0, 5.0, 20.0, 100.0] {
            let (lru, ours) = (hit_rate(&trace, "lru", percent), hit_rate(&trace, "hit-density", percent));
            assert!(ours >= lru * 0.99, "{name} {percent}%: {ours} beside {lru}");
        }
    }
}

#[test]
fn room_for_all_hits_all_that_can_be_hit() {
    let trace = conversation();
    for policy in POLICIES {
        let all = trace.distinct as usize;
        let outcome = simulate(&trace, &plan(policy, all), |_| {}).unwrap();
        assert!((outcome.hit_rate() - trace.bound()).abs() < 1e-9, "{policy}");
        assert_eq!(outcome.written, u64::from(trace.distinct), "{policy}");
        assert_eq!(outcome.asked, trace.references as u64);
    }
}

#[test]
fn what_memory_gives_up_is_found_on_disk() {
    let trace = generate::generate("chat", 3).unwrap();
    let (memory, all) = (trace.distinct as usize / 20, trace.distinct as usize);
    for policy in POLICIES {
        let alone = simulate(&trace, &plan(policy, memory), |_| {}).unwrap();
        let both = simulate(&trace, &Plan { disk_blocks: all, ..plan(policy, memory) }, |_| {}).unwrap();
        assert!((both.hit_rate() - trace.bound()).abs() < 1e-9, "{policy}: {}", both.hit_rate());
        assert!(both.disk_hits > 0 && both.memory_hits > 0 && alone.disk_hits == 0, "{policy}");
    }
}

#[test]
fn groups_spread_over_nodes_and_hits_stay() {
    let trace = conversation();
    let blocks = trace.distinct as usize / 10;
    let one = simulate(&trace, &plan("lru", blocks), |_| {}).unwrap();
    let many = simulate(&trace, &Plan { nodes: 16, ..plan("lru", blocks) }, |_| {}).unwrap();
    assert_eq!(many.asked_of_node.iter().sum::<u64>(), many.asked);
    assert!(one.imbalance() == 1.0 && many.imbalance() < 2.0, "{}", many.imbalance());
    assert!(many.hit_rate() > 0.95 * one.hit_rate());
}

fn rate_of(trace: &Trace, policy: &str, nodes: usize, exchange_ms: u64) -> f64 {
    let plan = Plan { nodes, exchange_ms, ..plan(policy, trace.distinct as usize / 20) };
    simulate(trace, &plan, |_| {}).unwrap().hit_rate()
}

/// Parts of a prompt on several nodes are of use together only: without what the others learned, an own order helps little.
#[test]
fn nodes_that_tell_one_another_what_they_learned_keep_what_one_node_gains() {
    let trace = conversation();
    for nodes in [4, 16] {
        let lru = rate_of(&trace, "lru", nodes, 0);
        let (alone, together) =
            (rate_of(&trace, "hit-density", nodes, 0), rate_of(&trace, "hit-density", nodes, 15_000));
        assert!(together >= lru * 1.14, "{nodes} nodes: {together} beside {lru}");
        assert!(together > alone, "{nodes} nodes: {together} beside {alone}");
    }
}

#[test]
fn hit_density_is_not_below_lru_on_several_nodes_either() {
    for name in generate::NAMES {
        let trace = generate::generate(name, 1).unwrap();
        let (lru, ours) = (rate_of(&trace, "lru", 4, 0), rate_of(&trace, "hit-density", 4, 15_000));
        assert!(ours >= lru * 0.99, "{name}: {ours} beside {lru}");
    }
}

/// What a node does unless it is told otherwise: hit density in memory, LRU on disk.
#[test]
fn a_disk_has_a_policy_of_its_own() {
    let trace = conversation();
    let blocks = trace.distinct as usize;
    let run = |disk_policy: &str| {
        let disk_policy = disk_policy.to_owned();
        let plan = Plan { disk_policy, disk_blocks: blocks / 10, ..plan("hit-density", blocks / 20) };
        simulate(&trace, &plan, |_| {}).unwrap()
    };
    let (lru, same) = (run("lru"), run("hit-density"));
    assert!(lru.disk_hits > 0 && same.disk_hits > 0 && lru != same);
}

#[test]
fn a_plan_without_sense_is_refused() {
    let trace = Trace::default();
    let nodes = |nodes| simulate(&trace, &Plan { nodes, ..plan("lru", 1) }, |_| {});
    assert_eq!((nodes(0), nodes(257)), (Err(Error::Nodes(0)), Err(Error::Nodes(257))));
    assert_eq!(simulate(&trace, &plan("fashion", 1), |_| {}), Err(Error::Policy("fashion".to_owned())));
    assert_eq!(simulate(&trace, &Plan { group_blocks: 0, ..plan("lru", 1) }, |_| {}), Err(Error::Group));
}

#[test]
fn a_prompt_larger_than_the_store_is_kept_as_far_as_it_fits() {
    let trace = Trace::read("0 1 1 0-9\n1 1 1 0-9".as_bytes()).unwrap();
    for policy in POLICIES {
        assert_eq!(simulate(&trace, &plan(policy, 4), |_| {}).unwrap().memory_hits, 4, "{policy}");
        assert_eq!(simulate(&trace, &plan(policy, 0), |_| {}).unwrap().written, 0, "{policy}");
    }
}
