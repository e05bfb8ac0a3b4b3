//! The image: built from a base made here with the programs of this build, unpacked, and run as the user it names. And the other
//! ways to install: what deploy/compose.yaml tells the services is understood by them.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use kvasir_tests::workspace;
use serde_json::Value;

use crate::book::{
    commands::simple,
    pages::{self, What},
};

/// Where `scripts/setup --test` has put Debian's smallest system, as an archive.
fn base() -> Result<PathBuf> {
    let path = workspace::target_dir().join("tools/base.tar");
    ensure!(path.exists(), "{} is missing; run: scripts/setup --test", path.display());
    Ok(path)
}

/// buildah without anything of the machine's: its images below `root`, no namespaces, no registry.
fn buildah(root: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("buildah");
    storage(&mut command, root);
    let output = command.args(arguments).output().context("buildah; run scripts/setup --test")?;
    ensure!(output.status.success(), "buildah {arguments:?}: {}", said(&output));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn storage(command: &mut Command, root: &Path) {
    command.env("STORAGE_DRIVER", "vfs").env("BUILDAH_ISOLATION", "chroot").env("XDG_RUNTIME_DIR", root.join("run"));
    command.env("CONTAINERS_STORAGE_CONF", root.join("storage.conf"));
}

/// Where programs are, on this machine and in the image.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn the_image_runs_every_program_as_nobody() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let root = dir.path();
    let storage_conf =
        format!("[storage]\ndriver = \"vfs\"\ngraphroot = \"{0}/graph\"\nrunroot = \"{0}/run\"\n", root.display());
    std::fs::write(root.join("storage.conf"), storage_conf)?;

    let from_archive = root.join("Base");
    std::fs::write(&from_archive, "FROM scratch\nADD base.tar /\n")?;
    let context = base()?;
    let context = context.parent().context("a folder")?.to_string_lossy().into_owned();
    buildah(root, &["build", "--layers=false", "--tag", "base", "--file", &from_archive.to_string_lossy(), &context])?;

    let build = |tag: &str| -> Result<Value> {
        let mut script = Command::new(workspace::root().join("scripts/image"));
        storage(&mut script, root);
        script.args(["--base", "localhost/base", "--tag", tag, "--bin"]).arg(workspace::profile_dir());
        // libucp is in the base: nothing is to be downloaded here.
        script
            .args(["--", "--build-arg", "UCX=", "--pull=never", "--layers=false"])
            .env("SOURCE_DATE_EPOCH", "1700000000");
        let built = script.output()?;
        ensure!(built.status.success(), "{}", said(&built));
        Ok(serde_json::from_str(&buildah(root, &["inspect", "--type", "image", tag])?)?)
    };
    let described = build("kvasir:test")?;
    let layers = &described["OCIv1"]["rootfs"]["diff_ids"];
    ensure!(layers.is_array(), "{described}");
    // As the pages say it, with what scripts/image has collected: the same files again.
    for line in shown("docker build", "docker push")? {
        let mut docker = docker(root)?;
        storage(&mut docker, root);
        let done = docker.args(["-c", &line]).env("SOURCE_DATE_EPOCH", "1700000000").output()?;
        ensure!(done.status.success(), "{line}: {}", said(&done));
        if let Some(tag) = line.split(" -t ").nth(1).and_then(|rest| rest.split(' ').next()) {
            let again: Value = serde_json::from_str(&buildah(root, &["inspect", "--type", "image", tag])?)?;
            ensure!(*layers == again["OCIv1"]["rootfs"]["diff_ids"], "{line}: another build, other files");
        }
    }
    ensure!(root.join("pushed/manifest.json").exists(), "nothing was pushed");

    let config = &described["OCIv1"]["config"];
    ensure!(config["User"] == "65532:65532" && config["Entrypoint"].is_null(), "{config}");
    ensure!(config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0", "{config}");
    ensure!(
        described["OCIv1"]["created"].as_str().is_some_and(|time| time.starts_with("2023-11-14T22:13:20")),
        "{described}"
    );

    let container = buildah(root, &["from", "--pull=never", "kvasir:test"])?;
    let files = PathBuf::from(buildah(root, &["mount", &container])?);
    for program in ["router", "prefill-worker", "decode-worker", "kv-store", "standalone", "kvasirctl", "kvasir-replay"]
    {
        let run = |argument: &str| {
            Command::new("chroot")
                .arg("--userspec=65532:65532")
                .arg(&files)
                .args([program, argument])
                .env_clear()
                .env("PATH", PATH)
                .output()
        };
        let help = run("--help")?;
        ensure!(help.status.success(), "{program}: {}", said(&help));
    }
    let version = Command::new("chroot")
        .arg("--userspec=65532:65532")
        .arg(&files)
        .args(["router", "--version"])
        .env_clear()
        .env("PATH", PATH)
        .output()?;
    ensure!(said(&version).trim() == concat!("router ", env!("CARGO_PKG_VERSION")), "{}", said(&version));
    // libucp is found by those who ask for it, and the demo model is whole.
    ensure!(files.join("usr/share/kvasir/models/demo/config.json").exists(), "no demo model");
    let model = Command::new("chroot")
        .arg("--userspec=65532:65532")
        .arg(&files)
        .args(["sh", "-c", "cat /usr/share/kvasir/models/demo/*.safetensors | wc -c; touch /usr/local/x"])
        .output()?;
    ensure!(!model.status.success() && said(&model).contains("ermission denied"), "nobody may write: {}", said(&model));

    let sbom: Value = serde_json::from_slice(&std::fs::read(files.join("usr/share/kvasir/sbom.cdx.json"))?)?;
    ensure!(
        sbom["bomFormat"] == "CycloneDX" && sbom["metadata"]["timestamp"] == "2023-11-14T22:13:20Z",
        "{}",
        sbom["metadata"]
    );
    let components = sbom["components"].as_array().context("components")?;
    ensure!(components.iter().any(|part| part["name"] == "tokio"), "{} components", components.len());
    for part in components {
        ensure!(part["licenses"][0]["expression"].is_string(), "{part}");
    }
    Ok(())
}

/// `docker` where there is none: its build is buildah's, without a registry and with programs that are built; its push goes to a folder;
/// its compose is podman-compose's, whose podman (`create` and the like) writes down what it is told, and does nothing.
const DOCKER: &str = r#"#!/usr/bin/env bash
set -euo pipefail
verb=$1 && shift
case $verb in
build)
    exec buildah build --build-arg BINARIES=prebuilt --build-arg BASE=localhost/base --build-arg UCX= --pull=never --layers=false \
        --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" --timestamp "$SOURCE_DATE_EPOCH" \
        --ignorefile deploy/Dockerfile.dockerignore "$@"
    ;;
