//! What the client believes of the store's nodes: how blocks are divided among the members it knows.

use std::sync::{Arc, Mutex, PoisonError};

use kvasir_cluster::View;
use tokio::sync::watch;

use crate::placement::{Odd, Placement};

/// The placement that goes with the newest view. Asked by whatever task makes a request; the lock is held for as long as
/// it takes to make a placement of a view at worst.
pub(crate) struct Views {
    members: watch::Receiver<Arc<View>>,
    known: Mutex<Known>,
}

struct Known {
    /// What the placement was made of.
    view: Arc<View>,
    placement: Arc<Placement>,
    /// What was complained about already.
    odd: Vec<Odd>,
}

impl Views {
    pub(crate) fn new(members: watch::Receiver<Arc<View>>) -> Self {
        let none = Arc::new(View::default());
        let placement = Arc::new(Placement::of(&none));
        Self { members, known: Mutex::new(Known { view: none, placement, odd: Vec::new() }) }
    }

    /// How blocks are divided now, and whether that is news.
    pub(crate) fn placement(&self) -> (Arc<Placement>, bool) {
        let view = self.members.borrow().clone();
        // Nothing below can leave it half changed.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&view, &known.view) {
            return (known.placement.clone(), false);
        }
        known.placement = Arc::new(Placement::of(&view));
        known.view = view;
        let odd = known.placement.odd();
        for Odd { member, key, value, counts } in odd.iter().filter(|odd| !known.odd.contains(odd)) {
            tracing::warn!(%member, key, value, counts, "a store node is set otherwise than most, set it like them");
        }
        known.odd = odd;
        (known.placement.clone(), true)
    }
}
