//! What can go wrong, named by what it means for the one who submitted the batch.

use std::{io, sync::Arc, time::Duration};

use kvasir_types::{Retry, SegmentId, TransportKind};

/// Why the owner of a segment turned an operation down, before a byte of it was touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No grant has this key (any more): normal after a revocation.
    #[error("no such grant, or it was revoked")]
    UnknownGrant,
    /// The range is granted for the other direction.
    #[error("not granted for this direction")]
    Access,
    /// A range is not wholly inside what was granted.
    #[error("outside the granted ranges")]
    Bounds,
    /// A notice found the owner's queue full.
    #[error("the owner takes no more notices at the moment")]
    Full,
}

/// A failed transfer, or an engine that could not be made. Cheap to clone: all ranges of a batch share one.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting no engine can run with.
    #[error("transfer setting {setting}: {reason}")]
    Config {
        /// The field of [`crate::Config`].
        setting: &'static str,
        /// What is wrong with it and what is allowed.
        reason: String,
    },
    /// Memory could not be had from the system.
    #[error("cannot map {bytes} bytes of memory")]
    Memory {
        /// Size asked for.
        bytes: usize,
        /// The system's answer.
        #[source]
        source: Arc<io::Error>,
    },
    /// The tcp listener could not be opened.
    #[error("cannot listen on {address}")]
    Listen {
        /// `Config::tcp_bind`.
        address: std::net::SocketAddr,
        /// The system's answer.
        #[source]
        source: Arc<io::Error>,
    },
    /// The system gave no thread.
    #[error("cannot start thread {name}")]
    Thread {
        /// The thread's name.
        name: &'static str,
        /// The system's answer.
        #[source]
        source: Arc<io::Error>,
    },
    /// A transport was asked for by name that this build or machine lacks.
    #[error("transport {kind} was asked for but cannot be had: {reason}")]
    TransportUnavailable {
        /// Which one.
        kind: TransportKind,
        /// Why not.
        reason: String,
    },
    /// The peer and we have no transport in common.
    #[error("no way to segment {segment}: it offers {offered}, allowed here are {allowed}")]
    NoTransport {
        /// The segment.
        segment: SegmentId,
        /// What its descriptor lists.
        offered: String,
        /// What `Config::transports` lists.
        allowed: String,
    },
    /// A range that lies outside its segment, seen before anything was sent.
    #[error("{len} bytes at {offset:#x} of segment {segment}: outside its {limit} bytes")]
    OutOfBounds {
        /// The segment.
        segment: SegmentId,
        /// Where the range starts.
        offset: u64,
        /// Its length.
        len: u64,
        /// The segment's length.
        limit: u64,
    },
    /// A region registered for reading only.
    #[error("{len} bytes at {offset:#x} of segment {segment} are registered read-only")]
    ReadOnly {
        /// The segment.
        segment: SegmentId,
        /// Where the range starts.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// The owner turned the operation down.
    #[error("segment {segment} refused: {refusal}")]
    Refused {
        /// The segment.
        segment: SegmentId,
        /// Why.
        refusal: Refusal,
    },
    /// The descriptor is of an earlier life of its owner, or of another segment: ask for a new one.
    #[error("segment {segment} is no longer at {peer}: its owner has restarted or left")]
    Stale {
        /// The segment.
        segment: SegmentId,
        /// The address tried.
        peer: String,
    },
    /// The peer speaks another protocol version.
    #[error("{peer} speaks transfer protocol {theirs}, this side {ours}")]
    Version {
        /// The address.
        peer: String,
        /// Our version.
        ours: u32,
        /// Its version.
        theirs: u32,
    },
    /// One side does not trust the other (see [`crate::TlsConfig`]), or only one of them speaks TLS.
    #[error("no trust between this engine and {peer}: {reason}")]
    Untrusted {
        /// The address.
        peer: String,
        /// Who does not accept whom, and why.
        reason: String,
    },
    /// The peer has all the connections it accepts, or too many batches wait here.
    #[error("{who} is busy: {what}")]
    Busy {
        /// The peer's address, or `this engine`.
        who: String,
        /// Which limit was hit.
        what: &'static str,
    },
    /// No connection could be made.
    #[error("cannot connect to {peer}")]
    Unreachable {
        /// The address.
        peer: String,
        /// The system's answer.
        #[source]
        source: Arc<io::Error>,
    },
    /// The peer failed several times in a row and is left alone for a moment.
    #[error("{peer} failed {failures} times in a row; not tried again for {}", humantime(.retry_in))]
    Resting {
        /// Its segment's name, or number.
        peer: String,
        /// How often.
        failures: u32,
        /// When it will be tried again.
        retry_in: Duration,
    },
    /// No segment of this name is known.
    #[error("no segment is named '{name}': {reason}")]
    UnknownSegment {
        /// The name.
        name: String,
        /// What the directory said.
        reason: String,
    },
    /// The connection died under the operation, and so did the retries'.
    #[error("connection to {peer} lost: {reason}")]
    Disconnected {
        /// The address.
        peer: String,
        /// What was seen.
        reason: Arc<str>,
    },
    /// The batch's deadline passed first.
    #[error("deadline passed before the transfer completed")]
    DeadlineExceeded,
    /// [`crate::Transfer::cancel`] was called.
    #[error("transfer cancelled")]
    Cancelled,
    /// This engine was shut down.
    #[error("transfer engine shut down")]
    Shutdown,
    /// Bytes could not be moved between registered memory and a file.
    #[error("cannot move {len} bytes between memory and a file from its offset {at:#x} on")]
    File {
        /// Bytes asked for.
        len: u64,
        /// Where in the file.
        at: u64,
        /// The system's answer.
        #[source]
        source: Arc<io::Error>,
    },
}

