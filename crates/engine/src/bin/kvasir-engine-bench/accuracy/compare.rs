//! Two models' distributions of the next token, position by position.

use kvasir_model::Logits;
use kvasir_types::TokenId;
use serde::Serialize;

/// Of the reference's likeliest tokens, so many are looked at one by one: as many as a client can ask to see.
const LIKELIEST: usize = 20;

/// What was found so far.
#[derive(Default)]
pub struct Difference {
    positions: usize,
    kl_sum: f64,
    kl_max: f64,
    logprob_max: f64,
    alike: usize,
    /// Sums of the next token's negative log-probability.
    reference_nll: f64,
    candidate_nll: f64,
}

/// What it comes to.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Summary {
    #[serde(skip)] // told beside it
    pub positions: usize,
    /// Kullback-Leibler divergence of the candidate from the reference, in nats.
    pub mean_kl: f64,
    pub max_kl: f64,
    /// Of the reference's 20 likeliest tokens at each position, in nats.
    pub max_logprob_difference: f64,
    /// Positions at which both find the same token likeliest.
    pub top1_agreement: f64,
    pub reference_perplexity: f64,
    pub perplexity: f64,
    /// The candidate's over the reference's, less one.
    pub perplexity_change: f64,
}

impl Difference {
    /// Takes in the rows of both after the same tokens, but for the first `skip`; `next` are the tokens that did follow.
    pub fn add(&mut self, reference: &Logits, candidate: &Logits, next: &[TokenId], skip: usize) {
        for ((right, ours), next) in reference.iter().zip(candidate.iter()).zip(next).skip(skip) {
            self.position(right, ours, next.0 as usize);
        }
    }

    fn position(&mut self, right: &[f32], ours: &[f32], next: usize) {
        let (right_norm, our_norm) = (log_sum(right), log_sum(ours));
        let logprobs = |i: usize| (f64::from(right[i]) - right_norm, f64::from(ours[i]) - our_norm);
        let kl: f64 = (0..right.len())
            .map(|i| {
                let (p, q) = logprobs(i);
                // A token that the reference rules out adds nothing, whatever the candidate thinks of it.
                if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) }
            })
            .sum();
        self.positions += 1;
        self.kl_sum += kl.max(0.0); // rounding may leave it just below
        self.kl_max = self.kl_max.max(kl);
        let likeliest = likeliest(right);
        let differences = likeliest.iter().map(|&i| (logprobs(i).0 - logprobs(i).1).abs());
        self.logprob_max = differences.fold(self.logprob_max, f64::max);
        self.alike += usize::from(argmax(ours) == likeliest[0]);
        let (p, q) = logprobs(next);
        self.reference_nll -= p;
        self.candidate_nll -= q;
    }

    /// What all positions come to.
    pub fn summary(&self) -> Summary {
        let count = self.positions.max(1) as f64;
        let (reference, ours) = ((self.reference_nll / count).exp(), (self.candidate_nll / count).exp());
        Summary {
            positions: self.positions,
            mean_kl: self.kl_sum / count,
            max_kl: self.kl_max,
            max_logprob_difference: self.logprob_max,
            top1_agreement: self.alike as f64 / count,
            reference_perplexity: reference,
            perplexity: ours,
            perplexity_change: ours / reference - 1.0,
        }
    }
}

/// Logarithm of the sum of the exponentials.
fn log_sum(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max) + logits.iter().map(|&x| f64::from(x - max).exp()).sum::<f64>().ln()
}

fn argmax(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

/// Indexes of the largest, largest first, the lower index first of equal ones.
fn likeliest(logits: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let rank = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    let count = LIKELIEST.min(order.len());
    if count < order.len() {
        order.select_nth_unstable_by(count, rank);
        order.truncate(count);
    }
    order.sort_unstable_by(rank);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare(right: &[f32], ours: &[f32], next: u32) -> Summary {
        let rows = |rows: &[f32]| Logits { vocab: rows.len(), rows: rows.to_vec() };
        let mut difference = Difference::default();
        difference.add(&rows(right), &rows(ours), &[TokenId(next)], 0);
        difference.summary()
    }

    #[test]
    fn a_model_does_not_differ_from_itself_nor_from_itself_shifted() {
        for ours in [[0.5, 2.0, -1.0], [10.5, 12.0, 9.0]] {
            let found = compare(&[0.5, 2.0, -1.0], &ours, 1);
            assert!(found.mean_kl < 1e-12 && found.max_logprob_difference < 1e-6, "{found:?}");
            assert_eq!(found.top1_agreement, 1.0);
            assert!(found.perplexity_change.abs() < 1e-6);
        }
    }

    #[test]
    fn divergence_and_perplexity_are_those_of_the_books() {
        // P = (3/4, 1/4), Q = (1/4, 3/4): KL = 3/4 ln 3 + 1/4 ln 1/3 = 1/2 ln 3; the next token is P's likeliest.
        let found = compare(&[3f32.ln(), 0.0], &[0.0, 3f32.ln()], 0);
        assert!((found.mean_kl - 3f64.ln() / 2.0).abs() < 1e-6, "{found:?}");
        assert!((found.max_logprob_difference - 3f64.ln()).abs() < 1e-6);
        assert_eq!(found.top1_agreement, 0.0);
        assert!((found.reference_perplexity - 4.0 / 3.0).abs() < 1e-6 && (found.perplexity - 4.0).abs() < 1e-6);
    }

    #[test]
    fn the_likeliest_are_found_among_many() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 389) % 1000) as f32).collect();
        let found = likeliest(&logits);
        assert_eq!(
            found.iter().map(|&i| logits[i]).collect::<Vec<_>>(),
            (980..1000).rev().map(|x| x as f32).collect::<Vec<_>>()
        );
        assert_eq!(found[0], argmax(&logits));
    }
}
