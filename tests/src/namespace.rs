//! Tests that need a machine of their own: one whose network or file systems they may change.
//!
//! Such a test is run twice. The first run starts the second, in new namespaces in which it is root, and tells how that
//! went; the second does the work. What is mounted or connected there is gone with it.

use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Set, in the second run.
const INSIDE: &str = "KVASIR_TEST_INSIDE";

/// What a test changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// Network devices.
    Network,
    /// Mounted file systems.
    Mounts,
}

impl Namespace {
    /// Whether the caller, the test of that name (modules included), is inside and is to do its work. If not, it has been
    /// done when this returns: inside, or not at all where namespaces are left out.
    ///
    /// # Errors
    /// It failed inside, or there are no namespaces to be had.
    pub fn entered(self, test: &str) -> Result<bool> {
        if std::env::var_os(INSIDE).is_some() {
            return Ok(true);
        }
        let (option, left_out) = match self {
            Self::Network => ("--net", "KVASIR_TEST_NO_NETNS"),
            Self::Mounts => ("--mount", "KVASIR_TEST_NO_MOUNTS"),
        };
        if std::env::var(left_out).is_ok_and(|value| value == "1") {
            eprintln!("left out, nothing was tested: {left_out}=1");
            return Ok(false);
        }
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", option, "--"]).arg(std::env::current_exe()?);
        let output = command.args(["--exact", test, "--nocapture"]).env(INSIDE, "1").output();
        let output = output.context("util-linux is there")?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success() && said.contains("1 passed"),
            "this needs namespaces, or {left_out}=1:\n{said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(false)
    }
}

/// Runs a command of the system.
///
/// # Errors
/// It could not be run, or says that it failed.
pub fn run(line: &str) -> Result<()> {
    let mut words = line.split(' ');
    let output = Command::new(words.next().context("a command")?).args(words).output().context(line.to_owned())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{line}: {}", said.trim());
    Ok(())
}
