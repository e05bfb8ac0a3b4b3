//! Who is let in, and what the others are told.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{error::Error, fs, path::Path, time::Duration};

use kvasir_proto::v1::{self, decode_client::DecodeClient, decode_server};
use kvasir_rpc::{Config, Rpc, TlsConfig};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tonic::{Request, Response, Status};

/// Says who it is.
struct Named(&'static str);

#[tonic::async_trait]
impl decode_server::Decode for Named {
    type GenerateStream = tokio_stream::Empty<Result<v1::GenerateEvent, Status>>;

    async fn generate(&self, _: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        Err(Status::already_exists(self.0))
    }
}

/// Who signs certificates, and where the files are.
struct Authority {
    dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let issuer = authority(dir.path());
        Self { dir, issuer }
    }

    /// A certificate with that name, in files called by it.
    fn issue(&self, name: &str) -> TlsConfig {
        issue(&self.issuer, self.dir.path(), name)
    }
}

fn authority(dir: &Path) -> Issuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "authority of a test");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    fs::write(dir.join("authority.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    Issuer::new(params, key)
}

fn issue(issuer: &Issuer<'static, KeyPair>, dir: &Path, name: &str) -> TlsConfig {
    let params = CertificateParams::new([name.to_owned()]).unwrap();
    let key = KeyPair::generate().unwrap();
    let signed = params.signed_by(&key, issuer).unwrap();
    let path = |what: &str| dir.join(format!("{name}-{what}.pem"));
    fs::write(path("certificate"), signed.pem()).unwrap();
    fs::write(path("key"), key.serialize_pem()).unwrap();
    TlsConfig::new(path("certificate"), path("key"), dir.join("authority.pem"))
}

fn open(tls: Option<TlsConfig>) -> Rpc {
    let (rpc, _keeping) = Rpc::open(&Config { tls }).unwrap();
    rpc
}

/// Servers of a test; they end with it.
#[derive(Default)]
struct Servers(JoinSet<()>);

impl Servers {
    async fn serve(&mut self, rpc: &Rpc) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let incoming = rpc.incoming(listener);
        let server = kvasir_rpc::server().add_service(decode_server::DecodeServer::new(Named("here")));
        self.0.spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
        address
    }
}

/// What a fresh connection brings: the server's answer, or all that is said of why there is none.
async fn call(rpc: &Rpc, address: &str) -> Result<(), String> {
    let endpoint = kvasir_rpc::endpoint(address).unwrap().connect_timeout(Duration::from_secs(20));
    let mut client = DecodeClient::new(rpc.lazy(&endpoint));
    let status = client.generate(v1::GenerateRequest::default()).await.unwrap_err();
    if status.message() == "here" {
        return Ok(());
    }
    let mut said = status.message().to_owned();
    let mut cause = status.source();
    while let Some(error) = cause {
        said += &format!(": {error}");
        cause = error.source();
    }
    Err(said)
}

#[tokio::test]
async fn processes_with_certificates_of_one_authority_call_one_another_by_whatever_address() {
    let (authority, mut servers) = (Authority::new(), Servers::default());
    let (server, client) = (open(Some(authority.issue("kvasir"))), open(Some(authority.issue("anybody"))));
    let address = servers.serve(&server).await;
    call(&client, &address).await.unwrap();
    call(&client, &address.replace("127.0.0.1", "localhost")).await.unwrap();
    // Whoever connects and says nothing, or nonsense, keeps nobody else out.
    let _mute = TcpStream::connect(&address).await.unwrap();
    let mut half = TcpStream::connect(&address).await.unwrap();
    half.write_all(b"\x16\x03").await.unwrap();
    call(&client, &address).await.unwrap();
}

#[tokio::test]
async fn everybody_else_gets_nothing_and_is_told_why() {
    let (ours, theirs, mut servers) = (Authority::new(), Authority::new(), Servers::default());
    let server = open(Some(ours.issue("kvasir")));
    let address = servers.serve(&server).await;
    let told = call(&open(None), &address).await.unwrap_err();
    assert!(told.contains("by TLS only: set rpc.tls"), "{told}");

    let foreign = theirs.issue("kvasir");
    let told = call(&open(Some(foreign.clone())), &address).await.unwrap_err();
    assert!(told.contains("not from one of rpc.tls.authority"), "{told}");
    // It knows our authority, and has nothing of it to show.
    let mixed = TlsConfig { authority: ours.issue("unused").authority, ..foreign };
    let told = call(&open(Some(mixed)), &address).await.unwrap_err();
    assert!(told.contains("does not accept this process's certificate"), "{told}");

    let elsewhere = servers.serve(&open(Some(ours.issue("another.name")))).await;
    let told = call(&server, &elsewhere).await.unwrap_err();
    assert!(told.contains("rpc.tls.server_name"), "{told}");
    let named = TlsConfig { server_name: "another.name".to_owned(), ..ours.issue("kvasir") };
    call(&open(Some(named)), &elsewhere).await.unwrap();

    let plain = servers.serve(&open(None)).await;
    let told = call(&server, &plain).await.unwrap_err();
    assert!(told.contains("does not speak TLS"), "{told}");
}

#[tokio::test]
async fn certificates_and_authorities_are_exchanged_while_they_are_used() {
    let (dir, mut servers) = (TempDir::new().unwrap(), Servers::default());
    let old = authority(dir.path());
    let tls = issue(&old, dir.path(), "kvasir");
    let (rpc, keeping) = Rpc::open(&Config { tls: Some(tls.clone()) }).unwrap();
    servers.0.spawn(keeping);
    let address = servers.serve(&rpc).await;
    let before = open(Some(tls.clone()));
    call(&before, &address).await.unwrap();
    // Another authority, and a certificate of its.
    issue(&authority(dir.path()), dir.path(), "kvasir");
    let after = open(Some(tls.clone()));
    while call(&after, &address).await.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(call(&before, &address).await.is_err(), "the old ones are not believed any more");
    // As a client, too: it calls a server that has had the new ones from its beginning.
    let new = servers.serve(&after).await;
    call(&rpc, &new).await.unwrap();
    // What can't be read changes nothing.
    fs::write(&tls.key, "no key").unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    call(&after, &address).await.unwrap();
}

#[test]
fn files_that_do_not_fit_are_named() {
    let authority = Authority::new();
    let (one, other) = (authority.issue("one"), authority.issue("other"));
    let nowhere = authority.dir.path().join("nowhere.pem");
    for (tls, named) in [
        (TlsConfig { certificate: nowhere.clone(), ..one.clone() }, "rpc.tls.certificate: "),
        (TlsConfig { key: nowhere.clone(), ..one.clone() }, "rpc.tls.key: "),
        (TlsConfig { key: other.key, ..one.clone() }, "rpc.tls.key: "),
        (TlsConfig { authority: nowhere, ..one.clone() }, "rpc.tls.authority: "),
        (TlsConfig { authority: one.key.clone(), ..one.clone() }, "rpc.tls.authority: "),
        (TlsConfig { server_name: "10.0.0.1".to_owned(), ..one.clone() }, "rpc.tls.server_name: "),
    ] {
        let error = Rpc::open(&Config { tls: Some(tls) }).map(drop).unwrap_err().to_string();
        assert!(error.starts_with(named), "{error}");
    }
}
