//! CUDA's driver API as far as it is needed: a context, streams, events, memory of both sides.
//!
//! The library is looked up at run time (`cudarc`'s `dynamic-loading`): without it nothing here is called beyond
//! [`Context::open`], which says so. Everything that can fail returns a typed error; handles are freed when they are dropped.
//! A context belongs to a thread only while that thread uses it: whoever calls in from another one calls
//! [`Context::enter`] first, and every handle does so when it is dropped.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    fmt,
    marker::PhantomData,
    ptr,
    sync::Arc,
};

use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

use crate::Error;

/// What a device that is emulated calls itself, for tests only: `auto` never takes it.
pub(crate) const EMULATED: &str = "emulated";

/// Every function that is called: an old driver that lacks one is told apart at the door, not by a panic later.
const FUNCTIONS: [&str; 47] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuMemGetInfo_v2",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuEventDestroy_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpy2DAsync_v2",
    "cuMemsetD8Async",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemHostGetDevicePointer_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuModuleGetGlobal_v2",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceTotalMem_v2",
    "cuFuncGetAttribute",
];

/// A device and its context.
pub(crate) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    /// Which of the machine's.
    pub(crate) ordinal: usize,
    /// As the driver calls it.
    pub(crate) name: String,
    /// Compute capability.
    pub(crate) capability: (u32, u32),
    /// Streaming multiprocessors.
    pub(crate) processors: u32,
    /// Bytes of shared memory that a block may ask for.
    pub(crate) shared_bytes: u32,
}

// SAFETY: a CUDA context may be used from any thread that has made it current, by several at a time.
unsafe impl Send for Context {}
// SAFETY: as above; the handle itself is never written after it was made.
unsafe impl Sync for Context {}

impl Context {
    /// The device of that number.
    ///
    /// # Errors
    /// No driver, one that is too old, no such device, or what the driver says.
    pub(crate) fn open(ordinal: usize) -> Result<Arc<Self>, Error> {
        let absent = |reason: String| Error::NoDevice { ordinal, reason };
        let name = format!("cuda:{ordinal}");
        // SAFETY: looks for a shared library by name and opens it; its initialisers are the driver's own.
        if !unsafe { sys::is_culib_present() } {
            return Err(absent("there is no libcuda.so here (it comes with NVIDIA's driver)".to_owned()));
        }
        if let Some(missing) = FUNCTIONS.iter().find(|function| !has(function)) {
            return Err(absent(format!("the driver has no {missing}: it is older than CUDA 12")));
        }
        // SAFETY: the first call, as it must be.
        check(unsafe { sys::cuInit(0) }, &name, "cuInit").map_err(|error| absent(error.to_string()))?;
        let mut count = 0;
        // SAFETY: writes one int.
        check(unsafe { sys::cuDeviceGetCount(&raw mut count) }, &name, "cuDeviceGetCount")?;
        let number = c_int::try_from(ordinal).ok().filter(|&number| number < count);
        let number = number.ok_or_else(|| absent(format!("this machine has {count} CUDA devices")))?;
        let mut device = 0;
        // SAFETY: writes one handle; the number is below the count.
        check(unsafe { sys::cuDeviceGet(&raw mut device, number) }, &name, "cuDeviceGet")?;
        let attribute = |which: CUdevice_attribute| {
            let mut value: c_int = 0;
            // SAFETY: writes one int; the device is one that the driver named.
            let result = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) };
            check(result, &name, "cuDeviceGetAttribute").map(|()| u32::try_from(value).unwrap_or(0))
        };
        let capability = (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let processors = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1);
        let shared_bytes = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let mut text = [0; 128];
        // SAFETY: writes at most that many bytes, a zero at their end.
        check(unsafe { sys::cuDeviceGetName(text.as_mut_ptr(), 127, device) }, &name, "cuDeviceGetName")?;
        // SAFETY: the buffer ends with a zero that nobody has written over.
        let called = unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned();
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle; released once, when this is dropped.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) }, &name, "cuDevicePrimaryCtxRetain")?;
        let context = Self { device, raw, ordinal, name: called, capability, processors, shared_bytes };
        context.enter()?;
        Ok(Arc::new(context))
    }

    /// Whether there is no device behind it, only a program that does as one would.
    pub(crate) fn is_emulated(&self) -> bool {
        self.name.starts_with(EMULATED)
    }

    /// Makes it the calling thread's.
    pub(crate) fn enter(&self) -> Result<(), Error> {
        // SAFETY: the context lives as long as this.
        self.check(unsafe { sys::cuCtxSetCurrent(self.raw) }, "cuCtxSetCurrent")
    }

    /// Bytes that are free, and all there are.
    pub(crate) fn memory(&self) -> Result<(usize, usize), Error> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two sizes; the context is current.
        self.check(unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }, "cuMemGetInfo")?;
        Ok((free, total))
    }

    pub(super) fn check(&self, result: CUresult, call: &'static str) -> Result<(), Error> {
        check(result, &format_args!("cuda:{}", self.ordinal), call)
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("ordinal", &self.ordinal).field("name", &self.name).finish_non_exhaustive()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once; every handle made in it holds this, so none is left.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Whether the driver has a function.
fn has(function: &str) -> bool {
    // SAFETY: the library was found before; the symbol is only looked up, not called.
    unsafe { sys::culib().get::<unsafe extern "C" fn()>(function.as_bytes()).is_ok() }
}

fn check(result: CUresult, device: &dyn fmt::Display, call: &'static str) -> Result<(), Error> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (device, reason) = (device.to_string(), text(result));
    Err(if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        Error::DeviceOutOfMemory { device, call }
    } else {
        Error::Device { device, call, reason }
    })
}

