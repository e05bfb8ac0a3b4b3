//! What can go wrong with the store. To a request all of it is a miss; the report tells it for logs and metrics.

use std::time::Duration;

use kvasir_types::{BlockHash, MemberId, Retry};
use tonic::{Code, Status};

/// Why blocks were not read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The node failed to answer a moment ago and is left alone for now.
    #[error("store node {member} did not answer lately, not asked")]
    Away {
        /// Which node.
        member: MemberId,
    },
    /// The node can't be reached, or refused.
    #[error("store node {member} did not serve the call")]
    Call {
        /// Which node.
        member: MemberId,
        /// What it said.
        #[source]
        status: Box<Status>,
    },
    /// The node did not answer in time.
    #[error("store node {member} did not answer within {waited:?}")]
    Timeout {
        /// Which node.
        member: MemberId,
        /// How long it was given.
        waited: Duration,
    },
    /// The node's address is none.
    #[error("store node {member} has an unusable address {address:?}")]
    Address {
        /// Which node.
        member: MemberId,
        /// What its record says.
        address: String,
        /// Why it is unusable.
        #[source]
        source: tonic::transport::Error,
    },
    /// The node's answer means nothing acceptable.
    #[error("store node {member} gave an unacceptable answer")]
    Answer {
        /// Which node.
        member: MemberId,
        /// What is wrong with it.
        #[source]
        source: kvasir_proto::Error,
    },
    /// The node answered for other blocks than it was asked for.
    #[error("store node {member} answered for {got} blocks, asked were {asked}")]
    Count {
        /// Which node.
        member: MemberId,
        /// Blocks asked for.
        asked: usize,
        /// Blocks in the answer.
        got: usize,
    },
    /// The bytes did not move.
    #[error("moving blocks from or to store node {member}")]
    Transfer {
        /// Which node.
        member: MemberId,
        /// Why not.
        #[source]
        source: kvasir_transfer::Error,
    },
    /// The bytes are not those that were stored.
    #[error("block {hash} of store node {member} has other bytes than were stored")]
    Checksum {
        /// Which node.
        member: MemberId,
        /// Which block.
        hash: BlockHash,
    },
    /// Blocks were written, but did not become visible: the reservation had ended, or the bytes arrived otherwise.
    #[error("store node {member} took {committed} of {written} written blocks")]
    NotCommitted {
        /// Which node.
        member: MemberId,
        /// Blocks written.
        written: usize,
        /// Of those, blocks it made visible.
        committed: usize,
    },
    /// An offset outside the own arena.
    #[error("reading the own arena")]
    Local(#[source] kvasir_transfer::Error),
}

impl Error {
    /// Whether trying again may help.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Away { .. } | Self::Timeout { .. } => Retry::After(Duration::from_secs(1)),
            Self::Call { status, .. } => match status.code() {
                Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => Retry::Never,
                _ => Retry::After(Duration::from_secs(1)),
            },
            Self::Transfer { source, .. } => source.retry(),
            Self::Checksum { .. } | Self::NotCommitted { .. } => Retry::Elsewhere,
            Self::Address { .. } | Self::Answer { .. } | Self::Count { .. } | Self::Local(_) => Retry::Never,
        }
    }
}
