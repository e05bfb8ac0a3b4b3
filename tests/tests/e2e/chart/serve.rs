//! The rendered configurations serve: processes are started with them as pods would be, at other addresses only, and answer what
//! `helm test` asks.

use anyhow::{Context, Result, ensure};
use kvasir_tests::{Client, Etcd, Node, Service, settings::set, workspace};
use serde_json::{Value, json};

use super::{
    laws::config_of,
    manifests::{Manifest, chart, render},
};

/// From the back to the front.
const PARTS: [(&str, &str, Service); 4] = [
    ("StatefulSet", "release-kvasir-store", Service::KvStore),
    ("Deployment", "release-kvasir-prefill", Service::Prefill),
    ("Deployment", "release-kvasir-decode", Service::Decode),
    ("Deployment", "release-kvasir-router", Service::Router),
];

/// A part's configuration with the addresses and paths of this machine.
fn here(all: &[Manifest], workload: &Manifest, service: Service, etcd: &str) -> Result<Value> {
    let mut config: Value = serde_yaml_ng::from_str(&config_of(all, workload)?)?;
    for listen in ["listen", "admin.listen", "transfer.listen", "transfer.ucx.listen"] {
        let moves_blocks = service != Service::Router;
        if moves_blocks || !listen.starts_with("transfer") {
            set(&mut config, listen, "127.0.0.1:0");
        }
    }
    set(&mut config, "registry.etcd.endpoints", json!([etcd]));
    let model = workspace::demo_model().to_string_lossy().into_owned();
    match service {
        Service::Router => {
            let models = config["models"].as_array_mut().context("models")?;
            models.iter_mut().for_each(|entry| entry["path"] = model.as_str().into());
        }
        Service::KvStore => set(&mut config, "disk.path", Value::Null),
        Service::Prefill | Service::Decode => set(&mut config, "model.path", model),
    }
    Ok(config)
}

/// What curl is told to send, and where to.
fn question(all: &[Manifest]) -> Result<(Value, String)> {
    let hook = all.iter().find(|manifest| manifest.name() == "release-kvasir-test").context("the test's pod")?;
    ensure!(hook.text("/metadata/annotations/helm.sh~1hook") == "test", "{hook:?}");
    let arguments: Vec<_> = hook.list("/spec/containers/0/args").iter().filter_map(Value::as_str).collect();
    let data = arguments.iter().position(|argument| *argument == "--data").context("--data")?;
    let url = arguments.last().context("a URL")?;
    let (host, path) = url.strip_prefix("http://").and_then(|rest| rest.split_once('/')).context("a URL")?;
    ensure!(host == "release-kvasir-router.llm.svc:80", "{host}");
    let service =
        all.iter().find(|manifest| manifest.kind() == "Service" && manifest.name() == "release-kvasir-router");
    ensure!(service.context("the routers' Service")?.at("/spec/ports/0/port") == 80, "another port");
    Ok((serde_json::from_str(arguments[data + 1])?, format!("/{path}")))
}

#[tokio::test]
async fn the_rendered_cluster_answers_what_helm_test_asks() -> Result<()> {
    let all = render(&chart().join("ci/default-values.yaml"))?;
    let (body, path) = question(&all)?;
    let dir = tempfile::tempdir()?;
    let etcd = Etcd::start(dir.path()).await?;
    let mut nodes = Vec::new();
    for (kind, name, service) in PARTS {
        let workload = all.iter().find(|manifest| manifest.kind() == kind && manifest.name() == name);
        let workload = workload.with_context(|| format!("{kind} {name}"))?;
        let config = here(&all, workload, service, etcd.endpoint())?;
        let mut node = Node::spawn(service, name, config, dir.path(), &[])?;
        node.ready().await?;
        nodes.push(node);
    }
    let router = nodes.last().context("a router")?;
    let answer = Client::new(router.http()).post(&path, &body).await?.ok()?;
    ensure!(answer["choices"][0]["message"]["content"].as_str().is_some_and(|text| !text.is_empty()), "{answer}");
    ensure!(answer["usage"]["completion_tokens"].as_u64().is_some_and(|tokens| tokens <= 8), "{answer}");
    Ok(())
}
