//! What can be registered: memory of our own making, borrowed memory, a mapped file.
//!
//! Whatever it is, it stays where it is while anybody holds it, and no reference to its bytes is ever formed here: who may
//! touch which bytes when is decided outside, by block ownership (see [`HostMemory`]). Bytes are copied by raw pointer,
//! and sockets are handed raw addresses: a peer that breaks the ownership rule can then spoil bytes, but not the
//! compiler's assumptions about a `&[u8]`.
//!
//! Own allocations are **memfds** mapped shared, so that a process of the same host can map them, too (`shm`), sealed
//! against shrinking so that nobody's mapping can be pulled away. Where the kernel has no memfd they are private, and peers
//! reach them by sockets.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr::{self, NonNull},
    sync::Arc,
};

use kvasir_types::HostMemory;

use crate::error::Error;

/// Whether an allocation uses huge pages: fewer entries in the processor's address caches, faster large copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Pages of the ordinary size.
    Never,
    /// Transparent huge pages where the kernel gives them.
    #[default]
    Try,
    /// From the kernel's reserved pool (`vm.nr_hugepages`), or an error.
    Require,
}

/// Zeroed memory that the engine is to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// How much; rounded up to whole pages by the kernel, but no byte beyond it can be reached.
    pub bytes: usize,
    /// Default [`HugePages::Try`].
    pub huge_pages: HugePages,
    /// The NUMA node whose memory is preferred; `None`: the kernel's choice, near the thread that first touches it.
    pub numa_node: Option<u32>,
}

impl Allocation {
    /// So many bytes with everything else at its default.
    pub fn new(bytes: usize) -> Self {
        Self { bytes, huge_pages: HugePages::default(), numa_node: None }
    }
}

/// Memory to be registered with [`crate::TransferEngine::register`].
///
/// Device memory (CUDA) will be a further variant; therefore `non_exhaustive`.
#[non_exhaustive]
pub enum Memory {
    /// Made by the engine. Processes of the same host can map it.
    Allocate(Allocation),
    /// Somebody else's, kept alive by the handle. It can't be mapped by others, only sent.
    Borrowed(Arc<dyn HostMemory>),
    /// Bytes of a file, mapped shared: what is written lands in the file. Nobody may cut the file short while it is
    /// registered: touching a page beyond its end would kill the process. Processes of the same host can map it only if it
    /// is sealed against that (a memfd with `F_SEAL_SHRINK`).
    File {
        /// Open for reading, and for writing if `writable`.
        file: File,
        /// Where in the file, a multiple of the page size.
        offset: u64,
        /// Bytes, all inside the file.
        len: usize,
        /// Whether peers may be granted writes to it.
        writable: bool,
    },
}

/// What another process can map: a file descriptor and where in it the region starts.
#[derive(Debug)]
pub(crate) struct Backing {
    pub(crate) fd: OwnedFd,
    pub(crate) offset: u64,
}

/// Registered memory, ready to get its place in a segment.
pub(crate) struct Registered {
    pub(crate) memory: Arc<dyn HostMemory>,
    pub(crate) backing: Option<Backing>,
    pub(crate) writable: bool,
}

impl Memory {
    /// Makes or maps it.
    pub(crate) fn realize(self) -> Result<Registered, Error> {
        match self {
            Self::Allocate(allocation) => allocate(allocation),
            Self::Borrowed(memory) if memory.is_empty() => Err(empty()),
            Self::Borrowed(memory) => Ok(Registered { memory, backing: None, writable: true }),
            Self::File { file, offset, len, writable } => map_file(file, offset, len, writable),
        }
    }
}

fn empty() -> Error {
    Error::Config { setting: "memory", reason: "a region holds at least one byte".into() }
}

fn allocate(Allocation { bytes, huge_pages, numa_node }: Allocation) -> Result<Registered, Error> {
    if bytes == 0 {
        return Err(empty());
    }
    let failed = |source| Error::Memory { bytes, source: Arc::new(source) };
    let fd = match memfd(bytes, huge_pages) {
        Ok(fd) => Some(fd),
        // An old kernel or a sandbox: peers of this host will come by socket.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) && huge_pages != HugePages::Require => None,
        Err(error) => return Err(failed(error)),
    };
    let mapping = match &fd {
        Some(fd) => Mapping::new(bytes, libc::MAP_SHARED, Some((fd, 0)), true),
        None => Mapping::new(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None, true),
    }
    .map_err(failed)?;
    if huge_pages == HugePages::Try {
        mapping.advise(libc::MADV_HUGEPAGE); // a wish: without it the copy is only slower
    }
    // A child that is forked for an exec has no business with it, and must not keep it from being fenced.
    mapping.advise(libc::MADV_DONTFORK);
    if let Some(node) = numa_node {
        mapping.prefer_node(node).map_err(failed)?;
    }
    let backing = fd.map(|fd| Backing { fd, offset: 0 });
    Ok(Registered { memory: Arc::new(mapping), backing, writable: true })
}

