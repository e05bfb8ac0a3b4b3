//! One request at a time: a prompt, an answer token by token.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt;
use serde_json::{Value, json};

use super::{
    Ground,
    events::{Event, Events},
};
use crate::{
    live::{
        Names,
        drive::{Lane, Turn},
    },
    trace::Request,
};

/// Token ids below this are left alone: models keep those that mean something special there.
const FIRST_TOKEN: u64 = 256;

/// What became of a request.
pub(super) struct Outcome {
    pub(super) result: Result<Answer, String>,
    /// Blocks of the trace that the prompt had room for.
    pub(super) blocks: usize,
    /// From when it was due.
    pub(super) whole: Duration,
}

/// An answer that came to its end.
#[derive(Debug, PartialEq)]
pub(super) struct Answer {
    pub(super) prompt_tokens: u64,
    /// Of those, tokens that nobody had to compute.
    pub(super) cached_tokens: u64,
    pub(super) output_tokens: u64,
    /// From when it was due to the first token.
    pub(super) ttft: Duration,
    /// Mean time between two tokens; there is none where there is one token.
    pub(super) tpot: Option<Duration>,
}

pub(super) struct RouterLane {
    ground: Arc<Ground>,
}

impl RouterLane {
    pub(super) fn new(ground: Arc<Ground>) -> Self {
        Self { ground }
    }

