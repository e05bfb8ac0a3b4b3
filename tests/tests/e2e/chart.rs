//! The Helm chart: what it renders is valid, hangs together, is understood by the services, and wrong values are refused by
//! their key's name. Nothing here needs a cluster; helm, kubernetes-validate and promtool come with `scripts/setup --test`.

mod laws;
pub(crate) mod manifests;
mod policies;
mod rules;
mod serve;

use std::process::Command;

use anyhow::{Context, Result, ensure};
use kvasir_tests::workspace;
use manifests::{Manifest, cases, chart, helm, render, render_with, said};
use serde_json::Value;

#[test]
fn what_is_made_from_the_values_is_up_to_date() -> Result<()> {
    let mut command = Command::new(workspace::root().join("scripts/chart"));
    let output = command.arg("--check").arg("--bin").arg(workspace::profile_dir()).output()?;
    ensure!(output.status.success(), "{}", said(&output));
    Ok(())
}

#[test]
fn helm_has_nothing_to_say_against_it() -> Result<()> {
    for case in cases()? {
        let output = Command::new(helm()?).args(["lint", "--strict", "--values"]).arg(&case).arg(chart()).output()?;
        ensure!(output.status.success(), "{}: {}", case.display(), said(&output));
    }
    Ok(())
}

#[test]
fn every_manifest_is_valid_for_the_oldest_and_the_newest_kubernetes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut files = Vec::new();
    for case in cases()? {
        let text = manifests::template(&case, &[])?;
        let path = dir.path().join(case.file_name().context("a file has a name")?);
        std::fs::write(&path, text)?;
        files.push(path);
    }
    for version in ["1.30", "1.37"] {
        // The oldest knows no images as volumes.
        let fits = |path: &&std::path::PathBuf| version != "1.30" || !path.ends_with("autoscaling-values.yaml");
        let mut command = Command::new(workspace::target_dir().join("venv/bin/kubernetes-validate"));
        command.args(["--strict", "--quiet", "--no-warn", "-k", version]).args(files.iter().filter(fits));
        let output = command.output().context("run scripts/setup --test")?;
        ensure!(output.status.success(), "{version}: {}", said(&output));
    }
    Ok(())
}

/// What kubernetes-validate has no schemas of: kind, and what its `spec` must and may have.
const CUSTOM: [(&str, &str, &[&str], &[&str]); 5] = [
    ("monitoring.coreos.com/v1", "PodMonitor", &["selector", "podMetricsEndpoints"], &[]),
    ("monitoring.coreos.com/v1", "ServiceMonitor", &["selector", "endpoints"], &[]),
    ("monitoring.coreos.com/v1", "PrometheusRule", &["groups"], &[]),
    (
        "keda.sh/v1alpha1",
        "ScaledObject",
        &["scaleTargetRef", "triggers"],
        &["minReplicaCount", "maxReplicaCount", "advanced"],
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute", &["parentRefs", "rules"], &["hostnames"]),
];

#[test]
fn custom_resources_are_the_known_ones_and_have_their_parts() -> Result<()> {
    let mut seen = 0;
    for case in cases()? {
        for manifest in render(&case)? {
            let api = manifest.text("/apiVersion");
            let builtin = ["v1", "apps/v1", "policy/v1", "networking.k8s.io/v1", "autoscaling/v2"].contains(&api);
            if builtin {
                continue;
            }
            let known = CUSTOM.iter().find(|(version, kind, ..)| *version == api && *kind == manifest.kind());
            let (_, _, must, may) = known.with_context(|| format!("nobody checks {api} {}", manifest.kind()))?;
            let spec = manifest.at("/spec").as_object().context("a spec")?;
            for key in *must {
                ensure!(spec.contains_key(*key), "{manifest}: spec.{key} is missing");
            }
            for key in spec.keys() {
                ensure!(must.contains(&key.as_str()) || may.contains(&key.as_str()), "{manifest}: spec.{key}?");
            }
            seen += 1;
        }
    }
    ensure!(seen >= CUSTOM.len(), "only {seen} custom resources: a set of values should have each kind");
    Ok(())
}

#[test]
fn manifests_hang_together() -> Result<()> {
    for case in cases()? {
        let all = render(&case)?;
        laws::check(&all).with_context(|| case.display().to_string())?;
    }
    Ok(())
}

#[test]
fn policies_allow_what_is_needed_and_nothing_else() -> Result<()> {
    policies::check(&render(&chart().join("ci/default-values.yaml"))?)?;
    policies::check_closed(&render(&chart().join("ci/secure-values.yaml"))?)
}

#[test]
fn every_configuration_is_understood_by_the_service_that_gets_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut seen = 0;
    for case in cases()? {
        let all = render(&case)?;
        for workload in all.iter().filter(|manifest| {
            manifest.at("/spec/template/spec/containers/0/args/0") == "--config=/etc/kvasir/config/config.yaml"
        }) {
            let config = laws::config_of(&all, workload)?;
            let path = dir.path().join("config.yaml");
            std::fs::write(&path, &config)?;
            let program = workload.text("/spec/template/spec/containers/0/command/0");
            let mut command = Command::new(workspace::binary(program)?);
            command.arg("--config").arg(&path).arg("--print-config").env_clear();
            // What the pod's variables say counts over the file.
            for variable in workload.list("/spec/template/spec/containers/0/env") {
                let name = variable["name"].as_str().unwrap_or_default();
                if name.starts_with("KVASIR_") {
                    command.env(name, if name == "KVASIR_ID" { "pod-0" } else { "[fd00::1]" });
                }
            }
            let output = command.output()?;
            ensure!(output.status.success(), "{}: {workload}: {}", case.display(), said(&output));
            let printed: Value = serde_yaml_ng::from_slice(&output.stdout)?;
            ensure!(printed["id"] == "pod-0" && printed["advertise"] == "[fd00::1]", "{workload}: {printed}");
            let listen = printed["admin"]["listen"].as_str().unwrap_or_default();
            ensure!(
                listen.starts_with("0.0.0.0:") || listen.starts_with("[::]:"),
                "{workload}: probes come to {listen}"
            );
            seen += 1;
        }
    }
    ensure!(seen > 12, "{seen} configurations");
    Ok(())
}

