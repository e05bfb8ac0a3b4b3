//! The same bits on processors without `vdpbf16ps`: plain Rust, compiled for what there is.
//!
//! Each half of the instruction is a fused multiply-add and a flush, so this is several times slower than exact `f32`; it
//! is here so that machines of different age agree and so that there is a text to compare the instruction with.

use super::{
    super::{
        LANES,
        portable::{element, reduce},
    },
    GROUP, LINE, Product, STEP, finish, steps,
};

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
pub(super) unsafe fn avx512<const D: u8>(product: Product<'_>) {
    // SAFETY: the caller's.
    unsafe { portable::<D>(product) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn avx2<const D: u8>(product: Product<'_>) {
    // SAFETY: the caller's.
    unsafe { portable::<D>(product) }
}

/// See [`super::matmul`].
///
/// # Safety
/// The product's rows are inside their slices.
#[inline(always)]
pub(super) unsafe fn portable<const D: u8>(product: Product<'_>) {
    let (rows, cols, tokens) = (product.w.rows, product.w.cols, product.x.tokens);
    let steps = steps(cols);
    let mut weights = vec![0.0f32; steps * STEP];
    let mut lines = vec![[0.0f32; LINE]; tokens];
    for line in (0..rows).step_by(LINE) {
        let count = LINE.min(rows - line);
        for row in 0..count {
            for (k, weight) in weights[..cols].iter_mut().enumerate() {
                // SAFETY: element k of a row of the matrix.
                *weight = flush(unsafe { element::<D>(product.w.bytes.as_ptr(), (line + row) * cols + k) });
            }
            for (token, values) in lines.iter_mut().enumerate() {
                let (group, place) = (token / GROUP * GROUP, token % GROUP);
                let size = GROUP.min(tokens - group);
                let x = product.x.data[group * steps..][place..].iter().step_by(size);
                let pairs = weights.as_chunks::<STEP>().0.iter().zip(x);
                values[row] = reduce(pairs.fold([0.0; LANES], |lanes, (w, x)| step(lanes, &x.0, w)));
            }
        }
        for (token, values) in lines.iter_mut().enumerate() {
            // SAFETY: the caller's.
            unsafe { finish(&product, token, line, &mut values[..count]) };
        }
    }
}

/// What `vdpbf16ps` does to its sixteen lanes.
#[inline(always)]
pub(super) fn step(mut lanes: [f32; LANES], x: &[u16; STEP], w: &[f32; STEP]) -> [f32; LANES] {
    for (i, lane) in lanes.iter_mut().enumerate() {
        let odd = flush(widen(x[2 * i + 1]).mul_add(w[2 * i + 1], *lane));
        *lane = flush(widen(x[2 * i]).mul_add(w[2 * i], odd));
    }
    lanes
}

#[inline(always)]
pub(super) fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Subnormal to zero of its sign.
#[inline(always)]
pub(super) fn flush(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}
