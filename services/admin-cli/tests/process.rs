//! The program as scripts see it: its exit status and what it writes where.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    net::TcpListener,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

fn kvasirctl(arguments: &str, etcd: Option<&str>) -> Output {
    with(arguments, etcd, "no/such/file")
}

/// With these contexts.
fn with(arguments: &str, etcd: Option<&str>, config: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvasirctl"));
    for variable in ["KVASIR_ETCD", "KVASIR_CONTEXT", "KVASIR_TOKEN"] {
        command.env_remove(variable);
    }
    command.env("KVASIR_CONFIG", config).args(arguments.split_whitespace()).stdin(Stdio::null());
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
    for arguments in [
        "",
        "statsu",
        "status --output xml",
        "status --timeout 0",
        "status --etcd nowhere",
        "status extra",
        "status --prefix kvasir",
        "status --via nonsense",
        "status --context nobody",
        "context use nobody",
        "context set a/b",
    ] {
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

#[test]
fn help_of_every_verb_connects_to_nobody() {
    // Nobody answers there, and it would take three seconds to find out.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    silent.set_nonblocking(true).unwrap();
    let etcd = silent.local_addr().unwrap().to_string();
    for verb in ["", "status", "workers", "workers role", "kv evict", "route explain", "engine add", "context set"] {
        let output = kvasirctl(&format!("{verb} --help"), Some(&etcd));
        assert_eq!(output.status.code(), Some(0), "{verb}");
        assert!(text(&output.stdout).contains("Usage: kvasirctl"), "{verb}");
    }
    assert!(silent.accept().is_err(), "somebody connected");
}

#[test]
fn a_context_says_where_the_cluster_is_unless_something_nearer_does() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("contexts/config.yaml").to_string_lossy().into_owned();
    let run = |arguments: &str, etcd: Option<&str>| with(arguments, etcd, &config);
    let asked = |arguments: &str, etcd: Option<&str>| {
        let output = run(&format!("{arguments} status --timeout 20"), etcd);
        assert_eq!(output.status.code(), Some(1));
        let line = text(&output.stderr).to_owned();
        line.strip_prefix("error: etcd at ").unwrap().split(": no answer").next().unwrap().to_owned()
    };
    assert_eq!(text(&run("context list", None).stdout).lines().count(), 1);
    for line in [
        "context set one --etcd 127.0.0.1:1 --prefix /one --via d-0/grpc=127.0.0.1:9 --router http://127.0.0.1:8",
        "context set two --etcd 127.0.0.1:2,127.0.0.1:3",
    ] {
        assert_eq!(run(line, None).status.code(), Some(0), "{line}");
    }
    assert_eq!(asked("", None), "127.0.0.1:1", "the first one that was made");
    assert_eq!(asked("", Some("127.0.0.1:4")), "127.0.0.1:4", "a variable is nearer than the current one");
    assert_eq!(asked("--context two", Some("127.0.0.1:4")), "127.0.0.1:2, 127.0.0.1:3", "a named one is nearer");
    assert_eq!(asked("--context two --etcd 127.0.0.1:5", None), "127.0.0.1:5", "a flag is nearest");
    assert_eq!(run("context use two", None).status.code(), Some(0));
    assert_eq!(asked("", None), "127.0.0.1:2, 127.0.0.1:3");

    let shown: serde_json::Value = serde_json::from_slice(&run("context show one --output json", None).stdout).unwrap();
    assert_eq!(shown["prefix"], "/one");
    assert_eq!(shown["via"][0], "d-0/grpc=127.0.0.1:9");
    let list = run("context list", None);
    assert!(text(&list.stdout).lines().any(|line| line.starts_with("*  two")), "{}", text(&list.stdout));

    let refused = run("context remove two", None);
    assert_eq!(refused.status.code(), Some(1), "nobody to ask, and no --yes");
    assert!(text(&refused.stderr).contains("--yes"));
    assert_eq!(run("context remove two --yes", None).status.code(), Some(0));
    assert_eq!(run("status --context two", None).status.code(), Some(2));
    assert_eq!(text(&run("context list", None).stdout).lines().count(), 2);
}

#[test]
fn a_broken_file_of_contexts_is_one_line_and_stops_only_what_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.yaml");
    std::fs::write(&config, "contexts: {a: {ectd: [b:1]}}").unwrap();
    let config = config.to_string_lossy();
    let output = with("status", None, &config);
    assert_eq!(output.status.code(), Some(2));
    let line = text(&output.stderr);
    assert!(line.contains("ectd") && line.contains("config.yaml") && line.lines().count() == 1, "{line}");
    assert_eq!(with("--version", None, &config).status.code(), Some(0));
}

#[test]
fn a_token_that_cannot_be_read_is_named_before_anybody_is_asked() {
    let output = kvasirctl("worker pin d-0 --token-file no/such/token", Some("127.0.0.1:1"));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no/such/token"), "{}", text(&output.stderr));
}
