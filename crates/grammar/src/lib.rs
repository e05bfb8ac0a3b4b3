//! Grammars over tokens: what the engine's `Constraints` are made of in a worker, by llguidance.
//!
//! llguidance lexes with derivatives of regular expressions and parses with Earley's algorithm, and computes the allowed
//! tokens of a step by walking a trie of all tokens' bytes. The trie is built once, from the model folder's
//! `tokenizer.json`; a grammar is compiled once and then cloned for each answer that asks for it.
//!
//! Decisions:
//! - **Any tokenization is allowed** that spells an allowed text. Forcing the tokenizer's own would need the tokenizer
//!   itself here, and a model that knows its tokenizer prefers it anyway.
//! - **White space between JSON tokens is bounded** ([`WHITE_SPACE`]): a model that prefers blanks could otherwise write
//!   little else until `max_tokens`.
//! - **Every limit is set** (`limits`), as schemas come from clients. llguidance counts its work in steps of its own, so
//!   the limits hold on any machine. What they refuse is refused at once, or ends the answer with an error.

#![forbid(unsafe_code)]

mod automaton;
mod cache;
mod compile;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
};

use kvasir_engine::{BadGrammar, Constraint, Constraints};
use kvasir_types::{Grammar, TokenId};
use llguidance::{ParserFactory, api::ParserLimits, token_bytes_from_tokenizer_json};
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

use automaton::Automaton;
use cache::Cache;
pub use compile::WHITE_SPACE;

/// Compiled grammars kept for the next request. Clients send the same schema again and again.
const CACHED: usize = 32;

/// A tokenizer that grammars can't be made for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not JSON.
    #[error("tokenizer.json is not JSON")]
    Json(#[from] serde_json::Error),
    /// A kind of tokenizer whose tokens' bytes are not known.
    #[error("tokenizer.json: {0}")]
    Tokenizer(String),
}

/// Makes constraints for one model.
pub struct Grammars {
    factory: ParserFactory,
    vocab: usize,
    cache: Mutex<Cache>,
}

impl Grammars {
    /// For a model with `vocab` tokens, ended by `eos`, that `tokenizer_json` spells.
    ///
    /// # Errors
    /// If the tokenizer is neither byte-level nor with byte fallback.
    pub fn new(tokenizer_json: &[u8], vocab: usize, eos: &[TokenId]) -> Result<Self, Error> {
        let json = serde_json::from_slice(tokenizer_json)?;
        // The reader asserts what it expects of a vocabulary.
        let bytes = catch_unwind(|| token_bytes_from_tokenizer_json(&json))
            .map_err(|_| Error::Tokenizer("its vocabulary is not what its decoder says".to_owned()))?;
        let mut words = bytes.map_err(|error| Error::Tokenizer(format!("{error:#}")))?;
        // Models are often padded beyond their tokenizers; what has no bytes is never allowed.
        words.resize(vocab, Vec::new());
        let size = u32::try_from(vocab).map_err(|_| Error::Tokenizer("too many tokens".to_owned()))?;
        let ends: Vec<u32> = eos.iter().map(|token| token.0).filter(|&token| token < size).collect();
        let first = ends.first().copied().unwrap_or(toktrie::INVALID_TOKEN);
        let mut trie = TokTrie::from(&TokRxInfo::new(size, first), &words);
        if !ends.is_empty() {
            trie = trie.with_eos_tokens(&ends);
        }
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&tokens).map_err(|error| Error::Tokenizer(format!("{error:#}")))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self { factory, vocab, cache: Mutex::new(Cache::new(CACHED)) })
    }
}

/// What a grammar may cost. Speeds are llguidance's own, of one core.
fn limits() -> ParserLimits {
    ParserLimits {
        // Its default; ambiguity beyond this is a mistake.
        max_items_in_row: 2_000,
        // 20 ms to build the lexer.
        initial_lexer_fuel: 1_000_000,
        // 15 ms and 3 ms at most for a mask.
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        // 1 to 2 kB each, so 40 MB at most for an answer; the default would be half a gigabyte.
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: true,
        // The text and the whole state: not for clients.
        verbose_errors: false,
    }
}

impl Constraints for Grammars {
    fn compile(&self, grammar: &Grammar) -> Result<Box<dyn Constraint>, BadGrammar> {
        let cache = || self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let known = cache().get(grammar);
        let automaton = match known {
            Some(automaton) => automaton,
            None => {
                let compile = || Automaton::compile(&self.factory, compile::grammar(grammar)?, self.vocab);
                let automaton = catch_unwind(AssertUnwindSafe(compile))
                    .unwrap_or_else(|_| Err(BadGrammar::new("compiling it panicked")))?;
                cache().put(grammar.clone(), automaton.fork());
                automaton
            }
        };
        Ok(Box::new(automaton))
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").field("vocab", &self.vocab).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
