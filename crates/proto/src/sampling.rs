//! How to choose tokens, on the wire and off it. Everything a worker later relies on is checked here: numbers are finite
//! and in range, lists are bounded, no token is biased twice.

use std::collections::HashSet;

use kvasir_types::{Grammar, Sampling, TokenId};

use crate::{
    Error,
    convert::{out_of_range, token_ids, tokens},
    v1::{self, grammar::Form},
};

/// Most stop tokens accepted in one request.
pub const MAX_STOP_TOKENS: usize = 64;
/// Most log-probabilities per position, as OpenAI has it.
pub const MAX_LOGPROBS: u32 = 20;
/// Most biased tokens in one request.
pub const MAX_BIASES: usize = 1024;
/// Longest grammar accepted, in bytes.
pub const MAX_GRAMMAR_BYTES: usize = 256 << 10;

impl From<&Sampling> for v1::Sampling {
    fn from(sampling: &Sampling) -> Self {
        let bias = |&(token, bias): &(TokenId, f32)| v1::LogitBias { token: token.0, bias };
        Self {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            seed: sampling.seed,
            max_tokens: sampling.max_tokens,
            max_tokens_asked: sampling.max_tokens_asked,
            stop_token_ids: token_ids(&sampling.stop_token_ids),
            ignore_eos: sampling.ignore_eos,
            logprobs: sampling.logprobs.map(u32::from),
            min_p: sampling.min_p,
            repetition_penalty: Some(sampling.repetition_penalty),
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias.iter().map(bias).collect(),
            min_tokens: sampling.min_tokens,
            continued: sampling.continued,
            grammar: sampling.grammar.as_ref().map(v1::Grammar::from),
        }
    }
}

impl TryFrom<&v1::Sampling> for Sampling {
    type Error = Error;
    fn try_from(wire: &v1::Sampling) -> Result<Self, Error> {
        // `contains` is false for NaN, so NaN is refused here too.
        if !(0.0..=2.0).contains(&wire.temperature) {
            return Err(out_of_range("sampling.temperature", wire.temperature, "0 to 2"));
        }
        if !(wire.top_p > 0.0 && wire.top_p <= 1.0) {
            return Err(out_of_range("sampling.top_p", wire.top_p, "above 0, up to 1"));
        }
        if !(0.0..=1.0).contains(&wire.min_p) {
            return Err(out_of_range("sampling.min_p", wire.min_p, "0 to 1"));
        }
        let repetition_penalty = wire.repetition_penalty.unwrap_or(1.0);
        if !(MIN_REPETITION..=MAX_REPETITION).contains(&repetition_penalty) {
            return Err(out_of_range("sampling.repetition_penalty", repetition_penalty, "0.01 to 100"));
        }
        for (field, penalty) in [
            ("sampling.presence_penalty", wire.presence_penalty),
            ("sampling.frequency_penalty", wire.frequency_penalty),
        ] {
            if !(-2.0..=2.0).contains(&penalty) {
                return Err(out_of_range(field, penalty, "-2 to 2"));
            }
        }
        if wire.max_tokens == 0 {
            return Err(out_of_range("sampling.max_tokens", 0, "at least 1"));
        }
        if wire.stop_token_ids.len() > MAX_STOP_TOKENS {
            return Err(out_of_range("sampling.stop_token_ids", wire.stop_token_ids.len(), "at most 64 tokens"));
        }
        if wire.logprobs.is_some_and(|n| n > MAX_LOGPROBS) {
            return Err(out_of_range("sampling.logprobs", wire.logprobs(), "0 to 20"));
        }
        Ok(Self {
            temperature: wire.temperature,
            top_p: wire.top_p,
            top_k: wire.top_k,
            min_p: wire.min_p,
            repetition_penalty,
            presence_penalty: wire.presence_penalty,
            frequency_penalty: wire.frequency_penalty,
            logit_bias: logit_bias(&wire.logit_bias)?,
            grammar: wire.grammar.as_ref().map(Grammar::try_from).transpose()?,
            seed: wire.seed,
            max_tokens: wire.max_tokens,
            max_tokens_asked: wire.max_tokens_asked,
            min_tokens: wire.min_tokens,
            continued: wire.continued,
            stop_token_ids: tokens(&wire.stop_token_ids),
            ignore_eos: wire.ignore_eos,
            logprobs: wire.logprobs.and_then(|n| u8::try_from(n).ok()),
        })
    }
}

/// Beyond these, products of logits would leave the range of a float.
const MIN_REPETITION: f32 = 0.01;
const MAX_REPETITION: f32 = 100.0;

fn logit_bias(wire: &[v1::LogitBias]) -> Result<Vec<(TokenId, f32)>, Error> {
    if wire.len() > MAX_BIASES {
        return Err(out_of_range("sampling.logit_bias", wire.len(), "at most 1024 tokens"));
    }
    let mut seen = HashSet::with_capacity(wire.len());
    for v1::LogitBias { token, bias } in wire {
        if !(-100.0..=100.0).contains(bias) {
            return Err(out_of_range("sampling.logit_bias.bias", bias, "-100 to 100"));
        }
        if !seen.insert(token) {
            return Err(out_of_range("sampling.logit_bias.token", format!("{token} twice"), "each token once"));
        }
    }
    Ok(wire.iter().map(|wire| (TokenId(wire.token), wire.bias)).collect())
}

impl From<&Grammar> for v1::Grammar {
    fn from(grammar: &Grammar) -> Self {
        let form = match grammar {
            Grammar::JsonObject => Form::JsonObject(true),
            Grammar::JsonSchema(schema) => Form::JsonSchema(schema.to_string()),
            Grammar::Regex(regex) => Form::Regex(regex.to_string()),
            Grammar::Choice(texts) => Form::Choice(v1::grammar::Choice { texts: texts.to_vec() }),
            Grammar::Lark(lark) => Form::Lark(lark.to_string()),
        };
        Self { form: Some(form) }
    }
}

impl TryFrom<&v1::Grammar> for Grammar {
    type Error = Error;
    fn try_from(wire: &v1::Grammar) -> Result<Self, Error> {
        let (grammar, bytes) = match wire.form.as_ref() {
            // A form that a later version added comes as none: an answer of any form would be a wrong answer.
            None => return Err(Error::Missing("sampling.grammar.form")),
            Some(Form::JsonObject(_)) => (Self::JsonObject, 0),
            Some(Form::JsonSchema(schema)) => (Self::JsonSchema(schema.as_str().into()), schema.len()),
            Some(Form::Regex(regex)) => (Self::Regex(regex.as_str().into()), regex.len()),
            Some(Form::Choice(choice)) => {
                if choice.texts.is_empty() {
                    return Err(out_of_range("sampling.grammar.choice", 0, "at least one text"));
                }
                // An empty text takes room, too.
                let bytes = choice.texts.iter().map(|text| text.len() + 1).sum();
                (Self::Choice(choice.texts.as_slice().into()), bytes)
            }
            Some(Form::Lark(lark)) => (Self::Lark(lark.as_str().into()), lark.len()),
        };
        if bytes > MAX_GRAMMAR_BYTES {
            return Err(out_of_range("sampling.grammar", format!("{bytes} bytes"), "at most 256 KiB"));
        }
        Ok(grammar)
    }
}
