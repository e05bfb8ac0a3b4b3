//! A whole cluster whose processes prove to one another that they are of it, and what others get.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use kvasir_proto::v1::{StatusRequest, worker_client::WorkerClient};
use kvasir_tests::{
    Cluster, Service,
    wait::{self, SOON},
    workspace,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::prompts::{COUNT, QUESTION, chat, text};

/// Kinds of process, each with a certificate of its own.
const SERVICES: [Service; 4] = [Service::Router, Service::Prefill, Service::Decode, Service::KvStore];

/// A new authority, and certificates of its for everybody; what was there before is exchanged.
fn issue(dir: &Path) -> Result<()> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    fs::write(dir.join("authority.pem"), params.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(params, key);
    for service in SERVICES {
        let key = KeyPair::generate()?;
        let signed = CertificateParams::new(["kvasir".to_owned()])?.signed_by(&key, &issuer)?;
        // As mounted secrets are: a new file takes the old one's place.
        let put = |what: &str, text: String| {
            let path = dir.join(format!("{}-{what}.pem", service.binary()));
            fs::write(path.with_extension("new"), text)?;
            fs::rename(path.with_extension("new"), path)
        };
        put("certificate", signed.pem())?;
        put("key", key.serialize_pem())?;
    }
    Ok(())
}

fn path(dir: &Path, service: Service, what: &str) -> String {
    dir.join(format!("{}-{what}.pem", service.binary())).to_string_lossy().into_owned()
}

/// What `kvasirctl` prints, with or without the router's certificate.
fn ctl(cluster: &mut Cluster, dir: Option<&Path>, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(workspace::binary("kvasirctl")?);
    command.args(["--etcd", cluster.etcd().endpoint()]).args(arguments);
    if let Some(dir) = dir {
        command.env("KVASIR_RPC__TLS__AUTHORITY", dir.join("authority.pem"));
        command.env("KVASIR_RPC__TLS__CERTIFICATE", path(dir, Service::Router, "certificate"));
        command.env("KVASIR_RPC__TLS__KEY", path(dir, Service::Router, "key"));
    }
    let output = command.output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

#[tokio::test]
async fn a_cluster_of_processes_with_certificates_answers_and_nobody_else_is_let_in() -> Result<()> {
    let dir = tempfile::tempdir()?;
    issue(dir.path())?;
    let mut builder = Cluster::builder().decode(2).set(Service::Decode, "decode.local_prefill_tokens", 0);
    for service in SERVICES {
        builder = builder
            .set(service, "rpc.tls.authority", dir.path().join("authority.pem").to_string_lossy())
            .set(service, "rpc.tls.certificate", path(dir.path(), service, "certificate"))
            .set(service, "rpc.tls.key", path(dir.path(), service, "key"));
    }
    builder
        .run(async |cluster| {
            // While the certificates change hands, some know the new ones already and some do not.
            for warning in
                ["a caller was turned away", "certificates for calls stay", "a worker did not", "prefill failed"]
            {
                cluster.expect_warning(warning);
            }
            let client = cluster.client();
            let bodies = [QUESTION, COUNT].map(|words| chat(cluster.model(), words));
            let mut expected = Vec::new();
            for body in &bodies {
                expected.push(text(&client.chat(body).await?).to_owned());
            }
            ensure!(expected[0].contains("prefix"), "the answer that the model knows: {}", expected[0]);
            let prefilled = cluster.node(Service::Prefill, 0).status().await?.requests_total;
            ensure!(prefilled > 0, "the decode worker called the prefill worker");

            // Without a certificate: nothing, and what to do.
            let address = cluster.node(Service::Decode, 0).grpc().to_owned();
            let endpoint = kvasir_rpc::endpoint(&address)?;
            let status = WorkerClient::new(endpoint.connect_lazy()).status(StatusRequest {}).await;
            ensure!(status.is_err(), "a stranger was answered");
            let told = ctl(cluster, None, &["status"])?;
            ensure!(told.contains("unreachable") && told.contains("TLS only"), "{told}");
            let told = ctl(cluster, Some(dir.path()), &["status"])?;
            ensure!(!told.contains("unreachable"), "{told}");
            let told = ctl(cluster, Some(dir.path()), &["kv", "stats"])?;
            ensure!(told.contains("kv-store-0"), "{told}");

            // Another authority, everywhere, while it runs: connections that are there go on, new ones need the new one.
            issue(dir.path())?;
            let all_new = async || {
                let told = ctl(cluster, Some(dir.path()), &["status"]).ok()?;
                (!told.contains("unreachable")).then_some(())
            };
            wait::until("all processes have the new certificates", SOON, all_new).await?;
            for at in 0..2 {
                // A new life calls and is called by those who have been there all the time.
                cluster.node_mut(Service::Decode, at).process.kill();
                cluster.restart(Service::Decode, at).await.context("with the new certificate")?;
            }
            for (body, expected) in bodies.iter().zip(&expected) {
                let again = async || {
                    let answer = client.chat(body).await.ok()?;
                    (text(&answer) == expected).then_some(())
                };
                wait::until("the answer is the same", SOON, again).await?;
            }
            // The harness asks with the certificates that it has read, as a process does that was never told.
            cluster.renew()
        })
        .await
}
