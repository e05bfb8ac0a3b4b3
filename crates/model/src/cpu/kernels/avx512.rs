//! AVX-512: one register is the sixteen lanes.
//!
//! A tile of 6 tokens × 4 weight rows keeps 24 sums in registers: each step loads (and widens) 4 pieces of weights and 6
//! of activations for 24 multiply-adds, so the multipliers are the limit, not the loads. Decoding has one token, and 8
//! rows at a time hide the latency of the adds.

use std::arch::x86_64::*;

use super::{BF16, F8, F16, I8, LANES, Matrix, Product, Rows, tiled};

/// See [`super::matmul`].
///
/// # Safety
/// AVX-512 F, BW, VL, DQ are there; the product's rows are inside their slices.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
pub(super) unsafe fn matmul<const D: u8>(product: Product<'_>) {
    if product.x.count == 1 {
        tiled!(product, tile::<D>, rows [8, 4, 1], tokens [1]);
    } else {
        tiled!(product, tile::<D>, rows [4, 1], tokens [6, 4, 2, 1]);
    }
}

/// `T × R` dot products of `cols` elements; rows of weights are `ld` elements apart.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
unsafe fn tile<const D: u8, const T: usize, const R: usize>(
    x: *const f32,
    stride: usize,
    w: *const u8,
    ld: usize,
    cols: usize,
) -> [[f32; R]; T] {
    let mut sums = [[_mm512_setzero_ps(); R]; T];
    let mut weights = [_mm512_setzero_ps(); R];
    let whole = cols / LANES * LANES;
    for k in (0..whole).step_by(LANES) {
        for (r, weight) in weights.iter_mut().enumerate() {
            // SAFETY: elements k..k+16 of row r, inside the matrix.
            *weight = unsafe { load::<D>(w, r * ld + k) };
        }
        for (t, row) in sums.iter_mut().enumerate() {
            // SAFETY: elements k..k+16 of row t of the activations.
            let x = unsafe { _mm512_loadu_ps(x.add(t * stride + k)) };
            for (sum, weight) in row.iter_mut().zip(weights) {
                *sum = _mm512_fmadd_ps(x, weight, *sum);
            }
        }
    }
    if whole < cols {
        let mask = (1u16 << (cols - whole)) - 1;
        for (r, weight) in weights.iter_mut().enumerate() {
            // SAFETY: the mask covers what remains of row r; masked elements are not touched.
            *weight = unsafe { load_masked::<D>(w, r * ld + whole, mask) };
        }
        for (t, row) in sums.iter_mut().enumerate() {
            // SAFETY: as above, for row t.
            let x = unsafe { _mm512_maskz_loadu_ps(mask, x.add(t * stride + whole)) };
            for (sum, weight) in row.iter_mut().zip(weights) {
                *sum = _mm512_fmadd_ps(x, weight, *sum);
            }
        }
    }
    let mut out = [[0.0; R]; T];
    for (values, sums) in out.iter_mut().zip(&sums) {
        for (four, sums) in values.chunks_mut(4).zip(sums.chunks(4)) {
            match *sums {
                [a, b, c, d] => four.copy_from_slice(&reduce4(a, b, c, d)),
                _ => {
                    for (value, &sum) in four.iter_mut().zip(sums) {
                        let zero = _mm512_setzero_ps();
                        *value = reduce4(sum, zero, zero, zero)[0];
                    }
                }
            }
        }
    }
    out
}

/// The tree of four sums at once: lane i + lane i+8, then + i+4, + i+2, + i+1.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn reduce4(a: __m512, b: __m512, c: __m512, d: __m512) -> [f32; 4] {
    // Quarters of a register, lowest first, a0 a1 a2 a3: [a0 a1 b0 b1] + [a2 a3 b2 b3].
    let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b));
    let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(c, d), _mm512_shuffle_f32x4::<0b11_10_11_10>(c, d));
    // One quarter per sum: [a0 b0 c0 d0] + [a1 b1 c1 d1].
    let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
    let odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd);
    let four = _mm512_add_ps(even, odd);
    let two = _mm512_add_ps(four, _mm512_permute_ps::<0b01_00_11_10>(four));
    let one = _mm512_add_ps(two, _mm512_permute_ps::<0b10_11_00_01>(two));
    let firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    let mut out = [0.0; 4];
    // SAFETY: `out` has room for four.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, one))) };
    out
}

/// Sixteen elements from element `at` on, widened.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub(super) unsafe fn load<const D: u8>(base: *const u8, at: usize) -> __m512 {
    // SAFETY: the caller's: sixteen elements are there; unaligned loads.
    unsafe {
        match D {
            BF16 => widen_bf16(_mm256_loadu_si256(base.add(at * 2).cast())),
            F16 => _mm512_cvtph_ps(_mm256_loadu_si256(base.add(at * 2).cast())),
            I8 => _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(base.add(at).cast()))),
            F8 => widen_f8(_mm_loadu_si128(base.add(at).cast())),
            _ => _mm512_loadu_ps(base.add(at * 4).cast()),
        }
    }
}

