//! Where things are: the repository, the binaries under test, the demo model, the Python environment.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests package is one level below the root")
}

/// The demo model's folder.
pub fn demo_model() -> PathBuf {
    root().join("models/demo")
}

/// The profile's directory that this test was built into (`target/debug`): the binaries under test lie beside it.
pub fn profile_dir() -> PathBuf {
    let test = std::env::current_exe().expect("the running test has a path");
    let dir = test.parent().expect("an executable lies in a directory");
    // Tests lie in `deps`, binaries of this package directly in the profile's directory.
    if dir.ends_with("deps") { dir.parent().expect("deps lies in the profile's directory") } else { dir }.to_owned()
}

/// The target directory.
pub fn target_dir() -> PathBuf {
    profile_dir().parent().expect("a profile's directory lies in the target directory").to_owned()
}

/// The program of that name, of the same build as this test.
pub fn binary(name: &str) -> Result<PathBuf> {
    let path = profile_dir().join(name);
    if !path.is_file() {
        bail!("{} is not built; run: cargo build --workspace --all-targets", path.display());
    }
    Ok(path)
}

/// The Python of the environment that `scripts/setup --test` made.
pub fn python() -> Result<PathBuf> {
    let path = target_dir().join("venv/bin/python");
    if !path.exists() {
        bail!("{} is missing; run: scripts/setup --test", path.display());
    }
    Ok(path)
}
