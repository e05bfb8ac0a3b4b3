//! `kvasirctl`'s tools against clusters that are there: load, the live view, findings, the bundle, large clusters.

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use kvasir_tests::{
    Cluster, Etcd, Members, Service,
    wait::{self, SOON},
    workspace,
};
use serde_json::Value;

use crate::ctl::ctl;

fn run(arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(workspace::binary("kvasirctl")?);
    Ok(command.env("KVASIR_CONFIG", "no/such/file").args(arguments).output()?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_of_two_hundred_workers_is_complete_and_one_screen() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let etcd = Etcd::start(dir.path()).await?;
    let _members = Members::start(etcd.endpoint(), 200).await?;
    let output = run(&["--etcd", etcd.endpoint(), "status", "--output", "json"])?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let members = report["members"].as_array().context("members")?;
    ensure!(members.len() == 200 && members.iter().all(|member| member["state"] == "ready"), "{report}");
    let total: u64 =
        report["totals"].as_array().into_iter().flatten().filter_map(|t| t["blocks"]["total"].as_u64()).sum();
    ensure!(total == 200 * kvasir_tests::members::BLOCKS, "{report}");
    let table = String::from_utf8(run(&["--etcd", etcd.endpoint(), "status"])?.stdout)?;
    ensure!(table.lines().count() < 24 && table.contains("prefill: 50 of 50 ready"), "{table}");
    ensure!(table.starts_with("one thing is wrong") && table.contains("no router"), "{table}");
    let wide = String::from_utf8(run(&["--etcd", etcd.endpoint(), "status", "-o", "wide"])?.stdout)?;
    ensure!(wide.lines().filter(|line| line.contains("decode-")).count() == 150, "{wide}");
    let checked = run(&["--etcd", etcd.endpoint(), "status", "--check"])?;
    ensure!(checked.status.code() == Some(3), "{:?}", checked.status);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_is_sent_and_told_and_the_router_is_found_by_itself() -> Result<()> {
    Cluster::builder()
        .run(async |cluster| {
            let found = ctl(
                cluster,
                &[
                    "bench",
                    "--requests",
                    "6",
                    "--concurrency",
                    "2",
                    "--prompt-tokens",
                    "20",
                    "--output-tokens",
                    "5",
                    "-o",
                    "json",
                    "--slo-ttft",
                    "60000",
                ],
            )?;
            let found: Value = serde_json::from_str(&found)?;
            ensure!(found["requests"]["answered"] == 6 && found["requests"]["failed"] == 0, "{found}");
            ensure!(found["tokens"]["output"] == 30 && found["goodput"]["good"] == 6, "{found}");
            ensure!(found["ttft_ms"]["p50"].as_f64() > Some(0.0) && found["model"] == "demo", "{found}");
            let url = format!("http://{}", cluster.node(Service::Router, 0).http());
            let open = run(&[
                "bench",
                &url,
                "--rate",
                "20",
                "--requests",
                "8",
                "--api",
                "completions",
                "--ids",
                "1000",
                "--prompt-tokens",
                "30",
                "--output-tokens",
                "3",
            ])?;
            let table = String::from_utf8(open.stdout)?;
            ensure!(
                open.status.success() && table.contains("8 answered, 0 failed") && table.contains("TPOT"),
                "{table}"
            );
            let wrong = run(&["bench", &url, "--model", "no-such", "--requests", "2"])?;
            let table = String::from_utf8(wrong.stdout)?;
            ensure!(wrong.status.code() == Some(3) && table.contains("http 404"), "{table}");
            Ok(())
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn top_doctor_and_the_bundle_look_at_a_whole_cluster() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("bundle.tar.gz").to_string_lossy().into_owned();
    Cluster::builder()
        .prefill(2)
        .run(async |cluster| {
            let top = ctl(cluster, &["top", "--sort", "name"])?;
            let names: Vec<&str> = top.lines().skip(1).filter_map(|line| line.split(' ').next()).collect();
            ensure!(names == ["decode-0", "prefill-0", "prefill-1"], "{top}");
            let rows: Value = serde_json::from_str(&ctl(cluster, &["top", "-o", "json"])?)?;
            ensure!(rows[0]["output_tokens_per_s"].as_f64().is_some(), "{rows}");

            top_on_a_terminal(cluster.etcd_endpoint(), dir.path()).await?;
            let findings: Value = serde_json::from_str(&ctl(cluster, &["doctor", "cluster", "-o", "json"])?)?;
            let all = findings.as_array().context("findings")?;
            ensure!(all.iter().all(|finding| finding["level"] == "ok"), "{findings}");
            ensure!(all.iter().any(|finding| finding["what"] == "clocks"), "{findings}");

            ctl(cluster, &["support-bundle", "--file", &file])?;
            let unpacked = Command::new("tar").arg("xzf").arg(&file).arg("-C").arg(dir.path()).output()?;
            ensure!(unpacked.status.success(), "{}", String::from_utf8_lossy(&unpacked.stderr));
            let root = dir.path().join("kvasir-support");
            for (name, mark) in [
                ("status.txt", "prefill-1"),
                ("versions.json", "protocol"),
                ("doctor.json", "clocks"),
                ("members/decode-decode-0/metrics.txt", "kvasir_worker_blocks"),
                ("members/router-router-0/planner.json", "mode"),
                ("left-out.json", "[]"),
            ] {
                let text = std::fs::read_to_string(root.join(name)).with_context(|| name.to_owned())?;
                ensure!(text.contains(mark), "{name}: {text}");
            }
            cluster.node_mut(Service::Prefill, 1).process.kill();
            let endpoint = cluster.etcd().endpoint().to_owned();
            let ill = run(&["--etcd", &endpoint, "doctor", "cluster"])?;
            let table = String::from_utf8(ill.stdout)?;
            ensure!(ill.status.code() == Some(3) && table.contains("prefill-1") && table.contains("→"), "{table}");
            Ok(())
        })
        .await
}

/// A program that is killed with its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ended = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// On a terminal (made by util-linux' `script`): keys sort, `q` leaves, and the terminal is as it was.
async fn top_on_a_terminal(etcd: &str, dir: &Path) -> Result<()> {
    let program = workspace::binary("kvasirctl")?;
    let top = format!("{} --etcd {etcd} top --interval 3600", program.display());
    let session = format!("a=$(stty -g); {top}; echo ended-$?; b=$(stty -g); test \"$a\" = \"$b\" && echo restored");
    let file = dir.join("screen");
    let mut command = Command::new("script");
    command.args(["--quiet", "--command", &session, "/dev/null"]).env("KVASIR_CONFIG", "no/such/file");
    command.env("SHELL", "/bin/sh").env("TERM", "xterm").stdin(Stdio::piped()).stdout(File::create(&file)?);
    let mut child = Killed(command.spawn().context("script, of util-linux")?);
    let mut keys = child.0.stdin.take().context("keys")?;
    let mut read = 0;
    // What is drawn from where the last mark was found up to this one.
    let mut until = async |mark: &str| {
        let what = format!("{mark:?} is on the screen");
        let drawn = wait::until(&what, SOON, async || {
            let all = std::fs::read(&file).ok()?;
            let new = String::from_utf8_lossy(all.get(read..)?).into_owned();
            let at = new.find(mark)?;
            Some((new[..at].to_owned(), at + mark.len()))
        });
        let (drawn, more) = drawn.await?;
        read += more;
        anyhow::Ok(drawn)
    };
    let first = until("by load; keys").await?;
    ensure!(first.contains("\u{1b}[?1049h") && first.contains("3 workers: "), "its own screen: {first:?}");
    until("prefill-0").await?;
    for (key, mark) in [("b", "by blocks"), ("n", "by name"), ("t", "by tokens"), ("x", "by tokens"), ("f", "by ttft")]
    {
        keys.write_all(key.as_bytes())?;
        until(mark).await?;
    }
    keys.write_all(b"q")?;
    let left = until("ended-0").await?;
    ensure!(left.contains("\u{1b}[?25h\u{1b}[?1049l"), "the screen before it: {left:?}");
    until("restored").await?;
    drop(keys);
    let ended = wait::until("script ends", SOON, async || child.0.try_wait().ok().flatten()).await?;
    ensure!(ended.success(), "{ended}");
    Ok(())
}

#[tokio::test]
async fn members_are_reached_by_another_way_than_they_advertise() -> Result<()> {
    Cluster::builder()
        .run(async |cluster| {
            let away = ctl(cluster, &["--via", "decode-0/grpc=127.0.0.1:1", "--timeout", "2000", "status"])?;
            ensure!(away.contains("decode decode-0: unreachable: grpc 127.0.0.1:1"), "{away}");
            let there = cluster.node(Service::Decode, 0).grpc().to_owned();
            let back = format!("127.0.0.1:1={there}");
            // What is taken away by its name is not given back by its address: the first that fits counts.
            let ways = ["--via", "decode-0/grpc=127.0.0.1:1", "--via", &back, "--timeout", "2000", "status"];
            ensure!(ctl(cluster, &ways)?.contains("unreachable"));
            Ok(())
        })
        .await
}
