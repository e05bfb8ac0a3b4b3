//! Products for attention, in bf16: lanes are columns of the result, so no sum ends in a tree.
//!
//! Weights are used as they lie, and their sums run over lanes. Keys and values are used by few rows at a time, and a sum
//! over a head's 128 elements would be half tree. So they are packed by pairs first, and every sum is one chain:
//!
//! ```text
//! c[r][n] = fma(a[r][2m], b[2m][n], fma(a[r][2m + 1], b[2m + 1][n], c[r][n]))        for m in the range, ascending
//! ```
//!
//! each step as in the parent module. A result's bits depend on its row, its column and the range, not on what else is
//! computed with it.

use std::ops::Range;

use super::{
    super::{F16, F32, portable::element, to_operand},
    BF16, F8, I8, Isa, Variant, emulated,
};
use crate::weights::Dtype;

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;

/// Columns of a register.
pub(crate) const LANES: usize = 16;
/// Registers of columns in a group: as many as a tile has.
const GROUP: usize = 4;

/// Sixteen pairs: one pair of rows, sixteen columns; or sixteen columns of a result.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Line<T>(pub(crate) [T; LANES]);

/// A matrix of bf16 packed by pairs of rows, zeros up to whole pairs and lines.
///
/// ```text
/// columns 0..64:    [rows 0, 1: (b[0][0], b[1][0]) (b[0][1], b[1][1]) … 64 pairs][rows 2, 3] …
/// columns 64..128:  the same; the last group perhaps narrower
/// ```
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    lines: Vec<Line<[u16; 2]>>,
    /// Pairs of rows.
    pairs: usize,
    /// Lines of columns.
    width: usize,
}

impl Pairs {
    fn shape(&mut self, rows: usize, cols: usize) {
        (self.pairs, self.width) = (rows.div_ceil(2), cols.div_ceil(LANES));
        self.lines.resize(self.pairs * self.width, Line::default());
    }

    /// Where a pair's line of columns lies.
    fn at(&self, pair: usize, line: usize) -> usize {
        let first = line / GROUP * GROUP;
        first * self.pairs + pair * (self.width - first).min(GROUP) + line % GROUP
    }
}

/// Rows of bf16 to be multiplied, `stride` elements apart, which is even.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    data: &'a [u16],
    stride: usize,
    rows: usize,
}

impl<'a> Left<'a> {
    /// `rows` rows, `stride` apart.
    pub(crate) fn new(data: &'a [u16], stride: usize, rows: usize) -> Self {
        assert!(stride.is_multiple_of(2), "rows of pairs");
        Self { data, stride, rows }
    }
}

/// Rows of a result, `stride` lines apart.
pub(crate) struct Out<'a> {
    data: &'a mut [Line<f32>],
    stride: usize,
}

impl<'a> Out<'a> {
    /// Rows `stride` lines apart.
    pub(crate) fn new(data: &'a mut [Line<f32>], stride: usize) -> Self {
        Self { data, stride }
    }
}

/// Lines as what is in them.
pub(crate) fn flat(lines: &mut [Line<f32>]) -> &mut [f32] {
    // SAFETY: a line is an array of sixteen, with nothing between it and the next.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LANES) }
}

/// Packs a matrix whose **columns** are `rows`, each of `len` elements as they are stored; an empty one is a column of
/// zeros. Elements that bf16 cannot hold are rounded to the nearest it can.
///
/// # Panics
/// If a row is neither empty nor long enough.
pub(crate) fn pack_columns(isa: Isa, rows: &[&[u8]], dtype: Dtype, len: usize, to: &mut Pairs) {
    check(rows, dtype, len);
    to.shape(len, rows.len());
    #[cfg(target_arch = "x86_64")]
    if isa.0 == Variant::Avx512Bf16 {
        let pack = match dtype {
            Dtype::Bf16 => avx512::pack_columns::<BF16>,
            Dtype::F16 => avx512::pack_columns::<F16>,
            Dtype::F32 => avx512::pack_columns::<F32>,
            Dtype::I8 => avx512::pack_columns::<I8>,
            Dtype::F8 => avx512::pack_columns::<F8> as unsafe fn(&[&[u8]], usize, &mut Pairs),
        };
        // SAFETY: an `Isa` proves its instructions; rows and shape have just been checked and made.
        return unsafe { pack(rows, len, to) };
    }
    for column in 0..to.width * LANES {
        let row = rows.get(column).copied().unwrap_or(&[]);
        for pair in 0..to.pairs {
            let at = to.at(pair, column / LANES);
            to.lines[at].0[column % LANES] = [0, 1].map(|i| stored(isa, row, dtype, len, 2 * pair + i));
        }
    }
}

