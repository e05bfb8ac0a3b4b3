//! The side that owns the memory: what every transport asks before a peer's operation touches a byte.

use std::sync::Arc;

use kvasir_types::{GrantKey, Incarnation, SegmentId};

use crate::{
    counters::Counters,
    error::Refusal,
    grant::GrantTable,
    notice::{Notice, Notices},
    space::Space,
};

/// One engine's segment: its name, its memory and who may touch that. Reached by our listeners' threads and, inside the
/// process, by the local transports of other engines.
pub(crate) struct Owner {
    pub(crate) name: String,
    pub(crate) segment: SegmentId,
    pub(crate) incarnation: Incarnation,
    pub(crate) space: Space,
    pub(crate) grants: Arc<GrantTable>,
    pub(crate) notices: Notices,
    pub(crate) counters: Arc<Counters>,
}

impl Owner {
    /// Takes a peer's notice, if it holds a grant of ours and there is room.
    pub(crate) fn deliver(&self, grant: GrantKey, bytes: &[u8]) -> Result<(), Refusal> {
        let taken = if self.grants.knows(grant) {
            self.notices.push(Notice { grant, bytes: bytes.into() })
        } else {
            Err(Refusal::UnknownGrant)
        };
        if let Err(refusal) = taken {
            self.counters.refused(refusal);
        }
        taken
    }
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
