//! The ways between members' memories, as `kvasirctl transfer` shows and measures them.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use kvasir_tests::{
    Cluster, Service,
    wait::{self, SOON},
    workspace,
};
use serde_json::{Value, json};

use crate::{
    operate::{beside, refused, sha256, well},
    prompts::{chat, long},
};

/// A measurement of half a minute, beside which others can be looked at.
fn begin(cluster: &Cluster, token: &str, a: &str, b: &str) -> Result<Child> {
    let mut command = Command::new(workspace::binary("kvasirctl")?);
    command.args([
        "--etcd",
        cluster.etcd_endpoint(),
        "--token-file",
        token,
        "transfer",
        "test",
        a,
        b,
        "--seconds",
        "30",
    ]);
    Ok(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
}

/// What it said when it failed.
async fn failed(child: Child) -> Result<String> {
    let output = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
    ensure!(output.status.code() == Some(1), "{output:?}");
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Begins a long measurement, and waits until the other end has lent its memory.
async fn under_way(cluster: &Cluster, token: &str, a: &str, b: (Service, usize)) -> Result<Child> {
    let lender = cluster.node(b.0, b.1);
    let lent = || lender.process.log().matches("for a measurement").count();
    let before = lent();
    let child = begin(cluster, token, a, lender.id())?;
    wait::until(&format!("{} lends", lender.id()), SOON, async || (lent() > before).then_some(())).await?;
    Ok(child)
}

fn short<'a>(token: &'a str, a: &'a str, b: &'a str) -> [&'a str; 10] {
    ["transfer", "test", a, b, "--seconds", "1", "--size", "4KiB", "--token-file", token]
}

/// Waits until a measurement between them is not refused.
async fn free(cluster: &Cluster, token: &str, a: &str, b: &str) -> Result<()> {
    let short = short(token, a, b);
    let asked = async || beside(cluster, &short).await.ok()?.0.then_some(());
    wait::until(&format!("{a} and {b} are free"), SOON, asked).await
}

#[tokio::test]
async fn ways_are_measured_for_operators_one_at_a_time_and_end_with_either_end() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = dir.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let token = file("alice", "alices-token")?;
    let tokens = file("tokens", &format!("alice {}\n", sha256("alices-token")?))?;
    let mut builder = Cluster::builder().decode(3).kv_store(1).set(Service::Decode, "decode.local_prefill_tokens", 0);
    for service in [Service::Router, Service::Prefill, Service::Decode, Service::KvStore] {
        builder = builder.set(service, "operator.tokens_file", json!(tokens));
    }
    // What is stopped answers nobody.
    builder = builder.set(Service::Decode, "transfer.transports", "tcp");
    builder
        .run(async |cluster| {
            for warning in ["a worker", "prefill failed", "transfer", "peer", "store"] {
                cluster.expect_warning(warning);
            }
            let body = chat(cluster.model(), &long(100));
            cluster.client().chat(&body).await?;
            let with_token = |words: &[&'static str]| -> Vec<String> {
                let all = ["transfer", "test"].iter().chain(words).chain(&["--token-file"]);
                all.map(|word| (*word).to_owned()).chain([token.clone()]).collect()
            };
            let test = async |cluster: &Cluster, words: &[&'static str]| {
                let all = with_token(words);
                beside(cluster, &all.iter().map(String::as_str).collect::<Vec<_>>()).await
            };

            let topology = async || {
                let topology = well(cluster, &["transfer", "topology"]).await.ok()?;
                // Its hand-overs as routers count with them, which they hear a moment later, and its ways.
                let of_prefill = topology.lines().filter(|line| line.starts_with("prefill-0") && line.contains("B/s"));
                (of_prefill.count() == 2).then_some(topology)
            };
            let topology = wait::until("both speeds are told", SOON, topology).await?;
            ensure!(topology.contains("HANDS OVER AT") && topology.contains("kv-store-0"), "{topology}");
            let topology: Value = serde_json::from_str(&well(cluster, &["transfer", "topology", "-o", "json"]).await?)?;
            let ways = topology["ways"].as_array().context("ways")?;
            ensure!(ways.iter().any(|way| way["bytes_per_second"].as_f64() > Some(0.0)), "{topology}");

            let none = refused(cluster, &["transfer", "test", "decode-0", "prefill-0"]).await?;
            ensure!(none.contains("operator's token"), "{none}");
            for (words, told) in [
                (&["decode-0", "decode-0"][..], "both ends"),
                (&["decode-0", "nobody"], "no worker or store node is called \"nobody\""),
                (&["decode-0", "prefill-0", "--size", "17MiB"], "expected 1 to 16777216"),
            ] {
                let (fine, out, err) = test(cluster, words).await?;
                ensure!(!fine && err.contains(told), "{words:?}: {out}{err}");
            }

            for (b, transport) in [("prefill-0", "tcp"), ("kv-store-0", "tcp")] {
                let words: &[&str] = &["decode-0", b, "--seconds", "1", "--size", "4KiB,1MiB", "-o", "json"];
                let (fine, out, err) = test(cluster, words).await?;
                ensure!(fine, "{out}{err}");
                let told: Value = serde_json::from_str(&out)?;
                let steps = told["steps"].as_array().context("steps")?;
                ensure!(steps.len() == 4, "{told}");
                for step in steps {
                    let [p50, p99, rate] = ["p50_us", "p99_us", "bytes_per_second"].map(|name| step[name].as_f64());
                    ensure!(p50 > Some(0.0) && p99 >= p50 && rate > Some(0.0), "{step}");
                    ensure!(step["transport"] == transport, "{step}");
                }
            }
            let few = ["prefill-0", "kv-store-0", "--read", "--size", "1MiB", "--max-bytes", "8MiB", "--seconds", "30"];
            let (fine, out, err) = test(cluster, &few).await?;
            ensure!(
                fine && out.contains("as many bytes as allowed") && out.contains("prefill-0 reads kv-store-0"),
                "{out}{err}"
            );

            // One at a time, at either end; and it is over when whoever asked is gone.
            let mut one = under_way(cluster, &token, "decode-0", (Service::Prefill, 0)).await?;
            for [a, b] in [["decode-0", "kv-store-0"], ["decode-1", "prefill-0"]] {
                let told = refused(cluster, &short(&token, a, b)).await?;
                ensure!(told.contains("another measurement goes on"), "{told}");
            }
            one.kill()?;
            one.wait()?;
            free(cluster, &token, "decode-0", "prefill-0").await?;

            // The other end dies, and stops answering.
            let broken = under_way(cluster, &token, "decode-0", (Service::Decode, 1)).await?;
            cluster.node_mut(Service::Decode, 1).process.kill();
            let told = failed(broken).await?;
            ensure!(told.contains("decode-1") && told.lines().count() == 1, "{told}");
            free(cluster, &token, "decode-0", "prefill-0").await?;
            let broken = under_way(cluster, &token, "decode-0", (Service::Decode, 2)).await?;
            cluster.node_mut(Service::Decode, 2).process.pause();
            let told = failed(broken).await?;
            ensure!(told.contains("decode-2") && told.lines().count() == 1, "{told}");
            free(cluster, &token, "decode-0", "prefill-0").await?;
            cluster.node_mut(Service::Decode, 2).process.resume();
            free(cluster, &token, "decode-2", "prefill-0").await?;

            let events = well(cluster, &["events", "--kind", "audit"]).await?;
            ensure!(events.contains("measure the way to kv-store-0") && events.contains("alice"), "{events}");
            cluster.client().chat(&body).await?;
            Ok(())
        })
        .await
}
