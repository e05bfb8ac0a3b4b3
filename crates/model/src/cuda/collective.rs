//! What ranks on devices hand one another: all-gathers by NCCL, in the stream that computes, so that they are parts of graphs as
//! kernels are.
//!
//! ```text
//! rank's planes or columns ──ncclAllGather──▶ [rank][row][part] ──side_by_side──▶ [row][whole]
//! ```
//!
//! NCCL is looked up at run time, when several devices are asked for. Ranks are threads of one process and meet on the host as
//! well (`group`): to agree on a step before any of them begins it, and to break off together. A rank that breaks off ends
//! everybody's gathers; what they leave behind is not what was to be gathered, so nothing of a step is told to anyone
//! without a look at the group ([`Collective::check`]).

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    ptr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use libloading::Library;

use super::{
    abi::{self, SideBySide},
    driver::{Buffer, Context, Pinned, Stream},
    load::padded,
    module::{Function, Module},
    products::{Out, Planes},
    scratch::{Scratch, Space},
};
use crate::{
    Error,
    cpu::Compute,
    group::{Group, agree_on},
};

/// The library's names.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The oldest that is for CUDA 12 and gathers in graphs.
const OLDEST: c_int = 2_16_00;
/// `ncclUint8`.
const BYTES: c_int = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct Id([u8; 128]);

/// The functions of NCCL that are called.
struct Nccl {
    get_unique_id: unsafe extern "C" fn(*mut Id) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut *mut c_void, c_int, Id, c_int) -> c_int,
    comm_destroy: unsafe extern "C" fn(*mut c_void) -> c_int,
    comm_abort: unsafe extern "C" fn(*mut c_void) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, *mut c_void, *mut c_void) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    version: c_int,
    _library: Library,
}

impl Nccl {
    /// The library, looked up once.
    fn get() -> Result<&'static Self, String> {
        static NCCL: OnceLock<Result<Nccl, String>> = OnceLock::new();
        NCCL.get_or_init(Self::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> Result<Self, String> {
        // SAFETY: opens NVIDIA's library by its name; its initialisers are its own.
        let found = NAMES.into_iter().find_map(|name| unsafe { Library::new(name) }.ok());
        let library = found.ok_or(
            "several devices compute together by NCCL, and there is no libnccl.so.2 here (package libnccl2 of NVIDIA)",
        )?;
        macro_rules! find {
            ($name:literal) => {
                // SAFETY: the type is that of NCCL's header, and the library stays as long as what is found in it.
                *unsafe { library.get($name) }
                    .map_err(|_| format!("libnccl.so.2 has no {}", String::from_utf8_lossy($name)))?
            };
        }
        let get_version: unsafe extern "C" fn(*mut c_int) -> c_int = find!(b"ncclGetVersion");
        let mut version = 0;
        // SAFETY: writes one int.
        let told = unsafe { get_version(&raw mut version) };
        if told != 0 || version < OLDEST {
            return Err(format!("libnccl.so.2 is version {version}, at least {OLDEST} (2.16) is needed"));
        }
        Ok(Self {
            get_unique_id: find!(b"ncclGetUniqueId"),
            comm_init_rank: find!(b"ncclCommInitRank"),
            comm_destroy: find!(b"ncclCommDestroy"),
            comm_abort: find!(b"ncclCommAbort"),
            comm_get_async_error: find!(b"ncclCommGetAsyncError"),
            group_start: find!(b"ncclGroupStart"),
            group_end: find!(b"ncclGroupEnd"),
            all_gather: find!(b"ncclAllGather"),
            get_error_string: find!(b"ncclGetErrorString"),
            version,
            _library: library,
        })
    }

    fn text(&self, status: c_int) -> String {
        // SAFETY: a string that lives for ever.
        let text = unsafe { CStr::from_ptr((self.get_error_string)(status)) };
        format!("{} ({status})", text.to_string_lossy())
    }
}

/// A communicator, until somebody breaks off.
struct Comm(*mut c_void);

// SAFETY: NCCL's communicators may be used from any thread, one at a time: it is behind a lock.
unsafe impl Send for Comm {}

/// A rank's part in gathers.
pub(super) struct Collective {
    group: Arc<dyn Group>,
    side_by_side: Function,
    compute: Compute,
    /// Where there is more than one rank.
    nccl: Option<(&'static Nccl, Arc<Mutex<Option<Comm>>>)>,
}

impl Collective {
    /// This rank's, once all others are there.
    ///
    /// # Errors
    /// No NCCL, an old one, one that cannot connect the devices, or gathers something else than it should.
    pub(super) fn new(
        group: Arc<dyn Group>,
        module: &Module,
        stream: &Stream,
        compute: Compute,
    ) -> Result<Self, Error> {
        let side_by_side = module.function("side_by_side", 0)?;
        if group.place().size == 1 {
            return Ok(Self { group, side_by_side, compute, nccl: None });
        }
        let context = &stream.context;
        let (nccl, comm) = connect(&*group, context)?;
        let comm = Arc::new(Mutex::new(Some(comm)));
        let ours = comm.clone();
        group.on_abort(Box::new(move || {
            if let Some(Comm(raw)) = ours.lock().unwrap_or_else(PoisonError::into_inner).take() {
                // SAFETY: nobody else has it any more.
                let _ = unsafe { (nccl.comm_abort)(raw) };
            }
        }));
        let this = Self { group, side_by_side, compute, nccl: Some((nccl, comm)) };
        this.try_out(context, stream)?;
        tracing::info!(device = context.ordinal, version = nccl.version, "devices are connected by nccl");
        Ok(this)
    }

