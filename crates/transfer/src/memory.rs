//! The arena: the one stretch of memory an engine owns, offers to peers and moves bytes into and out of.
//!
//! Anonymous and zeroed by the kernel, page-aligned (so 64-aligned), mapped once and never moved. Who may touch which
//! bytes when is decided outside, by block ownership (see [`HostMemory`]); therefore this module never forms a reference
//! to arena bytes. It copies in and out by raw pointer, and the sockets are handed raw addresses: a peer that breaks the
//! ownership rule can then spoil bytes, but not the compiler's assumptions about a `&[u8]`.

use std::{
    io,
    ptr::{self, NonNull},
    sync::Arc,
};

use kvasir_types::HostMemory;

use crate::error::Error;

/// A private anonymous mapping.
#[derive(Debug)]
pub(crate) struct Arena {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread; it is unmapped only on drop, when no handle is left. All access is by raw
// copies whose exclusion is the callers' block ownership, as `HostMemory` states.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps `len` zeroed bytes.
    pub(crate) fn new(len: usize) -> Result<Self, Error> {
        if len == 0 {
            return Err(Error::Config { setting: "capacity_bytes", reason: "an arena holds at least one byte".into() });
        }
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let failed = || Error::Memory { bytes: len, source: Arc::new(io::Error::last_os_error()) };
        if base == libc::MAP_FAILED {
            return Err(failed());
        }
        let base = NonNull::new(base.cast()).ok_or_else(failed)?;
        Ok(Self { base, len })
    }

    /// Whether `len` bytes at `offset` lie inside.
    pub(crate) fn holds(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len as u64)
    }

    /// Address of `len` bytes at `offset`.
    ///
    /// # Panics
    /// If they are not all inside: callers have checked, and this guards memory.
    pub(crate) fn at(&self, offset: u64, len: u64) -> *mut u8 {
        assert!(self.holds(offset, len), "range {offset:#x}+{len} checked against the arena before");
        // SAFETY: offset is at most len, inside or one past the end of the one mapping.
        unsafe { self.base.as_ptr().add(offset as usize) }
    }

    /// Copies arena bytes out. Panics if out of bounds.
    pub(crate) fn copy_out(&self, offset: u64, into: &mut [u8]) {
        let from = self.at(offset, into.len() as u64);
        // SAFETY: `at` checked the source; `into` is a live exclusive slice that cannot overlap a mapping nobody has
        // references into.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies bytes into the arena. Panics if out of bounds.
    pub(crate) fn copy_in(&self, offset: u64, bytes: &[u8]) {
        let to = self.at(offset, bytes.len() as u64);
        // SAFETY: as in `copy_out`, the other way round.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Copies `len` bytes of `from` into this arena (possibly the same one, possibly overlapping). Panics if out of
    /// bounds.
    pub(crate) fn copy_from(&self, offset: u64, from: &Self, from_offset: u64, len: u64) {
        let (to, from) = (self.at(offset, len), from.at(from_offset, len));
        // SAFETY: both ranges were checked by `at` and live as long as the two borrows; `copy` allows overlap.
        unsafe { ptr::copy(from, to, len as usize) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no handle, so no user, is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

impl HostMemory for Arena {
    fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_is_zeroed_aligned_and_bounded() {
        let arena = Arena::new(10_000).unwrap();
        assert_eq!(arena.base() as usize % 64, 0);
        let mut bytes = vec![1; 10_000];
        arena.copy_out(0, &mut bytes);
        assert!(bytes.iter().all(|&b| b == 0));
        assert!(arena.holds(9_999, 1) && arena.holds(10_000, 0));
        assert!(!arena.holds(9_999, 2) && !arena.holds(u64::MAX, 2));
    }

    #[test]
    #[should_panic(expected = "checked against the arena")]
    fn an_unchecked_range_never_reaches_memory() {
        Arena::new(64).unwrap().copy_in(60, &[0; 5]);
    }

    #[test]
    fn an_arena_that_cannot_be_had_is_an_error() {
        assert!(matches!(Arena::new(0), Err(Error::Config { .. })));
        assert!(matches!(Arena::new(usize::MAX / 2), Err(Error::Memory { .. })));
    }
}
