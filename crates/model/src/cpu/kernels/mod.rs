//! The arithmetic, once per instruction set: AVX-512, AVX2 with FMA, and plain Rust for everything else.
//!
//! The law of this directory: **all variants return the same bits**, and an output's bits depend on its own inputs only,
//! not on the tile it was computed in. So a chunked prompt equals an unchunked one, a batch equals its members alone, and
//! machines of different age agree. It holds because every sum has one order:
//!
//! ```text
//! dot(x, w):  lane[i] = fma(x[k], w[k], lane[i])   for k = i, i+16, i+32 …      16 lanes, tail padded with zeros
//!             lane[i] += lane[i+8]; += lane[i+4]; += lane[i+2]; += lane[i+1]    then a tree
//! of blocks:  Σ over blocks of columns, ascending, of dot(…) · scale    each of its own, scaled, then added
//! values:     acc[d] = fma(p[j], v[j][d], acc[d])  for j = 0, 1, 2 …            one order, no lanes over j
//! ```
//!
//! Sixteen lanes are one AVX-512 register, two AVX2 registers, or an array the compiler vectorises where it can. On an
//! x86 without FMA the fused multiply-add is a library call: slow, and still the same bits.

use std::marker::PhantomData;

use crate::weights::{BLOCK, Dtype};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod elementwise;
pub(crate) mod fast;
pub(crate) mod peaks;
mod portable;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
use avx512::reduce4;
pub(crate) use elementwise::{
    add, add_scaled, gelu_mul, merge, pack, raise, rms_norm, sigmoid, silu_mul, soft_cap, softmax_step, to_bf16,
    to_fp8, to_operand, weigh,
};

/// Lanes of every dot product.
const LANES: usize = 16;

/// `Dtype` as a const parameter, so that a kernel's loads are chosen when it is compiled.
const BF16: u8 = 0;
const F16: u8 = 1;
const F32: u8 = 2;
const I8: u8 = 3;
const F8: u8 = 4;

/// Bytes of an element of such a type.
const fn bytes(dtype: u8) -> usize {
    match dtype {
        BF16 | F16 => 2,
        I8 | F8 => 1,
        _ => 4,
    }
}

/// Which variant of the kernels this machine runs. A value other than `Portable` proves that the instructions are there:
/// it is made by [`Isa::detect`] and [`Isa::available`] only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa(Variant);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    /// AVX-512 with `vdpbf16ps`.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// The best one here.
    pub(crate) fn detect() -> Self {
        Self::available()[0]
    }

    /// All that run here, best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c");
            if avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") {
                if has!("avx512bf16") {
                    all.push(Self(Variant::Avx512Bf16));
                }
                all.push(Self(Variant::Avx512));
            }
            if avx2 {
                all.push(Self(Variant::Avx2));
            }
        }
        all.push(Self(Variant::Portable));
        all
    }

    /// Whether it multiplies bf16 in one instruction.
    pub(crate) fn has_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Variant::Avx512Bf16;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Its name, for logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Variant::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Variant::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2 => "avx2",
            Variant::Portable => "portable",
        }
    }
}

/// A row-major matrix as it lies in a weight file or in the arena.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
    rows: usize,
    cols: usize,
    /// Elements from row to row.
    ld: usize,
    /// What each row is multiplied by; empty for none.
    scale: &'a [f32],
    /// What blocks of it are multiplied by; not with a scale per row.
    blocks: Option<Blocks<'a>>,
    /// Added to each row's product; empty for none.
    bias: &'a [f32],
}

/// Scales of blocks of [`BLOCK`]` × `[`BLOCK`] elements.
#[derive(Clone, Copy)]
struct Blocks<'a> {
    /// `[blocks of rows][blocks of columns]`, of the whole matrix.
    scale: &'a [f32],
    /// Row 0's place in the whole matrix.
    first: usize,
    /// Blocks of columns.
    across: usize,
    /// Which of those the products are of.
    piece: usize,
}

impl<'a> Matrix<'a> {
    /// A matrix over `bytes`.
    ///
    /// # Panics
    /// If `bytes` are not exactly the matrix.
    pub(crate) fn new(bytes: &'a [u8], dtype: Dtype, rows: usize, cols: usize) -> Self {
        assert_eq!(bytes.len(), rows * cols * dtype.bytes(), "a {rows} x {cols} matrix of {dtype:?}");
        Self { bytes, dtype, rows, cols, ld: cols, scale: &[], blocks: None, bias: &[] }
    }

