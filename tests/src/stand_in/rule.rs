//! The rule by which stand-ins write: what comes next is a function of everything before.

use serde::{Deserialize, Serialize};

/// Tokens of answers are from here on: words of the demo model.
const WORDS: std::ops::Range<u32> = 400..800;
/// The demo model's end token.
pub const END: u32 = 2;

/// All tokens so far, as far as the rule cares: what takes the place of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    mixed: u64,
    /// How many tokens there were.
    pub len: usize,
}

impl State {
    /// After these tokens.
    pub fn of(tokens: &[u32]) -> Self {
        tokens.iter().fold(Self { mixed: 0, len: 0 }, |state, &token| state.and(token))
    }

    /// After one more.
    #[must_use]
    pub fn and(self, token: u32) -> Self {
        Self { mixed: kvasir_types::mix(self.mixed ^ u64::from(token).wrapping_add(1)), len: self.len + 1 }
    }

    /// What comes next; `seed`: of an answer that is drawn.
    pub fn next(self, seed: Option<u64>) -> u32 {
        let drawn = seed.map_or(self.mixed, |seed| kvasir_types::mix(self.mixed ^ seed));
        WORDS.start + (drawn % u64::from(WORDS.end - WORDS.start)) as u32
    }
}

/// The greedy answer to a prompt, `len` tokens of it.
pub fn answer(prompt: &[u32], len: usize) -> Vec<u32> {
    let mut state = State::of(prompt);
    let mut said = Vec::with_capacity(len);
    for _ in 0..len {
        let token = state.next(None);
        said.push(token);
        state = state.and(token);
    }
    said
}

/// The log-probability of the chosen token.
pub fn logprob(token: u32) -> f32 {
    -0.125 * (token % 8 + 1) as f32
}

/// The likeliest tokens: the chosen one, then others that are ever less likely.
pub fn likeliest(token: u32, count: usize) -> Vec<(u32, f32)> {
    (0..count).map(|at| (WORDS.start + (token + at as u32) % 400, logprob(token) - at as f32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn going_on_says_what_would_have_been_said() {
        let prompt = [5, 6, 7];
        let whole = answer(&prompt, 9);
        let so_far: Vec<u32> = prompt.iter().chain(&whole[..4]).copied().collect();
        assert_eq!(answer(&so_far, 5), whole[4..]);
        assert_ne!(answer(&[5, 6, 8], 9), whole);
        assert!(whole.iter().all(|token| WORDS.contains(token)));
    }
}
