//! Conversations are tokenized piece by piece, and pieces that were tokenized lately are not tokenized again: each turn of a
//! conversation repeats all turns before it.
//!
//! ```text
//! <|im_start|>user⏎Hello<|im_end|>⏎<|im_start|>assistant⏎Hi!<|im_end|>⏎<|im_start|>user⏎…
//! ───────── a piece ──────────────▏─────────── another ──────────────▏──── the rest, tokenized each time
//! ```
//!
//! **Why the tokens are the same.** A piece ends with a special token `T` at which tokenizing provably starts anew: before
//! anything else, the tokenizer looks for special tokens in the text, leftmost and then longest, and what lies between two of
//! them is normalized, split and encoded by itself. `T` is found in the whole text wherever it stands, and nothing reaches over
//! it, if
//! - it is looked for in the raw text (`normalized: false`), and its neighbours don't matter (`single_word`) nor does it take
//!   spaces that follow (`rstrip`), nor begins or ends with one;
//! - no other such token contains it, or overlaps its beginning: none ends with what it begins with.
//!
//! What comes after `T` may depend on not being the text's beginning (a Metaspace that puts a space before the first word, say)
//! and, at most, on `T` (a neighbour's `single_word`, `lstrip`). So a piece is tokenized with `T` before it, whose id is then
//! taken off. A tokenizer without such a `T`, or one that fails a trial when it is loaded, has no pieces.
//!
//! **What it costs.** Bytes are bounded, whatever is asked: two generations of half the size each, of which the older goes
//! as a whole. Nothing can be put in that is not so: names are 256-bit hashes of salt, `T` and text, tokens a function of
//! these. The salt is the tenant's (`access`): by how long tokenizing takes nobody learns what others
//! have asked. The lock is held for a look-up, never while anything is tokenized.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kvasir_types::TokenId;
use tokenizers::Tokenizer;

use super::Encoder;

/// Shorter pieces go with the next: a look-up should cost less than it saves.
const LEAST_BYTES: usize = 256;
/// What an entry takes beside its tokens.
const ENTRY_BYTES: usize = 96;

/// A special token at which tokenizing starts anew.
#[derive(Clone, Debug)]
struct Boundary {
    text: String,
    id: TokenId,
}

type Name = [u8; 32];

/// What one tokenizer made of pieces of text lately.
pub struct Pieces {
    boundaries: Vec<Boundary>,
    most_bytes: usize,
    /// Written and read by whatever thread tokenizes; leaf lock.
    kept: Mutex<Kept>,
}

/// Two generations: what is used is in the younger.
#[derive(Default)]
struct Kept {
    young: HashMap<Name, Arc<[TokenId]>>,
    old: HashMap<Name, Arc<[TokenId]>>,
    /// Of the younger.
    bytes: usize,
}

impl Kept {
    /// What is kept under that name. What has to go is given back, to be dropped without the lock.
    fn get(&mut self, name: &Name, most_bytes: usize) -> (Option<Arc<[TokenId]>>, Option<impl Sized + use<>>) {
        if let Some(found) = self.young.get(name) {
            return (Some(Arc::clone(found)), None);
        }
        match self.old.remove(name) {
            Some(found) => (Some(Arc::clone(&found)), self.put(*name, found, most_bytes)),
            None => (None, None),
        }
    }

    fn put(&mut self, name: Name, tokens: Arc<[TokenId]>, most_bytes: usize) -> Option<HashMap<Name, Arc<[TokenId]>>> {
        let bytes = ENTRY_BYTES + size_of_val(&*tokens);
        let half = most_bytes / 2;
        if bytes > half {
            return None;
        }
        let gone = (self.bytes + bytes > half).then(|| {
            self.bytes = 0;
            mem::replace(&mut self.old, mem::take(&mut self.young))
        });
        if self.young.insert(name, tokens).is_none() {
            self.bytes += bytes;
        }
        gone
    }
}

impl Pieces {
    /// Those of a tokenizer, none yet; `None` where its texts can't be taken apart, or nothing may be kept.
    pub fn of(encoder: &Encoder, most_bytes: usize) -> Option<Self> {
        let boundaries = boundaries(encoder.tokenizer());
        let pieces = Self { boundaries, most_bytes, kept: Mutex::default() };
        (most_bytes > 0 && !pieces.boundaries.is_empty() && pieces.stand_trial(encoder)).then_some(pieces)
    }

