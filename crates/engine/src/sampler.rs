//! From a row of logits to a token.
//!
//! A token depends on the logits, the request's [`Sampling`] and its position, on nothing else: not on the batch, not on
//! how often the sequence was preempted, not on the machine. So randomness is not drawn from a generator with a state
//! but computed: [`uniform`] of the request's seed and the token's position.
//!
//! Order of operations, as in vLLM and transformers: temperature, then the `top_k` likeliest, then the smallest set of
//! the likeliest of those with at least `top_p` of their probability. Equal logits: the lower token id counts as likelier.
//! Sums are in f64: over a vocabulary of 150,000, f32 would lose digits that `logprobs` shows.

use std::cmp::Ordering;

use kvasir_types::{Sampled, Sampling, TokenId, TopLogprob};

use crate::Error;

/// A number in [0, 1) that looks random and is a pure function of its arguments.
///
/// Two rounds of SplitMix64's output function (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA
/// 2014, figure 15), the first to spread neighbouring seeds, the second to walk from there in steps of its golden gamma.
pub fn uniform(seed: u64, position: u64) -> f64 {
    const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
    let state = mix(seed.wrapping_add(GOLDEN_GAMMA)).wrapping_add(position.wrapping_mul(GOLDEN_GAMMA));
    // The upper 53 bits: as many as an f64 below 1 can tell apart.
    (mix(state) >> 11) as f64 / (1u64 << 53) as f64
}

/// SplitMix64's output function: every bit of the argument changes about half the bits of the result.
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Chooses the token at `position` of a sequence.
///
/// # Errors
/// [`Error::BadLogits`] if some logit is NaN or +∞, or none is finite. Single tokens may be at −∞: they are never chosen.
pub fn sample(logits: &[f32], sampling: &Sampling, position: usize) -> Result<Sampled, Error> {
    let likeliest = argmax(logits).ok_or(Error::BadLogits { position })?;
    let token = if sampling.temperature > 0.0 {
        draw(logits, logits[likeliest], sampling, uniform(sampling.seed, position as u64))
    } else {
        likeliest
    };
    let (logprob, top) = match sampling.logprobs {
        None => (None, Vec::new()),
        Some(count) => {
            let max = f64::from(logits[likeliest]);
            let log_sum = max + logits.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln();
            let logprob = |index: usize| (f64::from(logits[index]) - log_sum) as f32;
            let mut order: Vec<usize> = (0..logits.len()).collect();
            sort_likeliest(&mut order, logits, count.into());
            let top = order.into_iter().map(|index| TopLogprob { token: token_id(index), logprob: logprob(index) });
            (Some(logprob(token)), top.collect())
        }
    };
    Ok(Sampled { token: token_id(token), logprob, top })
}

fn token_id(index: usize) -> TokenId {
    TokenId(u32::try_from(index).expect("a vocabulary has at most u32::MAX tokens"))
}

/// The first index of the greatest logit, if it is finite and nothing is NaN.
fn argmax(logits: &[f32]) -> Option<usize> {
    let (mut best, mut max) = (0, f32::NEG_INFINITY);
    for (index, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return None;
        }
        if logit > max {
            (best, max) = (index, logit);
        }
    }
    max.is_finite().then_some(best)
}

fn likelier(logits: &[f32]) -> impl Fn(&usize, &usize) -> Ordering {
    |&a, &b| logits[b].partial_cmp(&logits[a]).unwrap_or(Ordering::Equal).then(a.cmp(&b))
}

/// Cuts `order` to its `count` likeliest and sorts these, without sorting the rest.
fn sort_likeliest(order: &mut Vec<usize>, logits: &[f32], count: usize) {
    let likelier = likelier(logits);
    if count < order.len() {
        if count > 0 {
            order.select_nth_unstable_by(count - 1, &likelier);
        }
        order.truncate(count);
    }
    order.sort_unstable_by(likelier);
}

