//! A model's folder: readable, and whole. Downloads break off, and a worker would say so only after minutes of reading.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;

use super::Finding;

/// Longest head of a safetensors file, as its own library has it.
const MAX_HEAD: u64 = 100_000_000;
/// Longest JSON file that is read.
const MAX_JSON: u64 = 256 << 20;

const WHAT: &str = "model folder";

/// Looks at all files that a worker and a router need.
pub(super) fn look(folder: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut wrong = |found: String, remedy: &str| findings.push(Finding::problem(WHAT, found, remedy));
    if let Err(error) = fs::read_dir(folder) {
        wrong(format!("{}: {error}", folder.display()), "mount it, or let the service's user read it");
        return findings;
    }
    for name in ["config.json", "tokenizer.json"] {
        if let Err(why) = json(&folder.join(name)) {
            wrong(format!("{name}: {why}"), "download it again; every model needs it");
        }
    }
    let weights = match weights(folder) {
        Ok(weights) => weights,
        Err(why) => {
            wrong(why, "download the model again, weights as safetensors");
            Vec::new()
        }
    };
    let mut bytes = 0;
    for path in &weights {
        match whole(path) {
            Ok(length) => bytes += length,
            Err(why) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                wrong(format!("{name}: {why}"), "download that file again");
            }
        }
    }
    if !has_template(folder) {
        findings.push(Finding::note(
            WHAT,
            "no chat template",
            "only /v1/completions will work; add chat_template.jinja",
        ));
    }
    if findings.iter().all(|finding| finding.level < super::Level::Problem) {
        let found = format!("whole: {} weight files, {}", weights.len(), crate::render::bytes(bytes));
        findings.insert(0, Finding::ok(WHAT, found));
    }
    findings
}

fn json(path: &Path) -> Result<Value, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let mut text = String::new();
    file.take(MAX_JSON).read_to_string(&mut text).map_err(|error| error.to_string())?;
    serde_json::from_str(&text).map_err(|error| format!("not JSON: {error}"))
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The files with weights: those of the index if there is one.
fn weights(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let index = folder.join("model.safetensors.index.json");
    if index.exists() {
        let named = |why: String| format!("model.safetensors.index.json: {why}");
        let index: Index =
            serde_json::from_value(json(&index).map_err(named)?).map_err(|error| named(error.to_string()))?;
        let mut names: Vec<String> = index.weight_map.into_values().collect();
        names.sort();
        names.dedup();
        // Names are of this folder, whatever the index says.
        let plain = |name: &String| !name.contains('/') && name.ends_with(".safetensors");
        if let Some(bad) = names.iter().find(|name| !plain(name)) {
            return Err(named(format!("{bad:?} is no file of this folder")));
        }
        return Ok(names.iter().map(|name| folder.join(name)).collect());
    }
    let entries = fs::read_dir(folder).map_err(|error| error.to_string())?.flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|end| end == "safetensors")).collect();
    files.sort();
    if files.is_empty() { Err("no *.safetensors".to_owned()) } else { Ok(files) }
}

#[derive(Deserialize)]
struct Tensor {
    data_offsets: (u64, u64),
}

/// The file's length, if it is as long as its head says.
fn whole(path: &Path) -> Result<u64, String> {
    let mut file = File::open(path).map_err(|error| error.to_string())?;
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    let mut head = [0; 8];
    file.read_exact(&mut head).map_err(|_| format!("{length} bytes are no safetensors file"))?;
    let head = u64::from_le_bytes(head);
    if head > MAX_HEAD || head > length {
        return Err(format!("not safetensors: a head of {head} bytes in {length}"));
    }
    let mut text = vec![0; usize::try_from(head).map_err(|error| error.to_string())?];
    file.read_exact(&mut text).map_err(|error| error.to_string())?;
    let tensors: BTreeMap<String, Value> =
        serde_json::from_slice(&text).map_err(|error| format!("its head: {error}"))?;
    let mut end = 0;
    for (name, tensor) in tensors.into_iter().filter(|(name, _)| name != "__metadata__") {
        let tensor: Tensor = serde_json::from_value(tensor).map_err(|error| format!("tensor {name}: {error}"))?;
        end = end.max(tensor.data_offsets.1);
    }
    let wanted = end.saturating_add(head + 8);
    if length < wanted { Err(format!("broken off: {length} of {wanted} bytes")) } else { Ok(length) }
}

fn has_template(folder: &Path) -> bool {
    folder.join("chat_template.jinja").exists()
        || folder.join("chat_template.json").exists()
        || json(&folder.join("tokenizer_config.json")).is_ok_and(|config| !config["chat_template"].is_null())
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    fn demo() -> PathBuf {
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo"))
    }

    #[test]
    fn a_whole_folder_is_told_from_one_whose_download_broke_off() {
        let found = look(&demo());
        assert!(found.iter().all(|finding| finding.level == Level::Ok), "{found:?}");
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(demo()).unwrap().flatten().filter(|entry| entry.path().is_file()) {
            fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        let weights = weights(dir.path()).unwrap();
        let length = fs::metadata(&weights[0]).unwrap().len();
        fs::OpenOptions::new().write(true).open(&weights[0]).unwrap().set_len(length - 1).unwrap();
        let broken = look(dir.path());
        assert!(broken.iter().any(|finding| finding.found.contains("broken off")), "{broken:?}");
        fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
        fs::remove_file(dir.path().join("config.json")).unwrap();
        let all = look(dir.path());
        assert_eq!(all.iter().filter(|finding| finding.level == Level::Problem).count(), 3, "{all:?}");
        assert!(all.iter().all(|finding| !finding.remedy.is_empty()));
    }

    #[test]
    fn lying_files_are_refused_before_anything_is_allocated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        for bytes in [&b"short"[..], &u64::MAX.to_le_bytes(), &[9, 0, 0, 0, 0, 0, 0, 0, b'{']] {
            fs::write(&path, bytes).unwrap();
            assert!(whole(&path).is_err(), "{bytes:?}");
        }
        fs::write(dir.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../x.safetensors"}}"#)
            .unwrap();
        assert!(weights(dir.path()).unwrap_err().contains("no file of this folder"));
        assert_eq!(look(&dir.path().join("no/such"))[0].level, Level::Problem);
    }
}
