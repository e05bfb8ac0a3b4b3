//! Where the model comes from: a folder, or a shape that is written on first use.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use kvasir_model::{
    Folder,
    shapes::{SHAPES, Shape},
};

use crate::cli;

/// The model's folder, and what to call it.
pub fn open(source: &cli::Source, seed: u64) -> Result<(String, Folder)> {
    let (name, dir) = match (&source.model, &source.shape) {
        (_, Some(name)) => (name.clone(), shape_dir(name, source.shapes_dir.as_deref(), seed)?),
        (Some(dir), None) => (dir.display().to_string(), dir.clone()),
        (None, None) => unreachable!("the command line wants one of them"),
    };
    Ok((name, Folder::open(&dir)?))
}

/// `shape`: writes it and says where, or says which there are.
pub fn write(options: &cli::Shape) -> Result<()> {
    match &options.name {
        Some(name) => println!("{}", shape_dir(name, options.shapes_dir.as_deref(), options.seed)?.display()),
        None => SHAPES.iter().for_each(|shape| println!("{}", shape.name)),
    }
    Ok(())
}

fn shape_dir(name: &str, dir: Option<&Path>, seed: u64) -> Result<PathBuf> {
    let shape = Shape::named(name).with_context(|| {
        let names: Vec<_> = SHAPES.iter().map(|shape| shape.name).collect();
        format!("there is no shape '{name}'; there are: {}", names.join(", "))
    })?;
    // Another seed is another folder: two runs with different ones do not write over one another.
    let place = if seed == 1 { name.to_owned() } else { format!("{name}-seed{seed}") };
    let dir = dir.map_or_else(default_dir, Path::to_owned).join(place);
    let mut said = Instant::now();
    shape.write(&dir, seed, &mut |done, all| {
        if said.elapsed() > Duration::from_secs(1) || done == all {
            said = Instant::now();
            eprintln!("writing {name} into {}: {} %", dir.display(), 100 * done / all.max(1));
        }
    })?;
    Ok(dir)
}

/// `target/bench/shapes` for a program in `target/release`.
fn default_dir() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    let is_build = |dir: &&Path| dir.file_name().is_some_and(|name| name == "release" || name == "debug");
    match program.parent().filter(is_build).and_then(Path::parent) {
        Some(target) => target.join("bench/shapes"),
        None => std::env::temp_dir().join("kvasir-shapes"),
    }
}
