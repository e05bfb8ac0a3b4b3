//! Token ids to text, token by token, never half a character.
//!
//! The law: the pieces of one answer, put together, are what the tokenizer would have decoded from all tokens at once;
//! and no piece holds a replacement character for a character whose rest is still to come. Two ways, by tokenizer:
//!
//! - **Bytes**: byte-level tokenizers. Append the token's bytes; give out what is complete UTF-8. Exact, and no call
//!   of the tokenizer: with the stop scanner 0.16 µs a token (dev profile).
//! - **Window**: all others (SentencePiece's spaces depend on the neighbours). Decode the last few tokens with and
//!   without the new ones; the difference is the new text. This is what text-generation-inference and vLLM do.

use std::sync::Arc;

use kvasir_types::TokenId;

use super::Model;

/// Most tokens that may be waiting for the rest of a character. An incomplete character is at most 3 bytes, hence 3
/// tokens; more than that waiting means that the replacement character is what the model wrote.
const MAX_WAITING: usize = 4;

/// Detokenizer of one answer.
pub(crate) struct Detokenizer {
    model: Arc<Model>,
    state: State,
}

enum State {
    Bytes(Utf8),
    Window(Window),
}

impl Detokenizer {
    /// One for a new answer of `model`.
    pub(crate) fn new(model: Arc<Model>) -> Self {
        let state =
            if model.vocab().concatenates() { State::Bytes(Utf8::default()) } else { State::Window(Window::default()) };
        Self { model, state }
    }

    /// Takes the next token (not a special one) and appends what text is complete to `out`.
    pub(crate) fn push(&mut self, token: TokenId, out: &mut String) {
        match &mut self.state {
            State::Bytes(utf8) => utf8.push(self.model.vocab().bytes(token), out),
            State::Window(window) => window.push(token, |ids| self.model.decode(ids), out),
        }
    }

    /// Takes a special token that is to be seen, as it is written in the vocabulary. Nothing before it waits for what is
    /// behind it.
    pub(crate) fn marker(&mut self, token: TokenId, out: &mut String) {
        self.finish(out);
        out.push_str(&String::from_utf8_lossy(self.model.vocab().bytes(token)));
    }

    /// The end: appends what waited for more. Bytes that never became a character are one replacement character.
    pub(crate) fn finish(&mut self, out: &mut String) {
        match &mut self.state {
            State::Bytes(utf8) => utf8.finish(out),
            State::Window(window) => window.finish(|ids| self.model.decode(ids), out),
        }
    }
}

/// Incremental UTF-8: at any time what came out, with the rest flushed, is `String::from_utf8_lossy` of what went in.
#[derive(Default)]
struct Utf8 {
    /// The beginning of a character; at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl Utf8 {
    fn push(&mut self, bytes: &[u8], out: &mut String) {
        if self.pending.is_empty()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            return out.push_str(text); // nearly every token
        }
        self.pending.extend_from_slice(bytes);
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            out.push_str(chunk.valid());
            done += chunk.valid().len();
            let wrong = chunk.invalid();
            let at_end = done + wrong.len() == self.pending.len();
            // Wrong because it ends too early, or wrong whatever follows?
            if wrong.is_empty() || (at_end && is_beginning(wrong)) {
                break;
            }
            out.push(char::REPLACEMENT_CHARACTER);
            done += wrong.len();
        }
        self.pending.drain(..done);
    }

    fn finish(&mut self, out: &mut String) {
        out.push_str(&String::from_utf8_lossy(&self.pending));
        self.pending.clear();
    }
}

/// Whether more bytes could make this a character.
fn is_beginning(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[derive(Default)]
struct Window {
    ids: Vec<u32>,
    /// `ids[..shown]` is in the text given out; it stays as context for the spaces of what follows.
    shown: usize,
}

impl Window {
    fn push(&mut self, token: TokenId, decode: impl Fn(&[u32]) -> String, out: &mut String) {
        self.ids.push(token.0);
        let text = decode(&self.ids);
        let waiting = self.ids.len() - self.shown;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && waiting <= MAX_WAITING {
            return;
        }
        self.show(&text, &decode, out);
    }

    fn finish(&mut self, decode: impl Fn(&[u32]) -> String, out: &mut String) {
        let text = decode(&self.ids);
        self.show(&text, &decode, out);
    }

    fn show(&mut self, text: &str, decode: &impl Fn(&[u32]) -> String, out: &mut String) {
        let before = decode(&self.ids[..self.shown]);
        let Some(new) = text.strip_prefix(&before) else {
            // The decoder changed its mind about text that is gone: nothing sensible can be added to it.
            return;
        };
        out.push_str(new);
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::model::tests::demo;

    fn pieces(tokens: &[u32]) -> Vec<String> {
        let mut detok = Detokenizer::new(demo());
        let mut pieces: Vec<String> = tokens
            .iter()
            .map(|&token| {
                let mut piece = String::new();
                detok.push(TokenId(token), &mut piece);
                piece
            })
            .collect();
        let mut rest = String::new();
        detok.finish(&mut rest);
        pieces.push(rest);
        pieces
    }

    #[test]
    fn an_emoji_over_several_tokens_appears_whole() {
        let tokens: Vec<u32> = demo().encode("a🦀b", false).unwrap().iter().map(|t| t.0).collect();
        assert!(tokens.len() > 3, "the demo tokenizer has no crab of its own: {tokens:?}");
        let pieces = pieces(&tokens);
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
        assert!(pieces.contains(&"🦀".to_owned()), "{pieces:?}");
        assert_eq!(pieces.concat(), "a🦀b");
    }

    #[test]
    fn half_a_character_at_the_end_is_one_replacement_character() {
        let mut tokens: Vec<u32> = demo().encode("a🦀", false).unwrap().iter().map(|t| t.0).collect();
        tokens.pop();
        assert_eq!(pieces(&tokens).concat(), "a\u{FFFD}");
    }

    proptest! {
        #[test]
        fn pieces_put_together_are_the_lossy_whole(
            chunks in prop::collection::vec(prop::collection::vec(prop_oneof![any::<u8>(), Just(0xF0), Just(0x9F), Just(0xA6), Just(0x80)], 0..4), 0..24)
        ) {
            let (mut utf8, mut out) = (Utf8::default(), String::new());
            for chunk in &chunks {
                utf8.push(chunk, &mut out);
                prop_assert!(utf8.pending.len() <= 3);
            }
            utf8.finish(&mut out);
            prop_assert_eq!(out, String::from_utf8_lossy(&chunks.concat()).into_owned());
        }

        #[test]
        fn the_byte_way_agrees_with_the_tokenizer(tokens in prop::collection::vec(3u32..1532, 0..40)) {
            prop_assert_eq!(pieces(&tokens).concat(), demo().decode(&tokens));
        }

        #[test]
        fn the_window_way_agrees_with_the_tokenizer(tokens in prop::collection::vec(3u32..1532, 0..24)) {
            let model = demo();
            let (mut window, mut out) = (Window::default(), String::new());
            for &token in &tokens {
                window.push(TokenId(token), |ids| model.decode(ids), &mut out);
            }
            window.finish(|ids| model.decode(ids), &mut out);
            // Where the bytes are no text at all the window may count replacement characters differently.
            let whole = model.decode(&tokens);
            if !whole.contains('\u{FFFD}') {
                prop_assert_eq!(out, whole);
            }
        }
    }
}
