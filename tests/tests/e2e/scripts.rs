//! The commands a person types: they start what they say, explain what fails, and leave nothing behind.

use std::{
    net::TcpListener,
    path::Path,
    process::{Command, Output},
};

use anyhow::{Result, ensure};
use kvasir_tests::{
    Client, Process,
    wait::{self, SOON},
    workspace,
};

use crate::prompts::{QUESTION, chat, text};

/// A port that is free for the moment; scripts take fixed ones.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// `scripts/<name>` with programs of this test's own build.
fn script(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(workspace::root().join("scripts").join(name));
    command.args(arguments);
    command
}

fn cluster(run_dir: &Path, arguments: &[&str]) -> Result<Output> {
    let mut command = script("cluster", arguments);
    Ok(command.arg("--run-dir").arg(run_dir).arg("--bin").arg(workspace::profile_dir()).output()?)
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Command lines of processes that name `path`: what should have ended with it.
fn processes_naming(path: &Path) -> Vec<String> {
    let path = path.to_string_lossy();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(path.as_ref()))
        .collect()
}

#[tokio::test]
async fn a_cluster_goes_up_answers_and_goes_down_without_a_trace() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (run_dir, port) = (dir.path().join("run"), free_port()?.to_string());
    let up = cluster(&run_dir, &["up", "--port", &port, "--prefill", "2", "--set", "prefill.engine.threads=1"])?;
    ensure!(up.status.success() && said(&up).contains("curl"), "{}", said(&up));

    let answer = Client::new(&format!("127.0.0.1:{port}")).chat(&chat("demo", QUESTION)).await?;
    ensure!(text(&answer).starts_with("A prefix cache"), "{answer}");

    let again = cluster(&run_dir, &["up"])?;
    ensure!(again.status.success() && said(&again).contains("already up"), "{}", said(&again));
    let status = cluster(&run_dir, &["status"])?;
    ensure!(status.status.success() && said(&status).contains("prefill-1"), "{}", said(&status));
    let logs = cluster(&run_dir, &["logs", "router-0"])?;
    ensure!(logs.status.success() && said(&logs).contains("ready"), "{}", said(&logs));

    let down = cluster(&run_dir, &["down"])?;
    ensure!(down.status.success(), "{}", said(&down));
    ensure!(!run_dir.exists(), "files are left:\n{}", said(&down));
    let left = processes_naming(&run_dir);
    ensure!(left.is_empty(), "processes are left: {left:?}");
    Ok(())
}

#[tokio::test]
async fn a_cluster_that_cannot_start_says_why_and_is_down_again() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let taken = TcpListener::bind(("127.0.0.1", 0))?;
    let (run_dir, port) = (dir.path().join("run"), taken.local_addr()?.port().to_string());
    let up = cluster(&run_dir, &["up", "--port", &port])?;
    ensure!(!up.status.success(), "{}", said(&up));
    let why = format!("router-0 did not start: error: listen: cannot listen on 127.0.0.1:{port}");
    ensure!(said(&up).contains(&why), "{}", said(&up));
    let left = processes_naming(&run_dir);
    ensure!(!run_dir.exists() && left.is_empty(), "left: {left:?}\n{}", said(&up));
    Ok(())
}

#[tokio::test]
async fn quickstart_serves_until_it_is_asked_to_end() -> Result<()> {
    let (dir, port) = (tempfile::tempdir()?, free_port()?.to_string());
    let mut command = script("quickstart", &["--port", &port]);
    command.arg("--bin").arg(workspace::profile_dir()).env("TMPDIR", dir.path());
    let mut process = Process::spawn("quickstart", command, dir.path())?;
    let curl = async || (process.ended().is_some() || process.log().contains("curl http://")).then_some(());
    wait::until("quickstart shows what to try", SOON, curl).await?;

    let answer = Client::new(&format!("127.0.0.1:{port}")).chat(&chat("demo", QUESTION)).await;
    ensure!(answer.is_ok(), "{answer:?}\n{}", process.log());
    process.terminate();
    let status = process.wait(SOON).await?;
    ensure!(status.success(), "{status}\n{}", process.log());
    let left = processes_naming(dir.path());
    ensure!(left.is_empty(), "processes are left: {left:?}\n{}", process.log());
    Ok(())
}
