//! Text to tokens, with less ado than the tokenizer library's.
//!
//! The library keeps of every word where in the text each of its bytes came from, through every step, and builds lists of names
//! and offsets in the end. A router wants ids only, and most tokenizers of language models take a text apart by steps that
//! just cut it (digits, a regular expression) and end with GPT-2's spelling of bytes as letters. For these the text is cut
//! as it lies, and only its words are given to the library's model:
//!
//! ```text
//! text ─library: added tokens, normalizer─▶ parts ─cut: digits, expressions─▶ words ─spell bytes─▶ library's model ─▶ ids
//! ```
//!
//! Expressions are the library's own, compiled by it. A tokenizer with any other step, or one that fails a trial when it is
//! loaded, is the library's alone.

use kvasir_types::TokenId;
use tokenizers::{
    Model as _, OffsetReferential, OffsetType, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer, utils::SysRegex,
};

use super::vocab::LETTERS;

/// What GPT-2 takes for a word (its encoder.py), as the library has it.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// What a text that is to be tokenized alike must hold: every kind of character, and what expressions look ahead for.
const TRIAL: [&str; 12] = [
    "",
    "Hello world, it's 12345 o'clock; they'LL see: 3.14e-10!",
    " leading and trailing  ",
    "   \n\n\t x\r\n\r\n  y \u{a0}\u{3000}z\n",
    "ﬁ Å e\u{301} é 你好，世界 ١٢٣ Ⅷ½² 😀👩‍👩‍👧 \u{200b}\u{feff}",
    "fn main() { println!(\"{:?}\", [1, 2, 3]); } // ...---===\n\n",
    "\u{0}\u{1}\u{7f}\u{80}\u{ad}\u{fffd}",
    "ДоБрЫй день 🇩🇪 İstanbul ǅ ﷺ ا\u{64e}",
    "<|im_start|>user\nword<|im_end|>\n<|endoftext|> <s> </s> [INST] x [/INST]",
    "    indented\n        more\n\t\ttabs\n",
    "https://example.org/a_b-c?d=e&f=%20#g CamelCase snake_case 1,000,000.00",
    "▁ Ġ Ċ ĉ ''' \"\" `` -- ",
];

/// A tokenizer.
pub struct Encoder {
    tokenizer: Tokenizer,
    /// `None`: only the library knows how this one takes texts apart.
    cuts: Option<Vec<Cut>>,
}

/// A step that cuts.
enum Cut {
    /// Numbers apart from the rest; each digit by itself or all that follow one another together.
    Digits { alone: bool },
    /// What an expression finds, and what is between.
    Found(SysRegex),
}

impl Encoder {
    /// Text to tokens as this tokenizer has it.
    pub fn of(tokenizer: Tokenizer) -> Self {
        let mut encoder = Self { cuts: cuts(&tokenizer), tokenizer };
        if encoder.cuts.is_some() && !TRIAL.iter().all(|text| encoder.agrees(text)) {
            encoder.cuts = None;
        }
        encoder
    }

    /// The library's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The tokens of a text, nothing put around it.
    ///
    /// # Errors
    /// The library's.
    pub fn encode(&self, text: &str) -> tokenizers::Result<Vec<TokenId>> {
        let Some(cuts) = &self.cuts else { return self.by_library(text) };
        let mut tokens = Vec::with_capacity(text.len() / 3);
        let mut spelled = String::new();
        let parts = self.tokenizer.get_added_vocabulary().extract_and_normalize(self.tokenizer.get_normalizer(), text);
        for (part, _, found) in parts.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            match found {
                Some(added) => tokens.extend(added.iter().map(|token| TokenId(token.id))),
                None => cut(cuts, part, &mut |word| {
                    spell(word, &mut spelled);
                    tokens.extend(self.tokenizer.get_model().tokenize(&spelled)?.iter().map(|token| TokenId(token.id)));
                    Ok(())
                })?,
            }
        }
        Ok(tokens)
    }

    fn by_library(&self, text: &str) -> tokenizers::Result<Vec<TokenId>> {
        Ok(self.tokenizer.encode_fast(text, false)?.get_ids().iter().copied().map(TokenId).collect())
    }

    fn agrees(&self, text: &str) -> bool {
        match (self.encode(text), self.by_library(text)) {
            (Ok(ours), Ok(theirs)) => ours == theirs,
            (ours, theirs) => ours.is_err() && theirs.is_err(),
        }
    }
}

/// The steps of a tokenizer that only cuts and then spells bytes.
fn cuts(tokenizer: &Tokenizer) -> Option<Vec<Cut>> {
    let steps = match tokenizer.get_pre_tokenizer()? {
        PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref(),
        one => std::slice::from_ref(one),
    };
    let (last, before) = steps.split_last()?;
    let mut cuts = before.iter().map(step).collect::<Option<Vec<Cut>>>()?;
    match last {
        PreTokenizerWrapper::ByteLevel(bytes) if !bytes.add_prefix_space => {
            if bytes.use_regex {
                cuts.push(Cut::Found(SysRegex::new(GPT2).ok()?));
            }
            Some(cuts)
        }
        _ => None,
    }
}

fn step(step: &PreTokenizerWrapper) -> Option<Cut> {
    match step {
        PreTokenizerWrapper::Digits(digits) => Some(Cut::Digits { alone: digits.individual_digits }),
        PreTokenizerWrapper::Split(split) if !split.invert && split.behavior == SplitDelimiterBehavior::Isolated => {
            // A copy compiles its own.
            Some(Cut::Found(split.clone().regex))
        }
        _ => None,
    }
}

/// Calls `word` for every piece that these steps leave of `text`, in order.
fn cut(cuts: &[Cut], text: &str, word: &mut dyn FnMut(&str) -> tokenizers::Result<()>) -> tokenizers::Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    let Some((first, others)) = cuts.split_first() else { return word(text) };
    let mut end = 0;
    match first {
        Cut::Digits { alone } => {
            let mut numeric = None;
            for (at, char) in text.char_indices() {
                let now = Some(char.is_numeric());
                if at > 0 && (now != numeric || (*alone && now == Some(true))) {
                    cut(others, &text[end..at], word)?;
                    end = at;
                }
                numeric = now;
            }
        }
        Cut::Found(expression) => {
            for (from, to) in expression.find_iter(text) {
                cut(others, &text[end..from], word)?;
                cut(others, &text[from..to], word)?;
                end = to;
            }
        }
    }
    cut(others, &text[end..], word)
}

/// Writes a word's bytes as letters.
fn spell(word: &str, spelled: &mut String) {
    spelled.clear();
    let letters = &*LETTERS;
    spelled.extend(word.bytes().map(|byte| letters[usize::from(byte)]));
}

#[cfg(test)]
#[path = "encoder_tests.rs"]
mod tests;
