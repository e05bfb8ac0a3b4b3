//! Server-sent events of an OpenAI answer: which of them bring something, and what the last one counts.
//!
//! What an event says is not kept: only whether there is a token in it, and when it came.

use serde::{
    Deserialize,
    de::{IgnoredAny, Visitor},
};

/// Longest event, and most of a body that is no stream.
const MAX_EVENT: usize = 4 << 20;

/// What is known of an answer so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// Events with something in them.
    pub(super) pieces: u64,
    /// Why it ended, if it said so: some server gave a reason.
    pub(super) finished: bool,
    /// `data: [DONE]` came.
    pub(super) done: bool,
    /// What the server counted.
    pub(super) usage: Option<Usage>,
    /// An error in the middle of a stream.
    pub(super) error: Option<String>,
}

/// What the server counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    prompt_tokens_details: Option<Details>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Details {
    cached_tokens: Option<u64>,
}

impl Usage {
    /// Tokens of the prompt that nobody had to compute.
    pub(super) fn cached_tokens(&self) -> u64 {
        self.prompt_tokens_details.and_then(|details| details.cached_tokens).unwrap_or_default()
    }
}

/// Events that are cut out of a body as it comes.
#[derive(Debug, Default)]
pub(super) struct Events {
    torn: Vec<u8>,
    heard: Heard,
}

/// What makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Nonsense(pub(super) &'static str);

impl Events {
    /// What is known so far.
    pub(super) fn heard(&self) -> &Heard {
        &self.heard
    }

    /// Takes a piece of the body.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) -> Result<(), Nonsense> {
        while let Some(at) = bytes.iter().position(|&byte| byte == b'\n') {
            let (line, rest) = (&bytes[..at], &bytes[at + 1..]);
            bytes = rest;
            if self.torn.is_empty() {
                self.heard.line(line)?;
            } else {
                let mut whole = std::mem::take(&mut self.torn);
                whole.extend_from_slice(line);
                self.heard.line(&whole)?;
                whole.clear();
                self.torn = whole;
            }
        }
        self.torn.extend_from_slice(bytes);
        if self.torn.len() > MAX_EVENT { Err(Nonsense("an event without end")) } else { Ok(()) }
    }
}

impl Heard {
    /// A line of the stream. Servers put an event's JSON into one line, so that a line is an event.
    fn line(&mut self, line: &[u8]) -> Result<(), Nonsense> {
        let Some(data) = line.trim_ascii_end().strip_prefix(b"data:") else { return Ok(()) };
        let data = data.trim_ascii_start();
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        self.piece(data)
    }

    /// An event's JSON, or a whole answer.
    fn piece(&mut self, data: &[u8]) -> Result<(), Nonsense> {
        let piece: Piece = serde_json::from_slice(data).map_err(|_| Nonsense("an event that is no JSON"))?;
        let mut filled = false;
        for choice in piece.choices {
            let parts = choice.delta.or(choice.message).unwrap_or_default();
            let texts = [choice.text, parts.content, parts.reasoning, parts.reasoning_content];
            filled |= texts.into_iter().flatten().any(|Filled(filled)| filled) || parts.tool_calls.is_some();
            self.finished |= choice.finish_reason.is_some();
        }
        self.pieces += u64::from(filled);
        self.usage = piece.usage.or(self.usage);
        if let Some(error) = piece.error {
            let message = error.message.unwrap_or_else(|| "without a message".to_owned());
            self.error = Some(message.chars().filter(|c| !c.is_control()).take(120).collect());
        }
        Ok(())
    }

    /// A whole answer, which is no stream.
    pub(super) fn whole(body: &[u8]) -> Result<Self, Nonsense> {
        let mut heard = Self::default();
        heard.piece(body)?;
        heard.done = true;
        Ok(heard)
    }
}

/// Bytes of a body that is no stream, kept for a while.
pub(super) fn keep(body: &mut Vec<u8>, bytes: &[u8]) -> Result<(), Nonsense> {
    body.extend_from_slice(bytes);
    if body.len() > MAX_EVENT { Err(Nonsense("too long an answer")) } else { Ok(()) }
}

#[derive(Deserialize)]
struct Piece {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Wrong>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<Filled>,
    delta: Option<Parts>,
    message: Option<Parts>,
    finish_reason: Option<IgnoredAny>,
}

#[derive(Default, Deserialize)]
struct Parts {
    content: Option<Filled>,
    reasoning: Option<Filled>,
    reasoning_content: Option<Filled>,
    tool_calls: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Wrong {
    message: Option<String>,
}

/// Whether a text has something in it; the text itself is not made.
struct Filled(bool);

impl<'de> Deserialize<'de> for Filled {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Look;
        impl Visitor<'_> for Look {
            type Value = Filled;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a text")
            }

            fn visit_str<E>(self, text: &str) -> Result<Filled, E> {
                Ok(Filled(!text.is_empty()))
            }
        }
        from.deserialize_str(Look)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n: a comment\n\n\
         data: {\"choices\":[{\"delta\":{\"content\":\"a\\u00fc\"}}]}\r\n\r\n\
         data: {\"choices\":[{\"delta\":{\"reasoning_content\":\"b\"},\"finish_reason\":null}]}\n\n\
         data: {\"choices\":[{\"delta\":{\"tool_calls\":[{\"index\":0}]}}]}\n\n\
         data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n\
         data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":3,\"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\n\
         data: [DONE]\n\n";

    fn heard(pieces: &[&[u8]]) -> Heard {
        let mut events = Events::default();
        pieces.iter().for_each(|piece| events.feed(piece).unwrap());
        events.heard().clone()
    }

    #[test]
    fn however_a_stream_is_torn_it_says_the_same() {
        let whole = heard(&[STREAM.as_bytes()]);
        assert_eq!((whole.pieces, whole.finished, whole.done), (3, true, true));
        let usage = whole.usage.unwrap();
        assert_eq!((usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens()), (5, 3, 4));
        for cut in 0..STREAM.len() {
            let (a, b) = STREAM.as_bytes().split_at(cut);
            assert_eq!(heard(&[a, b]), whole, "cut at {cut}");
        }
        assert_eq!(heard(&STREAM.as_bytes().chunks(1).collect::<Vec<_>>()), whole);
    }

    #[test]
    fn completions_and_whole_answers_are_understood_too() {
        let piece = heard(&[b"data: {\"choices\":[{\"text\":\"x\",\"finish_reason\":\"length\"}]}\n"]);
        assert_eq!((piece.pieces, piece.finished, piece.done), (1, true, false));
        let whole = Heard::whole(br#"{"choices":[{"message":{"content":"x"}}],"usage":{"completion_tokens":9}}"#);
        assert_eq!(whole.unwrap().usage.unwrap().completion_tokens, 9);
    }

    #[test]
    fn errors_in_a_stream_are_heard_and_nonsense_is_refused() {
        let error = heard(&[b"data: {\"error\":{\"message\":\"gone\\u001b[31m\",\"code\":503}}\n\n"]);
        assert_eq!(error.error.as_deref(), Some("gone[31m"));
        for bad in ["data: nonsense\n", "data: {\"choices\":7}\n", "data: [1]\n"] {
            assert!(Events::default().feed(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(Events::default().feed(&vec![b'x'; MAX_EVENT + 1]).is_err());
    }
}