    /// The same with an element per row that the row is multiplied by. Products are summed up unscaled, and the sum is
    /// scaled; an empty `scale` is none.
    ///
    /// # Panics
    /// If there are not as many as rows.
    pub(crate) fn with_scale(self, scale: &'a [f32]) -> Self {
        assert!(scale.is_empty() || scale.len() == self.rows, "a scale per row");
        Self { scale, ..self }
    }

    /// The same with an element for each block of [`BLOCK`]` × `[`BLOCK`] elements (those at the ends are smaller) that the
    /// block is multiplied by, `[blocks of rows][blocks of columns]`. The products of each block of columns are summed up
    /// unscaled, the sum is scaled, and such sums are added in ascending order. The blocks are those of a matrix that this one
    /// begins in at row `first`.
    ///
    /// # Panics
    /// If there are not as many as blocks.
    pub(crate) fn with_blocks(self, scale: &'a [f32], first: usize) -> Self {
        let across = self.cols.div_ceil(BLOCK);
        assert!(scale.len() >= (first + self.rows).div_ceil(BLOCK) * across, "a scale per block");
        Self { blocks: Some(Blocks { scale, first, across, piece: 0 }), ..self }
    }

    /// The same with an element per row that is added to the row's products.
    ///
    /// # Panics
    /// If there are not as many as rows.
    pub(crate) fn with_bias(self, bias: &'a [f32]) -> Self {
        assert_eq!(bias.len(), self.rows, "a bias per row");
        Self { bias, ..self }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Its elements as they are stored.
    pub(crate) fn stored(&self) -> &'a [u8] {
        self.bytes
    }

    /// Its rows as they are stored.
    pub(crate) fn stored_rows(&self) -> impl Iterator<Item = &'a [u8]> {
        self.bytes.chunks_exact(self.row_bytes())
    }

    /// Bytes of one row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.cols * self.dtype.bytes()
    }

    /// The rows from `first` on, `count` of them.
    pub(crate) fn slice(&self, first: usize, count: usize) -> Self {
        let width = self.cols * self.dtype.bytes();
        let part = |all: &'a [f32]| if all.is_empty() { all } else { &all[first..first + count] };
        let (scale, bias) = (part(self.scale), part(self.bias));
        let blocks = self.blocks.map(|blocks| Blocks { first: blocks.first + first, ..blocks });
        Self { bytes: &self.bytes[first * width..(first + count) * width], rows: count, scale, blocks, bias, ..*self }
    }

    /// Whether its products are added to those of columns before.
    #[inline(always)]
    fn is_further(&self) -> bool {
        self.blocks.as_ref().is_some_and(|blocks| blocks.piece > 0)
    }

    /// Of a matrix whose blocks have scales the blocks of columns, each a matrix whose products are one sum; and where each begins.
    fn pieces(self) -> impl Iterator<Item = (usize, Self)> {
        let count = self.blocks.map_or(0, |blocks| blocks.across);
        (0..count).map(move |piece| {
            let from = piece * BLOCK;
            let bytes = &self.bytes[from * self.dtype.bytes()..];
            let blocks = self.blocks.map(|blocks| Blocks { piece, ..blocks });
            let bias = if piece + 1 == count { self.bias } else { &[] };
            (from, Self { bytes, cols: BLOCK.min(self.cols - from), blocks, bias, ..self })
        })
    }

    /// What is left to do to one token's products with the rows from `row` on.
    #[inline(always)]
    fn finish(&self, row: usize, values: &mut [f32]) {
        if let Some(Blocks { scale, first, across, piece }) = self.blocks {
            for (i, value) in values.iter_mut().enumerate() {
                *value *= scale[(first + row + i) / BLOCK * across + piece];
            }
        }
        if !self.scale.is_empty() {
            values.iter_mut().zip(&self.scale[row..]).for_each(|(value, scale)| *value *= scale);
        }
        if !self.bias.is_empty() {
            values.iter_mut().zip(&self.bias[row..]).for_each(|(value, bias)| *value += bias);
        }
    }
}

