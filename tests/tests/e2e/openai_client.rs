//! OpenAI's own Python client is content with the router.

use std::process::Command;

use anyhow::{Result, ensure};
use kvasir_tests::{Cluster, workspace};

#[tokio::test]
async fn openais_python_client_is_content() -> Result<()> {
    let (python, script) = (workspace::python()?, workspace::root().join("tests/python/openai_client.py"));
    Cluster::builder()
        .run(async |cluster| {
            let base = format!("{}/v1", cluster.client().base());
            let output = Command::new(&python).arg(&script).args([&base, cluster.model()]).output()?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            println!("{said}");
            ensure!(output.status.success(), "openai_client.py: {}\n{said}", output.status);
            Ok(())
        })
        .await
}
