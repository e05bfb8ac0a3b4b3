//! The rivals' packages, each in a virtual environment of its own under the target directory, installed once; and what
//! starting their servers takes.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use kvasir_tests::workspace;

/// The Python of the environment that holds what `tests/python/<name>.txt` lists; with `alone`, and nothing that those
/// packages ask for. Installs it first if need be.
pub fn python(name: &str, alone: bool) -> Result<PathBuf> {
    let list = workspace::root().join(format!("tests/python/{name}.txt"));
    let dir = workspace::target_dir().join("rivals").join(name);
    let python = dir.join("bin/python");
    // The copied list says which versions are installed; it is written last.
    let installed = dir.join("installed.txt");
    let wanted = fs::read(&list).with_context(|| list.display().to_string())?;
    if fs::read(&installed).is_ok_and(|found| found == wanted) {
        return Ok(python);
    }
    println!("installing {name} into {}", dir.display());
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    quiet(Command::new("python3").args(["-m", "venv"]).arg(&dir))?;
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--timeout", "20", "--retries", "1"]);
    pip.args(alone.then_some("--no-deps")).arg("-r").arg(&list);
    // What is compiled (llama.cpp) is compiled for this processor, without its parts for images and downloads.
    pip.env("CMAKE_ARGS", "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF");
    quiet(&mut pip)?;
    fs::write(installed, wanted)?;
    Ok(python)
}

/// Where an environment's packages lie.
pub fn packages(python: &Path) -> Result<PathBuf> {
    let print = "import sysconfig; print(sysconfig.get_path('platlib'))";
    let output = Command::new(python).args(["-c", print]).output()?;
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

/// Waits until a server that was just started is there.
pub fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        if let Some(value) = probe() {
            return Ok(value);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("waited in vain until {what}")
}

/// A port that is free now, for a server that can't be given port 0.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn quiet(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let reason = said.lines().rev().find(|line| line.starts_with("ERROR")).unwrap_or_else(|| said.trim());
        bail!("it could not be installed: {reason}");
    }
    Ok(())
}
