//! The seam between batches and the ways bytes travel.
//!
//! `local` and `tcp` implement it, and one contract test suite runs against both (`tests/transfer/contract.rs`). `ucx` will
//! be the third: its place is a module beside `tcp` that uses `kvasir-ucx-sys`, publishes its worker address in
//! [`Transport::address`], maps `Op` to put and get, and fences by closing the endpoint and destroying the remote key.
//! Until then [`TransportKind::Ucx`] in a newer peer's descriptor is passed over, and asking for it here is an error.

use std::sync::Arc;

use kvasir_types::{SegmentDescriptor, TransportAddress, TransportKind};

use crate::batch::BatchState;

/// A way to move frames between our arena and a peer's.
///
/// What every implementation keeps:
/// - local memory is touched only under [`crate::batch::Frame::touch`], a peer's operation on our memory only under
///   [`crate::grant::GrantTable::enter`];
/// - every frame is finished once: with `Ok` only if all its bytes are in place (at the owner's side, for a write);
/// - after `shutdown` and the engine's join of its threads, nothing is touched any more.
pub(crate) trait Transport: Send + Sync {
    /// Which one it is.
    fn kind(&self) -> TransportKind;
    /// Where peers reach us over it.
    fn address(&self) -> TransportAddress;
    /// Whether an address of this kind can be reached from here at all (the local transport: only this process's).
    fn reaches(&self, address: &str) -> bool;
    /// Takes over the batch's frames. Does not block; failures go to the frames.
    fn start(&self, batch: &Arc<BatchState>, target: &SegmentDescriptor, address: &str);
    /// Tells its threads to end and stops what they are doing.
    fn shutdown(&self);
}
