//! Plain Rust: every other processor, and the text the other variants are compared with.

use super::{BF16, F8, F16, I8, LANES, Matrix, Product, Rows, tiled};
use crate::weights::{fp8, widen};

/// See [`super::matmul`].
///
/// # Safety
/// The product's rows are inside their slices.
pub(super) unsafe fn matmul<const D: u8>(product: Product<'_>) {
    tiled!(product, tile::<D>, rows[1], tokens[1]);
}

/// `T × R` dot products of `cols` elements; rows of weights are `ld` elements apart.
unsafe fn tile<const D: u8, const T: usize, const R: usize>(
    x: *const f32,
    stride: usize,
    w: *const u8,
    ld: usize,
    cols: usize,
) -> [[f32; R]; T] {
    let mut out = [[0.0; R]; T];
    for (t, row) in out.iter_mut().enumerate() {
        // SAFETY: row t of the activations, by the caller.
        let x = unsafe { std::slice::from_raw_parts(x.add(t * stride), cols) };
        for (r, value) in row.iter_mut().enumerate() {
            let mut lanes = [0.0f32; LANES];
            for (step, part) in x.chunks(LANES).enumerate() {
                let (mut a, mut b) = ([0.0f32; LANES], [0.0f32; LANES]);
                a[..part.len()].copy_from_slice(part);
                for (i, b) in b[..part.len()].iter_mut().enumerate() {
                    // SAFETY: an element of row r of the matrix, by the caller.
                    *b = unsafe { element::<D>(w, r * ld + step * LANES + i) };
                }
                for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                    *lane = a.mul_add(b, *lane);
                }
            }
            *value = reduce(lanes);
        }
    }
    out
}

/// The tree that ends every sum.
#[inline(always)]
pub(super) fn reduce(lanes: [f32; LANES]) -> f32 {
    fold(lanes, |a, b| a + b)
}

/// A tree over lanes: `i` with `i + 8`, then with `i + 4`, `i + 2`, `i + 1`. Written out, so that it stays in registers.
#[inline(always)]
pub(super) fn fold(lanes: [f32; LANES], with: impl Fn(f32, f32) -> f32) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| with(lanes[i], lanes[i + 8]));
    let four: [f32; 4] = std::array::from_fn(|i| with(eight[i], eight[i + 4]));
    let two: [f32; 2] = std::array::from_fn(|i| with(four[i], four[i + 2]));
    with(two[0], two[1])
}

/// Element `at` of a matrix, widened.
///
/// # Safety
/// It is inside the matrix.
#[inline(always)]
pub(super) unsafe fn element<const D: u8>(base: *const u8, at: usize) -> f32 {
    // SAFETY: the caller's; unaligned reads of plain numbers.
    unsafe {
        match D {
            BF16 => half::bf16::from_bits(u16::from_le(base.add(at * 2).cast::<u16>().read_unaligned())).to_f32(),
            F16 => half::f16::from_bits(u16::from_le(base.add(at * 2).cast::<u16>().read_unaligned())).to_f32(),
            I8 => f32::from(base.add(at).read().cast_signed()),
            F8 => fp8::to_f32(base.add(at).read()),
            _ => f32::from_bits(u32::from_le(base.add(at * 4).cast::<u32>().read_unaligned())),
        }
    }
}

/// See [`super::accumulate`].
pub(super) fn accumulate(p: Rows<'_>, v: Matrix<'_>, acc: &mut [f32]) {
    let mut values = vec![0.0; v.cols];
    let width = v.cols * v.dtype.bytes();
    for (j, bytes) in v.bytes.chunks_exact(width).enumerate() {
        widen(bytes, v.dtype, &mut values);
        for (r, row) in acc.chunks_exact_mut(v.cols).take(p.count).enumerate() {
            let p = p.data[r * p.stride + j];
            row.iter_mut().zip(&values).for_each(|(sum, &value)| *sum = p.mul_add(value, *sum));
        }
    }
}
