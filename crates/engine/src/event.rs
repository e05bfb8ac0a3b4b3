//! What the engine tells its callers, and how: all of it on the engine thread.

use std::{ops::Range, sync::Arc};

use kvasir_types::{BlockHash, BlockId, FinishReason, Sampled};

use crate::{Error, SeqId};

/// Hears what becomes of one sequence.
///
/// Called on the engine thread, so it must not block; a sink that panics loses its sequence (which is ended as if
/// aborted) and nothing else. It may call the engine's `Handle`. A sink that is dropped without a last event belonged to
/// a sequence that was aborted or released, or to an engine that is gone.
pub trait EventSink: Send {
    /// The next event.
    fn event(&mut self, event: Event);
}

impl<F: FnMut(Event) + Send> EventSink for F {
    fn event(&mut self, event: Event) {
        self(event);
    }
}

/// What becomes of a sequence, in this order: `Admitted`, then for each choice its `Token`s and its `Finished`; or `Failed`
/// at any point, which ends all choices. The sequence has ended with the `Finished` that leaves none, or with `Failed`.
#[derive(Clone, Debug)]
pub enum Event {
    /// Blocks are reserved for the whole prompt. The sequence is held until `landed`, `compute` or `resume`.
    Admitted(Admission),
    /// The next token of a choice; the last one (an end token, too) included.
    Token {
        /// Which choice, from 0 on.
        choice: u32,
        /// The token.
        sampled: Sampled,
    },
    /// A choice is complete and its blocks are given back. Never sent to a `PrefillOnly` sequence: that one is kept after its
    /// token, until `release` or `abort`.
    Finished {
        /// Which choice.
        choice: u32,
        /// Why it ended.
        reason: FinishReason,
        /// Choices that have not ended yet; the sequence is over with 0.
        left: u32,
    },
    /// The sequence cannot go on, none of its choices; its blocks are given back.
    Failed(Error),
}

/// Where a prompt's KV is, or is to land.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Blocks of the prompt in each group of layers, in order, the last one perhaps used in part;
    /// [`BlockId::GONE`] where a sliding group needs none. They stay this sequence's own until it ends: a held sequence is
    /// never preempted, a peer may be writing into its blocks.
    pub tables: Vec<Vec<BlockId>>,
    /// Hashes of the prompt's full blocks: their names in group 0 ([`kvasir_kv_cache::in_group`] for the others).
    pub hashes: Arc<[BlockHash]>,
    /// How many tokens at the beginning have their KV already: a multiple of the block size, less than the prompt, because
    /// at least the last token must be computed to know what follows it. These blocks may be read, not written.
    pub cached_tokens: usize,
}

/// A complete block of a sequence that loses its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpilledBlock {
    /// Its name in its group.
    pub hash: BlockHash,
    /// Its group.
    pub group: usize,
    /// Where it is.
    pub block: BlockId,
}

/// Keeps what preempted sequences have computed, somewhere else: a KV store.
///
/// Called on the engine thread, so it must not wait for anybody; if it panics, nothing was kept.
pub trait Spill: Send {
    /// A sequence loses its blocks. They stay as they are **until this returns**; after that they are in the prefix cache
    /// like any others, and gone when their place is needed. Whoever cannot move them at once copies them.
    fn out(&mut self, seq: SeqId, blocks: &[SpilledBlock]);

    /// A sequence that was told to `out` has blocks again: `admission.cached_tokens` tokens are still there, of the
    /// `admission.hashes` blocks that it had. True: whoever keeps them brings them back. Then the sequence is held as a new
    /// one is: write into `admission.tables`, say `landed`, and in any case `compute`, which computes the rest.
    fn back(&mut self, seq: SeqId, admission: &Admission) -> bool;
}

/// Watches a prompt being computed, layer by layer: the prefill worker's pusher.
///
/// Called on the engine thread, so it must not block; if it panics, only its own sequence fails.
pub trait LayerSink: Send {
    /// K and V of one layer of one chunk are complete in the arena and will not be written again.
    fn layer_done(&mut self, done: LayerDone<'_>);
}

/// One layer of one chunk of one prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerDone<'a> {
    /// Which layer.
    pub layer: usize,
    /// How many there are.
    pub layers: usize,
    /// The layer's group.
    pub group: usize,
    /// Which layer of that group's blocks it is.
    pub place: usize,
    /// Index of `blocks[0]` in the sequence's table of that group.
    pub first_block: usize,
    /// The blocks that this chunk wrote to, in order; the first and the last perhaps in part. [`BlockId::GONE`] where
    /// nothing after the chunk looks at the block any more.
    pub blocks: &'a [BlockId],
    /// Positions of the prompt in this chunk.
    pub tokens: Range<usize>,
}
