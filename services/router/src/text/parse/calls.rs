//! Tool calls in an answer's text, in the notations of the main model families.
//!
//! | notation | looks like |
//! | --- | --- |
//! | Hermes, Qwen | `text <tool_call>{"name": …, "arguments": {…}}</tool_call>`, again and again |
//! | Llama 3 | the whole answer is `{"name": …, "parameters": {…}}`, perhaps after `<\|python_tag\|>`; more after `;` |
//! | Mistral | `text [TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or newer, again and again, `[TOOL_CALLS]name[ARGS]{…}` |
//! | list | the whole answer is `[{"name": …, "parameters": {…}}, …]`: what a required call is constrained to |
//! | named | the whole answer is the arguments of one tool: what a named call is constrained to |
//!
//! What is no call after all is content, as it was written. White space between text and calls belongs to nobody.

use super::{
    Part,
    finder::Finder,
    object::{Object, Status, Step, Walk},
};

const HERMES_OPEN: &str = "<tool_call>";
const HERMES_CLOSE: &str = "</tool_call>";
const MISTRAL: &str = "[TOOL_CALLS]";
const MISTRAL_ID: &str = "[CALL_ID]";
const MISTRAL_ARGUMENTS: &str = "[ARGS]";
const PYTHON: &str = "<|python_tag|>";

/// How calls are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Notation {
    /// That of Hermes and Qwen.
    Hermes,
    /// That of Llama 3; only calls of these tools are calls: any JSON could be one else.
    Llama3(Vec<String>),
    /// That of Mistral, both of them.
    Mistral,
    /// A constrained list.
    List,
    /// The constrained arguments of this tool.
    Named(String),
}

/// Finds the calls of one answer.
#[derive(Clone, Debug)]
pub(crate) struct Calls {
    notation: Notation,
    /// Whether there may be more than one; others are left out.
    parallel: bool,
    state: State,
    /// How many have been told.
    told: usize,
    /// White space that may belong to nobody.
    space: String,
    /// What was read of a call that has not been told yet.
    raw: String,
    /// The call being read has been told.
    open: bool,
}

#[derive(Clone, Debug)]
enum State {
    /// Content, up to the marker of the first or next call.
    Text(Finder),
    /// Content to the end.
    Plain,
    /// Nothing but white space and perhaps a part of a marker since the answer began, or a call ended.
    Between(String),
    /// Right after Mistral's marker.
    Marked,
    /// A call's object; in a list of them or not.
    Object(Box<Object>, bool),
    /// In a list, between calls.
    InList,
    /// Mistral's newer form: the name, up to the arguments.
    Name,
    /// Nothing but arguments.
    Arguments(Walk),
}

impl Calls {
    /// One for a new answer.
    pub(crate) fn new(notation: Notation, parallel: bool) -> Self {
        let state = match notation {
            Notation::Hermes => State::Text(Finder::new(HERMES_OPEN)),
            Notation::Mistral => State::Text(Finder::new(MISTRAL)),
            Notation::Llama3(_) | Notation::List | Notation::Named(_) => State::Between(String::new()),
        };
        Self { notation, parallel, state, told: 0, space: String::new(), raw: String::new(), open: false }
    }

    /// More text.
    pub(super) fn push(&mut self, text: &str, parts: &mut Vec<Part>) {
        for c in text.chars() {
            self.step(c, parts);
        }
    }

    /// The end: what was held back, and what began like a call and was none.
    pub(super) fn finish(&mut self, parts: &mut Vec<Part>) {
        let mut rest = std::mem::take(&mut self.raw);
        match std::mem::replace(&mut self.state, State::Plain) {
            State::Text(mut finder) => finder.finish(&mut rest),
            State::Between(held) => rest.push_str(&held),
            _ => {}
        }
        self.say(&rest, parts);
        // At the end of plain text it is text.
        if self.told == 0 && !self.space.is_empty() {
            content(parts, &std::mem::take(&mut self.space));
        }
    }

