//! Wire values to domain values and back.
//!
//! From the wire it is `TryFrom` (or a function, where the domain type belongs to std), to the wire it is `From`: what
//! we hold is always expressible, what we are sent is not always acceptable.

use bytes::Bytes;
use kvasir_types as types;
use kvasir_types::{
    BadId, BadLayout, BlockHash, FinishReason, GrantKey, Incarnation, KvDtype, KvLayout, ModelFingerprint,
    PROTOCOL_VERSION, Priority, Sampled, SegmentId, Stage, TokenId, TopLogprob, TransportKind,
};

pub use crate::sampling::{MAX_BIASES, MAX_GRAMMAR_BYTES, MAX_LOGPROBS, MAX_STOP_TOKENS};
use crate::v1;

/// Longest name of a tenant accepted, in bytes.
const MAX_TENANT_BYTES: usize = 64;
/// Longest cache salt accepted, in bytes.
pub const MAX_SALT_BYTES: usize = 256;
/// Most addresses read from one segment descriptor.
const MAX_TRANSPORTS: usize = 16;
/// Most regions in a segment descriptor.
const MAX_REGIONS: usize = 1024;
/// Longest transport address accepted, in bytes.
const MAX_ADDRESS_BYTES: usize = 256;

/// A message that does not mean anything acceptable.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The peer speaks another protocol version.
    #[error("peer speaks protocol version {theirs}, this process speaks {ours}")]
    Version {
        /// The peer's version.
        theirs: u32,
        /// [`PROTOCOL_VERSION`].
        ours: u32,
    },
    /// A field that must be there is not.
    #[error("field {0} is missing")]
    Missing(&'static str),
    /// A byte string of the wrong length.
    #[error("field {field} has {got} bytes, expected {expected}")]
    Length {
        /// Which field.
        field: &'static str,
        /// Bytes received.
        got: usize,
        /// Bytes expected.
        expected: usize,
    },
    /// More values than one message may name.
    #[error("field {field} names {got} values, at most {limit} are allowed")]
    TooMany {
        /// Which field.
        field: &'static str,
        /// Values received.
        got: usize,
        /// Most that are allowed.
        limit: usize,
    },
    /// A value outside its range.
    #[error("field {field} is {got}, allowed is {allowed}")]
    Range {
        /// Which field.
        field: &'static str,
        /// What came.
        got: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// A name that is none.
    #[error(transparent)]
    Id(#[from] BadId),
    /// A layout no arena can have.
    #[error(transparent)]
    Layout(#[from] BadLayout),
}

pub(crate) fn out_of_range(field: &'static str, got: impl ToString, allowed: &'static str) -> Error {
    Error::Range { field, got: got.to_string(), allowed }
}

/// Refuses a peer of another protocol version: called before anything else in a message is read.
pub fn check_protocol(theirs: u32) -> Result<(), Error> {
    if theirs == PROTOCOL_VERSION { Ok(()) } else { Err(Error::Version { theirs, ours: PROTOCOL_VERSION }) }
}

fn sixteen(field: &'static str, bytes: &[u8]) -> Result<[u8; 16], Error> {
    bytes.try_into().map_err(|_| Error::Length { field, got: bytes.len(), expected: 16 })
}

/// A model fingerprint from its wire form.
pub fn fingerprint(bytes: &[u8]) -> Result<ModelFingerprint, Error> {
    sixteen("fingerprint", bytes).map(ModelFingerprint)
}

/// Values of 16 bytes that lie one after the other; `limit` bounds how many, before anything is allocated.
fn packed16(field: &'static str, bytes: &[u8], limit: usize) -> Result<impl Iterator<Item = [u8; 16]>, Error> {
    let (values, rest) = bytes.as_chunks::<16>();
    if !rest.is_empty() {
        return Err(Error::Length { field, got: bytes.len(), expected: values.len() * 16 + 16 });
    }
    if values.len() > limit {
        return Err(Error::TooMany { field, got: values.len(), limit });
    }
    Ok(values.iter().copied())
}

/// Block hashes that lie one after the other, at most `limit`.
pub fn block_hashes(bytes: &[u8], limit: usize) -> Result<Vec<BlockHash>, Error> {
    Ok(packed16("hashes", bytes, limit)?.map(BlockHash).collect())
}

/// Checksums that lie one after the other, at most `limit`.
pub fn checksums(bytes: &[u8], limit: usize) -> Result<Vec<[u8; 16]>, Error> {
    Ok(packed16("checksums", bytes, limit)?.collect())
}

/// The wire form of many values of 16 bytes: one after the other.
pub fn pack16<'a>(values: impl ExactSizeIterator<Item = &'a [u8; 16]>) -> Bytes {
    let mut bytes = Vec::with_capacity(values.len() * 16);
    values.for_each(|value| bytes.extend_from_slice(value));
    bytes.into()
}

/// A tenant's name: bounded, without control characters.
pub fn tenant(text: &str) -> Result<&str, Error> {
    if text.len() > MAX_TENANT_BYTES || text.chars().any(char::is_control) {
        return Err(out_of_range("tenant", format!("{} bytes", text.len()), "at most 64 bytes of printable text"));
    }
    Ok(text)
}

/// A block hash from its wire form.
pub fn block_hash(bytes: &[u8]) -> Result<BlockHash, Error> {
    sixteen("hash", bytes).map(BlockHash)
}

/// A checksum from its wire form.
pub fn checksum(bytes: &[u8]) -> Result<[u8; 16], Error> {
    sixteen("checksum", bytes)
}

/// The wire form of 16 bytes (fingerprints, hashes, checksums).
pub fn bytes16(value: &[u8; 16]) -> Bytes {
    Bytes::copy_from_slice(value)
}

/// A cache salt: bounded, otherwise any text.
pub fn salt(text: &str) -> Result<&str, Error> {
    if text.len() > MAX_SALT_BYTES {
        return Err(out_of_range("cache_salt", format!("{} bytes", text.len()), "at most 256 bytes"));
    }
    Ok(text)
}

/// Tokens from their wire form. Whether they are in the vocabulary is for the one who has the model.
pub fn tokens(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

/// The wire form of tokens.
pub fn token_ids(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|token| token.0).collect()
}

impl From<KvLayout> for v1::KvLayout {
    fn from(layout: KvLayout) -> Self {
        let dtype = match layout.dtype {
            KvDtype::Bf16 => v1::kv_layout::Dtype::Bf16,
            KvDtype::F16 => v1::kv_layout::Dtype::F16,
            KvDtype::F32 => v1::kv_layout::Dtype::F32,
            KvDtype::Fp8 => v1::kv_layout::Dtype::Fp8,
        };
        Self {
            block_size: layout.block_size,
            layers: layout.layers,
            kv_heads: layout.kv_heads,
            head_dim: layout.k_dim,
            v_dim: (layout.v_dim != layout.k_dim).then_some(layout.v_dim),
            dtype: dtype.into(),
        }
    }
}

impl TryFrom<&v1::KvLayout> for KvLayout {
    type Error = Error;
    fn try_from(wire: &v1::KvLayout) -> Result<Self, Error> {
        let dtype = match wire.dtype() {
            v1::kv_layout::Dtype::Bf16 => KvDtype::Bf16,
            v1::kv_layout::Dtype::F16 => KvDtype::F16,
            v1::kv_layout::Dtype::F32 => KvDtype::F32,
            v1::kv_layout::Dtype::Fp8 => KvDtype::Fp8,
            v1::kv_layout::Dtype::Unspecified => {
                return Err(out_of_range("layout.dtype", wire.dtype, "bf16, f16, f32 or fp8"));
            }
        };
        let &v1::KvLayout { block_size, layers, kv_heads, head_dim: k_dim, v_dim, .. } = wire;
        Ok(Self { block_size, layers, kv_heads, k_dim, v_dim: v_dim.unwrap_or(k_dim), dtype }.check()?)
    }
}

impl From<&types::SegmentDescriptor> for v1::SegmentDescriptor {
    fn from(segment: &types::SegmentDescriptor) -> Self {
        let transports = segment
            .transports
            .iter()
            .map(|t| v1::TransportAddress { kind: t.kind.to_string(), address: t.address.clone() })
            .collect();
        let regions = segment
            .regions
            .iter()
            .map(|region| v1::Region { base: region.base, len: region.len, shared: region.shared })
            .collect();
        Self {
            segment: segment.segment.0,
            incarnation: segment.incarnation.0,
            len: segment.len,
            transports,
            regions,
            name: segment.name.clone(),
        }
    }
}

impl TryFrom<&v1::SegmentDescriptor> for types::SegmentDescriptor {
    type Error = Error;
    fn try_from(wire: &v1::SegmentDescriptor) -> Result<Self, Error> {
        if wire.name.len() > MAX_ADDRESS_BYTES {
            return Err(out_of_range("segment.name", wire.name.len(), "at most 256 bytes"));
        }
        if wire.regions.len() > MAX_REGIONS {
            return Err(out_of_range("segment.regions", wire.regions.len(), "at most 1024"));
        }
        if wire.transports.len() > MAX_TRANSPORTS {
            return Err(out_of_range("segment.transports", wire.transports.len(), "at most 16 addresses"));
        }
        let mut transports = Vec::with_capacity(wire.transports.len());
        for transport in &wire.transports {
            if transport.address.len() > MAX_ADDRESS_BYTES {
                return Err(out_of_range("segment.transports.address", transport.address.len(), "at most 256 bytes"));
            }
            let Ok(kind) = transport.kind.parse::<TransportKind>() else {
                continue; // a newer peer may offer ways that this version doesn't know
            };
            transports.push(types::TransportAddress { kind, address: transport.address.clone() });
        }
        Ok(Self {
            segment: SegmentId(wire.segment),
            incarnation: Incarnation(wire.incarnation),
            len: wire.len,
            transports,
            regions: wire
                .regions
                .iter()
                .map(|region| types::RegionInfo { base: region.base, len: region.len, shared: region.shared })
                .collect(),
            name: wire.name.clone(),
        })
    }
}

impl From<&types::PeerTraffic> for v1::TransferPeer {
    fn from(peer: &types::PeerTraffic) -> Self {
        Self {
            name: peer.name.clone(),
            transport: peer.transport.map(|kind| kind.to_string()).unwrap_or_default(),
            reason: peer.reason.clone(),
            read_bytes: peer.read_bytes,
            written_bytes: peer.written_bytes,
            completed: peer.completed,
            failed: peer.failed,
            in_flight_bytes: peer.in_flight_bytes,
            p50_us: peer.p50_us,
            p99_us: peer.p99_us,
            failures_in_a_row: peer.failures_in_a_row,
            resting_ms: peer.resting_ms,
            busy_us: peer.busy_us,
        }
    }
}

impl From<v1::TransferPeer> for types::PeerTraffic {
    // Numbers and texts for people: nothing in it can be out of bounds.
    fn from(wire: v1::TransferPeer) -> Self {
        Self {
            name: wire.name,
            transport: wire.transport.parse().ok(),
            reason: wire.reason,
            read_bytes: wire.read_bytes,
            written_bytes: wire.written_bytes,
            completed: wire.completed,
            failed: wire.failed,
            in_flight_bytes: wire.in_flight_bytes,
            p50_us: wire.p50_us,
            p99_us: wire.p99_us,
            failures_in_a_row: wire.failures_in_a_row,
            resting_ms: wire.resting_ms,
            busy_us: wire.busy_us,
        }
    }
}

/// A grant key from its wire form.
pub fn grant_key(wire: u64) -> GrantKey {
    GrantKey(wire)
}

impl From<Stage> for v1::Stage {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::Serving => Self::Serving,
            Stage::Cordoned => Self::Cordoned,
            Stage::Draining => Self::Draining,
            Stage::Drained => Self::Drained,
        }
    }
}

