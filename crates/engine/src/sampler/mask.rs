//! Which tokens a grammar allows next: a bit each.

use kvasir_types::TokenId;

/// A set of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask(Vec<u32>);

impl Mask {
    /// From the bits of the tokens in order, 32 to a word, the first token's lowest. Tokens beyond the words are not in
    /// the set.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self(words)
    }

    /// A set of these tokens.
    pub fn of(vocab: usize, tokens: impl IntoIterator<Item = TokenId>) -> Self {
        let mut words = vec![0; vocab.div_ceil(32)];
        for token in tokens {
            words[token.0 as usize / 32] |= 1 << (token.0 % 32);
        }
        Self(words)
    }

    /// Whether the token is in the set.
    pub fn allows(&self, token: TokenId) -> bool {
        self.0.get(token.0 as usize / 32).is_some_and(|word| word >> (token.0 % 32) & 1 == 1)
    }

    /// Makes all other tokens impossible.
    pub(crate) fn apply(&self, row: &mut [f32]) {
        for (at, part) in row.chunks_mut(32).enumerate() {
            match self.0.get(at).copied().unwrap_or(0) {
                u32::MAX => {}
                0 => part.fill(f32::NEG_INFINITY),
                word => {
                    for (bit, logit) in part.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }
}
