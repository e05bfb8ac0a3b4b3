//! Names in the pages: settings that services or the chart have, metrics that the sources make, alerts.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use kvasir_tests::workspace;
use serde_json::Value;

/// Every setting there is, by its dotted name: of each service, and of the chart.
pub(crate) struct Settings {
    /// Whose, and its value; a value that is none, or an empty list or map, may have anything below it.
    all: BTreeMap<String, Vec<(&'static str, bool)>>,
}

impl Settings {
    pub(crate) fn read() -> Result<Self> {
        let mut settings = Self { all: BTreeMap::new() };
        for service in ["router", "prefill-worker", "decode-worker", "kv-store", "standalone"] {
            let output = Command::new(workspace::binary(service)?).arg("--print-config").env_clear().output()?;
            ensure!(output.status.success(), "{service} --print-config");
            settings.add(service, "", &serde_yaml_ng::from_slice(&output.stdout)?);
        }
        let values = std::fs::read_to_string(workspace::root().join("helm/kvasir/values.yaml"))?;
        settings.add(CHART, "", &serde_yaml_ng::from_str(&values)?);
        Ok(settings)
    }

    fn add(&mut self, whose: &'static str, path: &str, value: &Value) {
        let open = value.is_null() || value.is_array() || value.as_object().is_some_and(serde_json::Map::is_empty);
        if !path.is_empty() {
            self.all.entry(path.to_owned()).or_default().push((whose, open));
        }
        for (key, value) in value.as_object().into_iter().flatten() {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            self.add(whose, &path, value);
        }
    }

    /// Whether a span of code is meant to be a setting: the name of a section, and something in it.
    pub(crate) fn is_one(&self, span: &str) -> bool {
        let name = name_of(span);
        let parts: Vec<_> = name.split('.').collect();
        let word = |part: &&str| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let is_file = parts.last().is_some_and(|end| FILES.contains(end));
        parts.len() > 1 && parts.iter().all(word) && !is_file && self.all.contains_key(parts[0])
    }

    /// What is wrong with it; empty if nothing is.
    pub(crate) fn wrong(&self, span: &str) -> Result<String> {
        let name = name_of(span);
        let Some(owners) = self.all.get(&name) else {
            let mut above = name.as_str();
            while let Some((rest, _)) = above.rsplit_once('.') {
                above = rest;
                match self.all.get(above) {
                    Some(owners) if owners.iter().any(|(_, open)| *open) => return Ok(String::new()),
                    Some(_) => break,
                    None => {}
                }
            }
            return Ok(format!("no service, and not the chart, has a setting {name}"));
        };
        // `kv.dtype: fp8` says a value, too: one of its services takes it.
        let Some((_, value)) = span.split_once(": ") else { return Ok(String::new()) };
        let services: Vec<_> = owners.iter().map(|(whose, _)| *whose).filter(|whose| *whose != CHART).collect();
        let mut said = String::new();
        for service in &services {
            let set = format!("{name}={value}");
            let output = Command::new(workspace::binary(service)?)
                .args(["--set", &set, "--print-config"])
                .env_clear()
                .output()?;
            if output.status.success() {
                return Ok(String::new());
            }
            said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        }
        Ok(said)
    }
}

const CHART: &str = "the chart";

/// Ends of names of files, whose beginnings are names of sections, too.
const FILES: [&str; 8] = ["md", "rs", "yaml", "json", "crt", "toml", "proto", "py"];

/// `models[].slo` and `kv.dtype: fp8` without what is beside the name.
fn name_of(span: &str) -> String {
    let name = span.split(": ").next().unwrap_or_default();
    name.split('=').next().unwrap_or_default().replace("[]", "")
}

/// Names of metrics that the sources make.
pub(crate) fn metrics() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for file in sources()? {
        let text = std::fs::read_to_string(&file)?;
        for quoted in text.split('"') {
            let ours = quoted.starts_with("kvasir_") || quoted.starts_with("vllm:");
            let plain = quoted.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_:".contains(c));
            if ours && plain {
                found.insert(bare(quoted).to_owned());
            }
        }
    }
    ensure!(found.len() > 100, "only {} metrics were found in the sources", found.len());
    Ok(found)
}

fn sources() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut todo: Vec<PathBuf> = ["crates", "services"].map(|home| workspace::root().join(home)).into();
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && name != "tests" && name != "target" {
                todo.push(path);
            } else if name.ends_with(".rs") && !name.ends_with("tests.rs") {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// Metrics that a text names, as the sources name them.
pub(crate) fn metrics_in(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("kvasir_").chain(text.match_indices("vllm:")) {
        let before = text[..at].chars().next_back();
        let end = text[at..]
            .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || (c == ':' && text[at..].starts_with("vllm:"))));
        let name = text[at..].get(..end.unwrap_or(text.len() - at)).unwrap_or_default();
        let after = &text[at + name.len()..];
        // A crate's name has no unit: `kvasir_worker=debug`, `kvasir_model::cpu`. `kvasir_worker_…` stands for several.
        let is_crate = name.split('_').count() < 3 && name.starts_with("kvasir_");
        let is_part =
            before.is_some_and(|c| c.is_ascii_alphanumeric() || "_/".contains(c)) || name.ends_with(['_', ':']);
        if !is_crate && !is_part && !after.starts_with("::") && !after.starts_with(['<', '…', '*']) {
            found.insert(bare(name).to_owned());
        }
    }
    found
}

/// Without what the format adds.
fn bare(name: &str) -> &str {
    ["_total", "_bucket", "_count", "_sum"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name)
}

/// A file of the chart.
pub(crate) fn chart(name: &str) -> Result<String> {
    let path = workspace::root().join("helm/kvasir/files").join(name);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// The alerts' names.
pub(crate) fn alerts() -> Result<Vec<String>> {
    let rules: Value = serde_yaml_ng::from_str(&chart("rules.yaml")?)?;
    let groups = rules["groups"].as_array().context("groups")?;
    let all = groups.iter().filter_map(|group| group["rules"].as_array()).flatten();
    let names: Vec<_> = all.filter_map(|rule| rule["alert"].as_str()).map(str::to_owned).collect();
    ensure!(names.len() > 15, "{names:?}");
    Ok(names)
}

/// The dashboards, as they lie in the chart.
pub(crate) fn dashboards() -> Result<String> {
    let mut text = String::new();
    for entry in std::fs::read_dir(workspace::root().join("helm/kvasir/files/dashboards"))? {
        text += &std::fs::read_to_string(entry?.path())?;
    }
    Ok(text)
}

/// The page that a link in `from` leads to, and its anchor.
pub(crate) fn target(from: &Path, link: &str) -> (PathBuf, Option<String>) {
    let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor.to_owned())));
    let path = if file.is_empty() { from.to_owned() } else { from.parent().unwrap_or(from).join(file) };
    (path, anchor)
}

#[test]
fn metrics_are_told_from_crates() {
    let text = "`kvasir_a_b_total{x}` and kvasir_worker=debug, kvasir_model::cpu, kvasir_a_b_seconds_count, `vllm:n_r` kvasir_x_y_… k";
    let found: Vec<_> = metrics_in(text).into_iter().collect();
    assert_eq!(found, ["kvasir_a_b", "kvasir_a_b_seconds", "vllm:n_r"]);
}
