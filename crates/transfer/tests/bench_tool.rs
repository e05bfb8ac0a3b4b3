//! The bench program with real processes: what it says it verified has arrived, and what can't be had is an error.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Output, Stdio},
};

use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_kvasir-transfer-bench");

/// A target or server; it leaves when its standard input ends, and at the latest when it is dropped.
struct Far {
    child: Child,
    ready: Value,
}

impl Far {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).arg("--until-eof").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { child, ready: serde_json::from_str(&line).unwrap() }
    }

    fn address(&self, name: &str) -> String {
        self.ready[name].as_str().unwrap().to_owned()
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().unwrap()
}

fn found(arguments: &[&str]) -> Vec<Value> {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

const QUICK: [&str; 5] = ["--working-set", "4MiB", "--duration", "0.05", "--json"];

#[test]
fn every_byte_is_verified_both_ways_whatever_the_shape() {
    let target = Far::start(&["target", "--buffer", "4MiB"]);
    let control = target.address("control");
    for shape in [["1", "1", "1"], ["16", "3", "2"]] {
        let [batch, threads, outstanding] = shape;
        let mut arguments = vec!["initiator", &control, "--op", "read,write", "--block", "4KiB,5000", "--verify"];
        arguments.extend(["--batch", batch, "--threads", threads, "--outstanding", outstanding]);
        arguments.extend(QUICK);
        let found = found(&arguments);
        assert_eq!(found.len(), 4);
        for found in found {
            let number = |name: &str| found[name].as_f64().unwrap();
            assert!(number("verified_bytes") > 0.0 && number("verified_bytes") == number("bytes"), "{found}");
            assert!(number("gb_per_s") > 0.0 && found["latency_us"]["p50"].as_f64().unwrap() > 0.0, "{found}");
        }
    }
}

#[test]
fn a_transport_that_was_asked_for_is_the_one_that_is_measured() {
    let target = Far::start(&["target", "--buffer", "4MiB", "--transport", "tcp"]);
    let control = target.address("control");
    let found = found(&[&["initiator", &control, "--transport", "tcp"], &QUICK[..]].concat());
    assert_eq!(found[0]["over"], "tcp");
}

#[test]
fn what_cannot_be_measured_is_an_error_that_says_why() {
    let target = Far::start(&["target", "--buffer", "1MiB"]);
    let control = target.address("control");
    let too_large = run(&[&["initiator", &control], &QUICK[..]].concat());
    let nobody = run(&[&["initiator", "127.0.0.1:1"], &QUICK[..]].concat());
    let too_few = run(&[&["initiator", &control, "--block", "4MiB", "--outstanding", "2"], &QUICK[..]].concat());
    for (output, why) in [(too_large, "larger --buffer"), (nobody, "control address"), (too_few, "in progress at once")]
    {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && output.stdout.is_empty() && said.contains(why), "{said}");
    }
}

#[test]
fn the_limits_are_measured_too() {
    let server = Far::start(&["socket", "server"]);
    let address = server.address("listen");
    let sockets =
        found(&[&["socket", "client", &address, "--op", "read,write", "--block", "64KiB"], &QUICK[..]].concat());
    let ops: Vec<_> = sockets.iter().map(|found| found["op"].as_str().unwrap()).collect();
    assert_eq!(ops, ["read", "write"]);
    let local = found(&[&["local", "--block", "4KiB,1MiB"], &QUICK[..]].concat());
    let over: Vec<_> = local.iter().map(|found| found["over"].as_str().unwrap()).collect();
    assert_eq!(over, ["memcpy", "local", "memcpy", "local"]);
    assert!(sockets.iter().chain(&local).all(|found| found["bytes"].as_u64().unwrap() >= 4 << 20));
}

#[test]
fn a_topology_is_shown_as_detected_and_as_a_file_says() {
    let detected = found_text(&["topology", "--json"]);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("topology.json");
    std::fs::write(&file, &detected).unwrap();
    assert_eq!(found_text(&["topology", "--json", "--file", file.to_str().unwrap()]), detected);
    std::fs::write(&file, r#"{"devices": [{"name": "mlx5_0:1", "kind": "rdma", "node": 0}]}"#).unwrap();
    assert!(found_text(&["topology", "--file", file.to_str().unwrap()]).contains("mlx5_0:1"));
}

fn found_text(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_target_leaves_with_the_one_who_started_it() {
    let mut target = Far::start(&["target", "--buffer", "1MiB"]);
    drop(target.child.stdin.take());
    assert!(target.child.wait().unwrap().success());
}
