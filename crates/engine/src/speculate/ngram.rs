//! Prompt lookup: an answer that has begun to repeat something goes on as that did.
//!
//! Answers quote their prompts: summaries, code that is changed a little, the names of things. So the longest end of the
//! text that has been there before is looked for, the latest such place, and what followed there is the guess. No model,
//! no state; what it costs is one look at each of the last tokens.

use kvasir_types::TokenId;

use super::{Guess, Proposer};
use crate::Error;

/// Guesses by looking at what the text itself has said before.
#[derive(Clone, Debug)]
pub struct NGrams {
    /// Least tokens that must agree: fewer agree by chance.
    pub least: usize,
    /// A place where so many agree is not looked beyond.
    pub most: usize,
    /// How far back to look, in tokens: 16,384 take some ten microseconds.
    pub window: usize,
}

impl Default for NGrams {
    fn default() -> Self {
        Self { least: 2, most: 5, window: 16_384 }
    }
}

impl NGrams {
    fn guess(&self, tokens: &[TokenId], limit: usize) -> Vec<TokenId> {
        let text = &tokens[tokens.len().saturating_sub(self.window)..];
        let Some((&last, before)) = text.split_last() else { return Vec::new() };
        let (mut best, mut from) = (self.least.max(1) - 1, 0);
        for at in (0..before.len()).rev() {
            if before[at] != last {
                continue;
            }
            let earlier = before[..at].iter().rev();
            let agree = 1 + earlier.zip(before.iter().rev()).take(self.most - 1).take_while(|(a, b)| a == b).count();
            if agree > best {
                (best, from) = (agree, at + 1);
                if agree >= self.most {
                    break;
                }
            }
        }
        if from == 0 {
            return Vec::new();
        }
        // A text that repeats itself: its period goes on.
        text[from..].iter().copied().cycle().take(limit).collect()
    }
}

impl Proposer for NGrams {
    fn propose(&mut self, guesses: &[Guess<'_>]) -> Result<Vec<Vec<TokenId>>, Error> {
        Ok(guesses.iter().map(|guess| self.guess(guess.tokens, guess.limit)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guess(text: &str, limit: usize) -> String {
        let tokens: Vec<_> = text.bytes().map(|byte| TokenId(byte.into())).collect();
        let drafts = NGrams::default().guess(&tokens, limit);
        drafts.into_iter().map(|token| char::from(token.0 as u8)).collect()
    }

    #[test]
    fn the_longest_and_latest_repetition_is_continued() {
        assert_eq!(guess("the cat sat, the c", 4), "at s");
        // "ab" was followed by x, later by y; "zab" by z.
        assert_eq!(guess("abx aby ab", 2), "y ", "the latest of equally long ones");
        assert_eq!(guess("zabq aby zab", 2), "q ", "a longer one, though earlier");
        assert_eq!(guess("abcabcab", 7), "cabcabc", "a period goes on");
        assert_eq!(guess("aaaa", 3), "aaa");
    }

    #[test]
    fn where_nothing_repeats_nothing_is_guessed() {
        for text in ["", "a", "ab", "abcdef", "abcdefa"] {
            assert_eq!(guess(text, 4), "", "{text}");
        }
    }

    #[test]
    fn only_the_window_is_looked_at() {
        let tokens: Vec<_> = [1, 2, 9, 3, 4, 5, 1, 2].map(TokenId).to_vec();
        assert_eq!(NGrams::default().guess(&tokens, 1), [TokenId(9)]);
        assert!(NGrams { window: 6, ..NGrams::default() }.guess(&tokens, 1).is_empty());
    }
}
