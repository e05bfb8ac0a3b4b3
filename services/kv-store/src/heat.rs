//! Which placement groups are asked for so often that one node should not be all there is of them. Pure.
//!
//! ```text
//!             hot_lookups_per_s or more                 copied
//!   as any ─────────────────────────────▶ to be copied ────────▶ copied: the copies are told to readers
//!     ▲                                                               │ less than half of it, all copies together
//!     └───────────────────────────────────────────────────────────────┘  (the copies age out of the others' memory)
//! ```
//!
//! Readers spread over the copies, so a home sees only its part of the lookups; it counts for all of them.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// Lookups are forgotten with this time constant.
const MEMORY: Duration = Duration::from_secs(10);
/// Most groups that are watched; the coldest are forgotten first.
const MAX_GROUPS: usize = 16_384;

/// How often one group is asked for.
#[derive(Clone, Copy, Debug)]
struct Warmth {
    /// Lookups not yet forgotten, those at other copies included.
    lookups: f64,
    at: Instant,
    /// How many nodes have it, this one included.
    copies: usize,
    /// Somebody is making it so many.
    copying: bool,
}

impl Warmth {
    fn now(&self, now: Instant) -> f64 {
        self.lookups * (-now.saturating_duration_since(self.at).as_secs_f64() / MEMORY.as_secs_f64()).exp()
    }
}

/// The groups that were asked for lately.
#[derive(Debug)]
pub(crate) struct Heat {
    /// Lookups of one group in a second from which on it is hot.
    hot: f64,
    /// Most copies of a hot group.
    max_copies: usize,
    groups: HashMap<u64, Warmth>,
}

/// What a lookup of a group means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Nothing in particular.
    Usual,
    /// Readers may go to so many nodes.
    Copied(usize),
    /// It is to be copied to so many nodes; said once, until [`Heat::copied`] is called.
    Copy(usize),
}

impl Heat {
    /// Groups get up to `max_copies` copies from `hot` lookups in a second on; 0: never.
    pub(crate) fn new(hot: f64, max_copies: usize) -> Self {
        Self { hot, max_copies, groups: HashMap::new() }
    }

    /// The same from now on; what has copies keeps them until it cools down.
    pub(crate) fn set(&mut self, hot: f64, max_copies: usize) {
        (self.hot, self.max_copies) = (hot, max_copies);
    }

    /// The group was asked for.
    pub(crate) fn count(&mut self, group: u64, now: Instant) -> Seen {
        if self.hot <= 0.0 || self.max_copies <= 1 {
            return Seen::Usual;
        }
        if self.groups.len() >= MAX_GROUPS && !self.groups.contains_key(&group) {
            self.forget(now);
        }
        let warmth = self.groups.entry(group).or_insert(Warmth { lookups: 0.0, at: now, copies: 1, copying: false });
        warmth.lookups = warmth.now(now) + warmth.copies as f64;
        warmth.at = now;
        let rate = warmth.lookups / MEMORY.as_secs_f64();
        if warmth.copies > 1 && rate < self.hot / 2.0 {
            warmth.copies = 1;
        }
        // Another node for each time that it is too much for those there are.
        let wanted = (1.0 + rate / self.hot).min(self.max_copies as f64) as usize;
        if wanted > warmth.copies && !warmth.copying {
            warmth.copying = true;
            return Seen::Copy(wanted);
        }
        if warmth.copies > 1 { Seen::Copied(warmth.copies) } else { Seen::Usual }
    }

    /// Copying a group has ended: so many nodes have it now.
    pub(crate) fn copied(&mut self, group: u64, copies: usize) {
        if let Some(warmth) = self.groups.get_mut(&group) {
            warmth.copying = false;
            warmth.copies = copies.max(1);
        }
    }

    /// The group will not be copied now.
    pub(crate) fn not_copied(&mut self, group: u64) {
        if let Some(warmth) = self.groups.get_mut(&group) {
            warmth.copying = false;
        }
    }

