//! What is asked: requests made up, read from a file of prompts, or read from a trace. One at a time; however long a file is,
//! a line of it is all that is kept.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read as _, Seek as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    args::{Api, BenchArgs, Span},
    arrivals::Random,
};

/// Longest line of a file.
const MAX_LINE: u64 = 8 << 20;
/// Most ids of a trace's request.
const MAX_IDS: usize = 1 << 15;
/// Token ids below this are left alone: models keep those that mean something special there.
const FIRST_ID: u32 = 256;

/// Words that most tokenizers know as one token each, with a blank before them.
const WORDS: &str = "time year people way day man thing woman life child world school state family student group country \
    problem hand part place case week company system program question work government number night point home water room \
    mother area money story fact month lot right study book eye job word business issue side kind head house service friend \
    father power hour game line end member law car city community name president team minute idea body information back \
    parent face others level office door health person art war history party result change morning reason research girl guy \
    moment air teacher force education foot boy age policy music market sense nation plan college interest death course \
    experience effect use class control field development role effort rate heart drug show leader light voice wife police \
    mind price report decision son view relationship town road arm difference value building action season society tax \
    director position player record paper space ground form event official matter center couple site project activity star \
    table need court oil situation cost industry figure street image phone data picture practice piece land product doctor \
    wall worker news test movie north love support technology";

/// A request before it is one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ask {
    /// When it is due, if its source says so.
    pub(super) at: Option<Duration>,
    /// The body's JSON.
    pub(super) body: Vec<u8>,
}

/// A source of requests.
pub(super) struct Work {
    source: Source,
    form: Form,
}

enum Source {
    Made { random: Random, prompt: Span, shared: String, shared_length: u32, ids: Option<u32> },
    Dataset(Lines),
    Trace { lines: Lines, seed: u64, speed: f64, block: u32, cut_prompt: u32, cut_output: u32 },
}

/// How a prompt becomes a body.
struct Form {
    api: Api,
    /// What comes after the prompt and the answer's length in every body.
    rest: String,
    output: Span,
    random: Random,
    words: Vec<&'static str>,
}

impl Work {
    /// As the arguments say, for that model.
    pub(super) fn open(args: &BenchArgs, model: &str) -> anyhow::Result<Self> {
        let made = args.dataset.is_none();
        let mut rest = json!({ "model": model, "temperature": 0 });
        if !args.no_stream {
            rest["stream"] = json!(true);
            rest["stream_options"] = json!({ "include_usage": true });
        }
        if made && !args.may_stop {
            rest["ignore_eos"] = json!(true);
        }
        let rest = rest.to_string().trim_start_matches('{').to_owned();
        let words: Vec<&str> = WORDS.split_whitespace().collect();
        let form = Form { api: args.api, rest, output: args.output_tokens, random: Random::new(!args.seed), words };
        ensure!(
            args.ids.is_none() || (made && args.trace.is_none() && args.api == Api::Completions),
            "--ids: only for made-up prompts and --api completions: chats are texts"
        );
        let source = match (&args.dataset, &args.trace) {
            (Some(path), _) => Source::Dataset(Lines::open(path)?),
            (None, Some(path)) => Source::Trace {
                lines: Lines::open(path)?,
                seed: args.seed,
                speed: args.speed,
                block: args.block_tokens,
                cut_prompt: args.cut_prompt.unwrap_or(u32::MAX),
                cut_output: args.cut_output.unwrap_or(u32::MAX),
            },
            (None, None) => {
                let mut random = Random::new(args.seed);
                let shared = form.content(&mut random, args.shared_prefix, args.ids);
                Source::Made {
                    random,
                    prompt: args.prompt_tokens,
                    shared,
                    shared_length: args.shared_prefix,
                    ids: args.ids,
                }
            }
        };
        Ok(Self { source, form })
    }

    /// How often a dataset was gone through, from the second time on: its prompts are known by then.
    pub(super) fn rounds(&self) -> u64 {
        match &self.source {
            Source::Dataset(lines) => lines.rounds,
            Source::Made { .. } | Source::Trace { .. } => 0,
        }
    }

    /// The next request; none at a trace's end.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<Ask>> {
        let form = &mut self.form;
        match &mut self.source {
            Source::Made { random, prompt, shared, shared_length, ids } => {
                let ids = *ids;
                let length = random.between(prompt.low, prompt.high).saturating_sub(*shared_length).max(1);
                let own = form.content(random, length, ids);
                let separator = match (shared.is_empty(), ids) {
                    (true, _) => "",
                    (false, None) => " ",
                    (false, Some(_)) => ",",
                };
                let content = format!("{shared}{separator}{own}");
                let prompt = if ids.is_some() { format!("[{content}]") } else { format!("\"{content}\"") };
                let output = form.output();
                Ok(Some(Ask { at: None, body: form.body(&prompt, output) }))
            }
            Source::Dataset(lines) => {
                let line = lines.next(true)?.context("no end")?;
                let said = format!("{}: line {}", lines.path.display(), lines.number);
                let body = form.of_line(&line).with_context(|| said)?;
                Ok(Some(Ask { at: None, body }))
            }
            Source::Trace { lines, seed, speed, block, cut_prompt, cut_output } => {
                let Some(line) = lines.next(false)? else { return Ok(None) };
                let said = || format!("{}: line {}", lines.path.display(), lines.number);
                let recorded: Recorded = serde_json::from_str(&line).with_context(said)?;
                ensure!(recorded.hash_ids.len() <= MAX_IDS, "{}: over {MAX_IDS} ids", said());
                let prompt = form.recorded(&recorded, *seed, *block, *cut_prompt);
                let output = recorded.output_length.clamp(1, (*cut_output).max(1));
                let at = Duration::from_secs_f64(recorded.timestamp as f64 / 1e3 / *speed);
                Ok(Some(Ask { at: Some(at), body: form.body(&format!("\"{prompt}\""), output) }))
            }
        }
    }
}

