//! How a peer's memory is named: what crosses gRPC and the cluster metadata so that bytes can move one-sided.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, de::IgnoredAny};

use crate::Incarnation;

/// Name of a segment: the memory one process offers to its peers. Random, so a restarted process has another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SegmentId(pub u64);

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{:016x}", self.0)
    }
}

/// The right to touch certain ranges of a segment for a while, given out and taken back by the memory's owner.
///
/// The number is random: it is the only thing that opens the ranges, so it must not be guessable by a peer that got
/// another one.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GrantKey(pub u64);

impl fmt::Debug for GrantKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GrantKey(..)") // a key in a log would be a key given away
    }
}

/// A way to reach a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    /// Same process: memcpy.
    Local,
    /// Same host: the owner's memory is mapped, then a copy is a memcpy.
    Shm,
    /// libucp: RDMA, CUDA, memory of the same host that can't be mapped.
    Ucx,
    /// Plain sockets, straight from and into registered memory.
    Tcp,
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for TransportKind {
    type Err = UnknownTransport;

    fn from_str(name: &str) -> Result<Self, UnknownTransport> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| UnknownTransport(name.to_owned()))
    }
}

impl TransportKind {
    /// All of them, in the order in which they are preferred when nothing else decides.
    pub const ALL: [Self; 4] = [Self::Local, Self::Shm, Self::Ucx, Self::Tcp];

    /// Its name, in configurations, records and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Shm => "shm",
            Self::Ucx => "ucx",
            Self::Tcp => "tcp",
        }
    }
}

/// Which transports a process starts and uses: in a configuration, `auto` or a list of names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Choice", into = "Choice")]
pub enum Transports {
    /// Whatever works here, chosen for each peer by what both ends offer: the same process, `local`; the same host, `shm`, or
    /// `ucx` where the memory can't be mapped; RDMA devices at both ends, `ucx`; else `tcp`. One that can't be had here is
    /// left out.
    #[default]
    Auto,
    /// These only, best first: the first one that a peer offers too is taken. One that can't be had here is an error,
    /// not a silent detour.
    Named(Vec<TransportKind>),
}

/// How [`Transports`] is written.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Choice {
    Word(String),
    Named(Vec<TransportKind>),
}

impl TryFrom<Choice> for Transports {
    type Error = UnknownTransport;

    fn try_from(choice: Choice) -> Result<Self, UnknownTransport> {
        match choice {
            Choice::Word(word) if word == "auto" => Ok(Self::Auto),
            Choice::Word(word) => Ok(Self::Named(vec![word.parse()?])),
            Choice::Named(kinds) => Ok(Self::Named(kinds)),
        }
    }
}

impl From<Transports> for Choice {
    fn from(transports: Transports) -> Self {
        match transports {
            Transports::Auto => Self::Word("auto".into()),
            Transports::Named(kinds) => Self::Named(kinds),
        }
    }
}

/// A name that is no transport's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown transport '{0}': auto, local, shm, ucx or tcp")]
pub struct UnknownTransport(pub String);

/// One address at which a segment can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TransportAddress {
    /// Over what.
    pub kind: TransportKind,
    /// In the transport's own form: `host:port` for tcp, the process's token for local.
    pub address: String,
}

/// One stretch of registered memory inside a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RegionInfo {
    /// Offset of its first byte in the segment.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// Whether processes of the same host can map it.
    #[serde(default)]
    pub shared: bool,
}

/// All a peer needs to reach a segment; published with a member's record and sent along in handoffs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SegmentDescriptor {
    /// Its name: of the process that offers it, for people and for lookups. Empty if it has none.
    #[serde(default)]
    pub name: String,
    /// Which segment.
    pub segment: SegmentId,
    /// Which life of its owner; a descriptor of an earlier life is refused by the owner, never used.
    pub incarnation: Incarnation,
    /// Bytes it spans: offsets are 0 to this. Between regions there may be nothing.
    pub len: u64,
    /// The memory registered in it when this was written; more may be registered later. Empty from a peer that doesn't
    /// tell: then all of it is one region that can't be mapped.
    #[serde(default)]
    pub regions: Vec<RegionInfo>,
    /// The ways to it, best first. Ways that this version does not know are left out when a record is read: a newer peer
    /// may offer more.
    #[serde(deserialize_with = "known_transports")]
    pub transports: Vec<TransportAddress>,
}

fn known_transports<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<TransportAddress>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Way {
        Known(TransportAddress),
        Unknown(IgnoredAny),
    }
    let ways = Vec::<Way>::deserialize(deserializer)?;
    let known = ways.into_iter().filter_map(|way| match way {
        Way::Known(address) => Some(address),
        Way::Unknown(_) => None,
    });
    Ok(known.collect())
}

/// What an engine knows of a peer it moves bytes to or from: what crosses gRPC when an operator asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PeerTraffic {
    /// The peer's segment's name.
    pub name: String,
    /// Over what it is reached; `None` if it is a transport that this version doesn't know.
    pub transport: Option<TransportKind>,
    /// Why over that.
    pub reason: String,
    /// Bytes read from it.
    pub read_bytes: u64,
    /// Bytes written to it.
    pub written_bytes: u64,
    /// Batches that completed.
    pub completed: u64,
    /// Batches that failed.
    pub failed: u64,
    /// Bytes of batches that are not over.
    pub in_flight_bytes: u64,
    /// Half of the completed batches took no longer, in microseconds; rounded up to a power of two. 0: unknown.
    pub p50_us: u64,
    /// 99 of 100 took no longer, likewise.
    pub p99_us: u64,
    /// How often in a row the way to it failed.
    pub failures_in_a_row: u32,
    /// For how long it is not tried again, in milliseconds.
    pub resting_ms: u64,
    /// How long the batches that completed took, together, in microseconds.
    pub busy_us: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_of_transports_is_auto_a_name_or_a_list() {
        let read = |text: &str| serde_json::from_str::<Transports>(text);
        assert_eq!(read(r#""auto""#).unwrap(), Transports::Auto);
        assert_eq!(read(r#""tcp""#).unwrap(), Transports::Named(vec![TransportKind::Tcp]));
        let both = Transports::Named(vec![TransportKind::Shm, TransportKind::Tcp]);
        assert_eq!(read(r#"["shm", "tcp"]"#).unwrap(), both);
        assert_eq!(serde_json::to_string(&both).unwrap(), r#"["shm","tcp"]"#);
        assert!(read(r#""warp""#).is_err() && read(r#"["warp"]"#).is_err());
    }

    #[test]
    fn a_newer_peers_transports_are_skipped_and_the_known_ones_kept() {
        let record = r#"{"segment": 1, "incarnation": 2, "len": 3, "transports": [
            {"kind": "warp", "address": "ncc-1701"}, {"kind": "tcp", "address": "127.0.0.1:1"}]}"#;
        let segment: SegmentDescriptor = serde_json::from_str(record).unwrap();
        assert_eq!(segment.transports, [TransportAddress { kind: TransportKind::Tcp, address: "127.0.0.1:1".into() }]);
    }
}
