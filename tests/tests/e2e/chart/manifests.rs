//! Running helm, and what it renders.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use kvasir_tests::workspace;
use serde::Deserialize as _;
use serde_json::Value;

/// The chart.
pub(crate) fn chart() -> PathBuf {
    workspace::root().join("helm/kvasir")
}

/// The program.
pub(crate) fn helm() -> Result<PathBuf> {
    tool("helm")
}

/// A program that `scripts/setup --test` has put there.
pub(crate) fn tool(name: &str) -> Result<PathBuf> {
    let path = workspace::target_dir().join("tools").join(name);
    ensure!(path.exists(), "{} is missing; run: scripts/setup --test", path.display());
    Ok(path)
}

/// The sets of values that are tried.
pub(crate) fn cases() -> Result<Vec<PathBuf>> {
    let files = std::fs::read_dir(chart().join("ci"))?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    ensure!(files.len() >= 5, "{files:?}");
    Ok(files)
}

/// What a program said.
pub(crate) fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A manifest.
#[derive(Debug)]
pub(crate) struct Manifest(Value);

impl Manifest {
    pub(crate) fn kind(&self) -> &str {
        self.text("/kind")
    }

    pub(crate) fn name(&self) -> &str {
        self.text("/metadata/name")
    }

    /// What is there, or null.
    pub(crate) fn at(&self, pointer: &str) -> &Value {
        self.0.pointer(pointer).unwrap_or(&Value::Null)
    }

    /// The text there, or an empty one.
    pub(crate) fn text(&self, pointer: &str) -> &str {
        self.at(pointer).as_str().unwrap_or_default()
    }

    /// The list there, or an empty one.
    pub(crate) fn list(&self, pointer: &str) -> &[Value] {
        self.at(pointer).as_array().map(Vec::as_slice).unwrap_or_default()
    }
}

impl fmt::Display for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind(), self.name())
    }
}

/// What helm renders of a file of values and `--set` arguments.
pub(crate) fn template(values: &Path, set: &[&str]) -> Result<String> {
    let mut command = Command::new(helm()?);
    command.args(["template", "release"]).arg(chart()).args(["--namespace", "llm", "--values"]).arg(values);
    for set in set {
        command.args(["--set", set]);
    }
    let output = command.output()?;
    ensure!(output.status.success(), "{}", said(&output));
    Ok(String::from_utf8(output.stdout)?)
}

/// The same, read.
pub(crate) fn render_with(values: &Path, set: &[&str]) -> Result<Vec<Manifest>> {
    let text = template(values, set)?;
    let documents = serde_yaml_ng::Deserializer::from_str(&text).map(Value::deserialize);
    let all = documents.collect::<Result<Vec<_>, _>>().context("what helm rendered is YAML")?;
    Ok(all.into_iter().filter(|document| !document.is_null()).map(Manifest).collect())
}

/// The same of a file alone.
pub(crate) fn render(values: &Path) -> Result<Vec<Manifest>> {
    render_with(values, &[]).with_context(|| values.display().to_string())
}
