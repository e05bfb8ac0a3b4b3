//! A cluster whose etcd begins to ask who calls, and one whose etcd is called by TLS.

use std::{fs, path::Path, process::Command};

use anyhow::{Result, ensure};
use kvasir_tests::{
    Client, Cluster, Service,
    etcd::Guard,
    wait::{self, SOON},
    workspace,
};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};

use crate::prompts::{QUESTION, chat, text};

/// `/kvasir/v1/` and what comes after all that begins so, as etcd's gateway takes them.
const PREFIX: (&str, &str) = ("L2t2YXNpci92MS8=", "L2t2YXNpci92MTA=");

/// `auth enable`, with a user who may do what is needed below our prefix.
async fn guard(etcd: &str) -> Result<()> {
    let client = Client::new(etcd);
    let permission = json!({ "permType": "READWRITE", "key": PREFIX.0, "range_end": PREFIX.1 });
    for (what, body) in [
        ("user/add", json!({ "name": "root", "password": "root" })),
        ("role/add", json!({ "name": "root" })),
        ("user/grant", json!({ "user": "root", "role": "root" })),
        ("user/add", json!({ "name": "kvasir", "password": "secret" })),
        ("role/add", json!({ "name": "kvasir" })),
        ("role/grant", json!({ "name": "kvasir", "perm": permission })),
        ("user/grant", json!({ "user": "kvasir", "role": "kvasir" })),
        ("enable", json!({})),
    ] {
        let reply = client.post(&format!("/v3/auth/{what}"), &body).await?;
        ensure!(reply.status == 200, "{what}: HTTP {}: {}", reply.status, reply.body);
    }
    Ok(())
}

/// What services say while etcd is away.
const AWAY: [&str; 2] = ["etcd is away", "registration not renewed"];

/// Whether etcd answers everybody (1), or nobody (0).
async fn up(cluster: &Cluster, wanted: f64) -> Option<()> {
    for node in cluster.nodes() {
        let metrics = node.metrics().await.ok()?;
        (metrics.sum("kvasir_cluster_registry_up") == wanted).then_some(())?;
    }
    Some(())
}

/// Exit status of `kvasirctl status -o json`, what it prints, and what it says.
fn status(cluster: &Cluster, words: &[&str], variables: &[(&str, &str)]) -> Result<(Option<i32>, Value, String)> {
    let mut command = Command::new(workspace::binary("kvasirctl")?);
    command.args(["--etcd", cluster.etcd_endpoint(), "status", "-o", "json"]).args(words);
    let output = command.envs(variables.iter().copied()).output()?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default(), told))
}

#[tokio::test]
async fn a_cluster_goes_on_when_etcd_begins_to_ask_who_calls_and_when_it_forgets_who_did() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = dir.path().join(name);
        fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let (password, wrong) = (file("password", "secret\n")?, file("wrong", "secre\n")?);
    let mut builder = Cluster::builder();
    for service in [Service::Router, Service::Prefill, Service::Decode, Service::KvStore] {
        builder = builder.set(service, "registry.etcd.username", "kvasir").set(
            service,
            "registry.etcd.password_file",
            password.as_str(),
        );
    }
    builder
        .run(async |cluster| {
            for warning in AWAY {
                cluster.expect_warning(warning);
            }
            let body = chat(cluster.model(), QUESTION);
            let answer = text(&cluster.client().chat(&body).await?).to_owned();
            // Its gateway to HTTP finds it at the port that it is told, which is none at its first start.
            cluster.etcd().kill();
            cluster.etcd().restart().await?;
            guard(cluster.etcd_endpoint()).await?;

            let known = ["--etcd-username", "kvasir", "--etcd-password-file", password.as_str()];
            let (code, _, told) = status(cluster, &[], &[])?;
            ensure!(
                code == Some(1) && told.contains("--etcd-username") && told.lines().count() == 1,
                "{code:?} {told}"
            );
            let (code, _, told) = status(cluster, &["--etcd-username", "kvasir", "--etcd-password-file", &wrong], &[])?;
            ensure!(code == Some(1) && told.contains("knows no user \"kvasir\""), "{code:?} {told}");
            let (code, _, told) = status(cluster, &[&known[..], &["--prefix", "/other"]].concat(), &[])?;
            ensure!(code == Some(1) && told.contains("grant-permission"), "{code:?} {told}");
            let variables = [
                ("KVASIR_REGISTRY__ETCD__USERNAME", "kvasir"),
                ("KVASIR_REGISTRY__ETCD__PASSWORD_FILE", password.as_str()),
            ];
            let (code, told, said) = status(cluster, &[], &variables)?;
            ensure!(code == Some(0) && told.to_string().contains("decode-0"), "{code:?} {told} {said}");

            // Who comes now shows the password at once; who is there does when it is asked.
            cluster.join(Service::Decode).await?;
            cluster.etcd().kill();
            wait::until("all miss etcd", SOON, async || up(cluster, 0.0).await).await?;
            ensure!(text(&cluster.client().chat(&body).await?) == answer, "requests go on");
            cluster.etcd().restart().await?;
            wait::until("all have etcd again", SOON, async || up(cluster, 1.0).await).await?;
            cluster.join(Service::Decode).await?;
            let (code, told, said) = status(cluster, &known, &[])?;
            let there =
                |name: &str| told["members"].as_array().is_some_and(|all| all.iter().any(|one| one["id"] == name));
            ensure!(code == Some(0) && there("decode-2") && there("prefill-0"), "{code:?} {told} {said}");
            ensure!(text(&cluster.client().chat(&body).await?) == answer, "and after it");
            Ok(())
        })
        .await
}

