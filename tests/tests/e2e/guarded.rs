//! A cluster whose etcd begins to ask who calls.

use std::process::Command;

use anyhow::{Result, ensure};
use kvasir_tests::{
    Client, Cluster, Service,
    wait::{self, SOON},
    workspace,
};
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
        std::fs::write(&path, text)?;
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
            for warning in ["etcd is away", "registration not renewed"] {
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
            let up = async |cluster: &Cluster, wanted: f64| {
                for node in cluster.nodes() {
                    let metrics = node.metrics().await.ok()?;
                    (metrics.sum("kvasir_cluster_registry_up") == wanted).then_some(())?;
                }
                Some(())
            };
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
