//! The words every part of Kvasir shares: ids, block hashes, the KV layout, fingerprints, deadlines, sampling.
//!
//! Pure values: nothing here does I/O, reads a clock (but for [`Deadline`], which wraps one instant) or allocates more
//! than its argument's size. What crosses a process boundary is converted to these types in `kvasir-proto`, once; from
//! there on a value of one of these types has been checked.

#![forbid(unsafe_code)]

mod deadline;
mod fingerprint;
mod groups;
mod hash;
mod ids;
mod layout;
mod memory;
mod retry;
mod sampling;
mod segment;
mod stage;

pub use deadline::Deadline;
pub use fingerprint::ModelFingerprint;
pub use groups::{GroupKind, KvGroup, KvGroups};
pub use hash::{BlockHash, chain, tenant_salt};
pub use ids::{BadId, BlockId, Epoch, Incarnation, MemberId, RequestId, Role, TokenId};
pub use layout::{BadLayout, KvDtype, KvLayout};
pub use memory::HostMemory;
pub use retry::Retry;
pub use sampling::{FinishReason, Grammar, Priority, Sampled, Sampling, TopLogprob, Usage, choice_seed, mix};
pub use segment::{
    GrantKey, PeerTraffic, RegionInfo, SegmentDescriptor, SegmentId, TransportAddress, TransportKind, Transports,
    UnknownTransport,
};
pub use stage::Stage;

/// Version of everything that crosses a process boundary (gRPC messages, transfer frames, member records). Two
/// processes with different numbers refuse one another before any byte of KV moves.
pub const PROTOCOL_VERSION: u32 = 1;