/// A new authority, and certificates of its for etcd and its clients; each takes the place of the one before, as a mounted
/// secret's does.
fn issue(dir: &Path) -> Result<()> {
    let put = |name: &str, text: String| {
        fs::write(dir.join("new"), text)?;
        fs::rename(dir.join("new"), dir.join(name))
    };
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    put("authority.pem", params.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(params, key);
    for (who, names) in [("etcd", vec!["127.0.0.1".to_owned()]), ("client", Vec::new())] {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = DistinguishedName::new(); // a common name would be a user's for etcd
        put(&format!("{who}.pem"), params.signed_by(&key, &issuer)?.pem())?;
        put(&format!("{who}.key"), key.serialize_pem())?;
    }
    Ok(())
}

#[tokio::test]
async fn a_cluster_whose_etcd_is_called_by_tls_answers_and_certificates_may_be_renewed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    issue(dir.path())?;
    let file = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let guard = Guard {
        authority: dir.path().join("authority.pem"),
        certificate: dir.path().join("etcd.pem"),
        key: dir.path().join("etcd.key"),
    };
    let mut builder = Cluster::builder().guarded_etcd(guard);
    for service in [Service::Router, Service::Prefill, Service::Decode, Service::KvStore] {
        for (key, value) in [
            ("tls.authority", file("authority.pem")),
            ("tls.certificate", file("client.pem")),
            ("tls.key", file("client.key")),
        ] {
            builder = builder.set(service, &format!("registry.etcd.{key}"), value);
        }
    }
    let run = builder.run(async |cluster| {
        for warning in AWAY {
            cluster.expect_warning(warning);
        }
        let body = chat(cluster.model(), QUESTION);
        let answer = text(&cluster.client().chat(&body).await?).to_owned();
        let (authority, certificate, key) = (file("authority.pem"), file("client.pem"), file("client.key"));
        let known = ["--etcd-authority", &authority, "--etcd-certificate", &certificate, "--etcd-key", &key];
        let (code, told, said) = status(cluster, &known, &[])?;
        ensure!(code == Some(0) && told.to_string().contains("decode-0"), "{code:?} {told} {said}");
        let (code, _, said) = status(cluster, &[], &[])?;
        ensure!(code == Some(1) && said.contains("registry.etcd.tls"), "in the clear: {code:?} {said}");

        // Its clock is asked for by TLS, too: one more than there are members.
        let mut doctor = Command::new(workspace::binary("kvasirctl")?);
        doctor.args(["--etcd", cluster.etcd_endpoint(), "doctor", "cluster", "-o", "json"]).args(known);
        let findings: Value = serde_json::from_slice(&doctor.output()?.stdout)?;
        let clocks = findings.as_array().into_iter().flatten().find(|finding| finding["what"] == "clocks");
        let found = clocks.and_then(|clocks| clocks["found"].as_str()).unwrap_or_default();
        ensure!(found.starts_with(&format!("{} differ", cluster.nodes().len() + 1)), "{findings:#}");

        // Another authority, and certificates of its for all: who has them comes back to etcd, and new ones are let in.
        cluster.etcd().kill();
        wait::until("all miss etcd", SOON, async || up(cluster, 0.0).await).await?;
        issue(dir.path())?;
        cluster.etcd().restart().await?;
        wait::until("all have etcd again", SOON, async || up(cluster, 1.0).await).await?;
        cluster.join(Service::Decode).await?;
        let (code, told, said) = status(cluster, &known, &[])?;
        ensure!(code == Some(0) && told.to_string().contains("decode-1"), "{code:?} {told} {said}");
        ensure!(text(&cluster.client().chat(&body).await?) == answer, "the answer is the same");
        Ok(())
    });
    run.await
}
