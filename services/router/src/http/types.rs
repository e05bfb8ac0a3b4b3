//! What a request may say, field by field, and what comes of it.
//!
//! **Both endpoints**
//!
//! | field | what it does here |
//! | --- | --- |
//! | `model` | required; a name of `/v1/models` |
//! | how tokens are chosen | see [`super::choosing`] |
//! | `n` | how many choices, at least 1 and at most the server's `limits.max_choices`; default 1 |
//! | `seed` | any integer; the same seed and prompt give the same choices, the first one whatever `n` is; absent: random |
//! | `stop` | a string or up to 4; the answer ends before the first that appears |
//! | `stream`, `stream_options.include_usage` | server-sent events; with a last chunk that holds the usage |
//! | `service_tier` | `auto`, `default`, or `flex`: served with what the others leave; the answer says which it was |
//! | `user`, `safety_identifier` | accepted, not used yet |
//! | `prompt_cache_key` | up to 256 bytes; requests with the same key are of one session: a hint to routing, nothing else |
//! | `cache_salt` (extension) | up to 256 bytes; prompts share cached blocks only under the same salt |
//!
//! **Chat**
//!
//! | field | what it does here |
//! | --- | --- |
//! | `messages` | required; see [`super::messages`] |
//! | `chat_template_kwargs` (extension) | an object of further variables of the chat template, e.g. `enable_thinking`; what the template does not look at has no effect |
//! | `tools`, `tool_choice`, `parallel_tool_calls` | see [`super::tools`]; not together with a field that asks for a form of the answer |
//! | `include_reasoning` (extension) | default true; false leaves `reasoning_content` out |
//! | `reasoning_effort` | `none`, `minimal`, `low`, `medium`, `high`, `xhigh`, `max`, for a template that reads it; where the template only has a switch (`enable_thinking`, `thinking`), `none` is off and all others are on; refused where it has neither |
//! | `documents` (extension) | an array of objects, for templates that present documents |
//! | `add_generation_prompt` (extension) | default true; false leaves out the beginning of the assistant's turn |
//! | `max_completion_tokens`, `max_tokens` | at least 1; the same thing, so they must not contradict one another; default: what the context leaves, bounded by the server's `limits.max_output_tokens` |
//! | `logprobs`, `top_logprobs` | log-probabilities of the tokens, and of 0 to 20 alternatives |
//!
//! **Completions**
//!
//! | field | what it does here |
//! | --- | --- |
//! | `prompt` | required; a string, an array of token ids, or an array with exactly one of these |
//! | `max_tokens` | at least 1, default 16 |
//! | `logprobs` | 0 to 20 alternatives a token |
//!
//! An answer that reaches the model's context length ends with `finish_reason` `length`; a `max_tokens` beyond that is
//! no error. A `max_tokens` (or such a context) that no worker's memory holds even for this request alone is refused; with
//! no `max_tokens` asked for, such an answer ends where the memory does, with `length`. **Known, not supported**: accepted with the values that mean nothing ([`CHAT_UNSUPPORTED`],
//! [`COMPLETION_UNSUPPORTED`]), else refused by name. **Unknown**: refused by name. `null` is as good as absent.

use kvasir_proto::convert::{MAX_LOGPROBS, MAX_SALT_BYTES};
use kvasir_types::{Priority, Sampling, TokenId};
use serde::Serialize;
use serde_json::Value;

use super::{
    choosing::{self, token_ids},
    error::{BadParam, Error},
    fields::{Fields, Unsupported, wrong_type},
    messages::messages,
    tools::{Form, Tools},
};
use crate::text::{Conversation, Model};

/// Most choices, as OpenAI has it; the server's own limit is less or equal.
pub(crate) const MAX_CHOICES: u32 = 128;
/// Most stop strings, as OpenAI has it.
const MAX_STOPS: usize = 4;
/// Longest stop string, in bytes: it bounds the text that may be held back.
const MAX_STOP_BYTES: usize = 512;
/// Tokens of a completion unless asked otherwise, as OpenAI has it.
const COMPLETION_TOKENS: u32 = 16;
/// Longest name of a session, in bytes.
const MAX_SESSION_BYTES: usize = 256;

