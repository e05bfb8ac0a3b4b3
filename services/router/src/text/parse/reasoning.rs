//! `<think>…</think>` at the beginning of an answer.
//!
//! ```text
//! Begin ──<think>──▶ Inside ──</think>──▶ After ──not blank──▶ Outside
//!   └───anything else, unless the prompt has opened the tag already───────▲
//! ```
//!
//! White space around the tags belongs to nobody. An answer that ends before its closing tag is all reasoning.

use super::finder::Finder;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Who writes the opening tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// The chat template did: the answer begins inside.
    ByPrompt,
    /// The model may.
    Perhaps,
}

/// Splits one answer.
#[derive(Clone, Debug)]
pub(crate) struct Reasoning {
    opened: Opened,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    /// Nothing but white space and perhaps a part of the opening tag so far.
    Begin(String),
    /// White space at the beginning is dropped, and after that kept until something follows it.
    Inside {
        finder: Finder,
        begun: bool,
        space: String,
    },
    After,
    Outside,
}

impl Reasoning {
    /// One for a prompt that ends like this.
    pub(crate) fn after(prompt: &str) -> Self {
        let opened = if prompt.trim_end().ends_with(OPEN) { Opened::ByPrompt } else { Opened::Perhaps };
        Self::new(opened)
    }

    /// One for an answer whose tag is opened so.
    pub(crate) fn new(opened: Opened) -> Self {
        Self { opened, state: State::Begin(String::new()) }
    }

    /// Who writes the opening tag.
    #[cfg(test)]
    pub(super) fn opened(&self) -> Opened {
        self.opened
    }

    /// More text.
    pub(super) fn push(&mut self, text: &str, thought: &mut String, said: &mut String) {
        for (at, c) in text.char_indices() {
            if matches!(self.state, State::Outside) {
                said.push_str(&text[at..]);
                return;
            }
            self.step(c, thought, said);
        }
    }

    fn step(&mut self, c: char, thought: &mut String, said: &mut String) {
        match &mut self.state {
            State::Begin(held) => {
                held.push(c);
                let tag = held.trim_start();
                if tag == OPEN {
                    self.state = inside();
                } else if !OPEN.starts_with(tag) {
                    let held = std::mem::take(held);
                    self.state = match self.opened {
                        Opened::ByPrompt => inside(),
                        Opened::Perhaps => State::Outside,
                    };
                    self.push(&held, thought, said);
                }
            }
            State::Inside { finder, begun, space } => {
                let mut read = String::new();
                let closed = finder.push(c, &mut read);
                think(&read, begun, space, thought);
                if closed {
                    self.state = State::After;
                }
            }
            State::After if c.is_whitespace() => {}
            State::After | State::Outside => {
                self.state = State::Outside;
                said.push(c);
            }
        }
    }

    /// The end: what was held back.
    pub(super) fn finish(&mut self, thought: &mut String, said: &mut String) {
        match &mut self.state {
            State::Begin(held) => match self.opened {
                Opened::ByPrompt => thought.push_str(held.trim()),
                Opened::Perhaps => said.push_str(held),
            },
            State::Inside { finder, begun, space } => {
                let mut read = String::new();
                finder.finish(&mut read);
                think(&read, begun, space, thought);
            }
            State::After | State::Outside => {}
        }
        self.state = State::Outside;
    }
}

fn inside() -> State {
    State::Inside { finder: Finder::new(CLOSE), begun: false, space: String::new() }
}

fn think(read: &str, begun: &mut bool, space: &mut String, thought: &mut String) {
    for c in read.chars() {
        if c.is_whitespace() {
            if *begun {
                space.push(c);
            }
        } else {
            *begun = true;
            thought.push_str(space);
            space.clear();
            thought.push(c);
        }
    }
}
