//! Randomness without a state: a number is a pure function of the request's seed, the token's position, and the token.
//!
//! So what is drawn depends neither on the batch nor on who draws: a sequence that was preempted or moved goes on as if
//! nothing had been, and a draft model that draws with the target's numbers mostly draws the target's tokens.

use kvasir_types::mix;

/// 2^64 divided by the golden ratio: the step of SplitMix64.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The random numbers of one position: one for each token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Noise(u64);

impl Noise {
    /// Those of the token at `position`. The first round spreads neighbouring seeds, the second neighbouring positions.
    pub fn new(seed: u64, position: usize) -> Self {
        let start = mix(seed.wrapping_add(GOLDEN_GAMMA));
        Self(mix(start.wrapping_add(GOLDEN_GAMMA.wrapping_mul(position as u64))))
    }

    /// What the numbers are made of.
    pub fn number(self) -> u64 {
        self.0
    }

    /// Those made of that.
    pub fn of(number: u64) -> Self {
        Self(number)
    }

    /// 52 random bits for a token.
    pub fn bits(self, token: u32) -> u64 {
        mix(self.0.wrapping_add(GOLDEN_GAMMA.wrapping_mul(u64::from(token) + 1))) >> 12
    }
}

/// A number between 0 and 1 that looks random and is a pure function of its arguments, for whoever needs one.
pub fn uniform(seed: u64, position: u64) -> f64 {
    unit(Noise::new(seed, position as usize).bits(0))
}

/// How many values [`Noise::bits`] has.
const BITS: f64 = (1u64 << 52) as f64;

/// The random bits as a number that is neither 0 nor 1, each as far from its neighbours as the next.
pub(crate) fn unit(bits: u64) -> f64 {
    (bits as f64 + 0.5) / BITS
}

/// The standard Gumbel distribution's value at a uniform random number. Adding one to each logit and taking the greatest
/// draws from the softmax (Gumbel 1954; Maddison, Tarlow, Minka: A* sampling, 2014, section 2).
pub(crate) fn gumbel(bits: u64) -> f64 {
    -(-unit(bits).ln()).ln()
}

/// Greater than any value of [`gumbel`].
pub(crate) const GUMBEL_MAX: f64 = 37.0;

/// The least bits whose [`gumbel`] may exceed `value`, or fewer: a little less than exact, so that rounding here never
/// rules out what the exact value would not.
pub(crate) fn least_bits_above(value: f64) -> u64 {
    let exact = (-(-value).exp()).exp() * BITS;
    (exact as u64).saturating_sub(16)
}

#[cfg(test)]
mod tests {
    use kvasir_types::choice_seed;

    use super::*;

    fn draw(seed: u64, position: usize, token: u32) -> f64 {
        unit(Noise::new(seed, position).bits(token))
    }

    fn correlation(pairs: impl Iterator<Item = (f64, f64)>) -> (f64, usize) {
        let products: Vec<f64> = pairs.map(|(a, b)| (a - 0.5) * (b - 0.5)).collect();
        (products.iter().sum::<f64>() / products.len() as f64 * 12.0, products.len())
    }

    #[test]
    fn neighbouring_seeds_positions_tokens_and_choices_are_not_correlated() {
        for (seed, position, token) in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1), (0, 1, 1)] {
            let at = |i: u64, s: u64, p: usize, t: u32| draw(i + s, 5 + i as usize + p, i as u32 + t);
            let pairs = (0..20_000).map(|i| (at(i, 0, 0, 0), at(i, seed, position, token)));
            let (correlation, n) = correlation(pairs);
            assert!(correlation.abs() < 5.0 / (n as f64).sqrt(), "{seed} {position} {token}: {correlation}");
        }
        for choice in 1..4 {
            let (correlation, n) =
                correlation((0..20_000).map(|i| (draw(i, 9, 3), draw(choice_seed(i, choice), 9, 3))));
            assert!(correlation.abs() < 5.0 / (n as f64).sqrt(), "choice {choice}: {correlation}");
        }
        assert_eq!(choice_seed(7, 0), 7);
    }

    #[test]
    fn draws_are_uniform_along_each_axis() {
        let axes: [fn(usize) -> f64; 3] = [|i| draw(i as u64, 12, 0), |i| draw(7, i, 0), |i| draw(7, 12, i as u32)];
        for axis in axes {
            let mut buckets = [0usize; 16];
            (0..16_000).for_each(|i| buckets[(axis(i) * 16.0) as usize] += 1);
            let statistic: f64 = buckets.iter().map(|&n| (n as f64 - 1000.0).powi(2) / 1000.0).sum();
            assert!(statistic < 15.0 + 5.0 * 30f64.sqrt(), "{statistic}");
        }
    }

    #[test]
    fn the_bound_on_bits_rules_out_nothing_that_is_above() {
        for value in [-3.0, -1.0, 0.0, 0.5, 1.0, 3.0, 9.0, 20.0, 36.0] {
            let least = least_bits_above(value);
            if least > 0 {
                assert!(gumbel(least - 1) <= value, "{value}");
            }
            let close = gumbel((least + 64).min((1 << 52) - 1));
            assert!(close >= value - 1e-3 || value > 30.0, "{value}: {close}");
        }
        assert!(gumbel((1 << 52) - 1) < GUMBEL_MAX);
        assert!(gumbel(0).is_finite());
    }

    #[test]
    fn the_numbers_drawn_are_those_that_answers_were_promised_with() {
        // A change here changes the answers to requests that name their seed.
        let drawn = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (u64::MAX, 7, 5)]
            .map(|(seed, position, token)| (draw(seed, position, token) * 1e6) as u32);
        assert_eq!(drawn, [338_052, 432_744, 138_709, 269_130, 598_107]);
    }
}