/// Fields of chat requests that are known and not supported, with their neutral values.
pub(crate) const CHAT_UNSUPPORTED: &[Unsupported] = &[
    ("audio", &[]),
    ("chat_template", &[]),
    ("continue_final_message", &["false"]),
    ("function_call", &["\"none\"", "\"auto\""]),
    ("functions", &[]),
    ("metadata", &[]),
    ("moderation", &[]),
    ("modalities", &["[\"text\"]"]),
    ("prediction", &[]),
    ("prompt_cache_options", &[]),
    ("prompt_cache_retention", &["\"in_memory\"", "\"in-memory\""]),
    ("store", &["false"]),
    ("verbosity", &["\"medium\""]),
    ("web_search_options", &[]),
];

/// Fields of completion requests that are known and not supported, with their neutral values.
pub(crate) const COMPLETION_UNSUPPORTED: &[Unsupported] =
    &[("best_of", &["1"]), ("echo", &["false"]), ("suffix", &["\"\""])];

/// What both endpoints take.
#[derive(Debug, PartialEq)]
pub(crate) struct Common {
    /// Which model.
    pub(crate) model: String,
    /// How to choose tokens. `seed` is drawn and `max_tokens` bounded later, when the worker is known.
    pub(crate) sampling: Sampling,
    /// The field that asked for the form that the answer must have, if one did.
    pub(crate) form_param: Option<&'static str>,
    /// The seed, if the client wants one.
    pub(crate) seed: Option<u64>,
    /// Most tokens, if the client says, with the name of the field that says it.
    pub(crate) max_tokens: Option<(&'static str, u32)>,
    /// How many answers.
    pub(crate) choices: u32,
    /// Stop strings.
    pub(crate) stop: Vec<String>,
    /// The tenant's salt.
    pub(crate) cache_salt: String,
    /// Requests of one session share a beginning.
    pub(crate) session: Option<String>,
    /// Who goes first, if the client says.
    pub(crate) service_tier: Option<ServiceTier>,
    /// Whether to stream, and how.
    pub(crate) stream: Option<Streaming>,
}

/// OpenAI's word for priorities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ServiceTier {
    /// As everybody.
    Default,
    /// After everybody.
    Flex,
}

impl From<ServiceTier> for Priority {
    fn from(tier: ServiceTier) -> Self {
        match tier {
            ServiceTier::Default => Self::Online,
            ServiceTier::Flex => Self::Offline,
        }
    }
}

/// Options of a stream.
#[derive(Debug, PartialEq)]
pub(crate) struct Streaming {
    /// End with a chunk that holds the usage.
    pub(crate) include_usage: bool,
}

/// A chat request, checked.
#[derive(Debug, PartialEq)]
pub(crate) struct ChatRequest {
    /// What both endpoints take.
    pub(crate) common: Common,
    /// The conversation.
    pub(crate) conversation: Conversation,
    /// How much to think, if the client says.
    pub(crate) effort: Option<Effort>,
    /// Whether to tell what was thought.
    pub(crate) include_reasoning: bool,
    /// The tools, perhaps none.
    pub(crate) tools: Tools,
}

/// How much to think before answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Effort(&'static str);

