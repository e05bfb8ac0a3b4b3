//! libucp, looked up at run time: UCX's transports (RDMA, CUDA) where they are installed, a clear word where not.
//!
//! Nothing links against UCX, so one binary starts on every machine. This crate holds no logic: it finds the library and
//! the symbols. The `ucx` transport of `kvasir-transfer` will be built on it; until then it can say which version is there.

#![expect(unsafe_code, reason = "loads a C library and calls it")]

use std::{
    ffi::{CStr, c_char},
    fmt,
};

/// File names under which libucp is looked for, in order, by the dynamic linker's rules (`LD_LIBRARY_PATH` first).
const NAMES: [&str; 2] = ["libucp.so.0", "libucp.so"];

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
    /// The library is there, but is not the one expected.
    #[error("{name} has no symbol {symbol}")]
    MissingSymbol {
        /// Which file.
        name: &'static str,
        /// Which symbol.
        symbol: &'static str,
        /// The linker's word.
        #[source]
        source: libloading::Error,
    },
}

/// libucp, loaded and kept loaded while this lives.
pub struct Library {
    name: &'static str,
    get_version_string: unsafe extern "C" fn() -> *const c_char,
    // The functions above are valid while this is.
    _library: libloading::Library,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library").field("name", &self.name).field("version", &self.version()).finish()
    }
}

impl Library {
    /// Finds libucp and the symbols used here.
    ///
    /// # Errors
    /// See [`Error`]; both say what was looked for.
    pub fn load() -> Result<Self, Error> {
        Self::load_any(&NAMES)
    }

    fn load_any(names: &[&'static str]) -> Result<Self, Error> {
        let mut first_error = None;
        for &name in names {
            // SAFETY: libucp's initialisers only read the environment and register its modules; they may run at any time.
            match unsafe { libloading::Library::new(name) } {
                Ok(library) => return Self::resolve(name, library),
                Err(error) => _ = first_error.get_or_insert(error),
            }
        }
        let source = first_error.unwrap_or(libloading::Error::DlOpenUnknown);
        Err(Error::NotFound { tried: names.join(", "), source })
    }

    fn resolve(name: &'static str, library: libloading::Library) -> Result<Self, Error> {
        const VERSION: &str = "ucp_get_version_string";
        type GetVersionString = unsafe extern "C" fn() -> *const c_char;
        // SAFETY: the type is the declaration in ucp_api.h: `const char *ucp_get_version_string(void)`.
        let get_version_string = unsafe { library.get::<GetVersionString>(VERSION.as_bytes()) }
            .map(|symbol| *symbol)
            .map_err(|source| Error::MissingSymbol { name, symbol: VERSION, source })?;
        Ok(Self { name, get_version_string, _library: library })
    }

    /// The library's version, e.g. `1.13.1`.
    pub fn version(&self) -> String {
        // SAFETY: takes nothing, may be called at any time, and the library is loaded while `self` lives.
        let text = unsafe { (self.get_version_string)() };
        if text.is_null() {
            return "unknown".into();
        }
        // SAFETY: ucp_api.h: returns a constant, null-terminated string of the library.
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
        assert_eq!(error.to_string(), "libc.so.6 has no symbol ucp_get_version_string");
    }
}
