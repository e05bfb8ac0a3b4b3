//! A segment's address space: registered regions, each at an offset that is never given out twice.
//!
//! Offsets are what peers see and what batches name; addresses stay inside this process. Regions start at multiples of
//! [`ALIGNMENT`] with a gap between them, so that no range, and no two neighbouring ranges merged, can span two regions,
//! and an offset into a region that was unregistered hits nothing.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, PoisonError, RwLock},
    task::{Context, Poll, Waker},
};

use kvasir_types::{HostMemory, RegionInfo};

use crate::{
    error::Error,
    memory::{Backing, Registered},
};

/// Regions start at multiples of it: huge pages stay huge in peers' mappings.
const ALIGNMENT: u64 = 2 << 20;

/// A region in its place.
pub(crate) struct Mapped {
    /// Offset of its first byte in the segment.
    pub(crate) base: u64,
    pub(crate) len: u64,
    pub(crate) writable: bool,
    /// What another process can map, if it can.
    pub(crate) backing: Option<Backing>,
    memory: Arc<dyn HostMemory>,
    uses: Mutex<Uses>,
    unused: Condvar,
}

#[derive(Default)]
struct Uses {
    count: usize,
    waker: Option<Waker>,
    /// A thread blocks until there is none: nobody else costs a system call to wake.
    awaited: bool,
}

impl Mapped {
    fn end(&self) -> u64 {
        self.base + self.len
    }

    /// Whether `len` bytes at an offset of the segment lie inside.
    pub(crate) fn holds(&self, offset: u64, len: u64) -> bool {
        offset >= self.base && offset.checked_add(len).is_some_and(|end| end <= self.end())
    }

    /// Address of `len` bytes at an offset of the segment.
    ///
    /// # Panics
    /// If they are not all inside: callers have checked, and this guards memory.
    pub(crate) fn at(&self, offset: u64, len: u64) -> *mut u8 {
        assert!(self.holds(offset, len), "range {offset:#x}+{len} checked against its region before");
        // SAFETY: inside or one past the end of memory that is valid for its whole length.
        unsafe { self.memory.base().add((offset - self.base) as usize) }
    }

    pub(crate) fn memory(&self) -> Arc<dyn HostMemory> {
        Arc::clone(&self.memory)
    }

    fn info(&self) -> RegionInfo {
        RegionInfo { base: self.base, len: self.len, shared: self.backing.is_some() }
    }

    fn uses(&self) -> std::sync::MutexGuard<'_, Uses> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something (a batch, a grant) that may touch a region; unregistering it waits until there is none.
pub(crate) struct Use(Arc<Mapped>);

impl Use {
    pub(crate) fn new(mapped: &Arc<Mapped>) -> Self {
        mapped.uses().count += 1;
        Self(Arc::clone(mapped))
    }
}

impl std::ops::Deref for Use {
    type Target = Arc<Mapped>;

