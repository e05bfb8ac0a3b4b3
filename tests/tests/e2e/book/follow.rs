//! The guides can be followed: their commands are run against a cluster, page by page, in their order.

use std::{fs, os::unix::fs::symlink, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use kvasir_tests::{
    Cluster, Service,
    wait::{self, SOON},
    workspace,
};
use tokio::task::JoinSet;

use super::{
    commands::STAND_FOR,
    coverage, kubernetes,
    pages::{Page, What},
};
use crate::chart::manifests::said;

/// Pages whose commands are run. Names in them are those of this cluster: prefill-0 and 1, decode-0 and 1, kv-store-0 and 1.
const PAGES: [&str; 12] = [
    "README.md",
    "docs/first-model.md",
    "docs/sizing.md",
    "docs/tuning.md",
    "docs/operations.md",
    "docs/planner.md",
    "docs/upgrade.md",
    "docs/failures.md",
    "docs/routing.md",
    "docs/simulator.md",
    "docs/kvasirctl.md",
    "docs/engine-bench.md",
];

/// Programs that are run.
const RUN: [&str; 7] =
    ["kvasirctl", "curl", "kvasir-engine-bench", "kvasir-quantize", "kvasir-simulate", "kvasir-replay", "echo"];

/// Who looks for something wrong may find it here: a drained node, a limit of this machine.
const MAY_BE_UNWELL: [&str; 2] = ["kvasirctl doctor", "kvasirctl status --check"];

/// The client's name of a request that commands can ask for while it runs.
const ID: &str = "ID";

#[tokio::test]
async fn the_guides_can_be_followed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for name in ["models", "scripts", "helm", "deploy", "docs"] {
        symlink(workspace::root().join(name), dir.path().join(name))?;
    }
    Cluster::builder()
        .prefill(2)
        .decode(2)
        .kv_store(2)
        .run(async |cluster| {
            let mut run = 0;
            // docs/kvasirctl.md has one of this name.
            let test = format!("kvasirctl context set test --etcd {}", cluster.etcd_endpoint());
            shell(cluster, dir.path(), &test)?;
            for name in PAGES {
                let page = Page::read(name)?;
                for block in page.written() {
                    let place = format!("{name}:{}", block.line);
                    match &block.what {
                        What::Commands(shown) => {
                            for shown in shown.iter().filter(|shown| runs(name, &shown.command)) {
                                follow(cluster, dir.path(), &shown.command).await.context(place.clone())?;
                                run += 1;
                            }
                        }
                        What::Python(text) => python(cluster, dir.path(), text).context(place)?,
                        What::Settings(_) | What::Text(_) => {}
                    }
                }
            }
            ensure!(run > 80, "only {run} commands were run");
            Ok(())
        })
        .await
}

/// Whether a line of a page is run here.
pub(crate) fn runs(page: &str, line: &str) -> bool {
    let line = line.strip_prefix("target/release/").unwrap_or(line);
    PAGES.contains(&page)
        && !kubernetes::runs(page, line)
        && RUN.iter().any(|program| line.starts_with(&format!("{program} ")))
        && coverage::never(line).is_none()
        && !coverage::goes_on(line)
}

/// Runs a line as a shell would, in a folder in which a person who follows the guides might be.
async fn follow(cluster: &mut Cluster, dir: &Path, line: &str) -> Result<()> {
    let asks_for_one = line.ends_with(&format!(" {ID}"));
    let _underway = if asks_for_one { Some(long_request(cluster).await?) } else { None };
    shell(cluster, dir, line)
}

fn shell(cluster: &Cluster, dir: &Path, line: &str) -> Result<()> {
    let router = cluster.node(Service::Router, 0);
    let mut text = line.replace("127.0.0.1:8000", router.http()).replace("127.0.0.1:9090", router.admin());
    for (shown, meant) in STAND_FOR {
        // A folder that the page makes is one of this folder's.
        text = text.replace(&format!("{shown}-int8"), "int8").replace(shown, meant);
    }
    let text = text.replace("curl ", "curl -sS --fail-with-body -o reply ");
    let path = format!("{}:{}", workspace::profile_dir().display(), std::env::var("PATH").unwrap_or_default());
    let output = Command::new("timeout")
        .args(["60", "bash", "-o", "pipefail", "-c", &text])
        .current_dir(dir)
        .env_remove("KVASIR_TOKEN")
        .env("PATH", path)
        .env("KVASIR_ETCD", cluster.etcd_endpoint())
        .env("KVASIR_CONFIG", dir.join("contexts.yaml"))
        .output()?;
    let unwell = output.status.code() == Some(3) && MAY_BE_UNWELL.iter().any(|start| line.starts_with(start));
    ensure!(output.status.success() || unwell, "{line}: {}\n{}", output.status, said(&output));
    Ok(())
}

/// A request of that name which goes on for long enough to be asked for.
async fn long_request(cluster: &Cluster) -> Result<JoinSet<()>> {
    let url = format!("http://{}/v1/completions", cluster.node(Service::Router, 0).http());
    let body = serde_json::json!({
        "model": cluster.model(), "prompt": "What is prefill?", "max_tokens": 6000, "ignore_eos": true, "stream": true,
    });
    let http = reqwest::Client::builder().timeout(Duration::from_secs(60)).build()?;
    let sending = http.post(url).header("x-request-id", ID).json(&body).send();
    let mut request = JoinSet::new();
    request.spawn(async move {
        if let Ok(mut reply) = sending.await {
            while let Ok(Some(_)) = reply.chunk().await {}
        }
    });
    let admin = cluster.node(Service::Router, 0);
    wait::until("the request is under way", SOON, async || {
        let (_, page) = admin.admin_page("/requests").await.ok()?;
        page.contains(&format!("\"{ID}\"")).then_some(())
    })
    .await?;
    Ok(request)
}

fn python(cluster: &Cluster, dir: &Path, text: &str) -> Result<()> {
    let file = dir.join("page.py");
    fs::write(&file, text.replace("127.0.0.1:8000", cluster.node(Service::Router, 0).http()))?;
    let output = Command::new(workspace::python()?).arg("-B").arg(&file).output()?;
    let text = said(&output);
    ensure!(output.status.success() && text.contains("Prefill is"), "{text}");
    Ok(())
}
