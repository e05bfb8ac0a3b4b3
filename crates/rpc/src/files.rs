//! Files that may be exchanged while they are used: certificates, keys, lists of keys.
//!
//! They are looked at once a second, which is often enough for what is exchanged once a month, and works where change
//! notifications don't (mounted secrets, which Kubernetes exchanges by a link, network file systems).

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// What tells that a file is another one.
type Stamp = Option<(SystemTime, u64, u64)>;

/// Some files, as they were when they were last looked at.
#[derive(Debug)]
pub struct Files {
    paths: Vec<PathBuf>,
    seen: Vec<Stamp>,
}

impl Files {
    /// These, as they are now: to be called before they are read.
    pub fn now(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let paths: Vec<PathBuf> = paths.into_iter().collect();
        Self { seen: stamps(&paths), paths }
    }

    /// Waits until one of them has changed. Nothing is lost if the future is dropped.
    pub async fn changed(&mut self) {
        loop {
            tokio::time::sleep(LOOK).await;
            let now = stamps(&self.paths);
            if now != self.seen {
                self.seen = now;
                return;
            }
        }
    }
}

fn stamps(paths: &[PathBuf]) -> Vec<Stamp> {
    let of = |path: &PathBuf| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
    };
    paths.iter().map(of).collect()
}

/// The certificates in a PEM file, at least one.
///
/// # Errors
/// What is wrong with it.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())?;
    let certificates: Vec<_> = read.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    if certificates.is_empty() { Err("holds no certificate in PEM form".to_owned()) } else { Ok(certificates) }
}

/// The private key in a PEM file.
///
/// # Errors
/// What is wrong with it.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| error.to_string())
}
