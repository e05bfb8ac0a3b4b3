//! Products of many rows by cuBLASLt, where it is found: what NVIDIA tuned for every device of theirs, for `fast` arithmetic.
//!
//! ```text
//! out[rows][n] = x[rows][k] · w[n][k]ᵀ, rows one behind the other    as cuBLASLt sees it, column by column:
//!                                                                    D (n × rows) = Wᵀ (k × n, transposed) · X (k × rows)
//! ```
//!
//! Which of its ways is best is found out by trying: the first product of a shape runs each that the library proposes, by the
//! clock of the device, and the fastest is kept for all products of about as many rows. A way that a later number of rows cannot
//! take is replaced by what the library proposes first for it. While a graph is captured nothing is tried; the shape has
//! run without one before. If the library fails, it is left alone from then on: our own kernels compute everything.

use std::{
    collections::HashMap,
    ffi::{c_int, c_void},
    ptr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use libloading::Library;

use super::{
    driver::{Buffer, Context, Event, Stream},
    load::Matrix,
    products::{Out, Planes},
};
use crate::{Error, weights::Dtype};

/// The library's names, the newest first.
const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];
/// Fewer rows than this leave tensor cores waiting for weights, which our own kernels read as fast as memory goes.
const LEAST_ROWS: usize = 129;
/// What the library may use beside operands: as NVIDIA advises for Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;
/// Ways that are tried for a shape, and how often each.
const WAYS: usize = 8;
const ROUNDS: usize = 3;
/// Shapes that are remembered: far more than models have.
const SHAPES: usize = 1024;

/// Of the library's header.
const COMPUTE_32F: c_int = 68;
const R_32F: c_int = 0;
const R_16BF: c_int = 14;
const DESC_TRANSA: c_int = 3;
const PREFERENCE_MAX_WORKSPACE: c_int = 1;

/// `cublasLtMatmulAlgo_t`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Algo([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Proposal {
    algo: Algo,
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

type Handle = *mut c_void;

/// The functions that are called.
struct Lt {
    create: unsafe extern "C" fn(*mut Handle) -> c_int,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    layout_create: unsafe extern "C" fn(*mut Handle, c_int, u64, u64, i64) -> c_int,
    layout_destroy: unsafe extern "C" fn(Handle) -> c_int,
    desc_create: unsafe extern "C" fn(*mut Handle, c_int, c_int) -> c_int,
    desc_set: unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int,
    desc_destroy: unsafe extern "C" fn(Handle) -> c_int,
    preference_create: unsafe extern "C" fn(*mut Handle) -> c_int,
    preference_set: unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int,
    preference_destroy: unsafe extern "C" fn(Handle) -> c_int,
    propose: unsafe extern "C" fn(
        Handle,
        Handle,
        Handle,
        Handle,
        Handle,
        Handle,
        Handle,
        c_int,
        *mut Proposal,
        *mut c_int,
    ) -> c_int,
    multiply: unsafe extern "C" fn(
        Handle,
        Handle,
        *const c_void,
        *const c_void,
        Handle,
        *const c_void,
        Handle,
        *const c_void,
        *const c_void,
        Handle,
        *mut c_void,
        Handle,
        *const Algo,
        *mut c_void,
        usize,
        *mut c_void,
    ) -> c_int,
    version: usize,
    _library: Library,
}

