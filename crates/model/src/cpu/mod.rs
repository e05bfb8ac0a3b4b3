//! The CPU backend: the reference all other backends are compared with, and fast enough to serve small models.
//!
//! Weights are used where they are mapped, in their own type; arithmetic is `f32`. The law of the seam, the same bits
//! whatever the batch, the chunks and the threads, holds by construction: every row is computed by kernels whose order of
//! sums depends on that row alone (see `kernels`), and what crosses rows (attention) goes through the arena.

#![expect(unsafe_code, reason = "SIMD kernels, and outputs that several threads write in disjoint parts")]

use std::{fmt, sync::Arc};

use kvasir_types::{BlockId, HostMemory, KvGroups, KvLayout};

use crate::{
    Backend, Error, Folder, Logits, ModelConfig, SeqInput,
    backend::check_batch,
    graph::AttentionKind,
    group::{self, Alone, Group},
    rope::Rotations,
    weights::{EMBEDDING, LM_HEAD, Tensor},
};

mod arena;
mod attention;
mod exec;
mod grouped;
mod kernels;
mod kv;
mod latent;
mod layer;
pub mod limits;
mod linear;
mod mlp;
mod pool;

pub use arena::HostArena;
use attention::{Span, attend};
pub use exec::Compute;
use exec::Exec;
use kernels::Isa;
use kv::{Half, KvArena};
use layer::{Layer, Rotated};
use linear::{Linear, RmsNorm};

/// Computes a model with the processor's vector units.
pub struct CpuBackend {
    config: ModelConfig,
    groups: KvGroups,
    exec: Exec,
    kv: KvArena,
    ropes: Vec<Frequencies>,
    embedding: Tensor,
    layers: Vec<Layer>,
    final_norm: RmsNorm,
    output: Linear,
}

/// One of the model's rotations.
struct Frequencies {
    of_pairs: Vec<f32>,
    magnitude: f32,
}

impl CpuBackend {
    /// A backend for the model of `folder` over the blocks in `memory`, computing on at most `threads` threads (the one
    /// that calls `forward` waits while they work).
    ///
    /// # Errors
    /// A layout that is not the model's, an arena that holds no block, threads that cannot be started.
    pub fn new(folder: &Folder, layout: KvLayout, memory: Arc<dyn HostMemory>, threads: usize) -> Result<Self, Error> {
        Self::with_compute(folder, layout, memory, threads, Compute::default())
    }

    /// The same with a choice of arithmetic.
    ///
    /// # Errors
    /// As for [`CpuBackend::new`].
    pub fn with_compute(
        folder: &Folder,
        layout: KvLayout,
        memory: Arc<dyn HostMemory>,
        threads: usize,
        compute: Compute,
    ) -> Result<Self, Error> {
        Self::of(folder, layout, memory, Arc::new(Alone), (threads, compute, Isa::detect()))
    }

    /// One of the ranks of a group, all of which are over the same blocks.
    pub(crate) fn rank(
        folder: &Folder,
        layout: KvLayout,
        memory: Arc<dyn HostMemory>,
        group: Arc<dyn Group>,
        (threads, compute): (usize, Compute),
    ) -> Result<Self, Error> {
        Self::of(folder, layout, memory, group, (threads, compute, Isa::detect()))
    }

    fn of(
        folder: &Folder,
        layout: KvLayout,
        memory: Arc<dyn HostMemory>,
        group: Arc<dyn Group>,
        (threads, compute, isa): (usize, Compute, Isa),
    ) -> Result<Self, Error> {
        let config = folder.config().clone();
        let place = group.place();
        group::check(&config, place.size)?;
        let expected = config.kv_layout(layout.block_size, layout.dtype);
        if layout != expected || layout.check().is_err() {
            return Err(Error::Layout { layout, expected });
        }
        let weights = folder.weights();
        let embedding = weights.get(EMBEDDING).clone();
        let output = if config.tied_embeddings { embedding.clone() } else { weights.get(LM_HEAD).clone() };
        let rotated = match &config.layers[0].attention.kind {
            AttentionKind::Grouped(grouped) => grouped.head_dim,
            AttentionKind::Latent(latent) => latent.rope,
        };
        let frequencies =
            |rope: &crate::Rope| Frequencies { of_pairs: rope.frequencies(rotated), magnitude: rope.magnitude() };
        let backend = Self {
            exec: Exec::of(group, isa, compute, threads)?,
            kv: KvArena::of(memory, layout, place)?,
            ropes: config.ropes.iter().map(frequencies).collect(),
            layers: config.layers.iter().map(|layer| Layer::load(weights, layer, place)).collect(),
            final_norm: RmsNorm::load(weights, &config.final_norm),
            output: Linear::of(output).part(place.part(config.vocab)),
            embedding,
            groups: config.kv_groups(),
            config,
        };
        tracing::info!(isa = isa.as_str(), ?compute, threads, blocks = backend.kv.blocks(), "cpu backend ready");
        Ok(backend)
    }