fn memfd(bytes: usize, huge_pages: HugePages) -> io::Result<OwnedFd> {
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let mut len = bytes as u64;
    if huge_pages == HugePages::Require {
        flags |= libc::MFD_HUGETLB;
        len = len.next_multiple_of(2 << 20);
    }
    // SAFETY: a constant, terminated name; the call makes a descriptor and touches no memory of ours.
    let fd = unsafe { libc::memfd_create(c"kvasir-transfer".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let len = i64::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    // SAFETY: a plain call on our own descriptor.
    if unsafe { libc::ftruncate(fd.as_raw_fd(), len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: as above.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

fn map_file(file: File, offset: u64, len: usize, writable: bool) -> Result<Registered, Error> {
    if len == 0 {
        return Err(empty());
    }
    let failed = |source| Error::Memory { bytes: len, source: Arc::new(source) };
    let size = file.metadata().map_err(failed)?.len();
    if offset.checked_add(len as u64).is_none_or(|end| end > size) {
        let reason = format!("{len} bytes at {offset} are not all inside the file's {size}");
        return Err(Error::Config { setting: "memory", reason });
    }
    let fd = OwnedFd::from(file);
    let mapping = Mapping::new(len, libc::MAP_SHARED, Some((&fd, offset)), writable).map_err(failed)?;
    // A file that may be cut short is not for others to map: touching it beyond its end would kill them.
    let backing = is_sealed(&fd).then_some(Backing { fd, offset });
    Ok(Registered { memory: Arc::new(mapping), backing, writable })
}

/// Whether a file can never become shorter: a memfd made so.
fn is_sealed(fd: &OwnedFd) -> bool {
    // SAFETY: a plain call on our own descriptor.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// A mapping of our own, unmapped when nobody holds it any more.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread; it is unmapped only on drop, when no handle is left. All access is by raw
// copies whose exclusion is the callers' block ownership, as `HostMemory` states.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: usize, flags: libc::c_int, file: Option<(&OwnedFd, u64)>, writable: bool) -> io::Result<Self> {
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let (fd, offset) = file.map_or((-1, 0), |(fd, offset)| (fd.as_raw_fd(), offset));
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags | libc::MAP_NORESERVE, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    fn advise(&self, advice: libc::c_int) {
        // SAFETY: exactly our own mapping; these advices change no contents.
        unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, advice) };
    }

    /// Asks for pages of one NUMA node, others if it has none left.
    fn prefer_node(&self, node: u32) -> io::Result<()> {
        const MPOL_PREFERRED: libc::c_long = 1;
        const BITS: usize = libc::c_ulong::BITS as usize;
        let mut mask = [0 as libc::c_ulong; 1024 / BITS];
        let word = mask.get_mut(node as usize / BITS).ok_or(io::ErrorKind::InvalidInput)?;
        *word = 1 << (node as usize % BITS);
        // SAFETY: our own mapping and a mask of 1024 bits, alive during the call; the kernel wants one bit more counted.
        let rc = unsafe {
            libc::syscall(libc::SYS_mbind, self.base.as_ptr(), self.len, MPOL_PREFERRED, mask.as_ptr(), 1025, 0)
        };
        if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no handle, so no user, is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

impl HostMemory for Mapping {
    fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom, Write};

    use super::*;

    #[test]
    fn an_allocation_is_zeroed_aligned_and_can_be_mapped_by_others() {
        let made = Memory::Allocate(Allocation::new(10_000)).realize().unwrap();
        assert_eq!(made.memory.base() as usize % 64, 0);
        assert_eq!(made.memory.len(), 10_000);
        // SAFETY: inside the mapping, written by nobody else.
        let bytes = unsafe { std::slice::from_raw_parts(made.memory.base(), 10_000) };
        assert!(bytes.iter().all(|&byte| byte == 0));
        let mut file = File::from(made.backing.unwrap().fd);
        // SAFETY: inside the mapping; `bytes` is not used any more.
        unsafe { *made.memory.base().add(9_999) = 7 };
        let mut last = [0];
        file.seek(SeekFrom::Start(9_999)).unwrap();
        file.read_exact(&mut last).unwrap();
        assert_eq!(last, [7]);
        assert!(file.set_len(100).is_err(), "sealed against shrinking");
    }

    #[test]
    fn an_allocation_on_a_node_is_had_where_there_is_one() {
        let on = |node| Memory::Allocate(Allocation { numa_node: Some(node), ..Allocation::new(4096) }).realize();
        on(0).unwrap();
        assert!(matches!(on(4000), Err(Error::Memory { .. })));
    }

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        for bytes in [0, usize::MAX / 2] {
            let error = Memory::Allocate(Allocation::new(bytes)).realize().err().unwrap();
            assert!(matches!(error, Error::Config { .. } | Error::Memory { .. }), "{error}");
        }
    }

    #[test]
    fn a_file_is_mapped_as_far_as_it_goes() {
        let path = std::env::temp_dir().join(format!("kvasir-transfer-file-{}", std::process::id()));
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all(&[5; 8192]).unwrap();
        let map =
            |offset, len| Memory::File { file: file.try_clone().unwrap(), offset, len, writable: false }.realize();
        let mapped = map(4096, 4096).unwrap();
        assert!(!mapped.writable);
        // SAFETY: inside the mapping.
        assert_eq!(unsafe { *mapped.memory.base().add(4095) }, 5);
        for (offset, len) in [(4096, 4097), (0, 0), (u64::MAX, 1)] {
            assert!(matches!(map(offset, len), Err(Error::Config { .. })));
        }
    }
}
