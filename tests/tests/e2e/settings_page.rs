//! docs/configuration.md is made from the services themselves: what a key is for from the comments of its type, its default
//! from `--print-config`, whether it may be changed while the service runs from `--help`.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use kvasir_tests::workspace;
use serde_json::Value;

/// Set to write the page anew.
const BLESS: &str = "BLESS";

/// A program, its name on the page, and the type that it is configured by.
const SERVICES: [(&str, &str, &str); 3] = [
    ("router", "Routers", "kvasir_router::Config"),
    ("decode-worker", "Workers, prefill and decode", "kvasir_worker::Config"),
    ("kv-store", "Store nodes", "kvasir_kv_store::Config"),
];

const HEAD: &str = "# Configuration

Every setting of every service. This page is made from the services' own types (`BLESS=1 cargo nextest run --workspace -E
'test(every_setting_is_documented)'`), and a test compares them.

A setting comes from the first of these that has it: what is set in the cluster while the service runs (`kvasirctl config
set`, [operations.md](operations.md#settings-that-change-while-services-run)); a flag, `--set limits.max_inflight=1000`; a
variable, `KVASIR_LIMITS__MAX_INFLIGHT=1000`; the file of `--config`, in YAML, with a section for every dot; its default. A
key that does not exist is refused wherever it is written, and so is a value that its key does not take. `--print-config`
shows what results, `kvasirctl config get NAME` what a running member has and where from. A setting that is *live* may be
changed while the service runs; all others are read when it starts.

`standalone` has one file for all its parts: sections of the same names mean the same there.
";

/// A field of a type.
#[derive(Clone)]
struct Field {
    name: String,
    kind: String,
    words: String,
}

/// All types with fields, by crate and name, and the files that they are in.
struct Types(BTreeMap<(String, String), Vec<InFile>>);

/// A type's fields, and the file that has it.
type InFile = (PathBuf, Vec<Field>);

impl Types {
    fn read() -> Result<Self> {
        let mut types = Self(BTreeMap::new());
        for folder in ["crates", "services"] {
            for found in std::fs::read_dir(workspace::root().join(folder))? {
                let found = found?.path();
                let name = found.file_name().unwrap_or_default().to_string_lossy().replace('-', "_");
                types.read_folder(&format!("kvasir_{name}"), &found.join("src"))?;
            }
        }
        Ok(types)
    }

    fn read_folder(&mut self, of: &str, folder: &Path) -> Result<()> {
        let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                self.read_folder(of, &path)?;
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                for (name, fields) in structs(&std::fs::read_to_string(&path)?) {
                    self.0.entry((of.to_owned(), name)).or_default().push((path.clone(), fields));
                }
            }
        }
        Ok(())
    }

    /// The fields of a type as it is named in that crate, and the crate that it is of; `None`: it has none.
    fn find(&self, of: &str, kind: &str) -> Option<(String, &[Field])> {
        let mut path: Vec<&str> = kind.split("::").collect();
        let name = path.pop()?;
        let of = match path.first() {
            Some(first) if first.starts_with("kvasir_") => path.remove(0).to_owned(),
            _ => of.to_owned(),
        };
        let module = path.last().copied().unwrap_or("config");
        let known = |of: &str| self.0.get(&(of.to_owned(), name.to_owned()));
        let (of, found) = match known(&of) {
            Some(found) => (of, found),
            // Imported: of the one crate that has a configuration of that name.
            None if name.ends_with("Config") => {
                let mut all = self.0.iter().filter(|((_, known), _)| known == name);
                let ((of, _), found) = all.next()?;
                (of.clone(), found)
            }
            None => return None,
        };
        let best = found.iter().find(|(path, _)| path.file_stem().is_some_and(|stem| stem == module));
        best.or_else(|| found.first()).map(|(_, fields)| (of, fields.as_slice()))
    }
}

/// The types with public fields in a source file, as rustfmt writes it.
fn structs(text: &str) -> Vec<(String, Vec<Field>)> {
    let mut found = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let line = line.strip_prefix("pub(crate) ").or_else(|| line.strip_prefix("pub ")).unwrap_or(line);
        let Some(name) = line.strip_prefix("struct ").and_then(|rest| rest.strip_suffix(" {")) else { continue };
        let (mut fields, mut words) = (Vec::new(), String::new());
        for line in lines.by_ref().take_while(|line| *line != "}") {
            let line = line.trim();
            if let Some(more) = line.strip_prefix("///") {
                words = format!("{words} {}", more.trim()).trim().to_owned();
            } else if !line.starts_with('#') {
                let field = line.trim_start_matches("pub(crate) ").trim_start_matches("pub ").trim_end_matches(',');
                if let Some((name, kind)) = field.split_once(": ") {
                    let (name, kind) = (name.to_owned(), kind.to_owned());
                    fields.push(Field { name, kind, words: std::mem::take(&mut words) });
                }
            }
        }
        found.push((name.to_owned(), fields));
    }
    found
}

/// A key of a service.
struct Key {
    key: String,
    default: String,
    words: String,
}

/// What a service may be set to, by section; of the empty one, what is in none.
struct Page {
    sections: Vec<(String, String, Vec<Key>)>,
    live: BTreeMap<String, String>,
}

impl Page {
    fn of(types: &Types, program: &str, kind: &str) -> Result<Self> {
        let run = |flag: &str| -> Result<String> {
            let output = Command::new(workspace::binary(program)?).arg(flag).output()?;
            ensure!(output.status.success(), "{program} {flag}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(String::from_utf8(output.stdout)?)
        };
        let defaults: Value = serde_yaml_ng::from_str(&run("--print-config")?)?;
        let help = run("--help")?;
        let (_, told) = help.split_once("May be changed while it runs").context("--help says what is live")?;
        let live = told.lines().skip(1).filter_map(|line| line.strip_prefix("  ")?.split_once("  "));
        let live = live.map(|(key, when)| (key.to_owned(), when.trim().to_owned())).collect();
        let mut page = Self { sections: vec![Default::default()], live };
        let (of, fields) = types.find("", kind).with_context(|| format!("no type {kind}"))?;
        for field in fields {
            let default = &defaults[&field.name];
            let is_section = default.is_object() && types.find(&of, &field.kind).is_some();
            if is_section {
                let mut keys = Vec::new();
                let (of, inner) = types.find(&of, &field.kind).context("found above")?;
                inner.iter().for_each(|inner| gather(types, &of, &field.name, inner, default, &mut keys));
                page.sections.push((field.name.clone(), field.words.clone(), keys));
            } else {
                gather(types, &of, "", field, &defaults, &mut page.sections[0].2);
            }
        }
        Ok(page)
    }

    fn section(&self, at: usize, level: &str) -> String {
        let (name, words, keys) = &self.sections[at];
        let mut text = if name.is_empty() { String::new() } else { format!("\n{level} {name}\n\n{words}\n") };
        text += "\n| key | default | live | what |\n| --- | --- | --- | --- |\n";
        for Key { key, default, words } in keys {
            let live = self.live.iter().find(|(live, _)| {
                *live == key || key.strip_prefix(live.as_str()).is_some_and(|rest| rest.starts_with('.'))
            });
            let live = live.map_or("", |(_, when)| when.as_str());
            let words = words.replace('|', "\\|");
            let _ = writeln!(text, "| `{key}` | {default} | {live} | {words} |");
        }
        text
    }
}

fn gather(types: &Types, of: &str, section: &str, field: &Field, beside: &Value, keys: &mut Vec<Key>) {
    let key = if section.is_empty() { field.name.clone() } else { format!("{section}.{}", field.name) };
    let inner =
        |kind: &str, wrap: &str| kind.strip_prefix(wrap).and_then(|rest| rest.strip_suffix('>')).map(str::to_owned);
    let kind = inner(&field.kind, "Option<").unwrap_or_else(|| field.kind.clone());
    let default = beside.get(&field.name).cloned().unwrap_or(Value::Null);
    if default.is_object()
        && let Some((of, fields)) = types.find(of, &kind)
    {
        fields.iter().for_each(|field| gather(types, &of, &key, field, &default, keys));
        return;
    }
    let shown = match &default {
        Value::Null => String::new(),
        Value::Object(map) if map.is_empty() => "none".to_owned(),
        Value::Array(list) if list.is_empty() => "none".to_owned(),
        Value::String(text) if text.is_empty() => String::new(),
        Value::String(text) => format!("`{text}`"),
        value => format!("`{value}`"),
    };
    keys.push(Key { key: key.clone(), default: shown, words: field.words.clone() });
    // What a list holds has keys of its own.
    let element = inner(&kind, "Vec<");
    let named = kind.strip_prefix("BTreeMap<String, ").and_then(|rest| rest.strip_suffix('>')).map(str::to_owned);
    let (element, key) = match (element, named) {
        (Some(element), _) => (element, format!("{key}[]")),
        (None, Some(element)) => (element, format!("{key}.NAME")),
        (None, None) => return,
    };
    if let Some((of, fields)) = types.find(of, &element) {
        fields.iter().for_each(|field| gather(types, &of, &key, field, &Value::Null, keys));
    }
}

#[test]
fn every_setting_is_documented() -> Result<()> {
    let types = Types::read()?;
    let mut pages = Vec::new();
    for (program, title, kind) in SERVICES {
        let page = Page::of(&types, program, kind).with_context(|| program.to_owned())?;
        let bare: Vec<&str> = (page.sections.iter())
            .flat_map(|(_, _, keys)| keys.iter().filter(|key| key.words.is_empty()).map(|key| key.key.as_str()))
            .collect();
        ensure!(bare.is_empty(), "{program}: nobody says what these are for: {bare:?}");
        pages.push((title, page));
    }
    // What is the same everywhere is said once.
    let same = |name: &str| {
        let texts = pages.iter().map(|(_, page)| {
            let at = page.sections.iter().position(|section| section.0 == name)?;
            Some(page.section(at, "###"))
        });
        let texts: Option<Vec<String>> = texts.collect();
        texts.is_some_and(|texts| !name.is_empty() && texts.iter().all(|text| *text == texts[0]))
    };
    let mut text = HEAD.to_owned() + "\n## Every service\n";
    let (_, first) = &pages[0];
    for (at, section) in first.sections.iter().enumerate().filter(|(_, section)| same(&section.0)) {
        debug_assert!(!section.0.is_empty());
        text += &first.section(at, "###");
    }
    for (title, page) in &pages {
        let _ = writeln!(text, "\n## {title}");
        for (at, _) in page.sections.iter().enumerate().filter(|(_, section)| !same(&section.0)) {
            text += &page.section(at, "###");
        }
    }
    let file = workspace::root().join("docs/configuration.md");
    if std::env::var_os(BLESS).is_some() {
        std::fs::write(&file, &text)?;
    }
    let found = std::fs::read_to_string(&file).unwrap_or_default();
    let missing: Vec<_> = text.lines().filter(|line| !found.lines().any(|row| row == *line)).collect();
    ensure!(
        found == text,
        "docs/configuration.md is not true any more; run this test with {BLESS}=1. It lacks: {missing:#?}"
    );
    Ok(())
}