/// Wrong values: `--set` arguments, and what the refusal says.
const WRONG: &[(&[&str], &str)] = &[
    (&["rooter.replicas=2"], "additional properties 'rooter' not allowed"),
    (&["router.replicsa=2"], "at '/router': additional properties 'replicsa' not allowed"),
    (&["router.replicas=two"], "at '/router/replicas': got string, want integer"),
    (&["router.service.type=Clusterip"], "at '/router/service/type'"),
    (
        &["router.config.limits.max_inflght=3"],
        "at '/router/config/limits': additional properties 'max_inflght' not allowed",
    ),
    (&["router.config.limits.max_inflight=many"], "at '/router/config/limits/max_inflight': got string, want integer"),
    (&["router.config.listen=x"], "at '/router/config': additional properties 'listen' not allowed"),
    (&["store.config.evicton.memory=lru"], "at '/store/config': additional properties 'evicton' not allowed"),
    (&["store.memory=lots"], "at '/store/memory': 'lots' does not match pattern"),
    (&["store.kind=DaemonSet"], "store.disk.hostPath: a DaemonSet has no volume claims"),
    (&["etcd.replicas=2"], "at '/etcd/replicas'"),
    (&["etcd.enabled=false"], "etcd.endpoints: empty, and etcd.enabled is false"),
    (&["etcd.endpoints={http://etcd:2379}"], "at '/etcd/endpoints/0'"),
    (&["etcd.tls.secret=x"], "etcd.tls.secret: set, and etcd.enabled is true"),
    (
        &["etcd.enabled=false", "etcd.endpoints={etcd:2379}", "etcd.auth.username=kvasir"],
        "etcd.auth.passwordSecret.name: empty, and etcd.auth.username is set",
    ),
    (&["router.config.operator.tokens_file=/x"], "at '/router/config': additional properties 'operator' not allowed"),
    (&["tls.rcp.secret=x"], "at '/tls': additional properties 'rcp' not allowed"),
    (&["podDefaults.toleration={}"], "at '/podDefaults': additional properties 'toleration' not allowed"),
    (&["poolDefaults.hugePages.size=2Mi"], "pools[0].hugePages.amount: empty; say how much, at least 512Mi"),
    (
        &["poolDefaults.resources.limits.memory=256Mi"],
        "pools[0].resources.limits.memory: 256Mi, but kvMemory alone is 512Mi",
    ),
    (
        &[
            "pools[0].name=a",
            "pools[0].role=decode",
            "pools[0].model=demo",
            "pools[0].gpu.count=1",
            "pools[0].config.engine.tensor_parallel=2",
        ],
        "pools[0].gpu.count: 1, but its config.engine.tensor_parallel is 2",
    ),
    (&["models=null"], "models"),
    (
        &["models[0].name=demo", "models[0].source.path=/x", "models[0].source.pvc.claimName=y"],
        "at '/models/0/source': maxProperties",
    ),
    (&["models[0].name=demo", "models[0].sorce.path=/x"], "at '/models/0'"),
    (
        &["models[0].name=other", "models[0].source.path=/x"],
        "pools[0].model: no model is named \"demo\"; models has: other",
    ),
    (
        &["pools[0].name=router", "pools[0].role=decode", "pools[0].model=demo"],
        "pools[0].name: \"router\" is a part's own name",
    ),
    (&["pools[0].name=a", "pools[0].role=decoder", "pools[0].model=demo"], "at '/pools/0/role'"),
    (
        &["pools[0].name=a", "pools[0].role=decode", "pools[0].model=demo", "pools[0].replica=2"],
        "at '/pools/0': additional properties 'replica' not allowed",
    ),
    (
        &["router.autoscaling.kind=hpa", "router.autoscaling.minReplicas=9"],
        "router.autoscaling.maxReplicas: 8 is less than minReplicas (9)",
    ),
    (&["ingress.enabled=true"], "ingress.hosts: empty"),
    (&["httpRoute.enabled=true"], "httpRoute.parentRefs: empty"),
];

