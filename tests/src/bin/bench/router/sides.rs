//! The routers under measurement, each with its workers, all on loopback.

use std::{
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use kvasir_tests::{Client, Etcd, Node, Service, wait, workspace};
use serde_json::json;

use super::plan::{MODEL, Side};
use crate::{
    child::Child,
    rivals::{self, free_port},
};

/// How long a rival may take until it serves the model.
const START: Duration = Duration::from_secs(60);
/// Of Dynamo's simulated worker: a token each ten milliseconds, about, which is what [`super::plan::STEP_MS`] says.
const MOCKER_SPEEDUP: &str = "1";

/// A router that serves.
pub struct Router {
    /// `host:port`.
    pub address: String,
    program: Program,
    // Ended with it.
    _workers: Vec<Child>,
    _etcd: Option<Etcd>,
}

enum Program {
    Ours(Box<Node>),
    Theirs(Child),
}

impl Router {
    /// Starts one; rivals are installed if need be.
    pub async fn start(side: Side, dir: &Path) -> Result<Self> {
        match side {
            Side::Ours => ours(dir).await,
            Side::Smg | Side::SglangRouter => passing(side, dir).await,
            Side::Dynamo => dynamo(dir).await,
        }
    }

    /// Processor seconds of the router's process so far.
    pub fn cpu_seconds(&self) -> f64 {
        match &self.program {
            Program::Ours(node) => node.process.cpu_seconds(),
            Program::Theirs(child) => child.cpu_seconds(),
        }
    }

    /// Memory of our router's process.
    pub fn resident_bytes(&self) -> u64 {
        match &self.program {
            Program::Ours(node) => node.process.resident_bytes(),
            Program::Theirs(_) => 0,
        }
    }
}

async fn ours(dir: &Path) -> Result<Router> {
    let etcd = Etcd::start(dir).await?;
    let worker = worker("worker-grpc", &["grpc", etcd.endpoint()], dir)?.0;
    let config = json!({
        "id": "router-0",
        "listen": "127.0.0.1:0",
        "admin": {"listen": "127.0.0.1:0"},
        // As the rivals: what is wrong is logged, not each request.
        "log": {"filter": "warn"},
        "registry": {"etcd": {"endpoints": [etcd.endpoint()]}},
        "models": [{"name": MODEL, "path": workspace::demo_model()}],
        // One worker stands for as many as it takes.
        // The same chats come again and again here; what tokenizing them costs is to be measured.
        "limits": {"max_inflight": 16_384, "text_cache_bytes": 0},
        "admission": {"per_worker": 16_384},
    });
    let mut node = Node::spawn(Service::Router, "router-0", config, dir, &[])?;
    node.ready().await?;
    let address = node.http().to_owned();
    Ok(Router { address, program: Program::Ours(Box::new(node)), _workers: vec![worker], _etcd: Some(etcd) })
}

async fn passing(side: Side, dir: &Path) -> Result<Router> {
    let python = python(side)?;
    let name = side.name();
    let (worker, url) = worker(&format!("worker-{name}"), &["http"], dir)?;
    let url = format!("http://{url}");
    let [port, metrics] = [free_port()?, free_port()?].map(|port| port.to_string());
    let mut command = match side {
        Side::Smg => Command::new(python.with_file_name("smg")),
        _ => Command::new(&python),
    };
    match side {
        Side::Smg => command.args(["launch", "--backend", "sglang"]),
        _ => command.args(["-m", "sglang_router.launch_router"]),
    };
    command.args(["--host", "127.0.0.1", "--port", &port, "--worker-urls", &url, "--policy", "round_robin"]);
    command.args(["--prometheus-host", "127.0.0.1", "--prometheus-port", &metrics]);
    command.args(["--max-concurrent-requests", "-1", "--log-level", "error"]);
    serving(side, Child::start(name, command, dir)?, port, vec![worker]).await
}

async fn dynamo(dir: &Path) -> Result<Router> {
    let python = python(Side::Dynamo)?;
    let files = dir.join("dynamo");
    std::fs::create_dir_all(&files)?;
    let start = |name: &str, arguments: &[&str]| {
        let mut command = Command::new(&python);
        command.args(["-m", &format!("dynamo.{name}")]).args(arguments);
        command.args(["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]);
        command.env("DYN_FILE_KV", &files).env("HF_HUB_OFFLINE", "1").env("DYN_LOG", "error");
        for name in ["TCP_RPC", "TCP_RESPONSE_STREAM", "EVENT_PLANE", "SYSTEM"] {
            command.env(format!("DYN_{name}_HOST"), "127.0.0.1");
        }
        Child::start(&format!("dynamo-{name}"), command, dir)
    };
    let model = workspace::demo_model();
    let model = model.to_str().context("the model's path is text")?;
    let mocker = start(
        "mocker",
        &["--model-path", model, "--model-name", MODEL, "--num-workers", "1", "--block-size", "16"]
            .into_iter()
            .chain(["--speedup-ratio", MOCKER_SPEEDUP])
            .collect::<Vec<_>>(),
    )?;
    let port = free_port()?.to_string();
    let frontend =
        start("frontend", &["--http-host", "127.0.0.1", "--http-port", &port, "--router-mode", "round-robin"])?;
    serving(Side::Dynamo, frontend, port, vec![mocker]).await
}

/// The Python that has a rival.
pub fn python(side: Side) -> Result<PathBuf> {
    match side {
        Side::Dynamo => rivals::python("dynamo", true),
        _ => rivals::python(side.name(), side == Side::SglangRouter),
    }
}

/// Waits until a rival answers a request.
async fn serving(side: Side, router: Child, port: String, workers: Vec<Child>) -> Result<Router> {
    let address = format!("127.0.0.1:{port}");
    let client = Client::new(&address);
    let (path, body) = super::plan::ids(side, 0, super::worker::Pace::AT_ONCE, 1, false);
    let answers = async || {
        // Nobody listens at first, then nobody serves the model.
        TcpStream::connect((Ipv4Addr::LOCALHOST, port.parse().ok()?)).ok()?;
        client.post(path, &body).await.ok()?.ok().ok()
    };
    let waited = wait::until(&format!("{} serves", side.name()), START, answers).await;
    waited.with_context(|| router.log().lines().last().unwrap_or("it said nothing").to_owned())?;
    Ok(Router { address, program: Program::Theirs(router), _workers: workers, _etcd: None })
}

/// A scripted worker and its address.
fn worker(name: &str, arguments: &[&str], dir: &Path) -> Result<(Child, String)> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("router-worker").args(arguments);
    let mut child = Child::start(name, command, dir)?;
    let address = child.line()?;
    Ok((child, address))
}
