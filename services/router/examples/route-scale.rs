//! How long a routing decision takes in a large cluster: by default 1,000 workers (half of them prefill workers) that hold ten
//! million blocks, prompts of 100 blocks, while feeds go on changing the index.
//!
//! ```text
//! cargo run --release -p kvasir-router --example route-scale [-- WORKERS BLOCKS DECISIONS]
//! ```
//!
//! A decision is: hashing the prompt, finding who holds it, laying out the pool from what the workers told (which they go on
//! telling) and the policy `kv-aware`. Half of the prompts
//! share their first half with all workers (a system prompt), a quarter is known to one pair, a quarter to nobody.
//!
//! Beside it stands arithmetic that touches no memory and takes as long at the median: its tail is the machine's (timers that
//! interrupt, whoever else wants the processor), and no decision of that length can have a shorter one.
#![forbid(unsafe_code)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use kvasir_router::{
    Rehearsal, Workers,
    cache::{Index, Number},
    route::{Ask, KvAware},
};
use kvasir_types::{BlockHash, TokenId};

const BLOCK: usize = 16;
const PROMPT_BLOCKS: usize = 100;
/// Changes in a second, from all workers together: each computes some thousand tokens a second.
const CHANGES_PER_SECOND: u32 = 100_000;
/// Workers that tell their load with every 200 changes: each does ten times a second.
const TOLD: usize = 20;

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let [workers, blocks, decisions] =
        [(0, 1000), (1, 10_000_000), (2, 20_000)].map(|(at, default)| arguments.get(at).copied().unwrap_or(default));
    let index = Arc::new(Index::default());
    let numbers: Vec<Number> = (0..workers).filter_map(|_| index.join()).collect();

    let began = Instant::now();
    let shared = tokens(u64::MAX, PROMPT_BLOCKS / 2);
    let shared_names = names(&shared);
    for number in &numbers {
        shared_names.iter().for_each(|hash| index.insert(hash, *number));
    }
    let mut conversation = 0;
    while index.blocks() < blocks as u64 {
        // A prefill worker and a decode worker have each.
        let pair = [conversation as usize % (workers / 2), workers / 2 + (conversation as usize * 7) % (workers / 2)];
        for hash in names(&prompt(conversation, &shared)) {
            pair.iter().for_each(|&at| index.insert(&hash, numbers[at]));
        }
        conversation += 1;
    }
    let (known, held, bytes) = (index.blocks(), index.held(), index.bytes());
    println!(
        "{known} blocks ({held} holdings of {workers} workers) in {:.1} s: {:.1} bytes a block",
        began.elapsed().as_secs_f64(),
        bytes as f64 / known as f64
    );

    let mut rehearsal = Rehearsal::new(&numbers);
    let mut runs = Vec::new();
    for writers in [false, true] {
        let (stop, written) = (Arc::new(AtomicBool::new(!writers)), Arc::new(AtomicU64::new(0)));
        let feed = {
            let (index, numbers, workers, stop, written) =
                (Arc::clone(&index), numbers.clone(), rehearsal.workers(), Arc::clone(&stop), Arc::clone(&written));
            std::thread::spawn(move || feed(&index, &numbers, &workers, &stop, &written))
        };
        let began = Instant::now();
        let [whole, lookup, pool, policy] = decide(&index, &mut rehearsal, decisions, conversation, &shared);
        stop.store(true, Relaxed);
        feed.join().expect("the feed ends");
        let rate = written.load(Relaxed) as f64 / began.elapsed().as_secs_f64();
        println!(
            "{decisions} decisions, {rate:.0} changes/s, µs at p50, p99, p99.9: {} (hashing and lookup {}, pool {}, policy {})",
            at(&whole),
            at(&lookup),
            at(&pool),
            at(&policy),
        );
        let arithmetic = arithmetic(decisions, part(&whole, 0.5));
        println!("        arithmetic alone that takes as long, µs at p50, p99, p99.9: {}", at(&arithmetic));
        runs.push(serde_json::json!({
            "changes_per_second": rate, "p50_us": part(&whole, 0.5), "p99_us": part(&whole, 0.99),
            "arithmetic_p50_us": part(&arithmetic, 0.5), "arithmetic_p99_us": part(&arithmetic, 0.99),
        }));
    }
    // For programs.
    println!("{}", serde_json::json!({"bytes_per_block": bytes as f64 / known as f64, "runs": runs}));
}

