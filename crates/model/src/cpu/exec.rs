//! Who computes: the calling thread alone, or a bounded pool of threads beside it.
//!
//! Waking the pool costs tens of microseconds, as much as a small product itself, so work below a threshold stays on the
//! calling thread. It makes no difference to the result: tasks are independent and each has its own order of sums.

use rayon::prelude::*;

use super::kernels::Isa;
use crate::Error;

/// Work that takes one thread about 20 µs, roughly what waking the others costs.
const SERIAL_FLOPS: usize = 1_500_000;

/// The instruction set and the threads of a backend.
#[derive(Debug)]
pub(super) struct Exec {
    pub(super) isa: Isa,
    threads: usize,
    /// `None` where one thread is all there may be.
    pool: Option<rayon::ThreadPool>,
}

impl Exec {
    /// An executor of `threads` threads.
    pub(super) fn new(isa: Isa, threads: usize) -> Result<Self, Error> {
        let failed = |reason: String| Error::Threads { threads, reason };
        if threads == 0 {
            return Err(failed("at least one is needed".into()));
        }
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("model-{i}"));
        let pool = if threads == 1 { None } else { Some(builder.build().map_err(|e| failed(e.to_string()))?) };
        Ok(Self { isa, threads, pool })
    }

    /// How many pieces to cut `flops` of work into: one, or a few per thread so that uneven ones even out.
    pub(super) fn pieces(&self, flops: usize) -> usize {
        if self.pool.is_none() || flops < SERIAL_FLOPS { 1 } else { self.threads * 4 }
    }

    /// Runs `task` for `0..tasks`, which are `flops` of work together, each once, in any order.
    pub(super) fn each(&self, tasks: usize, flops: usize, task: impl Fn(usize) + Sync + Send) {
        match &self.pool {
            Some(pool) if tasks > 1 && flops >= SERIAL_FLOPS => {
                pool.install(|| (0..tasks).into_par_iter().with_max_len(1).for_each(task));
            }
            _ => (0..tasks).for_each(task),
        }
    }

    /// Runs `task(first row, rows)` over `data` cut into pieces of whole rows of `width`.
    pub(super) fn rows(
        &self,
        data: &mut [f32],
        width: usize,
        flops: usize,
        task: impl Fn(usize, &mut [f32]) + Sync + Send,
    ) {
        let rows = data.len() / width;
        match &self.pool {
            Some(pool) if rows > 1 && flops >= SERIAL_FLOPS => {
                let piece = rows.div_ceil(self.pieces(flops));
                pool.install(|| {
                    data.par_chunks_mut(piece * width).enumerate().for_each(|(i, part)| task(i * piece, part));
                });
            }
            _ => task(0, data),
        }
    }
}
