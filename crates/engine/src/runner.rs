//! The seam between scheduling and computing: a [`Runner`] turns a batch into logits.

use kvasir_model::{Backend, Error, Logits, Need, Rows, SeqInput};
use kvasir_types::{BlockId, KvGroups, TokenId};

/// What the engine must know of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunnerSpec {
    /// Token ids are below this; length of a row of logits.
    pub vocab: usize,
    /// Most tokens in a sequence, prompt and answer together.
    pub max_len: usize,
    /// Tokens that end an answer.
    pub eos: Vec<TokenId>,
    /// Which layers share a block: a sequence has one block table for each group.
    pub groups: KvGroups,
}

/// Computes one step of many sequences. Implemented by [`ModelRunner`] and, for tests, [`crate::ScriptedRunner`].
pub trait Runner: Send {
    /// The model.
    fn spec(&self) -> &RunnerSpec;

    /// Computes K and V of every input's tokens into the blocks of its table, calls `after_layer(l)` once they are
    /// complete for layer `l`, and returns the rows of logits that were asked for, in order. On an error or a
    /// panic nothing that it wrote is used.
    fn run(&mut self, batch: &[SeqInput<'_>], after_layer: &mut dyn FnMut(usize)) -> Result<Logits, Error>;

    /// The same, where `needs` says how much of each row is needed; whole rows always serve.
    fn run_few(
        &mut self,
        batch: &[SeqInput<'_>],
        needs: &[Need],
        after_layer: &mut dyn FnMut(usize),
    ) -> Result<Rows, Error> {
        let _ = needs;
        self.run(batch, after_layer).map(Rows::from)
    }

    /// Copies whole blocks, `(from, to)`, before the next run.
    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), Error>;

    /// Others have written these blocks of the arena, which the next run or copy may read.
    fn landed(&mut self, blocks: &[BlockId]) -> Result<(), Error> {
        let _ = blocks;
        Ok(())
    }
}

/// A model backend as a runner.
#[derive(Debug)]
pub struct ModelRunner<B> {
    backend: B,
    spec: RunnerSpec,
}

impl<B: Backend> ModelRunner<B> {
    /// Drives `backend`.
    pub fn new(backend: B) -> Self {
        let config = backend.spec();
        let (vocab, max_len, eos) = (config.vocab, config.max_len, config.eos.clone());
        let spec = RunnerSpec { vocab, max_len, eos, groups: backend.groups().clone() };
        Self { backend, spec }
    }
}

impl<B: Backend> Runner for ModelRunner<B> {
    fn spec(&self) -> &RunnerSpec {
        &self.spec
    }

    fn run(&mut self, batch: &[SeqInput<'_>], after_layer: &mut dyn FnMut(usize)) -> Result<Logits, Error> {
        self.backend.forward(batch, after_layer)
    }

    fn run_few(
        &mut self,
        batch: &[SeqInput<'_>],
        needs: &[Need],
        after_layer: &mut dyn FnMut(usize),
    ) -> Result<Rows, Error> {
        self.backend.forward_few(batch, needs, after_layer)
    }

    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), Error> {
        self.backend.copy_blocks(copies)
    }

    fn landed(&mut self, blocks: &[BlockId]) -> Result<(), Error> {
        self.backend.landed(blocks)
    }
}
