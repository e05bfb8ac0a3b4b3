//! Kernels on the device: the image that fits it, functions by name, and launching them.
//!
//! Images are built ahead (`scripts/kernels`, sources in `kernels/`) and travel in the binary: machine code for compute
//! capabilities 8.x and 9.x, and PTX, which the driver turns into machine code for whatever comes later. They are packed
//! (gzip): machine code shrinks to a fifth.

use std::{
    cell::RefCell,
    collections::HashMap,
    ffi::{CString, c_void},
    io::Read,
    ptr,
    sync::Arc,
};

use cudarc::driver::sys;

use super::{
    abi,
    driver::{Context, Pinned, Stream},
};
use crate::Error;

const SM_80: &[u8] = include_bytes!("../../kernels/built/sm_80.cubin.gz");
const SM_90: &[u8] = include_bytes!("../../kernels/built/sm_90.cubin.gz");
const PTX: &[u8] = include_bytes!("../../kernels/built/compute_80.ptx.gz");

/// The image for a compute capability: machine code runs on later devices of the same generation, PTX on all later ones.
fn image(capability: (u32, u32)) -> Option<(&'static str, &'static [u8])> {
    match capability {
        (0..=7, _) => None,
        (8, _) => Some(("sm_80.cubin", SM_80)),
        (9, _) => Some(("sm_90.cubin", SM_90)),
        _ => Some(("compute_80.ptx", PTX)),
    }
}

fn unpack(packed: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut image = Vec::new();
    flate2::read::GzDecoder::new(packed).read_to_end(&mut image)?;
    Ok(image)
}

/// The kernels, loaded.
pub(super) struct Module {
    raw: sys::CUmodule,
    context: Arc<Context>,
    functions: RefCell<HashMap<String, Function>>,
}

// SAFETY: a module and its functions may be used from any thread that has made their context current; the map is only
// ever used by the thread that owns this.
unsafe impl Send for Module {}

/// One kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function {
    raw: sys::CUfunction,
    /// Bytes of dynamic shared memory that it asks for.
    shared: u32,
}

// SAFETY: a handle, used as its module is.
unsafe impl Send for Function {}
// SAFETY: as above, and never written.
unsafe impl Sync for Function {}

impl Module {
    /// Loads the image for the device, and compares how large both sides think arguments are.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, Error> {
        let refused = |reason| Error::Kernels { device: format!("cuda:{}", context.ordinal), reason };
        let (major, minor) = context.capability;
        let Some((name, image)) = image(context.capability) else {
            return Err(refused(format!("compute capability {major}.{minor}, but kernels need at least 8.0")));
        };
        let mut image = unpack(image).map_err(|error| refused(format!("{name} can't be unpacked: {error}")))?;
        // The driver takes PTX as text that ends with a zero.
        image.push(0);
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle; the image is whole and lives until the call returns.
        let loaded =
            context.check(unsafe { sys::cuModuleLoadData(&raw mut raw, image.as_ptr().cast()) }, "cuModuleLoadData");
        loaded.map_err(|error| refused(format!("{name} can't be loaded: {error}")))?;
        let module = Self { raw, context: Arc::clone(context), functions: RefCell::default() };
        let theirs = module.words("kvasir_abi_sizes")?;
        if theirs != abi::SIZES {
            let reason = format!(
                "{name} was built from other sources: its arguments have sizes {theirs:?}, not {:?}",
                abi::SIZES
            );
            return Err(refused(reason));
        }
        Ok(module)
    }

    /// The kernel of that name, which asks for so much dynamic shared memory.
    pub(super) fn function(&self, name: &str, shared: usize) -> Result<Function, Error> {
        if let Some(function) = self.functions.borrow().get(name) {
            return Ok(Function { shared: u32::try_from(shared).unwrap_or(u32::MAX), ..*function });
        }
        let device = || format!("cuda:{}", self.context.ordinal);
        let shared = u32::try_from(shared).unwrap_or(u32::MAX);
        if shared > self.context.shared_bytes {
            let room = self.context.shared_bytes;
            let what = format!("{name} asks for {shared} bytes of shared memory, a block has {room} at most");
            return Err(Error::NotOnDevice { device: device(), what });
        }
        let missing = |error: Error| Error::Kernels { device: device(), reason: format!("no kernel {name}: {error}") };
        let text = CString::new(name).unwrap_or_default();
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle; the name ends with a zero.
        let found = unsafe { sys::cuModuleGetFunction(&raw mut raw, self.raw, text.as_ptr()) };
        self.context.check(found, "cuModuleGetFunction").map_err(missing)?;
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // Up to 48 KiB may be had without asking.
        let most = shared.max(48 << 10).min(self.context.shared_bytes);
        // SAFETY: the function just found.
        let asked = unsafe { sys::cuFuncSetAttribute(raw, which, most.cast_signed()) };
        self.context.check(asked, "cuFuncSetAttribute")?;
        let function = Function { raw, shared };
        self.functions.borrow_mut().insert(name.to_owned(), function);
        Ok(function)
    }

    /// A table of the module.
    fn words(&self, name: &str) -> Result<Vec<u32>, Error> {
        let text = CString::new(name).unwrap_or_default();
        let (mut at, mut bytes) = (0, 0);
        // SAFETY: writes an address and a size; the name ends with a zero.
        let found = unsafe { sys::cuModuleGetGlobal_v2(&raw mut at, &raw mut bytes, self.raw, text.as_ptr()) };
        self.context.check(found, "cuModuleGetGlobal")?;
        let stream = Stream::new(&self.context)?;
        let mut words = Pinned::<u32>::new(&self.context, bytes / 4)?;
        // SAFETY: the table is that long, and so is the room for it, which lives until the wait is over.
        unsafe { stream.download(words.as_ptr().cast(), at, bytes / 4 * 4)? };
        stream.wait()?;
        Ok(words.slice().to_vec())
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: loaded by us; functions are used by those who own this.
        let _ = unsafe { sys::cuModuleUnload(self.raw) };
    }
}

impl Stream {
    /// Starts a kernel. A grid without blocks is nothing to do.
    pub(super) fn launch<A: abi::Args>(
        &self,
        function: Function,
        grid: [usize; 3],
        threads: u32,
        args: &A,
    ) -> Result<(), Error> {
        if grid.contains(&0) {
            return Ok(());
        }
        // x may be 2³¹ - 1, the others 65535: what is larger, the driver refuses.
        let [x, y, z] = grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let mut list: [*mut c_void; 1] = [ptr::from_ref(args).cast_mut().cast()];
        // SAFETY: the kernel takes exactly one argument of this type (sizes are compared when a module is loaded), copied
        // before the call returns. What it points at are buffers of the backend that launches it, which lives until the
        // stream has been waited for.
        let started = unsafe {
            sys::cuLaunchKernel(
                function.raw,
                x,
                y,
                z,
                threads,
                1,
                1,
                function.shared,
                self.raw,
                list.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.context.check(started, "cuLaunchKernel")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_gets_what_it_can_run() {
        let name = |capability| image(capability).map(|(name, _)| name);
        assert_eq!(name((7, 5)), None);
        assert_eq!((name((8, 0)), name((8, 9))), (Some("sm_80.cubin"), Some("sm_80.cubin")));
        assert_eq!((name((9, 0)), name((10, 3))), (Some("sm_90.cubin"), Some("compute_80.ptx")));
    }
}
