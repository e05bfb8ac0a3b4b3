//! Products of bf16 with bf16: twice the rate of `f32`, for the price of activations rounded to bf16.
//!
//! Weights are bf16 already (or exactly representable in it), so a product loses nothing but the activation's last sixteen
//! bits; sums stay `f32`. This is what `vdpbf16ps` computes, and everything else computes what `vdpbf16ps` does:
//!
//! ```text
//! x[k] = round_to_nearest_even(x[k])                       to bf16, subnormal → 0
//! dot(x, w):  lane[i] = fma(x[k], w[k], fma(x[k+1], w[k+1], lane[i]))    for k = 2i, 2i + 32, 2i + 64 …
//!             then the tree of the parent module           16 lanes of pairs, tail padded with zeros
//! every fma:  subnormal operands are taken as 0, a subnormal result becomes 0, signs kept
//! ```
//!
//! The odd product first, rounded, then the even one: so says Intel's manual, and so does AMD's hardware over millions of
//! random operands of every exponent (`the_instruction_is_what_we_emulate`). One corner is left out: a sum within 2⁻¹⁵⁰ of
//! the smallest normal number may round up to it here and be flushed there.
//!
//! Activations are packed first: groups of four tokens, 32 elements of each in turn, so that a tile of four tokens reads
//! one stream.
//!
//! ```text
//! group: [k 0..32 of token 0][… of token 1][… of token 2][… of token 3][k 32..64 of token 0] …   zeros up to 32
//! ```

use super::{BF16, F8, I8, Isa, Matrix, Output, Variant};
use crate::weights::Dtype;

#[cfg(target_arch = "x86_64")]
mod avx512;
mod emulated;
pub(crate) mod pairs;
#[cfg(test)]
mod tests;

/// Tokens of a packed group.
pub(crate) const GROUP: usize = 4;
/// Elements of one step: a register of pairs.
pub(crate) const STEP: usize = 32;

/// One step of one token, in a cache line of its own: a load that touches two costs twice.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Step(pub(crate) [u16; STEP]);
/// Rows of weights whose results are collected before they are written: a cache line of each token's output.
const LINE: usize = 16;

/// Steps of a packed row.
pub(crate) fn steps(cols: usize) -> usize {
    cols.div_ceil(STEP)
}

/// Packed activations: whole groups, the last one perhaps of fewer tokens.
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    data: &'a [Step],
    tokens: usize,
}

impl<'a> Packed<'a> {
    /// The `tokens` packed rows in `data`.
    ///
    /// # Panics
    /// If `data` is not exactly those.
    pub(crate) fn new(data: &'a [Step], tokens: usize, cols: usize) -> Self {
        assert_eq!(data.len(), tokens * steps(cols), "{tokens} packed rows of {cols}");
        Self { data, tokens }
    }
}

/// One product `out[first + t * stride + r] = x[t] · w[r]`, finished as the matrix says.
struct Product<'a> {
    x: Packed<'a>,
    w: Matrix<'a>,
    out: &'a Output<'a>,
    first: usize,
    stride: usize,
}

/// Whether a matrix of this type can be multiplied here, if not blocks of it have scales.
pub(crate) fn takes(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Bf16 | Dtype::I8 | Dtype::F8)
}

/// `out[first + t * stride + r] = x[t] · w[r]` for every row `t` of `x` and `r` of `w`, in bf16 products.
///
/// # Safety
/// No other thread writes those elements of `out` at the same time.
///
/// # Panics
/// If `x` was not packed from rows of `w.cols`, `w` is of a type that is not exact in bf16, or `out` is too short.
pub(crate) unsafe fn matmul(isa: Isa, x: Packed<'_>, w: Matrix<'_>, out: &Output<'_>, first: usize, stride: usize) {
    if x.tokens == 0 {
        return;
    }
    assert!(w.blocks.is_none(), "a row's products are one sum");
    assert_eq!(x.data.len(), x.tokens * steps(w.cols), "activations are of the matrix's width");
    let kernel = match (isa.0, w.dtype) {
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16, Dtype::Bf16) => avx512::matmul::<BF16>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512, Dtype::Bf16) => emulated::avx512::<BF16>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::Bf16) => emulated::avx2::<BF16>,
        (Variant::Portable, Dtype::Bf16) => emulated::portable::<BF16>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16, Dtype::I8) => avx512::matmul::<I8>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512, Dtype::I8) => emulated::avx512::<I8>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::I8) => emulated::avx2::<I8>,
        (Variant::Portable, Dtype::I8) => emulated::portable::<I8>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16, Dtype::F8) => avx512::matmul::<F8>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512, Dtype::F8) => emulated::avx512::<F8>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::F8) => emulated::avx2::<F8>,
        (Variant::Portable, Dtype::F8) => emulated::portable::<F8> as unsafe fn(Product<'_>),
        (_, dtype @ (Dtype::F16 | Dtype::F32)) => panic!("{dtype:?} is not exact in bf16"),
    };
    // SAFETY: an `Isa` proves its instructions, and all rows were just checked to be inside.
    unsafe { kernel(Product { x, w, out, first, stride }) }
}

/// Writes a token's results for the rows from `row` on, scaled and biased as the matrix says.
///
/// # Safety
/// Nobody else writes there.
#[inline(always)]
unsafe fn finish(product: &Product<'_>, token: usize, row: usize, values: &mut [f32]) {
    product.w.finish(row, values);
    // SAFETY: the caller's.
    unsafe { product.out.write(product.first + token * product.stride + row, values) };
}
