//! How many requests are under way, and no more than may be: the limit is that of the moment, so it may change at any time.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

/// The door. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Door(Arc<AtomicUsize>);

/// Somebody who was let in; dropped, it is out again.
#[derive(Debug)]
#[must_use]
pub(crate) struct Pass(Arc<AtomicUsize>);

impl Door {
    /// Lets one more in, if there are fewer than that.
    pub(crate) fn enter(&self, limit: usize) -> Option<Pass> {
        let inside = self.0.fetch_update(Relaxed, Relaxed, |inside| (inside < limit).then_some(inside + 1));
        inside.ok().map(|_| Pass(Arc::clone(&self.0)))
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lower_limit_sends_nobody_out_and_lets_nobody_in_until_there_is_room() {
        let door = Door::default();
        let inside: Vec<_> = (0..3).filter_map(|_| door.enter(3)).collect();
        assert!(inside.len() == 3 && door.enter(3).is_none());
        let mut inside = inside.into_iter();
        drop(inside.next());
        assert!(door.enter(2).is_none(), "two are inside still");
        assert!(door.enter(3).is_some(), "and out again");
        drop(inside);
        assert!(door.enter(1).is_some());
    }
}
