//! AVX-512 BF16: `vdpbf16ps` is the whole inner loop.
//!
//! A tile of 4 tokens × 4 weight rows takes 8 loads for 16 instructions of 16 pairs each, which hides the loads and the
//! latency; larger tiles were not faster. Who limits depends on the tokens:
//!
//! - one token: memory. Eight rows at a time, straight from where they lie; the next eight are prefetched, because the
//!   hardware's own prefetching stops at the end of every 4 KiB page, which is every other row of 1,024 weights;
//! - up to [`FEW`]: both. The groups share the work of prefetching, so that the memory is busy all the while;
//! - more: arithmetic. Four rows are copied into whole cache lines first (files align tensors to 8 bytes, and a load across
//!   two lines costs two), in the order they are used, and serve all groups from the first-level cache.

use std::arch::x86_64::*;

use super::{
    super::{avx512 as exact, bytes, reduce4},
    BF16, GROUP, LINE, Product, STEP, Step, finish, steps,
};

/// Tokens up to which weights are used where they lie.
const FEW: usize = 4 * GROUP;

/// Tokens up to which weights of a type are used where they lie: widening takes as long as a group's products.
const fn few_of(dtype: u8) -> usize {
    if dtype == BF16 { FEW } else { GROUP }
}

/// See [`super::matmul`].
///
/// # Safety
/// AVX-512 F, BW, VL, DQ and BF16 are there; the product's rows are inside their slices.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")]
pub(super) unsafe fn matmul<const D: u8>(product: Product<'_>) {
    let (rows, tokens, width) = (product.w.rows, product.x.tokens, product.w.cols * bytes(D));
    let mut lines = vec![[0.0f32; LINE]; tokens];
    let copied = tokens > few_of(D);
    let mut panel = vec![Step::default(); if copied { 4 * steps(product.w.cols) } else { 0 }];
    for line in (0..rows).step_by(LINE) {
        let count = LINE.min(rows - line);
        let mut row = 0;
        // SAFETY: rows line + row.. of the weights, elements row.. of each line, by the loops' conditions.
        unsafe {
            let weights = |row: usize| product.w.bytes.as_ptr().add((line + row) * width);
            while tokens == 1 && count - row >= 8 {
                few::<D, 8>(&product, weights(row), line, row, &mut lines);
                row += 8;
            }
            while count - row >= 4 {
                if copied {
                    copy::<D>(weights(row), product.w.cols, &mut panel);
                    many(&product, &panel, line, row, &mut lines);
                } else {
                    few::<D, 4>(&product, weights(row), line, row, &mut lines);
                }
                row += 4;
            }
            while row < count {
                few::<D, 1>(&product, weights(row), line, row, &mut lines);
                row += 1;
            }
        }
    }
}

/// Writes the lines of the group of tokens from `token` on if `done` elements are all they get. Group by group, between the
/// tiles: the caches take their time over lines that lie rows apart, and meanwhile the next tile computes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn write(product: &Product<'_>, token: usize, line: usize, done: usize, lines: &mut [[f32; LINE]]) {
    let count = LINE.min(product.w.rows - line);
    if done < count {
        return;
    }
    for (i, values) in lines.iter_mut().enumerate() {
        // SAFETY: these elements are this product's.
        unsafe {
            match count {
                LINE => finish(product, token + i, line, values),
                _ => finish(product, token + i, line, &mut values[..count]),
            }
        }
    }
}

/// `R` rows from `w` on against all tokens; results go to elements `at..at + R` of the tokens' lines.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")]
unsafe fn few<const D: u8, const R: usize>(
    product: &Product<'_>,
    w: *const u8,
    line: usize,
    at: usize,
    lines: &mut [[f32; LINE]],
) {
    let (cols, tokens) = (product.w.cols, product.x.tokens);
    let width = cols * bytes(D);
    let weights = Weights { first: w, row: width, step: STEP * bytes(D), cols };
    for token in (0..tokens).step_by(GROUP) {
        let count = GROUP.min(tokens - token);
        let lines = &mut lines[token..token + count];
        let out = lines.as_flattened_mut()[at..].as_mut_ptr();
        let x = product.x.data[token * steps(cols)..].as_ptr();
        let ahead = w.wrapping_add(R * width);
        // SAFETY: `R` rows of weights from `w` on, a group of packed tokens from `token` on, their lines from element `at`
        // on: all inside, by the callers.
        unsafe {
            match (count, tokens == FEW && R == 4) {
                (4, true) => tile::<D, 4, R, 2>(x, weights, out, ahead.wrapping_add(token / GROUP * width)),
                (4, _) if token == 0 => tile::<D, 4, R, R>(x, weights, out, ahead),
                (4, _) => tile::<D, 4, R, 0>(x, weights, out, ahead),
                (3, _) => tile::<D, 3, R, R>(x, weights, out, ahead),
                (2, _) => tile::<D, 2, R, R>(x, weights, out, ahead),
                _ => tile::<D, 1, R, R>(x, weights, out, ahead),
            };
            write(product, token, line, at + R, lines);
        }
    }
}

