//! Truncation: which of the likeliest tokens stay.
//!
//! `min_p`, `top_k` and `top_p` all keep a beginning of the tokens sorted by likelihood. So what they leave is told by the
//! last token kept, a [`Cut`], and nothing need be sorted to find it: the first two are a threshold and a selection, the
//! third a selection by weight, each linear in the number of tokens that it looks at.

use std::cmp::Ordering;

use super::math::{self, BLOCK};

/// A token and its logit.
pub(crate) type Candidate = (f32, u32);

/// The last token kept. Of equal logits the lower token id counts as likelier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cut(pub Candidate);

impl Cut {
    /// Keeps everything.
    pub const NONE: Self = Self((f32::NEG_INFINITY, u32::MAX));

    /// Whether a token stays.
    pub fn keeps(self, candidate: Candidate) -> bool {
        likelier(&candidate, &self.0) != Ordering::Greater
    }
}

/// Orders the likelier token first.
pub(crate) fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1))
}

/// The row with the maximum of each block of it.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a> {
    pub row: &'a [f32],
    pub maxima: &'a [f32],
    /// The greatest of all.
    pub max: f32,
}

impl<'a> Blocks<'a> {
    /// The blocks that hold something of at least `least`: index of the first token, and the logits.
    pub fn at_least(self, least: f32) -> impl Iterator<Item = (u32, &'a [f32])> {
        let blocks = self.row.chunks(BLOCK).zip(self.maxima).enumerate();
        blocks.filter(move |(_, (_, max))| **max >= least).map(|(at, (block, _))| ((at * BLOCK) as u32, block))
    }

    /// Appends the tokens with a logit of at least `least` that `cut` keeps.
    pub fn gather(self, least: f32, cut: Cut, into: &mut Vec<Candidate>) {
        for (first, block) in self.at_least(least) {
            let candidates = block.iter().zip(first..).map(|(&logit, token)| (logit, token));
            into.extend(candidates.filter(|&(logit, token)| logit >= least && cut.keeps((logit, token))));
        }
    }

    /// The weight of all tokens, where the likeliest has weight 1.
    pub fn total(self, scale: f32) -> f64 {
        // A block this far below adds less to the sum than its rounding does.
        let least = self.max - 45.0 / scale;
        self.at_least(least).map(|(_, block)| math::sum_exp(block, self.max, scale)).sum()
    }

    /// Collects the `count` likeliest tokens that `cut` keeps into `into`, in no order.
    pub fn likeliest(self, count: usize, cut: Cut, order: &mut Vec<f32>, into: &mut Vec<Candidate>) {
        into.clear();
        // `count` blocks have a maximum of at least the count-th greatest maximum: so many tokens are at least that likely.
        let mut least = f32::MIN;
        if count < self.maxima.len() {
            order.clear();
            order.extend_from_slice(self.maxima);
            let (_, nth, _) = order.select_nth_unstable_by(count.saturating_sub(1), |a, b| b.total_cmp(a));
            least = nth.max(f32::MIN);
        }
        self.gather(least, cut, into);
        if count < into.len() {
            if count > 0 {
                into.select_nth_unstable_by(count - 1, likelier);
            }
            into.truncate(count);
        }
    }
}

/// Keeps tokens of at least `min_p` times the likeliest one's probability.
pub(crate) fn min_p(max: f32, temperature: f32, min_p: f32) -> Cut {
    if min_p > 0.0 { Cut((max + temperature * min_p.ln(), u32::MAX)) } else { Cut::NONE }
}

/// Keeps the fewest of these candidates that have `top_p` of their probability.
pub(crate) fn top_p_of(candidates: &mut [Candidate], max: f32, scale: f32, top_p: f32) -> Cut {
    let weight = |candidate: &Candidate| f64::from(math::exp((candidate.0 - max) * scale));
    let need = f64::from(top_p) * candidates.iter().map(weight).sum::<f64>();
    lightest_kept(candidates, need, weight)
}

/// Tokens this far below the likeliest can't be needed: a vocabulary of a million of them has 1e-8 of the probability, and
/// the greatest `top_p` below 1 leaves 6e-8 to others.
const DEPTH: f32 = 32.0;
/// Width of a bin, inverted: so narrow that few tokens share the one in which the cut falls.
const BINS_PER_UNIT: f32 = 128.0;
const BINS: usize = (DEPTH * BINS_PER_UNIT) as usize;

/// Keeps the fewest of the likeliest tokens that have `top_p` of the probability of those that `cut` keeps. A histogram of
/// the weights tells between which logits the last of them is; only tokens there are looked at one by one.
pub(crate) fn top_p(
    blocks: Blocks<'_>,
    scale: f32,
    top_p: f32,
    cut: Cut,
    bins: &mut Vec<f64>,
    scratch: &mut Vec<Candidate>,
) -> Cut {
    let depth = |logit: f32| (blocks.max - logit) * scale;
    let bin = |depth: f32| (depth * BINS_PER_UNIT) as usize;
    let least = (blocks.max - DEPTH / scale).max(f32::MIN);
    bins.clear();
    bins.resize(BINS, 0.0);
    for (first, block) in blocks.at_least(least) {
        for (&logit, token) in block.iter().zip(first..) {
            let depth = depth(logit);
            if depth < DEPTH && cut.keeps((logit, token)) {
                bins[bin(depth)] += f64::from(math::exp(-depth));
            }
        }
    }
    let mut need = f64::from(top_p) * bins.iter().sum::<f64>();
    let last = bins.iter().position(|&weight| {
        let here = weight >= need;
        need -= if here { 0.0 } else { weight };
        here
    });
    // None only if rounding kept the sum below what it was a moment ago: then everything stays.
    let Some(last) = last else { return cut };
    scratch.clear();
    for (first, block) in blocks.at_least(blocks.max - (last + 2) as f32 / BINS_PER_UNIT / scale) {
        let candidates = block.iter().zip(first..).map(|(&logit, token)| (logit, token));
        scratch.extend(
            candidates.filter(|&(logit, token)| {
                depth(logit) < DEPTH && bin(depth(logit)) == last && cut.keeps((logit, token))
            }),
        );
    }
    lightest_kept(scratch, need, |candidate| f64::from(math::exp(-depth(candidate.0))))
}

/// The last of the likeliest candidates whose weights together reach `need`.
fn lightest_kept(mut candidates: &mut [Candidate], mut need: f64, weight: impl Fn(&Candidate) -> f64) -> Cut {
    while candidates.len() > 64 {
        let middle = candidates.len() / 2;
        candidates.select_nth_unstable_by(middle, likelier);
        let (likely, rest) = candidates.split_at_mut(middle);
        let sum: f64 = likely.iter().map(&weight).sum();
        if sum >= need {
            candidates = likely;
        } else {
            need -= sum;
            candidates = rest;
        }
    }
    candidates.sort_unstable_by(likelier);
    for candidate in candidates.iter() {
        need -= weight(candidate);
        if need <= 0.0 {
            return Cut(*candidate);
        }
    }
    candidates.last().map_or(Cut::NONE, |&last| Cut(last))
}
