//! The fields of a request that say how tokens are chosen: OpenAI's, and beside them those that vLLM's clients send.
//!
//! | field | what it does here |
//! | --- | --- |
//! | `temperature` | 0 to 2, default 1; 0 is greedy |
//! | `top_p` | 0 to 1, default 1; 0 keeps the likeliest token only |
//! | `presence_penalty`, `frequency_penalty` | −2 to 2, default 0; what the answer has already becomes less likely (or more) |
//! | `logit_bias` | an object from token id to −100 … 100, at most 1,024 tokens |
//! | `response_format` | `text`, `json_object`, or `json_schema` with the schema that the answer follows |
//! | `top_k` (extension) | 0 (all, default) or the number of likeliest tokens kept |
//! | `min_p` (extension) | 0 (default) to 1: how likely a token must be, as a fraction of the likeliest one's probability |
//! | `repetition_penalty` (extension) | 0.01 to 100, default 1; as above, but counts the prompt's tokens, too |
//! | `min_tokens` (extension) | no end, stop token or stop string before so many tokens |
//! | `ignore_eos` (extension) | go on past the model's end tokens, for benchmarks |
//! | `stop_token_ids` (extension) | up to 64 token ids that end the answer; not shown |
//! | `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar` (extensions) | the answer follows the schema, matches the expression, is one of the texts, follows the Lark grammar |
//! | `structured_outputs` (extension) | the same as an object with one of `json`, `regex`, `choice`, `grammar`, `json_object` |
//!
//! At most one of the fields that say what form the answer has. Whether a schema or an expression can be followed is for
//! the worker to find out; its refusal is told with the name of the field.

use std::{collections::BTreeMap, sync::Arc};

use kvasir_proto::convert::{MAX_BIASES, MAX_GRAMMAR_BYTES, MAX_STOP_TOKENS};
use kvasir_types::{Grammar, Sampling, TokenId};
use serde_json::Value;

use super::{
    error::BadParam,
    fields::{Fields, wrong_type},
};

/// The form of an answer, and the field that asked for it.
pub(crate) type Form = (&'static str, Grammar);

/// Reads all of them. `seed`, `max_tokens` and `logprobs` are for others.
pub(crate) fn sampling(fields: &mut Fields) -> Result<(Sampling, Option<&'static str>), BadParam> {
    let form = form(fields)?;
    let (form_param, grammar) = form.map_or((None, None), |(param, grammar)| (Some(param), Some(grammar)));
    let sampling = Sampling {
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0) as f32,
        // Zero keeps the likeliest token only, and so does the least number above it, which workers take.
        top_p: (fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0) as f32).max(f32::MIN_POSITIVE),
        top_k: fields.integer("top_k", 0, u32::MAX.into())?.unwrap_or(0) as u32,
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(0.0) as f32,
        // Rounding to f32 must not leave the bounds that workers check.
        repetition_penalty: (fields.number("repetition_penalty", 0.01, 100.0)?.unwrap_or(1.0) as f32)
            .clamp(0.01, 100.0),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0) as f32,
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0) as f32,
        logit_bias: logit_bias(fields)?,
        min_tokens: fields.integer("min_tokens", 0, u32::MAX.into())?.unwrap_or(0) as u32,
        ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
        stop_token_ids: stop_token_ids(fields)?,
        grammar,
        ..Sampling::default()
    };
    Ok((sampling, form_param))
}

fn stop_token_ids(fields: &mut Fields) -> Result<Vec<TokenId>, BadParam> {
    let ids = match fields.take("stop_token_ids") {
        None => return Ok(Vec::new()),
        Some(Value::Array(ids)) => token_ids("stop_token_ids", &ids)?,
        Some(other) => return Err(wrong_type("stop_token_ids", "an array of token ids", &other)),
    };
    if ids.len() > MAX_STOP_TOKENS {
        let message = format!("'stop_token_ids' must have at most {MAX_STOP_TOKENS} tokens, got {}", ids.len());
        return Err(BadParam::new("stop_token_ids", "invalid_value", message));
    }
    Ok(ids)
}

/// Token ids out of a JSON array.
pub(crate) fn token_ids(path: &str, ids: &[Value]) -> Result<Vec<TokenId>, BadParam> {
    let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok()).map(TokenId);
    ids.iter().map(|value| id(value).ok_or_else(|| wrong_type(path, "an array of token ids", value))).collect()
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(TokenId, f32)>, BadParam> {
    let map = match fields.take("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong_type("logit_bias", "an object from token id to number", &other)),
    };
    let bad = |message| Err(BadParam::new("logit_bias", "invalid_value", message));
    if map.len() > MAX_BIASES {
        return bad(format!("'logit_bias' must have at most {MAX_BIASES} tokens, got {}", map.len()));
    }
    // A map of tokens: `"1"` and `"01"` are the same one.
    let mut biases = BTreeMap::new();
    for (id, value) in map {
        let Ok(token) = id.parse::<u32>() else {
            let id: String = id.chars().take(40).collect();
            return bad(format!("the keys of 'logit_bias' must be token ids, got {id:?}"));
        };
        let Some(bias) = value.as_f64() else { return Err(wrong_type("logit_bias", "numbers as values", &value)) };
        if !(-100.0..=100.0).contains(&bias) {
            return bad(format!("the values of 'logit_bias' must be -100 to 100, got {bias}"));
        }
        biases.insert(token, bias as f32);
    }
    Ok(biases.into_iter().map(|(token, bias)| (TokenId(token), bias)).collect())
}

