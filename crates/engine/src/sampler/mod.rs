//! From a row of logits to a token.
//!
//! A token depends on the logits, the request's [`Sampling`] and the tokens before it, on nothing else: not on the batch,
//! not on how often the sequence was preempted, not on who else samples. Order of operations (vLLM's, but for the mask):
//!
//! 1. log-probabilities, if wanted: of the logits as the model gave them;
//! 2. `logit_bias`, then the penalties (repetition, then frequency and presence). Bias first: so a repetition penalty acts
//!    on what the client made of a token, and a ban (−100) stays one;
//! 3. the grammar's mask: after these, so that nothing can bring back a token that it forbids;
//! 4. `min_tokens`: no end or stop token yet. After the mask, because it gives way where the mask leaves nothing else: a
//!    text that is complete by its grammar ends;
//! 5. `temperature` below 1e-5 (vLLM's bound): the likeliest token. Otherwise the logits are divided by it;
//! 6. `min_p` and `top_k`, which commute, then `top_p` of what they left;
//! 7. a draw from what is left.
//!
//! The draw is the Gumbel-max trick: of all tokens kept, the one with the greatest logit + noise, the noise a function of
//! seed, position and token. It needs no sum over the vocabulary, and it is what makes draft models work under sampling:
//! two distributions drawn from with the same noise give the same token with probability at least (1 − d) / (1 + d), d their
//! total variation distance (Daliri, Musco, Suresh: Coupling without communication and drafter-invariant speculative
//! decoding, 2024, theorem 2), where inverting the distribution function would not: there a small change to a token with a
//! low id moves the intervals of all that follow.
//!
//! Equal logits: the lower token id counts as likelier. Nothing the size of the vocabulary is allocated once a sampler is
//! warm. `examples/sampler.rs` measures.

mod cut;
mod history;
mod mask;
mod math;
mod random;

use kvasir_model::{LIKELIEST, Likely, Need, Row};
pub use kvasir_types::choice_seed;
pub(crate) use kvasir_types::mix;
use kvasir_types::{Sampled, Sampling, TokenId, TopLogprob};

use self::{
    cut::{Blocks, Candidate, Cut, likelier},
    random::Noise,
};
pub use self::{history::History, mask::Mask, random::uniform};
use crate::Error;

/// Temperatures below this are as good as 0.
const GREEDY: f32 = 1e-5;

/// What a token depends on besides the logits.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// What the request wants.
    pub sampling: &'a Sampling,
    /// The token's place in the sequence.
    pub position: usize,
    /// The tokens before it.
    pub history: &'a History,
    /// The model's end tokens.
    pub eos: &'a [TokenId],
    /// What the grammar allows.
    pub mask: Option<&'a Mask>,
}

impl Ask<'_> {
    fn ends(&self) -> impl Iterator<Item = usize> {
        let eos = if self.sampling.ignore_eos { &[] } else { self.eos };
        eos.iter().chain(&self.sampling.stop_token_ids).map(|token| token.0 as usize)
    }

    fn too_short_to_end(&self) -> bool {
        self.history.answered() < self.sampling.min_tokens as usize
    }

    fn edits(&self) -> bool {
        let sampling = self.sampling;
        self.mask.is_some() || !sampling.logit_bias.is_empty() || sampling.penalizes() || self.too_short_to_end()
    }

    /// How much of a row it takes to choose as one would of the whole of it, for the token `ahead` behind this one. Some tokens are
    /// enough where nothing changes the row before, no sum over all of it is told, and no token beyond them can be chosen.
    pub(crate) fn need(&self, vocab: usize, ahead: usize) -> Need {
        let Sampling { temperature, top_k, top_p, min_p, logprobs, seed, .. } = *self.sampling;
        let top_k = usize::try_from(top_k).unwrap_or(usize::MAX);
        if logprobs.is_some() || self.edits() {
            Need::Whole
        } else if temperature < GREEDY || (1..=LIKELIEST.min(vocab.saturating_sub(1))).contains(&top_k) {
            Need::Likeliest
        } else if (top_k == 0 || top_k >= vocab) && top_p >= 1.0 && min_p <= 0.0 {
            let noise = Noise::new(seed, self.position + ahead).number();
            Need::Drawn { noise, scale: temperature.recip() }
        } else {
            Need::Whole
        }
    }
}

/// All tokens of a row that are possible, those that a draw with this noise prefers first.
pub(crate) fn drawable(row: &[f32], noise: u64, scale: f32) -> Vec<Likely> {
    let sum =
        |&(logit, token): &Likely| f64::from(logit) * f64::from(scale) + random::gumbel(Noise::of(noise).bits(token.0));
    let mut tokens: Vec<Likely> = row.iter().zip(0..).map(|(&logit, token)| (logit, TokenId(token))).collect();
    tokens.retain(|(logit, _)| *logit > f32::NEG_INFINITY);
    tokens.sort_by(|a, b| sum(b).total_cmp(&sum(a)));
    tokens
}

