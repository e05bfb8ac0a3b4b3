//! Configuration in layers: defaults < file < environment < `--set` < what is set in the cluster while the service runs
//! ([`live`](Base)). One mistake, one line.
//!
//! | layer | form | example |
//! | --- | --- | --- |
//! | defaults | the type's `Default` | |
//! | file | `--config FILE.yaml` | `admin: { listen: 127.0.0.1:9090 }` |
//! | environment | `KVASIR_A__B` | `KVASIR_ADMIN__LISTEN=127.0.0.1:9090` |
//! | flags | `--set a.b=value` | `--set admin.listen=127.0.0.1:9090` |
//!
//! Values of the last two are YAML (`true`, `8`, `[a, b]`, `{x: 1}`); a text that is no YAML, or whose YAML has the wrong
//! type, is taken as it stands, so that `--set id=007` names a service `007`. Sections are merged, all else is replaced.
//!
//! Every layer is checked as it is laid on, so a mistake is blamed on the file, variable or flag that made it:
//! `router.yaml: registry.etc: unknown field `etc` (did you mean `registry.etcd`?), expected `etcd``.

mod layers;
mod live;
mod secret;
mod sections;
mod suggest;

use std::path::PathBuf;

pub use layers::{Layers, Loaded};
pub(crate) use layers::{inlined, section};
pub use live::{Base, Entry, Over, Running, Set};
pub use secret::{is_secret, redacted};
pub use sections::{AdminConfig, LogConfig, LogFormat, ShutdownConfig, TraceConfig};
use serde::{Serialize, de::DeserializeOwned};

/// A service's configuration: a struct with `serde(default, deny_unknown_fields)`, every field public and documented.
///
/// Four keys mean the same in every service and are read by [`crate::main`]: `log` ([`LogConfig`]), `trace` ([`TraceConfig`]),
/// `shutdown` ([`ShutdownConfig`]) and `threads` (of the async runtime; absent or null: one for every core).
pub trait Config: Default + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// The keys that may be changed while the service runs (of a section: all that is in it), and a few words on what
    /// notices: `from the next request on`. All others are read at start.
    const LIVE: &'static [(&'static str, &'static str)] = &[];

    /// Flags of their own for keys that are often said by hand: the flag, its key, and what it does in a few words.
    const FLAGS: &'static [(&'static str, &'static str, &'static str)] = &[];

    /// Checks what the types can't.
    ///
    /// # Errors
    /// One line that names the key and what is allowed.
    fn verify(&self) -> Result<(), String> {
        Ok(())
    }
}

/// A configuration that can't be used. Its text is one line that names the layer, the key and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("--config {}: cannot be read: {reason}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why, in the system's words.
        reason: String,
    },
    /// A layer is not YAML, or not of the form its key needs.
    #[error("{layer}: {reason}")]
    Malformed {
        /// The file, variable or flag.
        layer: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A key that does not exist, or a value that its key does not take.
    #[error("{layer}: {key}: {reason}")]
    Refused {
        /// The file, variable or flag.
        layer: String,
        /// The key, from the root, with dots.
        key: String,
        /// What is wrong and what is allowed.
        reason: String,
    },
}
