//! Request traces, read a line at a time: every length is checked before anything is kept.
//!
//! Two forms, told apart by a line's first character. Mooncake's: a JSON object with `timestamp` (ms), `input_length`,
//! `output_length` (tokens) and `hash_ids`. The short one: the same four, separated by blanks, the ids with `7-9` for
//! `7 8 9`. Ids are chained: equal ids mean equal prompts up to there.

use std::{
    collections::HashMap,
    io::{self, BufRead, Read},
};

use serde::Deserialize;

/// Longest line: a prompt of 32,768 blocks in JSON.
const MAX_LINE: u64 = 1 << 19;
/// Most blocks of one prompt: 16 million tokens in blocks of 512.
pub const MAX_BLOCKS: usize = 1 << 15;
/// Most requests of a trace.
pub const MAX_REQUESTS: usize = 10_000_000;
/// Most block references of a trace: 400 MB of them.
pub const MAX_REFERENCES: usize = 100_000_000;

/// A trace that can't be used, and where.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("line {line} of the trace can't be read")]
    Read {
        /// From 1 on.
        line: usize,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The line is longer than any request.
    #[error("line {line} of the trace is longer than {MAX_LINE} bytes")]
    LongLine {
        /// From 1 on.
        line: usize,
    },
    /// The line is JSON, but no request.
    #[error("line {line} of the trace is no request")]
    Json {
        /// From 1 on.
        line: usize,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The line is neither JSON nor numbers.
    #[error("line {line} of the trace: {what:?} is no number, and no range of them like 7-9")]
    Number {
        /// From 1 on.
        line: usize,
        /// What is there instead.
        what: String,
    },
    /// The line ends too early.
    #[error("line {line} of the trace has fewer than three numbers")]
    Short {
        /// From 1 on.
        line: usize,
    },
    /// A prompt, or the whole trace, is larger than can be replayed.
    #[error("line {line} of the trace: more than {limit} {what}")]
    TooMany {
        /// From 1 on.
        line: usize,
        /// The most there may be.
        limit: usize,
        /// Of what.
        what: &'static str,
    },
}

/// One request of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Milliseconds from the start.
    pub at_ms: u64,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub answer_tokens: u32,
    /// The prompt's blocks, numbered in the order in which the trace first names them.
    pub blocks: Vec<u32>,
}

/// Requests in the order in which they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// The requests.
    pub requests: Vec<Request>,
    /// How many blocks there are: their numbers are below it.
    pub distinct: u32,
    /// How often any was asked for.
    pub references: usize,
}

#[derive(Deserialize)]
struct Line {
    timestamp: u64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

impl Trace {
    /// Reads a trace in either form; empty lines are left out.
    ///
    /// # Errors
    /// The first line that is no request, or too much of one.
    pub fn read(mut from: impl BufRead) -> Result<Self, Error> {
        let mut builder = Builder::default();
        let mut text = String::new();
        for line in 1.. {
            text.clear();
            let read = from.by_ref().take(MAX_LINE + 1).read_line(&mut text);
            let length = read.map_err(|source| Error::Read { line, source })?;
            if length as u64 > MAX_LINE {
                return Err(Error::LongLine { line });
            }
            if length == 0 {
                break;
            }
            let request = match text.trim() {
                "" => continue,
                json if json.starts_with('{') => {
                    serde_json::from_str(json).map_err(|source| Error::Json { line, source })?
                }
                short => parse_short(short, line)?,
            };
            builder.push(request, line)?;
        }
        Ok(builder.trace)
    }

    /// What a cache without limit would hit, of all blocks asked for.
    pub fn bound(&self) -> f64 {
        1.0 - f64::from(self.distinct) / self.references.max(1) as f64
    }

    /// The trace in the short form.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for Request { at_ms, prompt_tokens, answer_tokens, blocks } in &self.requests {
            text += &format!("{at_ms} {prompt_tokens} {answer_tokens}");
            for run in blocks.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
                match run {
                    [one] => text += &format!(" {one}"),
                    [first, .., last] => text += &format!(" {first}-{last}"),
                    [] => {}
                }
            }
            text.push('\n');
        }
        text
    }
}

