//! `kvasir-gpu-check`: whether a GPU computes what it should, and how fast, in one program that needs nothing but the driver.
//!
//! ```text
//!   golden    the demo model's greedy answers and log-probabilities beside the reference's
//!   families  every tiny model's logits beside the processor's, in two cuts: the same bits
//!   bench     decode, prefill and hand-off on random weights of a published shape, beside the device's limits
//! ```
//!
//! `scripts/gpu-check` runs it, with the kernels' own check and PyTorch beside it. Exit codes: 0 all right, 1 something is
//! wrong, 2 wrong usage, 77 no device.

#![forbid(unsafe_code)]

mod bench;
mod correct;
mod rig;

use std::{path::PathBuf, process::ExitCode};

use kvasir_model::{Error, cuda};
use serde_json::{Value, json};

const USAGE: &str = "usage: kvasir-gpu-check [options]\n\n\
    --device N     which CUDA device (0)\n\
    --models DIR   the folder with demo/ and tiny/ (models)\n\
    --work DIR     where the shape's weights are written (the temporary directory)\n\
    --shape NAME   dimensions of the bench (llama-3.1-8b)\n\
    --only LIST    of golden, families, bench; by commas\n\
    --matrix RATE  bf16 products a second that were measured elsewhere, in TFLOP/s: prefill is then also a share of it\n\
    --baseline F   JSON of gpu_baseline.py: the same shapes by PyTorch, to be beaten; brings --matrix too\n\
    --quick        a part of everything: to see that it works\n\
    --emulated     take an emulated device too\n\
    --json FILE    write the results there\n\n\
    Exit codes: 0 all right, 1 something is wrong, 2 wrong usage, 77 no device.";

/// No device: as test runners call a test that was skipped.
const NO_DEVICE: u8 = 77;

/// What was asked for.
struct Cli {
    ordinal: usize,
    models: PathBuf,
    work: PathBuf,
    shape: String,
    only: Vec<String>,
    matrix: Option<f64>,
    baseline: Option<Baseline>,
    quick: bool,
    emulated: bool,
    json: Option<PathBuf>,
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Cli>, String> {
    let mut cli = Cli {
        ordinal: 0,
        models: "models".into(),
        work: std::env::temp_dir(),
        shape: "llama-3.1-8b".to_owned(),
        only: ["golden", "families", "bench"].map(str::to_owned).to_vec(),
        matrix: None,
        baseline: None,
        quick: false,
        emulated: false,
        json: None,
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} wants a value"));
        match arg.as_str() {
            "-h" | "--help" => return Ok(None),
            "--device" => cli.ordinal = value()?.parse().map_err(|_| "--device wants a number".to_owned())?,
            "--models" => cli.models = value()?.into(),
            "--work" => cli.work = value()?.into(),
            "--shape" => cli.shape = value()?,
            "--only" => {
                let known = std::mem::take(&mut cli.only);
                cli.only = value()?.split(',').map(str::to_owned).collect();
                if let Some(bad) = cli.only.iter().find(|part| !known.contains(part)) {
                    return Err(format!("--only {bad}: golden, families or bench"));
                }
            }
            "--matrix" => {
                let rate: f64 = value()?.parse().map_err(|_| "--matrix wants a number".to_owned())?;
                cli.matrix = Some(rate).filter(|rate| rate.is_finite() && *rate > 0.0);
            }
            "--baseline" => {
                let path = value()?;
                let text = std::fs::read_to_string(&path).map_err(|error| format!("--baseline {path}: {error}"))?;
                cli.baseline =
                    Some(serde_json::from_str(&text).map_err(|error| format!("--baseline {path}: {error}"))?);
            }
            "--quick" => cli.quick = true,
            "--emulated" => cli.emulated = true,
            "--json" => cli.json = Some(value()?.into()),
            _ => return Err(format!("unknown option {arg}")),
        }
    }
    cli.matrix = cli.matrix.or_else(|| cli.baseline.as_ref().map(|baseline| baseline.matrix_tflops));
    Ok(Some(cli))
}

/// What `gpu_baseline.py` found.
#[derive(serde::Deserialize)]
struct Baseline {
    matrix_tflops: f64,
    rows: Vec<BaselineRow>,
}

#[derive(serde::Deserialize)]
struct BaselineRow {
    what: String,
    seconds: f64,
}

/// One line of the table.
struct Row {
    what: String,
    found: String,
    /// What it should be, where there is something.
    goal: String,
    met: Option<bool>,
    json: Value,
}

impl Row {
    fn state(&self) -> &'static str {
        match self.met {
            Some(true) => "ok",
            Some(false) => "WRONG",
            None => "",
        }
    }
}

fn main() -> ExitCode {
    let cli = match parse(std::env::args().skip(1)) {
        Ok(Some(cli)) => cli,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            eprintln!("kvasir-gpu-check: {wrong}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error @ Error::NoDevice { .. }) => {
            println!("kvasir-gpu-check: no GPU to check: {}", chain(&error));
            ExitCode::from(NO_DEVICE)
        }
        Err(error) => {
            eprintln!("kvasir-gpu-check: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

fn run(cli: &Cli) -> Result<bool, Error> {
    let limits = cuda::limits(cli.ordinal)?;
    if !cli.emulated && !cuda::is_there(cli.ordinal) {
        let reason = format!("{} is no real device (--emulated takes it)", limits.device);
        return Err(Error::NoDevice { ordinal: cli.ordinal, reason });
    }
    let (major, minor) = limits.capability;
    println!(
        "{}, compute capability {major}.{minor}: copies {:.0} GB/s, to the device {:.1}, to the host {:.1}",
        limits.device,
        limits.copy / 1e9,
        limits.to_device / 1e9,
        limits.to_host / 1e9
    );
    let mut rows = Vec::new();
    let mut part = |name: &str, work: &mut dyn FnMut() -> Result<Vec<Row>, Error>| {
        if !cli.only.iter().any(|part| part == name) {
            return;
        }
        eprintln!("{name} …");
        // One part that fails does not keep the others from being known.
        let found = work().unwrap_or_else(|error| {
            let (what, found) = (name.to_owned(), chain(&error));
            vec![Row { json: json!({ "error": found }), what, found, goal: "no error".to_owned(), met: Some(false) }]
        });
        for row in &found {
            println!("{:44} {:>36}  {:28} {}", row.what, row.found, row.goal, row.state());
        }
        rows.extend(found);
    };
    part("golden", &mut || correct::golden(cli));
    part("families", &mut || correct::families(cli));
    part("bench", &mut || bench::run(cli, &limits));
    if let Some(path) = &cli.json {
        let of = |row: &Row| json!({ "what": row.what, "found": row.found, "goal": row.goal, "met": row.met, "values": row.json });
        let report = json!({
            "device": limits.device,
            "capability": format!("{major}.{minor}"),
            "limits": { "copy": limits.copy, "to_device": limits.to_device, "to_host": limits.to_host },
            "rows": rows.iter().map(of).collect::<Vec<_>>(),
        });
        let failed = |source| Error::Write { path: path.clone(), source };
        std::fs::write(path, format!("{report:#}\n")).map_err(failed)?;
    }
    Ok(rows.iter().all(|row| row.met != Some(false)))
}