    /// Whether all ranks go on ([`Group::agree`]).
    #[cfg(test)]
    pub(crate) fn agree(&self, mine: Result<(), Error>) -> Result<(), Error> {
        self.exec.group.agree(mine)
    }

    /// The embeddings of the batch's tokens, a row each.
    fn embed(&self, batch: &[SeqInput<'_>], rows: usize) -> Vec<f32> {
        let (width, scale) = (self.config.hidden, self.config.embedding_scale);
        let mut x = vec![0.0; rows * width];
        for (row, token) in x.chunks_exact_mut(width).zip(batch.iter().flat_map(|seq| seq.tokens)) {
            self.embedding.row_into(token.0 as usize, row);
            if scale != 1.0 {
                row.iter_mut().for_each(|value| *value *= scale);
            }
        }
        x
    }

    /// Writes what is cached of every token of the batch for one layer.
    fn write_kv(&mut self, layer: usize, batch: &[SeqInput<'_>], k: &[f32], v: &[f32]) {
        let layout = *self.kv.layout();
        let (heads, size) = (self.kv.heads(), layout.block_size as usize);
        let (k_width, v_width) = (heads * layout.k_dim as usize, heads * layout.v_dim as usize);
        let (group, place) = self.groups.place(layer);
        let positions = |seq: &SeqInput<'_>| seq.start..seq.start + seq.tokens.len();
        let tokens = batch.iter().flat_map(|seq| positions(seq).map(|at| (&seq.tables[group], at)));
        for (row, (table, at)) in tokens.enumerate() {
            let (block, slot) = (table[at / size], at % size);
            self.kv.write(self.exec.isa, block, place, Half::Keys, slot, &k[row * k_width..(row + 1) * k_width]);
            if v_width > 0 {
                self.kv.write(self.exec.isa, block, place, Half::Values, slot, &v[row * v_width..(row + 1) * v_width]);
            }
        }
    }

    /// Adds `change` to the residual stream `x`, normalised first where the model does so.
    fn add(&self, x: &mut [f32], change: &mut Vec<f32>, norm: Option<&RmsNorm>, scratch: &mut Vec<f32>) {
        if let Some(norm) = norm {
            norm.apply(&self.exec, change, scratch);
            std::mem::swap(change, scratch);
        }
        let width = self.config.hidden;
        self.exec.rows(x, width, x.len(), |first, part| kernels::add(self.exec.isa, part, &change[first * width..]));
    }

    /// The logits that follow the rows of `x`, of this rank's part of the vocabulary.
    fn logits(&self, x: &[f32], rows: usize) -> Logits {
        let mut normed = Vec::new();
        self.final_norm.apply(&self.exec, x, &mut normed);
        let mut logits = Logits { vocab: self.output.width(), rows: Vec::new() };
        self.output.apply(&self.exec, &normed, rows, &mut logits.rows);
        if let Some(cap) = self.config.final_soft_cap {
            let (width, flops) = (logits.vocab, 20 * logits.rows.len());
            self.exec.rows(&mut logits.rows, width, flops, |_, part| kernels::soft_cap(self.exec.isa, part, cap));
        }
        logits
    }
}

impl Backend for CpuBackend {
    fn spec(&self) -> &ModelConfig {
        &self.config
    }

    fn groups(&self) -> &KvGroups {
        &self.groups
    }

    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), Error> {
        self.kv.copy(copies)
    }

    fn forward(&mut self, batch: &[SeqInput<'_>], after_layer: &mut dyn FnMut(usize)) -> Result<Logits, Error> {
        check_batch(&self.config, self.kv.layout(), &self.groups, self.kv.blocks(), batch)?;
        let hidden = self.config.hidden;

        // One row per token of the batch, input after input.
        let mut rows = Rows::of(batch);
        let mut x = self.embed(batch, rows.len());
        let positions = || batch.iter().flat_map(|seq| seq.start..seq.start + seq.tokens.len());
        let rotations: Vec<Rotations> =
            self.ropes.iter().map(|rope| Rotations::new(&rope.of_pairs, rope.magnitude, positions())).collect();

        let (mut normed, mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut attended, mut change, mut scratch) = (Vec::new(), Vec::new(), mlp::Scratch::default());
        for index in 0..self.layers.len() {
            let Layer { attention_norm, attention, .. } = &self.layers[index];
            let rotations = &rotations[attention.rope];
            attention_norm.apply(&self.exec, &x, &mut normed);
            let rotated = Rotated { rotations, row_of: &rows.original };
            // The last layer's queries are needed for fewer rows: below.
            let last = index + 1 == self.layers.len();
            attention.project(&self.exec, &normed, rotated, (!last).then_some(&mut q), &mut k, &mut v);
            self.write_kv(index, batch, &k, &v);
            if self.layers[index].attention.is_latent() {
                self.exec.group.barrier()?;
            }
            after_layer(index);

            let Layer { attention, attention_post_norm, mlp_norm, mlp, mlp_post_norm, .. } = &self.layers[index];
            if last {
                // Beyond this point only rows whose logits are wanted matter to anyone.
                let wanted = Rows::wanted(batch);
                keep(&mut x, hidden, &wanted.original);
                keep(&mut normed, hidden, &wanted.original);
                rows = wanted;
                attention.queries(&self.exec, &normed, Rotated { rotations, row_of: &rows.original }, &mut q);
            }
            let (group, place) = self.groups.place(index);
            let spans = rows.spans(batch, group);
            attend(&self.exec, &self.kv, place, attention.heads, &spans, &q, &mut attended);
            attention.output(&self.exec, &mut attended, rows.len(), &mut change)?;
            self.add(&mut x, &mut change, attention_post_norm.as_ref(), &mut normed);

            mlp_norm.apply(&self.exec, &x, &mut normed);
            mlp.apply(&self.exec, &normed, rows.len(), &mut scratch, &mut change)?;
            self.add(&mut x, &mut change, mlp_post_norm.as_ref(), &mut normed);
        }
        Ok(self.logits(&x, rows.len()))
    }
}

impl fmt::Debug for CpuBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuBackend")
            .field("exec", &self.exec)
            .field("blocks", &self.kv.blocks())
            .finish_non_exhaustive()
    }
}

