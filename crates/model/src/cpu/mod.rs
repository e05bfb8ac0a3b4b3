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
    rope::Rotations,
    weights::{EMBEDDING, FINAL_NORM, LM_HEAD, Tensor},
};

mod arena;
mod attention;
mod exec;
mod kernels;
mod kv;
pub mod limits;
mod linear;
mod pool;

pub use arena::HostArena;
use attention::{Heads, Span, attend};
pub use exec::Compute;
use exec::Exec;
use kernels::Isa;
use kv::{Half, KvArena};
use linear::{Linear, RmsNorm};

/// Computes a model with the processor's vector units.
pub struct CpuBackend {
    config: ModelConfig,
    groups: KvGroups,
    exec: Exec,
    kv: KvArena,
    frequencies: Vec<f32>,
    embedding: Tensor,
    layers: Vec<Layer>,
    final_norm: RmsNorm,
    output: Linear,
}

struct Layer {
    input_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    qk_norms: Option<(RmsNorm, RmsNorm)>,
    o: Linear,
    mlp_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
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
        Self::with_isa(folder, layout, memory, threads, compute, Isa::detect())
    }

    fn with_isa(
        folder: &Folder,
        layout: KvLayout,
        memory: Arc<dyn HostMemory>,
        threads: usize,
        compute: Compute,
        isa: Isa,
    ) -> Result<Self, Error> {
        let config = folder.config().clone();
        let expected = config.kv_layout(layout.block_size, layout.dtype);
        if layout != expected || layout.check().is_err() {
            return Err(Error::Layout { layout, expected });
        }
        let weights = folder.weights();
        let embedding = weights.get(EMBEDDING).clone();
        let output = if config.tied_embeddings { embedding.clone() } else { weights.get(LM_HEAD).clone() };
        let backend = Self {
            exec: Exec::new(isa, compute, threads)?,
            kv: KvArena::new(memory, layout)?,
            frequencies: config.rope.frequencies(config.head_dim),
            layers: (0..config.layers).map(|layer| Layer::load(folder, layer)).collect(),
            final_norm: RmsNorm::load(weights, FINAL_NORM, config.rms_eps),
            output: Linear::of(output),
            embedding,
            groups: config.kv_groups(),
            config,
        };
        tracing::info!(isa = isa.as_str(), ?compute, threads, blocks = backend.kv.blocks(), "cpu backend ready");
        Ok(backend)
    }

    /// Normalises (where the model does) and rotates every head of every row, in place.
    fn rotate(&self, x: &mut [f32], heads: usize, norm: Option<&RmsNorm>, rotations: &Rotations, row_of: &[usize]) {
        let width = heads * self.config.head_dim;
        self.exec.rows(x, width, 10 * x.len(), |first, part| {
            let mut scratch = Vec::new();
            for (row, heads) in part.chunks_exact_mut(width).enumerate() {
                for head in heads.chunks_exact_mut(self.config.head_dim) {
                    if let Some(norm) = norm {
                        norm.apply_one(&self.exec, head, &mut scratch);
                    }
                    rotations.apply(row_of[first + row], head);
                }
            }
        });
    }

    /// Writes K and V of every token of the batch for one layer.
    fn write_kv(&mut self, layer: usize, batch: &[SeqInput<'_>], k: &[f32], v: &[f32]) {
        let (width, size) = (self.config.kv_width(), self.kv.layout().block_size as usize);
        let (group, place) = self.groups.place(layer);
        let positions = |seq: &SeqInput<'_>| seq.start..seq.start + seq.tokens.len();
        let tokens = batch.iter().flat_map(|seq| positions(seq).map(|at| (&seq.tables[group], at)));
        for ((table, at), (k, v)) in tokens.zip(k.chunks_exact(width).zip(v.chunks_exact(width))) {
            let (block, slot) = (table[at / size], at % size);
            self.kv.write(block, place, Half::Keys, slot, k);
            self.kv.write(block, place, Half::Values, slot, v);
        }
    }
}

