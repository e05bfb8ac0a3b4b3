//! Bytes between registered memory and files, straight: no buffer of ours in between, so that a file opened with
//! `O_DIRECT` is read by the device into the very memory that peers read from.
//!
//! These calls block for as long as the disk takes: they are for threads that do nothing else. As everywhere where an
//! address leaves this crate, the caller holds the blocks: nothing here keeps another thread or a peer from touching the
//! ranges meanwhile.

use std::{fs::File, io, os::fd::AsRawFd, sync::Arc};

use crate::{engine::TransferEngine, error::Error, space::Mapped};

/// Bytes of the engine's segment, as [`TransferEngine::write_file_at`] and [`TransferEngine::read_file_at`] take them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// Offset of the first byte in the segment.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToFile,
    FromFile,
}

/// Most ranges in one system call (`IOV_MAX`).
const MAX_VECTORS: usize = 1024;

impl TransferEngine {
    /// Writes registered bytes into a file from the offset `at` on, the ranges one after another and all of them, at once
    /// and on this thread. The usual discipline applies: the caller holds the ranges, and nobody writes them meanwhile.
    ///
    /// A file opened with `O_DIRECT` wants `at` and each range's offset and length to be multiples of its block size;
    /// that is the caller's to see to. A range's address is aligned as its offset is, up to 4096 bytes: regions start at
    /// multiples of 2 MiB of the segment and at least on a page of memory (memory that the caller brought along is
    /// aligned as he made it).
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] before anything is written; [`Error::File`], after which any part may have been written.
    pub fn write_file_at(&self, file: &File, at: u64, ranges: &[MemoryRange]) -> Result<(), Error> {
        self.move_file(file, at, ranges, Way::ToFile)
    }

    /// Fills registered memory from a file from the offset `at` on, the ranges one after another and all of them, at once
    /// and on this thread. The usual discipline applies: the caller holds the ranges, and nobody reads or writes them
    /// meanwhile. For `O_DIRECT` see [`TransferEngine::write_file_at`].
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] and [`Error::ReadOnly`] before anything is read; [`Error::File`], after which any part of the
    /// memory may have been filled: of the kind [`io::ErrorKind::UnexpectedEof`] if the file ends before the last range.
    pub fn read_file_at(&self, file: &File, at: u64, ranges: &[MemoryRange]) -> Result<(), Error> {
        self.move_file(file, at, ranges, Way::FromFile)
    }

    fn move_file(&self, file: &File, at: u64, ranges: &[MemoryRange], way: Way) -> Result<(), Error> {
        // They keep the memory mapped until the last call has returned.
        let mut regions: Vec<Arc<Mapped>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            let region = self.own(range.offset, range.len)?;
            if way == Way::FromFile {
                self.check_writable(&region, range.offset, range.len)?;
            }
            regions.push(region);
        }
        let mut vectors: Vec<libc::iovec> = ranges
            .iter()
            .zip(&regions)
            .filter(|(range, _)| range.len > 0)
            .map(|(range, region)| libc::iovec {
                iov_base: region.at(range.offset, range.len).cast(),
                iov_len: range.len as usize,
            })
            .collect();
        let len = ranges.iter().map(|range| range.len).sum();
        let failed = |source| Error::File { len, at, source: Arc::new(source) };
        move_all(file, at, &mut vectors, way).map_err(failed)
    }
}

