//! Engines named in etcd: every router finds them, an operator sees them, and they go when they are taken out.

use anyhow::{Result, ensure};
use kvasir_tests::{
    Cluster, Service,
    stand_in::{Kind, Role},
    workspace,
};
use serde_json::{Value, json};

use super::{Engines, QUESTION, content, each, expected, known};
use crate::{ctl::ctl, prompts::chat};

/// `kvasirctl engine add` for a stand-in.
fn add(cluster: &mut Cluster, engines: &Engines, id: &str, model: &str) -> Result<String> {
    let engine = engines.get(id);
    let (url, port) = (engine.url(), engine.bootstrap_port().to_string());
    let mut arguments = vec!["engine", "add", id, "--kind", engine.kind.as_str(), "--role", engine.role.as_str()];
    arguments.extend(["--url", &url, "--model", model, "--served-name", super::SERVED]);
    if (engine.kind, engine.role) == (Kind::Sglang, Role::Prefill) {
        arguments.extend(["--bootstrap-port", &port]);
    }
    ctl(cluster, &arguments)
}

#[tokio::test]
async fn engines_in_etcd_are_used_shown_and_taken_out() -> Result<()> {
    each(async |kind| {
        let mut engines = Engines::start(kind, 1, 1).await?;
        let path = workspace::demo_model();
        let models = json!([{"name": "demo", "path": path}, {"name": "theirs", "path": path}]);
        Cluster::builder()
            .kv_store(0)
            .prefill(0)
            .set(Service::Router, "models", models)
            .set(Service::Router, "external.probe_ms", 100)
            .set(Service::Router, "external.gone_after_ms", 500)
            .run(async |cluster| {
                cluster.expect_warning("an engine is gone");
                let client = cluster.client();
                let text = expected(&client, QUESTION, 64).await?;
                known(cluster, 1).await?;
                for id in ["p0", "d0"] {
                    ensure!(add(cluster, &engines, id, "theirs")?.contains(id));
                }
                known(cluster, 2).await?;
                let answer = client.chat(&chat("theirs", QUESTION)).await?;
                ensure!(content(&answer["choices"][0]) == text, "{answer}");
                ensure!(engines.seen("p0").await?.computed == 1, "computed by p0");
                // An operator sees them, and whether they are well.
                let shown: Value = serde_json::from_str(&ctl(cluster, &["status", "--output", "json"])?)?;
                let of = |shown: &Value, id: &str| {
                    let members = shown["members"].as_array().cloned().unwrap_or_default();
                    members.into_iter().find(|member| member["id"] == id).unwrap_or_default()
                };
                let d0 = of(&shown, "d0");
                ensure!(d0["state"] == "ready" && d0["model"] == "theirs" && d0["version"] == kind.as_str(), "{shown}");
                ensure!(shown["warnings"] == json!([]), "{shown}");
                ensure!(ctl(cluster, &["status"])?.contains("p0"), "in the table, too");
                // A name has one holder.
                ensure!(add(cluster, &engines, "d0", "theirs").is_ok(), "the same once more is fine");
                let taken = ctl(
                    cluster,
                    &[
                        "engine",
                        "add",
                        "decode-0",
                        "--kind",
                        "vllm",
                        "--role",
                        "prefill",
                        "--url",
                        "http://a:1",
                        "--model",
                        "theirs",
                    ],
                );
                ensure!(taken.is_err_and(|error| error.to_string().contains("registered")), "a worker's name is taken");
                // One that died is shown as such, and no member of the fleet.
                engines.get_mut("d0").process.kill();
                known(cluster, 1).await?;
                let shown: Value = serde_json::from_str(&ctl(cluster, &["status", "--output", "json"])?)?;
                ensure!(of(&shown, "d0")["state"] == "unreachable", "{shown}");
                let dir = engines.dir().to_owned();
                engines.get_mut("d0").restart(&dir).await?;
                known(cluster, 2).await?;
                // Taken out, it is not asked any more.
                ctl(cluster, &["engine", "remove", "d0"])?;
                known(cluster, 1).await?;
                let reply = client.post("/v1/chat/completions", &chat("theirs", QUESTION)).await?;
                ensure!(reply.status == 503, "{reply:?}");
                ensure!(ctl(cluster, &["engine", "remove", "d0"]).is_err(), "it is out already");
                ensure!(
                    ctl(cluster, &["engine", "remove", "decode-0"]).is_err(),
                    "workers are not taken out like this"
                );
                Ok(())
            })
            .await
    })
    .await
}
