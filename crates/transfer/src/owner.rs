//! The side that owns the memory: what every transport asks before a peer's operation touches a byte.

use std::sync::Arc;

use kvasir_types::{Incarnation, SegmentId};

use crate::{counters::Counters, grant::GrantTable, memory::Arena};

/// One engine's segment: its name, its bytes and who may touch them. Reached by our listener's threads and, inside the
/// process, by the local transports of other engines.
pub(crate) struct Owner {
    pub(crate) segment: SegmentId,
    pub(crate) incarnation: Incarnation,
    pub(crate) arena: Arc<Arena>,
    pub(crate) grants: Arc<GrantTable>,
    pub(crate) counters: Arc<Counters>,
}

/// A random number from the kernel: grant keys must not be guessable from others.
pub(crate) fn random_u64() -> u64 {
    let mut bytes = [0u8; 8];
    let mut have = 0;
    while have < bytes.len() {
        // SAFETY: the pointer and length name the unfilled rest of a local array.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().add(have).cast(), bytes.len() - have, 0) };
        // Negative only if interrupted before the pool was ready at boot: ask again.
        have += usize::try_from(got).unwrap_or(0);
    }
    u64::from_ne_bytes(bytes)
}
