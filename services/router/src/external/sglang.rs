//! SGLang's `/generate`: what is said to a prefill and to a decode server, and what is heard. Pure.
//!
//! ```text
//!   prefill server ◀──┬── prompt, bootstrap_host, bootstrap_port (the prefill server's), bootstrap_room (a number)
//!   decode server  ◀──┘   the same, at the same time: they meet in that room
//!   prefill server ──▶ one answer, once the decode server has the prompt's KV
//!   decode server  ──▶ data: {"output_ids", "meta_info": {"completion_tokens", "finish_reason", …}} … data: [DONE]
//! ```
//!
//! Events hold all of the answer so far, or, where the server was told to (`--incremental-streaming-output`), what is new:
//! `completion_tokens` says which. The first token is the prefill server's.

use std::collections::BTreeMap;

use kvasir_types::{FinishReason, Grammar, Sampled, TokenId, TopLogprob};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Nonsense, Told, answers::Asked, brief};

/// Where both servers are asked.
pub(crate) const PATH: &str = "/generate";
/// Where a request is given up by its name.
pub(crate) const ABORT_PATH: &str = "/abort_request";
/// Longest event: they hold all of an answer so far, with log-probabilities if those were asked for.
pub(crate) const MAX_EVENT_BYTES: usize = 8 << 20;
/// Longest answer of a prefill server.
pub(crate) const MAX_PREFILL_BYTES: usize = 1 << 20;

/// Where the two servers meet.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Meeting {
    /// The prefill server's host.
    pub(crate) host: String,
    /// Its bootstrap port.
    pub(crate) port: u16,
    /// Another number for each request.
    pub(crate) room: u64,
}

#[derive(Serialize)]
struct Request<'a> {
    rid: &'a str,
    input_ids: &'a [TokenId],
    sampling_params: Params<'a>,
    stream: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    return_logprob: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprob_start_len: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs_num: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extra_key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bootstrap_host: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bootstrap_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bootstrap_room: Option<u64>,
}

#[derive(Serialize)]
struct Params<'a> {
    max_new_tokens: u32,
    min_new_tokens: u32,
    temperature: f32,
    top_p: f32,
    top_k: i64,
    min_p: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    repetition_penalty: f32,
    stop_token_ids: &'a [TokenId],
    ignore_eos: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    logit_bias: BTreeMap<String, f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sampling_seed: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    json_schema: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    regex: Option<String>,
}