/// The rows a step computes with: where each came from in the whole batch, and how they group into sequences.
struct Rows {
    original: Vec<usize>,
    runs: Vec<Run>,
}

/// Neighbouring tokens of one sequence.
struct Run {
    /// Which input of the batch.
    input: usize,
    /// Its first row among the rows of the step.
    first_row: usize,
    /// Position of its first token.
    start: usize,
    count: usize,
}

impl Rows {
    /// Every token of the batch.
    fn of(batch: &[SeqInput<'_>]) -> Self {
        Self::last(batch, |seq| seq.tokens.len())
    }

    /// The tokens whose logits are wanted.
    fn wanted(batch: &[SeqInput<'_>]) -> Self {
        Self::last(batch, |seq| seq.rows)
    }

    /// The last tokens of each input, as many as `count` says.
    fn last(batch: &[SeqInput<'_>], count: impl Fn(&SeqInput<'_>) -> usize) -> Self {
        let mut rows = Self { original: Vec::new(), runs: Vec::new() };
        let mut end = 0;
        for (input, seq) in batch.iter().enumerate() {
            end += seq.tokens.len();
            let count = count(seq);
            if count > 0 {
                let start = seq.start + seq.tokens.len() - count;
                rows.runs.push(Run { input, first_row: rows.original.len(), start, count });
                rows.original.extend(end - count..end);
            }
        }
        rows
    }

    /// The same as attention wants it for the layers of one group.
    fn spans<'a>(&self, batch: &[SeqInput<'a>], group: usize) -> Vec<Span<'a>> {
        let span = |run: &Run| Span {
            table: &batch[run.input].tables[group],
            first_row: run.first_row,
            start: run.start,
            count: run.count,
        };
        self.runs.iter().map(span).collect()
    }

    fn len(&self) -> usize {
        self.original.len()
    }
}

/// Keeps the named rows (ascending) of `data`, in their order.
fn keep(data: &mut Vec<f32>, width: usize, rows: &[usize]) {
    for (to, &from) in rows.iter().enumerate() {
        data.copy_within(from * width..(from + 1) * width, to * width);
    }
    data.truncate(rows.len() * width);
}

#[cfg(test)]
mod tests;