/// Four copied rows against all tokens.
///
/// Not in pieces of fewer columns, though long rows and a group of tokens together fill the first-level cache: sums put
/// aside cost more than that.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")]
unsafe fn many(product: &Product<'_>, panel: &[Step], line: usize, at: usize, lines: &mut [[f32; LINE]]) {
    let (tokens, steps) = (product.x.tokens, steps(product.w.cols));
    for token in (0..tokens).step_by(GROUP) {
        let count = GROUP.min(tokens - token);
        let lines = &mut lines[token..token + count];
        let out = lines.as_flattened_mut()[at..].as_mut_ptr();
        let x = product.x.data[token * steps..].as_ptr();
        // SAFETY: a group of `count` tokens, elements `at..at + 4` of their lines; the panel is four rows of whole steps.
        unsafe {
            match count {
                4 => grid::<4>(x, panel, out),
                3 => grid::<3>(x, panel, out),
                2 => grid::<2>(x, panel, out),
                _ => grid::<1>(x, panel, out),
            }
            write(product, token, line, at + 4, lines);
        }
    }
}

/// A group of `T` tokens against four copied rows.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")]
unsafe fn grid<const T: usize>(x: *const Step, panel: &[Step], out: *mut f32) {
    let mut sums = [[_mm512_setzero_ps(); 4]; GROUP];
    for (k, rows) in panel.as_chunks::<4>().0.iter().enumerate() {
        // SAFETY: steps are whole cache lines; step k of T tokens.
        unsafe {
            let weights = [
                _mm512_load_si512(rows[0].0.as_ptr().cast()),
                _mm512_load_si512(rows[1].0.as_ptr().cast()),
                _mm512_load_si512(rows[2].0.as_ptr().cast()),
                _mm512_load_si512(rows[3].0.as_ptr().cast()),
            ];
            let sums: &mut [[__m512; 4]; T] = sums.first_chunk_mut().expect("T is at most a group");
            step(sums, x.add(k * T), &weights);
        }
    }
    for (t, four) in reduce16(sums)[..T].iter().enumerate() {
        // SAFETY: four elements of token t's line.
        unsafe { _mm_storeu_ps(out.add(t * LINE), *four) };
    }
}

/// The trees of sixteen sums at once, in the order of [`reduce`](super::super::portable::reduce): at every level two
/// registers become one. Four results for each token.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn reduce16(sums: [[__m512; 4]; GROUP]) -> [__m128; GROUP] {
    // Row r of every token in one register, a quarter each; then rows 0 to 3 side by side in each quarter.
    let mut rows = [_mm512_setzero_ps(); 4];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = quarters(halves(sums[0][r], sums[1][r]), halves(sums[2][r], sums[3][r]));
    }
    let all = lanes(pairs(rows[0], rows[1]), pairs(rows[2], rows[3]));
    [
        _mm512_castps512_ps128(all),
        _mm512_extractf32x4_ps::<1>(all),
        _mm512_extractf32x4_ps::<2>(all),
        _mm512_extractf32x4_ps::<3>(all),
    ]
}

/// Quarters 0 + 2 and 1 + 3 of `a`, then of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
}

/// Quarters 0 + 1 and 2 + 3 of `a`, then of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarters(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
}

/// Inside each quarter: lanes 0 + 2 and 1 + 3 of `a`, then of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_ps::<0b01_00_01_00>(a, b), _mm512_shuffle_ps::<0b11_10_11_10>(a, b))
}

/// Inside each quarter: lanes 0 + 1 and 2 + 3 of `a`, then of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn lanes(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_ps::<0b10_00_10_00>(a, b), _mm512_shuffle_ps::<0b11_01_11_01>(a, b))
}

