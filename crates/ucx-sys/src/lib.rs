//! libucp, looked up at run time: UCX's transports (RDMA, CUDA) where they are installed, a clear word where not.
//!
//! Nothing links against UCX, so one binary starts on every machine. This crate holds no logic: it finds the library,
//! checks that it is new enough, and hands out its functions as [`Ucp`], a struct of pointers. What they mean is
//! written in UCX's `ucp.h`; the `ucx` transport of `kvasir-transfer` is their one caller. `bindings.rs` is written by
//! `scripts/ucx-bindings`.

#![expect(unsafe_code, reason = "loads a C library and calls it")]

#[expect(
    missing_docs,
    non_camel_case_types,
    clippy::missing_safety_doc,
    clippy::too_many_arguments,
    clippy::undocumented_unsafe_blocks,
    reason = "generated; ucp.h documents it"
)]
mod bindings;

use std::{ffi::CStr, fmt};

pub use bindings::*;

/// File names under which libucp is looked for, in order, by the dynamic linker's rules (`LD_LIBRARY_PATH` first).
const NAMES: [&str; 2] = ["libucp.so.0", "libucp.so"];

/// The version whose headers the bindings were made from: what `ucp_init_version` is told, and the oldest that will do.
/// Later ones know every structure of it, by the field masks.
pub const API_VERSION: (u32, u32) = (1, 13);

/// Why there is no libucp.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No file of any of the names could be loaded.
    #[error("libucp cannot be loaded (tried {tried}); install UCX, e.g. Debian's libucx0, or set LD_LIBRARY_PATH")]
    NotFound {
        /// The names tried.
        tried: String,
        /// The linker's word on the first of them.
        #[source]
        source: libloading::Error,
    },
    /// The library is there, but lacks a function.
    #[error("{name} is no libucp of version {} or newer", version(API_VERSION))]
    MissingSymbol {
        /// Which file.
        name: &'static str,
        /// The linker's word, which names the symbol.
        #[source]
        source: libloading::Error,
    },
    /// An older libucp than the bindings are for.
    #[error("{name} is libucp {}, but {} or newer is needed", version(*found), version(API_VERSION))]
    TooOld {
        /// Which file.
        name: &'static str,
        /// Its version.
        found: (u32, u32),
    },
}

fn version((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

/// libucp, loaded and kept loaded while this lives.
pub struct Library {
    name: &'static str,
    /// Its functions; they stay valid as long as the library value does.
    ucp: Ucp,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library").field("name", &self.name).field("version", &self.version()).finish()
    }
}

impl Library {
    /// Finds libucp, its functions and its version.
    ///
    /// # Errors
    /// See [`Error`]; all say what was looked for.
    pub fn load() -> Result<Self, Error> {
        Self::load_any(&NAMES)
    }

    fn load_any(names: &[&'static str]) -> Result<Self, Error> {
        let mut first_error = None;
        for &name in names {
            // SAFETY: libucp's initialisers only read the environment and register its modules; they may run at any
            // time.
            match unsafe { libloading::Library::new(name) } {
                Ok(library) => return Self::resolve(name, library),
                Err(error) => _ = first_error.get_or_insert(error),
            }
        }
        let source = first_error.unwrap_or(libloading::Error::DlOpenUnknown);
        Err(Error::NotFound { tried: names.join(", "), source })
    }

    fn resolve(name: &'static str, library: libloading::Library) -> Result<Self, Error> {
        // SAFETY: the types are the declarations in ucp.h; a library with all these symbols is a libucp, which keeps
        // its interface within a major version.
        let ucp = unsafe { Ucp::from_library(library) }.map_err(|source| Error::MissingSymbol { name, source })?;
        let library = Self { name, ucp };
        let found = library.number();
        if found < API_VERSION { Err(Error::TooOld { name, found }) } else { Ok(library) }
    }

    /// The library's version as numbers: major, minor.
    pub fn number(&self) -> (u32, u32) {
        let (mut major, mut minor, mut release) = (0, 0, 0);
        // SAFETY: writes three numbers, may be called at any time, and the library is loaded while `self` lives.
        unsafe { self.ucp.ucp_get_version(&raw mut major, &raw mut minor, &raw mut release) };
        (major, minor)
    }

    /// The functions.
    pub fn ucp(&self) -> &Ucp {
        &self.ucp
    }

    /// The library's version, e.g. `1.13.1`.
    pub fn version(&self) -> String {
        // SAFETY: takes nothing, may be called at any time, and the library is loaded while `self` lives.
        let text = unsafe { self.ucp.ucp_get_version_string() };
        if text.is_null() {
            return "unknown".into();
        }
        // SAFETY: ucp.h: returns a constant, null-terminated string of the library.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_says_its_version_or_its_absence_is_explained() {
        match Library::load() {
            Ok(library) => {
                let version = library.version();
                assert!(version.starts_with(|first: char| first.is_ascii_digit()), "{version}");
            }
            Err(error) => assert_eq!(
                error.to_string(),
                "libucp cannot be loaded (tried libucp.so.0, libucp.so); install UCX, e.g. Debian's libucx0, or set \
                 LD_LIBRARY_PATH"
            ),
        }
    }

    #[test]
    fn a_library_that_is_not_there_is_an_error_naming_what_was_tried() {
        let error = Library::load_any(&["libno-such-ucp.so.0", "libno-such-ucp.so"]).unwrap_err();
        assert!(error.to_string().contains("tried libno-such-ucp.so.0, libno-such-ucp.so"), "{error}");
    }

    #[test]
    fn another_library_under_the_name_is_refused_by_the_symbol_it_lacks() {
        let error = Library::load_any(&["libc.so.6"]).unwrap_err();
        assert_eq!(error.to_string(), "libc.so.6 is no libucp of version 1.13 or newer");
        // Which symbol is looked up first is the generator's business; the linker names it.
        assert!(format!("{error:?}").contains("undefined symbol: uc"), "{error:?}");
    }
}
