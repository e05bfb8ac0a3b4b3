//! What can go wrong with a request on a worker, and what the caller is told.

use kvasir_engine::Error as Refused;
use kvasir_proto::{FIELD_METADATA, GRAMMAR_FIELD, LEAVING_METADATA, MAX_TOKENS_FIELD, PROMPT_FIELD};
use kvasir_transfer::Refusal;
use kvasir_types::{KvLayout, ModelFingerprint, Retry, TokenId};
use tonic::{Code, Status, metadata::MetadataValue};

/// Why a request ended without an answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The message itself is unacceptable.
    #[error("unacceptable message")]
    Message(#[from] kvasir_proto::Error),
    /// A request for another model.
    #[error("this worker serves model {ours}, the request is for {theirs}")]
    Model { ours: ModelFingerprint, theirs: ModelFingerprint },
    /// A peer whose blocks look otherwise.
    #[error("the peer's kv layout {theirs:?} is not this worker's {ours:?}")]
    Layout { ours: KvLayout, theirs: KvLayout },
    /// A token the model does not know.
    #[error("token {} at position {position} is outside the vocabulary of {vocab}", token.0)]
    Token { token: TokenId, position: usize, vocab: usize },
    /// Block targets that do not fit the prompt or the destination.
    #[error("block targets: {0}")]
    Targets(String),
    /// The engine did not take it: full, draining, or too long for ever.
    #[error("not admitted")]
    Rejected(#[source] kvasir_engine::Error),
    /// The engine took it and failed.
    #[error("the engine failed")]
    Engine(#[source] kvasir_engine::Error),
    /// The worker is leaving.
    #[error("this worker is draining")]
    Draining,
    /// Nobody waits for the answer any more.
    #[error("the caller is gone")]
    CallerGone,
    /// The deadline passed.
    #[error("the deadline passed")]
    Deadline,
    /// A prefill worker answered with an error or stopped answering.
    #[error("prefill worker {member}")]
    Prefill {
        member: String,
        #[source]
        status: Box<Status>,
    },
    /// A prefill worker broke the protocol.
    #[error("prefill worker {member} broke the protocol: {what}")]
    Protocol { member: String, what: &'static str },
    /// A repeated prefill chose another first token than the one the client has already.
    #[error("the repeated prefill chose token {} where {} had been sent", second.0, first.0)]
    Diverged { first: TokenId, second: TokenId },
    /// A prefill worker stopped in the middle of a copy into this worker's memory, and can't be kept from going on with it.
    #[error("prefill worker {member} stalled while writing into this worker's memory")]
    Unfenced { member: String },
    /// The decode worker took its grant back: it wants this prompt no more.
    #[error("the caller has revoked its grant")]
    Revoked,
    /// Bytes did not move.
    #[error("transfer")]
    Transfer(#[source] kvasir_transfer::Error),
}

impl From<kvasir_transfer::Error> for Error {
    fn from(error: kvasir_transfer::Error) -> Self {
        match error {
            kvasir_transfer::Error::Refused { refusal: Refusal::UnknownGrant, .. } => Self::Revoked,
            error => Self::Transfer(error),
        }
    }
}

impl Error {
    /// Whether it is another worker's word that it is leaving, in good order.
    pub(crate) fn is_leave(&self) -> bool {
        matches!(self, Self::Prefill { status, .. } if status.metadata().contains_key(LEAVING_METADATA))
    }

    /// Whether another worker could do better.
    pub(crate) fn retry(&self) -> Retry {
        match self {
            Self::Message(_)
            | Self::Token { .. }
            | Self::Targets(_)
            | Self::CallerGone
            | Self::Revoked
            | Self::Deadline
            | Self::Diverged { .. } => Retry::Never,
            Self::Rejected(error) | Self::Engine(error) => error.retry(),
            Self::Model { .. }
            | Self::Layout { .. }
            | Self::Draining
            | Self::Prefill { .. }
            | Self::Protocol { .. }
            | Self::Unfenced { .. }
            | Self::Transfer(_) => Retry::Elsewhere,
        }
    }

    /// What the caller sees. The one place where an error of this crate becomes a gRPC status.
    pub(crate) fn to_status(&self) -> Status {
        let code = match self {
            Self::Message(_) | Self::Token { .. } | Self::Targets(_) => Code::InvalidArgument,
            Self::Model { .. } | Self::Layout { .. } => Code::FailedPrecondition,
            // Waiting would not help. The caller may know of a worker with more memory.
            Self::Rejected(Refused::PromptExceedsPool { .. } | Refused::AnswerExceedsPool { .. }) => {
                Code::InvalidArgument
            }
            Self::Rejected(error) => match error.retry() {
                Retry::Never => Code::InvalidArgument,
                Retry::Elsewhere | Retry::After(_) => Code::ResourceExhausted,
            },
            Self::Draining => Code::Unavailable,
            Self::CallerGone | Self::Revoked => Code::Cancelled,
            Self::Deadline => Code::DeadlineExceeded,
            Self::Prefill { .. } | Self::Protocol { .. } | Self::Unfenced { .. } | Self::Transfer(_) => {
                Code::Unavailable
            }
            Self::Engine(_) | Self::Diverged { .. } => Code::Internal,
        };
        // The client sees these as they are, beside the name of the field at fault.
        let (field, message) = match self {
            Self::Rejected(Refused::Grammar(bad)) => (GRAMMAR_FIELD, bad.to_string()),
            Self::Rejected(error @ Refused::AnswerExceedsPool { .. }) => (MAX_TOKENS_FIELD, error.to_string()),
            Self::Rejected(error @ Refused::PromptExceedsPool { .. }) => (PROMPT_FIELD, error.to_string()),
            Self::Draining => {
                let mut status = Status::new(code, self.to_string());
                status.metadata_mut().insert(LEAVING_METADATA, MetadataValue::from_static("1"));
                return status;
            }
            _ => return Status::new(code, kvasir_runtime::chain(self)),
        };
        let mut status = Status::new(code, message);
        status.metadata_mut().insert(FIELD_METADATA, MetadataValue::from_static(field));
        status
    }
}

/// Logs that something went on without the store: once for each failure, not for each request that skips a node because of
/// it.
pub(crate) fn went_without_store(error: &kvasir_store_client::Error, what: &'static str) {
    match error {
        kvasir_store_client::Error::Away { .. } => tracing::debug!(error = kvasir_runtime::chain(error), what),
        error => tracing::warn!(error = kvasir_runtime::chain(error), "{what}"),
    }
}
