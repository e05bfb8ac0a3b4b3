//! Faults that the emulated device is asked for by its environment, which it reads once: each case is a process of its own.
#![allow(clippy::unwrap_used, clippy::allow_attributes, reason = "a test fails by panicking")]

use std::{env, process::Command};

/// Runs the named test of this binary with these faults, in a process of its own; what it does there is `body`.
pub fn with_faults(test: &str, faults: &[(&str, &str)], body: impl FnOnce()) {
    const IN_CHILD: &str = "CUDA_FAULTS_CHILD";
    if env::var_os(IN_CHILD).is_some() {
        return body();
    }
    let faults = faults.iter().copied().chain([(IN_CHILD, "1")]);
    let output = Command::new(env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]).envs(faults).output();
    let output = output.unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
