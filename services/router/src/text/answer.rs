//! One answer: tokens in, visible text out, log-probabilities in step with it.
//!
//! ```text
//! token ─▶ hidden? ─▶ detok ─▶ stop strings ─▶ Piece { text, logged, stopped }
//!                       └─ where its text begins and ends ──▶ its log-probability waits until that text is out
//! ```

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use kvasir_types::{Sampled, TokenId};

use super::{Model, detok::Detokenizer, stop::StopScanner};

/// Which tokens are never shown.
#[derive(Default)]
pub(crate) struct Hidden {
    /// The model's end tokens, unless the answer goes on past them, and the request's stop tokens. The tokenizer's
    /// special tokens are hidden in any case.
    pub(crate) tokens: Arc<HashSet<TokenId>>,
    /// Special tokens that are shown all the same: whoever takes the answer apart looks for them.
    pub(crate) markers: Arc<HashSet<TokenId>>,
}

/// A visible token with its log-probabilities.
#[derive(Debug, PartialEq)]
pub(crate) struct Logged {
    /// The token and its alternatives.
    pub(crate) sampled: Sampled,
    /// Characters of the answer before this token's text.
    pub(crate) text_offset: usize,
}

/// What a token added to the answer.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Piece {
    /// Text to show, perhaps none.
    pub(crate) text: String,
    /// Log-probabilities of the tokens that became visible; empty unless asked for.
    pub(crate) logged: Vec<Logged>,
    /// A stop string was found: the answer is over.
    pub(crate) stopped: bool,
}

/// The answer so far.
pub(crate) struct Answer {
    model: Arc<Model>,
    detok: Detokenizer,
    stops: StopScanner,
    hidden: Hidden,
    waiting: VecDeque<Waiting>,
    /// Decoded so far, held-back text included.
    decoded: Extent,
    /// Bytes given out so far.
    shown_bytes: usize,
    /// Stop strings are not looked for in this many tokens to come.
    unstoppable: u32,
}

#[derive(Clone, Copy, Default)]
struct Extent {
    bytes: usize,
    chars: usize,
}

struct Waiting {
    logged: Logged,
    start_bytes: usize,
    end_bytes: usize,
}

impl Answer {
    /// A new answer of `model`.
    pub(crate) fn new(model: Arc<Model>, stops: Vec<String>, hidden: Hidden) -> Self {
        Self {
            detok: Detokenizer::new(Arc::clone(&model)),
            model,
            stops: StopScanner::new(stops),
            hidden,
            waiting: VecDeque::new(),
            decoded: Extent::default(),
            shown_bytes: 0,
            unstoppable: 0,
        }
    }

    /// The same, not ended by a stop string that begins in the first `min_tokens` tokens.
    pub(crate) fn at_least(self, min_tokens: u32) -> Self {
        Self { unstoppable: min_tokens, ..self }
    }

    /// The next token.
    pub(crate) fn push(&mut self, sampled: Sampled) -> Piece {
        let unstoppable = self.unstoppable > 0;
        self.unstoppable = self.unstoppable.saturating_sub(1);
        let is_marker = self.hidden.markers.contains(&sampled.token);
        let is_hidden = self.model.vocab().is_special(sampled.token) && !is_marker;
        if is_hidden || self.hidden.tokens.contains(&sampled.token) {
            return Piece::default();
        }
        let start = self.decoded;
        let mut new = String::new();
        if is_marker {
            self.detok.marker(sampled.token, &mut new);
        } else {
            self.detok.push(sampled.token, &mut new);
        }
        self.decoded.bytes += new.len();
        self.decoded.chars += new.chars().count();
        if sampled.logprob.is_some() {
            let logged = Logged { sampled, text_offset: start.chars };
            self.waiting.push_back(Waiting { logged, start_bytes: start.bytes, end_bytes: self.decoded.bytes });
        }
        if unstoppable { self.show(new, false) } else { self.scan(&new) }
    }

    /// The end of the tokens: what was held back.
    pub(crate) fn finish(&mut self) -> Piece {
        let mut rest = String::new();
        self.detok.finish(&mut rest);
        let mut piece = self.scan(&rest);
        if !piece.stopped {
            self.stops.finish(&mut piece.text);
            piece.logged.extend(self.waiting.drain(..).map(|waiting| waiting.logged));
        }
        piece
    }