/// The token whose share of the (tempered, truncated) distribution holds the point `u` of [0, 1).
fn draw(logits: &[f32], max: f32, sampling: &Sampling, u: f64) -> usize {
    let weight = |index: usize| ((f64::from(logits[index]) - f64::from(max)) / f64::from(sampling.temperature)).exp();
    let mut candidates: Vec<usize> = (0..logits.len()).collect();
    let top_k = usize::try_from(sampling.top_k).unwrap_or(usize::MAX);
    if top_k > 0 && top_k < logits.len() {
        sort_likeliest(&mut candidates, logits, top_k);
    }
    let mut total: f64 = candidates.iter().map(|&index| weight(index)).sum();
    if sampling.top_p < 1.0 {
        (candidates, total) = nucleus(candidates, logits, f64::from(sampling.top_p) * total, weight);
    }
    let mut rest = u * total;
    let mut chosen = candidates[0];
    for index in candidates {
        let share = weight(index);
        if share > 0.0 {
            // Rounding may leave a little of `rest` after the last one; then the last one it is.
            chosen = index;
            if rest < share {
                break;
            }
            rest -= share;
        }
    }
    chosen
}

/// The likeliest candidates, as few as reach `mass` (at least one), and the mass they have.
///
/// Sorting a whole vocabulary takes milliseconds, and a nucleus is usually small: so ever larger heads are sorted until
/// one is large enough.
fn nucleus(candidates: Vec<usize>, logits: &[f32], mass: f64, weight: impl Fn(usize) -> f64) -> (Vec<usize>, f64) {
    let mut head_len = 64;
    loop {
        let mut head = candidates.clone();
        sort_likeliest(&mut head, logits, head_len);
        let mut sum = 0.0;
        for (count, &index) in head.iter().enumerate() {
            sum += weight(index);
            if sum >= mass {
                head.truncate(count + 1);
                return (head, sum);
            }
        }
        if head.len() == candidates.len() {
            return (head, sum);
        }
        head_len *= 16;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tempered(temperature: f32, top_k: u32, top_p: f32, seed: u64) -> Sampling {
        Sampling { temperature, top_k, top_p, seed, ..Sampling::default() }
    }

    /// What the definition says, by sorting everything: each token's probability.
    fn exact(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(likelier(logits));
        let weight = |index: usize| (f64::from(logits[index]) / f64::from(sampling.temperature)).exp();
        if sampling.top_k > 0 {
            order.truncate(sampling.top_k as usize);
        }
        let total: f64 = order.iter().map(|&index| weight(index)).sum();
        let mut probabilities = vec![0.0; logits.len()];
        let mut sum = 0.0;
        for index in order {
            if sampling.top_p < 1.0 && sum >= f64::from(sampling.top_p) * total {
                break;
            }
            probabilities[index] = weight(index);
            sum += weight(index);
        }
        probabilities.iter_mut().for_each(|p| *p /= sum);
        probabilities
    }

    /// Pearson's statistic over draws at `draws` positions, and its degrees of freedom.
    fn chi_squared(logits: &[f32], sampling: &Sampling, draws: usize) -> (f64, usize) {
        let mut counts = vec![0usize; logits.len()];
        for position in 0..draws {
            counts[sample(logits, sampling, position).unwrap().token.0 as usize] += 1;
        }
        let expected = exact(logits, sampling);
        let (mut statistic, mut cells) = (0.0, 0);
        for (count, p) in counts.into_iter().zip(expected) {
            if p == 0.0 {
                assert_eq!(count, 0, "a truncated token was drawn");
            } else {
                statistic += (count as f64 - p * draws as f64).powi(2) / (p * draws as f64);
                cells += 1;
            }
        }
        (statistic, cells - 1)
    }

    #[test]
    fn draws_follow_the_exact_distribution() {
        let logits = [1.5, -0.3, 0.0, 2.1, 0.7, -1.0, 1.5, 0.2];
        for (temperature, top_k, top_p) in
            [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 4, 1.0), (1.0, 0, 0.8), (1.3, 6, 0.9), (0.9, 3, 0.5)]
        {
            for seed in [0, 1, 2, u64::MAX] {
                let (statistic, freedom) = chi_squared(&logits, &tempered(temperature, top_k, top_p, seed), 20_000);
                // Mean + 5 standard deviations of the chi-squared distribution: far less than 1 in 1000 by chance, and
                // the seeds are fixed.
                let limit = freedom as f64 + 5.0 * (2.0 * freedom as f64).sqrt();
                assert!(statistic <= limit, "T={temperature} k={top_k} p={top_p} seed={seed}: {statistic} > {limit}");
            }
        }
    }

    #[test]
    fn draws_at_one_position_follow_the_distribution_over_seeds() {
        // The first token of many requests with seeds 0, 1, 2, …
        let mut buckets = [0usize; 16];
        (0..16_000).for_each(|seed| buckets[(uniform(seed, 12) * 16.0) as usize] += 1);
        let statistic: f64 = buckets.iter().map(|&n| (n as f64 - 1000.0).powi(2) / 1000.0).sum();
        assert!(statistic < 15.0 + 5.0 * 30f64.sqrt(), "{statistic}");
    }

    #[test]
    fn neighbouring_seeds_and_positions_are_not_correlated() {
        for (seed_step, position_step) in [(1, 0), (0, 1), (1, 1)] {
            let n = 20_000u64;
            let product = |i: u64| (uniform(i, 5 + i) - 0.5) * (uniform(i + seed_step, 5 + i + position_step) - 0.5);
            let correlation = (0..n).map(product).sum::<f64>() / n as f64 * 12.0;
            assert!(correlation.abs() < 5.0 / (n as f64).sqrt(), "{correlation}");
        }
    }

    #[test]
    fn the_numbers_drawn_are_those_of_the_first_release() {
        // A change here changes the answers to requests that name their seed.
        let drawn: Vec<_> = [(0, 0), (1, 0), (0, 1), (u64::MAX, 7)].map(|(s, p)| (uniform(s, p) * 1e6) as u32).to_vec();
        assert_eq!(drawn, [281_761, 862_856, 652_448, 870_200]);
    }

    #[test]
    fn greedy_takes_the_lowest_of_equal_tokens() {
        let sampled = sample(&[0.0, 3.0, -1.0, 3.0], &Sampling::default(), 0).unwrap();
        assert_eq!((sampled.token, sampled.logprob, sampled.top.len()), (TokenId(1), None, 0));
        let top_1 = sample(&[0.0, 3.0, -1.0, 3.0], &tempered(1.0, 1, 1.0, 9), 0).unwrap();
        assert_eq!(top_1.token, TokenId(1));
    }

    #[test]
    fn logprobs_are_of_the_raw_distribution_and_stable() {
        // exp(10_000) is infinite in any float: only the stable form gets through.
        let logits = [10_000.0, 10_000.0 + 2f32.ln(), f32::NEG_INFINITY];
        let sampling = Sampling { logprobs: Some(20), ..tempered(0.1, 1, 0.3, 0) };
        let sampled = sample(&logits, &sampling, 0).unwrap();
        assert_eq!(sampled.token, TokenId(1));
        let told: Vec<_> = sampled.top.iter().map(|top| top.token.0).collect();
        assert_eq!(told, [1, 0, 2]);
        assert!((sampled.logprob.unwrap() - (2.0f32 / 3.0).ln()).abs() < 1e-3);
        assert!((sampled.top[1].logprob - (1.0f32 / 3.0).ln()).abs() < 1e-3);
        assert_eq!(sampled.top[2].logprob, f32::NEG_INFINITY);
        let none = sample(&logits, &Sampling { logprobs: Some(0), ..sampling }, 0).unwrap();
        assert!(none.logprob.is_some() && none.top.is_empty());
    }

    #[test]
    fn logits_without_a_meaning_are_an_error_and_not_a_panic() {
        for bad in [&[][..], &[f32::NAN, 1.0], &[1.0, f32::INFINITY], &[f32::NEG_INFINITY; 3]] {
            for temperature in [0.0, 1.0] {
                let result = sample(bad, &tempered(temperature, 0, 1.0, 0), 3);
                assert!(matches!(result, Err(Error::BadLogits { position: 3 })), "{bad:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_drawn_was_possible(
            logits in prop::collection::vec(prop_oneof![4 => -8f32..8.0, 1 => Just(f32::NEG_INFINITY), 1 => Just(1.0)], 1..300),
            temperature in 0.01f32..2.0, top_k in 0u32..40, top_p in 0.01f32..=1.0, seed: u64, position in 0usize..1000,
        ) {
            prop_assume!(logits.iter().any(|logit| logit.is_finite()));
            let sampling = tempered(temperature, top_k, top_p, seed);
            let sampled = sample(&logits, &sampling, position).unwrap();
            let p = exact(&logits, &sampling)[sampled.token.0 as usize];
            // At the nucleus's rim the two ways of summing may differ in the last digit.
            prop_assert!(p > 0.0 || top_p < 1.0, "impossible token drawn");
            prop_assert!(logits[sampled.token.0 as usize].is_finite());
            prop_assert_eq!(sample(&logits, &sampling, position).unwrap(), sampled);
        }
    }
}
