//! A benchmark in a network namespace of its own: what its servers listen on is out of reach from elsewhere.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use kvasir_tests::namespace;

/// Set inside.
const INSIDE: &str = "BENCH_INSIDE"; // services take KVASIR_… for settings

/// Whether the caller is to go on: it is inside, or there is no inside to be had. Otherwise the benchmark has been run inside.
///
/// # Errors
/// It failed there.
pub fn entered() -> Result<bool> {
    if std::env::var_os(INSIDE).is_some() {
        namespace::run("ip link set lo up")?;
        return Ok(true);
    }
    if !unshare().args(["ip", "link", "show"]).output().is_ok_and(|output| output.status.success()) {
        println!("no network namespace can be had here: all servers listen on this machine's own network");
        return Ok(true);
    }
    let program = std::env::current_exe()?;
    let status = unshare().arg(program).args(std::env::args_os().skip(1)).env(INSIDE, "1").status();
    ensure!(status.context("unshare")?.success(), "it failed, as said above");
    Ok(false)
}

fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--net", "--"]);
    command
}