/// Chooses tokens. Holds memory to work in and nothing else: any sampler gives the same answer to the same question.
#[derive(Debug, Default)]
pub struct Sampler {
    maxima: Vec<f32>,
    order: Vec<f32>,
    bins: Vec<f64>,
    candidates: Vec<Candidate>,
    banned: Vec<(usize, f32)>,
    untouched: Vec<f32>,
}

impl Sampler {
    /// Chooses the next token. `row` is used up: biases, penalties and masks are applied to it in place.
    ///
    /// # Errors
    /// [`Error::BadLogits`] if some logit is NaN or +∞, or no token that is allowed has a finite one. Single tokens may be
    /// at −∞: they are never chosen.
    pub fn sample(&mut self, row: &mut [f32], ask: Ask<'_>) -> Result<Sampled, Error> {
        self.choose(row, ask).ok_or(Error::BadLogits { position: ask.position })
    }

    /// The same of a row of which maybe only the likeliest tokens are there: where that is enough ([`Ask::need`]) it is the
    /// same token.
    pub(crate) fn sample_row(&mut self, row: Row<'_>, ask: Ask<'_>) -> Result<Sampled, Error> {
        match row {
            Row::Whole(row) => self.sample(row, ask),
            Row::Few { tokens, max } => self.few(tokens, max, ask).ok_or(Error::BadLogits { position: ask.position }),
        }
    }

    fn few(&mut self, tokens: &[Likely], max: f32, ask: Ask<'_>) -> Option<Sampled> {
        let Sampling { temperature, top_k, top_p, min_p, seed, .. } = *ask.sampling;
        let &(_, first) = tokens.first()?;
        let chosen = |token| Sampled { token, logprob: None, top: Vec::new() };
        if temperature < GREEDY {
            return Some(chosen(first));
        }
        let (scale, mut cut) = (temperature.recip(), cut::min_p(max, temperature, min_p));
        self.candidates.clear();
        let candidates = tokens.iter().map(|&(logit, token)| (logit, token.0));
        self.candidates.extend(candidates.filter(|&candidate| cut.keeps(candidate)));
        if top_k > 0 {
            self.candidates.truncate(usize::try_from(top_k).unwrap_or(usize::MAX));
        }
        if top_p < 1.0 {
            cut = cut::top_p_of(&mut self.candidates, max, scale, top_p);
        }
        // As `draw` does, of few.
        let noise = Noise::new(seed, ask.position);
        let mut best = (f64::NEG_INFINITY, first.0);
        for &(logit, token) in self.candidates.iter().filter(|&&candidate| cut.keeps(candidate)) {
            let sum = f64::from(logit - max) * f64::from(scale) + random::gumbel(noise.bits(token));
            if sum > best.0 || (sum == best.0 && token < best.1) {
                best = (sum, token);
            }
        }
        Some(chosen(TokenId(best.1)))
    }

    fn choose(&mut self, row: &mut [f32], ask: Ask<'_>) -> Option<Sampled> {
        let Some(count) = ask.sampling.logprobs else {
            let max = if ask.edits() { self.edit(row, ask)? } else { self.scan(row)? };
            return Some(Sampled { token: TokenId(self.token(row, max, ask)), logprob: None, top: Vec::new() });
        };
        let mut max = self.scan(row)?;
        let (top, log_sum) = self.logprobs(row, max, count.into());
        let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
        let token;
        let logit;
        if ask.edits() {
            let mut untouched = std::mem::take(&mut self.untouched);
            untouched.clear();
            untouched.extend_from_slice(row);
            max = self.edit(row, ask)?;
            token = self.token(row, max, ask);
            logit = untouched[token as usize];
            self.untouched = untouched;
        } else {
            token = self.token(row, max, ask);
            logit = row[token as usize];
        }
        let top = top.into_iter().map(|(logit, token)| TopLogprob { token: TokenId(token), logprob: logprob(logit) });
        Some(Sampled { token: TokenId(token), logprob: Some(logprob(logit)), top: top.collect() })
    }

    /// Finds the maximum of each block and of all. `None`: these are not logits.
    fn scan(&mut self, row: &[f32]) -> Option<f32> {
        self.maxima.clear();
        let mut max = f32::NEG_INFINITY;
        for block in row.chunks(math::BLOCK) {
            let block_max = math::max(block)?;
            max = if block_max > max { block_max } else { max };
            self.maxima.push(block_max);
        }
        max.is_finite().then_some(max)
    }

    /// Steps 2 to 4, and the scan of what comes out.
    fn edit(&mut self, row: &mut [f32], ask: Ask<'_>) -> Option<f32> {
        for &(token, bias) in &ask.sampling.logit_bias {
            if let Some(logit) = row.get_mut(token.0 as usize) {
                *logit += bias;
            }
        }
        ask.history.penalize(row, ask.sampling);
        if let Some(mask) = ask.mask {
            mask.apply(row);
        }
        if !ask.too_short_to_end() {
            return self.scan(row);
        }
        self.banned.clear();
        for end in ask.ends() {
            if let Some(logit) = row.get_mut(end) {
                self.banned.push((end, *logit));
                *logit = f32::NEG_INFINITY;
            }
        }
        if let Some(max) = self.scan(row) {
            return Some(max);
        }
        // In reverse, for a token that is named twice was −∞ already the second time.
        while let Some((end, logit)) = self.banned.pop() {
            row[end] = logit;
        }
        self.scan(row)
    }

