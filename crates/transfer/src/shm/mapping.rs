//! Memory of another process in our address space, and memory of ours for others to map.
//!
//! A descriptor from outside is judged before it is mapped: touching a mapped file beyond its end kills the process, and
//! whoever sent it could cut it short later. So only files that can never shrink (`F_SEAL_SHRINK`, which memfds have and
//! files on disk have not) and that reach as far as was said are taken. Mappings are not passed on to forked children
//! (`MADV_DONTFORK`): a child that writes on after its parent has died would be seen by nobody.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    ptr::{self, NonNull},
};

/// Where huge pages begin and end; also what a mapping large enough for them is aligned to.
const HUGE_PAGE: u64 = 2 << 20;

/// Why a descriptor was not mapped.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfit {
    #[error("not a file that is sealed against shrinking")]
    NotSealed,
    #[error("a file of {size} bytes does not hold {len} at {offset}")]
    TooShort { size: u64, offset: u64, len: u64 },
    #[error("the system does not map it")]
    System(#[from] io::Error),
}

/// A shared mapping of part of a file. Unmapped on drop.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: u64,
    mapped_len: usize,
}

// SAFETY: the mapping belongs to no thread and stays until drop; access is by raw copies and atomics whose exclusion is
// the callers' business.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes at `offset` of a sealed file, to read and, if wanted, to write.
    pub(super) fn new(fd: BorrowedFd<'_>, offset: u64, len: u64, writable: bool) -> Result<Self, Unfit> {
        // SAFETY: takes no pointer.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            return Err(Unfit::NotSealed);
        }
        let status = File::from(fd.try_clone_to_owned()?).metadata()?;
        let size = status.size();
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Unfit::TooShort { size, offset, len });
        }
        // Whole pages of the file's kind: huge pages can be unmapped only as a whole. What lies behind `len` is not touched.
        let page = status.blksize().max(4096);
        let mapped_len = len.checked_next_multiple_of(page).and_then(|len| usize::try_from(len).ok());
        let mapped_len = mapped_len.ok_or(Unfit::TooShort { size, offset, len })?;
        let base = map_aligned(fd, offset, mapped_len, writable)?;
        let mapping = Self { base, len, mapped_len };
        mapping.advise(libc::MADV_DONTFORK)?;
        if len >= HUGE_PAGE {
            // Where the system has no huge pages for it, small ones do.
            let _ = mapping.advise(libc::MADV_HUGEPAGE);
        }
        Ok(mapping)
    }

    fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: exactly our mapping; none of the advices used here changes its contents.
        let result = unsafe { libc::madvise(self.base.as_ptr().cast(), self.mapped_len, advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Address of `len` bytes at `offset`; `None` if they are not all inside.
    pub(super) fn at(&self, offset: u64, len: u64) -> Option<*mut u8> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return None;
        }
        // SAFETY: inside the one mapping, as just checked.
        Some(unsafe { self.base.as_ptr().add(offset as usize) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no handle, so no user, is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.mapped_len) };
    }
}