/// Begins to bring memory nearer that will be read soon: many lines at a time, where loads would wait for a few.
pub(crate) fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 has it, and it reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// Rows of activations: `count` rows of the matrix's `cols` elements, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    count: usize,
}

impl<'a> Rows<'a> {
    /// `count` rows, `stride` apart.
    pub(crate) fn new(data: &'a [f32], stride: usize, count: usize) -> Self {
        Self { data, stride, count }
    }
}

/// Memory of which several tasks write different elements at the same time.
pub(crate) struct Output<'a> {
    base: *mut f32,
    len: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a `&mut [f32]` whose only accesses are `write` and `put`, and their contract keeps two threads from the same
// element.
unsafe impl Send for Output<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// Borrows `data` for writing by several tasks.
    pub(crate) fn new(data: &'a mut [f32]) -> Self {
        Self { base: data.as_mut_ptr(), len: data.len(), lifetime: PhantomData }
    }

    /// Writes `values` from element `at` on, or adds them to what is there.
    ///
    /// # Safety
    /// As for [`Self::write`].
    ///
    /// # Panics
    /// If they are not inside.
    #[inline(always)]
    unsafe fn put(&self, at: usize, values: &[f32], add: bool) {
        if !add {
            // SAFETY: the caller's.
            return unsafe { self.write(at, values) };
        }
        assert!(at <= self.len && values.len() <= self.len - at, "add inside the output");
        for (i, value) in values.iter().enumerate() {
            // SAFETY: inside by the assertion, and nobody else's by the caller's promise.
            unsafe { *self.base.add(at + i) += value };
        }
    }

    /// Writes `values` from element `at` on.
    ///
    /// # Safety
    /// No other thread writes any of these elements while this `Output` lives.
    ///
    /// # Panics
    /// If they are not inside.
    #[inline(always)]
    pub(crate) unsafe fn write(&self, at: usize, values: &[f32]) {
        assert!(at <= self.len && values.len() <= self.len - at, "write inside the output");
        // SAFETY: inside by the assertion, exclusive by the caller's promise, and `values` cannot overlap it because the
        // memory is mutably borrowed for as long as `self` lives.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.base.add(at), values.len()) }
    }
}

/// One product `out[t * stride + first + r] = x[t] · w[r]`, for all rows of `x` and `w`.
struct Product<'a> {
    x: Rows<'a>,
    w: Matrix<'a>,
    out: &'a Output<'a>,
    /// Where row 0 of `x` against row 0 of `w` goes.
    first: usize,
    stride: usize,
}

/// The loop over tiles, the same for every instruction set: `$tile` computes `T × R` dot products in registers. Weights
/// are the outer loop, so a few of their rows stay in the first-level cache while all activations pass by.
macro_rules! tiled {
    ($product:expr, $tile:ident::<$d:ident>, rows [$($r:literal),+], tokens $tokens:tt) => {{
        let product = $product;
        let mut row = 0;
        $(
            while product.w.rows - row >= $r {
                tiled!(@tokens $tokens, product, $tile::<$d, $r>, row);
                row += $r;
            }
        )+
    }};
    (@tokens [$($t:literal),+], $product:ident, $tile:ident::<$d:ident, $r:literal>, $row:ident) => {
        let Product { x, w, out, first, stride } = &$product;
        let mut token = 0;
        $(
            while x.count - token >= $t {
                // SAFETY: `matmul` has checked that all rows of `x` and `w` are inside their slices, and token + t and
                // row + r are at most their counts; the instructions are there (see `Isa`).
                let tile = unsafe {
                    let weights = w.bytes.as_ptr().add($row * w.ld * w.dtype.bytes());
                    $tile::<$d, $t, $r>(x.data.as_ptr().add(token * x.stride), x.stride, weights, w.ld, w.cols)
                };
                for (i, mut values) in tile.into_iter().enumerate() {
                    w.finish($row, &mut values);
                    // SAFETY: nobody else writes there, as the caller of `matmul` promised.
                    unsafe { out.put(first + (token + i) * stride + $row, &values, w.is_further()) };
                }
                token += $t;
            }
        )+
    };
}
use tiled;

