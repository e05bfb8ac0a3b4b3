//! What an owner has opened to us: its regions in our address space, and the ranges of a grant.
//!
//! The owner is not trusted to name ranges inside its regions, nor the caller to keep to the grant: an address comes out of
//! here only for bytes that are granted for the operation and lie in a mapping.

use std::sync::Arc;

use super::{
    mapping::Mapping,
    messages::{Malformed, Ranges},
};
use crate::{
    batch::Op,
    error::Refusal,
    grant::{Bytes, check_granted},
};

/// A region of the owner's segment, mapped here.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) base: u64,
    pub(super) mapping: Mapping,
    pub(super) writable: bool,
}

impl Remote {
    /// Address of a range of the segment, if all of it is in here.
    fn at(&self, offset: u64, len: u64) -> Option<*mut u8> {
        self.mapping.at(offset.checked_sub(self.base)?, len)
    }
}

/// A grant being told: `opened` said how many ranges there are, `ranges` messages bring them.
#[derive(Debug)]
pub(super) struct Arriving {
    readable: Vec<Bytes>,
    writable: Vec<Bytes>,
    expected: (usize, usize),
}

impl Arriving {
    pub(super) fn new(readable: u32, writable: u32) -> Self {
        Self { readable: Vec::new(), writable: Vec::new(), expected: (readable as usize, writable as usize) }
    }

    pub(super) fn is_complete(&self) -> bool {
        (self.readable.len(), self.writable.len()) == self.expected
    }

    /// Takes more ranges: not more than announced, in order, apart from one another.
    pub(super) fn take(&mut self, ranges: &Ranges<'_>) -> Result<(), Malformed> {
        for (start, end) in ranges.iter() {
            let list = if self.readable.len() < self.expected.0 {
                &mut self.readable
            } else if self.writable.len() < self.expected.1 {
                &mut self.writable
            } else {
                return Err(Malformed::Unexpected("a range"));
            };
            if start >= end || list.last().is_some_and(|&(_, last)| start <= last) {
                return Err(Malformed::Ranges);
            }
            list.push((start, end));
        }
        Ok(())
    }

    /// All told. `find` names the region of a range.
    pub(super) fn complete(
        self,
        slot: u32,
        nonce: u64,
        find: impl Fn(u64) -> Option<Arc<Remote>>,
    ) -> Result<OpenGrant, Malformed> {
        let mut regions: Vec<Arc<Remote>> = Vec::new();
        for &(start, end) in self.readable.iter().chain(&self.writable) {
            let region = find(start).filter(|region| region.at(start, end - start).is_some());
            let region = region.ok_or(Malformed::Unexpected("a range in no region"))?;
            if !regions.iter().rev().any(|known| known.base == region.base) {
                regions.push(region);
            }
        }
        Ok(OpenGrant { slot, nonce, readable: self.readable, writable: self.writable, regions })
    }
}

/// A grant that the owner has opened to us, until it is revoked.
#[derive(Debug)]
pub(super) struct OpenGrant {
    pub(super) slot: u32,
    pub(super) nonce: u64,
    readable: Vec<Bytes>,
    writable: Vec<Bytes>,
    regions: Vec<Arc<Remote>>,
}

impl OpenGrant {
    /// How many ranges it takes to remember it.
    pub(super) fn ranges(&self) -> usize {
        self.readable.len() + self.writable.len()
    }

    /// Address of a range, if all of it is granted for `op`.
    pub(super) fn at(&self, op: Op, offset: u64, len: u64) -> Result<*mut u8, Refusal> {
        check_granted(&self.readable, &self.writable, op, offset, len)?;
        let region = self.regions.iter().find(|region| region.at(offset, len).is_some()).ok_or(Refusal::Bounds)?;
        if op == Op::Write && !region.writable {
            return Err(Refusal::Access); // the owner grants what it doesn't let us map
        }
        region.at(offset, len).ok_or(Refusal::Bounds)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::shm::{mapping::shared_memory, messages::ToClient};

    fn remote(base: u64, writable: bool) -> Arc<Remote> {
        let (_, fd) = shared_memory(c"test", 4096, false).unwrap();
        Arc::new(Remote { base, mapping: Mapping::new(fd.as_fd(), 0, 4096, writable).unwrap(), writable })
    }

    fn told(expected: (u32, u32), ranges: &[(u64, u64)]) -> Result<Arriving, Malformed> {
        let mut arriving = Arriving::new(expected.0, expected.1);
        for message in crate::shm::messages::encode_ranges(ranges) {
            match ToClient::decode(&message)? {
                ToClient::Ranges(ranges) => arriving.take(&ranges)?,
                other => panic!("{other:?}"),
            }
        }
        Ok(arriving)
    }

    #[test]
    fn only_granted_bytes_of_the_right_direction_have_an_address() {
        let (first, second) = (remote(0, true), remote(1 << 20, false));
        let find = |offset| Some(if offset < 1 << 20 { Arc::clone(&first) } else { Arc::clone(&second) });
        let arriving = told((1, 2), &[(0, 100), (200, 300), (1 << 20, (1 << 20) + 50)]).unwrap();
        assert!(arriving.is_complete());
        let grant = arriving.complete(0, 1, find).unwrap();
        assert_eq!(grant.ranges(), 3);
        assert_eq!(grant.at(Op::Read, 40, 60).unwrap(), first.mapping.at(40, 60).unwrap());
        assert_eq!(grant.at(Op::Write, 200, 100).unwrap(), first.mapping.at(200, 100).unwrap());
        assert_eq!(grant.at(Op::Read, 41, 60), Err(Refusal::Bounds));
        assert_eq!(grant.at(Op::Read, u64::MAX, 2), Err(Refusal::Bounds));
        assert_eq!(grant.at(Op::Write, 0, 10), Err(Refusal::Access));
        assert_eq!(grant.at(Op::Write, 1 << 20, 10), Err(Refusal::Access), "mapped to read only");
    }

    #[test]
    fn an_owner_that_tells_nonsense_is_not_believed() {
        assert!(matches!(told((1, 0), &[(0, 1), (5, 6)]), Err(Malformed::Unexpected(_))));
        assert_eq!(told((2, 0), &[(5, 6), (0, 1)]).unwrap_err(), Malformed::Ranges);
        assert_eq!(told((2, 0), &[(5, 7), (6, 9)]).unwrap_err(), Malformed::Ranges);
        let region = remote(0, true);
        for range in [(4000, 4097), (4096, 5000)] {
            let arriving = told((1, 0), &[range]).unwrap();
            assert!(arriving.complete(0, 1, |_| Some(Arc::clone(&region))).is_err(), "{range:?}");
        }
        assert!(told((1, 0), &[(0, 1)]).unwrap().complete(0, 1, |_| None).is_err());
    }
}