/// Packs a matrix whose **rows** are the first `len` elements of `rows`, as they are stored; an empty one is a row of
/// zeros. Rounds as [`pack_columns`].
///
/// # Panics
/// As [`pack_columns`].
pub(crate) fn pack_rows(isa: Isa, rows: &[&[u8]], dtype: Dtype, len: usize, to: &mut Pairs) {
    check(rows, dtype, len);
    to.shape(rows.len(), len);
    #[cfg(target_arch = "x86_64")]
    if isa.0 == Variant::Avx512Bf16 {
        let pack = match dtype {
            Dtype::Bf16 => avx512::pack_rows::<BF16>,
            Dtype::F16 => avx512::pack_rows::<F16>,
            Dtype::F32 => avx512::pack_rows::<F32>,
            Dtype::I8 => avx512::pack_rows::<I8>,
            Dtype::F8 => avx512::pack_rows::<F8> as unsafe fn(&[&[u8]], usize, &mut Pairs),
        };
        // SAFETY: as above.
        return unsafe { pack(rows, len, to) };
    }
    for pair in 0..to.pairs {
        let row = |i: usize| rows.get(2 * pair + i).copied().unwrap_or(&[]);
        for line in 0..to.width {
            let at = to.at(pair, line);
            to.lines[at].0 =
                std::array::from_fn(|lane| [0, 1].map(|i| stored(isa, row(i), dtype, len, line * LANES + lane)));
        }
    }
}

fn check(rows: &[&[u8]], dtype: Dtype, len: usize) {
    assert!(rows.iter().all(|row| row.is_empty() || row.len() >= len * dtype.bytes()), "rows of {len} {dtype:?}");
}

/// Element `at` of a row of `len`, as bf16; zero past its end.
fn stored(isa: Isa, row: &[u8], dtype: Dtype, len: usize, at: usize) -> u16 {
    if row.is_empty() || at >= len {
        return 0;
    }
    // SAFETY: element `at` of a row that was checked to have `len`.
    let value = unsafe {
        match dtype {
            Dtype::Bf16 => element::<BF16>(row.as_ptr(), at),
            Dtype::F16 => element::<F16>(row.as_ptr(), at),
            Dtype::F32 => element::<F32>(row.as_ptr(), at),
            Dtype::I8 => element::<I8>(row.as_ptr(), at),
            Dtype::F8 => element::<F8>(row.as_ptr(), at),
        }
    };
    let mut out = [0];
    to_operand(isa, &[value], 1.0, &mut out);
    out[0]
}

/// Adds the products of `pairs` to columns `0..16 * width` of every row of `c`; to zeros if `fresh`.
///
/// # Panics
/// If pairs or columns are not in `a`, `b` or `c`.
pub(crate) fn multiply(isa: Isa, a: Left<'_>, b: &Pairs, pairs: Range<usize>, width: usize, c: Out<'_>, fresh: bool) {
    if a.rows == 0 || width == 0 {
        return;
    }
    assert!(pairs.start <= pairs.end && pairs.end <= b.pairs, "{pairs:?} are in b");
    assert!((a.rows - 1) * a.stride + 2 * pairs.end <= a.data.len(), "{pairs:?} are in all rows of a");
    assert!(width <= b.width && width <= c.stride && a.rows * c.stride <= c.data.len(), "{width} lines of columns");
    if pairs.is_empty() {
        let rows = c.data.chunks_exact_mut(c.stride).take(if fresh { a.rows } else { 0 });
        return rows.for_each(|row| row[..width].fill(Line::default()));
    }
    let product = Product { a, b, pairs, width, fresh };
    // SAFETY: an `Isa` proves its instructions; everything that is touched has just been checked to be there.
    unsafe {
        match isa.0 {
            #[cfg(target_arch = "x86_64")]
            Variant::Avx512Bf16 => avx512::multiply(product, c),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx512 => wide(product, c),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2 => narrow(product, c),
            Variant::Portable => plain(product, c),
        }
    }
}

/// What [`multiply`] was asked for.
struct Product<'a> {
    a: Left<'a>,
    b: &'a Pairs,
    pairs: Range<usize>,
    width: usize,
    fresh: bool,
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
fn wide(product: Product<'_>, c: Out<'_>) {
    plain(product, c);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn narrow(product: Product<'_>, c: Out<'_>) {
    plain(product, c);
}

#[inline(always)]
fn plain(Product { a, b, pairs, width, fresh }: Product<'_>, c: Out<'_>) {
    for (row, c) in c.data.chunks_exact_mut(c.stride).take(a.rows).enumerate() {
        let a = &a.data[row * a.stride..];
        for (line, sums) in c[..width].iter_mut().enumerate() {
            let mut lanes = if fresh { [0.0; LANES] } else { sums.0 };
            for pair in pairs.clone() {
                let (even, odd) = (emulated::widen(a[2 * pair]), emulated::widen(a[2 * pair + 1]));
                for (lane, b) in lanes.iter_mut().zip(&b.lines[b.at(pair, line)].0) {
                    let b = b.map(|b| emulated::flush(emulated::widen(b)));
                    *lane = emulated::flush(even.mul_add(b[0], emulated::flush(odd.mul_add(b[1], *lane))));
                }
            }
            sums.0 = lanes;
        }
    }
}
