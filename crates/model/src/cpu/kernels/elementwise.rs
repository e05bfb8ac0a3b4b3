//! What works element by element: written once, compiled once per instruction set.
//!
//! The bodies are plain Rust without branches on data, so the compiler vectorises them for whatever the wrapper allows.
//! Rust neither reorders nor fuses floating-point operations on its own, so all copies return the same bits.

use super::{
    Isa, LANES, Variant,
    fast::{GROUP, STEP, Step, steps},
    portable::{fold, reduce},
};
use crate::weights::fp8;

/// Compiles `body::$name` for each instruction set and dispatches.
macro_rules! per_isa {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),+)) => {
        $(#[$doc])*
        pub(crate) fn $name(isa: Isa, $($arg: $ty),+) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
            fn avx512($($arg: $ty),+) {
                body::$name($($arg),+);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),+) {
                body::$name($($arg),+);
            }
            match isa.0 {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an `Isa` proves its instructions.
                Variant::Avx512Bf16 | Variant::Avx512 => unsafe { avx512($($arg),+) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Variant::Avx2 => unsafe { avx2($($arg),+) },
                Variant::Portable => body::$name($($arg),+),
            }
        }
    };
}

per_isa! {
    /// `out = x / rms(x) · weight` for one row.
    fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32])
}

per_isa! {
    /// `gate = silu(gate) · up`, element by element.
    fn silu_mul(gate: &mut [f32], up: &[f32])
}

per_isa! {
    /// `gate = gelu(gate) · up`, element by element, by the tanh approximation.
    fn gelu_mul(gate: &mut [f32], up: &[f32])
}

per_isa! {
    /// `x = sigmoid(x)`, element by element.
    fn sigmoid(x: &mut [f32])
}

per_isa! {
    /// `x = cap · tanh(x / cap)`, element by element, exact to a millionth of the cap.
    fn soft_cap(x: &mut [f32], cap: f32)
}

per_isa! {
    /// `x += weight · y`, element by element.
    fn add_scaled(x: &mut [f32], y: &[f32], weight: f32)
}

per_isa! {
    /// Rounds rows of `cols` to bf16 and packs them for [`fast`](super::fast): whole groups, the last one perhaps smaller.
    fn pack(x: &[f32], cols: usize, out: &mut [Step])
}

per_isa! {
    /// The nearest numbers of bf16, ties to even.
    fn to_bf16(x: &[f32], out: &mut [u16])
}

per_isa! {
    /// `factor · x` as products in bf16 take it: the nearest numbers, subnormal ones zero.
    fn to_operand(x: &[f32], factor: f32, out: &mut [u16])
}

per_isa! {
    /// Two running softmaxes over different scores become one: what was summed up, and each one's `max` and `sum`.
    fn merge(acc: &mut [f32], mine: &mut (f32, f32), more: &[f32], theirs: (f32, f32))
}

per_isa! {
    /// The nearest numbers of e4m3, see [`fp8`].
    fn to_fp8(x: &[f32], out: &mut [u8])
}

per_isa! {
    /// `x += y`, element by element.
    fn add(x: &mut [f32], y: &[f32])
}

per_isa! {
    /// One step of a running softmax: takes a row's next scores, turns them into weights relative to the largest score so
    /// far, and rescales what was summed up relative to an earlier one. `max` starts at minus infinity, `sum` at zero.
    fn softmax_step(scores: &mut [f32], max: &mut f32, sum: &mut f32, acc: &mut [f32])
}

per_isa! {
    /// The first half of such a step: only the largest score so far and what follows from it. For several rows one after
    /// the other, before [`weigh`]: a row's weights need its maximum, and other rows' maxima are found meanwhile.
    fn raise(scores: &[f32], max: &mut f32, sum: &mut f32, acc: &mut [f32])
}

per_isa! {
    /// The second half, for products in bf16: weights are written to `out` as operands, and what is summed up is what they
    /// were rounded to, so that they still are shares of one.
    fn weigh(scores: &[f32], max: f32, sum: &mut f32, out: &mut [u16])
}

mod body {
    use super::*;

