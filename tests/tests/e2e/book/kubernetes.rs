//! What the pages say for Kubernetes, by the real helm and kubectl against a stand-in of a cluster (tests/python/kubernetes_stand_in.py):
//! the chart is installed as they say, its notes are followed, and behind its Services are processes of ours that run.

use std::{
    collections::HashMap,
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use kvasir_tests::{
    Cluster, Process, Service,
    wait::{self, SOON},
    workspace,
};
use serde_json::json;

use super::pages::{Page, What};
use crate::chart::manifests::{said, tool};

/// Pages, in the order in which they are followed; what was run is not run again.
const PAGES: [&str; 4] = ["docs/kubernetes.md", "helm/kvasir/README.md", "docs/kvasirctl.md", "README.md"];

/// Of pods that the pages start; an image that a registry would not have keeps pods waiting.
const IMAGES: [&str; 2] = ["registry.example.com/kvasir:0.1.0", "registry.example.com/kvasir:0.2.0"];

/// Whether a line of a page is run here.
pub(crate) fn runs(page: &str, line: &str) -> bool {
    let programs: &[&str] = match page {
        "docs/kubernetes.md" => &["helm ", "kubectl ", "curl "],
        "docs/kvasirctl.md" => &["kubectl ", "kvasirctl --prefix /kvasir/llm/kvasir "],
        _ => &["helm "],
    };
    PAGES.contains(&page) && programs.iter().any(|start| line.starts_with(start)) && !line.contains(" template ")
}

#[tokio::test]
async fn the_chart_is_installed_and_asked_as_the_pages_say() -> Result<()> {
    let mut builder = Cluster::builder();
    for service in [Service::Router, Service::Prefill, Service::Decode, Service::KvStore] {
        builder = builder.set(service, "registry.etcd.prefix", "/kvasir/llm/kvasir"); // as the chart has them
    }
    builder
        .run(async |cluster| {
            let dir = tempfile::tempdir()?;
            let mut console = Console::new(cluster, dir.path()).await?;
            let mut run = Vec::new();
            for name in PAGES {
                for block in Page::read(name)?.blocks {
                    let What::Commands(shown) = block.what else { continue };
                    for line in shown.into_iter().map(|shown| shown.command).filter(|line| runs(name, line)) {
                        if run.contains(&line) {
                            continue;
                        }
                        let told = console.run(&line).await.with_context(|| format!("{name}:{}", block.line))?;
                        if line.starts_with("helm install ") {
                            let notes = notes(&told);
                            ensure!(notes.len() == 4, "the notes: {told}");
                            for line in &notes {
                                console.run(line).await.context("NOTES.txt")?;
                            }
                            run.extend(notes);
                        }
                        run.push(line);
                    }
                }
            }
            ensure!(run.len() > 9, "{run:#?}");
            // A typo does not pass.
            for wrong in [
                "kubectl --namespace llm port-forward service/kvasir-rooter 8000:80 &",
                "kubectl --namespace llm port-forward service/kvasir-router 8000:8081 &",
                "kubectl --namespace llm exec deployment/kvasir-router -- kvasirctl statsu",
                "kubectl --namespace lmm exec deployment/kvasir-router -- kvasirctl --help",
                "kubectl --namespace llm wait --for=condition=Available deployments --selector a=b --timeout=1s",
                "helm test kvsir --namespace llm",
                "helm upgrade kvasir helm/kvasir --namespace llm --reuse-values --set image.tga=0.2.0",
            ] {
                ensure!(console.run(wrong).await.is_err(), "{wrong}: it went well");
            }
            Ok(())
        })
        .await
}

/// The commands that the chart's notes end with.
fn notes(told: &str) -> Vec<String> {
    let after = told.split("Wait for it, and send a request:").nth(1).unwrap_or_default();
    let lines = after.lines().skip_while(|line| line.is_empty()).take_while(|line| !line.is_empty());
    lines.map(|line| line.trim().to_owned()).collect()
}

/// Where somebody types the commands.
struct Console {
    dir: PathBuf,
    path: String,
    router: String,
    /// The ports that are forwarded, as the pages name them, and what they are here.
    ports: HashMap<String, u16>,
    forwarding: Vec<Process>,
    _cluster: Process,
}

impl Console {
    async fn new(cluster: &Cluster, dir: &Path) -> Result<Self> {
        tool("kubectl")?;
        for name in ["helm", "docs"] {
            std::os::unix::fs::symlink(workspace::root().join(name), dir.join(name))?;
        }
        let tools = workspace::target_dir().join("tools");
        let path = format!(
            "{}:{}:{}",
            tools.display(),
            workspace::profile_dir().display(),
            std::env::var("PATH").unwrap_or_default()
        );
        let router = cluster.node(Service::Router, 0);
        let values: serde_json::Value =
            serde_yaml_ng::from_str(&fs::read_to_string(workspace::root().join("helm/kvasir/values.yaml"))?)?;
        let curl = &values["tests"]["image"];
        let curl = format!("{}:{}", text(&curl["repository"]), text(&curl["tag"]));
        let settings = json!({
            "images": [IMAGES[0], IMAGES[1], curl, etcd_image(&values)],
            "processes": {
                "router": { "http": router.http(), "admin": router.admin() },
                "etcd": { "client": cluster.etcd_endpoint() },
            },
            "path": path,
            "version": "1.33",
        });
        fs::write(dir.join("settings.json"), settings.to_string())?;
        let mut command = Command::new(workspace::python()?);
        command.arg("-B").arg(workspace::root().join("tests/python/kubernetes_stand_in.py"));
        command.arg(dir.join("settings.json")).arg(dir.join("kubeconfig"));
        let mut process = Process::spawn("kubernetes", command, dir)?;
        let serves = async || (dir.join("kubeconfig").exists() || process.ended().is_some()).then_some(());
        wait::until("the stand-in serves", SOON, serves).await?;
        ensure!(process.ended().is_none(), "{}", process.log());
        Ok(Self {
            dir: dir.to_owned(),
            path,
            router: router.id().to_owned(),
            ports: HashMap::new(),
            forwarding: Vec::new(),
            _cluster: process,
        })
    }

    /// Runs a line, and says what it said.
    async fn run(&mut self, line: &str) -> Result<String> {
        match line.strip_suffix(" &") {
            Some(forward) => self.forward(forward).await.with_context(|| line.to_owned()),
            None => self.shell(line),
        }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).current_dir(&self.dir);
        command.env_remove("KVASIR_TOKEN").env("PATH", &self.path).env("KUBECONFIG", self.dir.join("kubeconfig"));
        command.env("HOME", &self.dir).env("KVASIR_CONFIG", self.dir.join("contexts.yaml"));
        // kubectl speaks SPDY by itself rather than in a WebSocket.
        command.env("KUBECTL_PORT_FORWARD_WEBSOCKETS", "false");
        if let Some(port) = self.ports.get("2379") {
            command.env("KVASIR_ETCD", format!("127.0.0.1:{port}"));
        }
        command
    }

    fn shell(&self, line: &str) -> Result<String> {
        let mut text =
            line.replace("curl ", "curl -sS --fail-with-body ").replace("ROUTER/", &format!("{}/", self.router));
        for (port, here) in &self.ports {
            text = text.replace(&format!("127.0.0.1:{port}"), &format!("127.0.0.1:{here}"));
        }
        let output = self.command(&["timeout", "100", "bash", "-c", &text]).output()?;
        ensure!(output.status.success(), "{line}: {}\n{}", output.status, said(&output));
        Ok(said(&output))
    }

    /// A `kubectl port-forward` that goes on: its own ports are free ones here.
    async fn forward(&mut self, line: &str) -> Result<String> {
        ensure!(line.contains(" port-forward "), "only ports are forwarded while others are asked");
        let mut words = vec!["exec".to_owned()];
        let mut fresh = Vec::new();
        for word in line.split(' ') {
            let (own, theirs) = word.split_once(':').unwrap_or((word, word));
            if own.parse::<u16>().is_err() {
                words.push(word.to_owned());
                continue;
            }
            let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
            words.push(format!("{port}:{theirs}"));
            fresh.push((own.to_owned(), port));
        }
        let name = format!("port-forward-{}", self.forwarding.len());
        let mut process = Process::spawn(&name, self.command(&["bash", "-c", &words.join(" ")]), &self.dir)?;
        let count = fresh.len();
        let serves = async || {
            let serving = process.log().matches("Forwarding from 127.0.0.1").count() == count;
            (serving || process.ended().is_some()).then_some(())
        };
        wait::until("ports are forwarded", SOON, serves).await?;
        ensure!(process.ended().is_none(), "{}", process.log());
        self.ports.extend(fresh);
        self.forwarding.push(process);
        Ok(String::new())
    }
}

fn text(value: &serde_json::Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn etcd_image(values: &serde_json::Value) -> String {
    let image = &values["etcd"]["image"];
    format!("{}:{}", text(&image["repository"]), text(&image["tag"]))
}
