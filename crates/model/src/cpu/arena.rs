//! Memory for blocks where no transfer engine brings any: benchmarks, examples, tests.
//!
//! A worker's arena belongs to its transfer engine, which pins and registers it; whoever drives a backend without one
//! takes this. It keeps [`HostMemory`]'s promises by being an anonymous mapping: zeroed, page-aligned, never moved.

use std::{io, sync::Arc};

use kvasir_types::HostMemory;
use memmap2::{MmapOptions, MmapRaw};

/// Zeroed memory of its own, in huge pages where the kernel gives them; pages are taken when they are first touched.
#[derive(Debug)]
pub struct HostArena(MmapRaw);

impl HostArena {
    /// An arena of `bytes` bytes.
    ///
    /// # Errors
    /// The system has no such stretch of address space to give.
    pub fn new(bytes: usize) -> io::Result<Arc<Self>> {
        let map = MmapOptions::new().len(bytes).map_anon()?;
        // Only a wish. It matters: attention jumps from block to block, and a miss of the translation cache for each
        // small page of them costs as much as reading it.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Arc::new(Self(MmapRaw::from(map))))
    }
}

impl HostMemory for HostArena {
    fn base(&self) -> *mut u8 {
        self.0.as_mut_ptr()
    }
    fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_is_aligned_and_stays_where_it_is() {
        let arena = HostArena::new(1 << 16).unwrap();
        let base = arena.base();
        assert!(base.addr().is_multiple_of(64));
        assert_eq!(arena.len(), 1 << 16);
        let shared: Arc<dyn HostMemory> = arena;
        assert_eq!(shared.base(), base);
    }
}