    /// How many groups have copies because they are hot.
    pub(crate) fn hot_groups(&self) -> usize {
        self.groups.values().filter(|warmth| warmth.copies > 1).count()
    }

    /// Forgets the colder half.
    fn forget(&mut self, now: Instant) {
        let mut rates: Vec<f64> = self.groups.values().map(|warmth| warmth.now(now)).collect();
        let middle = rates.len() / 2;
        let (_, &mut middle, _) = rates.select_nth_unstable_by(middle, f64::total_cmp);
        self.groups.retain(|_, warmth| warmth.copying || warmth.now(now) > middle);
        if self.groups.len() >= MAX_GROUPS {
            self.groups.retain(|_, warmth| warmth.copying);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOT: f64 = 10.0;

    /// So many lookups of a group in each of some seconds; the last thing that was said, and the time after them.
    fn ask(heat: &mut Heat, group: u64, per_second: u32, seconds: u32, start: Instant) -> (Vec<Seen>, Instant) {
        let step = Duration::from_secs(1) / per_second;
        let lookups = per_second * seconds;
        ((1..=lookups).map(|n| heat.count(group, start + step * n)).collect(), start + step * lookups)
    }

    #[test]
    fn a_hot_group_is_copied_once_told_to_readers_and_forgotten_when_it_cools() {
        let (mut heat, start) = (Heat::new(HOT, 3), Instant::now());
        let (seen, now) = ask(&mut heat, 1, 5, 60, start);
        assert!(seen.iter().all(|&seen| seen == Seen::Usual), "half of what is hot");
        let (seen, now) = ask(&mut heat, 1, 15, 60, now);
        assert_eq!(seen.iter().filter(|&&seen| seen == Seen::Copy(2)).count(), 1, "said once");
        heat.copied(1, 2);
        // Readers now go to two nodes: this one sees half, and it stays hot.
        let (seen, now) = ask(&mut heat, 1, 7, 60, now);
        assert!(seen.iter().all(|&seen| seen == Seen::Copied(2)), "{seen:?}");
        assert_eq!(heat.hot_groups(), 1);
        let (seen, _) = ask(&mut heat, 1, 1, 60, now);
        assert_eq!((seen.last(), heat.hot_groups()), (Some(&Seen::Usual), 0));
    }

    #[test]
    fn more_heat_makes_more_copies_up_to_the_limit() {
        let (mut heat, start) = (Heat::new(HOT, 4), Instant::now());
        let (seen, now) = ask(&mut heat, 1, 1000, 10, start);
        assert!(seen.contains(&Seen::Copy(2)));
        heat.copied(1, 2);
        let (seen, _) = ask(&mut heat, 1, 500, 1, now);
        assert!(seen.contains(&Seen::Copy(4)), "{seen:?}");
    }

    #[test]
    fn a_copy_that_failed_is_tried_again() {
        let (mut heat, start) = (Heat::new(HOT, 2), Instant::now());
        let (_, now) = ask(&mut heat, 1, 100, 10, start);
        heat.copied(1, 1);
        assert_eq!(heat.count(1, now), Seen::Copy(2));
    }

    #[test]
    fn off_means_off_and_memory_is_bounded() {
        let (mut off, mut on, now) = (Heat::new(0.0, 3), Heat::new(HOT, 3), Instant::now());
        let (seen, _) = ask(&mut off, 1, 1000, 3, now);
        assert!(seen.iter().all(|&seen| seen == Seen::Usual) && off.groups.is_empty());
        for group in 0..100_000 {
            on.count(group, now);
            assert!(on.groups.len() <= MAX_GROUPS);
        }
        // What is warmer than the rest survives a flood.
        let (_, now) = ask(&mut on, 7, 5, 10, now);
        (200_000..200_000 + 2 * MAX_GROUPS as u64).for_each(|group| {
            on.count(group, now);
        });
        assert!(on.groups.contains_key(&7));
    }
}
