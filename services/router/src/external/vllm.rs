//! vLLM's `/v1/completions`: what is said to a prefill and to a decode server, and what is heard. Pure.
//!
//! ```text
//!   prefill server ◀── prompt, max_tokens 1, kv_transfer_params {do_remote_decode: true, …}
//!                  ──▶ kv_transfer_params {do_remote_prefill: true, remote_engine_id, remote_block_ids, …}
//!   decode server  ◀── the same prompt, those kv_transfer_params as they came
//!                  ──▶ data: {"choices": [{"index", "token_ids", "logprobs", "finish_reason"}]} … data: [DONE]
//! ```
//!
//! As connectors such as NIXL's have it: what is in `kv_transfer_params` is between the two servers. The first token is drawn
//! by the decode server; what the prefill server draws is thrown away. A prefill server that hands over nothing (a prompt of
//! less than a block) is no failure: the decode server computes the prompt.

use std::collections::BTreeMap;

use kvasir_types::{FinishReason, Grammar, Sampled, TokenId, TopLogprob};
use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};

use super::{Nonsense, Told, answers::Asked, brief};

/// Where both servers are asked.
pub(crate) const PATH: &str = "/v1/completions";
/// Longest event: log-probabilities of a few tokens with 20 alternatives each.
pub(crate) const MAX_EVENT_BYTES: usize = 1 << 20;
/// Longest answer of a prefill server: the numbers of the blocks of a million tokens.
pub(crate) const MAX_PREFILL_BYTES: usize = 4 << 20;

/// What is said of a request.
#[derive(Serialize)]
struct Request<'a> {
    model: &'a str,
    prompt: &'a [TokenId],
    max_tokens: u32,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
    temperature: f32,
    top_p: f32,
    top_k: i64,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<i64>,
    ignore_eos: bool,
    min_tokens: u32,
    stop_token_ids: &'a [TokenId],
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    logit_bias: BTreeMap<String, f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<u8>,
    return_token_ids: bool,
    return_tokens_as_token_ids: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    structured_outputs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_salt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_transfer_params: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// What a prefill server is told of who will go on: nobody in particular.
const REMOTE_DECODE: &str = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

/// The body for a prefill server.
pub(crate) fn prefill(asked: &Asked<'_>, served_name: &str) -> Vec<u8> {
    let params: &RawValue = serde_json::from_str(REMOTE_DECODE).expect("it is JSON");
    body(&Request {
        model: served_name,
        prompt: asked.prompt,
        max_tokens: 1,
        stream: false,
        stream_options: None,
        temperature: 0.0,
        top_p: 1.0,
        top_k: -1,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: None,
        // A request that ended by an end token would hand over nothing: only those that reach their length do.
        ignore_eos: true,
        min_tokens: 0,
        stop_token_ids: &[],
        logit_bias: BTreeMap::new(),
        logprobs: None,
        return_token_ids: false,
        return_tokens_as_token_ids: false,
        structured_outputs: None,
        cache_salt: salt(asked),
        kv_transfer_params: Some(params),
    })
}

/// The body for a decode server; `kv`: what a prefill server handed over.
pub(crate) fn decode(asked: &Asked<'_>, served_name: &str, kv: Option<&RawValue>) -> Vec<u8> {
    let sampling = asked.sampling;
    body(&Request {
        model: served_name,
        prompt: asked.prompt,
        max_tokens: asked.max_tokens,
        stream: true,
        stream_options: Some(StreamOptions { include_usage: true }),
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: if sampling.top_k == 0 { -1 } else { sampling.top_k.into() },
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        // A seed is 63 bits there: what is negative means something else in some versions.
        seed: Some((asked.seed & i64::MAX as u64) as i64),
        ignore_eos: sampling.ignore_eos,
        min_tokens: sampling.min_tokens.saturating_sub(sampling.continued).min(asked.max_tokens),
        stop_token_ids: &sampling.stop_token_ids,
        logit_bias: sampling.logit_bias.iter().map(|(token, bias)| (token.0.to_string(), *bias)).collect(),
        logprobs: sampling.logprobs,
        return_token_ids: true,
        return_tokens_as_token_ids: sampling.logprobs.is_some(),
        structured_outputs: sampling.grammar.as_ref().map(form),
        cache_salt: salt(asked),
        kv_transfer_params: kv,
    })
}

