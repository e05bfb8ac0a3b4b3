//! The seam between what is computed and on what: a [`Backend`] turns a batch of token runs into logits.
//!
//! One `forward` takes a mixed batch: sequences that decode (one token each) beside chunks of prompts (many tokens).
//! For each input the backend
//!
//! 1. computes K and V of its tokens, layer by layer, and writes them into the blocks its table names;
//! 2. attends over all positions `0..start + tokens.len()`, reading K and V **back from the arena**, its own included,
//!    so that what was computed here, landed from a peer or came out of a cache is the same to the bit;
//! 3. if asked, returns the logits that follow its last token.
//!
//! The law every backend keeps: the result for a token does not depend on what else is in the batch, on how the prompt
//! was cut into chunks, or on the number of threads. Not "nearly": to the bit. A prompt computed on a prefill worker in
//! one cut and resumed on a decode worker in another must continue with the same tokens.

use kvasir_types::{BlockId, KvLayout, TokenId};

use crate::{Error, ModelConfig};

/// The tokens of one sequence to compute in this step.
#[derive(Clone, Copy, Debug)]
pub struct SeqInput<'a> {
    /// Tokens to compute, at least one. KV of all positions before `start` is in the blocks already.
    pub tokens: &'a [TokenId],
    /// Position of `tokens[0]` in the sequence.
    pub start: usize,
    /// Blocks of the sequence, in order, from position 0 on; at least as many as `start + tokens.len()` tokens need.
    pub table: &'a [BlockId],
    /// Whether the logits after the last of `tokens` are wanted.
    pub logits: bool,
}

/// One row of logits per input that asked for them, in the batch's order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logits {
    /// Length of a row.
    pub vocab: usize,
    /// All rows, one after the other.
    pub rows: Vec<f32>,
}

impl Logits {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len().checked_div(self.vocab).unwrap_or(0)
    }

    /// Whether no input asked for logits.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows in order.
    pub fn iter(&self) -> impl Iterator<Item = &[f32]> {
        self.rows.chunks_exact(self.vocab.max(1))
    }
}

/// Computes a model on some device, batch by batch.
///
/// The law all implementations keep: what comes out for a token does not depend, not by a bit, on what else is in the
/// batch, on how its sequence was cut into chunks, or on the number of threads.
pub trait Backend: Send {
    /// The model: vocabulary, context length, end tokens, shapes.
    fn spec(&self) -> &ModelConfig;

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
}

/// Checks a batch against the model and the arena: after this no index derived from it is out of bounds.
pub(crate) fn check_batch(
    config: &ModelConfig,
    layout: &KvLayout,
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
        let needed = layout.blocks_for(end);
        let Some(used) = seq.table.get(..needed) else {
            return Err(Error::TableTooShort { input, blocks: seq.table.len(), tokens: end, needed });
        };
        if let Some(&block) = used.iter().find(|block| block.0 as usize >= blocks) {
            return Err(Error::BlockOutOfArena { input, block, blocks });
        }
    }
    Ok(())
}