/// What the driver calls an error.
fn text(result: CUresult) -> String {
    let (mut name, mut long) = (ptr::null(), ptr::null());
    // SAFETY: each writes the address of a string that lives for ever, or leaves it null.
    unsafe {
        let _ = sys::cuGetErrorName(result, &raw mut name);
        let _ = sys::cuGetErrorString(result, &raw mut long);
        let read = |text: *const c_char| {
            if text.is_null() { "unknown".into() } else { CStr::from_ptr(text).to_string_lossy() }
        };
        format!("{} ({}): {}", read(name), result as u32, read(long))
    }
}

/// Rows of bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) width: usize,
    /// From row to row of what is copied.
    pub(crate) from_pitch: usize,
    pub(crate) count: usize,
}

/// An order in which things happen on the device.
pub(crate) struct Stream {
    pub(super) raw: sys::CUstream,
    pub(super) context: Arc<Context>,
}

// SAFETY: a stream may be used from any thread whose current context is its own.
unsafe impl Send for Stream {}

impl Stream {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, Error> {
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle; 1 is CU_STREAM_NON_BLOCKING, 0 the usual priority.
        context.check(unsafe { sys::cuStreamCreateWithPriority(&raw mut raw, 1, 0) }, "cuStreamCreate")?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    /// Waits until all of it is done.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        // SAFETY: a stream of ours.
        self.context.check(unsafe { sys::cuStreamSynchronize(self.raw) }, "cuStreamSynchronize")
    }

    /// Whether what is put in becomes a graph instead of running.
    pub(crate) fn is_capturing(&self) -> Result<bool, Error> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: a stream of ours; writes the status.
        self.context.check(unsafe { sys::cuStreamIsCapturing(self.raw, &raw mut status) }, "cuStreamIsCapturing")?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// What is put in from now on waits for the event.
    pub(crate) fn after(&self, event: &Event) -> Result<(), Error> {
        // SAFETY: both are ours.
        self.context.check(unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) }, "cuStreamWaitEvent")
    }

    /// Copies from host memory; in order with the rest, and complete for the host only where that is waited for.
    ///
    /// # Safety
    /// `from` stays valid and unchanged for `bytes` bytes until the stream has got there.
    pub(crate) unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise; `to` is a buffer of ours.
        self.context.check(unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.raw) }, "cuMemcpyHtoD")
    }

    /// Copies rows from host memory to rows behind one another.
    ///
    /// # Safety
    /// As for [`Stream::upload`], of every row.
    pub(crate) unsafe fn upload_rows(&self, to: u64, from: *const u8, rows: Rows) -> Result<(), Error> {
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: from.cast(),
            srcDevice: 0,
            srcArray: ptr::null_mut(),
            srcPitch: rows.from_pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: to,
            dstArray: ptr::null_mut(),
            dstPitch: rows.width,
            WidthInBytes: rows.width,
            Height: rows.count,
        };
        // SAFETY: the caller's promise; `to` is a buffer of ours.
        self.context.check(unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, self.raw) }, "cuMemcpy2D")
    }

    /// Copies to host memory.
    ///
    /// # Safety
    /// `to` stays valid for `bytes` bytes, and nobody else touches them, until the stream has got there.
    pub(crate) unsafe fn download(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise; `from` is a buffer of ours.
        self.context.check(unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.raw) }, "cuMemcpyDtoH")
    }

    /// Copies on the device.
    ///
    /// # Safety
    /// Both are `bytes` bytes of buffers that live until the stream has got there.
    pub(crate) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        self.context.check(unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.raw) }, "cuMemcpyDtoD")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // What is in it may use memory that goes next.
        let _ = self.wait();
        // SAFETY: a stream of ours.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// A place in a stream.
pub(crate) struct Event {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: as streams.
unsafe impl Send for Event {}

impl Event {
    /// One that takes no time down: cheaper.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, Error> {
        Self::with_flags(context, 2) // CU_EVENT_DISABLE_TIMING
    }

    /// One that does.
    pub(crate) fn timed(context: &Arc<Context>) -> Result<Self, Error> {
        Self::with_flags(context, 0)
    }