    #[inline(always)]
    pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane = x.mul_add(x, *lane);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane = x.mul_add(x, *lane);
        }
        let scale = 1.0 / (reduce(lanes) / x.len() as f32 + eps).sqrt();
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }

    #[inline(always)]
    pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
        for (gate, &up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + exp(-*gate)) * up;
        }
    }

    #[inline(always)]
    pub(super) fn gelu_mul(gate: &mut [f32], up: &[f32]) {
        for (gate, &up) in gate.iter_mut().zip(up) {
            // x/2 · (1 + tanh z) = x · sigmoid(2 z) with z = √(2/π) · (x + 0.044715 x³)
            let x = *gate;
            let two_z = 1.595_769 * (x + 0.044_715 * x * x * x);
            *gate = x / (1.0 + exp(-two_z)) * up;
        }
    }

    #[inline(always)]
    pub(super) fn sigmoid(x: &mut [f32]) {
        for x in x {
            *x = 1.0 / (1.0 + exp(-*x));
        }
    }

    #[inline(always)]
    pub(super) fn soft_cap(x: &mut [f32], cap: f32) {
        for x in x {
            *x = cap * (1.0 - 2.0 / (exp(2.0 * (*x / cap)) + 1.0));
        }
    }

    #[inline(always)]
    pub(super) fn add_scaled(x: &mut [f32], y: &[f32], weight: f32) {
        for (x, &y) in x.iter_mut().zip(y) {
            *x += weight * y;
        }
    }

    #[inline(always)]
    pub(super) fn pack(x: &[f32], cols: usize, out: &mut [Step]) {
        for (x, out) in x.chunks(GROUP * cols).zip(out.chunks_mut(GROUP * steps(cols))) {
            let size = x.len() / cols;
            for (token, row) in x.chunks_exact(cols).enumerate() {
                let (whole, rest) = row.as_chunks::<STEP>();
                for (k, step) in whole.iter().enumerate() {
                    let to = &mut out[k * size + token].0;
                    to.iter_mut().zip(step).for_each(|(to, &x)| *to = round_to_bf16(x));
                }
                if !rest.is_empty() {
                    let to = &mut out[whole.len() * size + token].0;
                    to.fill(0);
                    to.iter_mut().zip(rest).for_each(|(to, &x)| *to = round_to_bf16(x));
                }
            }
        }
    }

    /// To nearest, ties to even; a NaN stays one.
    #[inline(always)]
    fn nearest_bf16(x: f32) -> u16 {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        let rounded = if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x0040_0000 } else { rounded };
        (rounded >> 16) as u16
    }

    /// The same, and subnormal numbers to zero, as the instruction would take them.
    #[inline(always)]
    fn round_to_bf16(x: f32) -> u16 {
        let bits = x.to_bits();
        if bits & 0x7fff_ffff < 0x0080_0000 { (bits >> 16) as u16 & 0x8000 } else { nearest_bf16(x) }
    }

    #[inline(always)]
    pub(super) fn to_bf16(x: &[f32], out: &mut [u16]) {
        x.iter().zip(out).for_each(|(&x, out)| *out = nearest_bf16(x));
    }

    #[inline(always)]
    pub(super) fn to_operand(x: &[f32], factor: f32, out: &mut [u16]) {
        x.iter().zip(out).for_each(|(&x, out)| *out = round_to_bf16(factor * x));
    }

    #[inline(always)]
    pub(super) fn merge(acc: &mut [f32], mine: &mut (f32, f32), more: &[f32], theirs: (f32, f32)) {
        let max = if theirs.0 > mine.0 { theirs.0 } else { mine.0 };
        let (factor, other) = (exp(mine.0 - max), exp(theirs.0 - max));
        *mine = (max, theirs.1.mul_add(other, mine.1 * factor));
        for (acc, &more) in acc.iter_mut().zip(more) {
            *acc = more.mul_add(other, *acc * factor);
        }
    }

    #[inline(always)]
    pub(super) fn to_fp8(x: &[f32], out: &mut [u8]) {
        x.iter().zip(out).for_each(|(&x, out)| *out = fp8::from_f32(x));
    }

    #[inline(always)]
    pub(super) fn add(x: &mut [f32], y: &[f32]) {
        for (x, &y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }

    #[inline(always)]
    pub(super) fn softmax_step(scores: &mut [f32], max: &mut f32, sum: &mut f32, acc: &mut [f32]) {
        raise(scores, max, sum, acc);
        let new_max = *max;
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = scores.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for (lane, score) in lanes.iter_mut().zip(chunk) {
                *score = exp(*score - new_max);
                *lane += *score;
            }
        }
        for (lane, score) in lanes.iter_mut().zip(rest) {
            *score = exp(*score - new_max);
            *lane += *score;
        }
        *sum += reduce(lanes);
    }

    #[inline(always)]
    pub(super) fn weigh(scores: &[f32], max: f32, sum: &mut f32, out: &mut [u16]) {
        let mut lanes = [0.0f32; LANES];
        let ((chunks, rest), (outs, out)) = (scores.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
        for (scores, out) in chunks.iter().zip(outs) {
            for ((lane, &score), out) in lanes.iter_mut().zip(scores).zip(out) {
                let weight = round_weight(exp(score - max));
                *out = (weight.to_bits() >> 16) as u16;
                *lane += weight;
            }
        }
        if !rest.is_empty() {
            // All lanes, and what is not there is not taken: one by one would cost as much as a whole tile.
            let (mut scores, mut weights) = ([max; LANES], [0; LANES]);
            scores[..rest.len()].copy_from_slice(rest);
            for (i, ((lane, &score), out)) in lanes.iter_mut().zip(&scores).zip(&mut weights).enumerate() {
                let weight = round_weight(exp(score - max));
                *out = (weight.to_bits() >> 16) as u16;
                *lane += if i < rest.len() { weight } else { 0.0 };
            }
            out.copy_from_slice(&weights[..rest.len()]);
        }
        *sum += reduce(lanes);
    }

    /// A result of `exp` to the nearest of bf16, ties to even. There is no sign and no subnormal number to see to; a NaN
    /// becomes infinite, which makes a NaN of its row in the end.
    #[inline(always)]
    fn round_weight(x: f32) -> f32 {
        let bits = x.to_bits().min(f32::INFINITY.to_bits());
        f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
    }

    #[inline(always)]
    pub(super) fn raise(scores: &[f32], max: &mut f32, sum: &mut f32, acc: &mut [f32]) {
        // A maximum has no rounding, so its order is free; lanes let it vectorise.
        let mut maxima = [*max; LANES];
        let (chunks, rest) = scores.as_chunks::<LANES>();
        for chunk in chunks {
            for (max, &score) in maxima.iter_mut().zip(chunk) {
                *max = if score > *max { score } else { *max };
            }
        }
        for (max, &score) in maxima.iter_mut().zip(rest) {
            *max = if score > *max { score } else { *max };
        }
        let new_max = fold(maxima, |a, b| if b > a { b } else { a });
        if new_max > *max {
            let scale = exp(*max - new_max);
            *sum *= scale;
            acc.iter_mut().for_each(|value| *value *= scale);
            *max = new_max;
        }
    }

    /// `e^x` within 2 units in the last place, for the whole range of finite results (a result below the smallest normal
    /// number is that number). A NaN stays one.
    ///
    /// Cephes' `expf`: x = n·ln 2 + r with |r| ≤ ln 2 / 2, a polynomial for e^r, and n added to the exponent bits. Adding
    /// and taking off 1.5·2²³ rounds to an integer and leaves it in the low bits, with no conversion instruction.
    #[inline(always)]
    pub(in crate::cpu::kernels) fn exp(x: f32) -> f32 {
        const ROUND: f32 = 12_582_912.0;
        let x = if x < -87.3 { -87.3 } else { x };
        let x = if x > 88.0 { 88.0 } else { x };
        let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = n.mul_add(-0.693_359_4, x);
        let r = n.mul_add(2.121_944_4e-4, r);
        let p = 1.987_569_1e-4f32;
        let p = p.mul_add(r, 1.398_2e-3);
        let p = p.mul_add(r, 8.333_452e-3);
        let p = p.mul_add(r, 4.166_579_6e-2);
        let p = p.mul_add(r, 1.666_666_5e-1);
        let p = p.mul_add(r, 0.5);
        let e = p.mul_add(r * r, r) + 1.0;
        e * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
    }
}

#[cfg(test)]
pub(super) use body::exp;
