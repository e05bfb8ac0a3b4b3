//! The layers that are a weight and little else: linear maps and norms.
//!
//! A product is a grid of tasks: blocks of tokens × panels of weight rows. A block's activations stay in the second-level
//! cache while a panel's weights pass by once; neighbouring tasks share the block, so a thread reads activations rarely and
//! weights from the cache they share. With one token the same grid is a walk through the weights at the memory's speed.
//! A token's neighbours in a block never change its bits.

use std::ops::Range;

use super::{
    exec::{Compute, Exec},
    kernels::{self, Matrix, Output, Rows, fast},
};
use crate::{
    graph::{LinearSpec, NormSpec},
    weights::{Scale, Tensor, Weights},
};

/// Activations of one task: most of a second-level cache.
const BLOCK_BYTES: usize = 768 << 10;
/// Tokens of one task at most and at least.
const MAX_BLOCK: usize = 256;
const MIN_BLOCK: usize = 24;
/// Tokens of a block are a multiple of every tile's (6, 4), so that none is left over in the middle.
const BLOCK_STEP: usize = 12;
/// Weights of one task: at the speed of memory some 5 µs, so that a section's end is not ragged by more.
const PANEL_BYTES: usize = 128 << 10;
/// Weight rows of one task at least and at most, in steps of a cache line of output.
const MIN_PANEL: usize = 16;
const MAX_PANEL: usize = 128;

/// `y = W x + b`, with the weights used where they are mapped.
#[derive(Debug)]
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Vec<f32>>,
    exact: bool,
}

impl Linear {
    /// The map that `spec` describes.
    pub(super) fn load(weights: &Weights, spec: &LinearSpec) -> Self {
        let bias = spec.bias.then(|| weights.get(&format!("{}.bias", spec.name)).to_f32());
        Self { weight: weights.get(&format!("{}.weight", spec.name)).clone(), bias, exact: false }
    }

    /// A map without a bias.
    pub(super) fn of(weight: Tensor) -> Self {
        Self { weight, bias: None, exact: false }
    }

    /// Some of its outputs.
    pub(super) fn part(self, rows: Range<usize>) -> Self {
        let bias = self.bias.map(|bias| bias[rows.clone()].to_vec());
        Self { weight: self.weight.part(rows), bias, ..self }
    }

    /// The same, computed exactly whatever the backend's choice: where a rounding would not blur a result but flip a choice.
    pub(super) fn exact(self) -> Self {
        Self { exact: true, ..self }
    }

    /// Whether bf16 products will do, and are to be had. (Where blocks have scales, sums of 128 products are too short for
    /// them to pay.)
    fn is_fast(&self) -> bool {
        !self.exact && fast::takes(self.weight.dtype) && !matches!(self.weight.scale(), Scale::Blocks { .. })
    }

    /// Width of its output.
    pub(super) fn width(&self) -> usize {
        self.weight.rows
    }

    /// Applies it to `tokens` rows of `x`; the result replaces what `out` held.
    pub(super) fn apply(&self, exec: &Exec, x: &[f32], tokens: usize, out: &mut Vec<f32>) {
        Self::apply_all(exec, x, tokens, [(self, out)]);
    }

    /// Applies several to the same rows, as one section of tasks.
    ///
    /// # Panics
    /// If they do not take rows of one width.
    pub(super) fn apply_all<const N: usize>(exec: &Exec, x: &[f32], tokens: usize, maps: [(&Self, &mut Vec<f32>); N]) {
        if tokens == 0 {
            maps.into_iter().for_each(|(_, out)| out.clear());
            return;
        }
        let cols = x.len() / tokens;
        let fast = exec.compute == Compute::Fast && maps.iter().all(|(map, _)| map.is_fast());
        let mut flops = 0;
        let maps = maps.map(|(map, out)| {
            assert_eq!(map.weight.cols, cols, "activations are of the map's width");
            flops += 2 * tokens * map.weight.rows * cols;
            out.resize(tokens * map.weight.rows, 0.0);
            (map.matrix(), Output::new(out))
        });

        let mut packed = exec.scratch();
        if fast {
            packed.resize(tokens * fast::steps(cols), fast::Step::default());
            let (from, to) = (fast::GROUP * cols, fast::GROUP * fast::steps(cols));
            let groups = tokens.div_ceil(fast::GROUP).div_ceil(exec.pieces(4 * x.len()));
            exec.chunks(&mut packed, groups * to, 4 * x.len(), |i, out| {
                let x = &x[i * groups * from..];
                kernels::pack(exec.isa, &x[..x.len().min(groups * from)], cols, out);
            });
        }
        let row_bytes = cols * if fast { 2 } else { 4 };
        // Of one size: a last block of a few tokens would read all weights for them.
        let blocks = tokens.div_ceil((BLOCK_BYTES / row_bytes).clamp(MIN_BLOCK, MAX_BLOCK));
        let block = tokens.div_ceil(blocks).next_multiple_of(BLOCK_STEP);
        let blocks = tokens.div_ceil(block);
        let panels: Vec<_> = (maps.iter())
            .flat_map(|(matrix, out)| {
                let height = (PANEL_BYTES / matrix.row_bytes() / MIN_PANEL * MIN_PANEL).clamp(MIN_PANEL, MAX_PANEL);
                (0..matrix.rows()).step_by(height).map(move |row| (matrix, out, row, height.min(matrix.rows() - row)))
            })
            .collect();
        exec.each(blocks * panels.len(), flops, |task| {
            let (token, (matrix, out, row, height)) = (task / panels.len() * block, panels[task % panels.len()]);
            let (count, rows) = (block.min(tokens - token), matrix.rows());
            let (part, first) = (matrix.slice(row, height), token * rows + row);
            // SAFETY: each task writes the elements of its own block and panel.
            unsafe {
                if fast {
                    let width = fast::steps(cols);
                    let x = fast::Packed::new(&packed[token * width..(token + count) * width], count, cols);
                    fast::matmul(exec.isa, x, part, out, first, rows);
                } else {
                    kernels::matmul(exec.isa, Rows::new(&x[token * cols..], cols, count), part, out, first, rows);
                }
            }
        });
    }

    fn matrix(&self) -> Matrix<'_> {
        let matrix = self.weight.matrix();
        self.bias.as_ref().map_or(matrix, |bias| matrix.with_bias(bias))
    }
}

impl Tensor {
    /// The tensor as kernels take it.
    pub(super) fn matrix(&self) -> Matrix<'_> {
        let matrix = Matrix::new(self.bytes(), self.dtype, self.rows, self.cols);
        match self.scale() {
            Scale::None => matrix,
            Scale::Rows(scale) => matrix.with_scale(scale),
            Scale::Blocks { scale, first } => matrix.with_blocks(scale, first),
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
