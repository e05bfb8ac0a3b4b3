//! Alerts and dashboards: promtool takes the rules and their tests, and every metric named anywhere is one that a service shows.

use std::{collections::BTreeSet, process::Command};

use anyhow::{Context, Result, ensure};
use kvasir_tests::{Client, Cluster, Service};
use serde_json::Value;

use super::manifests::{chart, render, said, template, tool};
use crate::prompts::{QUESTION, chat, long};

#[test]
fn promtool_takes_the_rules_and_their_tests() -> Result<()> {
    for (verb, file) in [("check", "rules.yaml"), ("test", "rules_test.yaml")] {
        let output =
            Command::new(tool("promtool")?).args([verb, "rules"]).arg(chart().join("files").join(file)).output()?;
        ensure!(output.status.success(), "{}", said(&output));
    }
    Ok(())
}

#[test]
fn rules_and_dashboards_arrive_as_they_are() -> Result<()> {
    let values = chart().join("ci/autoscaling-values.yaml");
    let all = render(&values)?;
    let rule = all.iter().find(|manifest| manifest.kind() == "PrometheusRule").context("a PrometheusRule")?;
    let mut file: Value = serde_yaml_ng::from_str(&std::fs::read_to_string(chart().join("files/rules.yaml"))?)?;
    let groups = file["groups"].as_array_mut().context("groups")?;
    for rule in groups.iter_mut().filter_map(|group| group["rules"].as_array_mut()).flatten() {
        // Each alert leads to its section; nothing else is added.
        let Some(alert) = rule["alert"].as_str().map(str::to_lowercase) else { continue };
        rule["annotations"]["runbook_url"] = format!("docs/failures.md#{alert}").into();
    }
    ensure!(rule.at("/spec/groups") == &file["groups"], "{rule:?}");
    let elsewhere = template(&values, &["monitoring.rules.runbooks=https://git.example.com/failures.md"])?;
    ensure!(
        elsewhere.contains("runbook_url: https://git.example.com/failures.md#kvasirdown\n"),
        "the page is elsewhere"
    );
    ensure!(!template(&values, &["monitoring.rules.runbooks="])?.contains("runbook_url"), "the page is nowhere");

    let without = template(&values, &["monitoring.rules.disabled={KvasirDown}"])?;
    ensure!(without.contains("alert: KvasirTwoVersions") && !without.contains("alert: KvasirDown"), "one is left out");
    let wrong = template(&values, &["monitoring.rules.disabled={KvasirUp}"]).err().context("an alert that is none")?;
    ensure!(wrong.to_string().contains("no alert is named \"KvasirUp\"; there are: "), "{wrong}");

    let mut uids = BTreeSet::new();
    for map in all.iter().filter(|manifest| manifest.name().contains("-dashboard-")) {
        for (name, text) in map.at("/data").as_object().context("data")? {
            let board: Value = serde_json::from_str(text.as_str().unwrap_or_default()).with_context(|| name.clone())?;
            ensure!(uids.insert(board["uid"].to_string()), "two dashboards of one uid");
            let mut ids = BTreeSet::new();
            for panel in board["panels"].as_array().context("panels")? {
                ensure!(ids.insert(panel["id"].to_string()), "{name}: two panels of one id");
            }
        }
    }
    ensure!(uids.len() == 3, "{uids:?}");
    Ok(())
}

/// Names of ours in a text, without what the format adds to them.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let ours = words.filter(|word| word.starts_with("kvasir_") && *word != "kvasir_");
    let bare = |word: &str| {
        let ends = ["_total", "_bucket", "_count", "_sum"];
        ends.iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word).to_owned()
    };
    ours.map(bare).collect()
}

#[tokio::test]
async fn every_metric_that_alerts_dashboards_and_scalers_ask_for_exists() -> Result<()> {
    let mut wanted = named(&template(&chart().join("ci/autoscaling-values.yaml"), &[])?);
    // Not a metric: the log filter, labels that pods get in a PodMonitor.
    wanted.retain(|name| !name.starts_with("kvasir_pool"));
    ensure!(wanted.len() > 40, "{wanted:?}");
    let dir = tempfile::tempdir()?;
    let disk = dir.path().to_string_lossy().into_owned();
    Cluster::builder()
        .set(Service::KvStore, "disk.path", disk)
        .run(async |cluster| {
            let client: Client = cluster.client();
            client.chat(&chat(cluster.model(), QUESTION)).await?;
            client.chat(&chat(cluster.model(), &long(60))).await?;
            let mut shown = BTreeSet::new();
            for node in cluster.nodes() {
                shown.extend(node.metrics().await?.families().iter().cloned());
            }
            let missing: Vec<_> = wanted.difference(&shown).collect();
            ensure!(missing.is_empty(), "nobody shows {missing:?}");
            Ok(())
        })
        .await
}