/// Maps at an address that is a multiple of a huge page where that can matter: only then do huge pages of the file come
/// as huge pages into our tables.
fn map_aligned(fd: BorrowedFd<'_>, offset: u64, len: usize, writable: bool) -> io::Result<NonNull<u8>> {
    let slack = if len as u64 >= HUGE_PAGE { HUGE_PAGE as usize } else { 0 };
    let reserved_len = len.checked_add(slack).ok_or(io::ErrorKind::OutOfMemory)?;
    let map = |at: *mut libc::c_void, len, protection, flags, fd, offset| {
        // SAFETY: either at an address of the kernel's choice, or over a part of what we have just reserved ourselves.
        let base = unsafe { libc::mmap(at, len, protection, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::other("mapped at address zero"))
    };
    let nothing = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let reserved = map(ptr::null_mut(), reserved_len, libc::PROT_NONE, nothing, -1, 0)?;
    let head = if slack > 0 { reserved.as_ptr().align_offset(slack) } else { 0 };
    let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
    // SAFETY: at most `slack` bytes in, inside what was reserved.
    let at = unsafe { reserved.as_ptr().add(head) };
    let shared = libc::MAP_SHARED | libc::MAP_FIXED;
    let mapped = map(at.cast(), len, protection, shared, fd.as_raw_fd(), offset as libc::off_t);
    // SAFETY: both ends lie inside the reservation; what is unmapped is what the mapping does not cover (all, if it failed).
    unsafe {
        let (start, end) = (reserved.as_ptr(), reserved.as_ptr().add(reserved_len));
        match &mapped {
            Ok(_) => {
                // An address that did not move a page has nothing before it, and unmapping nothing is an error, not a fault.
                let tail = at.add(len);
                libc::munmap(start.cast(), head);
                libc::munmap(tail.cast(), end.offset_from_unsigned(tail));
            }
            Err(_) => {
                libc::munmap(start.cast(), reserved_len);
            }
        }
    }
    mapped
}

/// A fresh zeroed memfd of `len` bytes that can neither shrink nor grow, mapped; and the descriptor to hand out. With
/// `read_only_for_others` nobody can map it to write from here on, whoever holds the descriptor.
pub(super) fn shared_memory(name: &CStr, len: u64, read_only_for_others: bool) -> Result<(Mapping, OwnedFd), Unfit> {
    // SAFETY: the name is a C string; the call touches no other memory.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: just opened, and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len)?;
    seal(&file, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)?;
    let mapping = Mapping::new(file.as_fd(), 0, len, true)?;
    seal(&file, libc::F_SEAL_SEAL | if read_only_for_others { libc::F_SEAL_FUTURE_WRITE } else { 0 })?;
    Ok((mapping, file.into()))
}

fn seal(file: &File, seals: i32) -> io::Result<()> {
    // SAFETY: takes no pointer.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(mapping: &Mapping, offset: u64, byte: u8) {
        let at = mapping.at(offset, 1).unwrap();
        // SAFETY: one byte inside the mapping, and no other thread here.
        unsafe { at.write(byte) }
    }

    fn read(mapping: &Mapping, offset: u64) -> u8 {
        let at = mapping.at(offset, 1).unwrap();
        // SAFETY: as above.
        unsafe { at.read() }
    }

    #[test]
    fn what_one_mapping_writes_the_other_reads() {
        for len in [5000, 3 * HUGE_PAGE + 5] {
            let (ours, fd) = shared_memory(c"test", len, false).unwrap();
            let theirs = Mapping::new(fd.as_fd(), 0, len, true).unwrap();
            for offset in [0, 4096, len - 1] {
                write(&ours, offset, 7);
                assert_eq!(read(&theirs, offset), 7);
            }
            let part = Mapping::new(fd.as_fd(), 4096, len - 4096, false).unwrap();
            assert_eq!(read(&part, 0), 7);
            if len > HUGE_PAGE {
                assert!(ours.at(0, 1).unwrap().addr().is_multiple_of(HUGE_PAGE as usize));
            }
        }
    }

    #[test]
    fn nothing_outside_a_mapping_has_an_address() {
        let (ours, _) = shared_memory(c"test", 5000, false).unwrap();
        assert!(ours.at(4999, 1).is_some() && ours.at(5000, 0).is_some());
        assert!(ours.at(5000, 1).is_none() && ours.at(u64::MAX, 2).is_none());
    }

    #[test]
    fn a_file_that_could_shrink_or_is_shorter_than_told_is_not_mapped() {
        let file = tempfile();
        file.set_len(10_000).unwrap();
        assert!(matches!(Mapping::new(file.as_fd(), 0, 10_000, true), Err(Unfit::NotSealed)));
        seal(&file, libc::F_SEAL_SHRINK).unwrap();
        Mapping::new(file.as_fd(), 0, 10_000, true).unwrap();
        for (offset, len) in [(0, 10_001), (1, 10_000), (u64::MAX, 2), (0, 0)] {
            assert!(matches!(Mapping::new(file.as_fd(), offset, len, true), Err(Unfit::TooShort { .. })));
        }
        let disk = File::open("/proc/self/exe").unwrap();
        assert!(matches!(Mapping::new(disk.as_fd(), 0, 4096, false), Err(Unfit::NotSealed)));
        let (pipe, _) = io::pipe().unwrap();
        assert!(Mapping::new(pipe.as_fd(), 0, 4096, false).is_err());
    }

    fn tempfile() -> File {
        // SAFETY: as in `shared_memory`.
        let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        // SAFETY: as in `shared_memory`.
        File::from(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    #[test]
    fn what_is_read_only_for_others_cannot_be_mapped_to_write() {
        let (ours, fd) = shared_memory(c"test", 4096, true).unwrap();
        assert!(matches!(Mapping::new(fd.as_fd(), 0, 4096, true), Err(Unfit::System(_))));
        let theirs = Mapping::new(fd.as_fd(), 0, 4096, false).unwrap();
        write(&ours, 9, 3); // ours, mapped before, goes on
        assert_eq!(read(&theirs, 9), 3);
    }
}