fn body(request: &Request<'_>) -> Vec<u8> {
    serde_json::to_vec(request).expect("numbers that were checked and maps with keys that are text")
}

fn salt<'a>(asked: &Asked<'a>) -> Option<&'a str> {
    Some(asked.salt).filter(|salt| !salt.is_empty())
}

fn form(grammar: &Grammar) -> Value {
    match grammar {
        Grammar::JsonObject => serde_json::json!({"json_object": true}),
        // It was JSON when it came in.
        Grammar::JsonSchema(text) => {
            serde_json::json!({"json": serde_json::from_str(text).unwrap_or(Value::Bool(true))})
        }
        Grammar::Regex(text) => serde_json::json!({"regex": text}),
        Grammar::Choice(texts) => serde_json::json!({"choice": texts}),
        Grammar::Lark(text) => serde_json::json!({"grammar": text}),
    }
}

/// What a prefill server hands over.
#[derive(Debug)]
pub(crate) struct Handed {
    /// For the decode server, as it came; `None`: nothing.
    pub(crate) params: Option<Box<RawValue>>,
    /// Tokens of the prompt that it did not have to compute, if it says.
    pub(crate) cached: Option<u32>,
}

/// Reads a prefill server's answer.
pub(crate) fn handed(answer: &[u8]) -> Result<Handed, Nonsense> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(default)]
        kv_transfer_params: Option<Box<RawValue>>,
        #[serde(default)]
        usage: Option<Usage>,
        choices: Vec<Ended>,
    }
    #[derive(Deserialize)]
    struct Ended {
        #[serde(default)]
        finish_reason: Option<String>,
    }
    let answer: Answer = serde_json::from_slice(answer).map_err(|error| unreadable(&error))?;
    let [choice] = answer.choices.as_slice() else {
        return Err(Nonsense::protocol(format!("{} choices of a prompt", answer.choices.len())));
    };
    if let Some(reason @ ("abort" | "error")) = choice.finish_reason.as_deref() {
        return Err(Nonsense::Failed(format!("computing the prompt ended with {reason}")));
    }
    // An object, or nothing: `{}` from connectors that had nothing to hand over.
    let params = answer.kv_transfer_params.filter(|params| !matches!(params.get(), "null" | "{}"));
    if params.as_ref().is_some_and(|params| !params.get().starts_with('{')) {
        return Err(Nonsense::protocol("kv_transfer_params that are no object"));
    }
    Ok(Handed { params, cached: answer.usage.and_then(|usage| usage.cached()) })
}

fn unreadable(error: &serde_json::Error) -> Nonsense {
    Nonsense::protocol(format!("what can't be read: {}", brief(&error.to_string())))
}

#[derive(Debug, Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens_details: Option<Details>,
}

#[derive(Debug, Deserialize)]
struct Details {
    #[serde(default)]
    cached_tokens: Option<u32>,
}

impl Usage {
    fn cached(&self) -> Option<u32> {
        self.prompt_tokens_details.as_ref()?.cached_tokens
    }
}

/// Reads a decode server's stream.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// How many alternatives were asked for, if log-probabilities were.
    logprobs: Option<u8>,
    ended: Option<FinishReason>,
    cached: Option<u32>,
    done: bool,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: u32,
    #[serde(default)]
    token_ids: Option<Vec<TokenId>>,
    #[serde(default)]
    logprobs: Option<Logprobs>,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Logprobs {
    token_logprobs: Vec<Option<f32>>,
    #[serde(default)]
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
}

impl Reader {
    /// Of an answer whose log-probabilities were asked for like this.
    pub(crate) fn new(logprobs: Option<u8>) -> Self {
        Self { logprobs, ..Self::default() }
    }

