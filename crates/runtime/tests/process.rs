//! A service as a process: how it starts, is told to leave, and with what status it does.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// How long anything here may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(20);

struct Service {
    child: Option<Child>,
    dir: tempfile::TempDir,
}

impl Service {
    fn start(set: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(binary());
        command.arg("--set").arg(format!("port_file={}", dir.path().join("ports").display()));
        set.iter().for_each(|set| _ = command.args(["--set", set]));
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        Self { child: Some(child), dir }
    }

    fn ready(self) -> Self {
        until(|| self.dir.path().join("ports").exists());
        self
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().unwrap();
        kill_process(Pid::from_child(child), signal).unwrap();
    }

    fn end(mut self) -> Output {
        until(|| self.child.as_mut().unwrap().try_wait().unwrap().is_some());
        self.child.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Cargo builds examples beside the tests' directory.
fn binary() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    tests.parent().unwrap().parent().unwrap().join("examples/service")
}

fn until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn errors(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_signal_lets_requests_finish_and_ends_well() {
    for signal in [Signal::TERM, Signal::INT] {
        let service = Service::start(&["request_ms=400", "threads=1"]).ready();
        service.signal(signal);
        let output = service.end();
        let log = errors(&output);
        assert_eq!(output.status.code(), Some(0), "{log}");
        assert!(log.contains("request done"), "the request was not waited for: {log}");
    }
}

#[test]
fn a_request_that_outlasts_the_grace_is_named_by_its_id() {
    let service = Service::start(&["request_ms=100000", "shutdown.grace_ms=100", "log.format=json"]).ready();
    service.signal(Signal::TERM);
    let output = service.end();
    assert_eq!(output.status.code(), Some(0));
    let log = errors(&output);
    let warning = log.lines().find(|line| line.contains("WARN")).unwrap();
    let warning: serde_json::Value = serde_json::from_str(warning).unwrap();
    assert_eq!((&warning["fields"]["task"], &warning["span"]["request_id"]), (&"request".into(), &"r-1".into()));
}

#[test]
fn a_second_signal_does_not_wait() {
    let mut service = Service::start(&["request_ms=100000"]).ready();
    // Again and again: signals of one kind that come together are one.
    until(|| {
        service.signal(Signal::TERM);
        service.child.as_mut().unwrap().try_wait().unwrap().is_some()
    });
    assert_eq!(service.end().status.code(), Some(143));
}

#[test]
fn a_wrong_key_is_one_line_and_status_2() {
    let output = Service::start(&["admn.listen=127.0.0.1:0"]).end();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        errors(&output),
        "error: --set admn.listen=127.0.0.1:0: admn: unknown field `admn` (did you mean `admin`?), expected one of `request_ms`, `panics`, \
         `threads`, `port_file`, `admin`, `log`, `shutdown`\n"
    );
}

#[test]
fn a_taken_port_is_one_line_and_status_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap();
    let output = Service::start(&[&format!("admin.listen={listen}")]).end();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        errors(&output),
        format!("error: admin.listen: cannot listen on {listen}: Address already in use (os error 98)\n")
    );
}

#[test]
fn a_panic_is_a_log_line_and_does_not_end_the_process() {
    let service = Service::start(&["panics=true", "log.format=json"]).ready();
    service.signal(Signal::TERM);
    let output = service.end();
    assert_eq!(output.status.code(), Some(0));
    let log = errors(&output);
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let panic = lines.iter().find(|line| line["level"] == "ERROR").unwrap();
    assert_eq!(panic["fields"]["message"], "panicked: on purpose");
    assert!(panic["fields"]["place"].as_str().unwrap().contains("service.rs"));
}