/// As [`load`], only the elements of the mask; the others are zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub(super) unsafe fn load_masked<const D: u8>(base: *const u8, at: usize, mask: u16) -> __m512 {
    // SAFETY: the caller's: the masked elements are there, and no others are touched.
    unsafe {
        match D {
            BF16 => widen_bf16(_mm256_maskz_loadu_epi16(mask, base.add(at * 2).cast())),
            F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, base.add(at * 2).cast())),
            I8 => _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, base.add(at).cast()))),
            F8 => widen_f8(_mm_maskz_loadu_epi8(mask, base.add(at).cast())),
            _ => _mm512_maskz_loadu_ps(mask, base.add(at * 4).cast()),
        }
    }
}

/// bfloat16 is the upper half of an `f32`.
#[inline]
#[target_feature(enable = "avx512f")]
fn widen_bf16(halves: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
}

/// e4m3 as `weights::fp8` widens it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn widen_f8(bytes: __m128i) -> __m512 {
    let words = _mm512_cvtepu8_epi32(bytes);
    let size = _mm512_and_si512(words, _mm512_set1_epi32(0x7f));
    let sign = _mm512_slli_epi32::<24>(_mm512_xor_si512(words, size));
    let rebias = _mm512_castsi512_ps(_mm512_set1_epi32((120 + 127) << 23));
    let value = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32::<20>(size)), rebias);
    let nan = _mm512_cmpeq_epi32_mask(size, _mm512_set1_epi32(0x7f));
    let value = _mm512_mask_mov_ps(value, nan, _mm512_set1_ps(f32::NAN));
    _mm512_or_ps(value, _mm512_castsi512_ps(sign))
}

/// See [`super::accumulate`].
///
/// # Safety
/// AVX-512 F, BW, VL, DQ are there; all rows are inside their slices.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
pub(super) unsafe fn accumulate<const D: u8>(p: Rows<'_>, v: Matrix<'_>, acc: &mut [f32]) {
    let mut row = 0;
    while row < p.count {
        // SAFETY: rows row..row + step of p and acc are inside (checked by the caller).
        unsafe {
            let (p_row, acc_row) = (p.data.as_ptr().add(row * p.stride), acc.as_mut_ptr().add(row * v.cols));
            row += match p.count - row {
                8.. => rows::<D, 8>(p_row, p.stride, v, acc_row),
                4.. => rows::<D, 4>(p_row, p.stride, v, acc_row),
                2.. => rows::<D, 2>(p_row, p.stride, v, acc_row),
                _ => rows::<D, 1>(p_row, p.stride, v, acc_row),
            };
        }
    }
}

/// `G` rows of accumulators, all of their columns. Returns `G`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
unsafe fn rows<const D: u8, const G: usize>(p: *const f32, stride: usize, v: Matrix<'_>, acc: *mut f32) -> usize {
    let mut d = 0;
    // SAFETY: columns d..d + 32, then d..d + 16, then the masked rest of the G rows of acc and of all rows of v.
    unsafe {
        while v.cols - d >= 2 * LANES {
            columns::<D, G, 2>(p, stride, v, acc, d, u16::MAX);
            d += 2 * LANES;
        }
        while v.cols - d >= LANES {
            columns::<D, G, 1>(p, stride, v, acc, d, u16::MAX);
            d += LANES;
        }
        if d < v.cols {
            columns::<D, G, 1>(p, stride, v, acc, d, (1 << (v.cols - d)) - 1);
        }
    }
    G
}

/// `G` rows × `C` registers of columns from `d` on; `mask` says which lanes are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
unsafe fn columns<const D: u8, const G: usize, const C: usize>(
    p: *const f32,
    stride: usize,
    v: Matrix<'_>,
    acc: *mut f32,
    d: usize,
    mask: u16,
) {
    let mut sums = [[_mm512_setzero_ps(); C]; G];
    // SAFETY: the masked lanes of the G rows of acc and p and of all rows of v are inside, by the caller.
    unsafe {
        for (g, row) in sums.iter_mut().enumerate() {
            for (c, sum) in row.iter_mut().enumerate() {
                *sum = _mm512_maskz_loadu_ps(mask, acc.add(g * v.cols + d + c * LANES));
            }
        }
        for j in 0..v.rows {
            let mut values = [_mm512_setzero_ps(); C];
            for (c, value) in values.iter_mut().enumerate() {
                let at = j * v.cols + d + c * LANES;
                let whole = mask == u16::MAX;
                *value =
                    if whole { load::<D>(v.bytes.as_ptr(), at) } else { load_masked::<D>(v.bytes.as_ptr(), at, mask) };
            }
            for (g, row) in sums.iter_mut().enumerate() {
                let p = _mm512_set1_ps(*p.add(g * stride + j));
                for (sum, value) in row.iter_mut().zip(values) {
                    *sum = _mm512_fmadd_ps(p, value, *sum);
                }
            }
        }
        for (g, row) in sums.iter().enumerate() {
            for (c, &sum) in row.iter().enumerate() {
                _mm512_mask_storeu_ps(acc.add(g * v.cols + d + c * LANES), mask, sum);
            }
        }
    }
}