/// Moves all bytes of `vectors`, which name memory that stays mapped meanwhile.
fn move_all(file: &File, mut at: u64, mut vectors: &mut [libc::iovec], way: Way) -> io::Result<()> {
    while !vectors.is_empty() {
        let count = vectors.len().min(MAX_VECTORS) as libc::c_int;
        let offset = libc::off64_t::try_from(at).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let (fd, first) = (file.as_raw_fd(), vectors.as_ptr());
        // SAFETY: `first` points to `count` vectors, each inside a region that was checked for this direction and stays
        // mapped (`move_file` holds it); no references into that memory exist, and the kernel copies as a peer would.
        let moved = unsafe {
            match way {
                Way::ToFile => libc::pwritev64(fd, first, count, offset),
                Way::FromFile => libc::preadv64(fd, first, count, offset),
            }
        };
        match moved {
            0 => {
                let kind = if way == Way::ToFile { io::ErrorKind::WriteZero } else { io::ErrorKind::UnexpectedEof };
                return Err(kind.into());
            }
            1.. => {
                at += moved as u64;
                vectors = advance(vectors, moved as usize);
            }
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// What is left of `vectors` after so many bytes of them were moved.
fn advance(mut vectors: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    while vectors.first().is_some_and(|first| first.iov_len <= moved) {
        moved -= vectors[0].iov_len;
        vectors = &mut vectors[1..];
    }
    if let Some(first) = vectors.first_mut() {
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(moved).cast();
        first.iov_len -= moved;
    }
    vectors
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        os::unix::fs::{FileExt, OpenOptionsExt},
    };

    use super::*;
    use crate::{
        builder::Builder,
        memory::{Allocation, Memory},
    };

    const KIB: u64 = 1024;

    fn engine() -> TransferEngine {
        Builder::default().arena(Allocation::new(4 << 20)).build().unwrap()
    }

    fn bytes(len: u64, salt: u64) -> Vec<u8> {
        (0..len).map(|at| (at * 31 + salt * 7 + at / 251) as u8).collect()
    }

    fn range(offset: u64, len: u64) -> MemoryRange {
        MemoryRange { offset, len }
    }

    fn read(engine: &TransferEngine, MemoryRange { offset, len }: MemoryRange) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        engine.read_bytes(offset, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_was_written_is_read_back_wherever_its_parts_lie() {
        let (engine, file) = (engine(), tempfile::tempfile().unwrap());
        let parts = [range(5, 10_000), range(100_000, 0), range(64 * KIB + 1, 3), range(20_000, 4096)];
        for (salt, part) in parts.iter().enumerate() {
            engine.write_bytes(part.offset, &bytes(part.len, salt as u64)).unwrap();
        }
        engine.write_file_at(&file, 777, &parts).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 777 + 14_099);
        let mut in_file = vec![0; 14_099];
        file.read_exact_at(&mut in_file, 777).unwrap();
        assert_eq!(in_file, [bytes(10_000, 0), bytes(3, 2), bytes(4096, 3)].concat());

        let (head, tail) = (range(1 << 20, 10_001), range(2 << 20, 4_098));
        engine.read_file_at(&file, 777, &[head, tail]).unwrap();
        assert_eq!([read(&engine, head), read(&engine, tail)].concat(), in_file);
        assert_eq!(read(&engine, range(tail.offset + tail.len, 1)), [0], "not a byte more");
    }

    #[test]
    fn more_ranges_than_one_system_call_takes_are_moved_too() {
        let (engine, file) = (engine(), tempfile::tempfile().unwrap());
        let parts: Vec<_> = (0..2 * MAX_VECTORS as u64 + 3).map(|at| range(at * 512, 100)).collect();
        for part in &parts {
            engine.write_bytes(part.offset, &bytes(part.len, part.offset)).unwrap();
        }
        engine.write_file_at(&file, 0, &parts).unwrap();
        let all = range(2 << 20, parts.len() as u64 * 100);
        engine.read_file_at(&file, 0, &[all]).unwrap();
        let expected: Vec<u8> = parts.iter().flat_map(|part| bytes(part.len, part.offset)).collect();
        assert_eq!(read(&engine, all), expected);
    }

    #[test]
    fn a_part_that_was_moved_is_not_moved_again() {
        let mut memory = [0u8; 30];
        let base: *mut u8 = memory.as_mut_ptr();
        let vector = |at: usize, len| libc::iovec { iov_base: base.wrapping_add(at).cast(), iov_len: len };
        for (moved, left) in
            [(0, vec![(0, 10), (15, 5)]), (4, vec![(4, 6), (15, 5)]), (10, vec![(15, 5)]), (15, vec![])]
        {
            let mut vectors = [vector(0, 10), vector(15, 5)];
            let now: Vec<_> = advance(&mut vectors, moved)
                .iter()
                .map(|vector| (vector.iov_base as usize - base as usize, vector.iov_len))
                .collect();
            assert_eq!(now, left, "after {moved}");
        }
    }

    #[test]
    fn a_file_opened_for_direct_access_takes_whole_pages() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = File::options();
        options.read(true).write(true).create(true).custom_flags(libc::O_DIRECT);
        let Ok(file) = options.open(dir.path().join("direct")) else { return }; // a file system without it
        let (engine, there, back) = (engine(), range(8 * KIB, 64 * KIB), range(1 << 20, 64 * KIB));
        engine.write_bytes(there.offset, &bytes(there.len, 1)).unwrap();
        engine.write_file_at(&file, 4 * KIB, &[there]).unwrap();
        engine.read_file_at(&file, 4 * KIB, &[back]).unwrap();
        assert_eq!(read(&engine, back), bytes(there.len, 1));
    }

    #[test]
    fn what_a_file_or_a_disk_cannot_do_is_said() {
        let engine = engine();
        let kind = |result: Result<(), Error>| match result {
            Err(Error::File { source, .. }) => source.kind(),
            other => panic!("{other:?}"),
        };
        let mut short = tempfile::tempfile().unwrap();
        short.write_all(&[1; 100]).unwrap();
        assert_eq!(kind(engine.read_file_at(&short, 50, &[range(0, 51)])), io::ErrorKind::UnexpectedEof);
        engine.read_file_at(&short, 50, &[range(0, 50)]).unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(kind(engine.write_file_at(&full, 0, &[range(0, 10)])), io::ErrorKind::StorageFull);
        assert_eq!(kind(engine.write_file_at(&short, u64::MAX, &[range(0, 10)])), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn only_registered_memory_is_moved_and_only_writable_memory_filled() {
        let (engine, file) = (engine(), tempfile::tempfile().unwrap());
        file.set_len(4096).unwrap();
        for wrong in [range((4 << 20) - 9, 10), range(u64::MAX, 2), range(1 << 40, 1)] {
            assert!(matches!(engine.write_file_at(&file, 0, &[range(0, 1), wrong]), Err(Error::OutOfBounds { .. })));
            assert!(matches!(engine.read_file_at(&file, 0, &[range(0, 1), wrong]), Err(Error::OutOfBounds { .. })));
        }
        let same = file.try_clone().unwrap();
        let region = engine.register(Memory::File { file: same, offset: 0, len: 4096, writable: false }).unwrap();
        let fixed = range(region.base(), 4096);
        assert!(matches!(engine.read_file_at(&file, 0, &[fixed]), Err(Error::ReadOnly { .. })));
        engine.write_file_at(&tempfile::tempfile().unwrap(), 0, &[fixed]).unwrap();
    }
}
