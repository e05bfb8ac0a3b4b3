//! The layers that are a weight and little else: linear maps and norms.

use super::{
    exec::Exec,
    kernels::{self, Matrix, Output, Rows},
};
use crate::{
    graph::{LinearSpec, NormSpec},
    weights::{Tensor, Weights},
};

/// Activations of one task: about half a second-level cache, so they stay there while the weights pass by.
const BLOCK_BYTES: usize = 384 << 10;
/// Tokens of one task at most and at least; multiples of every tile's tokens (6, 4, 3) so that few are left over.
const MAX_BLOCK: usize = 192;
const MIN_BLOCK: usize = 24;
/// Weight rows of one task at least: below, the activations are loaded too often for the work done with them.
const MIN_PANEL: usize = 16;

/// `y = W x + b`, with the weights used where they are mapped.
#[derive(Debug)]
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Vec<f32>>,
}

impl Linear {
    /// The map that `spec` describes.
    pub(super) fn load(weights: &Weights, spec: &LinearSpec) -> Self {
        let bias = spec.bias.then(|| weights.get(&format!("{}.bias", spec.name)).to_f32());
        Self { weight: weights.get(&format!("{}.weight", spec.name)).clone(), bias }
    }

    /// A map without a bias.
    pub(super) fn of(weight: Tensor) -> Self {
        Self { weight, bias: None }
    }

    /// Width of its output.
    pub(super) fn width(&self) -> usize {
        self.weight.rows
    }

    /// Applies it to `tokens` rows of `x`; the result replaces what `out` held.
    pub(super) fn apply(&self, exec: &Exec, x: &[f32], tokens: usize, out: &mut Vec<f32>) {
        let Tensor { rows, cols, dtype, .. } = self.weight;
        out.resize(tokens * rows, 0.0);
        let matrix = Matrix::new(self.weight.bytes(), dtype, rows, cols);
        let flops = 2 * tokens * rows * cols;

        // Tasks are a grid of token blocks × panels of weight rows; a token's neighbours in a block never change its bits.
        let block = (BLOCK_BYTES / (cols * 4) / MIN_BLOCK * MIN_BLOCK).clamp(MIN_BLOCK, MAX_BLOCK);
        let blocks = tokens.div_ceil(block);
        let panels = exec.pieces(flops).div_ceil(blocks.max(1)).max(rows.div_ceil(256));
        let panel = rows.div_ceil(panels).next_multiple_of(8).max(MIN_PANEL);
        let output = Output::new(out);
        exec.each(blocks * rows.div_ceil(panel), flops, |task| {
            // Neighbouring tasks share a panel: it is fetched from memory once and found in a shared cache after.
            let (token, row) = (task % blocks * block, task / blocks * panel);
            let count = block.min(tokens - token);
            let x = Rows::new(&x[token * cols..], cols, count);
            let part = matrix.slice(row, panel.min(rows - row));
            // SAFETY: each task writes the elements of its own block and panel.
            unsafe { kernels::matmul(exec.isa, x, part, &output, token * rows + row, rows) };
        });
        if let Some(bias) = &self.bias {
            exec.rows(out, rows, tokens * rows, |_, part| {
                part.chunks_exact_mut(rows).for_each(|row| kernels::add(exec.isa, row, bias));
            });
        }
    }
}

/// RMS norm with a weight per element.
#[derive(Debug)]
pub(super) struct RmsNorm {
    weight: Vec<f32>,
    eps: f32,
}

impl RmsNorm {
    /// The norm that `spec` describes.
    pub(super) fn load(weights: &Weights, spec: &NormSpec) -> Self {
        let mut weight = weights.get(&format!("{}.weight", spec.name)).to_f32();
        weight.iter_mut().for_each(|weight| *weight += spec.offset);
        Self { weight, eps: spec.eps }
    }

    /// Normalises every row of `x` into `out`.
    pub(super) fn apply(&self, exec: &Exec, x: &[f32], out: &mut Vec<f32>) {
        let width = self.weight.len();
        out.resize(x.len(), 0.0);
        exec.rows(out, width, 4 * x.len(), |first, part| {
            for (x, out) in x[first * width..].chunks_exact(width).zip(part.chunks_exact_mut(width)) {
                kernels::rms_norm(exec.isa, x, &self.weight, self.eps, out);
            }
        });
    }

    /// Normalises one row in place.
    pub(super) fn apply_one(&self, exec: &Exec, row: &mut [f32], scratch: &mut Vec<f32>) {
        scratch.clear();
        scratch.extend_from_slice(row);
        kernels::rms_norm(exec.isa, scratch, &self.weight, self.eps, row);
    }
}
