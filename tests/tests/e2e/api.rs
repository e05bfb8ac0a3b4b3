//! The API as its document says it, and templates as Python renders them.

use std::process::Command;

use anyhow::{Result, ensure};
use kvasir_tests::{Cluster, Service, workspace};

/// Schemathesis makes requests of `/openapi.json`, right ones and wrong ones: none of them is a server's error.
#[tokio::test]
async fn schemathesis_finds_no_server_error() -> Result<()> {
    let schemathesis = workspace::target_dir().join("venv/bin/st");
    ensure!(schemathesis.exists(), "{} is missing; run: scripts/setup --test", schemathesis.display());
    Cluster::builder()
        .set(Service::Router, "limits.max_output_tokens", 8)
        .run(async |cluster| {
            let document = format!("{}/openapi.json", cluster.client().base());
            let bounded = ["--max-examples=25", "--max-time=60", "--seed=7", "--request-timeout=30", "--workers=1"];
            let checked =
                ["run", "--no-color", "--checks=not_a_server_error", "--warnings=off", "--continue-on-failure"];
            // It leaves what it learnt where it runs.
            let folder = tempfile::tempdir()?;
            let mut command = Command::new(&schemathesis);
            command.args(checked).args(bounded).arg(&document).current_dir(folder.path());
            let output = command.output()?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            println!("{said}");
            ensure!(output.status.success(), "schemathesis: {}\n{said}", output.status);
            // It did ask: a document that it can't use would pass, too.
            let metrics = cluster.node(Service::Router, 0).metrics().await?;
            for (endpoint, status) in [("chat", "2xx"), ("chat", "4xx"), ("completions", "2xx"), ("responses", "2xx")] {
                let labels = [("endpoint", endpoint), ("status", status)];
                let count = metrics.sum_where("kvasir_router_requests_total", &labels);
                ensure!(count > 0.0, "no {status} of {endpoint}");
            }
            Ok(())
        })
        .await
}

#[test]
fn templates_golden_file_is_what_python_makes_of_them() -> Result<()> {
    let folder = workspace::root().join("services/router/templates");
    let script = workspace::root().join("tests/python/chat_templates.py");
    let output = Command::new(workspace::python()?).arg(script).arg(&folder).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.stdout == std::fs::read(folder.join("golden.jsonl"))?, "golden.jsonl is another one");
    Ok(())
}