    /// The likeliest tokens in order, and the logarithm of the sum of all exponentials.
    fn logprobs(&mut self, row: &[f32], max: f32, count: usize) -> (Vec<Candidate>, f64) {
        let blocks = Blocks { row, maxima: &self.maxima, max };
        let log_sum = f64::from(max) + blocks.total(1.0).ln();
        let mut top = Vec::new();
        if count > 0 {
            blocks.likeliest(count, Cut::NONE, &mut self.order, &mut self.candidates);
            self.candidates.sort_unstable_by(likelier);
            top.extend_from_slice(&self.candidates);
            // A vocabulary of which fewer are possible: the impossible ones are alternatives, too.
            let mut token = 0;
            while top.len() < count.min(row.len()) {
                if row[token as usize] == f32::NEG_INFINITY {
                    top.push((f32::NEG_INFINITY, token));
                }
                token += 1;
            }
        }
        (top, log_sum)
    }

    /// Steps 5 to 7.
    fn token(&mut self, row: &[f32], max: f32, ask: Ask<'_>) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, seed, .. } = *ask.sampling;
        let blocks = Blocks { row, maxima: &self.maxima, max };
        if temperature < GREEDY {
            return first_of(blocks);
        }
        let scale = temperature.recip();
        let mut cut = cut::min_p(max, temperature, min_p);
        self.candidates.clear();
        let top_k = usize::try_from(top_k).unwrap_or(usize::MAX);
        if top_k > 0 && top_k < row.len() {
            blocks.likeliest(top_k, cut, &mut self.order, &mut self.candidates);
            if top_k <= LIKELIEST {
                // Sums over them have an order then, so they are the same of a list of the likeliest.
                self.candidates.sort_unstable_by(likelier);
            }
            cut = self.candidates.iter().copied().max_by(likelier).map_or(cut, Cut);
        }
        if top_p < 1.0 {
            cut = if self.candidates.is_empty() {
                cut::top_p(blocks, scale, top_p, cut, &mut self.bins, &mut self.candidates)
            } else {
                cut::top_p_of(&mut self.candidates, max, scale, top_p)
            };
        }
        draw(blocks, scale, cut, Noise::new(seed, ask.position))
    }
}

/// The likeliest token.
fn first_of(blocks: Blocks<'_>) -> u32 {
    let mut held = blocks.at_least(blocks.max).flat_map(|(first, block)| block.iter().zip(first..));
    held.find(|(logit, _)| **logit == blocks.max).map_or(0, |(_, token)| token)
}

/// Of the tokens that `cut` keeps, the one with the greatest sum of logit and noise.
///
/// Noise is bounded, so blocks far below the best sum so far are passed over; and in a block, most tokens are ruled out by
/// their random bits alone, before any logarithm.
fn draw(blocks: Blocks<'_>, scale: f32, cut: Cut, noise: Noise) -> u32 {
    let height = |logit: f32| f64::from(logit - blocks.max) * f64::from(scale);
    let mut best = (f64::NEG_INFINITY, first_of(blocks));
    // The block with the maximum first: it sets a height that few others reach.
    let top = best.1 as usize / math::BLOCK;
    let order = std::iter::once(top).chain((0..blocks.maxima.len()).filter(|&at| at != top));
    for at in order {
        let block_max = blocks.maxima[at];
        let needed = best.0 - height(block_max);
        if needed > random::GUMBEL_MAX || block_max < cut.0.0 || block_max == f32::NEG_INFINITY {
            continue;
        }
        let first = at * math::BLOCK;
        let block = &blocks.row[first..blocks.row.len().min(first + math::BLOCK)];
        let mut least = random::least_bits_above(needed);
        for (&logit, token) in block.iter().zip(first as u32..) {
            let bits = noise.bits(token);
            if bits < least || logit == f32::NEG_INFINITY || !cut.keeps((logit, token)) {
                continue;
            }
            let sum = height(logit) + random::gumbel(bits);
            if sum > best.0 || (sum == best.0 && token < best.1) {
                best = (sum, token);
                least = random::least_bits_above(sum - height(block_max));
            }
        }
    }
    best.1
}

/// Chooses the token at `position` of a sequence by its logits alone: for requests without penalties, `min_tokens` and
/// grammar.
///
/// # Errors
/// As [`Sampler::sample`].
pub fn sample(logits: &[f32], sampling: &Sampling, position: usize) -> Result<Sampled, Error> {
    let ask = Ask { sampling, position, history: &History::default(), eos: &[], mask: None };
    Sampler::default().sample(&mut logits.to_vec(), ask)
}

#[cfg(test)]
mod tests;