/// The body for either server; `stream`: for a decode server. `rid`: the request's name there.
pub(crate) fn generate(asked: &Asked<'_>, rid: &str, meeting: Option<&Meeting>, stream: bool, seeds: bool) -> Vec<u8> {
    let sampling = asked.sampling;
    let (json_schema, regex) = match &sampling.grammar {
        None | Some(Grammar::Lark(_)) => (None, None), // the latter is refused before
        Some(Grammar::JsonObject) => (Some(r#"{"type": "object"}"#.to_owned()), None),
        Some(Grammar::JsonSchema(schema)) => (Some(schema.to_string()), None),
        Some(Grammar::Regex(regex)) => (None, Some(regex.to_string())),
        Some(Grammar::Choice(texts)) => (None, Some(one_of(texts))),
    };
    let request = Request {
        rid,
        input_ids: asked.prompt,
        sampling_params: Params {
            max_new_tokens: asked.max_tokens,
            min_new_tokens: sampling.min_tokens.saturating_sub(sampling.continued).min(asked.max_tokens),
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: if sampling.top_k == 0 { -1 } else { sampling.top_k.into() },
            min_p: sampling.min_p,
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            repetition_penalty: sampling.repetition_penalty,
            stop_token_ids: &sampling.stop_token_ids,
            ignore_eos: sampling.ignore_eos,
            logit_bias: sampling.logit_bias.iter().map(|(token, bias)| (token.0.to_string(), *bias)).collect(),
            // It is kept in 32 bits while tokens are drawn.
            sampling_seed: seeds.then_some((asked.seed & i32::MAX as u64) as i64),
            json_schema,
            regex,
        },
        stream,
        return_logprob: sampling.logprobs.is_some(),
        logprob_start_len: sampling.logprobs.map(|_| -1),
        top_logprobs_num: sampling.logprobs,
        extra_key: Some(asked.salt).filter(|salt| !salt.is_empty()),
        bootstrap_host: meeting.map(|meeting| meeting.host.as_str()),
        bootstrap_port: meeting.map(|meeting| meeting.port),
        bootstrap_room: meeting.map(|meeting| meeting.room),
    };
    serde_json::to_vec(&request).expect("numbers that were checked and maps with keys that are text")
}

/// The body that gives a request up.
pub(crate) fn abort(rid: &str) -> Vec<u8> {
    serde_json::json!({ "rid": rid }).to_string().into_bytes()
}

/// A regular expression for one of these texts.
fn one_of(texts: &[String]) -> String {
    let mut regex = String::from("(");
    for (at, text) in texts.iter().enumerate() {
        if at > 0 {
            regex.push('|');
        }
        for c in text.chars() {
            if c.is_ascii_punctuation() {
                regex.push('\\');
            }
            regex.push(c);
        }
    }
    regex.push(')');
    regex
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    output_ids: Option<Vec<TokenId>>,
    #[serde(default)]
    meta_info: Option<Meta>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Meta {
    #[serde(default)]
    completion_tokens: usize,
    #[serde(default)]
    cached_tokens: Option<u32>,
    #[serde(default)]
    finish_reason: Option<Reason>,
    #[serde(default)]
    output_token_logprobs: Option<Vec<Logged>>,
    #[serde(default)]
    output_top_logprobs: Option<Vec<Option<Vec<Logged>>>>,
}

/// Log-probability, token, and its text or null.
type Logged = (Option<f32>, TokenId, Option<String>);

#[derive(Deserialize)]
struct Reason {
    r#type: String,
    #[serde(default)]
    message: Option<String>,
    #[serde(default)]
    status_code: Option<u16>,
}

impl Reason {
    fn meaning(&self) -> Result<FinishReason, Nonsense> {
        match self.r#type.as_str() {
            "stop" => Ok(FinishReason::Stop),
            "length" => Ok(FinishReason::Length),
            other => {
                let why = brief(self.message.as_deref().unwrap_or(other));
                Err(match self.status_code {
                    Some(400) => Nonsense::Refused(why),
                    Some(429 | 503) => Nonsense::Busy(why),
                    _ => Nonsense::Failed(format!("it ended with {}: {why}", brief(other))),
                })
            }
        }
    }
}

fn answer(data: &[u8]) -> Result<(Vec<TokenId>, Meta), Nonsense> {
    let unreadable =
        |error: serde_json::Error| Nonsense::protocol(format!("what can't be read: {}", brief(&error.to_string())));
    let answer: Answer = serde_json::from_slice(data).map_err(unreadable)?;
    if let Some(error) = answer.error {
        let text = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
        return Err(Nonsense::Failed(brief(&text)));
    }
    let meta = answer.meta_info.ok_or_else(|| Nonsense::protocol("no meta_info"))?;
    Ok((answer.output_ids.unwrap_or_default(), meta))
}

/// Reads a prefill server's answer: tokens of the prompt that it did not have to compute, if it says.
pub(crate) fn handed(data: &[u8]) -> Result<Option<u32>, Nonsense> {
    let (_, meta) = answer(data)?;
    if let Some(reason) = &meta.finish_reason {
        reason.meaning()?;
    }
    Ok(meta.cached_tokens)
}

/// Reads a decode server's stream.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    logprobs: Option<u8>,
    /// Tokens told so far.
    told: usize,
    cached: Option<u32>,
    ended: Option<FinishReason>,
    done: bool,
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
        let (mut tokens, meta) = answer(data)?;
        if let Some(reason) = &meta.finish_reason {
            // Before the tokens: an event that says it failed may hold any.
            self.ended = Some(reason.meaning()?);
        }
        let (count, total) = (tokens.len(), meta.completion_tokens);
        let new = if count == total && count >= self.told {
            tokens.split_off(self.told)
        } else if count + self.told == total {
            tokens
        } else {
            let told = self.told;
            return Err(Nonsense::protocol(format!(
                "{count} output_ids, {told} before, and {total} completion_tokens"
            )));
        };
        self.told = total;
        self.cached = meta.cached_tokens.or(self.cached);
        match self.logprobs {
            None => {
                new.into_iter().for_each(|token| tell(Told::Token(Sampled { token, logprob: None, top: Vec::new() })));
            }
            Some(alternatives) => {
                let tops = meta.output_top_logprobs.unwrap_or_default();
                for sampled in with_logprobs(new, meta.output_token_logprobs.unwrap_or_default(), tops, alternatives)? {
                    tell(Told::Token(sampled));
                }
            }
        }
        Ok(())
    }

    /// The end, if it may be one: what was said so far is all.
    pub(crate) fn end(&mut self) -> Option<Told> {
        let reason = self.ended.filter(|_| !self.done)?;
        self.done = true;
        Some(Told::Finished(reason, self.cached))
    }
}

