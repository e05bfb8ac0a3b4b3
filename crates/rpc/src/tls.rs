//! Mutual TLS: who shows what, who believes whom, and reading it all again when it changes.
//!
//! Every process is called by some and calls others, so each shows its certificate in both roles. Who is believed is decided
//! by the **authority** alone, and by one **name** that all of the cluster's certificates bear: members are found by the
//! addresses they have told etcd, and an address (a pod's, say) is new with each start, so no certificate could name it, and
//! a name from DNS would prove only what etcd and DNS say. What is to be proved is "one of us", and that is what the
//! authority signs. So it must be the cluster's own.
//!
//! TLS 1.3 only, no tickets and no resumption: each connection proves anew who is at either end, with the files as they are
//! then. What was connected stays so.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio_rustls::rustls::{
    self, AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::ring,
    pki_types::ServerName,
    server::WebPkiClientVerifier,
    version::TLS13,
};

use crate::files::{self, Files};

/// The name that certificates bear unless another is set.
const NAME: &str = "kvasir";
/// What is spoken inside, said in the handshake: a certificate's holder can't be led to another service of its.
const PROTOCOL: &[u8] = b"h2";

/// Certificates for calls between processes. Files are PEM, and read again when they change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// This process's certificate, and those between it and the authority. If it limits its use, it must allow both that of
    /// a client and that of a server.
    pub certificate: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// The authorities, one of which every certificate must come from: the cluster's own, as whoever has a certificate of
    /// theirs is let in. More than one while they change.
    pub authority: PathBuf,
    /// The name that the certificates of those who are called must bear (a DNS name among its alternative names), whatever
    /// their address is. Default kvasir.
    #[serde(default = "name")]
    pub server_name: String,
}

impl TlsConfig {
    /// With the usual name.
    pub fn new(certificate: PathBuf, key: PathBuf, authority: PathBuf) -> Self {
        Self { certificate, key, authority, server_name: name() }
    }
}

fn name() -> String {
    NAME.to_owned()
}

/// What of the configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that can't be read, or is not what it should be.
    #[error("rpc.tls.{what}: {}: {reason}", path.display())]
    File {
        /// Which setting.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No name of a host.
    #[error("rpc.tls.server_name: {0:?} is no DNS name")]
    Name(String),
    /// Some of the three files without the others.
    #[error("{0} is set, and {1} is not: a certificate, its key and the authority belong together")]
    Half(String, String),
}

/// What is shown and believed now. Written by the task that reads the files again; read by every new connection.
pub(crate) struct Tls {
    config: TlsConfig,
    name: ServerName<'static>,
    /// Leaf lock, held for a copy of two pointers.
    shown: Mutex<Shown>,
}

#[derive(Clone)]
pub(crate) struct Shown {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
}

impl Tls {
    pub(crate) fn open(config: &TlsConfig) -> Result<(Self, Files), Error> {
        let name = ServerName::try_from(config.server_name.clone());
        let name = match name {
            Ok(name @ ServerName::DnsName(_)) => name,
            _ => return Err(Error::Name(config.server_name.clone())),
        };
        let files = Files::now([&config.certificate, &config.key, &config.authority].map(PathBuf::clone));
        let shown = Mutex::new(read(config)?);
        Ok((Self { config: config.clone(), name, shown }, files))
    }

    pub(crate) fn shown(&self) -> Shown {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn name(&self) -> &ServerName<'static> {
        &self.name
    }

    /// Keeps it what the files hold. Never ends.
    pub(crate) async fn keep(self: Arc<Self>, mut files: Files) {
        loop {
            files.changed().await;
            let config = self.config.clone();
            match tokio::task::spawn_blocking(move || read(&config)).await {
                Ok(Ok(new)) => {
                    *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = new;
                    tracing::info!(certificate = %self.config.certificate.display(), "certificates for calls read again");
                }
                // Perhaps only some of them have been exchanged yet: tried again when the others change.
                Ok(Err(error)) => tracing::warn!(%error, "certificates for calls stay as they were"),
                Err(error) => tracing::warn!(%error, "certificates for calls stay as they were"),
            }
        }
    }
}

fn read(config: &TlsConfig) -> Result<Shown, Error> {
    fn wrong(what: &'static str, path: &Path) -> impl Fn(&dyn ToString) -> Error {
        move |reason| Error::File { what, path: path.to_owned(), reason: reason.to_string() }
    }
    let TlsConfig { certificate, key, authority, .. } = config;
    let chain = files::certificates(certificate).map_err(|reason| wrong("certificate", certificate)(&reason))?;
    let secret = files::private_key(key).map_err(|reason| wrong("key", key)(&reason))?;
    let untrusted = wrong("authority", authority);
    let mut roots = RootCertStore::empty();
    for root in files::certificates(authority).map_err(|reason| untrusted(&reason))? {
        roots.add(root).map_err(|error| untrusted(&error))?;
    }
    let (roots, provider) = (Arc::new(roots), Arc::new(ring::default_provider()));
    let servers = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider)).build();
    let clients = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
    let mismatch = |error: rustls::Error| wrong("key", key)(&format!("not the certificate's: {error}"));
    let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(mismatch)?
        .with_webpki_verifier(servers.map_err(|error| untrusted(&error))?)
        .with_client_auth_cert(chain.clone(), secret.clone_key())
        .map_err(mismatch)?;
    client.alpn_protocols = vec![PROTOCOL.to_vec()];
    client.resumption = Resumption::disabled();
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(mismatch)?
        .with_client_cert_verifier(clients.map_err(|error| untrusted(&error))?)
        .with_single_cert(chain, secret)
        .map_err(mismatch)?;
    server.alpn_protocols = vec![PROTOCOL.to_vec()];
    server.send_tls13_tickets = 0;
    Ok(Shown { client: Arc::new(client), server: Arc::new(server) })
}

/// The same error, in words that say what to do about it, where it is one of trust.
pub(crate) fn explained(error: io::Error) -> io::Error {
    use rustls::Error as Tls;
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<Tls>()) else { return error };
    let why = match tls {
        Tls::InvalidMessage(_) => "the other side does not speak TLS: rpc.tls must be set on both or on neither".to_owned(),
        Tls::NoCertificatesPresented => "the other side shows no certificate: rpc.tls must be set there".to_owned(),
        // A bad signature: an authority of the same name.
        Tls::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "the other side's certificate is not from one of rpc.tls.authority".to_owned()
        }
        Tls::InvalidCertificate(CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }) => {
            "the other side's certificate does not bear the name in rpc.tls.server_name".to_owned()
        }
        Tls::InvalidCertificate(reason) => format!("the other side's certificate is not accepted: {reason}"),
        Tls::AlertReceived(
            reason @ (AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError // a signature that does not fit: an authority of the same name
            | AlertDescription::CertificateRequired),
        ) => format!(
            "the other side does not accept this process's certificate ({reason:?}): rpc.tls.certificate must be from an \
             authority that it has, for clients and servers, and not out of date"
        ),
        other => format!("no TLS with the other side: {other}"),
    };
    io::Error::new(error.kind(), why)
}
