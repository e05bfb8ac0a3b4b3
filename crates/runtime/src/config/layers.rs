//! Laying the layers on, and finding out who made a mistake.

use std::{collections::BTreeMap, fs, path::Path};

use serde::Deserialize;
use serde_yaml_ng::{Mapping, Value};

use super::{Base, Config, Error, suggest::suggestion};

/// Variables that begin so are configuration.
const PREFIX: &str = "KVASIR_";

/// Ours, but for kvasirctl: they may well be set in a shell that starts services.
const NOT_FOR_SERVICES: &[&str] = &["KVASIR_ETCD", "KVASIR_CONFIG", "KVASIR_CONTEXT", "KVASIR_TOKEN", "KVASIR_API_KEY"];

/// Files longer than this are no configuration.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A configuration and the same as a tree, every key present.
#[derive(Debug)]
pub struct Loaded<C> {
    /// The configuration.
    pub config: C,
    /// Its tree.
    pub tree: Value,
    origins: Origins,
}

/// Where values come from that are not the defaults: by the key that was set.
pub(super) type Origins = BTreeMap<String, &'static str>;

/// Where a value comes from: the one key on the way to it that was set, or its default.
pub(super) fn origin(origins: &Origins, key: &str) -> &'static str {
    let mut known = key;
    loop {
        if let Some(origin) = origins.get(known) {
            return origin;
        }
        match known.rsplit_once('.') {
            Some((section, _)) => known = section,
            None => return "default",
        }
    }
}

impl<C> Loaded<C> {
    /// What the service was started with, for laying more over it.
    pub fn base(&self) -> Base {
        Base::new(self.tree.clone(), self.origins.clone())
    }
}

/// Where a configuration comes from besides its defaults.
#[derive(Clone, Debug, Default)]
pub struct Layers<'a> {
    /// The file.
    pub file: Option<&'a Path>,
    /// The environment (all of it; what is not ours is skipped).
    pub env: Vec<(String, String)>,
    /// The values of `--set`, in order.
    pub set: Vec<String>,
}

impl Layers<'_> {
    /// Lays them on one another.
    pub fn load<C: Config>(&self) -> Result<Loaded<C>, Error> {
        let mut tree = tree_of(&C::default());
        let mut origins = Origins::new();
        if let Some(path) = self.file {
            let file = read(path)?;
            let set: Vec<_> = flattened(&file).into_iter().map(|(key, _)| (key, "file")).collect();
            lay::<C>(&mut tree, file, &path.display().to_string())?;
            origins.extend(set);
        }
        let mut variables: Vec<_> = self.env.iter().filter(|(name, _)| ours(name, &tree)).collect();
        variables.sort(); // the environment has no order; the same mistake should be told first every time
        for (name, value) in variables {
            let path: Vec<_> = name[PREFIX.len()..].split("__").map(str::to_lowercase).collect();
            lay_text::<C>(&mut tree, &path, value, name)?;
            origins.insert(path.join("."), "environment");
        }
        for set in &self.set {
            let layer = format!("--set {}", shortened(set));
            let malformed = || Error::Malformed { layer: layer.clone(), reason: "expected KEY=VALUE".to_owned() };
            let (key, value) = set.split_once('=').ok_or_else(malformed)?;
            let path: Vec<_> = key.trim().split('.').map(str::to_owned).collect();
            if path.iter().any(String::is_empty) {
                return Err(malformed());
            }
            lay_text::<C>(&mut tree, &path, value, &layer)?;
            origins.insert(path.join("."), "flag");
        }
        // The tree of what came out, not of what went in: it shows values in the form the service understood.
        let config = check::<C>(&tree, "defaults")?;
        Ok(Loaded { tree: tree_of(&config), config, origins })
    }
}

/// Every key with its value, in order.
pub(super) fn flattened(tree: &Value) -> Vec<(String, Value)> {
    fn walk(prefix: &str, value: &Value, out: &mut Vec<(String, Value)>) {
        match value {
            Value::Mapping(section) if !section.is_empty() => {
                for (key, value) in section {
                    let key = key.as_str().unwrap_or("?");
                    let path = if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
                    walk(&path, value, out);
                }
            }
            leaf => out.push((prefix.to_owned(), leaf.clone())),
        }
    }
    let mut out = Vec::new();
    walk("", tree, &mut out);
    out
}

/// The same for people, as `a.b: value`.
pub(crate) fn inlined(tree: &Value) -> Vec<(String, String)> {
    flattened(tree).into_iter().map(|(key, value)| (key, inline(&value))).collect()
}

fn inline(value: &Value) -> String {
    match value {
        Value::Null => "not set".to_owned(),
        Value::String(text) if text.is_empty() => r#""""#.to_owned(),
        // JSON is YAML, on one line.
        value => serde_json::to_string(value).unwrap_or_default().trim_matches('"').to_owned(),
    }
}

pub(super) fn tree_of<C: Config>(config: &C) -> Value {
    serde_yaml_ng::to_value(config).expect("a configuration of plain fields has a tree")
}

