//! What this machine can do at most: multiply-adds from registers, and bytes read from memory.
//!
//! A benchmark divides by these, measured in the same run on the same threads: a share of a data sheet's number says
//! little on a machine that others use, too. Each function takes the best of several short rounds, because whatever else
//! runs can only make a round slower.
//!
//! | figure | loop |
//! | --- | --- |
//! | [`peak_f32`] | independent fused multiply-adds on 24 (AVX-512), 12 (AVX2) or 16 × 4 (portable) registers' worth of sums |
//! | [`peak_bf16`] | the same with `vdpbf16ps`: 32 products per instruction |
//! | [`read_bandwidth`] | every cache line of a buffer far above the last-level cache, each thread its own part |

use std::{
    hint::black_box,
    sync::{Arc, Barrier},
    time::{Duration, Instant},
};

use super::kernels::{Isa, peaks};

/// Rounds of each measurement; the best one counts.
const ROUNDS: usize = 7;
/// Long enough that clocks and barriers do not show, short enough that a round fits between two disturbances.
const ROUND: Duration = Duration::from_millis(40);

/// Floating-point operations per second of `f32` fused multiply-adds, two operations each, on `threads` threads.
pub fn peak_f32(threads: usize) -> f64 {
    peak(threads, peaks::f32)
}

/// Floating-point operations per second of bf16 products summed in `f32` (`vdpbf16ps`), on `threads` threads; `None` on a
/// processor without the instruction.
pub fn peak_bf16(threads: usize) -> Option<f64> {
    Isa::detect().has_bf16().then(|| peak(threads, |isa, n| peaks::bf16(isa, n).unwrap_or(0)))
}

/// Bytes per second that `threads` threads read together from a buffer of `bytes` (far above the last-level cache: 512 MiB
/// is enough for any machine we know).
pub fn read_bandwidth(threads: usize, bytes: usize) -> f64 {
    let isa = Isa::detect();
    let part = bytes / threads.max(1) / 64 * 64;
    rounds(threads, |barrier| {
        let buffer = vec![1u8; part]; // not zero: untouched zero pages are all one page
        move || {
            barrier.wait();
            let start = Instant::now();
            black_box(peaks::read(isa, black_box(&buffer)));
            (start, Instant::now(), part as f64)
        }
    })
}

/// `work(isa, n)` does `n` steps and returns how many operations those were.
fn peak(threads: usize, work: impl Fn(Isa, usize) -> usize + Copy + Send) -> f64 {
    let isa = Isa::detect();
    rounds(threads, |barrier| {
        move || {
            barrier.wait();
            let start = Instant::now();
            let mut done = 0;
            while start.elapsed() < ROUND {
                done += work(isa, black_box(2_000));
            }
            (start, Instant::now(), done as f64)
        }
    })
}

/// The best round's total work over its time, from the first thread's start to the last one's end.
fn rounds<F>(threads: usize, prepare: impl Fn(Arc<Barrier>) -> F) -> f64
where
    F: FnMut() -> (Instant, Instant, f64) + Send,
{
    let barrier = Arc::new(Barrier::new(threads.max(1)));
    let mut workers: Vec<F> = (0..threads.max(1)).map(|_| prepare(barrier.clone())).collect();
    (0..ROUNDS)
        .map(|_| {
            let parts: Vec<_> = std::thread::scope(|scope| {
                let running: Vec<_> = workers.iter_mut().map(|worker| scope.spawn(worker)).collect();
                running.into_iter().filter_map(|thread| thread.join().ok()).collect()
            });
            let first = parts.iter().map(|part| part.0).min();
            let last = parts.iter().map(|part| part.1).max();
            let work: f64 = parts.iter().map(|part| part.2).sum();
            first.zip(last).map_or(0.0, |(first, last)| work / (last - first).as_secs_f64())
        })
        .fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_in_the_range_of_real_machines() {
        let (one, bytes) = (peak_f32(1), read_bandwidth(1, 64 << 20));
        assert!((1e8..1e13).contains(&one), "{one:e} flop/s");
        assert!((1e8..1e13).contains(&bytes), "{bytes:e} B/s");
        // How the two compare is for the benchmark to say: here others compute at the same time.
        assert!(peak_bf16(1).is_none_or(|bf16| (1e8..1e13).contains(&bf16)));
    }
}
