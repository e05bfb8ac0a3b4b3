//! What runs on a GPU machine, on the emulated device: the emulated machine's own tests, every kernel against double precision,
//! and `kvasir-gpu-check`, as `scripts/gpu-check` calls them.

#[path = "common/emulated.rs"]
mod emulated;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

fn text(output: &Output) -> String {
    format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The tests of the emulated machine: what a device computes, and what it would punish.
#[test]
fn the_emulated_machine_does_as_a_device_would() {
    let dir = emulated::built();
    let output = Command::new(dir.join("selftest")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn kernels_that_travel_were_built_from_these_sources() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/kernels");
    let output = Command::new(script).arg("--check").output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn every_kernel_is_near_double_precision() {
    let dir = emulated::built();
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/check");
    let files = fs::read_dir(&sources).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "cpp"));
    let program = dir.join("kernel-check");
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let compiled = Command::new(compiler)
        .args(["-std=c++17", "-O1", "-o"])
        .arg(&program)
        .args(files)
        .arg("-ldl")
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", text(&compiled));
    let output = Command::new(&program).arg(dir.join("libcuda.so")).args(["emulated", "4"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("attend_decode_f16_128_exact"), "{}", text(&output));

    // Times of single kernels mean nothing here; that they run and are told does.
    let json = dir.join("speed.json");
    let output = Command::new(&program)
        .arg(dir.join("libcuda.so"))
        .args(["emulated", "quick-speed"])
        .arg(&json)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let rows: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    for (row, what) in rows.as_array().unwrap().iter().zip(["attention, batch 2", "blocks to the host"]) {
        assert!(
            row["what"].as_str().unwrap().starts_with(what) && row["of_copies"].as_f64().unwrap() > 0.0,
            "{rows:#}"
        );
    }
}

/// The whole program; and that it takes no device that is not one unless it is told to.
#[test]
fn gpu_check_says_what_is_right_and_what_is_there() {
    let dir = emulated::built();
    let work = tempfile::tempdir().unwrap();
    let json = work.path().join("results.json");
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models");
    let check = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvasir-gpu-check"));
        command.env("LD_LIBRARY_PATH", &dir).arg("--models").arg(&models).arg("--work").arg(work.path());
        command.args(args).output().unwrap()
    };
    let output = check(&[]);
    assert_eq!(output.status.code(), Some(77), "{}", text(&output));
    assert!(text(&output).contains("no GPU to check"), "{}", text(&output));
    assert_eq!(check(&["--only", "nothing"]).status.code(), Some(2));

    // PyTorch's figures, made up: that they are set beside ours is what shows.
    let baseline = work.path().join("baseline.json");
    let theirs = r#"{"matrix_tflops": 700.0, "rows": [{"what": "prefill of 256 tokens", "seconds": 1e6}]}"#;
    fs::write(&baseline, theirs).unwrap();
    let baseline = ["--baseline", baseline.to_str().unwrap()];
    assert_eq!(check(&["--baseline", "none"]).status.code(), Some(2));
    let output = check(&[&["--emulated", "--quick", "--json", json.to_str().unwrap()][..], &baseline].concat());
    assert!(output.status.success(), "{}", text(&output));
    let report: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert!(rows.iter().any(|row| row["met"] == true) && rows.iter().all(|row| row["met"] != false), "{report:#}");
    for what in
        ["golden answers", "decode, batch 1", "prefill", "prefill of 256 tokens, beside PyTorch", "blocks landed"]
    {
        assert!(rows.iter().any(|row| row["what"].as_str().unwrap().contains(what)), "{what}: {report:#}");
    }
}
