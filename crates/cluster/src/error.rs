//! What can go wrong with membership, by what it means for the one who asked.

use std::{error::Error as StdError, time::Duration};

use kvasir_types::{Incarnation, MemberId, Retry, Role};

use crate::Scope;

/// Why a registry did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// etcd did not answer in time, or refused.
    #[error("etcd at {endpoints}: no answer to {what}")]
    Unreachable {
        /// All endpoints that were tried.
        endpoints: String,
        /// What was asked of it.
        what: &'static str,
        /// What it said instead.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// etcd answers, and will not do it: for want of a password, or of a right.
    #[error("etcd at {endpoints}: {why}")]
    Refused {
        /// All endpoints.
        endpoints: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// Another living process has this name.
    #[error("{role} {id} is registered by another process (incarnation {holder}): give this one another id")]
    Taken {
        /// Role of the name.
        role: Role,
        /// The name.
        id: MemberId,
        /// Who has it.
        holder: Incarnation,
    },
    /// The member was never registered here, or has been deregistered.
    #[error("{role} {id} is not registered here")]
    NotRegistered {
        /// Role of the name.
        role: Role,
        /// The name.
        id: MemberId,
    },
    /// The member's record is larger than readers accept.
    #[error("record of {role} {id} has {bytes} bytes, at most {limit} are allowed")]
    TooLarge {
        /// Role of the name.
        role: Role,
        /// The name.
        id: MemberId,
        /// How many it has.
        bytes: usize,
        /// How many it may have.
        limit: usize,
    },
    /// What is set was set by somebody else in between.
    #[error("the settings of {scope} were changed in the meantime{}: look at them, and try again", known(by))]
    Changed {
        /// For whom they are.
        scope: Scope,
        /// Who changed them, if that is known.
        by: String,
    },
    /// More is set than readers accept.
    #[error("the settings of {scope} would have {keys} keys and {bytes} bytes, at most 256 and 65536 are allowed")]
    TooManySettings {
        /// For whom they are.
        scope: Scope,
        /// How many keys.
        keys: usize,
        /// How many bytes.
        bytes: usize,
    },
    /// A setting that can't be used.
    #[error("{key}: {reason}")]
    Config {
        /// Which, from `registry.etcd` on.
        key: &'static str,
        /// What is wrong and what is allowed.
        reason: String,
    },
}

impl Error {
    /// Whether the same call may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Unreachable { .. } | Self::Refused { .. } => Retry::After(Duration::from_secs(1)),
            Self::Taken { .. }
            | Self::NotRegistered { .. }
            | Self::TooLarge { .. }
            | Self::Changed { .. }
            | Self::TooManySettings { .. }
            | Self::Config { .. } => Retry::Never,
        }
    }
}

fn known(who: &str) -> String {
    if who.is_empty() { String::new() } else { format!(" by {who}") }
}