fn form(fields: &mut Fields) -> Result<Option<Form>, BadParam> {
    let mut forms: Vec<Form> = Vec::new();
    if let Some(format) = fields.take("response_format") {
        forms.extend(response_format(format)?.map(|grammar| ("response_format", grammar)));
    }
    for (param, kind) in
        [("guided_json", "json"), ("guided_regex", "regex"), ("guided_choice", "choice"), ("guided_grammar", "grammar")]
    {
        if let Some(value) = fields.take(param) {
            forms.push((param, grammar(param, kind, value)?));
        }
    }
    if let Some(value) = fields.take("structured_outputs") {
        let mut inner = Fields::of("structured_outputs", value)?;
        for kind in ["json", "regex", "choice", "grammar"] {
            if let Some(value) = inner.take(kind) {
                forms.push(("structured_outputs", grammar(&inner.path(kind), kind, value)?));
            }
        }
        if inner.bool("json_object")? == Some(true) {
            forms.push(("structured_outputs", Grammar::JsonObject));
        }
        inner.finish(&[])?;
    }
    if let [(first, _), (second, _), ..] = forms.as_slice() {
        let message = format!("an answer has one form, but '{first}' and '{second}' both ask for one");
        return Err(BadParam::new(*second, "invalid_value", message));
    }
    let form = forms.pop();
    if let Some((param, grammar)) = &form {
        few_bytes(param, grammar)?;
    }
    Ok(form)
}

/// Not more of a form than workers take.
pub(crate) fn few_bytes(param: &str, grammar: &Grammar) -> Result<(), BadParam> {
    let bytes = match grammar {
        Grammar::JsonObject => 0,
        Grammar::JsonSchema(text) | Grammar::Regex(text) | Grammar::Lark(text) => text.len(),
        Grammar::Choice(texts) => texts.iter().map(|text| text.len() + 1).sum(),
    };
    if bytes <= MAX_GRAMMAR_BYTES {
        return Ok(());
    }
    let message = format!("'{param}' must be at most {MAX_GRAMMAR_BYTES} bytes, got {bytes}");
    Err(BadParam::new(param, "invalid_value", message))
}

/// `text.format` of the Responses API: as `response_format`, but with the schema in the object itself.
pub(crate) fn text_format(path: &str, value: Value) -> Result<Option<Grammar>, BadParam> {
    let mut fields = Fields::of(path, value)?;
    let grammar = match fields.require_string("type")?.as_str() {
        "text" => None,
        "json_object" => Some(Grammar::JsonObject),
        "json_schema" => {
            fields.string("name")?;
            fields.string("description")?;
            // The schema is always followed.
            fields.bool("strict")?;
            Some(schema_of(&fields.path("schema"), fields.require("schema")?)?)
        }
        kind => {
            let (path, kind) = (fields.path("type"), kind.chars().take(40).collect::<String>());
            let message = format!("'{path}' must be text, json_object or json_schema, got {kind:?}");
            return Err(BadParam::new(path, "invalid_value", message));
        }
    };
    fields.finish(&[])?;
    Ok(grammar)
}

fn response_format(value: Value) -> Result<Option<Grammar>, BadParam> {
    let mut fields = Fields::of("response_format", value)?;
    let kind = match fields.require("type")? {
        Value::String(kind) => kind,
        other => return Err(wrong_type("response_format.type", "a string", &other)),
    };
    let grammar = match kind.as_str() {
        "text" => None,
        "json_object" => Some(Grammar::JsonObject),
        "json_schema" => {
            let mut inner = Fields::of("response_format.json_schema", fields.require("json_schema")?)?;
            inner.string("name")?;
            inner.string("description")?;
            // The schema is always followed.
            inner.bool("strict")?;
            let schema = inner.require("schema")?;
            let path = inner.path("schema");
            inner.finish(&[])?;
            Some(schema_of(&path, schema)?)
        }
        _ => {
            let kind: String = kind.chars().take(40).collect();
            let message = format!("'response_format.type' must be text, json_object or json_schema, got {kind:?}");
            return Err(BadParam::new("response_format.type", "invalid_value", message));
        }
    };
    fields.finish(&[])?;
    Ok(grammar)
}

fn grammar(path: &str, kind: &str, value: Value) -> Result<Grammar, BadParam> {
    match (kind, value) {
        // vLLM takes a schema as text, too.
        ("json", Value::String(text)) => match serde_json::from_str(&text) {
            Ok(schema) => schema_of(path, schema),
            Err(error) => Err(BadParam::new(path, "invalid_value", format!("'{path}' is not JSON: {error}"))),
        },
        ("json", schema) => schema_of(path, schema),
        ("regex", Value::String(text)) => Ok(Grammar::Regex(text.into())),
        ("grammar", Value::String(text)) => Ok(Grammar::Lark(text.into())),
        ("choice", Value::Array(texts)) => {
            let text = |value: Value| match value {
                Value::String(text) => Ok(text),
                other => Err(wrong_type(path, "an array of strings", &other)),
            };
            let texts: Arc<[String]> = texts.into_iter().map(text).collect::<Result<_, _>>()?;
            if texts.is_empty() {
                return Err(BadParam::new(path, "empty_array", format!("'{path}' must hold at least one text")));
            }
            Ok(Grammar::Choice(texts))
        }
        ("choice", other) => Err(wrong_type(path, "an array of strings", &other)),
        (_, other) => Err(wrong_type(path, "a string", &other)),
    }
}

fn schema_of(path: &str, schema: Value) -> Result<Grammar, BadParam> {
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(Grammar::JsonSchema(schema.to_string().into())),
        other => Err(wrong_type(path, "a JSON schema (an object)", &other)),
    }
}
