//! Rotary position embedding: which angle each pair of a head's elements turns by at a position.
//!
//! Element `i` of the first half of a head pairs with element `i` of the second half (Hugging Face's convention), or, in
//! DeepSeek's rotated parts, with its neighbour, and turns by `position × frequency[i]`. Scaling changes the frequencies:
//!
//! - linear: all are divided by the factor;
//! - llama3: wavelengths shorter than `original / high` stay, longer than `original / low` are divided by the factor,
//!   and those between are blended smoothly (Llama 3.1's `modeling` code);
//! - yarn: the same idea with a ramp over the pairs' indices, and what is rotated is lengthened a little (YaRN, 3.4).
//!
//! Angles are computed as the reference does, position × frequency in `f32`; sine and cosine then in `f64`, so that
//! the result does not depend on a libm's `f32` routines.

use serde::Serialize;

/// Base frequency and scaling.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rope {
    /// The base of the geometric row of frequencies.
    pub theta: f64,
    /// How frequencies are stretched for contexts longer than trained on.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All alike.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// By wavelength.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_len / low_freq_factor` are scaled in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_len / high_freq_factor` are left alone.
        high_freq_factor: f64,
        /// Context length of the original training.
        original_max_len: usize,
    },
    /// By the turns a pair makes over the old context.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Pairs that turn more often are left alone.
        beta_fast: f64,
        /// Pairs that turn less often are scaled in full.
        beta_slow: f64,
        /// What is rotated becomes longer by this.
        magnitude: f64,
        /// Context length of the original training.
        original_max_len: usize,
    },
}

impl Rope {
    /// One frequency (radians per position) per pair of a head of `head_dim` elements.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let frequency = |i: usize| self.theta.powf(-((2 * i) as f64) / head_dim as f64);
        (0..head_dim / 2).map(|i| self.scaled(i, frequency(i), head_dim) as f32).collect()
    }

    /// What the length of a head is multiplied by when it is rotated.
    pub fn magnitude(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { magnitude, .. } => magnitude as f32,
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
        }
    }

    fn scaled(&self, pair: usize, frequency: f64, head_dim: usize) -> f64 {
        match self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_len } => {
                let turns = original_max_len as f64 * frequency / (2.0 * std::f64::consts::PI); // over the old context
                let smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_len, .. } => {
                // The pair that makes so many turns over the old context, as a real number.
                let pair_of = |turns: f64| {
                    let ratio = original_max_len as f64 / (turns * 2.0 * std::f64::consts::PI);
                    head_dim as f64 * ratio.ln() / (2.0 * self.theta.ln())
                };
                let low = pair_of(beta_fast).floor().max(0.0);
                let high = pair_of(beta_slow).ceil().min((head_dim - 1) as f64);
                let width = if low == high { 0.001 } else { high - low }; // the reference's way out of a division by 0
                let ramp = ((pair as f64 - low) / width).clamp(0.0, 1.0);
                ramp * frequency / factor + (1.0 - ramp) * frequency
            }
        }
    }
}

/// Sines and cosines of a run of positions, one row of `head_dim / 2` per position.
pub(crate) struct Rotations {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotations {
    /// The rotations of `positions`, in their order, lengthening by `magnitude`.
    pub(crate) fn new(frequencies: &[f32], magnitude: f32, positions: impl Iterator<Item = usize>) -> Self {
        let mut rotations = Self { half: frequencies.len(), cos: Vec::new(), sin: Vec::new() };
        for position in positions {
            for &frequency in frequencies {
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                rotations.cos.push(cos as f32 * magnitude);
                rotations.sin.push(sin as f32 * magnitude);
            }
        }
        rotations
    }

    /// Turns one head by the rotation of row `row`, neighbours being pairs.
    pub(crate) fn apply_to_neighbours(&self, row: usize, head: &mut [f32]) {
        let range = row * self.half..(row + 1) * self.half;
        let turns = self.cos[range.clone()].iter().zip(&self.sin[range]);
        for ([a, b], (&cos, &sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }

    /// Turns one head by the rotation of row `row`, the two halves' elements being pairs.
    pub(crate) fn apply(&self, row: usize, head: &mut [f32]) {
        let range = row * self.half..(row + 1) * self.half;
        let (first, second) = head.split_at_mut(self.half);
        let turns = self.cos[range.clone()].iter().zip(&self.sin[range]);
        for ((a, b), (&cos, &sin)) in first.iter_mut().zip(second).zip(turns) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3: RopeScaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_len: 8192 };

    #[test]
    fn linear_scaling_by_n_makes_position_n_times_p_look_like_p() {
        let plain = Rope { theta: 1e4, scaling: RopeScaling::None }.frequencies(64);
        let scaled = Rope { theta: 1e4, scaling: RopeScaling::Linear { factor: 4.0 } }.frequencies(64);
        for (a, b) in plain.iter().zip(&scaled) {
            assert!((a * 5.0 - b * 20.0).abs() <= a * 1e-5);
        }
    }

    #[test]
    fn llama3_leaves_high_frequencies_and_divides_low_ones() {
        let plain = Rope { theta: 5e5, scaling: RopeScaling::None }.frequencies(128);
        let scaled = Rope { theta: 5e5, scaling: LLAMA3 }.frequencies(128);
        assert_eq!(plain[0], scaled[0]);
        assert!((plain[63] / scaled[63] - 8.0).abs() < 1e-4);
        let ratios: Vec<f32> = plain.iter().zip(&scaled).map(|(a, b)| a / b).collect();
        assert!(ratios.windows(2).all(|w| w[1] >= w[0] * 0.9999), "the blend must be monotonic: {ratios:?}");
    }

    #[test]
    fn a_rotation_keeps_the_length_of_every_pair() {
        let rope = Rope { theta: 1e4, scaling: RopeScaling::None }.frequencies(8);
        let rotations = Rotations::new(&rope, 1.0, [0, 7, 8000].into_iter());
        let head: Vec<f32> = (1..=8).map(|i| i as f32).collect();
        for row in 0..3 {
            let mut turned = head.clone();
            rotations.apply(row, &mut turned);
            for i in 0..4 {
                let (before, after) = (head[i].hypot(head[i + 4]), turned[i].hypot(turned[i + 4]));
                assert!((before - after).abs() < 1e-4, "pair {i}, row {row}");
            }
        }
        let mut unturned = head.clone();
        rotations.apply(0, &mut unturned);
        assert_eq!(unturned, head);
    }
}
