//! The program as scripts see it: its exit status and what it writes where.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    net::TcpListener,
    process::{Command, Output},
    time::{Duration, Instant},
};

fn kvasirctl(arguments: &str, etcd: Option<&str>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvasirctl"));
    command.env_remove("KVASIR_ETCD").args(arguments.split_whitespace());
    etcd.into_iter().for_each(|etcd| _ = command.env("KVASIR_ETCD", etcd));
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn an_etcd_that_cannot_be_reached_is_status_1_and_one_line_within_the_limit() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let before = Instant::now();
    let output = kvasirctl("status --timeout 300", Some(&closed));
    assert!(before.elapsed() < Duration::from_secs(5));
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), ""));
    let line = text(&output.stderr);
    assert!(
        line.starts_with(&format!("error: etcd at {closed}: no answer to ")) && line.lines().count() == 1,
        "{line}"
    );
}

#[test]
fn wrong_usage_is_status_2() {
    for arguments in
        ["", "statsu", "status --output xml", "status --timeout 0", "status --etcd nowhere", "status extra"]
    {
        let output = kvasirctl(arguments, None);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""), "{arguments:?}");
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn help_shows_examples_and_exit_statuses() {
    let output = kvasirctl("--help", None);
    assert_eq!(output.status.code(), Some(0));
    for part in ["Examples:", "Exit status:", "status", "workers", "models", "KVASIR_ETCD"] {
        assert!(text(&output.stdout).contains(part), "{part}");
    }
}