    fn scan(&mut self, new: &str) -> Piece {
        let mut text = String::new();
        let stopped = self.stops.push(new, &mut text);
        self.show(text, stopped)
    }

    fn show(&mut self, text: String, stopped: bool) -> Piece {
        self.shown_bytes += text.len();
        let shown = self.shown_bytes;
        let mut logged = Vec::new();
        // At a stop the token that straddles the cut is still told: a part of it is visible.
        let out = |waiting: &Waiting| waiting.end_bytes <= shown || (stopped && waiting.start_bytes < shown);
        while self.waiting.front().is_some_and(out) {
            logged.extend(self.waiting.pop_front().map(|waiting| waiting.logged));
        }
        Piece { text, logged, stopped }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::model::tests::demo;

    fn sampled(token: TokenId) -> Sampled {
        Sampled { token, logprob: Some(-0.5), top: Vec::new() }
    }

    fn run(text: &str, stops: &[&str]) -> (String, Vec<usize>, bool) {
        let model = demo();
        let tokens = model.encode(text, false).unwrap();
        let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut answer = Answer::new(model, stops, Hidden::default());
        let (mut text, mut offsets) = (String::new(), Vec::new());
        for token in tokens {
            let piece = answer.push(sampled(token));
            text.push_str(&piece.text);
            offsets.extend(piece.logged.iter().map(|logged| logged.text_offset));
            if piece.stopped {
                return (text, offsets, true);
            }
        }
        let piece = answer.finish();
        text.push_str(&piece.text);
        offsets.extend(piece.logged.iter().map(|logged| logged.text_offset));
        (text, offsets, piece.stopped)
    }

    #[test]
    fn every_visible_token_is_logged_once_in_order() {
        let (text, offsets, stopped) = run("the prefix cache", &[]);
        assert_eq!((text.as_str(), stopped), ("the prefix cache", false));
        assert_eq!(offsets.len(), demo().encode("the prefix cache", false).unwrap().len());
        assert!(offsets.is_sorted() && offsets[0] == 0);
    }

    #[test]
    fn tokens_of_a_stop_string_are_not_logged() {
        let (text, offsets, stopped) = run("a prefix cache", &[" cache"]);
        assert_eq!((text.as_str(), stopped), ("a prefix", true));
        assert!(offsets.iter().all(|&offset| offset < text.len()), "{offsets:?}");
    }

    #[test]
    fn a_stop_string_ends_nothing_before_min_tokens() {
        let model = demo();
        let tokens = model.encode("a cache is a cache", false).unwrap();
        let first = model.encode("a cache", false).unwrap().len() as u32;
        let mut answer = Answer::new(model, vec![" cache".to_owned()], Hidden::default()).at_least(first);
        let (mut text, mut stopped, mut logged) = (String::new(), false, 0);
        for token in tokens {
            let piece = answer.push(sampled(token));
            text.push_str(&piece.text);
            stopped |= piece.stopped;
            logged += piece.logged.len();
        }
        assert_eq!((text.as_str(), stopped), ("a cache is a", true));
        assert!(logged > first as usize);
    }

    #[test]
    fn end_tokens_and_special_tokens_are_neither_shown_nor_logged() {
        let hidden = Hidden { tokens: Arc::new(HashSet::from([TokenId(500)])), ..Hidden::default() };
        let mut answer = Answer::new(demo(), Vec::new(), hidden);
        for token in [2, 500] {
            assert_eq!(answer.push(sampled(TokenId(token))), Piece::default());
        }
        assert_eq!(answer.finish(), Piece::default());
    }

    #[test]
    fn markers_are_shown_though_they_are_special() {
        let hidden = Hidden { markers: Arc::new(HashSet::from([TokenId(1)])), ..Hidden::default() };
        let mut answer = Answer::new(demo(), Vec::new(), hidden);
        let shown: Vec<String> = [1, 2, 1].map(|token| answer.push(sampled(TokenId(token))).text).into();
        assert_eq!(shown, ["<|im_start|>", "", "<|im_start|>"]);
    }
}