/// Copies four rows of `cols` elements from `w` on: a step of each in turn, padded with zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn copy<const D: u8>(w: *const u8, cols: usize, panel: &mut [Step]) {
    let (width, whole) = (cols * bytes(D), cols / STEP);
    for r in 0..4 {
        for (k, to) in panel[r..].iter_mut().step_by(4).enumerate() {
            // SAFETY: elements of row r, as many as there are; a step's own 64 bytes.
            unsafe {
                let from = w.add(r * width + k * STEP * bytes(D));
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(4 * width).cast());
                let step = if k < whole { load::<D>(from) } else { load_masked::<D>(from, mask(cols)) };
                _mm512_store_si512(to.0.as_mut_ptr().cast(), step);
            }
        }
    }
}

/// Which elements of a row's last, incomplete step are there.
fn mask(cols: usize) -> u32 {
    (1 << (cols % STEP)) - 1
}

/// Where a tile's weights lie: `row` bytes between its rows, `step` bytes between the steps of a row.
#[derive(Clone, Copy)]
struct Weights {
    first: *const u8,
    row: usize,
    step: usize,
    cols: usize,
}

/// `T × R` dot products; meanwhile `P` rows from `ahead` on are fetched.
///
/// Not inlined: the compiler would compute the addresses of all variants' loops beforehand and keep them in memory.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")]
unsafe fn tile<const D: u8, const T: usize, const R: usize, const P: usize>(
    x: *const Step,
    w: Weights,
    out: *mut f32,
    ahead: *const u8,
) {
    let mut sums = [[_mm512_setzero_ps(); R]; T];
    let mut weights = [_mm512_setzero_si512(); R];
    let whole = w.cols / STEP;
    for k in 0..whole {
        for p in 0..P {
            // Any address may be named: a prefetch of what is not there does nothing.
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(k * STEP * bytes(D) + p * w.row).cast());
        }
        for (r, weight) in weights.iter_mut().enumerate() {
            // SAFETY: step k of row r.
            *weight = unsafe { load::<D>(w.first.add(r * w.row + k * w.step)) };
        }
        // SAFETY: step k of a group of T tokens.
        unsafe { step(&mut sums, x.add(k * T), &weights) };
    }
    if !w.cols.is_multiple_of(STEP) {
        for (r, weight) in weights.iter_mut().enumerate() {
            // SAFETY: the mask covers what remains of row r; masked elements are not touched.
            *weight = unsafe { load_masked::<D>(w.first.add(r * w.row + whole * w.step), mask(w.cols)) };
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
}

/// 32 more elements of every dot product.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn step<const T: usize, const R: usize>(sums: &mut [[__m512; R]; T], x: *const Step, weights: &[__m512i; R]) {
    for (t, row) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's: T steps from x on.
        let x = unsafe { _mm512_load_si512(x.add(t).cast()) };
        for (sum, weight) in row.iter_mut().zip(weights) {
            *sum = dot(*sum, x, *weight);
        }
    }
}

/// `vdpbf16ps` on registers of sixteen-bit patterns.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn dot(sum: __m512, x: __m512i, w: __m512i) -> __m512 {
    // SAFETY: both types are 64 bytes of which every pattern is valid.
    let (x, w) = unsafe { (std::mem::transmute::<__m512i, __m512bh>(x), std::mem::transmute::<__m512i, __m512bh>(w)) };
    _mm512_dpbf16_ps(sum, x, w)
}

/// 32 elements as bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c")]
pub(super) unsafe fn load<const D: u8>(from: *const u8) -> __m512i {
    // SAFETY: the caller's: 32 elements are there; unaligned loads.
    unsafe {
        match D {
            BF16 => _mm512_loadu_si512(from.cast()),
            _ => narrow(exact::load::<D>(from, 0), exact::load::<D>(from, 16)),
        }
    }
}

/// The elements of `mask` as bf16, the others zero and not touched.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c")]
pub(super) unsafe fn load_masked<const D: u8>(from: *const u8, mask: u32) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        match D {
            BF16 => _mm512_maskz_loadu_epi16(mask, from.cast()),
            _ => narrow(
                exact::load_masked::<D>(from, 0, mask as u16),
                exact::load_masked::<D>(from, 16, (mask >> 16) as u16),
            ),
        }
    }
}

/// 32 numbers that bf16 holds exactly, in it.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn narrow(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both types are 64 bytes of which every pattern is valid.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
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