impl Lt {
    /// The library, looked up once.
    fn get() -> Result<&'static Self, String> {
        static LT: OnceLock<Result<Lt, String>> = OnceLock::new();
        LT.get_or_init(Self::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> Result<Self, String> {
        // SAFETY: opens NVIDIA's library by its name; its initialisers are its own.
        let found = NAMES.into_iter().find_map(|name| unsafe { Library::new(name) }.ok());
        let library = found.ok_or("there is no libcublasLt.so.12 or .13 here (package libcublas of CUDA)")?;
        macro_rules! find {
            ($name:literal) => {
                // SAFETY: the type is that of the library's header, and the library stays as long as what is found in it.
                *unsafe { library.get($name) }
                    .map_err(|_| format!("libcublasLt has no {}", String::from_utf8_lossy($name)))?
            };
        }
        let get_version: unsafe extern "C" fn() -> usize = find!(b"cublasLtGetVersion");
        Ok(Self {
            create: find!(b"cublasLtCreate"),
            destroy: find!(b"cublasLtDestroy"),
            layout_create: find!(b"cublasLtMatrixLayoutCreate"),
            layout_destroy: find!(b"cublasLtMatrixLayoutDestroy"),
            desc_create: find!(b"cublasLtMatmulDescCreate"),
            desc_set: find!(b"cublasLtMatmulDescSetAttribute"),
            desc_destroy: find!(b"cublasLtMatmulDescDestroy"),
            preference_create: find!(b"cublasLtMatmulPreferenceCreate"),
            preference_set: find!(b"cublasLtMatmulPreferenceSetAttribute"),
            preference_destroy: find!(b"cublasLtMatmulPreferenceDestroy"),
            propose: find!(b"cublasLtMatmulAlgoGetHeuristic"),
            multiply: find!(b"cublasLtMatmul"),
            // SAFETY: takes nothing and returns a number.
            version: unsafe { get_version() },
            _library: library,
        })
    }
}

/// Why a product was not made: what the library said to which call.
struct Refused(&'static str, c_int);

fn done(status: c_int, call: &'static str) -> Result<(), Refused> {
    if status == 0 { Ok(()) } else { Err(Refused(call, status)) }
}

/// An object of the library's, and what ends it.
struct Object {
    raw: Handle,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
}

impl Object {
    fn new(
        destroy: unsafe extern "C" fn(Handle) -> c_int,
        create: impl FnOnce(*mut Handle) -> c_int,
        call: &'static str,
    ) -> Result<Self, Refused> {
        let mut raw = ptr::null_mut();
        done(create(&raw mut raw), call)?;
        Ok(Self { raw, destroy })
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: the library's own, created by it, and not used any more.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

// SAFETY: handles, used by one thread at a time: whoever drives the backend.
unsafe impl Send for Object {}
// SAFETY: as above; the library allows several threads to use a handle.
unsafe impl Sync for Object {}

/// What a product depends on beside its numbers: rows (rounded up to a power of two), outputs and width.
type Shape = (usize, usize, usize);

/// Products by the library, of one backend.
pub(super) struct Blas {
    lt: &'static Lt,
    handle: Object,
    desc: Object,
    preference: Object,
    workspace: Buffer,
    timed: (Event, Event),
    chosen: Mutex<HashMap<Shape, Algo>>,
    failed: AtomicBool,
    made: AtomicU64,
}

impl Blas {
    /// The library on a device; `None` (and a line in the log) where there is none, or it does not work.
    ///
    /// # Errors
    /// The device's own: no memory for what the library needs beside operands.
    pub(super) fn new(context: &Arc<Context>) -> Result<Option<Self>, Error> {
        let lt = match Lt::get() {
            Ok(lt) => lt,
            Err(why) => {
                tracing::info!(why, "products are our own kernels'");
                return Ok(None);
            }
        };
        let workspace = Buffer::new(context, WORKSPACE)?;
        let timed = (Event::timed(context)?, Event::timed(context)?);
        match Self::prepare(lt) {
            Ok([handle, desc, preference]) => {
                tracing::info!(version = lt.version, "products of many rows are cuBLASLt's");
                let (chosen, failed, made) = (Mutex::default(), AtomicBool::new(false), AtomicU64::new(0));
                Ok(Some(Self { lt, handle, desc, preference, workspace, timed, chosen, failed, made }))
            }
            Err(Refused(call, status)) => {
                tracing::warn!(call, status, "cuBLASLt does not work: products are our own kernels'");
                Ok(None)
            }
        }
    }

    fn prepare(lt: &Lt) -> Result<[Object; 3], Refused> {
        // SAFETY: (of all calls here) objects are written to a handle of ours, and used as the header says.
        unsafe {
            let handle = Object::new(lt.destroy, |raw| (lt.create)(raw), "cublasLtCreate")?;
            let create = |raw| (lt.desc_create)(raw, COMPUTE_32F, R_32F);
            let desc = Object::new(lt.desc_destroy, create, "cublasLtMatmulDescCreate")?;
            let transposed: c_int = 1;
            let set = (lt.desc_set)(desc.raw, DESC_TRANSA, (&raw const transposed).cast(), size_of::<c_int>());
            done(set, "cublasLtMatmulDescSetAttribute")?;
            let create = |raw| (lt.preference_create)(raw);
            let preference = Object::new(lt.preference_destroy, create, "cublasLtMatmulPreferenceCreate")?;
            let most = WORKSPACE as u64;
            let most = (&raw const most).cast();
            let set = (lt.preference_set)(preference.raw, PREFERENCE_MAX_WORKSPACE, most, size_of::<u64>());
            done(set, "cublasLtMatmulPreferenceSetAttribute")?;
            Ok([handle, desc, preference])
        }
    }

    /// Makes a product without its bias, if the library is to and can.
    ///
    /// # Errors
    /// The device's own.
    pub(super) fn multiply(
        &self,
        stream: &Stream,
        w: &Matrix,
        x: Planes,
        rows: usize,
        out: Out,
    ) -> Result<bool, Error> {
        if rows < LEAST_ROWS || w.dtype != Dtype::Bf16 || self.failed.load(Relaxed) {
            return Ok(false);
        }
        match self.product(stream, w, x, rows, out)? {
            Ok(made) => {
                self.made.fetch_add(made.into(), Relaxed);
                Ok(made)
            }
            Err(Refused(call, status)) => {
                self.failed.store(true, Relaxed);
                tracing::warn!(call, status, "cuBLASLt failed: products are our own kernels' from now on");
                Ok(false)
            }
        }
    }

    /// Products made so far.
    pub(super) fn made(&self) -> u64 {
        self.made.load(Relaxed)
    }

    fn product(
        &self,
        stream: &Stream,
        w: &Matrix,
        x: Planes,
        rows: usize,
        out: Out,
    ) -> Result<Result<bool, Refused>, Error> {
        let layout = |dtype, rows: usize, cols: usize, ld: usize| {
            // SAFETY: writes a handle of ours.
            let create = |raw| unsafe { (self.lt.layout_create)(raw, dtype, rows as u64, cols as u64, ld as i64) };
            Object::new(self.lt.layout_destroy, create, "cublasLtMatrixLayoutCreate")
        };
        let layouts = layout(R_16BF, w.ld, w.rows, w.ld)
            .and_then(|a| Ok([a, layout(R_16BF, w.ld, rows, x.ld)?, layout(R_32F, w.rows, rows, out.ld)?]));
        let call = match layouts {
            Ok([a, b, d]) => Call { blas: self, stream, layouts: [a, b, d], at: [w.at, x.hi, out.at] },
            Err(refused) => return Ok(Err(refused)),
        };
        let shape = (rows.next_power_of_two(), w.rows, w.ld);
        let known = self.chosen.lock().unwrap_or_else(PoisonError::into_inner).get(&shape).copied();
        if let Some(algo) = known {
            if call.run(&algo).is_ok() {
                return Ok(Ok(true));
            }
            // Not for this number of rows.
            let first = call.propose(1);
            return Ok(first.and_then(|ways| ways.first().map_or(Ok(false), |way| call.run(&way.algo).map(|()| true))));
        }
        if stream.is_capturing()? {
            return Ok(Ok(false));
        }
        let ways = match call.propose(WAYS) {
            Ok(ways) => ways,
            Err(refused) => return Ok(Err(refused)),
        };
        let Some(best) = call.fastest(&ways)? else { return Ok(Ok(false)) };
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        if chosen.len() < SHAPES {
            chosen.insert(shape, best);
        }
        drop(chosen);
        // The last that was tried may be one that failed half-way.
        Ok(call.run(&best).map(|()| true))
    }
}

/// One product: `D = Aᵀ B`.
struct Call<'a> {
    blas: &'a Blas,
    stream: &'a Stream,
    layouts: [Object; 3],
    at: [u64; 3],
}

impl Call<'_> {
    /// What the library proposes, best first as it thinks.
    fn propose(&self, most: usize) -> Result<Vec<Proposal>, Refused> {
        let mut ways = vec![Proposal::default(); most];
        let mut found = 0;
        let (blas, [a, b, d]) = (self.blas, &self.layouts);
        // SAFETY: objects of the library's, and room for as many proposals as are asked for.
        let status = unsafe {
            (blas.lt.propose)(
                blas.handle.raw,
                blas.desc.raw,
                a.raw,
                b.raw,
                d.raw,
                d.raw,
                blas.preference.raw,
                most as c_int,
                ways.as_mut_ptr(),
                &raw mut found,
            )
        };
        done(status, "cublasLtMatmulAlgoGetHeuristic")?;
        ways.truncate(usize::try_from(found).unwrap_or(0));
        ways.retain(|way| way.state == 0 && way.workspace <= WORKSPACE);
        Ok(ways)
    }

    fn run(&self, algo: &Algo) -> Result<(), Refused> {
        let (one, zero) = (1.0f32, 0.0f32);
        let (blas, [a, b, d], at) = (self.blas, &self.layouts, self.at.map(|at| at as *mut c_void));
        // SAFETY: matrices in device memory of the sizes that the layouts say, which the caller of a product has there; work is
        // in the stream, and so is all that reads or reuses them.
        let status = unsafe {
            (blas.lt.multiply)(
                blas.handle.raw,
                blas.desc.raw,
                (&raw const one).cast(),
                at[0],
                a.raw,
                at[1],
                b.raw,
                (&raw const zero).cast(),
                at[2],
                d.raw,
                at[2],
                d.raw,
                algo,
                blas.workspace.at as *mut c_void,
                WORKSPACE,
                self.stream.raw.cast(),
            )
        };
        done(status, "cublasLtMatmul")
    }

    /// The fastest of some ways, each tried several times; those that cannot be are left out.
    fn fastest(&self, ways: &[Proposal]) -> Result<Option<Algo>, Error> {
        let (start, end) = (&self.blas.timed.0, &self.blas.timed.1);
        let mut best: Option<(f64, Algo)> = None;
        for way in ways {
            if self.run(&way.algo).is_err() {
                continue;
            }
            let mut time = f64::INFINITY;
            for _ in 0..ROUNDS {
                start.record(self.stream)?;
                let ran = self.run(&way.algo);
                end.record(self.stream)?;
                end.wait()?;
                if ran.is_ok() {
                    time = time.min(end.since(start)?);
                }
            }
            if time.is_finite() && best.is_none_or(|(least, _)| time < least) {
                best = Some((time, way.algo));
            }
        }
        Ok(best.map(|(_, algo)| algo))
    }
}