impl Effort {
    const ALL: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];
    /// Variables by which templates let thinking be turned off.
    const SWITCHES: [&str; 2] = ["enable_thinking", "thinking"];

    /// Reads one.
    pub(crate) fn parse(path: &str, word: &str) -> Result<Self, BadParam> {
        Self::ALL.into_iter().find(|known| *known == word).map(Self).ok_or_else(|| {
            let got: String = word.chars().take(40).collect();
            let message = format!("'{path}' must be one of {}, got {got:?}", Self::ALL.join(", "));
            BadParam::new(path, "invalid_value", message)
        })
    }

    /// As the client said it.
    pub(crate) fn word(self) -> &'static str {
        self.0
    }

    /// Tells the template, in the words that it knows: an effort, or else whether to think at all.
    pub(crate) fn tell(self, model: &Model, conversation: &mut Conversation, path: &str) -> Result<(), BadParam> {
        let reads = |variable: &str| model.template().is_some_and(|template| template.reads(variable));
        let (variable, value) = if reads("reasoning_effort") {
            ("reasoning_effort", Value::from(self.0))
        } else if let Some(switch) = Self::SWITCHES.into_iter().find(|switch| reads(switch)) {
            (switch, Value::from(self.0 != "none"))
        } else {
            let message = format!("'{path}' is not supported by this model: its chat template knows no such thing");
            return Err(BadParam::new(path, "unsupported_parameter", message));
        };
        // What is said in the template's own words counts.
        conversation.variables.entry(variable).or_insert(value);
        Ok(())
    }
}

/// A completion request, checked.
#[derive(Debug, PartialEq)]
pub(crate) struct CompletionRequest {
    /// What both endpoints take.
    pub(crate) common: Common,
    /// What to continue.
    pub(crate) prompt: Prompt,
}

/// What to continue.
#[derive(Debug, PartialEq)]
pub(crate) enum Prompt {
    /// Text, to be tokenized.
    Text(String),
    /// Tokens as they are.
    Tokens(Vec<TokenId>),
}

impl ChatRequest {
    /// Reads a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut fields = Fields::parse(body)?;
        let mut common = common(&mut fields)?;
        let mut conversation = Conversation::of(messages(fields.require("messages")?)?);
        template_fields(&mut fields, &mut conversation)?;
        let effort = fields.string("reasoning_effort")?;
        let effort = effort.map(|word| Effort::parse("reasoning_effort", &word)).transpose()?;
        let include_reasoning = fields.bool("include_reasoning")?.unwrap_or(true);
        let tools = Tools::parse(&mut fields, Form::Chat)?;
        conversation.tools = tools.told();
        with_tools(&mut common, &tools)?;

        let old = max_tokens(&mut fields, "max_tokens")?;
        let new = max_tokens(&mut fields, "max_completion_tokens")?;
        if let (Some((_, old)), Some((_, new))) = (old, new)
            && old != new
        {
            let message = "'max_tokens' and 'max_completion_tokens' are the same thing and contradict one another";
            return Err(BadParam::new("max_tokens", "invalid_value", message).into());
        }
        common.max_tokens = new.or(old);
        common.sampling.max_tokens_asked = common.max_tokens.is_some();
        check_min_tokens(&common)?;

        let logprobs = fields.bool("logprobs")?.unwrap_or(false);
        let top = fields.integer("top_logprobs", 0, MAX_LOGPROBS.into())?;
        if top.is_some() && !logprobs {
            let message = "'top_logprobs' is only allowed when 'logprobs' is true";
            return Err(BadParam::new("top_logprobs", "invalid_value", message).into());
        }
        common.sampling.logprobs = logprobs.then(|| top.unwrap_or(0) as u8);
        fields.finish(CHAT_UNSUPPORTED)?;
        Ok(Self { common, conversation, effort, include_reasoning, tools })
    }
}

impl CompletionRequest {
    /// Reads a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut fields = Fields::parse(body)?;
        let mut common = common(&mut fields)?;
        let prompt = prompt(fields.require("prompt")?)?;
        let asked = max_tokens(&mut fields, "max_tokens")?;
        common.sampling.max_tokens_asked = asked.is_some();
        common.max_tokens = asked.or(Some(("max_tokens", COMPLETION_TOKENS)));
        check_min_tokens(&common)?;
        common.sampling.logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS.into())?.map(|n| n as u8);
        fields.finish(COMPLETION_UNSUPPORTED)?;
        Ok(Self { common, prompt })
    }
}

