//! What holds of every set of manifests, whatever the values.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};

use super::manifests::Manifest;

/// Checks all of it.
pub(crate) fn check(all: &[Manifest]) -> Result<()> {
    let mut names = BTreeSet::new();
    for manifest in all {
        ensure!(names.insert((manifest.kind(), manifest.name())), "{manifest} is there twice");
        ensure!(manifest.name().len() <= 63, "{manifest}: too long a name");
        // Bound to by nobody: no roles, no rights.
        ensure!(!manifest.kind().contains("Role"), "{manifest}: rights");
    }
    for manifest in all {
        match manifest.kind() {
            "Deployment" | "StatefulSet" | "DaemonSet" => workload(all, manifest),
            "PodDisruptionBudget" => selects(all, manifest, manifest.at("/spec/selector/matchLabels")),
            "Service" => selects(all, manifest, manifest.at("/spec/selector")),
            "HorizontalPodAutoscaler" | "ScaledObject" => scales(all, manifest),
            _ => Ok(()),
        }
        .with_context(|| manifest.to_string())?;
    }
    Ok(())
}

/// The configuration file that a workload's pods get.
pub(crate) fn config_of(all: &[Manifest], workload: &Manifest) -> Result<String> {
    let volumes = workload.list("/spec/template/spec/volumes");
    let name = volumes.iter().find_map(|volume| volume["configMap"]["name"].as_str()).context("a config map")?;
    let map = all.iter().find(|manifest| manifest.kind() == "ConfigMap" && manifest.name() == name);
    let map = map.with_context(|| format!("{workload} wants the ConfigMap {name}, which is not there"))?;
    Ok(map.text("/data/config.yaml").to_owned())
}

/// Whether labels are among others.
pub(crate) fn matches(selector: &Value, labels: &Value) -> bool {
    selector.as_object().is_some_and(|selector| selector.iter().all(|(key, value)| labels[key] == *value))
}

fn workload(all: &[Manifest], manifest: &Manifest) -> Result<()> {
    let labels = manifest.at("/spec/template/metadata/labels");
    ensure!(matches(manifest.at("/spec/selector/matchLabels"), labels), "selects other pods than its own: {labels}");
    let others = all.iter().filter(|other| other.name() != manifest.name());
    for other in others {
        let foreign = other.at("/spec/selector/matchLabels");
        let workload = ["Deployment", "StatefulSet", "DaemonSet"].contains(&other.kind());
        ensure!(!(workload && matches(foreign, labels)), "{other} selects its pods, too");
    }

    let spec = manifest.at("/spec/template/spec");
    ensure!(spec["automountServiceAccountToken"] == false, "a token that nobody needs");
    ensure!(spec["enableServiceLinks"] == false, "variables of other Services in its environment");
    let account = spec["serviceAccountName"].as_str().unwrap_or_default();
    let created = all.iter().any(|other| other.kind() == "ServiceAccount");
    let known = all.iter().any(|other| other.kind() == "ServiceAccount" && other.name() == account);
    ensure!(!account.is_empty() && (known || !created), "service account {account:?}");

    let empty = Vec::new();
    let mut volumes: BTreeSet<&str> = names(spec["volumes"].as_array().unwrap_or(&empty));
    volumes.extend(
        manifest.list("/spec/volumeClaimTemplates").iter().filter_map(|claim| claim["metadata"]["name"].as_str()),
    );
    let main = &spec["containers"][0];
    let containers = spec["containers"].as_array().into_iter().flatten();
    for container in containers.chain(spec["initContainers"].as_array().into_iter().flatten()) {
        let mounts = names(container["volumeMounts"].as_array().unwrap_or(&empty));
        ensure!(mounts.is_subset(&volumes), "mounts {mounts:?} of {volumes:?}");
        let security = &container["securityContext"];
        ensure!(
            security["readOnlyRootFilesystem"] == true
                && security["allowPrivilegeEscalation"] == false
                && security["capabilities"]["drop"][0] == "ALL",
            "{security}"
        );
    }
    let ports = names(main["ports"].as_array().unwrap_or(&empty));
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        let port = main[probe]["httpGet"]["port"].as_str().with_context(|| probe.to_owned())?;
        ensure!(ports.contains(port), "{probe} asks at {port}; there are {ports:?}");
    }
    if manifest.text("/metadata/labels/app.kubernetes.io~1component") != "etcd" {
        end_is_waited_for(all, manifest, spec)?;
    }
    Ok(())
}

/// Kubernetes kills no sooner than the service would have given up itself: ten seconds after its grace (`runtime/entry`).
fn end_is_waited_for(all: &[Manifest], manifest: &Manifest, spec: &Value) -> Result<()> {
    let config: Value = serde_yaml_ng::from_str(&config_of(all, manifest)?)?;
    let grace = config["shutdown"]["grace_ms"].as_u64().context("grace_ms")? / 1000;
    let before = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap_or(0);
    let patience = spec["terminationGracePeriodSeconds"].as_u64().context("terminationGracePeriodSeconds")?;
    ensure!(
        patience > before + grace + 10,
        "{patience} s for {before} s before SIGTERM, {grace} s of grace and 10 s of leaving"
    );
    if manifest.text("/metadata/labels/app.kubernetes.io~1component") == "router" {
        let longest = config["limits"]["request_timeout_ms"].as_u64().unwrap_or(600_000) / 1000;
        ensure!(grace >= longest, "answers may take {longest} s, and a router that leaves waits {grace} s");
        let notice = config["limits"]["notice_ms"].as_u64().unwrap_or(0);
        ensure!(notice >= 5_000 || before >= 5, "proxies that have not heard yet would find the port closed");
    }
    Ok(())
}

fn selects(all: &[Manifest], manifest: &Manifest, selector: &Value) -> Result<()> {
    let pods = all.iter().filter(|other| matches(selector, other.at("/spec/template/metadata/labels")));
    let pods: Vec<_> = pods.collect();
    ensure!(!pods.is_empty(), "selects nobody: {selector}");
    for port in manifest.list("/spec/ports") {
        let target = port["targetPort"].as_str().context("a port by name")?;
        for pod in &pods {
            let ports = names(pod.list("/spec/template/spec/containers/0/ports"));
            ensure!(ports.contains(target), "{pod} has no port {target}");
        }
    }
    Ok(())
}

fn scales(all: &[Manifest], manifest: &Manifest) -> Result<()> {
    let target = manifest.text("/spec/scaleTargetRef/name");
    let target =
        all.iter().find(|other| other.kind() == "Deployment" && other.name() == target).context("its target")?;
    // Else the next `helm upgrade` would undo what it did.
    ensure!(
        target.at("/spec").as_object().is_some_and(|spec: &Map<_, _>| !spec.contains_key("replicas")),
        "replicas are set, too"
    );
    Ok(())
}

fn names(list: &[Value]) -> BTreeSet<&str> {
    list.iter().filter_map(|entry| entry["name"].as_str()).collect()
}
