//! AVX-512 BF16: a tile of six rows × four registers of columns keeps 24 sums and loads ten times for 24 products.

use std::arch::x86_64::*;

use super::{
    super::avx512::{dot, load, load_masked},
    GROUP, LANES, Line, Out, Pairs, Product,
};
use crate::cpu::kernels::{BF16, bytes, fast::STEP};

/// See [`super::pack_columns`].
///
/// # Safety
/// AVX-512 F, BW, VL, DQ and BF16 are there; `rows` are empty or hold `len` elements, `to` has their shape.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c")]
pub(super) unsafe fn pack_columns<const D: u8>(rows: &[&[u8]], len: usize, to: &mut Pairs) {
    for (line, rows) in rows.chunks(LANES).enumerate() {
        for first in (0..len).step_by(STEP) {
            let mut square = [_mm512_setzero_si512(); LANES];
            for (lane, row) in square.iter_mut().zip(rows) {
                // SAFETY: elements from `first` on of a row of `len`.
                *lane = unsafe { piece::<D>(row, first, len) };
            }
            let square = transpose(square);
            let pairs = first / 2..to.pairs.min((first + STEP) / 2);
            for (pair, lanes) in pairs.zip(square) {
                let at = to.at(pair, line);
                // SAFETY: a line's own 64 bytes.
                unsafe { _mm512_store_si512(to.lines[at..=at].as_mut_ptr().cast(), lanes) };
            }
        }
    }
}

/// See [`super::pack_rows`].
///
/// # Safety
/// As [`pack_columns`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c")]
pub(super) unsafe fn pack_rows<const D: u8>(rows: &[&[u8]], len: usize, to: &mut Pairs) {
    let words: [u16; STEP] = std::array::from_fn(|i| (i / 2 + i % 2 * STEP) as u16);
    let later = words.map(|word| word + LANES as u16);
    // SAFETY: arrays of 64 bytes.
    let (low, high) = unsafe { (_mm512_loadu_si512(words.as_ptr().cast()), _mm512_loadu_si512(later.as_ptr().cast())) };
    for (pair, rows) in rows.chunks(2).enumerate() {
        for first in (0..len).step_by(STEP) {
            // SAFETY: elements from `first` on of rows of `len`.
            let even = unsafe { piece::<D>(rows[0], first, len) };
            let odd = match rows.get(1) {
                // SAFETY: as above.
                Some(row) => unsafe { piece::<D>(row, first, len) },
                None => _mm512_setzero_si512(),
            };
            let line = first / LANES;
            for (line, words) in (line..to.width.min(line + 2)).zip([low, high]) {
                let at = to.at(pair, line);
                let lanes = _mm512_permutex2var_epi16(even, words, odd);
                // SAFETY: a line's own 64 bytes.
                unsafe { _mm512_store_si512(to.lines[at..=at].as_mut_ptr().cast(), lanes) };
            }
        }
    }
}

/// Up to 32 elements from `first` on as bf16, zeros after the end.
///
/// # Safety
/// The row is empty or has `len` elements; `first < len`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c")]
unsafe fn piece<const D: u8>(row: &[u8], first: usize, len: usize) -> __m512i {
    if row.is_empty() {
        return _mm512_setzero_si512();
    }
    // SAFETY: the caller's; the mask covers what is left.
    unsafe {
        let from = row.as_ptr().add(first * bytes(D));
        match len - first {
            STEP.. => load::<D>(from),
            rest => load_masked::<D>(from, (1 << rest) - 1),
        }
    }
}

/// Rows of sixteen 32-bit numbers become columns: within quarters of registers first, then the quarters.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: [__m512i; 16]) -> [__m512i; 16] {
    let mut t = r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    let mut r = t;
    for i in 0..4 {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    // Quarter q of r[4i + j] is column 4q + j of rows 4i..4i + 4.
    for j in 0..4 {
        for half in 0..2 {
            let (a, b) = (r[8 * half + j], r[8 * half + 4 + j]);
            t[8 * half + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
            t[8 * half + 4 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
        }
    }
    for j in 0..4 {
        for odd in 0..2 {
            let (a, b) = (t[4 * odd + j], t[8 + 4 * odd + j]);
            r[4 * odd + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
            r[8 + 4 * odd + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
        }
    }
    r
}

/// See [`super::multiply`].
///
/// # Safety
/// AVX-512 F, BW, VL, DQ and BF16 are there; all that the product touches is there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn multiply(product: Product<'_>, c: Out<'_>) {
    let Product { a, b, ref pairs, width, fresh } = product;
    let mut line = 0;
    while line < width {
        // A tile stays inside its group of lines; what it leaves out is another tile's.
        let count = match (width - line).min(GROUP - line % GROUP) {
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let tile = Tile {
            b: b.lines[b.at(pairs.start, line)..].as_ptr(),
            b_stride: (b.width - line / GROUP * GROUP).min(GROUP),
            pairs: pairs.len(),
            a_stride: a.stride / 2,
            c_stride: c.stride,
            fresh,
        };
        let mut row = 0;
        while row < a.rows {
            // SAFETY: rows row.. of a and c, lines line..line + count of b and c.
            row += unsafe {
                let from = a.data.as_ptr().add(row * a.stride).cast::<i32>().add(pairs.start);
                let to = c.data.as_mut_ptr().add(row * c.stride + line);
                match (a.rows - row, count) {
                    (6.., 4) => tile.run::<6, 4>(from, to),
                    (4.., 4) => tile.run::<4, 4>(from, to),
                    (3, 4) => tile.run::<3, 4>(from, to),
                    (2, 4) => tile.run::<2, 4>(from, to),
                    (_, 4) => tile.run::<1, 4>(from, to),
                    (6.., 2) => tile.run::<6, 2>(from, to),
                    (2.., 2) => tile.run::<2, 2>(from, to),
                    (_, 2) => tile.run::<1, 2>(from, to),
                    (6.., _) => tile.run::<6, 1>(from, to),
                    (2.., _) => tile.run::<2, 1>(from, to),
                    _ => tile.run::<1, 1>(from, to),
                }
            };
        }
        line += count;
    }
}

/// What the tiles of a group of columns have in common.
struct Tile {
    b: *const Line<[u16; 2]>,
    b_stride: usize,
    pairs: usize,
    /// In pairs.
    a_stride: usize,
    c_stride: usize,
    fresh: bool,
}

impl Tile {
    /// `R` rows × `C` lines. Returns `R`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn run<const R: usize, const C: usize>(&self, a: *const i32, c: *mut Line<f32>) -> usize {
        let mut sums = [[_mm512_setzero_ps(); C]; R];
        // SAFETY: R rows of C lines of c, of R rows of pairs of a, of C lines of every pair of b: the caller's.
        unsafe {
            if !self.fresh {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (l, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_load_ps(c.add(r * self.c_stride + l).cast());
                    }
                }
            }
            for pair in 0..self.pairs {
                let mut b = [_mm512_setzero_si512(); C];
                for (l, b) in b.iter_mut().enumerate() {
                    *b = _mm512_load_si512(self.b.add(pair * self.b_stride + l).cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_epi32(a.add(r * self.a_stride + pair).read_unaligned());
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = dot(*sum, a, b);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (l, &sum) in sums.iter().enumerate() {
                    _mm512_store_ps(c.add(r * self.c_stride + l).cast(), sum);
                }
            }
        }
        R
    }
}

// What a line's loads and stores rely on.
const _: () = assert!(align_of::<Line<f32>>() == 64 && size_of::<Line<[u16; 2]>>() == 64 && bytes(BF16) == 2);
