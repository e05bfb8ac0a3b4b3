//! A grant as its opener sees it: being put together from the owner's messages, in whatever order they come, then
//! checked against on every operation, because the owner's processor will not.

use std::collections::BTreeSet;

use super::messages::{Bytes, MAX_GRANT_RANGES, MAX_GRANT_REGIONS, OpenId};
use crate::{batch::Op, error::Refusal, grant::check_granted};

/// The owner's answers contradict one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the parts of an opened grant do not fit together")]
pub(super) struct Contradiction;

/// What the first part says of the others.
#[derive(Clone, Copy)]
struct Announced {
    grant: OpenId,
    readable: u32,
    writable: u32,
    regions: u16,
}

/// An answer of which parts are missing.
#[derive(Default)]
pub(super) struct Opening {
    announced: Option<Announced>,
    readable: Chunks,
    writable: Chunks,
    regions: BTreeSet<u16>,
}

/// Runs of ranges with their places in the list.
#[derive(Default)]
struct Chunks {
    chunks: Vec<(u32, Vec<Bytes>)>,
    ranges: usize,
}

impl Chunks {
    fn add(&mut self, first: u32, ranges: Vec<Bytes>) -> Result<(), Contradiction> {
        self.ranges += ranges.len();
        // An empty run would cost memory and never complete anything.
        if self.ranges > MAX_GRANT_RANGES || ranges.is_empty() {
            return Err(Contradiction);
        }
        self.chunks.push((first, ranges));
        Ok(())
    }

    /// The list, if the runs are all of it, once each, and it is sorted.
    fn join(mut self) -> Result<Vec<Bytes>, Contradiction> {
        self.chunks.sort_unstable_by_key(|(first, _)| *first);
        let mut list: Vec<Bytes> = Vec::with_capacity(self.ranges);
        for (first, ranges) in self.chunks {
            if first as usize != list.len() {
                return Err(Contradiction);
            }
            list.extend(ranges);
        }
        if list.is_sorted_by(|before, after| before.1 <= after.0) { Ok(list) } else { Err(Contradiction) }
    }
}

impl Opening {
    pub(super) fn announce(
        &mut self,
        grant: OpenId,
        (readable, writable): (u32, u32),
        regions: u16,
    ) -> Result<(), Contradiction> {
        if self.announced.is_some() {
            return Err(Contradiction);
        }
        self.announced = Some(Announced { grant, readable, writable, regions });
        Ok(())
    }

    pub(super) fn add_ranges(&mut self, writable: bool, first: u32, ranges: Vec<Bytes>) -> Result<(), Contradiction> {
        if writable { self.writable.add(first, ranges) } else { self.readable.add(first, ranges) }
    }

    /// Notes that a region's key has come.
    pub(super) fn add_region(&mut self, index: u16) -> Result<(), Contradiction> {
        if self.regions.len() < MAX_GRANT_REGIONS && self.regions.insert(index) { Ok(()) } else { Err(Contradiction) }
    }

    /// Whether every part is there (or more than that, which [`Opening::finish`] tells).
    pub(super) fn is_complete(&self) -> bool {
        self.announced.is_some_and(|announced| {
            self.readable.ranges >= announced.readable as usize
                && self.writable.ranges >= announced.writable as usize
                && self.regions.len() >= usize::from(announced.regions)
        })
    }

    /// The grant.
    pub(super) fn finish(self) -> Result<OpenGrant, Contradiction> {
        let announced = self.announced.ok_or(Contradiction)?;
        let exact = self.readable.ranges == announced.readable as usize
            && self.writable.ranges == announced.writable as usize
            && self.regions.len() == usize::from(announced.regions);
        if !exact {
            return Err(Contradiction);
        }
        Ok(OpenGrant { id: announced.grant, readable: self.readable.join()?, writable: self.writable.join()? })
    }
}

/// What may be touched under an opened grant.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct OpenGrant {
    pub(super) id: OpenId,
    readable: Vec<Bytes>,
    writable: Vec<Bytes>,
}

impl OpenGrant {
    pub(super) fn check(&self, op: Op, offset: u64, len: u64) -> Result<(), Refusal> {
        check_granted(&self.readable, &self.writable, op, offset, len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_in_any_order_give_the_whole_and_one_missing_or_twice_is_seen(
            lens in prop::collection::vec((1u64..5, 0u64..5), 1..40),
            size in 1usize..7,
            order in any::<u64>(),
            regions in 0u16..4,
        ) {
            let mut next = 0;
            let ranges: Vec<Bytes> = lens.iter().map(|&(len, gap)| {
                let range = (next, next + len);
                next += len + gap;
                range
            }).collect();
            enum Part { Announce, Ranges(u32, Vec<Bytes>), Region(u16) }
            let mut parts = vec![Part::Announce];
            parts.extend(ranges.chunks(size).enumerate().map(|(n, run)| Part::Ranges((n * size) as u32, run.to_vec())));
            parts.extend((0..regions).map(Part::Region));
            // Some order: a walk by a step without a common divisor.
            let count = parts.len();
            let step = (1..).map(|n| order as usize % 97 + n).find(|step| gcd(*step, count) == 1).unwrap();
            let add = |opening: &mut Opening, part: &Part| match part {
                Part::Announce => opening.announce(OpenId(7), (ranges.len() as u32, 0), regions),
                Part::Ranges(first, run) => opening.add_ranges(false, *first, run.clone()),
                Part::Region(index) => opening.add_region(*index),
            };
            let mut opening = Opening::default();
            for n in 0..count {
                prop_assert!(!opening.is_complete());
                add(&mut opening, &parts[n * step % count]).unwrap();
            }
            prop_assert!(opening.is_complete());
            let grant = opening.finish().unwrap();
            for offset in 0..next + 2 {
                let granted = ranges.iter().any(|&(start, end)| (start..end).contains(&offset));
                prop_assert_eq!(grant.check(Op::Read, offset, 1).is_ok(), granted);
                prop_assert!(grant.check(Op::Write, offset, 1).is_err());
            }
            // The same with one part twice: never a grant.
            let mut opening = Opening::default();
            let twice = parts.iter().chain([&parts[order as usize % count]]);
            let added: Result<Vec<()>, _> = twice.map(|part| add(&mut opening, part)).collect();
            prop_assert!(added.is_err() || opening.finish().is_err());
        }
    }

    fn gcd(a: usize, b: usize) -> usize {
        if b == 0 { a } else { gcd(b, a % b) }
    }

    #[test]
    fn ranges_that_overlap_or_run_backwards_are_a_contradiction() {
        for ranges in [vec![(0, 10), (5, 20)], vec![(10, 20), (0, 5)]] {
            let mut opening = Opening::default();
            opening.announce(OpenId(1), (0, 2), 0).unwrap();
            opening.add_ranges(true, 0, ranges).unwrap();
            assert!(opening.finish().is_err());
        }
    }
}
