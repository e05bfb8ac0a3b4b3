//! Sums of exponentials over a vocabulary, in loops that compilers turn into vector instructions.
//!
//! The library's `exp` takes ten times as long and differs between libraries in the last bit. This one consists of single
//! IEEE operations in a fixed order, so the same logits give the same sum on every machine.

/// Values in a block: the maximum of each is kept, and most blocks need no second look.
pub(crate) const BLOCK: usize = 256;

/// Independent partial results, so that consecutive values need not wait for one another.
const LANES: usize = 16;

/// e to the power of `x`, for `x` ≤ 0; relative error below 2e-7, and 0 below −87.
pub(crate) fn exp(x: f32) -> f32 {
    // x = n ln 2 + r with |r| ≤ ln 2 / 2 (Cody and Waite: Software manual for the elementary functions, 1980, chapter 6).
    const ROUND: f32 = 12_582_912.0; // 1.5 × 2^23: adding it rounds to an integer, which is then in the low bits
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let bounded = if x > -87.0 { x } else { -87.0 };
    let rounded = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = bounded - n * LN2_HIGH - n * LN2_LOW;
    // Minimax coefficients of Cephes' expf.
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let power = p * r * r + r + 1.0;
    let scale = f32::from_bits((rounded.to_bits().wrapping_add(127)) << 23);
    if x >= -87.0 { power * scale } else { 0.0 }
}

/// The sum of exp((x − max) × `scale`) over the values of a block, none of which is above `max`.
pub(crate) fn sum_exp(block: &[f32], max: f32, scale: f32) -> f64 {
    let mut sums = [0f32; LANES];
    let mut chunks = block.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += exp((x - max) * scale);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(chunks.remainder()) {
        *sum += exp((x - max) * scale);
    }
    sums.iter().map(|&sum| f64::from(sum)).sum()
}

/// The greatest value of a block, −∞ if there is none; `None` if one of them is NaN or +∞.
pub(crate) fn max(block: &[f32]) -> Option<f32> {
    let (mut maxima, mut fine) = ([f32::NEG_INFINITY; LANES], [true; LANES]);
    let mut chunks = block.chunks_exact(LANES);
    for chunk in &mut chunks {
        for ((max, fine), &x) in maxima.iter_mut().zip(&mut fine).zip(chunk) {
            *max = if x > *max { x } else { *max };
            *fine &= x < f32::INFINITY;
        }
    }
    for ((max, fine), &x) in maxima.iter_mut().zip(&mut fine).zip(chunks.remainder()) {
        *max = if x > *max { x } else { *max };
        *fine &= x < f32::INFINITY;
    }
    let max = maxima.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    (!fine.contains(&false)).then_some(max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere_and_zero_below() {
        let mut worst = 0.0f64;
        for step in 0..870_000 {
            let x = -(step as f32) * 1e-4;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            worst = worst.max((ours - exact).abs() / exact);
        }
        assert!(worst < 2e-7, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        for x in [-87.1, -1e9, f32::NEG_INFINITY] {
            assert_eq!(exp(x), 0.0, "{x}");
        }
    }

    #[test]
    fn what_is_no_number_is_noticed_wherever_it_is() {
        for len in [1, 15, 16, 17, 40] {
            for at in 0..len {
                let mut block = vec![-1.0; len];
                block[at] = 2.0;
                assert_eq!(max(&block), Some(2.0));
                for bad in [f32::NAN, f32::INFINITY] {
                    block[at] = bad;
                    assert_eq!(max(&block), None);
                }
                block[at] = f32::NEG_INFINITY;
                assert_eq!(max(&block), Some(if len == 1 { f32::NEG_INFINITY } else { -1.0 }));
            }
        }
    }
}
