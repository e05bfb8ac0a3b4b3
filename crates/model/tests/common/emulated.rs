//! A CUDA device that is not there: kernels and driver compiled for this machine, once for all tests.
#![allow(
    unsafe_code,
    dead_code,
    clippy::unwrap_used,
    clippy::allow_attributes,
    reason = "loads a library that was just built, in tests"
)]

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// Where the emulated driver lies, built where nothing has built it yet; other test processes wait for that.
pub fn built() -> PathBuf {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated-cuda");
    std::fs::create_dir_all(&out).unwrap();
    let lock = File::create(out.join("lock")).unwrap();
    lock.lock().unwrap();
    let build = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/emulator/build");
    let built = Command::new(build).arg(&out).output().unwrap();
    assert!(
        built.status.success(),
        "kernels are not built for this machine (g++ 12 or later is needed):\n{}",
        String::from_utf8_lossy(&built.stderr)
    );
    out
}

/// The same for cuBLASLt.
pub fn emulated_cublas() {
    static LOADED: OnceLock<libloading::Library> = OnceLock::new();
    emulated();
    LOADED.get_or_init(|| {
        // SAFETY: built from this repository, as the driver is.
        unsafe { libloading::Library::new(built().join("libcublasLt.so")) }.unwrap()
    });
}

/// The same for NCCL.
pub fn emulated_nccl() {
    static LOADED: OnceLock<libloading::Library> = OnceLock::new();
    emulated();
    LOADED.get_or_init(|| {
        // SAFETY: built from this repository; its initialisers only fill tables.
        unsafe { libloading::Library::new(built().join("libnccl.so")) }.unwrap()
    });
}

/// Sees to it that the driver that is found is the emulated one. Everything that asks for a device calls this first.
///
/// The library is loaded under the name that the real driver has, so whoever looks for that one later finds this.
pub fn emulated() {
    static LOADED: OnceLock<libloading::Library> = OnceLock::new();
    LOADED.get_or_init(|| {
        let out = built();
        // SAFETY: built from this repository; its initialisers only fill tables.
        unsafe { libloading::Library::new(out.join("libcuda.so")) }.unwrap()
    });
}
