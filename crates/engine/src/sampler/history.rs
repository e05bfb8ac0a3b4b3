//! What has been written, as far as penalties and `min_tokens` care.
//!
//! It is a function of the request and the tokens alone, so it can be made anew wherever a sequence goes on.

use std::collections::HashMap;

use kvasir_types::{Sampling, TokenId};

/// The tokens before the next one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Length of the answer.
    answered: usize,
    /// How often each token is in the answer; 0 for those that are only in the prompt. Empty unless penalties are wanted.
    counts: HashMap<TokenId, u32>,
    counting: bool,
}

impl History {
    /// That of a prompt, the last tokens of which may belong to the answer.
    pub fn new(sampling: &Sampling, prompt: &[TokenId]) -> Self {
        let (prompt, answer) = prompt.split_at(prompt.len().saturating_sub(sampling.continued as usize));
        let mut history = Self { counting: sampling.penalizes(), ..Self::default() };
        if sampling.repetition_penalty != 1.0 {
            history.counts.extend(prompt.iter().map(|&token| (token, 0)));
        }
        answer.iter().for_each(|&token| history.push(token));
        history
    }

    /// One more token of the answer.
    pub fn push(&mut self, token: TokenId) {
        self.answered += 1;
        if self.counting {
            *self.counts.entry(token).or_insert(0) += 1;
        }
    }

    /// Tokens of the answer.
    pub fn answered(&self) -> usize {
        self.answered
    }

    /// Lowers the logits of tokens that have been there. As in vLLM: the repetition penalty (Keskar et al.: CTRL, 2019,
    /// section 4.1) looks at prompt and answer, the other two (OpenAI's) at the answer only.
    pub(crate) fn penalize(&self, row: &mut [f32], sampling: &Sampling) {
        for (token, &count) in &self.counts {
            let Some(logit) = row.get_mut(token.0 as usize) else { continue };
            let repetition = sampling.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            if count > 0 {
                *logit -= sampling.frequency_penalty * count as f32 + sampling.presence_penalty;
            }
        }
    }
}