push) exec buildah push "$1" "dir:$ROOT/pushed" ;;
compose) exec "$PYTHON" -m podman_compose "$@" ;;
esac
"#;

const PODMAN: &str = r#"#!/usr/bin/env bash
printf '%s\n' "$*" >>"$ROOT/podman.txt"
case $1 in
ps) echo '[]' ;;
--version) echo 'podman version 4.3.1' ;;
esac
"#;

/// A shell in which there is a `docker`.
fn docker(root: &Path) -> Result<Command> {
    use std::os::unix::fs::PermissionsExt as _;
    let bin = root.join("bin");
    std::fs::create_dir_all(&bin)?;
    for (name, text) in [("docker", DOCKER), ("podman", PODMAN)] {
        std::fs::write(bin.join(name), text)?;
        std::fs::set_permissions(bin.join(name), std::fs::Permissions::from_mode(0o755))?;
    }
    let mut command = Command::new("bash");
    command.current_dir(workspace::root()).env("ROOT", root).env("PYTHON", workspace::python()?);
    command.env("PYTHONPATH", workspace::target_dir().join("compose"));
    command.env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default()));
    Ok(command)
}

/// What the pages show that begins so, or so; each once.
fn shown(start: &str, other: &str) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for page in pages::all()? {
        for block in page.blocks {
            let What::Commands(commands) = block.what else { continue };
            for words in commands.iter().map(|shown| simple(&shown.command)) {
                lines.extend(words?.iter().map(|words| words.join(" ")));
            }
        }
    }
    lines.retain(|line| line.starts_with(start) || line.starts_with(other));
    lines.sort();
    lines.dedup();
    ensure!(!lines.is_empty(), "the pages show no {start}");
    Ok(lines)
}

