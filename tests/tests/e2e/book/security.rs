//! docs/security.md is followed: the certificates that it has made by openssl are those of a cluster whose etcd, told what it says by
//! etcdctl, begins to ask who calls.

use std::{io::Write as _, path::Path, process::Command, process::Stdio};

use anyhow::{Context, Result, ensure};
use kvasir_tests::{Cluster, Service, workspace};

use super::pages::{Page, What};
use crate::{
    chart::manifests::said,
    prompts::{QUESTION, chat, text},
};

const PAGE: &str = "docs/security.md";

/// Whether a line of a page is run here.
pub(crate) fn runs(page: &str, line: &str) -> bool {
    page == PAGE && ["etcdctl ", "openssl "].iter().any(|start| line.starts_with(start))
}

/// The page's lines that begin so.
fn lines(start: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for block in Page::read(PAGE)?.blocks {
        if let What::Commands(shown) = block.what {
            found.extend(shown.into_iter().map(|shown| shown.command).filter(|line| line.starts_with(start)));
        }
    }
    Ok(found)
}

/// Runs a line in a folder; what asks for a password hears it twice.
fn shell(dir: &Path, etcd: &str, line: &str) -> Result<()> {
    let mut command = Command::new("bash");
    command.args(["-c", line]).current_dir(dir).env("ETCDCTL_ENDPOINTS", etcd).env("ETCDCTL_API", "3");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let mut input = child.stdin.take().context("its standard input")?;
    // Who asks for nothing may have ended before it is told.
    let _ = input.write_all(b"secret\nsecret\n");
    drop(input);
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{line}: {}", said(&output));
    Ok(())
}

#[tokio::test]
async fn certificates_and_a_user_are_made_as_the_page_says() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let made = lines("openssl ")?;
    ensure!(made.len() == 3, "{made:?}");
    for line in &made {
        shell(dir.path(), "", line)?;
    }
    let file = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    std::fs::write(file("password"), "secret\n")?;
    let mut builder = Cluster::builder();
    for service in [Service::Router, Service::Prefill, Service::Decode, Service::KvStore] {
        for (name, value) in [("authority", "ca.crt"), ("certificate", "tls.crt"), ("key", "tls.key")] {
            builder = builder.set(service, &format!("rpc.tls.{name}"), file(value));
        }
        builder = builder.set(service, "registry.etcd.username", "kvasir");
        builder = builder.set(service, "registry.etcd.password_file", file("password"));
    }
    builder
        .run(async |cluster| {
            let etcd = cluster.etcd_endpoint().to_owned();
            let granted = lines("etcdctl ")?;
            ensure!(granted.len() == 4, "{granted:?}");
            let ours = ["etcdctl user add root:root", "etcdctl user grant-role root root", "etcdctl auth enable"];
            for line in granted.iter().map(String::as_str).chain(ours) {
                shell(dir.path(), &etcd, line)?;
            }
            // etcd lets nobody in who has no name, and the user nowhere else.
            ensure!(shell(dir.path(), &etcd, "etcdctl get /kvasir/v1/ --prefix").is_err(), "anybody may read");
            let known = "etcdctl --user kvasir:secret";
            shell(dir.path(), &etcd, &format!("{known} get /kvasir/v1/ --prefix"))?;
            ensure!(shell(dir.path(), &etcd, &format!("{known} put /other x")).is_err(), "the user may write anywhere");

            cluster.join(Service::Decode).await?;
            let answer = cluster.client().chat(&chat(cluster.model(), QUESTION)).await?;
            ensure!(text(&answer).starts_with("A prefix cache"), "{answer}");
            let mut command = Command::new(workspace::binary("kvasirctl")?);
            command.current_dir(dir.path()).args(["--etcd", &etcd, "--etcd-username", "kvasir"]);
            command.args(["--etcd-password-file", "password", "status"]);
            for (name, value) in [("AUTHORITY", "ca.crt"), ("CERTIFICATE", "tls.crt"), ("KEY", "tls.key")] {
                command.env(format!("KVASIR_RPC__TLS__{name}"), value);
            }
            let output = command.output()?;
            ensure!(output.status.success() && said(&output).contains("decode-1"), "{}", said(&output));
            Ok(())
        })
        .await
}