    /// How many ranks there are.
    pub(super) fn ranks(&self) -> usize {
        self.group.place().size
    }

    /// Whether all ranks go on: asked before anything is launched.
    pub(super) fn agree<T>(&self, mine: Result<T, Error>) -> Result<T, Error> {
        agree_on(&*self.group, mine)
    }

    /// Breaks off, so that nobody waits for this rank.
    pub(super) fn abort(&self, error: &Error) {
        if self.nccl.is_some() {
            self.group.abort(&format!("rank {} has failed: {error}", self.group.place().rank));
        }
    }

    /// Whether what was gathered so far is what it should be.
    ///
    /// # Errors
    /// Somebody broke off, or NCCL has met an error.
    pub(super) fn check(&self) -> Result<(), Error> {
        let Some((nccl, comm)) = &self.nccl else { return Ok(()) };
        self.group.check()?;
        let comm = comm.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Comm(raw)) = &*comm else { return self.group.check() };
        let mut status = 0;
        // SAFETY: writes one int; nobody destroys the communicator meanwhile.
        match unsafe { (nccl.comm_get_async_error)(*raw, &raw mut status) } {
            0 if status == 0 => Ok(()),
            0 => Err(self.failed("a gather", nccl.text(status))),
            other => Err(self.failed("ncclCommGetAsyncError", nccl.text(other))),
        }
    }

    /// Where this rank's columns of what is added to the residual stream go.
    pub(super) fn part(&self, scratch: &Scratch, hidden: usize) -> Out {
        match self.nccl {
            None => Out { at: scratch.at(Space::Change), ld: hidden },
            Some(_) => Out { at: scratch.at(Space::Part), ld: hidden / self.ranks() },
        }
    }

    /// From the columns that [`Collective::part`] has to all of them, in `Change`.
    pub(super) fn change(&self, stream: &Stream, scratch: &Scratch, rows: usize, hidden: usize) -> Result<(), Error> {
        if self.nccl.is_none() {
            return Ok(());
        }
        let part = self.part(scratch, hidden);
        let gathered = scratch.at(Space::Gathered);
        let bytes = 4 * part.ld;
        self.all_gather(stream, &[(part.at, gathered)], rows * bytes)?;
        self.whole(stream, gathered, scratch.at(Space::Change), rows, (bytes, bytes, 4 * hidden))
    }

    /// From this rank's columns of activations, `width` in a row, to all of them.
    pub(super) fn planes(
        &self,
        stream: &Stream,
        scratch: &Scratch,
        part: Planes,
        rows: usize,
        width: usize,
    ) -> Result<Planes, Error> {
        if self.nccl.is_none() {
            return Ok(part);
        }
        let ld = padded(width * self.ranks());
        let whole = Planes { hi: scratch.at(Space::WholeHi), lo: scratch.at(Space::WholeLo), ld };
        let (from_stride, first) = (2 * part.ld, scratch.at(Space::Gathered));
        let second = first + (self.ranks() * rows * from_stride) as u64;
        let all = [(part.hi, first, whole.hi), (part.lo, second, whole.lo)];
        let used = match self.compute {
            Compute::Exact => &all[..],
            Compute::Fast => &all[..1],
        };
        let pairs: Vec<(u64, u64)> = used.iter().map(|&(from, to, _)| (from, to)).collect();
        self.all_gather(stream, &pairs, rows * from_stride)?;
        for &(_, from, to) in used {
            self.whole(stream, from, to, rows, (2 * width, from_stride, 2 * ld))?;
        }
        Ok(whole)
    }

    fn whole(
        &self,
        stream: &Stream,
        from: u64,
        to: u64,
        rows: usize,
        (bytes, from_stride, to_stride): (usize, usize, usize),
    ) -> Result<(), Error> {
        let args = SideBySide {
            from,
            to,
            bytes: bytes as u64,
            from_stride: from_stride as u64,
            to_stride: to_stride as u64,
            rows: rows as u32,
            pad: 0,
        };
        stream.launch(self.side_by_side, [rows, self.ranks(), 1], abi::ROW_THREADS, &args)
    }