#[test]
fn compose_starts_what_the_pages_say() -> Result<()> {
    let installed = workspace::target_dir().join("compose/installed.txt");
    ensure!(installed.exists(), "podman-compose is missing; run: scripts/setup --test");
    for line in shown("docker compose", "docker compose")? {
        let dir = tempfile::tempdir()?;
        let done = docker(dir.path())?.args(["-c", &line]).output()?;
        ensure!(done.status.success(), "{line}: {}", said(&done));
        let told = std::fs::read_to_string(dir.path().join("podman.txt"))?;
        let count = |service: &str| {
            let begin = format!("create --name=kvasir_{service}_");
            told.lines().filter(|line| line.starts_with(&begin)).count()
        };
        let prefill = line.split("prefill=").nth(1).map_or(Ok(1), str::parse)?;
        for (service, wanted) in [("etcd", 1), ("kv-store", 1), ("prefill", prefill), ("decode", 1), ("router", 1)] {
            ensure!(count(service) == wanted, "{line}: {} of {service}:\n{told}", count(service));
        }
        let router = told.lines().find(|line| line.contains("name=kvasir_router_1")).context("the router")?;
        for word in [
            "127.0.0.1:8000:8000",
            "models/demo:/model:ro",
            "KVASIR_MODELS=[{name: demo, path: /model}]",
            "kvasir:0.1.0",
        ] {
            ensure!(router.contains(word), "{line}: {router}");
        }
        ensure!(told.contains("start -a kvasir_router_1"), "{line}: nothing was started:\n{told}");
    }
    // A typo does not pass.
    let dir = tempfile::tempdir()?;
    for wrong in
        ["docker compose -f deploy/compose.yml up", "docker compose -f deploy/compose.yaml up --scael prefill=2"]
    {
        ensure!(!docker(dir.path())?.args(["-c", wrong]).output()?.status.success(), "{wrong}: it went well");
    }
    Ok(())
}

#[test]
fn the_services_understand_what_compose_tells_them() -> Result<()> {
    let text = std::fs::read_to_string(workspace::root().join("deploy/compose.yaml"))?;
    let mut compose: serde_yaml_ng::Value = serde_yaml_ng::from_str(&text)?;
    // What is merged in has merges of its own.
    compose.apply_merge()?;
    compose.apply_merge()?;
    let compose: Value = serde_yaml_ng::from_value(compose)?;
    let mut seen = 0;
    for (name, service) in compose["services"].as_object().context("services")? {
        let Some(shell) = service["command"][2].as_str().filter(|shell| shell.starts_with("exec ")) else { continue };
        let mut words = shell.split(' ').skip(1); // `exec`
        let program = words.next().context("a program")?;
        let mut command = Command::new(workspace::binary(program)?);
        command.args(words.map(|word| word.replace("$$(hostname)", "f00d"))).arg("--print-config").env_clear();
        for (key, value) in service["environment"].as_object().context("environment")? {
            command.env(key, defaulted(value.as_str().context("a text")?));
        }
        let output = command.output()?;
        ensure!(output.status.success(), "{name}: {}", said(&output));
        let printed: Value = serde_yaml_ng::from_slice(&output.stdout)?;
        ensure!(
            printed["advertise"] == "f00d" && printed["registry"]["etcd"]["endpoints"][0] == "etcd:2379",
            "{name}: {printed}"
        );
        // 40 seconds of its own, at most, before it is killed.
        ensure!(printed["shutdown"]["grace_ms"] == 30_000 && service["stop_grace_period"] == "45s", "{name}");
        ensure!(service["read_only"] == true && service["cap_drop"][0] == "ALL", "{name}");
        seen += 1;
    }
    ensure!(seen == 4, "{seen} services");
    Ok(())
}

/// `${NAME:-default}` as it is with nothing set.
fn defaulted(text: &str) -> String {
    match text.split_once("${").and_then(|(before, rest)| Some((before, rest.split_once(":-")?.1.split_once('}')?))) {
        Some((before, (value, after))) => format!("{before}{value}{}", defaulted(after)),
        None => text.to_owned(),
    }
}