fn parse_short(text: &str, line: usize) -> Result<Line, Error> {
    let number = |what: &str| what.parse::<u64>().map_err(|_| Error::Number { line, what: what.to_owned() });
    let small = |what: &str| u32::try_from(number(what)?).map_err(|_| Error::Number { line, what: what.to_owned() });
    let mut parts = text.split_ascii_whitespace();
    let (Some(at), Some(prompt), Some(answer)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(Error::Short { line });
    };
    let mut hash_ids = Vec::new();
    for part in parts {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if last < first {
            return Err(Error::Number { line, what: part.to_owned() });
        }
        if last - first >= MAX_BLOCKS as u64 || hash_ids.len() > MAX_BLOCKS {
            return Err(Error::TooMany { line, limit: MAX_BLOCKS, what: "blocks in a prompt" });
        }
        hash_ids.extend(first..=last);
    }
    Ok(Line { timestamp: number(at)?, input_length: small(prompt)?, output_length: small(answer)?, hash_ids })
}

#[derive(Default)]
struct Builder {
    trace: Trace,
    numbers: HashMap<u64, u32>,
}

impl Builder {
    fn push(&mut self, request: Line, line: usize) -> Result<(), Error> {
        let over = |limit, what| Err(Error::TooMany { line, limit, what });
        let Line { timestamp, input_length, output_length, hash_ids } = request;
        if hash_ids.len() > MAX_BLOCKS {
            return over(MAX_BLOCKS, "blocks in a prompt");
        }
        if self.trace.requests.len() == MAX_REQUESTS {
            return over(MAX_REQUESTS, "requests");
        }
        self.trace.references += hash_ids.len();
        if self.trace.references > MAX_REFERENCES {
            return over(MAX_REFERENCES, "block references");
        }
        let blocks = hash_ids
            .into_iter()
            .map(|id| {
                let next = self.trace.distinct;
                let number = *self.numbers.entry(id).or_insert(next);
                self.trace.distinct = next.max(number + 1);
                number
            })
            .collect();
        let tokens = (input_length, output_length);
        let request = Request { at_ms: timestamp, prompt_tokens: tokens.0, answer_tokens: tokens.1, blocks };
        self.trace.requests.push(request);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_forms_say_the_same() {
        let json = r#"{"timestamp": 5, "input_length": 1500, "output_length": 3, "hash_ids": [40, 41, 42]}
            {"timestamp": 9, "input_length": 900, "output_length": 4, "hash_ids": [40, 7]}"#;
        let short = "5 1500 3 40-42\n\n9 900 4 40 7";
        let trace = Trace::read(json.as_bytes()).unwrap();
        assert_eq!(trace, Trace::read(short.as_bytes()).unwrap());
        assert_eq!((trace.distinct, trace.references), (4, 5));
        assert_eq!(trace.requests[1].blocks, [0, 3]);
    }

    #[test]
    fn a_line_that_is_no_request_is_named() {
        let error = |text: &str| Trace::read(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(error("1 2 3 4\n{\"timestamp\": 5}"), "line 2 of the trace is no request");
        assert_eq!(error("1 2"), "line 1 of the trace has fewer than three numbers");
        assert!(error("1 2 3 9-4").contains("\"9-4\" is no number"));
        assert!(error("1 2 3 0-40000").contains("more than 32768 blocks"));
        assert!(error("1 2 3 0-30000 0-30000 0-30000").contains("more than 32768 blocks"));
        assert!(error("1 99999999999 3").contains("is no number"));
        assert!(error(&" ".repeat(600_000)).contains("longer than"));
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_was_read(prompts in prop::collection::vec(prop::collection::vec(0u64..50, 0..20), 0..20)) {
            let mut builder = Builder::default();
            for (n, hash_ids) in prompts.into_iter().enumerate() {
                builder.push(Line { timestamp: n as u64, input_length: 1, output_length: 2, hash_ids }, n).unwrap();
            }
            prop_assert_eq!(&Trace::read(builder.trace.to_text().as_bytes()).unwrap(), &builder.trace);
        }

        #[test]
        fn no_line_makes_it_panic(text in "[-0-9 {}a\\[\\]\":,\n]{0,80}") {
            let _ = Trace::read(text.as_bytes());
        }
    }
}
