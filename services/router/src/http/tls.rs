//! HTTPS: the certificate, and reading it again when it changes.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use kvasir_runtime::chain;
use serde::{Deserialize, Serialize};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::{ClientHello, ResolvesServerCert},
        sign::CertifiedKey,
    },
};
use tracing::{info, warn};

/// Between two looks at the files.
const LOOK: Duration = Duration::from_secs(1);

/// HTTPS.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// A PEM file with the certificate and those between it and the root. With `key`: the HTTP port speaks HTTPS only. Both
    /// files are read again when they change. Default: none, plain HTTP.
    pub cert: Option<PathBuf>,
    /// A PEM file with the certificate's private key.
    pub key: Option<PathBuf>,
}

/// Why HTTPS is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// One file without the other.
    #[error("tls: `cert` and `key` belong together, and only one is set")]
    Half,
    /// A file that can't be read, or is not what it should be.
    #[error("tls.{what}: {}: {reason}", path.display())]
    File {
        /// `cert` or `key`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The two don't go together.
    #[error("tls: the key is not the certificate's")]
    Mismatch(#[source] rustls::Error),
}

/// The files, read.
struct Files {
    cert: PathBuf,
    key: PathBuf,
}

impl Files {
    fn read(&self) -> Result<Arc<CertifiedKey>, TlsError> {
        let file = |what, path: &Path, reason: &dyn ToString| TlsError::File {
            what,
            path: path.to_owned(),
            reason: reason.to_string(),
        };
        let certs = CertificateDer::pem_file_iter(&self.cert).map_err(|error| file("cert", &self.cert, &error))?;
        let certs: Vec<_> = certs.collect::<Result<_, _>>().map_err(|error| file("cert", &self.cert, &error))?;
        if certs.is_empty() {
            return Err(file("cert", &self.cert, &"holds no certificate"));
        }
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| file("key", &self.key, &error))?;
        let certified = CertifiedKey::from_der(certs, key, &ring::default_provider()).map_err(TlsError::Mismatch)?;
        Ok(Arc::new(certified))
    }

    fn stamp(&self) -> [Option<(SystemTime, u64)>; 2] {
        let of = |path: &Path| {
            let metadata = std::fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        };
        [of(&self.cert), of(&self.key)]
    }
}

/// What is shown to clients: what the files held when they were last read well.
#[derive(Debug)]
struct Shown(Mutex<Arc<CertifiedKey>>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// An acceptor of HTTPS connections, and what keeps its certificate new; `None`: plain HTTP.
pub(crate) fn acceptor(
    config: &TlsConfig,
) -> Result<Option<(TlsAcceptor, impl Future<Output = ()> + Send + use<>)>, TlsError> {
    let files = match (&config.cert, &config.key) {
        (None, None) => return Ok(None),
        (Some(cert), Some(key)) => Files { cert: cert.clone(), key: key.clone() },
        _ => return Err(TlsError::Half),
    };
    let stamp = files.stamp();
    let shown = Arc::new(Shown(Mutex::new(files.read()?)));
    let provider = Arc::new(ring::default_provider());
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has what TLS 1.2 and 1.3 need")
        .with_no_client_auth()
        .with_cert_resolver(Arc::clone(&shown) as Arc<dyn ResolvesServerCert>);
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Some((TlsAcceptor::from(Arc::new(server)), watch(files, stamp, shown))))
}

async fn watch(files: Files, mut seen: [Option<(SystemTime, u64)>; 2], shown: Arc<Shown>) {
    let files = Arc::new(files);
    loop {
        tokio::time::sleep(LOOK).await;
        let now = files.stamp();
        if now == seen {
            continue;
        }
        let reader = Arc::clone(&files);
        match tokio::task::spawn_blocking(move || reader.read()).await {
            Ok(Ok(new)) => {
                *shown.0.lock().unwrap_or_else(PoisonError::into_inner) = new;
                info!(cert = %files.cert.display(), "certificate read again");
                seen = now;
            }
            // Perhaps only one of the two has been exchanged yet: tried again, and told when it changes.
            Ok(Err(error)) => {
                warn!(error = chain(&error), "the certificate stays as it was");
                seen = now;
            }
            Err(error) => warn!(%error, "the certificate stays as it was"),
        }
    }
}
