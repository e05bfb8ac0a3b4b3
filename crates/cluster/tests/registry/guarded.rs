//! An etcd that wants certificates and passwords, as one that others look after does.

use std::path::Path;

use etcd_client::{Client, ConnectOptions, Permission, PermissionType, RoleRevokePermissionOptions};
use kvasir_cluster::{Error, EtcdConfig, EtcdTls};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, IsCa, Issuer, KeyPair};

use crate::{
    etcd::{Etcd, free_port},
    given::{Process, member, until},
};

const PASSWORD: &str = "correct horse";

/// A new authority, and certificates of its for etcd and its clients, in place of those that were there.
fn issue(dir: &Path) {
    let put = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    put("authority.pem", params.self_signed(&key).unwrap().pem());
    let issuer = Issuer::new(params, key);
    for (who, names) in [("etcd", vec!["127.0.0.1".to_owned(), "etcd.internal".to_owned()]), ("client", vec![])] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(names).unwrap();
        // A common name would be a user's for etcd.
        params.distinguished_name = DistinguishedName::new();
        put(&format!("{who}.pem"), params.signed_by(&key, &issuer).unwrap().pem());
        put(&format!("{who}.key"), key.serialize_pem());
    }
}

struct World {
    etcd: Etcd,
    /// Where it listens in the clear, for whoever administers it.
    clear: String,
    files: tempfile::TempDir,
}

impl World {
    /// With a user who may do what is needed below our prefix, and nothing else.
    async fn start() -> Self {
        let world = Self::open().await;
        Client::connect([&world.clear], None).await.unwrap().auth_enable().await.unwrap();
        world
    }

    /// The same before it asks who calls.
    async fn open() -> Self {
        let files = tempfile::tempdir().unwrap();
        issue(files.path());
        let clear = format!("127.0.0.1:{}", free_port());
        let file = |name: &str| files.path().join(name).to_string_lossy().into_owned();
        let of_client = |etcd: &str| format!("--{etcd}");
        let mut arguments = vec![of_client("client-cert-auth")];
        for (flag, name) in [("cert-file", "etcd.pem"), ("key-file", "etcd.key"), ("trusted-ca-file", "authority.pem")]
        {
            arguments.extend([of_client(flag), file(name)]);
        }
        let etcd = Etcd::start_with("https", Some(clear.clone()), arguments).await;
        let mut root = Client::connect([&clear], None).await.unwrap();
        root.user_add("root", "root", None).await.unwrap();
        root.role_add("root").await.unwrap();
        root.user_grant_role("root", "root").await.unwrap();
        root.user_add("kvasir", PASSWORD, None).await.unwrap();
        root.role_add("kvasir").await.unwrap();
        let ours = Permission::new(PermissionType::Readwrite, "/kvasir/v1/").with_prefix();
        root.role_grant_permission("kvasir", ours).await.unwrap();
        root.user_grant_role("kvasir", "kvasir").await.unwrap();
        std::fs::write(files.path().join("password"), format!("{PASSWORD}\n")).unwrap();
        Self { etcd, clear, files }
    }

    async fn root(&self) -> Client {
        let options = ConnectOptions::new().with_user("root", "root");
        Client::connect([&self.clear], Some(options)).await.unwrap()
    }

    fn tls(&self) -> EtcdTls {
        let file = |name: &str| self.files.path().join(name);
        let (certificate, key) = (Some(file("client.pem")), Some(file("client.key")));
        EtcdTls { authority: file("authority.pem"), certificate, key, server_name: None }
    }

    fn config(&self) -> EtcdConfig {
        EtcdConfig {
            tls: Some(self.tls()),
            username: Some("kvasir".to_owned()),
            password_file: Some(self.files.path().join("password")),
            ..self.etcd.config()
        }
    }
}