/// What [`Error::cause`] says of a batch that failed.
pub(crate) const CAUSES: [&str; 13] = [
    "refused",
    "stale",
    "version",
    "busy",
    "unreachable",
    "disconnected",
    "untrusted",
    "resting",
    "deadline",
    "cancelled",
    "shutdown",
    "no_transport",
    "misuse",
];

impl Error {
    /// What it was, in one word: a metric's label.
    pub fn cause(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "refused",
            Self::Stale { .. } => "stale",
            Self::Version { .. } => "version",
            Self::Busy { .. } => "busy",
            Self::Unreachable { .. } => "unreachable",
            Self::Disconnected { .. } => "disconnected",
            Self::Untrusted { .. } => "untrusted",
            Self::Resting { .. } => "resting",
            Self::DeadlineExceeded => "deadline",
            Self::Cancelled => "cancelled",
            Self::Shutdown => "shutdown",
            Self::NoTransport { .. } | Self::TransportUnavailable { .. } => "no_transport",
            Self::File { .. } => "file",
            Self::Config { .. }
            | Self::Memory { .. }
            | Self::Listen { .. }
            | Self::Thread { .. }
            | Self::OutOfBounds { .. }
            | Self::ReadOnly { .. }
            | Self::UnknownSegment { .. } => "misuse",
        }
    }

    /// Whether trying again may help.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Busy { .. } | Self::Refused { refusal: Refusal::Full, .. } => {
                Retry::After(Duration::from_millis(100))
            }
            Self::Resting { retry_in, .. } => Retry::After(*retry_in),
            Self::UnknownSegment { .. }
            | Self::Stale { .. }
            | Self::Version { .. }
            | Self::Untrusted { .. }
            | Self::NoTransport { .. }
            | Self::Unreachable { .. }
            | Self::Disconnected { .. }
            | Self::Shutdown
            | Self::Refused { refusal: Refusal::UnknownGrant, .. } => Retry::Elsewhere,
            Self::Config { .. }
            | Self::Memory { .. }
            | Self::Listen { .. }
            | Self::Thread { .. }
            | Self::TransportUnavailable { .. }
            | Self::OutOfBounds { .. }
            | Self::ReadOnly { .. }
            | Self::Refused { .. }
            | Self::DeadlineExceeded
            | Self::File { .. }
            | Self::Cancelled => Retry::Never,
        }
    }
}

fn humantime(duration: &Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
