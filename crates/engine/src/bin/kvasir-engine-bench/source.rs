//! Where the model comes from: a folder, or a shape that is written on first use.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use kvasir_model::{
    Folder,
    quantize::quantize,
    shapes::{SHAPES, Shape},
};

use crate::cli;

/// The model, its weights rounded if that is asked for, and what to call it.
pub fn open(source: &cli::Source, seed: u64, rounding: Option<cli::Rounding>) -> Result<(String, Folder)> {
    let (name, dir) = find(source, seed)?;
    match rounding {
        None => Ok((name, Folder::open(&dir)?)),
        Some(rounding) => round((&name, &dir), rounding, source.shapes_dir.as_deref()),
    }
}

/// The same model with its weights rounded. The folder's name says of which weights it is, so it is never another model's.
fn round((name, dir): (&str, &Path), rounding: cli::Rounding, shapes: Option<&Path>) -> Result<(String, Folder)> {
    let exact = Folder::open(dir)?;
    let place = shapes.map_or_else(default_dir, Path::to_owned).join("rounded");
    let to = place.join(format!("{}-{}", exact.fingerprint(), rounding.name()));
    if !to.exists() {
        eprintln!("rounding the weights of {name} to {}, into {}", rounding.name(), to.display());
        let draft = place.join(format!("draft-{}", std::process::id()));
        fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
        quantize(dir, &draft, rounding.scheme())?;
        fs::rename(&draft, &to).with_context(|| to.display().to_string())?;
    }
    Ok((format!("{name} in {}", rounding.name()), Folder::open(&to)?))
}

/// What to call the model, and its folder.
fn find(source: &cli::Source, seed: u64) -> Result<(String, PathBuf)> {
    Ok(match (&source.model, &source.shape) {
        (_, Some(name)) => (name.clone(), shape_dir(name, source.shapes_dir.as_deref(), seed)?),
        (Some(dir), None) => (dir.display().to_string(), dir.clone()),
        (None, None) => unreachable!("the command line wants one of them"),
    })
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