/// `out[first + t * stride + r] = x[t] · w[r]` for every row `t` of `x` and `r` of `w`.
///
/// # Safety
/// No other thread writes those elements of `out` at the same time.
///
/// # Panics
/// If `x` is shorter than its rows, or `out` than the result.
pub(crate) unsafe fn matmul(isa: Isa, x: Rows<'_>, w: Matrix<'_>, out: &Output<'_>, first: usize, stride: usize) {
    if x.count == 0 {
        return;
    }
    assert!(x.data.len() >= (x.count - 1) * x.stride + w.cols, "all rows of x are there");
    let kernel = match (isa.0, w.dtype) {
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16 | Variant::Avx512, Dtype::Bf16) => avx512::matmul::<BF16>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16 | Variant::Avx512, Dtype::F16) => avx512::matmul::<F16>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16 | Variant::Avx512, Dtype::F32) => avx512::matmul::<F32>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16 | Variant::Avx512, Dtype::I8) => avx512::matmul::<I8>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16 | Variant::Avx512, Dtype::F8) => avx512::matmul::<F8>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::Bf16) => avx2::matmul::<BF16>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::F16) => avx2::matmul::<F16>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::F32) => avx2::matmul::<F32>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::I8) => avx2::matmul::<I8>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::F8) => avx2::matmul::<F8>,
        (Variant::Portable, Dtype::Bf16) => portable::matmul::<BF16>,
        (Variant::Portable, Dtype::F16) => portable::matmul::<F16>,
        (Variant::Portable, Dtype::I8) => portable::matmul::<I8>,
        (Variant::Portable, Dtype::F8) => portable::matmul::<F8>,
        (Variant::Portable, Dtype::F32) => portable::matmul::<F32> as unsafe fn(Product<'_>),
    };
    if w.blocks.is_none() {
        // SAFETY: an `Isa` proves its instructions, and all rows were just checked to be inside.
        return unsafe { kernel(Product { x, w, out, first, stride }) };
    }
    for (from, w) in w.pieces() {
        let x = Rows { data: &x.data[from..], ..x };
        // SAFETY: as above; columns of what was checked.
        unsafe { kernel(Product { x, w, out, first, stride }) };
    }
}

/// `acc[r] += Σ_j (p[r][j] · scale[j]) · v[j]` for every row `r` of `acc` (`v.cols` long), `j` ascending over the rows of `v`.
///
/// # Panics
/// If `p` or `acc` is shorter than its rows.
pub(crate) fn accumulate(isa: Isa, p: Rows<'_>, v: Matrix<'_>, acc: &mut [f32]) {
    if p.count == 0 || v.rows == 0 {
        return;
    }
    assert!(v.blocks.is_none(), "rows of values have a scale each, or none");
    assert!(p.data.len() >= (p.count - 1) * p.stride + v.rows, "all rows of p are there");
    assert!(acc.len() >= p.count * v.cols, "all rows of acc are there");
    // Rows of `v` are what `p` runs over: their scales belong to its elements, rounded once before the sum.
    let scaled: Vec<f32>;
    let p = if v.scale.is_empty() {
        p
    } else {
        let rows = (0..p.count).flat_map(|r| p.data[r * p.stride..].iter().zip(v.scale));
        scaled = rows.map(|(p, scale)| p * scale).collect();
        Rows::new(&scaled, v.rows, p.count)
    };
    let kernel = match (isa.0, v.dtype) {
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16 | Variant::Avx512, Dtype::Bf16) => avx512::accumulate::<BF16>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16 | Variant::Avx512, Dtype::F16) => avx512::accumulate::<F16>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16 | Variant::Avx512, Dtype::F32) => avx512::accumulate::<F32>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16 | Variant::Avx512, Dtype::I8) => avx512::accumulate::<I8>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Bf16 | Variant::Avx512, Dtype::F8) => avx512::accumulate::<F8>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::Bf16) => avx2::accumulate::<BF16>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::F16) => avx2::accumulate::<F16>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::F32) => avx2::accumulate::<F32>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::I8) => avx2::accumulate::<I8>,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2, Dtype::F8) => avx2::accumulate::<F8>,
        (Variant::Portable, _) => portable::accumulate as unsafe fn(Rows<'_>, Matrix<'_>, &mut [f32]),
    };
    // SAFETY: an `Isa` proves its instructions, and all rows were just checked to be inside.
    unsafe { kernel(p, v, acc) }
}
