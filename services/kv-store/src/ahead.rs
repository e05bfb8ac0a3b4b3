//! Slots reserved ahead, see [`crate::store`]: with them a writer of one block after the other needs one call for each.
//!
//! Each has a grant of its own, which its commit revokes as any other's: a block that is visible can't be written.

use std::time::Instant;

use kvasir_transfer::{Access, GrantRange};
use kvasir_types::GrantKey;

use crate::{
    node::{Closed, Committing, Node, Offer},
    store::{Ahead, BlockBytes, Facts, Origin, ReservationId, SlotState},
};

impl Node {
    /// A slot for the block that a writer is about to write, and the key to write it with, if there is room.
    pub(crate) fn reserve_ahead(&self, now: Instant, size: BlockBytes, origin: &Origin) -> Option<(Ahead, GrantKey)> {
        let mut state = self.lock();
        let before = state.store.next_end();
        let origin = state.store.origin(origin);
        let ahead = state.store.reserve_ahead(now, size, origin)?;
        match self.engine.grant(vec![GrantRange { offset: ahead.offset, len: size.0, access: Access::Write }]) {
            Ok(grant) => {
                let key = grant.key();
                state.reservations.insert(ahead.reservation, Some(grant));
                self.wake(before, &state);
                Some((ahead, key))
            }
            Err(error) => {
                tracing::debug!(%error, "no grant for a slot ahead");
                // Nobody ever had a key to it.
                state.store.begin_commit(ahead.reservation).expect("it was opened above");
                state.store.finish_reservation(ahead.reservation, &Default::default());
                None
            }
        }
    }

    /// Closes such a reservation for the commit of the block that is offered, unless another end of it came first. Where the
    /// block is not to be committed, which the state tells, the reservation is to be ended all the same.
    pub(crate) fn close_ahead(&self, id: ReservationId, offer: &Offer<'_>) -> Option<(SlotState, Committing)> {
        let mut state = self.lock();
        let origin = state.store.origin(offer.origin);
        let facts = Facts { origin, ..offer.facts.first().copied().unwrap_or_default() };
        let &hash = offer.hashes.first()?;
        let (slot, written) = state.store.begin_commit_of(id, offer.size, hash, offer.prompt, facts)?;
        let grant = state.reservations.remove(&id).expect("an open reservation has a grant");
        Some((slot, Committing { closed: Closed { id, grant }, written }))
    }
}
