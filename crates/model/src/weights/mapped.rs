//! A file mapped read-only.
#![expect(unsafe_code, reason = "mapping a file is unsafe: its contents could change underneath")]

use std::{fs::File, io, path::Path};

/// A whole file, readable as bytes; pages are read from disk on first touch.
#[derive(Debug)]
pub(crate) struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps the file at `path`.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the bytes may be changed by another process only against the documented contract of `Folder` (weight
        // files are not modified while a model is served); we hand them out as plain bytes in which every pattern is
        // valid, and truncation ends in SIGBUS, not in another's memory.
        unsafe { memmap2::Mmap::map(&file) }.map(Self)
    }

    /// The file's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Says whether a range will be read at scattered places (no read-ahead) or from end to end.
    pub(crate) fn advise(&self, start: usize, len: usize, scattered: bool) {
        #[cfg(unix)]
        {
            let advice = if scattered { memmap2::Advice::Random } else { memmap2::Advice::Normal };
            // Only a hint: a system that does not take it serves the same bytes, more slowly.
            let _ = self.0.advise_range(advice, start, len);
        }
        #[cfg(not(unix))]
        let _ = (start, len, scattered);
    }
}