    /// An event's data; what it tells goes to `tell`.
    pub(crate) fn hear(&mut self, data: &[u8], mut tell: impl FnMut(Told)) -> Result<(), Nonsense> {
        if self.done {
            return Ok(()); // nobody listens after the end
        }
        if data == b"[DONE]" {
            return match self.end() {
                Some(end) => {
                    tell(end);
                    Ok(())
                }
                None => Err(Nonsense::protocol("[DONE] before a finish_reason")),
            };
        }
        let chunk: Chunk = serde_json::from_slice(data).map_err(|error| unreadable(&error))?;
        if let Some(error) = chunk.error {
            let text = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
            return Err(Nonsense::Failed(brief(&text)));
        }
        self.cached = chunk.usage.and_then(|usage| usage.cached()).or(self.cached);
        for choice in chunk.choices {
            self.choice(choice, &mut tell)?;
        }
        Ok(())
    }

    /// The end, if it may be one: what was said so far is all.
    pub(crate) fn end(&mut self) -> Option<Told> {
        let reason = self.ended.filter(|_| !self.done)?;
        self.done = true;
        Some(Told::Finished(reason, self.cached))
    }

    fn choice(&mut self, choice: Choice, tell: &mut impl FnMut(Told)) -> Result<(), Nonsense> {
        if choice.index != 0 {
            return Err(Nonsense::protocol(format!("choice {} of 1", choice.index)));
        }
        let Some(tokens) = choice.token_ids else {
            return Err(Nonsense::protocol("no token_ids: it must be a version that knows return_token_ids"));
        };
        if self.ended.is_some() && !tokens.is_empty() {
            return Err(Nonsense::protocol("tokens after the end"));
        }
        match (self.logprobs, choice.logprobs) {
            (None, _) => {
                tokens
                    .into_iter()
                    .for_each(|token| tell(Told::Token(Sampled { token, logprob: None, top: Vec::new() })));
            }
            (Some(alternatives), Some(told)) => {
                for sampled in with_logprobs(tokens, told, alternatives)? {
                    tell(Told::Token(sampled));
                }
            }
            (Some(_), None) if tokens.is_empty() => {}
            (Some(_), None) => return Err(Nonsense::protocol("tokens without their log-probabilities")),
        }
        match choice.finish_reason.as_deref() {
            None => {}
            Some("stop") => self.ended = Some(FinishReason::Stop),
            Some("length") => self.ended = Some(FinishReason::Length),
            Some(other) => return Err(Nonsense::Failed(format!("the answer ended with {:?}", brief(other)))),
        }
        Ok(())
    }
}

