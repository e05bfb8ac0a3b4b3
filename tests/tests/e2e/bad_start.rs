//! What can't work does not start: the process exits with a status other than 0 and one line that names what and where.

use std::{net::TcpListener, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use kvasir_tests::{Etcd, Process, Service, logs, settings::set, wait::SOON, workspace};
use serde_json::{Value, json};

/// A configuration with which the service would start, but for what the test breaks.
fn config(service: Service, etcd: &str, model: &Path) -> Value {
    let mut config = json!({
        "id": "broken", "listen": "127.0.0.1:0", "admin": {"listen": "127.0.0.1:0"}, "log": {"format": "json"},
        "registry": {"etcd": {"endpoints": [etcd]}},
    });
    if service.is_worker() {
        set(&mut config, "model.path", model.to_string_lossy());
    }
    if service == Service::Router {
        set(&mut config, "models", json!([{"name": "demo", "path": model.to_string_lossy()}]));
    }
    config
}

/// Starts the service, which must not start; its one line must hold all of `named`.
async fn refuses(service: Service, config: &Value, named: &[&str]) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("config.yaml");
    std::fs::write(&file, config.to_string())?;
    let mut command = Command::new(workspace::binary(service.binary())?);
    command.arg("--config").arg(&file);
    let mut process = Process::spawn(service.binary(), command, dir.path())?;
    let status = process.wait(SOON).await.with_context(|| process.log())?;
    let log = process.log();
    ensure!(status.code().is_some_and(|code| code != 0), "{} ended with {status}:\n{log}", service.binary());
    let lines = logs::complaints(&log);
    ensure!(lines.len() == 1, "{} explains itself in one line, not in:\n{log}", service.binary());
    for text in named {
        ensure!(lines[0].contains(text), "{} should name {text}: {}", service.binary(), lines[0]);
    }
    Ok(())
}

const ALL: [Service; 4] = [Service::Router, Service::Prefill, Service::Decode, Service::KvStore];

#[tokio::test]
async fn an_unknown_key_is_named_with_its_file() -> Result<()> {
    for service in ALL {
        let mut config = config(service, "127.0.0.1:1", &workspace::demo_model());
        set(&mut config, "admin.lisen", "127.0.0.1:0");
        refuses(service, &config, &["admin", "lisen", "config.yaml", "listen"]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_etcd_out_of_reach_is_named() -> Result<()> {
    for service in ALL {
        let mut config = config(service, "127.0.0.1:1", &workspace::demo_model());
        set(&mut config, "registry.etcd.connect_timeout_ms", 500);
        refuses(service, &config, &["127.0.0.1:1", "etcd"]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_taken_port_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let etcd = Etcd::start(dir.path()).await?;
    let taken = TcpListener::bind(("127.0.0.1", 0))?;
    let address = taken.local_addr()?.to_string();
    for service in ALL {
        for key in ["listen", "admin.listen"] {
            let mut config = config(service, etcd.endpoint(), &workspace::demo_model());
            set(&mut config, key, address.as_str());
            refuses(service, &config, &[&address]).await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_broken_model_folder_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let etcd = Etcd::start(dir.path()).await?;
    let start = async |folder: &Path, named: &[&str]| -> Result<()> {
        for service in [Service::Prefill, Service::Decode] {
            refuses(service, &config(service, etcd.endpoint(), folder), named).await?;
        }
        Ok(())
    };

    start(Path::new("/does/not/exist"), &["/does/not/exist"]).await?;

    let folder = copy_of_demo(dir.path(), "no-config")?;
    std::fs::remove_file(folder.join("config.json"))?;
    start(&folder, &["config.json"]).await?;

    let folder = copy_of_demo(dir.path(), "cut-short")?;
    let weights = std::fs::File::options().write(true).open(folder.join("model.safetensors"))?;
    weights.set_len(weights.metadata()?.len() / 2)?;
    start(&folder, &["model.safetensors"]).await?;

    // A tensor of another shape than the configuration says: named with both shapes.
    let folder = copy_of_demo(dir.path(), "wrong-shape")?;
    edit_config(&folder, "intermediate_size", 640)?;
    start(&folder, &["mlp", "576", "640"]).await?;

    let folder = copy_of_demo(dir.path(), "unknown-family")?;
    edit_config(&folder, "model_type", "mamba")?;
    start(&folder, &["mamba"]).await
}

fn copy_of_demo(dir: &Path, name: &str) -> Result<std::path::PathBuf> {
    let (from, to) = (workspace::demo_model(), dir.join(name));
    std::fs::create_dir(&to)?;
    for file in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        std::fs::copy(from.join(file), to.join(file)).with_context(|| file.to_owned())?;
    }
    Ok(to)
}

fn edit_config(folder: &Path, key: &str, value: impl Into<Value>) -> Result<()> {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    config[key] = value.into();
    if key == "model_type" {
        config["architectures"] = json!(["MambaForCausalLM"]);
    }
    Ok(std::fs::write(path, config.to_string())?)
}
