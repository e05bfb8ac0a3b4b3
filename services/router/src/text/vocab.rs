//! What each token stands for, as bytes.
//!
//! ```text
//! starts: [0, 1, 3, ..]      bytes of token i = bytes[starts[i] .. starts[i + 1]]
//! ```
//!
//! Tokenizers of the byte-level kind (GPT-2, Llama 3, Qwen) write every byte of a token as one printable character; with
//! that undone, decoding is concatenation, and a table does it without asking the tokenizer. Of other tokenizers the
//! table is good for naming single tokens (log-probabilities), not for decoding: see [`super::detok`].

use std::{
    collections::{HashMap, HashSet},
    sync::LazyLock,
};

use kvasir_types::TokenId;
use tokenizers::{DecoderWrapper, Tokenizer};

/// The table.
pub(crate) struct Vocab {
    starts: Vec<u32>,
    bytes: Vec<u8>,
    special: HashSet<TokenId>,
    concatenates: bool,
}

impl Vocab {
    /// Reads the table out of a tokenizer.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Self {
        let concatenates = tokenizer.get_decoder().is_some_and(is_byte_level);
        let byte_of: HashMap<char, u8> = LETTERS.iter().copied().zip(0..=u8::MAX).collect();
        let byte_of = |letter: char| byte_of.get(&letter).copied();
        let mut tokens: Vec<(u32, String)> =
            tokenizer.get_vocab(true).into_iter().map(|(text, id)| (id, text)).collect();
        tokens.sort_unstable();

        let (mut starts, mut bytes) = (vec![0u32], Vec::new());
        for (id, text) in tokens {
            // Ids may have gaps: a missing token is an empty one.
            starts.resize(starts.len().max(id as usize + 1), bytes.len() as u32);
            if concatenates {
                push_byte_level(&text, &byte_of, &mut bytes);
            } else {
                push_sentencepiece(&text, &mut bytes);
            }
            starts.push(bytes.len() as u32);
        }
        let added = tokenizer.get_added_tokens_decoder();
        let special = added.into_iter().filter(|(_, token)| token.special).map(|(id, _)| TokenId(id)).collect();
        Self { starts, bytes, special, concatenates }
    }

    /// Ids are below this.
    pub(crate) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The token's bytes, perhaps part of a character; none for an id that is not in the table.
    pub(crate) fn bytes(&self, token: TokenId) -> &[u8] {
        let at = token.0 as usize;
        match (self.starts.get(at), self.starts.get(at + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    /// Whether the token is markup, not text (`<|im_end|>`): it is never shown.
    pub(crate) fn is_special(&self, token: TokenId) -> bool {
        self.special.contains(&token)
    }

    /// Whether the text of many tokens is just their bytes, one after the other.
    pub(crate) fn concatenates(&self) -> bool {
        self.concatenates
    }
}

fn is_byte_level(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteLevel(_) => true,
        DecoderWrapper::Sequence(parts) => matches!(parts.get_decoders(), [DecoderWrapper::ByteLevel(_)]),
        _ => false,
    }
}

/// Bytes as letters, so that each has a form that can be printed (GPT-2's `bytes_to_unicode`): those that are printable in
/// Latin-1 stand for themselves; the others, in order, are the characters from U+0100 on.
pub(super) static LETTERS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut others = '\u{100}'..;
    std::array::from_fn(|byte| match byte as u8 {
        printable @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) => char::from(printable),
        _ => others.next().expect("there are more characters than bytes"),
    })
});

fn push_byte_level(text: &str, byte_of: &impl Fn(char) -> Option<u8>, out: &mut Vec<u8>) {
    // A token with a character outside the table (an added one, `<|tool▁call|>`) stands for itself as a whole; so does
    // the tokenizer's own decoder have it.
    match text.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
        Some(bytes) => out.extend(bytes),
        None => out.extend(text.as_bytes()),
    }
}

fn push_sentencepiece(text: &str, out: &mut Vec<u8>) {
    let byte = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|digits| digits.len() == 2);
    match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
        Some(byte) => out.push(byte),
        None => out.extend(text.replace('\u{2581}', " ").as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::model::tests::demo_tokenizer;

    #[test]
    fn every_byte_has_exactly_one_printable_character() {
        let byte_of: HashMap<char, u8> = LETTERS.iter().copied().zip(0..=u8::MAX).collect();
        let byte_of = |letter: char| byte_of.get(&letter).copied();
        let bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        let distinct: HashSet<u8> = bytes.iter().copied().collect();
        assert_eq!((bytes.len(), distinct.len()), (256, 256));
    }

    #[test]
    fn the_table_says_what_the_tokenizer_says() {
        let tokenizer = demo_tokenizer();
        let vocab = Vocab::of(&tokenizer);
        assert!(vocab.concatenates());
        assert_eq!(vocab.len(), tokenizer.get_vocab_size(true));
        for id in 0..vocab.len() as u32 {
            let ours = String::from_utf8_lossy(vocab.bytes(TokenId(id))).into_owned();
            assert_eq!(ours, tokenizer.decode(&[id], false).unwrap(), "token {id}");
        }
        assert_eq!(vocab.bytes(TokenId(u32::MAX)), b"");
        assert!(vocab.is_special(TokenId(2)) && !vocab.is_special(TokenId(201)));
    }

    #[test]
    fn sentencepiece_tokens_are_named_by_their_bytes() {
        let named = |text| {
            let mut out = Vec::new();
            push_sentencepiece(text, &mut out);
            out
        };
        assert_eq!(named("\u{2581}Hello"), b" Hello");
        assert_eq!(named("<0xE4>"), [0xE4]);
        assert_eq!(named("<0xZZ>"), b"<0xZZ>");
    }
}
