//! The seam between what is computed and on what: a [`Backend`] turns a batch of token runs into logits.
//!
//! One `forward` takes a mixed batch: sequences that decode (one token each) beside chunks of prompts (many tokens).
//! For each input the backend
//!
//! 1. computes K and V of its tokens, layer by layer, and writes them into the blocks its table names;
//! 2. attends over all positions `0..start + tokens.len()`, reading K and V **back from the arena**, its own included,
//!    so that what was computed here, landed from a peer or came out of a cache is the same to the bit;
//! 3. returns the logits that follow its last tokens, as many as are asked for.
//!
//! The law every backend keeps: the result for a token does not depend on what else is in the batch, on how the prompt
//! was cut into chunks, or on the number of threads. Not "nearly": to the bit. A prompt computed on a prefill worker in
//! one cut and resumed on a decode worker in another must continue with the same tokens.

use kvasir_types::{BlockId, GroupKind, KvGroups, KvLayout, TokenId};

use crate::{Error, Logits, ModelConfig, Need, Rows};

/// The tokens of one sequence to compute in this step.
#[derive(Clone, Copy, Debug)]
pub struct SeqInput<'a> {
    /// Tokens to compute, at least one. KV of all positions before `start` is in the blocks already.
    pub tokens: &'a [TokenId],
    /// Position of `tokens[0]` in the sequence.
    pub start: usize,
    /// One block table per group of the model's layers ([`KvGroups`]): blocks in order, from position 0 on, at least as many
    /// as `start + tokens.len()` tokens need. In a sliding group, blocks that none of the tokens looks at may be
    /// [`BlockId::GONE`].
    pub tables: &'a [Vec<BlockId>],
    /// For how many of the last `tokens` the logits after them are wanted: none; 1 to go on; all of a run of drafted
    /// tokens to check them.
    pub rows: usize,
}

/// Computes a model on some device, batch by batch.
///
/// The law all implementations keep: what comes out for a token does not depend, not by a bit, on what else is in the
/// batch, on how its sequence was cut into chunks, or on the number of threads.
pub trait Backend: Send {
    /// The model: vocabulary, context length, end tokens, shapes.
    fn spec(&self) -> &ModelConfig;

    /// Which layers share a block: how many tables a [`SeqInput`] has, and what they must hold.
    fn groups(&self) -> &KvGroups;

    /// Copies whole blocks, `(from, to)`, before the next `forward`: a sequence goes on from another one's unfinished block.
    ///
    /// # Errors
    /// A block that the arena does not have; nothing was copied then.
    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), Error>;

    /// Somebody else has written these blocks of the arena: a peer, a store. A backend that computes with a copy of them in
    /// a device's memory takes them over before the next `forward`; one that computes in the arena has nothing to do.
    ///
    /// # Errors
    /// A block that the arena does not have, a device that failed.
    fn landed(&mut self, blocks: &[BlockId]) -> Result<(), Error> {
        let _ = blocks;
        Ok(())
    }

    /// Computes one step: K and V of every input's tokens into the blocks of its table, and the logits asked for. Attention
    /// reads K and V back from the arena, those of this very step too.
    ///
    /// `after_layer(l)` is called on the calling thread, once per layer and in order, as soon as K and V of layer `l` of
    /// **all** tokens of the batch are in the arena and will not be written again by this call; the rest of the layer
    /// (attention, MLP) may still be to come, so a push to a peer overlaps with it.
    ///
    /// # Errors
    /// The whole batch is checked before anything is written: on an error the arena is as before.
    fn forward(&mut self, batch: &[SeqInput<'_>], after_layer: &mut dyn FnMut(usize)) -> Result<Logits, Error>;

    /// The same, where not all rows of logits need be whole: `needs` says what is needed of each, in order, and nothing of one means
    /// all of it. A backend that has its logits elsewhere than in the host's memory brings no more than that; others return whole
    /// rows, which serve as well.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn forward_few(
        &mut self,
        batch: &[SeqInput<'_>],
        needs: &[Need],
        after_layer: &mut dyn FnMut(usize),
    ) -> Result<Rows, Error> {
        let _ = needs;
        self.forward(batch, after_layer).map(Rows::from)
    }
}

impl Backend for Box<dyn Backend> {
    fn spec(&self) -> &ModelConfig {
        (**self).spec()
    }

    fn groups(&self) -> &KvGroups {
        (**self).groups()
    }

    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), Error> {
        (**self).copy_blocks(copies)
    }

    fn landed(&mut self, blocks: &[BlockId]) -> Result<(), Error> {
        (**self).landed(blocks)
    }

    fn forward(&mut self, batch: &[SeqInput<'_>], after_layer: &mut dyn FnMut(usize)) -> Result<Logits, Error> {
        (**self).forward(batch, after_layer)
    }

    fn forward_few(
        &mut self,
        batch: &[SeqInput<'_>],
        needs: &[Need],
        after_layer: &mut dyn FnMut(usize),
    ) -> Result<Rows, Error> {
        (**self).forward_few(batch, needs, after_layer)
    }
}

/// Checks a batch against the model and the arena: after this no index derived from it is out of bounds.
pub(crate) fn check_batch(
    config: &ModelConfig,
    layout: &KvLayout,
    groups: &KvGroups,
    blocks: usize,
    batch: &[SeqInput<'_>],
) -> Result<(), Error> {
    for (input, seq) in batch.iter().enumerate() {
        if seq.tokens.is_empty() {
            return Err(Error::NoTokens { input });
        }
        if let Some(&token) = seq.tokens.iter().find(|token| token.0 as usize >= config.vocab) {
            return Err(Error::TokenOutOfVocabulary { input, token, vocab: config.vocab });
        }
        let end = seq.start.saturating_add(seq.tokens.len());
        if end > config.max_len {
            return Err(Error::TooLong { input, start: seq.start, end, max_len: config.max_len });
        }
        if seq.rows > seq.tokens.len() {
            return Err(Error::TooManyRows { input, rows: seq.rows, tokens: seq.tokens.len() });
        }
        if seq.tables.len() != groups.len() {
            return Err(Error::WrongTables { input, tables: seq.tables.len(), groups: groups.len() });
        }
        for (group, table) in groups.iter().zip(seq.tables) {
            // The first block that a token of this step looks at, and the end of those.
            let (first, needed) = match group.kind {
                GroupKind::Full => (0, layout.blocks_for(end)),
                GroupKind::Sliding { window } => {
                    let seen_from = (seq.start + 1).saturating_sub(window as usize);
                    (seen_from / layout.block_size as usize, layout.blocks_for(end))
                }
                GroupKind::Recurrent => (0, 1),
            };
            let Some(used) = table.get(first..needed) else {
                return Err(Error::TableTooShort { input, blocks: table.len(), tokens: end, needed });
            };
            if let Some(&block) = used.iter().find(|block| block.0 as usize >= blocks) {
                return Err(Error::BlockOutOfArena { input, block, blocks });
            }
        }
    }
    Ok(())
}