/// Tokens that differ between seeds.
fn tokens(seed: u64, blocks: usize) -> Vec<TokenId> {
    let mut state = seed;
    let token = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        TokenId((state >> 40) as u32)
    };
    (0..blocks * BLOCK).map(token).collect()
}

/// Half of the conversations begin with what all share.
fn prompt(conversation: u64, shared: &[TokenId]) -> Vec<TokenId> {
    match conversation % 2 {
        0 => [shared, &tokens(conversation, PROMPT_BLOCKS / 2)].concat(),
        _ => tokens(conversation, PROMPT_BLOCKS),
    }
}

fn hashed(tokens: &[TokenId]) -> impl Iterator<Item = BlockHash> {
    let mut parent = BlockHash([1; 16]);
    tokens.chunks_exact(BLOCK).map(move |block| {
        parent = parent.extend(block);
        parent
    })
}

fn names(tokens: &[TokenId]) -> Vec<BlockHash> {
    hashed(tokens).collect()
}

/// Workers store and forget blocks, and tell how busy they are.
fn feed(index: &Index, numbers: &[Number], workers: &Workers, stop: &AtomicBool, written: &AtomicU64) {
    let mut conversation = 1u64 << 40;
    while !stop.load(Relaxed) {
        let hashes = names(&tokens(conversation, PROMPT_BLOCKS));
        let number = numbers[conversation as usize % numbers.len()];
        let began = Instant::now();
        (0..TOLD).for_each(|at| workers.tell((conversation as usize * TOLD + at) % workers.count(), conversation));
        hashes.iter().for_each(|hash| index.insert(hash, number));
        hashes.iter().for_each(|hash| index.remove(hash, number));
        written.fetch_add(2 * hashes.len() as u64, Relaxed);
        conversation += 1;
        std::thread::sleep(
            (Duration::from_secs(1) / CHANGES_PER_SECOND * 2 * hashes.len() as u32).saturating_sub(began.elapsed()),
        );
    }
}

/// Microseconds of each decision, of its hashing and lookup, laying out and the policy, sorted.
fn decide(
    index: &Index,
    rehearsal: &mut Rehearsal,
    decisions: usize,
    conversations: u64,
    shared: &[TokenId],
) -> [Vec<f64>; 4] {
    let mut times: [Vec<f64>; 4] = std::array::from_fn(|_| Vec::with_capacity(decisions));
    for ticket in 0..decisions as u64 {
        // Of known ones every kind, and as many that nobody knows.
        let known = (ticket.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % conversations;
        let prompt = if ticket % 4 == 3 { tokens(ticket | 1 << 50, PROMPT_BLOCKS) } else { prompt(known, shared) };
        let began = Instant::now();
        rehearsal.lookup().clear();
        index.lookup(hashed(&prompt), rehearsal.lookup());
        let looked = Instant::now();
        rehearsal.lay_out();
        let laid_out = Instant::now();
        let decision = rehearsal.decide(&KvAware, Ask { prompt_tokens: prompt.len(), ticket, ..Ask::default() });
        let decided = Instant::now();
        assert!(decision.is_some());
        let parts = [decided - began, looked - began, laid_out - looked, decided - laid_out];
        for (times, took) in times.iter_mut().zip(parts) {
            times.push(took.as_secs_f64() * 1e6);
        }
    }
    times.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
    times
}

/// Microseconds of additions and shifts that take about `micros`, so many times, sorted.
fn arithmetic(times: usize, micros: f64) -> Vec<f64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut run = |steps: u64| {
        let began = Instant::now();
        for _ in 0..steps {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
        std::hint::black_box(state);
        began.elapsed().as_secs_f64() * 1e6
    };
    let mut trials: Vec<f64> = (0..200).map(|_| run(10_000)).collect();
    trials.sort_by(f64::total_cmp);
    let steps = (10_000.0 * micros / part(&trials, 0.5)) as u64;
    let mut times: Vec<f64> = (0..times).map(|_| run(steps)).collect();
    times.sort_by(f64::total_cmp);
    times
}

fn at(sorted: &[f64]) -> String {
    format!("{:.1} {:.1} {:.1}", part(sorted, 0.5), part(sorted, 0.99), part(sorted, 0.999))
}

fn part(sorted: &[f64], part: f64) -> f64 {
    sorted.get((sorted.len() as f64 * part) as usize).copied().unwrap_or(f64::NAN)
}
