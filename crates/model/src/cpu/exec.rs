//! Who computes and how: the calling thread alone, or a bounded pool of threads beside it, in exact or in fast products.
//!
//! Even a section that finds its threads awake costs about a microsecond, so work below a threshold stays on the calling
//! thread. It makes no difference to the result: tasks are independent and each has its own order of sums.

use std::{
    marker::PhantomData,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{
    kernels::{Isa, fast::Step},
    pool::Pool,
};
#[cfg(test)]
use crate::group::Alone;
use crate::{Error, group::Group};

/// Work that takes one thread about 5 µs: well above what a section costs.
const SERIAL_FLOPS: usize = 400_000;

/// How products of activations with weights are computed where the weights are bf16 (or narrower). Both keep the law of the
/// seam; they are different models to the last bits, so they have different fingerprints and their workers do not pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Activations stay `f32`: nothing is lost but the rounding of sums.
    #[default]
    Exact,
    /// Activations (keys, values and the weights of attention among them) are rounded to bf16 before each product, as
    /// PyTorch does: up to twice as fast on processors with `vdpbf16ps`, slower than exact on others. First
    /// log-probabilities of the checked-in models move by up to 0.1 (0.00002 with exact products; 0.24 when PyTorch computes
    /// them in bf16); no greedy answer changes.
    Fast,
}

/// The instruction set and the threads of a backend, and those it computes with.
#[derive(Debug)]
pub(super) struct Exec {
    /// Who has which part of the model.
    pub(super) group: Arc<dyn Group>,
    pub(super) isa: Isa,
    pub(super) compute: Compute,
    threads: usize,
    /// `None` where one thread is all there may be.
    pool: Option<Mutex<Pool>>,
    /// Packed activations of the product being computed; kept because fresh pages cost as much as packing.
    scratch: Mutex<Vec<Step>>,
}

impl Exec {
    /// An executor of `threads` threads, the caller's among them, which computes all of a model.
    #[cfg(test)]
    pub(super) fn new(isa: Isa, compute: Compute, threads: usize) -> Result<Self, Error> {
        Self::of(Arc::new(Alone), isa, compute, threads)
    }

    /// The same for a rank of a group.
    pub(super) fn of(group: Arc<dyn Group>, isa: Isa, compute: Compute, threads: usize) -> Result<Self, Error> {
        let failed = |reason: String| Error::Threads { threads, reason };
        if threads == 0 {
            return Err(failed("at least one is needed".into()));
        }
        let pool = match threads {
            1 => None,
            _ => Some(Mutex::new(Pool::new(threads - 1).map_err(|e| failed(e.to_string()))?)),
        };
        Ok(Self { group, isa, compute, threads, pool, scratch: Mutex::default() })
    }

    /// How many threads compute, the caller's among them.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// How many pieces to cut `flops` of work into: one, or a few per thread so that uneven ones even out.
    pub(super) fn pieces(&self, flops: usize) -> usize {
        if self.pool.is_none() || flops < SERIAL_FLOPS { 1 } else { self.threads * 4 }
    }

    /// Runs `task` for `0..tasks`, which are `flops` of work together, each once, in any order. A task may not start a
    /// section itself.
    pub(super) fn each(&self, tasks: usize, flops: usize, task: impl Fn(usize) + Sync) {
        match &self.pool {
            Some(pool) if tasks > 1 && flops >= SERIAL_FLOPS => {
                // A poisoned pool is whole: it passed a task's panic on.
                pool.lock().unwrap_or_else(PoisonError::into_inner).run(tasks, &task);
            }
            _ => (0..tasks).for_each(task),
        }
    }

    /// Runs `task(first row, rows)` over `data` cut into pieces of whole rows of `width`.
    pub(super) fn rows<T: Send>(
        &self,
        data: &mut [T],
        width: usize,
        flops: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let rows = data.len() / width;
        let piece = rows.div_ceil(self.pieces(flops)).max(1);
        self.chunks(data, piece * width, flops, |i, part| task(i * piece, part));
    }

    /// Runs `task(index, chunk)` over `data` in chunks of `len`, the last one perhaps shorter.
    pub(super) fn chunks<T: Send>(
        &self,
        data: &mut [T],
        len: usize,
        flops: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let chunks = Chunks { base: data.as_mut_ptr(), len: data.len(), chunk: len, lifetime: PhantomData };
        self.each(data.len().div_ceil(len), flops, |i| {
            // SAFETY: each index is one task's.
            task(i, unsafe { chunks.get(i) });
        });
    }

    /// The memory for packed activations.
    pub(super) fn scratch(&self) -> MutexGuard<'_, Vec<Step>> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A slice whose chunks are handed to several threads.
struct Chunks<'a, T> {
    base: *mut T,
    len: usize,
    chunk: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` whose only access is `get`, and that one's contract gives each chunk to one thread.
unsafe impl<T: Send> Sync for Chunks<'_, T> {}

impl<T> Chunks<'_, T> {
    /// Chunk `i`.
    ///
    /// # Safety
    /// Nobody else has it.
    #[expect(clippy::mut_from_ref, reason = "disjoint parts of one exclusive borrow")]
    unsafe fn get(&self, i: usize) -> &mut [T] {
        let start = (i * self.chunk).min(self.len);
        let end = (start + self.chunk).min(self.len);
        // SAFETY: inside the borrowed slice, and this caller's alone.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), end - start) }
    }
}