    async fn ask(&self, turn: &Turn<'_>, prompt: Vec<u64>, output: u32) -> Result<Answer, String> {
        let Ground { http, settings, model, .. } = &*self.ground;
        let body = json!({
            "model": model.name,
            "prompt": prompt,
            "max_tokens": output,
            "ignore_eos": true,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let response = http.post(format!("{}/v1/completions", settings.url)).json(&body).send().await;
        let response = response.map_err(|error| if error.is_connect() { "connect" } else { "send" }.to_owned())?;
        let status = response.status().as_u16();
        if status != 200 {
            return Err(format!("http {status}"));
        }
        let (mut bytes, mut events, mut reading) = (response.bytes_stream(), Events::default(), Reading::default());
        while let Some(piece) = bytes.next().await {
            let piece = piece.map_err(|_| "broken off")?;
            let now = turn.due.elapsed();
            for event in events.feed(&piece).map_err(|_| "too long a line")? {
                if reading.take(event, now)? {
                    return reading.answer();
                }
            }
        }
        Err("broken off".to_owned())
    }
}

impl Lane for RouterLane {
    type Outcome = Outcome;

    async fn serve(&mut self, turn: Turn<'_>) -> Outcome {
        let settings = &self.ground.settings;
        let output = turn.request.answer_tokens.clamp(1, settings.max_output_tokens);
        let room = self.ground.model.context.map(|context| context.saturating_sub(u64::from(output) + 1));
        let blocks = blocks(turn.request, settings.block_tokens, room);
        let prompt = prompt(&self.ground.names, turn.request, blocks, settings.block_tokens, settings.vocabulary);
        let result = tokio::time::timeout(settings.timeout, Box::pin(self.ask(&turn, prompt, output))).await;
        Outcome { result: result.unwrap_or_else(|_| Err("timeout".to_owned())), blocks, whole: turn.due.elapsed() }
    }
}

/// How many of a request's blocks there is room for.
fn blocks(request: &Request, block_tokens: u32, room: Option<u64>) -> usize {
    let fit = room.map_or(u64::MAX, |room| room / u64::from(block_tokens));
    request.blocks.len().min(usize::try_from(fit).unwrap_or(usize::MAX))
}

/// The tokens of a request's first blocks, and one more.
fn prompt(names: &Names, request: &Request, blocks: usize, block_tokens: u32, vocabulary: u32) -> Vec<u64> {
    let token = |word: u64| FIRST_TOKEN + word % (u64::from(vocabulary) - FIRST_TOKEN);
    let tokens = |&block: &u32| names.words(block.into()).take(block_tokens as usize).map(token);
    request.blocks[..blocks].iter().flat_map(tokens).chain([FIRST_TOKEN]).collect()
}

/// An answer, as far as it has come.
#[derive(Default)]
struct Reading {
    first: Option<Duration>,
    last: Duration,
    usage: Option<Value>,
}

impl Reading {
    /// Takes an event that came so long after the request was due; whether it was the last one.
    fn take(&mut self, event: Event, now: Duration) -> Result<bool, String> {
        let data = match event {
            Event::Done => return Ok(true),
            Event::Data(data) => data,
        };
        let chunk: Value = serde_json::from_str(&data).map_err(|_| "no JSON")?;
        if let Some(error) = chunk.get("error") {
            let kind = error["type"].as_str().unwrap_or("unknown");
            return Err(format!("answer ended: {}", kind.chars().take(40).collect::<String>()));
        }
        if chunk["choices"].as_array().is_some_and(|choices| !choices.is_empty()) {
            self.first.get_or_insert(now);
            self.last = now;
        }
        if chunk["usage"].is_object() {
            self.usage = Some(chunk["usage"].clone());
        }
        Ok(false)
    }

    fn answer(self) -> Result<Answer, String> {
        let (Some(ttft), Some(usage)) = (self.first, self.usage) else { return Err("incomplete".to_owned()) };
        let count = |field: &str| usage[field].as_u64().unwrap_or(0);
        let output_tokens = count("completion_tokens");
        let between = u32::try_from(output_tokens.saturating_sub(1)).unwrap_or(u32::MAX);
        Ok(Answer {
            prompt_tokens: count("prompt_tokens"),
            cached_tokens: usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0),
            output_tokens,
            ttft,
            tpot: (self.last - ttft).checked_div(between),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Trace;

    #[test]
    fn prompts_share_the_beginning_that_the_trace_says() {
        let trace = Trace::read("0 1 1 7 8 9\n0 1 1 7 8 10 11".as_bytes()).unwrap();
        let names = Names::new("run", "trace", 16);
        let prompt = |n: usize, blocks| prompt(&names, &trace.requests[n], blocks, 16, 1000);
        let (one, other) = (prompt(0, 3), prompt(1, 4));
        assert_eq!((one.len(), other.len()), (49, 65));
        let shared = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
        assert_eq!(shared, 32);
        assert!(one.iter().all(|token| (256..1000).contains(token)));
        assert_eq!(prompt(1, 2)[..32], other[..32]);
        assert_ne!(super::prompt(&Names::new("other", "trace", 16), &trace.requests[0], 3, 16, 1000), one);
    }

    #[test]
    fn prompts_lose_what_the_context_has_no_room_for() {
        let trace = Trace::read("0 1 1 0-9".as_bytes()).unwrap();
        let fit = |room| blocks(&trace.requests[0], 16, room);
        assert_eq!([None, Some(160), Some(159), Some(15), Some(0)].map(fit), [10, 10, 9, 0, 0]);
    }

    #[test]
    fn an_answer_is_what_its_events_say() {
        let ms = Duration::from_millis;
        let read = |events: &[(&str, u64)]| {
            let mut reading = Reading::default();
            for &(data, at) in events {
                reading.take(Event::Data(data.to_owned()), ms(at))?;
            }
            reading.answer()
        };
        let token = r#"{"choices": [{"text": "a"}], "usage": null}"#;
        let usage = r#"{"choices": [], "usage": {"prompt_tokens": 33, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 32}}}"#;
        let answer = read(&[(token, 40), (token, 50), (token, 60), (usage, 90)]).unwrap();
        let expected =
            Answer { prompt_tokens: 33, cached_tokens: 32, output_tokens: 3, ttft: ms(40), tpot: Some(ms(10)) };
        assert_eq!(answer, expected);
        let single = usage.replace(r#""completion_tokens": 3"#, r#""completion_tokens": 1"#);
        assert_eq!(read(&[(token, 40), (&single, 40)]).unwrap().tpot, None);
        assert_eq!(read(&[(token, 1)]).unwrap_err(), "incomplete");
        assert_eq!(read(&[("{", 1)]).unwrap_err(), "no JSON");
        assert_eq!(read(&[(r#"{"error": {"type": "overloaded"}}"#, 1)]).unwrap_err(), "answer ended: overloaded");
    }
}