/// What all endpoints take.
pub(crate) fn common(fields: &mut Fields) -> Result<Common, BadParam> {
    let model = match fields.require("model")? {
        Value::String(name) => name,
        other => return Err(wrong_type("model", "a string", &other)),
    };
    let (sampling, form_param) = choosing::sampling(fields)?;
    let cache_salt = fields.string("cache_salt")?.unwrap_or_default();
    if cache_salt.len() > MAX_SALT_BYTES {
        let message = format!("'cache_salt' must be at most {MAX_SALT_BYTES} bytes, got {}", cache_salt.len());
        return Err(BadParam::new("cache_salt", "invalid_value", message));
    }
    let session = fields.string("prompt_cache_key")?;
    if let Some(key) = session.as_ref().filter(|key| key.len() > MAX_SESSION_BYTES) {
        let message = format!("'prompt_cache_key' must be at most {MAX_SESSION_BYTES} bytes, got {}", key.len());
        return Err(BadParam::new("prompt_cache_key", "invalid_value", message));
    }
    fields.string("user")?;
    fields.string("safety_identifier")?;
    Ok(Common {
        model,
        sampling,
        form_param,
        seed: seed(fields)?,
        max_tokens: None,
        choices: fields.integer("n", 1, MAX_CHOICES.into())?.unwrap_or(1) as u32,
        stop: stop(fields)?,
        cache_salt,
        session,
        service_tier: service_tier(fields)?,
        stream: streaming(fields)?,
    })
}

fn service_tier(fields: &mut Fields) -> Result<Option<ServiceTier>, BadParam> {
    match fields.string("service_tier")?.as_deref() {
        None => Ok(None),
        Some("auto" | "default") => Ok(Some(ServiceTier::Default)),
        Some("flex") => Ok(Some(ServiceTier::Flex)),
        Some(other) => {
            let got: String = other.chars().take(40).collect();
            let message = format!("'service_tier' must be auto, default or flex on this server, got {got:?}");
            Err(BadParam::new("service_tier", "unsupported_value", message))
        }
    }
}

/// How many tokens at most, and the field that says it.
pub(crate) fn max_tokens(fields: &mut Fields, name: &'static str) -> Result<Option<(&'static str, u32)>, BadParam> {
    Ok(fields.integer(name, 1, u32::MAX.into())?.map(|n| (name, n as u32)))
}

/// Not more at least than at most.
pub(crate) fn check_min_tokens(common: &Common) -> Result<(), BadParam> {
    let min_tokens = common.sampling.min_tokens;
    match common.max_tokens {
        Some((param, max_tokens)) if min_tokens > max_tokens => {
            let message = format!("'min_tokens' is {min_tokens}, more than '{param}', which is {max_tokens}");
            Err(BadParam::new("min_tokens", "invalid_value", message))
        }
        _ => Ok(()),
    }
}

fn seed(fields: &mut Fields) -> Result<Option<u64>, BadParam> {
    let Some(value) = fields.take("seed") else { return Ok(None) };
    // Negative seeds are seeds too: their bits are what counts.
    let seed = value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64));
    seed.map(Some).ok_or_else(|| wrong_type("seed", "an integer of 64 bits", &value))
}

