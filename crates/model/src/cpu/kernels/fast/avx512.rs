//! AVX-512 BF16: `vdpbf16ps` is the whole inner loop.
//!
//! A tile of 4 tokens × 4 weight rows takes 8 loads for 16 products of 32 pairs each, which hides both the loads and the
//! instruction's latency: 0.93 to 0.95 of the rate from registers as long as a token block stays in the second-level
//! cache (larger tiles were not faster). One token alone is bound by memory, and eight rows at a time are eight streams.
//! The next rows are prefetched while these are used: the hardware's prefetchers stop at the end of each 4 KiB page,
//! which for a row of 1,024 weights is every other row.

use std::arch::x86_64::*;

use super::{
    super::{bytes, reduce4},
    BF16, GROUP, LINE, Product, STEP, finish, padded,
};

/// See [`super::matmul`].
///
/// # Safety
/// AVX-512 F, BW, VL, DQ and BF16 are there; the product's rows are inside their slices.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")]
pub(super) unsafe fn matmul<const D: u8>(product: Product<'_>) {
    let (rows, tokens) = (product.w.rows, product.x.tokens);
    let mut lines = vec![[0.0f32; LINE]; tokens];
    for line in (0..rows).step_by(LINE) {
        let count = LINE.min(rows - line);
        let mut row = 0;
        // SAFETY: rows line + row.. of the weights, elements row.. of each line, by the loops' conditions.
        unsafe {
            while tokens == 1 && count - row >= 8 {
                tokens_of::<D, 8>(&product, line + row, row, &mut lines);
                row += 8;
            }
            while count - row >= 4 {
                tokens_of::<D, 4>(&product, line + row, row, &mut lines);
                row += 4;
            }
            while row < count {
                tokens_of::<D, 1>(&product, line + row, row, &mut lines);
                row += 1;
            }
            for (token, values) in lines.iter_mut().enumerate() {
                finish(&product, token, line, &mut values[..count]);
            }
        }
    }
}

/// `R` rows from `row` on against all tokens; results go to elements `at..at + R` of the tokens' lines.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")]
unsafe fn tokens_of<const D: u8, const R: usize>(
    product: &Product<'_>,
    row: usize,
    at: usize,
    lines: &mut [[f32; LINE]],
) {
    let (x, cols) = (product.x.data.as_ptr(), product.w.cols);
    let width = cols * bytes(D);
    let mut token = 0;
    while token < product.x.tokens {
        let out = lines[token..].as_mut_ptr().cast::<f32>();
        // SAFETY: `R` rows of weights from `row` on, a group of packed tokens from `token` on, their lines from element
        // `at` on: all inside, by the callers.
        unsafe {
            let (w, x, out) = (product.w.bytes.as_ptr().add(row * width), x.add(token * padded(cols)), out.add(at));
            // The weights come from memory with the first group and from the cache with the others.
            token += match product.x.tokens - token {
                GROUP.. if token == 0 => tile::<D, GROUP, R, true>(x, w, cols, width, out),
                GROUP.. => tile::<D, GROUP, R, false>(x, w, cols, width, out),
                3 => tile::<D, 3, R, true>(x, w, cols, width, out),
                2 => tile::<D, 2, R, true>(x, w, cols, width, out),
                _ => tile::<D, 1, R, true>(x, w, cols, width, out),
            };
        }
    }
}

/// `T × R` dot products. Returns `T`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")]
unsafe fn tile<const D: u8, const T: usize, const R: usize, const AHEAD: bool>(
    x: *const u16,
    w: *const u8,
    cols: usize,
    width: usize,
    out: *mut f32,
) -> usize {
    let mut sums = [[_mm512_setzero_ps(); R]; T];
    let mut weights = [_mm512_setzero_si512(); R];
    let whole = cols / STEP * STEP;
    for k in (0..whole).step_by(STEP) {
        for (r, weight) in weights.iter_mut().enumerate() {
            // SAFETY: elements k..k+32 of row r; a prefetch may name any address.
            unsafe {
                let from = w.add(r * width + k * bytes(D));
                if AHEAD {
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(R * width).cast());
                }
                *weight = load::<D>(from);
            }
        }
        // SAFETY: step k of a group of T tokens.
        unsafe { step(&mut sums, x.add(k * T), &weights) };
    }
    if whole < cols {
        let mask = (1u32 << (cols - whole)) - 1;
        for (r, weight) in weights.iter_mut().enumerate() {
            // SAFETY: the mask covers what remains of row r; masked elements are not touched.
            *weight = unsafe { load_masked::<D>(w.add(r * width + whole * bytes(D)), mask) };
        }
        // SAFETY: the last step, padded with zeros.
        unsafe { step(&mut sums, x.add(whole * T), &weights) };
    }
    for (t, sums) in sums.iter().enumerate() {
        // SAFETY: R elements of token t's line.
        unsafe {
            let out = out.add(t * LINE);
            let zero = _mm512_setzero_ps();
            match R {
                1 => *out = reduce4(sums[0], zero, zero, zero)[0],
                _ => {
                    for (i, four) in sums.as_chunks::<4>().0.iter().enumerate() {
                        let [a, b, c, d] = *four;
                        out.add(i * 4).cast::<[f32; 4]>().write_unaligned(reduce4(a, b, c, d));
                    }
                }
            }
        }
    }
    T
}

/// 32 more elements of every dot product.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn step<const T: usize, const R: usize>(sums: &mut [[__m512; R]; T], x: *const u16, weights: &[__m512i; R]) {
    for (t, row) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's: T times 32 elements from x on.
        let x = unsafe { _mm512_loadu_si512(x.add(t * STEP).cast()) };
        for (sum, weight) in row.iter_mut().zip(weights) {
            *sum = dot(*sum, x, *weight);
        }
    }
}

/// `vdpbf16ps` on registers of sixteen-bit patterns.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot(sum: __m512, x: __m512i, w: __m512i) -> __m512 {
    // SAFETY: both types are 64 bytes of which every pattern is valid.
    let (x, w) = unsafe { (std::mem::transmute::<__m512i, __m512bh>(x), std::mem::transmute::<__m512i, __m512bh>(w)) };
    _mm512_dpbf16_ps(sum, x, w)
}

/// 32 elements as bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn load<const D: u8>(from: *const u8) -> __m512i {
    const { assert!(D == BF16) };
    // SAFETY: the caller's: 32 elements are there; unaligned loads.
    unsafe { _mm512_loadu_si512(from.cast()) }
}

/// The elements of `mask` as bf16, the others zero and not touched.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn load_masked<const D: u8>(from: *const u8, mask: u32) -> __m512i {
    const { assert!(D == BF16) };
    // SAFETY: the caller's.
    unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) }
}

/// One step of one dot product, for tests.
#[cfg(test)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn step_once(lanes: [f32; 16], x: &[u16; STEP], w: &[u16; STEP]) -> [f32; 16] {
    let mut out = [0.0; 16];
    // SAFETY: arrays of 64 bytes each.
    unsafe {
        let (x, w) = (_mm512_loadu_si512(x.as_ptr().cast()), _mm512_loadu_si512(w.as_ptr().cast()));
        _mm512_storeu_ps(out.as_mut_ptr(), dot(_mm512_loadu_ps(lanes.as_ptr()), x, w));
    }
    out
}
