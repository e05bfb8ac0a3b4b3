//! AVX2 with FMA and F16C: two registers are the sixteen lanes.
//!
//! Sixteen registers hold a tile of 3 tokens × 2 weight rows (12 halves of sums), two weights and an activation.

use std::arch::x86_64::*;

use super::{BF16, F8, F16, F32, I8, LANES, Matrix, Product, Rows, portable, tiled};

/// Lanes of one register.
const HALF: usize = LANES / 2;

/// See [`super::matmul`].
///
/// # Safety
/// AVX2, FMA and F16C are there; the product's rows are inside their slices.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn matmul<const D: u8>(product: Product<'_>) {
    if product.x.count == 1 {
        tiled!(product, tile::<D>, rows [4, 1], tokens [1]);
    } else {
        tiled!(product, tile::<D>, rows [2, 1], tokens [3, 1]);
    }
}

/// `T × R` dot products of `cols` elements; rows of weights are `ld` elements apart.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const D: u8, const T: usize, const R: usize>(
    x: *const f32,
    stride: usize,
    w: *const u8,
    ld: usize,
    cols: usize,
) -> [[f32; R]; T] {
    let mut sums = [[[_mm256_setzero_ps(); 2]; R]; T];
    let whole = cols / LANES * LANES;
    for k in (0..whole).step_by(LANES) {
        // SAFETY: elements k..k+16 of R rows of the matrix and T rows of the activations.
        unsafe { step::<D, T, R>(&mut sums, x.add(k), stride, w, ld, k) };
    }
    if whole < cols {
        // The rest of each row, padded with zeros as the law of the parent module says.
        let mut x_rest = [[0.0f32; LANES]; T];
        let mut w_rest = [[0.0f32; LANES]; R];
        for i in 0..cols - whole {
            for (t, rest) in x_rest.iter_mut().enumerate() {
                // SAFETY: element whole + i of row t.
                rest[i] = unsafe { *x.add(t * stride + whole + i) };
            }
            for (r, rest) in w_rest.iter_mut().enumerate() {
                // SAFETY: element whole + i of row r.
                rest[i] = unsafe { portable::element::<D>(w, r * ld + whole + i) };
            }
        }
        // SAFETY: sixteen elements of each padded row.
        unsafe { step::<F32, T, R>(&mut sums, x_rest.as_ptr().cast(), LANES, w_rest.as_ptr().cast(), LANES, 0) };
    }
    let mut out = [[0.0; R]; T];
    for (values, sums) in out.iter_mut().zip(&sums) {
        for (value, &[low, high]) in values.iter_mut().zip(sums) {
            *value = reduce(low, high);
        }
    }
    out
}

/// Sixteen more elements of every dot product of a tile.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn step<const D: u8, const T: usize, const R: usize>(
    sums: &mut [[[__m256; 2]; R]; T],
    x: *const f32,
    stride: usize,
    w: *const u8,
    ld: usize,
    k: usize,
) {
    for half in 0..2 {
        let mut weights = [_mm256_setzero_ps(); R];
        for (r, weight) in weights.iter_mut().enumerate() {
            // SAFETY: the caller's.
            *weight = unsafe { load::<D>(w, r * ld + k + half * HALF) };
        }
        for (t, row) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's.
            let x = unsafe { _mm256_loadu_ps(x.add(t * stride + half * HALF)) };
            for (sum, weight) in row.iter_mut().zip(weights) {
                sum[half] = _mm256_fmadd_ps(x, weight, sum[half]);
            }
        }
    }
}

/// The tree: lane i + lane i+8, then + i+4, + i+2, + i+1.
#[inline]
#[target_feature(enable = "avx2")]
fn reduce(low: __m256, high: __m256) -> f32 {
    let eight = _mm256_add_ps(low, high);
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// Eight elements from element `at` on, widened.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load<const D: u8>(base: *const u8, at: usize) -> __m256 {
    // SAFETY: the caller's: eight elements are there; unaligned loads.
    unsafe {
        match D {
            BF16 => {
                let halves = _mm_loadu_si128(base.add(at * 2).cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
            }
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(base.add(at * 2).cast())),
            I8 => _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(base.add(at).cast()))),
            F8 => widen_f8(_mm_loadl_epi64(base.add(at).cast())),
            _ => _mm256_loadu_ps(base.add(at * 4).cast()),
        }
    }
}

