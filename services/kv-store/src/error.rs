//! Why a call is refused, and what the caller is told.

use kvasir_types::Retry;
use tonic::{Code, Status};

use crate::store::Refused;

/// A call that was not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The message itself is unacceptable.
    #[error("unacceptable message")]
    Message(#[from] kvasir_proto::Error),
    /// Blocks that no message can carry.
    #[error("blocks of {bytes} bytes are not sent in messages, the limit is {limit}")]
    TooLarge { bytes: u64, limit: u64 },
    /// As many values as blocks are needed, or none.
    #[error("field {field} has {got} values for {blocks} blocks")]
    Count { field: &'static str, got: usize, blocks: usize },
    /// Too much is open already.
    #[error("busy")]
    Refused(#[from] Refused),
    /// No grant could be opened.
    #[error("opening a grant failed")]
    Grant(#[source] kvasir_transfer::Error),
    /// Others could not be told.
    #[error("telling the others failed")]
    Registry(#[source] kvasir_cluster::Error),
    /// The task that served the call is gone: the node is leaving.
    #[error("this node is leaving")]
    Leaving,
}

impl Error {
    /// Whether trying again may help.
    pub(crate) fn retry(&self) -> Retry {
        match self {
            Self::Message(_) | Self::Count { .. } | Self::TooLarge { .. } => Retry::Never,
            Self::Refused(_) => Retry::After(std::time::Duration::from_millis(100)),
            Self::Registry(error) => error.retry(),
            Self::Grant(_) | Self::Leaving => Retry::Elsewhere,
        }
    }
}

/// The one place where an error becomes a gRPC status.
impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Message(kvasir_proto::Error::Version { .. }) => Code::FailedPrecondition,
            Error::Message(_) | Error::Count { .. } | Error::TooLarge { .. } => Code::InvalidArgument,
            Error::Refused(_) => Code::ResourceExhausted,
            Error::Grant(_) | Error::Registry(_) | Error::Leaving => Code::Unavailable,
        };
        tracing::debug!(error = kvasir_runtime::chain(&error), retry = ?error.retry(), "refused");
        Status::new(code, kvasir_runtime::chain(&error))
    }
}