#[test]
fn wrong_values_are_refused_by_their_key() -> Result<()> {
    for (set, expected) in WRONG {
        let refused = render_with(&chart().join("ci/default-values.yaml"), set).err();
        let refused = refused.with_context(|| format!("{set:?} was taken"))?;
        let text = format!("{refused:#}");
        ensure!(text.contains(expected), "{set:?}: expected {expected:?}, got {text}");
    }
    Ok(())
}

#[test]
fn sizes_and_settings_arrive_as_they_were_meant() -> Result<()> {
    let all = render(&chart().join("ci/gpu-rdma-values.yaml"))?;
    let find = |kind: &str, name: &str| {
        all.iter()
            .find(|manifest| manifest.kind() == kind && manifest.name() == name)
            .with_context(|| format!("{kind} {name}"))
    };
    let config =
        |manifest: &Manifest| -> Result<Value> { Ok(serde_yaml_ng::from_str(&laws::config_of(&all, manifest)?)?) };

    let prefill = find("Deployment", "release-kvasir-qwen-prefill-h200")?;
    let settings = config(prefill)?;
    ensure!(settings["kv"]["memory_bytes"] == 64u64 << 30, "{settings}");
    ensure!(
        settings["transfer"]["huge_pages"] == "require"
            && settings["transfer"]["ucx"]["net_devices"] == "mlx5_0:1,mlx5_1:1",
        "{settings}"
    );
    ensure!(settings["engine"]["max_running"] == 256, "what the pool's own settings say: {settings}");
    let container = prefill.at("/spec/template/spec/containers/0");
    let limits = &container["resources"]["limits"];
    for (resource, amount) in
        [("nvidia.com/gpu", "4"), ("rdma/hca_shared_devices_a", "1"), ("hugepages-1Gi", "64Gi"), ("memory", "96Gi")]
    {
        ensure!(limits[resource] == amount, "{resource}: {limits}");
    }
    ensure!(container["securityContext"]["capabilities"]["add"][0] == "IPC_LOCK", "{container}");
    ensure!(container["image"] == "registry.example.com/llm/kvasir:0.1.0-cuda", "{container}");
    let spread = prefill.at("/spec/template/spec/topologySpreadConstraints/0/labelSelector/matchLabels");
    ensure!(spread["kvasir/pool"] == "qwen-prefill-h200", "{spread}");

    let cpu = find("Deployment", "release-kvasir-llama-cpu")?;
    ensure!(
        cpu.at("/spec/template/spec/containers/0/resources/limits") == &serde_json::json!({"memory": "96Gi"}),
        "{cpu:?}"
    );
    let store = find("DaemonSet", "release-kvasir-store")?;
    let settings = config(store)?;
    ensure!(settings["disk"]["capacity_bytes"].as_u64().is_some_and(|bytes| bytes > 2_820 << 30), "{settings}");
    ensure!(settings["quotas"]["tenants"]["research"] == 30, "{settings}");
    let etcd = settings["registry"]["etcd"]["endpoints"].as_array().context("endpoints")?;
    ensure!(etcd.len() == 3 && etcd[2] == "release-kvasir-etcd-2.release-kvasir-etcd.llm.svc:2379", "{etcd:?}");
    Ok(())
}
