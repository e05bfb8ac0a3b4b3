//! The documents are true: what README.md and docs show is run, or looked at by the program that it is for; links, settings, metrics
//! and alerts exist.
//!
//! Who adds a command to a page and fails here finds in the message what to do. What is a picture, or what a program says, is
//! fenced as `text`.

pub(crate) mod commands;
mod coverage;
mod follow;
mod help;
mod kubernetes;
mod names;
pub(crate) mod pages;
mod security;

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use kvasir_tests::workspace;
use pages::{Page, What};

use commands::Inspector;

/// Fails with all that is wrong.
fn none(wrong: &[String]) -> Result<()> {
    ensure!(wrong.is_empty(), "the documents are not true:\n{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn every_command_and_every_block_of_settings_is_understood() -> Result<()> {
    let mut inspector = Inspector::new()?;
    let (mut wrong, mut seen) = (Vec::new(), 0);
    let dir = tempfile::tempdir()?;
    for page in pages::all()? {
        // What the program made of its own arguments begins there; a test compares it with them.
        let made = if page.name == "docs/kvasirctl.md" { line_of(&page, "## For all commands") } else { usize::MAX };
        for block in page.blocks.iter().filter(|block| block.line < made) {
            let place = format!("{}:{}", page.name, block.line);
            match &block.what {
                What::Commands(commands) => {
                    for shown in commands {
                        seen += 1;
                        if let Err(error) = inspector.look(&place, shown) {
                            wrong.push(format!("{place}: {}: {error:#}", shown.command));
                        }
                    }
                }
                What::Settings(text) => {
                    if let Err(error) = commands::settings_are_known(text, dir.path()) {
                        wrong.push(format!("{place}: {error:#}"));
                    }
                }
                What::Text(text) => {
                    let hidden =
                        text.lines().find(|line| line.starts_with("kvasirctl ") || line.starts_with("scripts/"));
                    wrong.extend(hidden.map(|line| format!("{place}: a command is fenced as text: {line}")));
                }
                What::Python(_) => {} // `follow` runs them
            }
        }
        for (line, span) in page.spans() {
            let place = format!("{}, about line {line}", page.name);
            let whole = !span.contains(['|', '…', '<', '[', '(']);
            if whole && (span.starts_with("kvasirctl ") && line < made) {
                inspector.span(&place, &span)?;
            }
        }
    }
    wrong.extend(inspector.misunderstood()?);
    ensure!(seen > 150, "only {seen} commands were found");
    none(&wrong)
}

fn line_of(page: &Page, start: &str) -> usize {
    page.text.lines().position(|line| line.starts_with(start)).map_or(usize::MAX, |at| at + 1)
}

#[test]
fn settings_and_metrics_that_are_named_exist() -> Result<()> {
    let (settings, metrics) = (names::Settings::read()?, names::metrics()?);
    let (mut wrong, mut seen) = (Vec::new(), 0);
    let mut asked = BTreeSet::new();
    for page in pages::all()? {
        for (line, span) in page.spans().into_iter().filter(|(_, span)| settings.is_one(span)) {
            seen += 1;
            if asked.insert(span.clone()) {
                let why = settings.wrong(&span)?;
                if !why.is_empty() {
                    wrong.push(format!("{}, about line {line}: `{span}`: {why}", page.name));
                }
            }
        }
        let unknown = names::metrics_in(&page.text).into_iter().filter(|name| !metrics.contains(name));
        wrong.extend(unknown.map(|name| format!("{}: nothing shows the metric {name}", page.name)));
    }
    ensure!(seen > 100, "only {seen} settings were found");
    for (place, text) in [("rules.yaml", names::chart("rules.yaml")?), ("the dashboards", names::dashboards()?)] {
        let unknown = names::metrics_in(&text).into_iter().filter(|name| !metrics.contains(name));
        wrong.extend(unknown.map(|name| format!("{place}: nothing shows the metric {name}")));
        for word in text.split(|c: char| !(c.is_ascii_alphanumeric() || "_.".contains(c))) {
            let word = word.trim_end_matches('.');
            if settings.is_one(word) && asked.insert(word.to_owned()) {
                let why = settings.wrong(word)?;
                wrong.extend((!why.is_empty()).then(|| format!("{place}: {word}: {why}")));
            }
        }
    }
    none(&wrong)
}

#[test]
fn links_lead_to_pages_and_headings() -> Result<()> {
    let mut wrong = Vec::new();
    let mut all = pages::all()?;
    for name in ["ARCHITECTURE.md", "CONTRIBUTING.md", "helm/kvasir/README.md"] {
        // Their pictures are not fenced, which is nothing to a link.
        all.push(Page::read(name)?);
    }
    for page in &all {
        for (line, link) in page.links() {
            let (path, anchor) = names::target(&page.path, &link);
            let place = format!("{}:{line}: {link}", page.name);
            if !path.exists() {
                wrong.push(format!("{place}: there is no such file"));
            } else if let Some(anchor) = anchor {
                let name = path.canonicalize()?;
                let name = name.strip_prefix(workspace::root().canonicalize()?)?.to_string_lossy().into_owned();
                let anchors = Page::read(&name)?.anchors();
                if !anchors.contains(&anchor) {
                    wrong.push(format!("{place}: no heading there is called that; there are {}", anchors.join(", ")));
                }
            }
        }
    }
    // docs/README.md says of each page what it is for.
    let index: BTreeSet<_> = Page::read("docs/README.md")?.links().into_iter().map(|(_, link)| link).collect();
    for page in all.iter().filter_map(|page| page.name.strip_prefix("docs/")).filter(|name| *name != "README.md") {
        if !index.contains(page) {
            wrong.push(format!("docs/README.md does not say what {page} is for"));
        }
    }
    none(&wrong)
}

#[test]
fn every_alert_has_its_section() -> Result<()> {
    let anchors = Page::read("docs/failures.md")?.anchors();
    let alerts = names::alerts()?;
    let mut wrong: Vec<_> = alerts
        .iter()
        .filter(|alert| !anchors.contains(&alert.to_lowercase()))
        .map(|alert| format!("docs/failures.md has no section {alert}, which its runbook_url leads to"))
        .collect();
    let known: BTreeSet<_> = alerts.iter().map(|alert| alert.to_lowercase()).collect();
    let named = anchors.iter().filter(|anchor| anchor.starts_with("kvasir") && !anchor.starts_with("kvasirctl"));
    wrong
        .extend(named.filter(|anchor| !known.contains(*anchor)).map(|anchor| format!("{anchor} is no alert any more")));
    none(&wrong)
}

/// The table of models in docs/sizing.md: what it says follows from what it says.
#[test]
fn bytes_of_a_token_are_reckoned_right() -> Result<()> {
    let page = Page::read("docs/sizing.md")?;
    let mut seen = 0;
    for line in page.text.lines() {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [_, layers, heads, dim, token, prompt] = cells.as_slice() else { continue };
        let (Ok(layers), Ok(heads), Ok(dim)) = (layers.parse::<u64>(), heads.parse::<u64>(), dim.parse::<u64>()) else {
            continue;
        };
        let kib = 2 * layers * heads * dim * 2 / 1024;
        ensure!(*token == kib.to_string() && *prompt == format!("{} MiB", kib * 8192 / 1024), "{line}: {kib} KiB");
        seen += 1;
    }
    ensure!(seen > 6, "{seen} rows");
    for (name, expected) in [("qwen3-0.6b", 112), ("llama-3.1-8b", 128), ("qwen3-4b", 144), ("qwen2.5-0.5b", 12)] {
        let config = std::fs::read_to_string(workspace::root().join(format!("crates/model/src/shapes/{name}.json")))?;
        let config: serde_json::Value = serde_json::from_str(&config)?;
        let number = |key: &str| config[key].as_u64();
        let dim = number("head_dim").or_else(|| Some(number("hidden_size")? / number("num_attention_heads")?));
        let bytes = number("num_hidden_layers").zip(number("num_key_value_heads")).zip(dim);
        let bytes = bytes.map(|((layers, heads), dim)| 2 * layers * heads * dim * 2);
        ensure!(bytes == Some(expected * 1024), "{name}: {bytes:?}");
    }
    Ok(())
}