    fn step(&mut self, c: char, parts: &mut Vec<Part>) {
        match &mut self.state {
            State::Plain => self.say(c.encode_utf8(&mut [0; 4]), parts),
            State::Text(finder) => {
                let mut out = String::new();
                let found = finder.push(c, &mut out);
                self.say(&out, parts);
                if found && self.notation == Notation::Mistral {
                    self.raw.push_str(MISTRAL);
                    self.state = State::Marked;
                } else if found {
                    self.raw.push_str(HERMES_OPEN);
                    self.state = State::Between(String::new());
                }
            }
            State::Between(_) => self.between(c, parts),
            State::Marked => {
                self.raw.push(c);
                match c {
                    '[' => self.state = State::InList,
                    '{' => self.state = State::Object(Box::default(), false),
                    c if c.is_whitespace() => {}
                    _ => self.state = State::Name,
                }
            }
            State::InList => match c {
                '{' => {
                    self.raw.push(c);
                    self.state = State::Object(Box::default(), true);
                }
                ']' => {
                    self.raw.clear();
                    self.state = self.text();
                }
                c if c == ',' || c.is_whitespace() => self.raw.push(c),
                _ => {
                    self.raw.push(c);
                    self.give_up(parts);
                }
            },
            State::Object(object, in_list) => {
                let (read, in_list) = (object.step(c), *in_list);
                if !self.open {
                    self.raw.push(c);
                }
                if let Some(name) = read.name
                    && !self.tell(name, parts)
                {
                    return self.give_up(parts);
                }
                self.argue(read.arguments, parts);
                match read.status {
                    Status::Open => {}
                    Status::Wrong => self.give_up(parts),
                    Status::Whole => {
                        self.open = false;
                        self.state = if in_list { State::InList } else { State::Between(String::new()) };
                    }
                }
            }
            State::Name if c == '{' => {
                let name = self.raw.trim_start_matches(MISTRAL).trim();
                let name = name.strip_suffix(MISTRAL_ARGUMENTS).unwrap_or(name);
                let name = name.split(MISTRAL_ID).next().unwrap_or(name).trim().to_owned();
                if name.is_empty() {
                    self.raw.push(c);
                    return self.give_up(parts);
                }
                self.tell(name, parts);
                self.state = State::Arguments(Walk::default());
                self.step(c, parts);
            }
            State::Name => self.raw.push(c),
            State::Arguments(walk) => {
                let step = walk.step(c);
                if step != Step::Past {
                    self.argue(c.to_string(), parts);
                }
                if step != Step::Inside {
                    self.open = false;
                    self.state = State::Between(String::new());
                }
            }
        }
    }

    /// What follows a marker, a call, or the beginning of a whole answer.
    fn between(&mut self, c: char, parts: &mut Vec<Part>) {
        let State::Between(held) = &mut self.state else { return };
        held.push(c);
        let read = held.trim_start();
        let opened = !self.raw.is_empty() || matches!(self.notation, Notation::Llama3(_) | Notation::List);
        match (&self.notation, read) {
            (_, "") => return,
            (Notation::Named(name), read) if self.told == 0 => {
                let (name, first) = (name.clone(), read.to_owned());
                self.tell(name, parts);
                self.state = State::Arguments(Walk::default());
                return self.push(&first, parts);
            }
            (Notation::List, "[") if self.told == 0 => {
                self.raw.push_str(held);
                self.state = State::InList;
                return;
            }
            (Notation::Hermes | Notation::Llama3(_), "{") if opened => {
                self.raw.push_str(held);
                self.state = State::Object(Box::default(), false);
                return;
            }
            (Notation::Hermes, HERMES_CLOSE) if self.raw.is_empty() => {
                self.state = self.text();
                return;
            }
            (Notation::Hermes, read) if self.raw.is_empty() && HERMES_CLOSE.starts_with(read) => return,
            (Notation::Llama3(_), PYTHON) => {
                self.raw.push_str(held);
                held.clear();
                return;
            }
            (Notation::Llama3(_), read) if PYTHON.starts_with(read) => return,
            (Notation::Llama3(_), ";" | ",") if self.told > 0 => {
                self.raw.push_str(held);
                held.clear();
                return;
            }
            _ => {}
        }
        // None of it.
        let held = std::mem::take(held);
        if self.raw.is_empty() && self.told > 0 {
            self.state = self.text();
            self.push(&held, parts);
        } else {
            self.raw.push_str(&held);
            self.give_up(parts);
        }
    }

    /// Where content goes on after a call.
    fn text(&self) -> State {
        match self.notation {
            Notation::Hermes => State::Text(Finder::new(HERMES_OPEN)),
            Notation::Mistral => State::Text(Finder::new(MISTRAL)),
            _ => State::Plain,
        }
    }

    /// It was no call: as far as it was not told, it is content.
    fn give_up(&mut self, parts: &mut Vec<Part>) {
        self.open = false;
        let raw = std::mem::take(&mut self.raw);
        self.state = self.text();
        self.say(&raw, parts);
    }

    fn say(&mut self, text: &str, parts: &mut Vec<Part>) {
        if text.is_empty() {
            return;
        }
        let kept = text.trim_end();
        if !kept.is_empty() {
            content(parts, &std::mem::take(&mut self.space));
            content(parts, kept);
        }
        self.space.push_str(&text[kept.len()..]);
    }

    /// A call has a name. False if no such tool can be meant.
    fn tell(&mut self, name: String, parts: &mut Vec<Part>) -> bool {
        if let Notation::Llama3(known) = &self.notation
            && !known.contains(&name)
        {
            return false;
        }
        self.space.clear();
        self.raw.clear();
        self.open = true;
        if self.told == 0 || self.parallel {
            parts.push(Part::Call { index: self.told, name });
        }
        self.told += 1;
        true
    }

    fn argue(&mut self, text: String, parts: &mut Vec<Part>) {
        if text.is_empty() || self.told == 0 {
            return;
        }
        let index = self.told - 1;
        if index > 0 && !self.parallel {
            return;
        }
        match parts.last_mut() {
            Some(Part::Arguments { index: last, text: so_far }) if *last == index => so_far.push_str(&text),
            _ => parts.push(Part::Arguments { index, text }),
        }
    }
}

fn content(parts: &mut Vec<Part>, text: &str) {
    if text.is_empty() {
        return;
    }
    match parts.last_mut() {
        Some(Part::Content(so_far)) => so_far.push_str(text),
        _ => parts.push(Part::Content(text.to_owned())),
    }
}
