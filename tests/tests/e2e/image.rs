//! The image: built from a base made here with the programs of this build, unpacked, and run as the user it names. And the other
//! ways to install: what deploy/compose.yaml tells the services is understood by them.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use kvasir_tests::workspace;
use serde_json::Value;

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
    let (described, again) = (build("kvasir:test")?, build("kvasir:again")?);
    let layers = &described["OCIv1"]["rootfs"]["diff_ids"];
    ensure!(layers.is_array() && *layers == again["OCIv1"]["rootfs"]["diff_ids"], "another build, other files");

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