fn read(path: &Path) -> Result<Value, Error> {
    let unreadable = |reason: String| Error::Unreadable { path: path.to_owned(), reason };
    let length = fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
    if length > MAX_FILE_BYTES {
        return Err(unreadable(format!("{length} bytes, at most {MAX_FILE_BYTES} are allowed")));
    }
    let text = fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
    let malformed = |reason: String| Error::Malformed { layer: path.display().to_string(), reason };
    let tree: Value = serde_yaml_ng::from_str(&text)
        .map_err(|error| malformed(format!("not YAML: {}", one_line(&error.to_string()))))?;
    match tree {
        Value::Null => Ok(Value::Mapping(Mapping::new())), // an empty file, or only comments
        Value::Mapping(_) => Ok(tree),
        _ => Err(malformed("expected keys and values (`key: value`)".to_owned())),
    }
}

/// Whether a variable is configuration of a service. Kubernetes puts variables like `KVASIR_ROUTER_SERVICE_HOST` and
/// `KVASIR_ROUTER_PORT_8000_TCP_ADDR` into every pod that lives beside a Service named `kvasir-…`; those are skipped.
fn ours(name: &str, defaults: &Value) -> bool {
    let Some(key) = name.strip_prefix(PREFIX) else { return false };
    let known = defaults.get(key.split("__").next().unwrap_or_default().to_lowercase()).is_some();
    let service_link =
        key.ends_with("_PORT") || ["_SERVICE_HOST", "_SERVICE_PORT", "_PORT_"].iter().any(|mark| key.contains(mark));
    known || !(service_link || NOT_FOR_SERVICES.contains(&name))
}

/// Lays one value from a variable or a flag on the tree.
pub(super) fn lay_text<C: Config>(tree: &mut Value, path: &[String], text: &str, layer: &str) -> Result<(), Error> {
    let nest = |value| {
        path.iter()
            .rev()
            .fold(value, |value, key| Value::Mapping(Mapping::from_iter([(Value::from(key.as_str()), value)])))
    };
    let as_text = || nest(Value::from(text));
    match serde_yaml_ng::from_str::<Value>(text) {
        Ok(Value::String(_)) | Err(_) => lay::<C>(tree, as_text(), layer),
        Ok(value) => {
            lay::<C>(tree, nest(value), layer).or_else(|error| lay::<C>(tree, as_text(), layer).map_err(|_| error))
        }
    }
}

/// Lays a layer on the tree, if the result is a configuration; the tree stays as it was if not.
pub(super) fn lay<C: Config>(tree: &mut Value, layer: Value, name: &str) -> Result<(), Error> {
    let mut merged = tree.clone();
    merge(&mut merged, layer);
    check::<C>(&merged, name)?;
    *tree = merged;
    Ok(())
}

fn merge(under: &mut Value, over: Value) {
    match (under, over) {
        (Value::Mapping(under), Value::Mapping(over)) => {
            for (key, value) in over {
                match under.get_mut(&key) {
                    Some(below) => merge(below, value),
                    None => _ = under.insert(key, value),
                }
            }
        }
        // A section with nothing in it (all its keys commented out) says nothing.
        (Value::Mapping(_), Value::Null) => {}
        (under, over) => *under = over,
    }
}

/// The configuration that a tree is.
pub(super) fn check<C: Config>(tree: &Value, layer: &str) -> Result<C, Error> {
    serde_path_to_error::deserialize(tree.clone()).map_err(|error| {
        let key = error.path().to_string();
        let reason = one_line(&error.into_inner().to_string());
        // serde_yaml_ng puts its own idea of the path before the message.
        let reason = reason.strip_prefix(&format!("{key}: ")).unwrap_or(&reason).to_owned();
        let reason = match meant::<C>(&key, &reason) {
            // First, as what is allowed may be a long list.
            Some(meant) => reason.replacen(", expected", &format!(" (did you mean `{meant}`?), expected"), 1),
            None => reason,
        };
        Error::Refused { layer: layer.to_owned(), key, reason }
    })
}

/// The key that was meant, if serde has never heard of this one.
fn meant<C: Config>(key: &str, reason: &str) -> Option<String> {
    let named = reason.strip_prefix("unknown field ")?;
    // The one that is unknown, then those that are known.
    let names: Vec<&str> = named.split('`').skip(1).step_by(2).collect();
    let all = flattened(&tree_of(&C::default()));
    suggestion(key, names.get(1..)?.iter().copied(), all.iter().map(|(key, _)| key.as_str()))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn shortened(text: &str) -> String {
    let mut line: String = text.chars().take(80).collect();
    if line.len() < text.len() {
        line.push('…');
    }
    one_line(&line)
}

/// A section of the tree that means the same in every service; its default if the service has none.
pub(crate) fn section<T: Default + for<'de> Deserialize<'de>>(tree: &Value, key: &str) -> T {
    tree.get(key).and_then(|section| T::deserialize(section).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