/// A stage; one that nobody told is that of a worker which knows of none, and serves.
pub fn stage(wire: i32) -> Stage {
    match v1::Stage::try_from(wire) {
        Ok(v1::Stage::Cordoned) => Stage::Cordoned,
        Ok(v1::Stage::Draining) => Stage::Draining,
        Ok(v1::Stage::Drained) => Stage::Drained,
        Ok(v1::Stage::Serving | v1::Stage::Unspecified) | Err(_) => Stage::Serving,
    }
}

impl From<Priority> for v1::Priority {
    fn from(priority: Priority) -> Self {
        match priority {
            Priority::Online => Self::Online,
            Priority::Offline => Self::Offline,
        }
    }
}

/// A priority from its wire form. What a peer does not say, or we do not know, is online: nobody starves by mistake.
pub fn priority(wire: i32) -> Priority {
    match v1::Priority::try_from(wire) {
        Ok(v1::Priority::Offline) => Priority::Offline,
        Ok(v1::Priority::Online | v1::Priority::Unspecified) | Err(_) => Priority::Online,
    }
}

impl From<&Sampled> for v1::Token {
    fn from(sampled: &Sampled) -> Self {
        let top = sampled.top.iter().map(|t| v1::TopLogprob { token: t.token.0, logprob: t.logprob }).collect();
        Self { id: sampled.token.0, logprob: sampled.logprob, top }
    }
}

impl TryFrom<&v1::Token> for Sampled {
    type Error = Error;
    fn try_from(wire: &v1::Token) -> Result<Self, Error> {
        if wire.top.len() > MAX_LOGPROBS as usize {
            return Err(out_of_range("token.top", wire.top.len(), "at most 20 alternatives"));
        }
        let top = wire.top.iter().map(|t| TopLogprob { token: TokenId(t.token), logprob: t.logprob }).collect();
        Ok(Self { token: TokenId(wire.id), logprob: wire.logprob, top })
    }
}

impl From<FinishReason> for v1::finished::Reason {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
        }
    }
}

impl TryFrom<v1::finished::Reason> for FinishReason {
    type Error = Error;
    fn try_from(wire: v1::finished::Reason) -> Result<Self, Error> {
        match wire {
            v1::finished::Reason::Stop => Ok(Self::Stop),
            v1::finished::Reason::Length => Ok(Self::Length),
            v1::finished::Reason::Unspecified => Err(Error::Missing("finished.reason")),
        }
    }
}