    /// The tokens of a text, as the tokenizer alone would have them. What it shares with others is shared with those of the
    /// same salt.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn encode(&self, encoder: &Encoder, text: &str, salt: &str) -> tokenizers::Result<Vec<TokenId>> {
        let mut tokens = Vec::with_capacity(text.len() / 3);
        let mut before: Option<&Boundary> = None;
        let mut rest = text;
        let mut with_before = String::new();
        while let Some((piece, boundary)) = self.piece(rest) {
            rest = &rest[piece.len()..];
            let name = name(salt, before, piece);
            let (found, gone) = self.lock().get(&name, self.most_bytes);
            drop(gone);
            match found {
                Some(found) => tokens.extend_from_slice(&found),
                None => {
                    let new = encode_after(encoder, before, piece, &mut with_before)?;
                    tokens.extend_from_slice(&new);
                    let gone = self.lock().put(name, new.into(), self.most_bytes);
                    drop(gone);
                }
            }
            before = Some(boundary);
        }
        if !rest.is_empty() {
            tokens.extend(encode_after(encoder, before, rest, &mut with_before)?);
        }
        Ok(tokens)
    }

    /// The text's first piece, and what it ends with.
    fn piece<'a>(&self, text: &'a str) -> Option<(&'a str, &Boundary)> {
        if text.len() <= LEAST_BYTES {
            return None;
        }
        // One that begins before the piece is long enough and ends after is as good.
        let ends = self.boundaries.iter().filter_map(|boundary| {
            let from = text.floor_char_boundary(LEAST_BYTES - boundary.text.len().min(LEAST_BYTES));
            Some((from + text[from..].find(&boundary.text)? + boundary.text.len(), boundary))
        });
        let (end, boundary) = ends.min_by_key(|(end, _)| *end)?;
        // Of what ends the text nothing is saved: the next turn goes on from there.
        (end < text.len()).then(|| (&text[..end], boundary))
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether texts that are hard to take apart come out the same.
    fn stand_trial(&self, encoder: &Encoder) -> bool {
        let words = ["Hello world", " leading", "trailing ", "\n\n\tx", "", "  ", "ﬁ Å é 你好 😀", "it's 12345", "a"];
        let whole = |text: &str| encode_after(encoder, None, text, &mut String::new()).ok();
        let all = &self.boundaries;
        all.iter().zip(all.iter().cycle().skip(1)).all(|(boundary, next)| {
            words.iter().zip(words.iter().cycle().skip(3)).all(|(left, right)| {
                let left = format!("{left}{}{left}{}", next.text, boundary.text);
                let right = format!("{right}{}{right}", next.text);
                let parts = [(None, &left), (Some(boundary), &right)];
                let apart = parts.map(|(before, text)| encode_after(encoder, before, text, &mut String::new()).ok());
                apart.into_iter().collect::<Option<Vec<_>>>().map(|parts| parts.concat())
                    == whole(&format!("{left}{right}"))
            })
        })
    }
}

fn name(salt: &str, before: Option<&Boundary>, piece: &str) -> Name {
    let mut hasher = blake3::Hasher::new();
    // Lengths and ids are of fixed size, so no two of these read the same.
    hasher.update(&(salt.len() as u64).to_le_bytes()).update(salt.as_bytes());
    hasher.update(&before.map_or(u64::MAX, |before| before.id.0.into()).to_le_bytes());
    *hasher.update(piece.as_bytes()).finalize().as_bytes()
}

/// The tokens of `text` where it follows a boundary (or begins); `buffer` is for whatever it needs.
fn encode_after(
    encoder: &Encoder,
    before: Option<&Boundary>,
    text: &str,
    buffer: &mut String,
) -> tokenizers::Result<Vec<TokenId>> {
    let Some(before) = before else { return encoder.encode(text) };
    buffer.clear();
    buffer.push_str(&before.text);
    buffer.push_str(text);
    let mut tokens = encoder.encode(buffer)?;
    tokens.drain(..1.min(tokens.len()));
    Ok(tokens)
}

/// The special tokens at which tokenizing starts anew.
fn boundaries(tokenizer: &Tokenizer) -> Vec<Boundary> {
    let added = tokenizer.get_added_tokens_decoder();
    // The others are looked for between these, and so can't reach over them.
    let raw: Vec<_> = added.iter().filter(|(_, token)| !token.normalized && !token.content.is_empty()).collect();
    let alone = |text: &str| {
        raw.iter()
            .map(|(_, other)| other.content.as_str())
            .filter(|other| *other != text)
            .all(|other| !other.contains(text))
            && raw.iter().all(|(_, other)| {
                let ends = other.content.char_indices().skip(1).map(|(at, _)| &other.content[at..]);
                ends.into_iter().all(|end| !text.starts_with(end) || end.len() == text.len())
            })
    };
    let mut found: Vec<Boundary> = raw
        .iter()
        .filter(|(_, token)| token.special && !token.single_word && !token.rstrip)
        .filter(|(_, token)| token.content.trim() == token.content && alone(&token.content))
        .map(|(id, token)| Boundary { text: token.content.clone(), id: TokenId(**id) })
        .collect();
    found.sort_unstable_by_key(|boundary| boundary.id);
    found
}

#[cfg(test)]
#[path = "pieces_tests.rs"]
mod tests;