    fn deref(&self) -> &Arc<Mapped> {
        &self.0
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let waker = {
            let mut uses = self.0.uses();
            uses.count -= 1;
            if uses.count > 0 {
                return;
            }
            if uses.awaited {
                self.0.unused.notify_all();
            }
            uses.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// All regions of one segment. Registering and unregistering replace the list; everybody else takes a snapshot of it.
#[derive(Default)]
pub(crate) struct Space {
    regions: RwLock<Arc<Vec<Arc<Mapped>>>>,
    next: Mutex<u64>,
}

/// The regions at one moment, sorted by base.
#[derive(Clone)]
pub(crate) struct Snapshot(Arc<Vec<Arc<Mapped>>>);

impl Snapshot {
    /// The region that holds all of a range.
    pub(crate) fn find(&self, offset: u64, len: u64) -> Option<&Arc<Mapped>> {
        let after = self.0.partition_point(|region| region.base <= offset);
        let region = &self.0[after.checked_sub(1)?];
        region.holds(offset, len).then_some(region)
    }

    /// Where the last region ends.
    pub(crate) fn end(&self) -> u64 {
        self.0.last().map_or(0, |region| region.end())
    }

    pub(crate) fn infos(&self) -> Vec<RegionInfo> {
        self.0.iter().map(|region| region.info()).collect()
    }
}

impl Space {
    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot(Arc::clone(&self.regions.read().unwrap_or_else(PoisonError::into_inner)))
    }

    /// The region that holds all of a range.
    pub(crate) fn find(&self, offset: u64, len: u64) -> Option<Arc<Mapped>> {
        self.snapshot().find(offset, len).cloned()
    }

    /// Gives memory its place.
    pub(crate) fn add(&self, Registered { memory, backing, writable }: Registered) -> Result<Arc<Mapped>, Error> {
        let len = memory.len() as u64;
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let base = *next;
        // One byte at least lies between two regions.
        *next = base
            .checked_add(len)
            .and_then(|end| (end + 1).checked_next_multiple_of(ALIGNMENT))
            .ok_or_else(|| Error::Config { setting: "memory", reason: "the segment's offsets are used up".into() })?;
        let (uses, unused) = (Mutex::default(), Condvar::new());
        let mapped = Arc::new(Mapped { base, len, writable, backing, memory, uses, unused });
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let mut list = Vec::clone(&regions);
        list.push(Arc::clone(&mapped)); // bases only grow, so the list stays sorted
        *regions = Arc::new(list);
        Ok(mapped)
    }

    /// From now on nothing new finds it.
    pub(crate) fn remove(&self, base: u64) {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let mut list = Vec::clone(&regions);
        list.retain(|region| region.base != base);
        *regions = Arc::new(list);
    }
}

/// Resolves when no batch and no grant touches a region any more: then its memory is its owner's alone.
#[must_use = "the region is out of use only when this has been awaited"]
pub struct Unregister(pub(crate) Arc<Mapped>);

impl std::fmt::Debug for Unregister {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unregister").field("base", &self.0.base).field("len", &self.0.len).finish()
    }
}

impl Unregister {
    /// Blocks until then: for threads without an executor.
    pub fn wait(self) {
        let mut uses = self.0.uses();
        while uses.count > 0 {
            uses.awaited = true;
            uses = self.0.unused.wait(uses).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Future for Unregister {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut uses = self.0.uses();
        if uses.count == 0 {
            return Poll::Ready(());
        }
        uses.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Allocation, Memory};

    fn memory(bytes: usize) -> Registered {
        Memory::Allocate(Allocation::new(bytes)).realize().unwrap()
    }

    #[test]
    fn no_range_spans_two_regions_and_no_offset_is_given_out_twice() {
        let space = Space::default();
        let first = space.add(memory(ALIGNMENT as usize)).unwrap();
        let second = space.add(memory(100)).unwrap();
        assert_eq!((first.base, second.base), (0, 2 * ALIGNMENT), "a gap even after a whole number of pages");
        assert!(space.find(ALIGNMENT - 1, 1).is_some() && space.find(ALIGNMENT - 1, 2).is_none());
        assert!(space.find(second.base, 100).is_some() && space.find(second.base, 101).is_none());
        assert!(space.find(u64::MAX, 1).is_none() && space.find(ALIGNMENT, 1).is_none());
        space.remove(second.base);
        assert!(space.find(second.base, 1).is_none());
        assert!(space.add(memory(100)).unwrap().base > second.base);
    }

    #[test]
    fn unregistering_waits_for_every_use() {
        let space = Space::default();
        let region = space.add(memory(100)).unwrap();
        let in_use = Use::new(&region);
        let mut unregister = Unregister(region);
        let mut context = Context::from_waker(Waker::noop());
        assert!(Pin::new(&mut unregister).poll(&mut context).is_pending());
        drop(in_use);
        assert!(Pin::new(&mut unregister).poll(&mut context).is_ready());
    }

    #[test]
    #[should_panic(expected = "checked against its region")]
    fn an_unchecked_range_never_becomes_an_address() {
        Space::default().add(memory(64)).unwrap().at(60, 5);
    }
}