/// The last ones of each list are those of the new tokens, whether lists hold all or what is new.
fn with_logprobs(
    tokens: Vec<TokenId>,
    mut logged: Vec<Logged>,
    mut tops: Vec<Option<Vec<Logged>>>,
    alternatives: u8,
) -> Result<Vec<Sampled>, Nonsense> {
    let missing = |have: usize| Nonsense::protocol(format!("{} tokens with {have} log-probabilities", tokens.len()));
    let from = logged.len().checked_sub(tokens.len()).ok_or_else(|| missing(logged.len()))?;
    let logged = logged.split_off(from);
    let tops = match tops.len().checked_sub(tokens.len()) {
        Some(from) if alternatives > 0 => tops.split_off(from),
        None if alternatives > 0 => return Err(missing(tops.len())),
        _ => Vec::new(),
    };
    let mut all = Vec::with_capacity(tokens.len());
    let tops = tops.into_iter().chain(std::iter::repeat_with(|| None));
    for ((token, (logprob, of, _)), top) in tokens.into_iter().zip(logged).zip(tops) {
        if of != token {
            return Err(Nonsense::protocol(format!("the log-probability of {} with token {}", of.0, token.0)));
        }
        let top = top.unwrap_or_default().into_iter();
        let top = top.filter_map(|(logprob, token, _)| Some(TopLogprob { token, logprob: logprob? })).collect();
        all.push(Sampled {
            token,
            logprob: Some(logprob.unwrap_or(f32::MIN)),
            top: super::likeliest(top, alternatives),
        });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use kvasir_types::Sampling;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn hear(reader: &mut Reader, data: &Value) -> Result<Vec<Told>, Nonsense> {
        let mut told = Vec::new();
        reader.hear(data.to_string().as_bytes(), |one| told.push(one)).map(|()| told)
    }

    fn tokens(ids: &[u32]) -> Vec<Told> {
        let told = |id: &u32| Told::Token(Sampled { token: TokenId(*id), logprob: None, top: Vec::new() });
        ids.iter().map(told).collect()
    }

    fn event(ids: &[u32], total: usize) -> Value {
        json!({"text": "x", "output_ids": ids, "meta_info": {"id": "r", "completion_tokens": total, "finish_reason": null}})
    }

    #[test]
    fn both_servers_hear_where_they_meet() {
        let sampling = Sampling {
            temperature: 0.5,
            min_tokens: 6,
            continued: 2,
            logprobs: Some(2),
            grammar: Some(Grammar::Choice(["a|b".to_owned(), "c d".to_owned()].into())),
            ..Sampling::default()
        };
        let prompt = [TokenId(5), TokenId(6)];
        let asked =
            Asked { prompt: &prompt, sampling: &sampling, seed: u64::MAX, max_tokens: 7, salt: "acme", vocab: 10 };
        let meeting = Meeting { host: "10.0.0.1".into(), port: 8998, room: 1 << 62 };
        let said = |stream, seeds| -> Value {
            serde_json::from_slice(&generate(&asked, "r-1", Some(&meeting), stream, seeds)).unwrap()
        };
        let mut body = said(true, true);
        assert_eq!(
            (&body["bootstrap_host"], &body["bootstrap_port"], &body["bootstrap_room"]),
            (&json!("10.0.0.1"), &json!(8998), &json!(1u64 << 62))
        );
        assert_eq!(
            (&body["input_ids"], &body["rid"], &body["extra_key"]),
            (&json!([5, 6]), &json!("r-1"), &json!("acme"))
        );
        assert_eq!((&body["return_logprob"], &body["top_logprobs_num"]), (&json!(true), &json!(2)));
        let params = body["sampling_params"].take();
        assert_eq!((&params["regex"], &params["top_k"]), (&json!(r"(a\|b|c d)"), &json!(-1)));
        assert_eq!((&params["min_new_tokens"], &params["max_new_tokens"]), (&json!(4), &json!(7)));
        assert_eq!(params["sampling_seed"], json!(i32::MAX));
        assert!(said(false, false)["sampling_params"].get("sampling_seed").is_none());
        let alone: Value = serde_json::from_slice(&generate(&asked, "r-1", None, true, false)).unwrap();
        assert!(alone.get("bootstrap_room").is_none() && alone.get("bootstrap_host").is_none());
        assert_eq!(abort("r-1"), br#"{"rid":"r-1"}"#);
    }

    #[test]
    fn events_may_hold_all_so_far_or_what_is_new() {
        for events in [[event(&[7], 1), event(&[7, 7, 8], 3)], [event(&[7], 1), event(&[7, 8], 3)]] {
            let mut reader = Reader::new(None);
            assert_eq!(hear(&mut reader, &events[0]).unwrap(), tokens(&[7]));
            assert_eq!(hear(&mut reader, &events[1]).unwrap(), tokens(&[7, 8]));
        }
        let mut reader = Reader::new(None);
        hear(&mut reader, &event(&[7], 1)).unwrap();
        assert_eq!(hear(&mut reader, &event(&[7], 1)).unwrap(), [], "the same once more");
        for (ids, total) in [(vec![7, 8], 5), (vec![], 0), (vec![1, 2, 3], 2)] {
            assert!(matches!(hear(&mut reader, &event(&ids, total)), Err(Nonsense::Protocol(_))), "{ids:?} {total}");
        }
    }

    #[test]
    fn an_answer_ends_with_its_reason() {
        let ended = |reason: Value| json!({"output_ids": [7], "meta_info": {"completion_tokens": 1, "cached_tokens": 4, "finish_reason": reason}});
        let mut reader = Reader::new(None);
        assert_eq!(hear(&mut reader, &ended(json!({"type": "stop", "matched": 7}))).unwrap(), tokens(&[7]));
        let mut told = Vec::new();
        reader.hear(b"[DONE]", |one| told.push(one)).unwrap();
        assert_eq!(told, [Told::Finished(FinishReason::Stop, Some(4))]);
        let length = json!({"type": "length", "length": 1});
        assert_eq!(handed(ended(length).to_string().as_bytes()).unwrap(), Some(4));
        let abort = |code: Value| {
            let reason = json!({"type": "abort", "message": "why", "status_code": code});
            hear(&mut Reader::new(None), &ended(reason)).unwrap_err()
        };
        assert_eq!(abort(json!(400)), Nonsense::Refused("why".into()));
        assert_eq!(abort(json!(503)), Nonsense::Busy("why".into()));
        assert!(matches!(abort(json!(null)), Nonsense::Failed(_)));
        assert!(Reader::new(None).hear(b"[DONE]", drop).is_err());
        let error = json!({"error": {"message": "why"}});
        assert_eq!(hear(&mut Reader::new(None), &error), Err(Nonsense::Failed("why".into())));
    }

    #[test]
    fn log_probabilities_go_with_the_new_tokens() {
        let logged =
            |pairs: &[(f32, u32)]| -> Value { pairs.iter().map(|(logprob, id)| json!([logprob, id, null])).collect() };
        let event = |ids: &[u32], logprobs: Value, tops: Value| json!({"output_ids": ids, "meta_info": {"completion_tokens": 2, "output_token_logprobs": logprobs, "output_top_logprobs": tops}});
        let tops = json!([null, logged(&[(-0.5, 9), (-0.25, 4), (-2.0, 1)])]);
        let whole = event(&[7, 8], logged(&[(-1.0, 7), (-1.5, 8)]), tops.clone());
        let new = event(&[8], logged(&[(-1.5, 8)]), json!([tops[1]]));
        for event in [whole, new] {
            let mut reader = Reader { told: 1, ..Reader::new(Some(2)) };
            let told = hear(&mut reader, &event).unwrap();
            let [Told::Token(sampled)] = told.as_slice() else { panic!("{told:?}") };
            assert_eq!((sampled.token, sampled.logprob), (TokenId(8), Some(-1.5)));
            let top: Vec<_> = sampled.top.iter().map(|top| (top.token.0, top.logprob)).collect();
            assert_eq!(top, [(4, -0.25), (9, -0.5)]);
        }
        for bad in
            [event(&[7, 8], logged(&[(-1.0, 7)]), json!([])), event(&[7, 8], logged(&[(-1.0, 8), (-1.0, 7)]), tops)]
        {
            assert!(matches!(hear(&mut Reader::new(Some(2)), &bad), Err(Nonsense::Protocol(_))), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_an_engine_says_panics(data in prop::collection::vec(any::<u8>(), 0..200), ids in prop::collection::vec(0u32..5, 0..9), total in 0usize..12, told in 0usize..9) {
            for logprobs in [None, Some(3)] {
                let mut reader = Reader { told, ..Reader::new(logprobs) };
                let _any = reader.hear(&data, drop);
                let _any = hear(&mut reader, &event(&ids, total));
                let _any = reader.end();
            }
            let _any = handed(&data);
        }
    }
}
