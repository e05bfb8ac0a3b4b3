//! The architecture is a test: ARCHITECTURE.md's table against `cargo metadata`, and what a reviewer would otherwise
//! have to look for in every change.

#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package, PackageId};
use kvasir_tests::workspace;

/// Longest file that one reads without losing the thread.
const LINES: usize = 600;

/// One row of the table in ARCHITECTURE.md.
struct Row {
    floor: u32,
    path: String,
    may_use: BTreeSet<String>,
    forbids_unsafe: bool,
}

impl Row {
    fn name(&self) -> &str {
        self.path.rsplit('/').next().expect("a path has a last part")
    }
}

#[test]
fn crates_use_only_what_the_architecture_says() {
    let rows = table();
    let metadata = metadata();
    let floors: BTreeMap<&str, u32> = rows.iter().map(|row| (row.name(), row.floor)).collect();
    let mut wrong = Vec::new();
    for row in &rows {
        for used in &row.may_use {
            match floors.get(used.as_str()) {
                Some(floor) if *floor < row.floor => {}
                Some(_) => wrong.push(format!("the table lets {} use {used}, which is not below it", row.name())),
                None => wrong.push(format!("the table lets {} use {used}, which it does not list", row.name())),
            }
        }
    }
    for package in ours(&metadata) {
        let Some(row) = rows.iter().find(|row| row.name() == short(&package.name)) else {
            wrong.push(format!("{} is not in ARCHITECTURE.md's table", package.name));
            continue;
        };
        let manifest = workspace::root().join(&row.path).join("Cargo.toml");
        if package.manifest_path != manifest {
            wrong.push(format!("{} is not in {}", package.name, row.path));
        }
        for dependency in &package.dependencies {
            let used = short(&dependency.name);
            let is_ours = dependency.path.is_some();
            if is_ours && dependency.kind != DependencyKind::Development && !row.may_use.contains(used) {
                wrong.push(format!("{} uses {used}, which ARCHITECTURE.md does not allow", row.name()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_pure_crates_have_no_async_runtime_and_no_network_in_their_trees() {
    let metadata = metadata();
    for name in ["kvasir-engine", "kvasir-kv-cache", "kvasir-model", "kvasir-types"] {
        assert_absent(&metadata, name, &["tokio", "tonic", "hyper", "reqwest", "etcd-client"]);
    }
    assert_absent(&metadata, "kvasir-transfer", &["tokio", "tonic", "kvasir-model", "kvasir-engine"]);
    assert_absent(&metadata, "kvasir-router", &["kvasir-transfer", "kvasir-model", "kvasir-engine", "safetensors"]);
    assert_absent(&metadata, "kvasir-admin-cli", &["kvasir-engine", "kvasir-model", "kvasir-worker"]);
}

#[test]
fn unsafe_is_forbidden_where_the_architecture_says_so() {
    let metadata = metadata();
    let rows = table();
    for package in ours(&metadata) {
        let forbids = rows.iter().any(|row| row.name() == short(&package.name) && row.forbids_unsafe);
        for target in package.targets.iter().filter(|target| forbids && (target.is_lib() || target.is_bin())) {
            let root = std::fs::read_to_string(&target.src_path).unwrap();
            assert!(root.contains("#![forbid(unsafe_code)]"), "{} lacks #![forbid(unsafe_code)]", target.src_path);
        }
    }
}

#[test]
fn packages_inherit_licence_edition_and_lints() {
    for package in metadata().workspace_packages() {
        assert_eq!(package.license.as_deref(), Some("Apache-2.0"), "{}", package.name);
        assert_eq!(package.publish.as_deref(), Some([].as_slice()), "{} could be published", package.name);
        let manifest = std::fs::read_to_string(&package.manifest_path).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{} has its own lints", package.manifest_path);
    }
    let licence = std::fs::read_to_string(workspace::root().join("LICENSE")).unwrap();
    assert!(licence.contains("Apache License") && licence.contains("Version 2.0"));
}

#[test]
fn every_source_file_is_a_chapter_of_readable_length() {
    let mut wrong = Vec::new();
    for path in files().into_iter().filter(|path| has_extension(path, &["rs"])) {
        let text = std::fs::read_to_string(&path).unwrap();
        let generated = text.lines().next().is_some_and(|line| line.contains("@generated") || line.contains("bindgen"));
        if generated || path.ends_with("build.rs") {
            continue;
        }
        if text.lines().count() > LINES {
            wrong.push(format!("{} has more than {LINES} lines", path.display()));
        }
        let tests =
            path.components().any(|part| part.as_os_str().to_string_lossy().trim_end_matches(".rs").ends_with("tests"));
        // Tests beside a file go on with that file's chapter.
        if !tests && !text.starts_with("//!") {
            wrong.push(format!("{} does not open with //!", path.display()));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn no_file_names_the_machine_it_was_written_on() {
    // Directories that exist on a developer's machine only. Written in pieces, or this file would name them.
    let places = ["work", "root", "home"].map(|name| format!("/{name}/"));
    let kinds = ["md", "rs", "toml", "proto", "yaml", "yml", "sh", "py", ""];
    let mut wrong = Vec::new();
    for path in files().into_iter().filter(|path| has_extension(path, &kinds)) {
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        for (at, line) in text.lines().enumerate() {
            let named =
                places.iter().any(|place| line.match_indices(place).any(|(start, _)| starts_a_path(line, start)));
            if named {
                wrong.push(format!("{}:{}: {line}", path.display(), at + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn links_in_the_documents_lead_somewhere() {
    let mut wrong = Vec::new();
    for path in files().into_iter().filter(|path| has_extension(path, &["md"])) {
        let text = std::fs::read_to_string(&path).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            let elsewhere = file.is_empty() || file.contains("://");
            if !elsewhere && !path.parent().unwrap().join(file).exists() {
                wrong.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_way_of_a_request_leads_through_files_that_exist() {
    let text = std::fs::read_to_string(workspace::root().join("ARCHITECTURE.md")).unwrap();
    let way = text.split("By file, the same way").nth(1).and_then(|rest| rest.split("\n\n").next()).unwrap();
    let steps: Vec<_> = way.split('`').skip(1).step_by(2).collect();
    assert!(steps.len() > 10, "the way was not understood: {steps:?}");
    for step in steps {
        // `router/text/{detok,stop}` is two files.
        let (prefix, names) = step.split_once('{').unwrap_or((step, ""));
        for name in names.trim_end_matches('}').split(',') {
            let path = format!("{prefix}{name}");
            let (package, file) = path.split_once('/').unwrap();
            let homes = ["crates", "services"].map(|home| workspace::root().join(home).join(package).join("src"));
            let found = homes
                .iter()
                .any(|src| src.join(format!("{file}.rs")).is_file() || src.join(file).join("mod.rs").is_file());
            assert!(found, "ARCHITECTURE.md leads through {path}, which does not exist");
        }
    }
}

fn metadata() -> Metadata {
    let manifest = workspace::root().join("Cargo.toml");
    // For this platform only and offline: what the build of this test has fetched is enough.
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let options = vec!["--offline".into(), "--filter-platform".into(), platform];
    MetadataCommand::new().manifest_path(manifest).other_options(options).exec().expect("cargo metadata works")
}

/// The packages that the table is about: all but the tests, which may use everything.
fn ours(metadata: &Metadata) -> impl Iterator<Item = &Package> {
    metadata.workspace_packages().into_iter().filter(|package| package.name.as_str() != "kvasir-tests")
}

fn short(package: &str) -> &str {
    package.strip_prefix("kvasir-").unwrap_or(package)
}

fn table() -> Vec<Row> {
    let text = std::fs::read_to_string(workspace::root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md is there");
    let rows: Vec<_> = text.lines().filter_map(row).collect();
    assert!(rows.len() >= 17, "ARCHITECTURE.md's table of crates was not understood: {} rows", rows.len());
    rows
}

/// `| 1 | `crates/proto` | what it is | types, runtime | forbid |`
fn row(line: &str) -> Option<Row> {
    let cells: Vec<_> = line.strip_prefix('|')?.strip_suffix('|')?.split('|').map(str::trim).collect();
    let [floor, path, _, may_use, unsafety] = cells.as_slice() else { return None };
    let may_use = may_use.split(',').map(str::trim).filter(|name| *name != "none").map(str::to_owned).collect();
    Some(Row {
        floor: floor.parse().ok()?,
        path: path.trim_matches('`').to_owned(),
        may_use,
        forbids_unsafe: *unsafety == "forbid",
    })
}

/// Fails if a package's tree of normal dependencies holds one of those names.
fn assert_absent(metadata: &Metadata, package: &str, names: &[&str]) {
    let nodes = &metadata.resolve.as_ref().expect("metadata was asked for with dependencies").nodes;
    let nodes: BTreeMap<&PackageId, _> = nodes.iter().map(|node| (&node.id, node)).collect();
    let start = metadata.workspace_packages().into_iter().find(|p| p.name.as_str() == package);
    let start = &start.unwrap_or_else(|| panic!("there is no package {package}")).id;
    let (mut seen, mut todo) = (BTreeSet::from([start]), vec![(start, package.to_owned())]);
    while let Some((id, way)) = todo.pop() {
        let name = metadata[id].name.as_str();
        assert!(!names.contains(&name), "{package} must not depend on {name}, but does: {way}");
        for dependency in &nodes[id].deps {
            let normal = dependency.dep_kinds.iter().any(|kind| kind.kind == DependencyKind::Normal);
            if normal && seen.insert(&dependency.pkg) {
                todo.push((&dependency.pkg, format!("{way} → {}", metadata[&dependency.pkg].name)));
            }
        }
    }
}

/// All files of the repository that a person wrote.
fn files() -> Vec<PathBuf> {
    let (mut found, mut todo) = (Vec::new(), vec![workspace::root().to_owned()]);
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).expect("our directories can be read").flatten() {
            let (path, kind) = (entry.path(), entry.file_type().expect("this file system knows file types"));
            let name = entry.file_name().to_string_lossy().into_owned();
            let skipped = name == "target" || name == "__pycache__" || name == ".git";
            match kind.is_dir() {
                true if !skipped => todo.push(path),
                false if !skipped && kind.is_file() => found.push(path), // `.git` is a file in a work tree
                _ => {}
            }
        }
    }
    found
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    extensions.contains(&extension.as_ref())
}

/// Whether a path begins at `start`, rather than going on there (`docs/work/…`, `http://host/home/…`).
fn starts_a_path(line: &str, start: usize) -> bool {
    !line[..start].chars().next_back().is_some_and(|before| before.is_alphanumeric() || "._-}/$~".contains(before))
}