    fn with_flags(context: &Arc<Context>, flags: u32) -> Result<Self, Error> {
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle.
        context.check(unsafe { sys::cuEventCreate(&raw mut raw, flags) }, "cuEventCreate")?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    /// Moves it to the end of what is in the stream now.
    pub(crate) fn record(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: both are ours.
        self.context.check(unsafe { sys::cuEventRecord(self.raw, stream.raw) }, "cuEventRecord")
    }

    /// Waits until the stream has passed it.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        // SAFETY: ours.
        self.context.check(unsafe { sys::cuEventSynchronize(self.raw) }, "cuEventSynchronize")
    }

    /// Milliseconds since an earlier one, both timed and passed.
    pub(crate) fn since(&self, start: &Self) -> Result<f64, Error> {
        let mut milliseconds = 0.0;
        // SAFETY: writes one float; both are ours.
        let result = unsafe { sys::cuEventElapsedTime(&raw mut milliseconds, start.raw, self.raw) };
        self.context.check(result, "cuEventElapsedTime").map(|()| f64::from(milliseconds))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: ours.
        let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}

/// Memory of the device. Not initialised.
pub(crate) struct Buffer {
    /// Its address there.
    pub(crate) at: u64,
    bytes: usize,
    context: Arc<Context>,
}

impl Buffer {
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        let mut at = 0;
        let bytes = bytes.max(256);
        // SAFETY: writes one address.
        context.check(unsafe { sys::cuMemAlloc_v2(&raw mut at, bytes) }, "cuMemAlloc")?;
        Ok(Self { at, bytes, context: Arc::clone(context) })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sets every byte.
    pub(crate) fn fill(&self, byte: u8, stream: &Stream) -> Result<(), Error> {
        // SAFETY: all of this buffer.
        let result = unsafe { sys::cuMemsetD8Async(self.at, byte, self.bytes, stream.raw) };
        self.context.check(result, "cuMemsetD8")
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: ours; the driver waits for what uses it.
        let _ = unsafe { sys::cuMemFree_v2(self.at) };
    }
}

/// Host memory that the device reads and writes directly.
pub(crate) struct Pinned<T> {
    base: *mut T,
    len: usize,
    context: Arc<Context>,
    of: PhantomData<T>,
}

// SAFETY: it is a box of plain numbers.
unsafe impl<T: Send> Send for Pinned<T> {}

/// Types of which every pattern of bits is a value.
///
/// # Safety
/// Just that.
pub(crate) unsafe trait Plain: Copy + Default + 'static {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for u64 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}

impl<T: Plain> Pinned<T> {
    /// Room for `len`, zeroed.
    pub(crate) fn new(context: &Arc<Context>, len: usize) -> Result<Self, Error> {
        let len = len.max(1);
        let mut base: *mut c_void = ptr::null_mut();
        // SAFETY: writes one address.
        context.check(unsafe { sys::cuMemHostAlloc(&raw mut base, len * size_of::<T>(), 0) }, "cuMemHostAlloc")?;
        // SAFETY: that many bytes, just given to us, page-aligned.
        unsafe { ptr::write_bytes(base.cast::<u8>(), 0, len * size_of::<T>()) };
        Ok(Self { base: base.cast(), len, context: Arc::clone(context), of: PhantomData })
    }

    /// For writing, while the device does not use it.
    pub(crate) fn slice(&mut self) -> &mut [T] {
        // SAFETY: zeroed, ours, and any bits are a value.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.len) }
    }

    pub(crate) fn as_ptr(&self) -> *mut T {
        self.base
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: ours.
        let _ = unsafe { sys::cuMemFreeHost(self.base.cast()) };
    }
}

/// Somebody else's memory, pinned as long as this lives, or by another context.
pub(crate) struct Registered {
    base: *mut u8,
    /// Where the device sees it.
    pub(crate) at: u64,
    ours: bool,
    context: Arc<Context>,
}

// SAFETY: only the address is used.
unsafe impl Send for Registered {}

impl Registered {
    /// Pins `bytes` bytes from `base` on, for all devices.
    ///
    /// # Safety
    /// They are valid for as long as this lives.
    pub(crate) unsafe fn new(context: &Arc<Context>, base: *mut u8, bytes: usize) -> Result<Self, Error> {
        // SAFETY: the caller's promise. 3: portable and mapped.
        context.check(unsafe { sys::cuMemHostRegister_v2(base.cast(), bytes, 3) }, "cuMemHostRegister")?;
        let this = Self { base, at: 0, ours: true, context: Arc::clone(context) };
        this.found()
    }

    /// What another context has pinned so.
    ///
    /// # Safety
    /// It stays pinned for as long as the device uses what this says.
    pub(crate) unsafe fn by_another(context: &Arc<Context>, base: *mut u8) -> Result<Self, Error> {
        Self { base, at: 0, ours: false, context: Arc::clone(context) }.found()
    }

    fn found(mut self) -> Result<Self, Error> {
        // SAFETY: writes one address; memory that is not pinned is an error.
        let result = unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut self.at, self.base.cast(), 0) };
        self.context.check(result, "cuMemHostGetDevicePointer")?;
        Ok(self)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if !self.ours {
            return;
        }
        let _ = self.context.enter();
        // SAFETY: registered when this was made.
        let _ = unsafe { sys::cuMemHostUnregister(self.base.cast()) };
    }
}