    /// `bytes` bytes of every rank at each of the first addresses, to the second one's, rank by rank.
    fn all_gather(&self, stream: &Stream, pairs: &[(u64, u64)], bytes: usize) -> Result<(), Error> {
        let Some((nccl, comm)) = &self.nccl else { return Ok(()) };
        if bytes == 0 {
            return Ok(());
        }
        let comm = comm.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Comm(raw)) = &*comm else {
            self.group.check()?;
            return Err(self.failed("ncclAllGather", "the communicator is gone".to_owned()));
        };
        // SAFETY: opens and closes what is launched as one.
        let mut status = unsafe { (nccl.group_start)() };
        for &(from, to) in pairs {
            if status == 0 {
                let (from, to) =
                    (ptr::with_exposed_provenance(from as usize), ptr::with_exposed_provenance_mut(to as usize));
                // SAFETY: buffers of the backend with room for that (`scratch`), which live until the stream was waited for.
                status = unsafe { (nccl.all_gather)(from, to, bytes, BYTES, *raw, stream.raw.cast()) };
            }
        }
        // SAFETY: as above; in any case.
        let ended = unsafe { (nccl.group_end)() };
        match if status == 0 { ended } else { status } {
            0 => Ok(()),
            status => Err(self.failed("ncclAllGather", nccl.text(status))),
        }
    }

    /// Gathers once, so that devices are connected before it matters, and looks at what came.
    fn try_out(&self, context: &Arc<Context>, stream: &Stream) -> Result<(), Error> {
        const BYTES: usize = 256;
        let (ranks, rank) = (self.ranks(), self.group.place().rank);
        let (mine, all) = (Buffer::new(context, BYTES)?, Buffer::new(context, ranks * BYTES)?);
        let mut seen: Pinned<u8> = Pinned::new(context, ranks * BYTES)?;
        mine.fill(rank as u8 + 1, stream)?;
        let gathered = self.all_gather(stream, &[(mine.at, all.at)], BYTES);
        // SAFETY: pinned memory that is not touched before the stream was waited for.
        let fetched = gathered.and_then(|()| unsafe { stream.download(seen.as_ptr(), all.at, ranks * BYTES) });
        if let Err(error) = &fetched {
            self.abort(error);
        }
        stream.wait()?;
        fetched?;
        self.check()?;
        match seen.slice().iter().enumerate().find(|&(at, &byte)| usize::from(byte) != at / BYTES + 1) {
            None => Ok(()),
            Some((at, byte)) => Err(self.failed("a gather", format!("of rank {} came {byte}", at / BYTES))),
        }
    }

    fn failed(&self, call: &str, reason: String) -> Error {
        let place = self.group.place();
        Error::Rank { rank: place.rank, size: place.size, reason: format!("{call} failed: {reason}") }
    }
}

impl Drop for Collective {
    fn drop(&mut self) {
        let Some((nccl, comm)) = &self.nccl else { return };
        if let Some(Comm(raw)) = comm.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // SAFETY: nobody else has it any more; the stream was waited for.
            let _ = unsafe { (nccl.comm_destroy)(raw) };
        }
    }
}

/// Connects this rank's device with the others'.
fn connect(group: &dyn Group, context: &Context) -> Result<(&'static Nccl, Comm), Error> {
    let place = group.place();
    let absent = |reason: String| Error::NoDevice { ordinal: context.ordinal, reason };
    let nccl = agree_on(group, Nccl::get().map_err(absent))?;
    // The first rank's name for them all goes to the others as 32 numbers, whose bits are kept.
    let mut id = Id([0; 128]);
    let named = if place.rank == 0 {
        // SAFETY: writes one id.
        match unsafe { (nccl.get_unique_id)(&raw mut id) } {
            0 => Ok(()),
            status => Err(absent(format!("ncclGetUniqueId failed: {}", nccl.text(status)))),
        }
    } else {
        Ok(())
    };
    agree_on(group, named)?;
    let mut words: Vec<f32> =
        id.0.as_chunks::<4>().0.iter().map(|word| f32::from_bits(u32::from_ne_bytes(*word))).collect();
    group.all_gather(1, &mut words)?;
    for (word, to) in words.iter().zip(id.0.as_chunks_mut::<4>().0) {
        *to = word.to_bits().to_ne_bytes();
    }
    let mut raw = ptr::null_mut();
    // SAFETY: writes one handle, which is destroyed or aborted once; this thread's context is the device's.
    let status = unsafe { (nccl.comm_init_rank)(&raw mut raw, place.size as c_int, id, place.rank as c_int) };
    let connected = match status {
        0 => Ok(Comm(raw)),
        status => Err(absent(format!("ncclCommInitRank failed: {} (NCCL_DEBUG=WARN says more)", nccl.text(status)))),
    };
    Ok((nccl, agree_on(group, connected)?))
}
