//! Reference answers: what a model folder's `golden.jsonl` says, and the bytes of its token ids.
//!
//! The answers were computed by another implementation (transformers, float32). Ours must say the same: the text, every
//! token, and the log-probabilities of the likeliest first tokens. Where the reference itself nearly hesitated (`margin`,
//! the smallest gap between its best and second-best logit), a correct implementation may differ.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

/// Below this gap between best and second-best logit, another rounding may choose differently.
pub const MARGIN: f64 = 0.05;

/// The type in which a worker keeps keys and values. The reference keeps them in float32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// The default of workers: 11 significant bits.
    #[default]
    F16,
    /// A setting: 8 significant bits.
    Bf16,
    /// A setting: nothing is rounded.
    F32,
}

impl KvDtype {
    /// As in a worker's configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// How far our log-probability may be from the reference's. Who sets bf16 accepts coarser ones: of the demo model's
    /// 300 two are further than 0.05 from the reference (0.051 and 0.059, both of tokens below e^-9).
    pub fn tolerance(self) -> f64 {
        match self {
            Self::F16 | Self::F32 => 0.05,
            Self::Bf16 => 0.1,
        }
    }
}

/// One line of `golden.jsonl`.
#[derive(Clone, Debug, Deserialize)]
pub struct Line {
    /// The chat that was asked.
    pub messages: Vec<Value>,
    /// The prompt as token ids.
    pub prompt_ids: Vec<u32>,
    /// The greedy answer as token ids, the end token included if there is one.
    pub output_ids: Vec<u32>,
    /// The greedy answer as text, special tokens left out.
    pub text: String,
    /// The likeliest first tokens and their log-probabilities.
    pub first_logprobs: HashMap<u32, f64>,
    /// The smallest gap between best and second-best logit along the answer.
    pub margin: f64,
}

/// All lines of a folder's `golden.jsonl`.
pub fn load(folder: &Path) -> Result<Vec<Line>> {
    let path = folder.join("golden.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    text.lines()
        .enumerate()
        .map(|(at, line)| serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), at + 1)))
        .collect()
}

/// What each token id stands for, read from `tokenizer.json`.
pub struct Vocabulary {
    tokens: HashMap<u32, Vec<u8>>,
    special: HashSet<u32>,
}

impl Vocabulary {
    /// Reads a byte-level BPE tokenizer's vocabulary and its added tokens.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let tokenizer: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
        let vocab = tokenizer["model"]["vocab"].as_object().context("tokenizer.json has no model.vocab object")?;
        let (mut tokens, mut special) = (HashMap::new(), HashSet::new());
        for (text, id) in vocab {
            tokens.insert(id_of(id)?, byte_level(text));
        }
        for token in tokenizer["added_tokens"].as_array().into_iter().flatten() {
            let text = token["content"].as_str().context("an added token has no content")?;
            let id = id_of(&token["id"])?;
            tokens.insert(id, text.as_bytes().to_vec());
            if token["special"] == true {
                special.insert(id);
            }
        }
        Ok(Self { tokens, special })
    }

    /// The bytes of a token; none for an unknown id.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.tokens.get(&id).map(Vec::as_slice).unwrap_or_default()
    }

    /// Whether a token marks something (the end, a turn) and is no part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }
}

fn id_of(value: &Value) -> Result<u32> {
    value.as_u64().and_then(|id| id.try_into().ok()).with_context(|| format!("not a token id: {value}"))
}

/// Byte-level BPE writes every byte as a printable character: printable Latin-1 as itself, the others, in order, as the
/// characters from U+0100 on. This is the way back.
fn byte_level(text: &str) -> Vec<u8> {
    let printable = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let hidden: Vec<u8> = (0..=255).filter(|byte| !printable(byte)).collect();
    let mut bytes = Vec::with_capacity(text.len());
    for letter in text.chars() {
        let code = letter as u32;
        match u8::try_from(code) {
            Ok(byte) => bytes.push(byte),
            Err(_) => match hidden.get((code - 0x100) as usize) {
                Some(&byte) => bytes.push(byte),
                None => bytes.extend(letter.to_string().as_bytes()),
            },
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace;

    #[test]
    fn byte_level_text_goes_back_to_bytes() {
        assert_eq!(byte_level("Ġhello"), b" hello");
        assert_eq!(byte_level("Ċ"), b"\n");
        assert_eq!(byte_level("Ã¤"), "ä".as_bytes());
    }

    #[test]
    fn the_demo_models_answers_are_the_bytes_of_their_tokens() {
        let folder = workspace::demo_model();
        let vocabulary = Vocabulary::load(&folder).unwrap();
        let lines = load(&folder).unwrap();
        assert!(lines.len() >= 60);
        for line in lines {
            let Some((&end, answer)) = line.output_ids.split_last() else { panic!("an answer has tokens") };
            let answer: Vec<u8> = answer.iter().flat_map(|&id| vocabulary.bytes(id).to_vec()).collect();
            assert_eq!(String::from_utf8_lossy(&answer), line.text);
            assert_eq!(vocabulary.bytes(end), b"<|im_end|>");
        }
    }
}