impl Form {
    fn output(&mut self) -> u32 {
        self.random.between(self.output.low, self.output.high)
    }

    /// Words, or ids with commas; both need no escaping in JSON.
    fn content(&self, random: &mut Random, length: u32, ids: Option<u32>) -> String {
        use std::fmt::Write as _;
        let mut text = String::with_capacity(length as usize * 7);
        for at in 0..length {
            if at > 0 {
                text.push(if ids.is_some() { ',' } else { ' ' });
            }
            match ids {
                Some(below) => _ = write!(text, "{}", random.between(FIRST_ID, below - 1)),
                None => text.push_str(self.words[random.next() as usize % self.words.len()]),
            }
        }
        text
    }

    /// A body around a prompt that is JSON already.
    fn body(&self, prompt: &str, output: u32) -> Vec<u8> {
        let rest = &self.rest;
        match self.api {
            Api::Chat => {
                format!("{{\"messages\":[{{\"role\":\"user\",\"content\":{prompt}}}],\"max_tokens\":{output},{rest}")
            }
            Api::Completions => format!("{{\"prompt\":{prompt},\"max_tokens\":{output},{rest}"),
        }
        .into_bytes()
    }

    /// Words that follow from the trace's ids: prompts that share a beginning there share one here.
    fn recorded(&self, recorded: &Recorded, seed: u64, block: u32, cut: u32) -> String {
        let mut left = recorded.input_length.clamp(1, cut.max(1));
        let mut prompt = String::new();
        let mut add = |number: u64, length: u32| {
            if length > 0 && !prompt.is_empty() {
                prompt.push(' ');
            }
            prompt += &self.content(&mut Random::new(number), length, None);
        };
        for id in &recorded.hash_ids {
            let length = left.min(block);
            add(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ id, length);
            left -= length;
        }
        // What goes on after the ids is nobody else's.
        add(!seed ^ recorded.timestamp.rotate_left(32), left);
        prompt
    }

    /// A line of a dataset.
    fn of_line(&mut self, line: &str) -> anyhow::Result<Vec<u8>> {
        if !line.trim_start().starts_with('{') {
            let output = self.output();
            return Ok(self.body(&Value::from(line.trim_end()).to_string(), output));
        }
        let given: Given = serde_json::from_str(line)?;
        let output = given.max_tokens.or(given.output_tokens).map_or_else(|| self.output(), |tokens| tokens.max(1));
        let first = || {
            let turns = given.conversations.as_deref()?;
            turns.iter().find(|turn| turn.from == "human" || turn.from == "user").map(|turn| turn.value.clone())
        };
        match (given.messages, given.prompt.or(given.question).or_else(first)) {
            (Some(messages), _) if self.api == Api::Chat && messages.is_array() => {
                Ok(format!("{{\"messages\":{messages},\"max_tokens\":{output},{}", self.rest).into_bytes())
            }
            (Some(_), None) => bail!("messages, and --api completions takes only prompts"),
            (_, Some(prompt)) => Ok(self.body(&Value::from(prompt).to_string(), output)),
            (None, None) => bail!("neither prompt, messages nor conversations"),
        }
    }
}

#[derive(Deserialize)]
struct Recorded {
    timestamp: u64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

#[derive(Deserialize)]
struct Given {
    prompt: Option<String>,
    question: Option<String>,
    messages: Option<Value>,
    conversations: Option<Vec<Turn>>,
    max_tokens: Option<u32>,
    output_tokens: Option<u32>,
}

#[derive(Deserialize)]
struct Turn {
    from: String,
    value: String,
}

/// The lines of a file that are not empty.
struct Lines {
    path: PathBuf,
    file: BufReader<File>,
    number: u64,
    /// How often it was begun again.
    rounds: u64,
    found: bool,
}

impl Lines {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        Ok(Self { path: path.to_owned(), file: BufReader::new(file), number: 0, rounds: 0, found: false })
    }

    /// The next one; at the end none, or the first one again.
    fn next(&mut self, again: bool) -> anyhow::Result<Option<String>> {
        let named = |line: u64, path: &Path| format!("{}: line {line}", path.display());
        loop {
            let mut line = String::new();
            let read = self.file.by_ref().take(MAX_LINE + 1).read_line(&mut line);
            let length = read.with_context(|| named(self.number + 1, &self.path))?;
            ensure!(
                length as u64 <= MAX_LINE,
                "{} is longer than {MAX_LINE} bytes",
                named(self.number + 1, &self.path)
            );
            if length == 0 {
                if !again {
                    return Ok(None);
                }
                ensure!(self.found, "{}: nothing in it", self.path.display());
                self.file.rewind()?;
                (self.number, self.rounds) = (0, self.rounds + 1);
                continue;
            }
            self.number += 1;
            if !line.trim().is_empty() {
                self.found = true;
                return Ok(Some(line));
            }
        }
    }
}

#[cfg(test)]
#[path = "work_tests.rs"]
mod tests;