fn streaming(fields: &mut Fields) -> Result<Option<Streaming>, BadParam> {
    let stream = fields.bool("stream")?.unwrap_or(false);
    let mut include_usage = false;
    if let Some(options) = fields.take("stream_options") {
        if !stream {
            let message = "'stream_options' is only allowed when 'stream' is true";
            return Err(BadParam::new("stream_options", "invalid_value", message));
        }
        let mut options = Fields::of("stream_options", options)?;
        include_usage = options.bool("include_usage")?.unwrap_or(false);
        options.finish(&[("include_obfuscation", &["false"])])?;
    }
    Ok(stream.then_some(Streaming { include_usage }))
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, BadParam> {
    let stops = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(stops)) => stops
            .into_iter()
            .map(|stop| match stop {
                Value::String(stop) => Ok(stop),
                other => Err(wrong_type("stop", "a string or an array of strings", &other)),
            })
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(wrong_type("stop", "a string or an array of strings", &other)),
    };
    let bad = |message| Err(BadParam::new("stop", "invalid_value", message));
    if stops.len() > MAX_STOPS {
        return bad(format!("'stop' must have at most {MAX_STOPS} strings, got {}", stops.len()));
    }
    if stops.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        return bad(format!("each string of 'stop' must be 1 to {MAX_STOP_BYTES} bytes long"));
    }
    Ok(stops)
}

fn prompt(value: Value) -> Result<Prompt, BadParam> {
    const EXPECTED: &str = "a string or an array of token ids";
    let empty = || BadParam::new("prompt", "invalid_value", "'prompt' must not be empty");
    match value {
        Value::String(text) if text.is_empty() => Err(empty()),
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(mut items) => match items.first() {
            None => Err(empty()),
            Some(Value::Number(_)) => token_ids("prompt", &items).map(Prompt::Tokens),
            Some(Value::String(_)) if items.len() == 1 => prompt(items.remove(0)),
            Some(Value::Array(ids)) if items.len() == 1 => match ids.as_slice() {
                [] => Err(empty()),
                ids => token_ids("prompt", ids).map(Prompt::Tokens),
            },
            Some(Value::String(_) | Value::Array(_)) => {
                let message = format!("'prompt' must hold one prompt, batches are not supported (got {})", items.len());
                Err(BadParam::new("prompt", "unsupported_value", message))
            }
            Some(other) => Err(wrong_type("prompt", EXPECTED, other)),
        },
        other => Err(wrong_type("prompt", EXPECTED, &other)),
    }
}

/// An answer has one form: that of a call, if one is required. With tools that the model may call or not, it has none.
pub(crate) fn with_tools(common: &mut Common, tools: &Tools) -> Result<(), BadParam> {
    let called = tools.grammar()?;
    match (common.form_param, called) {
        (Some(param), _) if !tools.told().is_empty() => {
            let message = format!(
                "'{param}' can't be kept together with 'tools' here: a call would not have that form; send 'tool_choice' \"none\" \
                 or leave one of them out"
            );
            Err(BadParam::new(param, "unsupported_parameter", message))
        }
        (_, Some((param, grammar))) => {
            (common.form_param, common.sampling.grammar) = (Some(param), Some(grammar));
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Variables that a client may not set: they are said by fields of their own, or by the server.
const TAKEN: [&str; 8] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "strftime_now",
    "raise_exception",
    "namespace",
];

/// What the template gets besides messages and tools.
pub(crate) fn template_fields(fields: &mut Fields, conversation: &mut Conversation) -> Result<(), BadParam> {
    conversation.open = fields.bool("add_generation_prompt")?.unwrap_or(true);
    conversation.variables = fields.object("chat_template_kwargs")?.unwrap_or_default();
    if let Some(taken) = TAKEN.iter().find(|name| conversation.variables.contains_key(**name)) {
        let path = format!("chat_template_kwargs.{taken}");
        let message = format!("'{path}' can't be set: it is what this server gives the template itself");
        return Err(BadParam::new(path, "invalid_value", message));
    }
    conversation.documents = match fields.take("documents") {
        None => Vec::new(),
        Some(Value::Array(documents)) => documents,
        Some(other) => return Err(wrong_type("documents", "an array of objects", &other)),
    };
    if let Some((at, wrong)) = conversation.documents.iter().enumerate().find(|(_, document)| !document.is_object()) {
        return Err(wrong_type(&format!("documents[{at}]"), "an object", wrong));
    }
    Ok(())
}

#[cfg(test)]
#[path = "types_tests.rs"]
mod tests;
