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
    /// Plain sockets, straight from and into registered memory.
    Tcp,
    /// libucp: RDMA, CUDA, shared memory.
    Ucx,
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Tcp => "tcp",
            Self::Ucx => "ucx",
        })
    }
}

/// One address at which a segment can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TransportAddress {
    /// Over what.
    pub kind: TransportKind,
    /// In the transport's own form: `host:port` for tcp, the process's token for local.
    pub address: String,
}

/// All a peer needs to reach a segment; published with a member's record and sent along in handoffs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SegmentDescriptor {
    /// Which segment.
    pub segment: SegmentId,
    /// Which life of its owner; a descriptor of an earlier life is refused by the owner, never used.
    pub incarnation: Incarnation,
    /// Bytes it spans: offsets are 0 to this.
    pub len: u64,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_peers_transports_are_skipped_and_the_known_ones_kept() {
        let record = r#"{"segment": 1, "incarnation": 2, "len": 3, "transports": [
            {"kind": "warp", "address": "ncc-1701"}, {"kind": "tcp", "address": "127.0.0.1:1"}]}"#;
        let segment: SegmentDescriptor = serde_json::from_str(record).unwrap();
        assert_eq!(segment.transports, [TransportAddress { kind: TransportKind::Tcp, address: "127.0.0.1:1".into() }]);
    }
}