impl Layer {
    fn load(folder: &Folder, layer: usize) -> Self {
        let (config, weights) = (folder.config(), folder.weights());
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let linear = |part: &str, bias: bool| Linear::load(weights, &name(part), bias);
        let norm = |part: &str| RmsNorm::load(weights, &name(part), config.rms_eps);
        Self {
            input_norm: norm("input_layernorm.weight"),
            q: linear("self_attn.q_proj", config.qkv_bias),
            k: linear("self_attn.k_proj", config.qkv_bias),
            v: linear("self_attn.v_proj", config.qkv_bias),
            qk_norms: config.qk_norm.then(|| (norm("self_attn.q_norm.weight"), norm("self_attn.k_norm.weight"))),
            o: linear("self_attn.o_proj", config.o_bias),
            mlp_norm: norm("post_attention_layernorm.weight"),
            gate: linear("mlp.gate_proj", config.mlp_bias),
            up: linear("mlp.up_proj", config.mlp_bias),
            down: linear("mlp.down_proj", config.mlp_bias),
        }
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
        let (hidden, kv_heads) = (self.config.hidden, self.config.kv_heads);
        let heads = Heads { heads: self.config.heads, kv_heads, head_dim: self.config.head_dim };

        // One row per token of the batch, input after input.
        let mut rows = Rows::of(batch);
        let mut x = vec![0.0; rows.original.len() * hidden];
        for (row, token) in x.chunks_exact_mut(hidden).zip(batch.iter().flat_map(|seq| seq.tokens)) {
            self.embedding.row_into(token.0 as usize, row);
        }
        let positions = batch.iter().flat_map(|seq| seq.start..seq.start + seq.tokens.len());
        let rotations = Rotations::new(&self.frequencies, positions);

        let (mut normed, mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut attended, mut change, mut gate, mut up) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for index in 0..self.layers.len() {
            let layer = &self.layers[index];
            let norms = layer.qk_norms.as_ref();
            layer.input_norm.apply(&self.exec, &x, &mut normed);
            // The last layer's queries are needed for fewer rows: below.
            let last = index + 1 == self.layers.len();
            if last {
                Linear::apply_all(&self.exec, &normed, rows.len(), [(&layer.k, &mut k), (&layer.v, &mut v)]);
            } else {
                let maps = [(&layer.q, &mut q), (&layer.k, &mut k), (&layer.v, &mut v)];
                Linear::apply_all(&self.exec, &normed, rows.len(), maps);
            }
            self.rotate(&mut k, kv_heads, norms.map(|(_, k)| k), &rotations, &rows.original);
            self.write_kv(index, batch, &k, &v);
            after_layer(index);

            if last {
                // Beyond this point only rows whose logits are wanted matter to anyone.
                let wanted = Rows::wanted(batch);
                keep(&mut x, hidden, &wanted.original);
                keep(&mut normed, hidden, &wanted.original);
                rows = wanted;
                self.layers[index].q.apply(&self.exec, &normed, rows.len(), &mut q);
            }
            let layer = &self.layers[index];
            let norms = layer.qk_norms.as_ref();
            self.rotate(&mut q, heads.heads, norms.map(|(q, _)| q), &rotations, &rows.original);
            let (group, place) = self.groups.place(index);
            let spans: Vec<Span<'_>> = rows.spans(batch, group);
            attend(&self.exec, &self.kv, place, heads, &spans, &q, &mut attended);
            layer.o.apply(&self.exec, &attended, rows.len(), &mut change);
            self.add(&mut x, &change);

            layer.mlp_norm.apply(&self.exec, &x, &mut normed);
            Linear::apply_all(&self.exec, &normed, rows.len(), [(&layer.gate, &mut gate), (&layer.up, &mut up)]);
            let width = layer.gate.width();
            self.exec.rows(&mut gate, width, 20 * up.len(), |first, part| {
                kernels::silu_mul(self.exec.isa, part, &up[first * width..]);
            });
            layer.down.apply(&self.exec, &gate, rows.len(), &mut change);
            self.add(&mut x, &change);
        }

        self.final_norm.apply(&self.exec, &x, &mut normed);
        let mut logits = Logits { vocab: self.config.vocab, rows: Vec::new() };
        self.output.apply(&self.exec, &normed, rows.len(), &mut logits.rows);
        Ok(logits)
    }
}

impl CpuBackend {
    fn add(&self, x: &mut [f32], change: &[f32]) {
        let width = self.config.hidden;
        self.exec.rows(x, width, x.len(), |first, part| kernels::add(self.exec.isa, part, &change[first * width..]));
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
