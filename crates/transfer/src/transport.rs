//! The seam between batches and the ways bytes travel.
//!
//! `local`, `shm`, `ucx` and `tcp` implement it, and one contract test suite runs against all (`tests/transfer/contract.rs`).

use std::sync::Arc;

use kvasir_types::{SegmentDescriptor, TransportAddress, TransportKind};

use crate::batch::Frame;

/// Where frames go: a peer's segment and its addresses of the transport's kind, in the peer's order, at least one of which
/// is reachable.
pub(crate) struct Target {
    pub(crate) descriptor: SegmentDescriptor,
    pub(crate) addresses: Vec<String>,
}

/// A way to move frames between our memory and a peer's.
///
/// What every implementation keeps:
/// - local memory is touched only under [`crate::batch::Frame::touch`];
/// - a peer's operation touches our memory only under [`crate::grant::GrantTable::enter`], or, where we take no part in it,
///   after the peer has opened the grant ([`crate::grant::GrantTable::open_remote`]) and until it is fenced;
/// - every frame is finished once: with `Ok` only if all its bytes are in place (at the owner's side, for a write);
/// - a frame with a [`crate::batch::Frame::notice`] is delivered by [`crate::owner::Owner::deliver`] on the other side;
/// - frames of higher priority go first;
/// - after `shutdown` and the engine's join of its threads, nothing is touched any more.
pub(crate) trait Transport: Send + Sync {
    /// Which one it is.
    fn kind(&self) -> TransportKind;
    /// Where peers reach us over it.
    fn addresses(&self) -> Vec<TransportAddress>;
    /// Whether an address of this kind can be reached from here at all (local: only this process's; shm: only this
    /// host's); if not, why not.
    fn reaches(&self, address: &str) -> Result<(), String>;
    /// Takes over frames, of one batch. Does not block for longer than a small copy; failures go to the frames.
    fn start(&self, frames: Vec<Frame>, target: &Arc<Target>);
    /// Tells its threads to end and stops what they are doing.
    fn shutdown(&self);
}
