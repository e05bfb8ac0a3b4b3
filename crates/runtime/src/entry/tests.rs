use serde::{Deserialize, Serialize};

use super::*;
use crate::{AdminConfig, Kind};

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Example {
    id: Option<String>,
    admin: AdminConfig,
    shutdown: ShutdownConfig,
}

const SERVICE: Service = Service { name: "example", about: "Shows how.\n\nAt length.", version: "1.2.3" };
const GRACE: Duration = Duration::from_secs(3);

impl Config for Example {
    const FLAGS: &'static [(&'static str, &'static str, &'static str)] = &[("name", "id", "Who it is")];
}

fn process() -> Process {
    let process = Process::default();
    process.set_grace(GRACE);
    process
}

fn parse(line: &str) -> Result<Loaded<Example>, Done> {
    arguments::<Example>(&SERVICE, line.split(' ').map(OsString::from), Vec::new())
}

fn printed(line: &str) -> String {
    match parse(line) {
        Err(Done::Print(text)) => text,
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn help_lists_every_key_with_its_default() {
    let help = printed("example --help");
    for line in [
        "At length.",
        "--print-config",
        "  admin.listen       127.0.0.1:0",
        "  id                 not set",
        "  shutdown.grace_ms  30000",
    ] {
        assert!(help.contains(line), "no {line:?} in\n{help}");
    }
    assert_eq!(printed("example --version").trim(), "example 1.2.3");
}

#[test]
fn a_flag_of_its_own_is_a_set_that_others_follow() {
    assert!(printed("example --help").contains("--name <VALUE>\n          Who it is; the same as --set id="));
    assert!(printed("example --name x --print-config").starts_with("id: x\n"));
    assert!(printed("example --set id=y --name x --print-config").starts_with("id: y\n"));
    match parse("example --name") {
        Err(Done::Refuse(told)) => assert!(told.contains("'--name <VALUE>'"), "{told}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn print_config_shows_what_results() {
    let yaml = printed("example --set id=x --set shutdown.grace_ms=5 --print-config");
    assert_eq!(yaml, "id: x\nadmin:\n  listen: 127.0.0.1:0\nshutdown:\n  grace_ms: 5\n");
}

#[test]
fn wrong_arguments_are_told_in_one_line() {
    for (line, expected) in [
        ("example --confg x", "unexpected argument '--confg' found (see --help)"),
        ("example --set", "a value is required for '--set <KEY=VALUE>' but none was supplied (see --help)"),
        (
            "example --set idd=1",
            "--set idd=1: idd: unknown field `idd` (did you mean `id`?), expected one of `id`, `admin`, `shutdown`",
        ),
    ] {
        match parse(line) {
            Err(Done::Refuse(told)) => assert_eq!(told, expected),
            other => panic!("{line}: {other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_returns_after_shutdown_ends_well_once_its_requests_have() {
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let run = |context: Context| {
        let done = done.clone();
        async move {
            context.tasks.spawn(Kind::Request, "request", async move {
                tokio::time::sleep(GRACE / 2).await;
                done.store(true, std::sync::atomic::Ordering::Relaxed);
                Ok(())
            });
            context.shutdown.trigger(); // what a signal does
            context.shutdown.wait().await;
            Ok(())
        }
    };
    lead(&SERVICE, process(), Base::of(&Example::default()), run).await.unwrap();
    assert!(done.load(std::sync::atomic::Ordering::Relaxed));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_does_not_leave_is_left() {
    let run = |context: Context| async move {
        context.shutdown.trigger();
        std::future::pending().await
    };
    let before = tokio::time::Instant::now();
    let error = lead(&SERVICE, process(), Base::of(&Example::default()), run).await.unwrap_err();
    assert_eq!(before.elapsed(), GRACE + LEAVING);
    assert!(error.to_string().contains("still not done"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn the_critical_task_that_ended_is_the_reason_though_the_service_drains_well() {
    let run = |context: Context| async move {
        context.tasks.spawn(Kind::Critical, "grpc", async { anyhow::bail!("broken") });
        context.shutdown.wait().await;
        Ok(())
    };
    assert_eq!(
        lead(&SERVICE, process(), Base::of(&Example::default()), run).await.unwrap_err().to_string(),
        "grpc: broken"
    );
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_service_is_passed_on() {
    let error = lead(&SERVICE, process(), Base::of(&Example::default()), |_| async { anyhow::bail!("no model") })
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "no model");
}