/// The lower eight bytes, e4m3 as `weights::fp8` widens it.
#[inline]
#[target_feature(enable = "avx2")]
fn widen_f8(bytes: __m128i) -> __m256 {
    let words = _mm256_cvtepu8_epi32(bytes);
    let size = _mm256_and_si256(words, _mm256_set1_epi32(0x7f));
    let sign = _mm256_slli_epi32::<24>(_mm256_xor_si256(words, size));
    let rebias = _mm256_castsi256_ps(_mm256_set1_epi32((120 + 127) << 23));
    let value = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32::<20>(size)), rebias);
    let nan = _mm256_castsi256_ps(_mm256_cmpeq_epi32(size, _mm256_set1_epi32(0x7f)));
    let value = _mm256_blendv_ps(value, _mm256_set1_ps(f32::NAN), nan);
    _mm256_or_ps(value, _mm256_castsi256_ps(sign))
}

/// See [`super::accumulate`].
///
/// # Safety
/// AVX2, FMA and F16C are there; all rows are inside their slices.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn accumulate<const D: u8>(p: Rows<'_>, v: Matrix<'_>, acc: &mut [f32]) {
    let mut row = 0;
    while row < p.count {
        // SAFETY: rows row..row + step of p and acc are inside (checked by the caller).
        unsafe {
            let (p_row, acc_row) = (p.data.as_ptr().add(row * p.stride), acc.as_mut_ptr().add(row * v.cols));
            row += match p.count - row {
                4.. => rows::<D, 4>(p_row, p.stride, v, acc_row),
                2.. => rows::<D, 2>(p_row, p.stride, v, acc_row),
                _ => rows::<D, 1>(p_row, p.stride, v, acc_row),
            };
        }
    }
}

/// `G` rows of accumulators, all of their columns. Returns `G`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows<const D: u8, const G: usize>(p: *const f32, stride: usize, v: Matrix<'_>, acc: *mut f32) -> usize {
    let whole = v.cols / LANES * LANES;
    for d in (0..whole).step_by(LANES) {
        let mut sums = [[_mm256_setzero_ps(); 2]; G];
        for (g, row) in sums.iter_mut().enumerate() {
            for (half, sum) in row.iter_mut().enumerate() {
                // SAFETY: columns d..d + 16 of row g of acc.
                *sum = unsafe { _mm256_loadu_ps(acc.add(g * v.cols + d + half * HALF)) };
            }
        }
        for j in 0..v.rows {
            // SAFETY: columns d..d + 16 of row j of v.
            let values = unsafe {
                let at = j * v.cols + d;
                [load::<D>(v.bytes.as_ptr(), at), load::<D>(v.bytes.as_ptr(), at + HALF)]
            };
            for (g, row) in sums.iter_mut().enumerate() {
                // SAFETY: element j of row g of p.
                let p = _mm256_set1_ps(unsafe { *p.add(g * stride + j) });
                for (sum, value) in row.iter_mut().zip(values) {
                    *sum = _mm256_fmadd_ps(p, value, *sum);
                }
            }
        }
        for (g, row) in sums.iter().enumerate() {
            for (half, &sum) in row.iter().enumerate() {
                // SAFETY: as for the load.
                unsafe { _mm256_storeu_ps(acc.add(g * v.cols + d + half * HALF), sum) };
            }
        }
    }
    for g in 0..G {
        for d in whole..v.cols {
            // SAFETY: row g of p and acc, column d of acc and v.
            unsafe {
                let sum = acc.add(g * v.cols + d);
                for j in 0..v.rows {
                    let value = portable::element::<D>(v.bytes.as_ptr(), j * v.cols + d);
                    *sum = (*p.add(g * stride + j)).mul_add(value, *sum);
                }
            }
        }
    }
    G
}
