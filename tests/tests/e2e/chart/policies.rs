//! Who may talk to whom, as Kubernetes would read the NetworkPolicies: a connection passes if the caller's egress rules and the
//! other's ingress rules both have it.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{laws::matches, manifests::Manifest};

/// A pod: of this release (by component), or somebody else.
#[derive(Clone)]
struct Pod {
    labels: Value,
    namespace: Value,
}

fn ours(component: &str) -> Pod {
    let labels = json!({
        "app.kubernetes.io/name": "kvasir",
        "app.kubernetes.io/instance": "release",
        "app.kubernetes.io/component": component,
    });
    Pod { labels, namespace: json!({"kubernetes.io/metadata.name": "llm"}) }
}

fn stranger(labels: Value, namespace: &str) -> Pod {
    Pod { labels, namespace: json!({"kubernetes.io/metadata.name": namespace}) }
}

/// Needed, with the default values, by port of whom is called.
pub(crate) fn check(all: &[Manifest]) -> Result<()> {
    let parts = ["router", "worker", "store", "etcd"];
    let needed = [
        ("router", "worker", 7000), // Generate, Watch, SetDuty
        ("worker", "worker", 7000), // Prefill
        ("worker", "worker", 7001), // KV blocks
        ("worker", "worker", 7002),
        ("worker", "store", 7000),
        ("worker", "store", 7001),
        ("worker", "store", 7002),
        ("store", "worker", 7001), // answers of libucp come by endpoints of its own
        ("store", "worker", 7002),
        ("store", "store", 7000), // handing over, learning
        ("store", "store", 7001),
        ("store", "store", 7002),
        ("router", "etcd", 2379),
        ("worker", "etcd", 2379),
        ("store", "etcd", 2379),
        ("etcd", "etcd", 2380),
    ];
    // Allowed beyond that, since rules for ports of calls go by kinds of pods, and harmless.
    let tolerated = [("store", "worker", 7000)];
    for from in parts {
        for to in parts {
            for port in [7000, 7001, 7002, 2379, 2380, 9090] {
                let expected = needed.contains(&(from, to, port));
                let passes = passes(all, &ours(from), &ours(to), port)?;
                ensure!(
                    passes == expected || tolerated.contains(&(from, to, port)),
                    "{from} to {to}, port {port}: passes {passes}, needed {expected}"
                );
            }
        }
    }
    let anybody = stranger(json!({"app": "web"}), "shop");
    let prometheus = stranger(json!({"app": "prometheus"}), "monitoring");
    let operator = stranger(json!({"kvasir/operator": "true"}), "llm");
    for (who, to, port, expected) in [
        (&anybody, "router", 8000, true),
        (&anybody, "router", 9090, false),
        (&anybody, "worker", 7000, false),
        (&anybody, "worker", 7001, false),
        (&anybody, "store", 7001, false),
        (&anybody, "etcd", 2379, false),
        (&prometheus, "router", 9090, true),
        (&prometheus, "worker", 9090, true),
        (&prometheus, "store", 9090, true),
        (&prometheus, "etcd", 2381, true),
        (&prometheus, "worker", 7000, false),
        (&operator, "worker", 7000, true),
        (&operator, "store", 7000, true),
        (&operator, "etcd", 2379, true),
        (&operator, "router", 9090, true),
        (&operator, "worker", 7001, false),
    ] {
        let passes = enters(all, who, &ours(to), port)?;
        ensure!(passes == expected, "{} to {to}, port {port}: {passes}", who.labels);
    }
    Ok(())
}

/// Where clients are named, others are kept out, and the release's own test is let in.
pub(crate) fn check_closed(all: &[Manifest]) -> Result<()> {
    let web = Pod { namespace: json!({"team": "web"}), ..stranger(json!({}), "shop") };
    for (who, expected) in [(&web, true), (&stranger(json!({}), "shop"), false), (&ours("test"), true)] {
        let passes = enters(all, who, &ours("router"), 8000)?;
        ensure!(passes == expected, "{} of {}: {passes}", who.labels, who.namespace);
    }
    // An etcd elsewhere, by its port; and engines of others.
    for port in [2379, 8000, 53] {
        let other = stranger(json!({}), "other");
        ensure!(leaves(all, &ours("router"), &other, port)?, "router to port {port} elsewhere");
    }
    ensure!(!leaves(all, &ours("router"), &stranger(json!({}), "other"), 443)?, "nobody downloads, so nobody goes out");
    Ok(())
}

fn passes(all: &[Manifest], from: &Pod, to: &Pod, port: u64) -> Result<bool> {
    Ok(leaves(all, from, to, port)? && enters(all, from, to, port)?)
}

fn enters(all: &[Manifest], from: &Pod, to: &Pod, port: u64) -> Result<bool> {
    let policy = policy_of(all, to)?;
    Ok(policy.list("/spec/ingress").iter().any(|rule| has_port(rule, port) && has_peer(&rule["from"], from)))
}

fn leaves(all: &[Manifest], from: &Pod, to: &Pod, port: u64) -> Result<bool> {
    let policy = policy_of(all, from)?;
    Ok(policy.list("/spec/egress").iter().any(|rule| has_port(rule, port) && has_peer(&rule["to"], to)))
}

/// The one policy that a pod is under, both ways.
fn policy_of<'a>(all: &'a [Manifest], pod: &Pod) -> Result<&'a Manifest> {
    let policies = all.iter().filter(|manifest| manifest.kind() == "NetworkPolicy");
    let mut fits = policies.filter(|policy| matches(policy.at("/spec/podSelector/matchLabels"), &pod.labels));
    let policy = fits.next().with_context(|| format!("no policy for {}", pod.labels))?;
    ensure!(fits.next().is_none(), "two policies for {}", pod.labels);
    ensure!(policy.at("/spec/policyTypes") == &json!(["Ingress", "Egress"]), "{policy}");
    Ok(policy)
}

fn has_port(rule: &Value, port: u64) -> bool {
    rule["ports"].as_array().is_none_or(|ports| ports.iter().any(|allowed| allowed["port"] == port))
}

/// No peers named: everybody. A selector of pods alone means those of the policy's own namespace.
fn has_peer(peers: &Value, pod: &Pod) -> bool {
    let Some(peers) = peers.as_array() else { return true };
    peers.iter().any(|peer| {
        let (pods, namespaces) = (&peer["podSelector"], &peer["namespaceSelector"]);
        let pod_fits = pods.is_null() || matches(&pods["matchLabels"], &pod.labels);
        let home = json!({"kubernetes.io/metadata.name": "llm"});
        let namespace_fits = match namespaces.is_null() {
            true => matches(&home, &pod.namespace),
            false => matches(&namespaces["matchLabels"], &pod.namespace),
        };
        pod_fits && namespace_fits
    })
}
