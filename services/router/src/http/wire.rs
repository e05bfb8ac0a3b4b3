//! The JSON that both endpoints write: envelopes around choices, usage, log-probabilities.

use kvasir_types::{FinishReason, TokenId};
use serde::{
    Serialize, Serializer,
    ser::{SerializeMap, SerializeSeq},
};

use super::{
    live::{Cost, Live},
    types::ServiceTier,
};
use crate::text::{Logged, Vocab};

/// What JSON can't hold: OpenAI writes this for "never".
const NEVER: f32 = -9999.0;

/// What is the same in every chunk of an answer.
pub(crate) struct Head {
    /// The answer's name.
    pub(crate) id: String,
    /// When it was begun, in seconds since 1970.
    pub(crate) created: u64,
    /// The model's name.
    pub(crate) model: String,
    /// Which weights.
    pub(crate) system_fingerprint: String,
    /// Who went first, if the client said.
    pub(crate) service_tier: Option<ServiceTier>,
}

impl Head {
    /// The head of an answer, named with the endpoint's prefix and the request's name.
    pub(crate) fn of(live: &Live, prefix: &str, created: u64) -> Self {
        Self {
            id: format!("{prefix}-{}", live.id),
            created,
            model: live.model.name().to_owned(),
            system_fingerprint: live.fingerprint.clone(),
            service_tier: live.service_tier,
        }
    }

    /// The head around some choices. `usage`: `None` leaves the field out, `Some(None)` is null.
    pub(crate) fn around<'a, C>(
        &'a self,
        object: &'static str,
        choices: &'a [C],
        usage: Option<Option<Usage>>,
    ) -> Envelope<'a, C> {
        let Self { id, created, model, system_fingerprint, service_tier } = self;
        let (created, service_tier) = (*created, *service_tier);
        Envelope { id, object, created, model, system_fingerprint, service_tier, choices, usage }
    }
}

/// A whole answer or a chunk of one.
#[derive(Serialize)]
pub(crate) struct Envelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_tier: Option<ServiceTier>,
    choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

/// What the answers cost.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    /// Left out where it is not known: the answer ended at a stop string.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Clone, Copy, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
}

impl From<Cost> for Usage {
    fn from(cost: Cost) -> Self {
        let kvasir_types::Usage { prompt, cached, output } = cost.usage;
        Self {
            prompt_tokens: prompt,
            completion_tokens: output,
            total_tokens: prompt.saturating_add(output),
            prompt_tokens_details: cost.cached_known.then_some(PromptDetails { cached_tokens: cached }),
        }
    }
}

/// OpenAI's word for why an answer ended.
pub(crate) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { NEVER }
}

/// Log-probabilities as chat has them: a list of tokens with their bytes and alternatives.
pub(crate) struct ChatLogprobs<'a> {
    /// Names of tokens.
    pub(crate) vocab: &'a Vocab,
    /// The tokens.
    pub(crate) logged: &'a [Logged],
}

impl Serialize for ChatLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("content", &ChatTokens(self))?;
        map.serialize_entry("refusal", &None::<()>)?;
        map.end()
    }
}

struct ChatTokens<'a>(&'a ChatLogprobs<'a>);

#[derive(Serialize)]
struct ChatToken<'a> {
    token: String,
    logprob: f32,
    bytes: &'a [u8],
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<ChatToken<'a>>>,
}

impl Serialize for ChatTokens<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let ChatLogprobs { vocab, logged } = self.0;
        let token = |token: TokenId, logprob: f32, top_logprobs| {
            let bytes = vocab.bytes(token);
            ChatToken {
                token: String::from_utf8_lossy(bytes).into_owned(),
                logprob: finite(logprob),
                bytes,
                top_logprobs,
            }
        };
        let mut list = serializer.serialize_seq(Some(logged.len()))?;
        for Logged { sampled, .. } in *logged {
            let top = sampled.top.iter().map(|top| token(top.token, top.logprob, None)).collect();
            list.serialize_element(&token(sampled.token, sampled.logprob.unwrap_or(NEVER), Some(top)))?;
        }
        list.end()
    }
}

/// Log-probabilities as completions have them: parallel lists.
#[derive(Serialize)]
pub(crate) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<TopByName>,
    text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    /// Those of some tokens.
    pub(crate) fn of(vocab: &Vocab, logged: &[Logged]) -> Self {
        let mut lists =
            Self { tokens: Vec::new(), token_logprobs: Vec::new(), top_logprobs: Vec::new(), text_offset: Vec::new() };
        for Logged { sampled, text_offset } in logged {
            let logprob = sampled.logprob.unwrap_or(NEVER);
            let mut top: Vec<_> = sampled.top.iter().map(|top| (name(vocab, top.token), finite(top.logprob))).collect();
            if !sampled.top.iter().any(|top| top.token == sampled.token) {
                top.push((name(vocab, sampled.token), finite(logprob)));
            }
            lists.tokens.push(name(vocab, sampled.token));
            lists.token_logprobs.push(finite(logprob));
            lists.top_logprobs.push(TopByName(top));
            lists.text_offset.push(*text_offset);
        }
        lists
    }
}

/// An object from name to log-probability, in order of likelihood.
struct TopByName(Vec<(String, f32)>);

impl Serialize for TopByName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, logprob) in &self.0 {
            map.serialize_entry(name, logprob)?;
        }
        map.end()
    }
}

/// A token's text; part of a character is written as its bytes, as OpenAI does, so that names stay distinct.
fn name(vocab: &Vocab, token: TokenId) -> String {
    match std::str::from_utf8(vocab.bytes(token)) {
        Ok(text) => text.to_owned(),
        Err(_) => vocab.bytes(token).iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}")),
    }
}

#[cfg(test)]
mod tests {
    use kvasir_types::{Sampled, TopLogprob};

    use super::*;
    use crate::text::demo;

    fn logged(token: u32) -> Logged {
        let top = vec![
            TopLogprob { token: TokenId(973), logprob: -0.5 },
            TopLogprob { token: TokenId(3), logprob: f32::NEG_INFINITY },
        ];
        Logged { sampled: Sampled { token: TokenId(token), logprob: Some(-1.25), top }, text_offset: 4 }
    }

    #[test]
    fn logprobs_have_both_of_openais_forms() {
        let model = demo();
        let chat = ChatLogprobs { vocab: model.vocab(), logged: &[logged(973)] };
        insta::assert_snapshot!(serde_json::to_string(&chat).unwrap(), @r#"{"content":[{"token":" prefix","logprob":-1.25,"bytes":[32,112,114,101,102,105,120],"top_logprobs":[{"token":" prefix","logprob":-0.5,"bytes":[32,112,114,101,102,105,120]},{"token":"!","logprob":-9999.0,"bytes":[33]}]}],"refusal":null}"#);
        let completion = CompletionLogprobs::of(model.vocab(), &[logged(883)]);
        insta::assert_snapshot!(serde_json::to_string(&completion).unwrap(), @r#"{"tokens":[" cache"],"token_logprobs":[-1.25],"top_logprobs":[{" prefix":-0.5,"!":-9999.0," cache":-1.25}],"text_offset":[4]}"#);
    }

    #[test]
    fn part_of_a_character_is_named_by_its_bytes() {
        let model = demo();
        let tokens = model.encode("🦀", false).unwrap();
        assert!(name(model.vocab(), tokens[0]).starts_with("bytes:\\xf0"), "{}", name(model.vocab(), tokens[0]));
    }
}
