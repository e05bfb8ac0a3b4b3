//! What programs say of themselves: as it was, and without asking anybody.

use std::{net::TcpListener, process::Command};

use anyhow::{Result, ensure};
use kvasir_tests::workspace;

/// Set to write the files in tests/help anew.
const BLESS: &str = "BLESS";

/// Help up to the list of settings, which changes with each of them.
fn help(program: &str) -> Result<String> {
    let output = Command::new(workspace::binary(program)?).arg("--help").env_clear().output()?;
    ensure!(output.status.success() && output.stderr.is_empty(), "{program} --help: {output:?}");
    let text = String::from_utf8(output.stdout)?;
    let text = text.split("\nKeys and defaults").next().unwrap_or_default();
    let lines: Vec<_> = text.lines().map(str::trim_end).collect();
    Ok(lines.join("\n").trim_end().to_owned() + "\n")
}

#[test]
fn help_is_what_it_was() -> Result<()> {
    let dir = workspace::root().join("tests/help");
    for program in ["router", "prefill-worker", "decode-worker", "kv-store", "standalone", "kvasirctl"] {
        let (path, text) = (dir.join(format!("{program}.txt")), help(program)?);
        if std::env::var_os(BLESS).is_some() {
            std::fs::create_dir_all(&dir)?;
            std::fs::write(&path, &text)?;
        }
        let was = std::fs::read_to_string(&path).unwrap_or_default();
        ensure!(
            was == text,
            "{program} --help has changed. If that is meant: {BLESS}=1 cargo nextest run --workspace -E 'test(help_is_what_it_was)'\n{text}"
        );
    }
    Ok(())
}

/// All of kvasirctl's commands, from its page.
fn commands() -> Result<Vec<Vec<String>>> {
    let page = std::fs::read_to_string(workspace::root().join("docs/kvasirctl.md"))?;
    let titles = page.lines().filter_map(|line| line.strip_prefix("### kvasirctl "));
    Ok(titles.map(|title| title.split(' ').map(str::to_owned).collect()).collect())
}

#[test]
fn help_asks_nobody() -> Result<()> {
    let asked = TcpListener::bind("127.0.0.1:0")?;
    asked.set_nonblocking(true)?;
    let etcd = asked.local_addr()?.to_string();
    let commands = commands()?;
    ensure!(commands.len() > 40, "{commands:?}");
    for words in commands {
        let mut command = Command::new(workspace::binary("kvasirctl")?);
        let output = command.args(["--etcd", &etcd]).args(&words).arg("--help").env_clear().output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success() && text.contains("Usage: kvasirctl"), "{words:?}: {output:?}");
    }
    let nobody = asked.accept().err().map(|error| error.kind());
    ensure!(nobody == Some(std::io::ErrorKind::WouldBlock), "somebody connected to etcd: {nobody:?}");
    Ok(())
}
