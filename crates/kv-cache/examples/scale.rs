//! What an operation on the cache costs as the number of blocks grows: `cargo run --release -p kvasir-kv-cache --example
//! scale [--json]`.
//!
//! Each operation is timed over all blocks of a pool of 1 thousand, 30 thousand and 1 million of them, in chains of 64
//! blocks (1,024 tokens of prompt) that are used in random order, so that neighbours in memory are not neighbours in use.
//! What grows is the cost of missing the processor's caches, not the number of steps: the bound to look at is the column
//! of random reads, one load each from an array as large as the pool's records.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use kvasir_kv_cache::{BlockPool, Name, Sealed, Stored};
use kvasir_types::BlockHash;

const SIZES: [usize; 3] = [1_000, 30_000, 1_000_000];
const CHAIN: usize = 64;
const OPERATIONS: [&str; 7] = ["take", "seal", "release", "lookup", "pin", "evict", "random read"];

/// SplitMix64's output function: names that look like hashes, and an order that looks random.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn hash(generation: u64, index: usize) -> BlockHash {
    let low = mix(generation << 40 | (index as u64 + 1));
    BlockHash((u128::from(low) | u128::from(mix(low)) << 64).to_le_bytes())
}

fn name(generation: u64, index: usize) -> Name {
    let parent = if index.is_multiple_of(CHAIN) { BlockHash([0; 16]) } else { hash(generation, index - 1) };
    Name {
        stored: Stored { hash: hash(generation, index), parent, group: 0 },
        chained: true,
        first: index.is_multiple_of(CHAIN),
    }
}

/// Indexes of whole chains, the chains in random order.
fn chains(blocks: usize, salt: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..blocks / CHAIN).collect();
    order.sort_by_key(|&chain| mix(chain as u64 ^ salt));
    order.into_iter().map(|chain| chain * CHAIN).collect()
}

/// Nanoseconds an operation took, in the order of `OPERATIONS`.
fn measure(blocks: usize) -> Vec<f64> {
    let blocks = blocks / CHAIN * CHAIN;
    let mut pool = BlockPool::new(blocks, 0);
    let mut times = [Duration::ZERO; 7];
    let timed = |time: &mut Duration, work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        *time += start.elapsed();
    };
    // Small pools are gone through more often, so that every figure comes from about a million operations.
    let rounds = (1_000_000 / blocks).max(1) as u64;
    for round in 0..rounds {
        let names: Vec<Name> = (0..blocks).map(|index| name(round, index)).collect();
        let mut taken = Vec::with_capacity(blocks);
        // The first round takes free blocks, every other evicts what the one before left.
        let slot = if round == 0 { 0 } else { 5 };
        timed(&mut times[slot], &mut || taken.extend((0..blocks).filter_map(|_| pool.take())));
        let mut held: Vec<Sealed> = Vec::with_capacity(blocks);
        timed(&mut times[1], &mut || {
            held.extend(taken.drain(..).zip(&names).map(|(block, name)| pool.seal(block, *name)));
        });
        let mut order: Vec<Option<Sealed>> = held.into_iter().map(Some).collect();
        let given = chains(blocks, round);
        timed(&mut times[2], &mut || {
            for &first in &given {
                for index in (first..first + CHAIN).rev() {
                    pool.release(order[index].take().expect("each is given back once"));
                }
            }
        });
        let asked = chains(blocks, round + 7);
        timed(&mut times[3], &mut || {
            for &first in &asked {
                for name in &names[first..first + CHAIN] {
                    assert!(black_box(pool.find(&name.stored.hash)).is_some());
                }
            }
        });
        timed(&mut times[4], &mut || {
            for &first in &asked {
                for index in first..first + CHAIN {
                    order[index] = pool.pin(&names[index].stored.hash);
                }
            }
        });
        let given = chains(blocks, round + 13);
        for &first in &given {
            for index in (first..first + CHAIN).rev() {
                pool.release(order[index].take().expect("pinned just now"));
            }
        }
    }
    let mut evicted = Vec::with_capacity(blocks);
    timed(&mut times[5], &mut || evicted.extend((0..blocks).filter_map(|_| pool.take())));
    assert_eq!(evicted.len(), blocks, "every block can be had again");
    evicted.into_iter().for_each(|block| pool.give_back(block));
    let mut reads = vec![[0u64; 8]; blocks];
    reads.iter_mut().enumerate().for_each(|(index, line)| line[0] = mix(index as u64) % blocks as u64);
    timed(&mut times[6], &mut || {
        let mut at = 0;
        for step in 0..blocks as u64 * rounds {
            at = (reads[at][0] + step) as usize % blocks; // each address depends on the load before
        }
        black_box(at);
    });
    let done = |operation: usize| match operation {
        0 => blocks as f64,
        _ => blocks as f64 * rounds as f64,
    };
    (0..times.len()).map(|operation| times[operation].as_nanos() as f64 / done(operation)).collect()
}

fn main() {
    let json = std::env::args().any(|argument| argument == "--json");
    let rows: Vec<(usize, Vec<f64>)> = SIZES.iter().map(|&blocks| (blocks, measure(blocks))).collect();
    if json {
        let row = |(blocks, times): &(usize, Vec<f64>)| {
            let figures: Vec<_> =
                OPERATIONS.iter().zip(times).map(|(operation, ns)| format!("\"{operation}\": {ns:.1}")).collect();
            format!("{{\"blocks\": {blocks}, \"ns\": {{{}}}}}", figures.join(", "))
        };
        println!("[{}]", rows.iter().map(row).collect::<Vec<_>>().join(",\n "));
        return;
    }
    println!("nanoseconds an operation");
    println!("{:>10} {}", "blocks", OPERATIONS.map(|operation| format!("{operation:>12}")).concat());
    for (blocks, times) in rows {
        println!("{blocks:>10} {}", times.iter().map(|ns| format!("{ns:>12.1}")).collect::<String>());
    }
}