#[tokio::test]
async fn what_is_missing_or_wrong_is_told_in_one_line_that_says_what_to_do() {
    let world = World::start().await;
    let other = tempfile::tempdir().unwrap();
    issue(other.path());
    std::fs::write(other.path().join("password"), "wrong").unwrap();
    let (fine, tls) = (world.config(), world.tls());
    let with = |tls: EtcdTls| EtcdConfig { tls: Some(tls), ..fine.clone() };
    let theirs = |name: &str| other.path().join(name);
    let named = |name: &str| EtcdTls { server_name: Some(name.to_owned()), ..tls.clone() };
    assert!(Process::with_etcd(with(named("etcd.internal"))).await.is_ok());
    let strange = EtcdTls { certificate: Some(theirs("client.pem")), key: Some(theirs("client.key")), ..tls.clone() };
    let unreachable = [
        (EtcdConfig { tls: None, ..fine.clone() }, "set registry.etcd.tls"),
        (
            with(EtcdTls { authority: theirs("authority.pem"), ..tls.clone() }),
            "not from one of registry.etcd.tls.authority",
        ),
        (with(EtcdTls { certificate: None, key: None, ..tls.clone() }), "set registry.etcd.tls.certificate"),
        (with(strange), "does not accept this process's certificate"),
        (with(named("other")), "registry.etcd.tls.server_name"),
        (EtcdConfig { endpoints: vec![world.clear.clone()], ..fine.clone() }, "leave out registry.etcd.tls"),
    ];
    for (config, told) in unreachable {
        let error = Process::with_etcd(config).await.map(drop).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(matches!(error, Error::Unreachable { .. }), "{error}");
        assert!(source.contains(told) && !source.contains('\n'), "{source}, not {told}");
    }
    let refused = [
        (
            EtcdConfig { username: None, password_file: None, ..fine.clone() },
            "registry.etcd.username and password_file",
        ),
        (
            EtcdConfig { password_file: Some(theirs("password")), ..fine.clone() },
            "no user \"kvasir\" with the password",
        ),
        (EtcdConfig { password_file: Some(theirs("none")), ..fine.clone() }, "No such file"),
        (
            EtcdConfig { prefix: "/others".to_owned(), ..fine.clone() },
            "grant-permission ROLE readwrite --prefix=true /others/",
        ),
    ];
    for (config, told) in refused {
        let error = Process::with_etcd(config).await.map(drop).unwrap_err();
        assert!(matches!(error, Error::Refused { .. }) && error.to_string().contains(told), "{error}, not {told}");
    }
}

/// A certificate that names nobody is a user without a name for an etcd that begins to ask: it denies, where it would ask
/// whoever shows none for a token.
#[tokio::test]
async fn who_came_before_etcd_asked_is_known_to_it_once_it_does() {
    let world = World::open().await;
    let (one, two) =
        (Process::with_etcd(world.config()).await.unwrap(), Process::with_etcd(world.config()).await.unwrap());
    one.registry.register(member("a", 1)).await.unwrap();
    two.sees(&["a"]).await;

    Client::connect([&world.clear], None).await.unwrap().auth_enable().await.unwrap();
    one.registry.register(member("b", 2)).await.unwrap();
    two.registry.register(member("c", 3)).await.unwrap();
    for process in [&one, &two] {
        process.sees(&["a", "b", "c"]).await;
    }

    // Who has shown a password and may not do it after all is told so.
    let prefix = RoleRevokePermissionOptions::new().with_prefix();
    world.root().await.role_revoke_permission("kvasir", "/kvasir/v1/", Some(prefix)).await.unwrap();
    let denied = one.registry.register(member("d", 4)).await.unwrap_err();
    assert!(matches!(denied, Error::Refused { .. }) && denied.to_string().contains("may not read"), "{denied}");
}

#[tokio::test]
async fn members_stay_while_tokens_passwords_and_certificates_change() {
    let mut world = World::start().await;
    let one = Process::with_etcd(world.config()).await.unwrap();
    one.registry.register(member("a", 1)).await.unwrap();
    let two = Process::with_etcd(world.config()).await.unwrap();
    two.sees(&["a"]).await;
    assert!(one.registry.answers());

    // Whoever was let in with the old password has to show the new one.
    let password = world.files.path().join("password");
    world.root().await.user_change_password("kvasir", "another").await.unwrap();
    std::fs::write(&password, "another").unwrap();
    two.registry.register(member("b", 2)).await.unwrap();
    one.sees(&["a", "b"]).await;

    // Tokens end with etcd, and so do its certificates.
    world.etcd.kill();
    until("it is noticed", async || !one.registry.answers() && !two.registry.answers()).await;
    issue(world.files.path());
    assert!(world.etcd.restart().await);
    until("it is back for both", async || one.registry.answers() && two.registry.answers()).await;
    let three = Process::with_etcd(world.config()).await.unwrap();
    three.registry.register(member("c", 3)).await.unwrap();
    for process in [&one, &two, &three] {
        process.sees(&["a", "b", "c"]).await;
    }
    two.registry.deregister(&"b".parse().unwrap(), kvasir_types::Role::Decode).await.unwrap();
    for process in [&one, &three] {
        process.sees(&["a", "c"]).await;
    }

    // The right to it is taken away and given back.
    let mut root = world.root().await;
    let prefix = RoleRevokePermissionOptions::new().with_prefix();
    root.role_revoke_permission("kvasir", "/kvasir/v1/", Some(prefix)).await.unwrap();
    let denied = three.registry.register(member("d", 4)).await.unwrap_err();
    assert!(
        matches!(denied, Error::Refused { .. }) && denied.to_string().contains("may not read and write"),
        "{denied}"
    );
    let ours = Permission::new(PermissionType::Readwrite, "/kvasir/v1/").with_prefix();
    root.role_grant_permission("kvasir", ours).await.unwrap();
    three.registry.register(member("d", 4)).await.unwrap();
    one.sees(&["a", "c", "d"]).await;
}
