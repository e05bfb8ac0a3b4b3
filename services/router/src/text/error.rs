//! What can go wrong with text.

use std::path::PathBuf;

/// Why a model folder cannot be served, or a prompt cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model folder cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file of the model folder is not what it must be.
    #[error("{}: {why}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, on one line.
        why: String,
    },
    /// The chat template does not compile.
    #[error("the chat template does not compile")]
    Compile(#[source] minijinja::Error),
    /// The model has no chat template.
    #[error("the model has no chat template")]
    NoTemplate,
    /// The template itself refused the messages (`raise_exception`).
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// The template did not finish within its budget of steps.
    #[error("the model's chat template takes too many steps for these messages")]
    TooManySteps,
    /// The template failed on these messages.
    #[error("the model's chat template fails on these messages")]
    Render(#[source] minijinja::Error),
    /// The tokenizer failed on this text.
    #[error("the tokenizer fails on this text: {0}")]
    Tokenize(String),
}
