//! An answer's text taken apart: what was thought, what was said, which tools were called.
//!
//! ```text
//! text ─▶ reasoning (<think> … </think>) ─▶ calls (in the model's own notation) ─▶ parts
//! ```
//!
//! Pure state machines over text that comes in pieces. The law of all of them: how the text was cut into pieces makes no
//! difference to the parts, put together; and no part of a marker is ever given out as content before it is known to be
//! none.

mod calls;
mod dialect;
mod finder;
mod object;
mod reasoning;

pub(crate) use calls::{Calls, Notation};
pub(crate) use dialect::{CallNotation, Dialect, MARKERS};
#[cfg(test)]
pub(crate) use reasoning::Opened;
pub(crate) use reasoning::Reasoning;

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Part {
    /// Thought, before it was said.
    Reasoning(String),
    /// Said.
    Content(String),
    /// A tool is called: the `index`th call of the answer.
    Call {
        /// Which call.
        index: usize,
        /// Which tool.
        name: String,
    },
    /// More of a call's arguments, which together are the text of a JSON object.
    Arguments {
        /// Which call.
        index: usize,
        /// The text.
        text: String,
    },
}

/// Takes one answer apart.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parser {
    reasoning: Option<Reasoning>,
    calls: Option<Calls>,
}

impl Parser {
    /// One that looks for these; with neither, everything is content.
    pub(crate) fn new(reasoning: Option<Reasoning>, calls: Option<Calls>) -> Self {
        Self { reasoning, calls }
    }

    /// Whether it would change anything.
    pub(crate) fn is_idle(&self) -> bool {
        self.reasoning.is_none() && self.calls.is_none()
    }

    /// More text.
    pub(crate) fn push(&mut self, text: &str, parts: &mut Vec<Part>) {
        match &mut self.reasoning {
            None => self.said(text, parts),
            Some(reasoning) => {
                let mut said = String::new();
                let mut thought = String::new();
                reasoning.push(text, &mut thought, &mut said);
                add_text(parts, thought, Part::Reasoning);
                self.said(&said, parts);
            }
        }
    }

    /// The end: what was held back.
    pub(crate) fn finish(&mut self, parts: &mut Vec<Part>) {
        if let Some(reasoning) = &mut self.reasoning {
            let (mut thought, mut said) = (String::new(), String::new());
            reasoning.finish(&mut thought, &mut said);
            add_text(parts, thought, Part::Reasoning);
            self.said(&said, parts);
        }
        if let Some(calls) = &mut self.calls {
            calls.finish(parts);
        }
    }

    fn said(&mut self, text: &str, parts: &mut Vec<Part>) {
        match &mut self.calls {
            None => add_text(parts, text.to_owned(), Part::Content),
            Some(calls) => calls.push(text, parts),
        }
    }
}

fn add_text(parts: &mut Vec<Part>, text: String, part: fn(String) -> Part) {
    if !text.is_empty() {
        parts.push(part(text));
    }
}

#[cfg(test)]
mod tests;