fn with_logprobs(tokens: Vec<TokenId>, told: Logprobs, alternatives: u8) -> Result<Vec<Sampled>, Nonsense> {
    let Logprobs { token_logprobs, top_logprobs } = told;
    if token_logprobs.len() != tokens.len() || (alternatives > 0 && top_logprobs.len() != tokens.len()) {
        return Err(Nonsense::protocol(format!(
            "{} tokens with {} and {} log-probabilities",
            tokens.len(),
            token_logprobs.len(),
            top_logprobs.len()
        )));
    }
    let tops = top_logprobs.into_iter().chain(std::iter::repeat_with(|| None));
    let mut all = Vec::with_capacity(tokens.len());
    for ((token, logprob), top) in tokens.into_iter().zip(token_logprobs).zip(tops) {
        let mut likeliest = Vec::new();
        for (name, logprob) in top.unwrap_or_default() {
            let token = name.strip_prefix("token_id:").and_then(|id| id.parse().ok());
            let token = token.ok_or_else(|| Nonsense::protocol("an alternative that is no token_id"))?;
            likeliest.push(TopLogprob { token: TokenId(token), logprob });
        }
        all.push(Sampled { token, logprob, top: super::likeliest(likeliest, alternatives) });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use kvasir_types::Sampling;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn asked<'a>(sampling: &'a Sampling, prompt: &'a [TokenId]) -> Asked<'a> {
        Asked { prompt, sampling, seed: u64::MAX, max_tokens: 7, salt: "", vocab: 1000 }
    }

    fn hear(reader: &mut Reader, data: &str) -> Result<Vec<Told>, Nonsense> {
        let mut told = Vec::new();
        reader.hear(data.as_bytes(), |one| told.push(one)).map(|()| told)
    }

    fn token(id: u32) -> Told {
        Told::Token(Sampled { token: TokenId(id), logprob: None, top: Vec::new() })
    }

    #[test]
    fn a_prefill_server_computes_one_token_for_nobody_in_particular() {
        let sampling = Sampling { temperature: 1.0, min_tokens: 3, logprobs: Some(2), ..Sampling::default() };
        let body = prefill(&asked(&sampling, &[TokenId(5), TokenId(6)]), "big-model");
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&body["prompt"], &body["model"]), (&json!([5, 6]), &json!("big-model")));
        assert_eq!((&body["max_tokens"], &body["stream"]), (&json!(1), &json!(false)));
        let params = json!({
            "do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null, "remote_block_ids": null,
            "remote_host": null, "remote_port": null,
        });
        assert_eq!(body["kv_transfer_params"], params);
        assert!(body.get("logprobs").is_none() && body.get("stream_options").is_none() && body["ignore_eos"] == true);
    }

    #[test]
    fn a_decode_server_hears_all_that_was_asked() {
        let sampling = Sampling {
            temperature: 0.5,
            top_k: 3,
            min_tokens: 6,
            continued: 2,
            stop_token_ids: vec![TokenId(9)],
            logit_bias: vec![(TokenId(4), -1.0)],
            logprobs: Some(2),
            grammar: Some(Grammar::JsonSchema(r#"{"type":"object"}"#.into())),
            ..Sampling::default()
        };
        let prompt = [TokenId(5)];
        let salted = Asked { salt: "acme", ..asked(&sampling, &prompt) };
        let kv: Box<RawValue> = serde_json::from_str(r#"{"remote_block_ids": [1, 2],  "x": 1e400}"#).unwrap();
        let body = decode(&salted, "m", Some(&kv));
        // As it came: what is in it is not ours to read.
        assert!(String::from_utf8_lossy(&body).contains(r#"{"remote_block_ids": [1, 2],  "x": 1e400}"#));
        let body: Value = serde_json::from_slice(&decode(&salted, "m", None)).unwrap();
        assert!(body.get("kv_transfer_params").is_none());
        assert_eq!((&body["top_k"], &body["min_tokens"], &body["max_tokens"]), (&json!(3), &json!(4), &json!(7)));
        assert_eq!((&body["stop_token_ids"], &body["logit_bias"]), (&json!([9]), &json!({"4": -1.0})));
        assert_eq!((&body["logprobs"], &body["return_tokens_as_token_ids"]), (&json!(2), &json!(true)));
        assert_eq!(body["structured_outputs"], json!({"json": {"type": "object"}}));
        assert_eq!((&body["cache_salt"], &body["seed"]), (&json!("acme"), &json!(i64::MAX)));
        let plain = decode(&asked(&Sampling::default(), &prompt), "m", None);
        let plain: Value = serde_json::from_slice(&plain).unwrap();
        assert_eq!((&plain["top_k"], &plain["return_token_ids"]), (&json!(-1), &json!(true)));
        assert!(
            plain.get("logprobs").is_none()
                && plain.get("structured_outputs").is_none()
                && plain.get("cache_salt").is_none()
        );
    }

    #[test]
    fn what_a_prefill_server_hands_over_is_taken_as_it_is() {
        let answer = r#"{"choices": [{"index": 0, "text": "x", "finish_reason": "length"}], "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}, "kv_transfer_params": {"do_remote_prefill": true, "remote_port": 5600}}"#;
        let told = handed(answer.as_bytes()).unwrap();
        assert_eq!(told.params.unwrap().get(), r#"{"do_remote_prefill": true, "remote_port": 5600}"#);
        assert_eq!(told.cached, Some(4));
        for nothing in ["", r#", "kv_transfer_params": null"#, r#", "kv_transfer_params": {}"#] {
            let answer = format!(r#"{{"choices": [{{"finish_reason": "length"}}]{nothing}}}"#);
            assert!(handed(answer.as_bytes()).unwrap().params.is_none(), "{nothing}");
        }
        let error = r#"{"choices": [{"finish_reason": "error"}]}"#;
        assert!(matches!(handed(error.as_bytes()), Err(Nonsense::Failed(_))));
        for bad in ["", "[]", "{}", r#"{"choices": []}"#, r#"{"choices": [{}], "kv_transfer_params": [1]}"#] {
            assert!(matches!(handed(bad.as_bytes()), Err(Nonsense::Protocol(_))), "{bad}");
        }
    }

    #[test]
    fn a_stream_is_its_tokens_and_its_end() {
        let mut reader = Reader::new(None);
        let first =
            r#"{"id": "cmpl-1", "choices": [{"index": 0, "text": " a", "prompt_token_ids": [1], "token_ids": [7]}]}"#;
        assert_eq!(hear(&mut reader, first).unwrap(), [token(7)]);
        let two = r#"{"choices": [{"index": 0, "text": "", "token_ids": [8, 2], "finish_reason": "stop", "stop_reason": null}]}"#;
        assert_eq!(hear(&mut reader, two).unwrap(), [token(8), token(2)]);
        let usage = r#"{"choices": [], "usage": {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 3}}}"#;
        assert_eq!(hear(&mut reader, usage).unwrap(), []);
        assert_eq!(hear(&mut reader, "[DONE]").unwrap(), [Told::Finished(FinishReason::Stop, Some(3))]);
        assert_eq!((hear(&mut reader, "[DONE]").unwrap(), reader.end()), (vec![], None));
    }

    #[test]
    fn log_probabilities_come_likeliest_first_and_as_many_as_were_asked_for() {
        let mut reader = Reader::new(Some(2));
        // The chosen token is among them although it is not among the likeliest.
        let chunk = json!({"choices": [{"index": 0, "token_ids": [7], "logprobs": {
            "tokens": ["token_id:7"], "token_logprobs": [-3.0], "text_offset": [0],
            "top_logprobs": [{"token_id:7": -3.0, "token_id:9": -0.5, "token_id:4": -1.0}],
        }}]});
        let top = |token, logprob| TopLogprob { token: TokenId(token), logprob };
        let sampled = Sampled { token: TokenId(7), logprob: Some(-3.0), top: vec![top(9, -0.5), top(4, -1.0)] };
        assert_eq!(hear(&mut reader, &chunk.to_string()).unwrap(), [Told::Token(sampled)]);
        for bad in [
            json!({"choices": [{"token_ids": [7]}]}),
            json!({"choices": [{"token_ids": [7, 8], "logprobs": {"token_logprobs": [-1.0], "top_logprobs": [null]}}]}),
            json!({"choices": [{"token_ids": [7], "logprobs": {"token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}}]}),
        ] {
            assert!(matches!(hear(&mut Reader::new(Some(1)), &bad.to_string()), Err(Nonsense::Protocol(_))), "{bad}");
        }
    }

    #[test]
    fn what_means_nothing_is_told_from_what_says_it_failed() {
        let hear = |data: &str| hear(&mut Reader::new(None), data);
        for failed in [
            r#"{"error": {"message": "KV load failed", "code": 500}}"#,
            r#"{"choices": [{"token_ids": [], "finish_reason": "abort"}]}"#,
            r#"{"choices": [{"token_ids": [1], "finish_reason": "error"}]}"#,
        ] {
            assert!(matches!(hear(failed), Err(Nonsense::Failed(_))), "{failed}");
        }
        for nonsense in [
            "",
            "hello",
            "7",
            "[DONE]",
            r#"{"choices": [{"text": "no ids"}]}"#,
            r#"{"choices": [{"index": 1, "token_ids": []}]}"#,
        ] {
            assert!(matches!(hear(nonsense), Err(Nonsense::Protocol(_))), "{nonsense}");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_an_engine_says_panics(data in prop::collection::vec(any::<u8>(), 0..200), cut in 0usize..300) {
            let good = br#"{"choices": [{"index": 0, "token_ids": [7], "logprobs": {"token_logprobs": [-1e3], "top_logprobs": [{"token_id:7": -3.0}]}, "finish_reason": "stop"}], "usage": null}"#;
            for logprobs in [None, Some(3)] {
                let mut reader = Reader::new(logprobs);
                let _any = reader.hear(&data, drop);
                let _any = reader.hear(&good[..cut.min(good.len())], drop);
                let _any = reader.end();
            }
            let _any = handed(&data);
        }
    }
}
