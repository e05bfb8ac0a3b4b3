//! aiperf, NVIDIA's load generator: installed from PyPI, and told to do the same.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use kvasir_tests::workspace;
use serde_json::Value;

use crate::rivals;

/// What it is called.
pub const NAME: &str = "aiperf";

/// It, installed.
pub struct Rival {
    program: PathBuf,
}

impl Rival {
    /// Installs it if need be.
    pub fn find() -> Result<Self> {
        let python = rivals::python(NAME, true)?;
        Ok(Self { program: python.with_file_name(NAME) })
    }

    /// Processor seconds of all its processes for so many requests.
    pub fn seconds(&self, address: &str, requests: usize, lanes: usize, prompt: usize, tokens: usize) -> Result<f64> {
        let dir = tempfile::tempdir()?;
        let program = self.program.display();
        let tokenizer = workspace::demo_model();
        // bash's own account has the processor time of a command and all that it waited for.
        let line = format!(
            "TIMEFORMAT='cpu %U %S'; time {program} profile --model demo --url http://{address} --endpoint-type chat --streaming \
             --concurrency {lanes} --request-count {requests} --isl {prompt} --osl {tokens} --tokenizer {} --ui none \
             --use-server-token-count --no-gpu-telemetry --no-server-metrics --artifact-dir {} > {}/said 2>&1",
            tokenizer.display(),
            dir.path().display(),
            dir.path().display()
        );
        let output = Command::new("timeout")
            .args(["300", "bash", "-c", &line])
            .current_dir(dir.path())
            .env("HOME", dir.path())
            .output()?;
        let said = std::fs::read_to_string(dir.path().join("said")).unwrap_or_default();
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        ensure!(output.status.success(), "it ended with {}: {last}", output.status);
        let found =
            std::fs::read_to_string(dir.path().join("profile_export_aiperf.json")).context("it wrote no figures")?;
        let found: Value = serde_json::from_str(&found)?;
        let answered = found["request_count"]["avg"].as_f64().unwrap_or_default();
        ensure!(answered == requests as f64, "{answered} of {requests} requests were answered");
        let account = String::from_utf8_lossy(&output.stderr).into_owned();
        let account =
            account.lines().rev().find_map(|line| line.strip_prefix("cpu ")).context("no account of its time")?;
        let seconds = account.split(' ').map(str::parse::<f64>).sum::<Result<f64, _>>()?;
        Ok(seconds)
    }
}
