//! All text work: templates, tokenizing, detokenizing, stop strings.
//!
//! ```text
//! messages --template--> prompt text --tokenize--> token ids  ══▶ worker
//! worker ══▶ token ids --detok--> text --stop--> visible text, log-probabilities in step
//! ```
//!
//! Nothing in here is async, reads a clock or does I/O (but for [`Model::load`], once at start): the callers decide on
//! which thread it runs. Workers know only token ids; nothing outside this folder knows how text becomes ids.

mod answer;
mod clock;
mod conversation;
mod detok;
mod encoder;
mod error;
mod json;
mod model;
pub(crate) mod parse;
mod pieces;
mod stop;
mod template;
mod vocab;

pub(crate) use answer::{Answer, Hidden, Logged};
pub(crate) use conversation::{Conversation, Function, Message, ToolCall};
pub use encoder::Encoder;
pub(crate) use error::Error;
pub(crate) use model::Model;
pub use pieces::Pieces;
use template::Template;
pub(crate) use vocab::Vocab;

#[cfg(test)]
pub(crate) use model::tests::{demo, demo_folder};
