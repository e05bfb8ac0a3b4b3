//! Small names that must not be mixed up.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// Index into a model's vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenId(pub u32);

/// Index of a block in one worker's (or store node's) arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

impl BlockId {
    /// Stands in a block table for a block that was given back because no later token looks at it (before a sliding
    /// window). No arena has a block of this number.
    pub const GONE: Self = Self(u32::MAX);
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}", self.0)
    }
}

/// Which life of a process this is: a random number drawn at start. A restarted service keeps its name and changes this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(pub u64);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// As of which change of the cluster's members a view of them is true: larger is later, in whatever process. 0: of none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "e{}", self.0)
    }
}

/// What a member of the cluster does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Speaks HTTP to clients.
    Router,
    /// Computes prompts.
    Prefill,
    /// Writes answers.
    Decode,
    /// Keeps KV blocks across requests.
    KvStore,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Router => "router",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::KvStore => "kv-store",
        })
    }
}

/// A name from outside that is not acceptable, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} must be 1 to {limit} characters of visible ASCII without '/', got {got:?}")]
pub struct BadId {
    what: &'static str,
    limit: usize,
    got: String,
}

fn checked(what: &'static str, limit: usize, text: &str) -> Result<Arc<str>, BadId> {
    let fine = (1..=limit).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
    // The refused text is cut: it may be anything, of any length, and goes into an error message.
    fine.then(|| text.into()).ok_or_else(|| BadId { what, limit, got: text.chars().take(40).collect() })
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $limit:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = BadId;
            fn from_str(text: &str) -> Result<Self, BadId> {
                checked($what, $limit, text).map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadId;
            fn try_from(text: String) -> Result<Self, BadId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

name! {
    /// Name of a member of the cluster, unique among its role while it lives, e.g. `decode-0`.
    MemberId, "a member id", 128
}

name! {
    /// Name of one client request, the same in every process and log line it passes (`x-request-id`).
    RequestId, "a request id", 128
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_outside_are_bounded_and_visible() {
        for bad in ["", "a b", "a/b", "näme", "line\nbreak", &"x".repeat(129)] {
            assert!(bad.parse::<RequestId>().is_err(), "{bad:?}");
        }
        assert_eq!("chatcmpl-1".parse::<RequestId>().unwrap().as_str(), "chatcmpl-1");
        assert!("x".repeat(100_000).parse::<MemberId>().unwrap_err().to_string().len() < 200);
    }
}
