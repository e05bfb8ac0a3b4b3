//! Our side: `kvasir-engine-bench`, a process for every measurement, which also tells the machine's limits of that moment.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use kvasir_tests::workspace;
use serde_json::Value;

use super::plan::{Found, Load, Operation, THREADS, WARM_UP, Who};

/// Tokens of a prompt computed in one step where it is alone: as many as llama.cpp takes at a time.
const CHUNK: usize = 512;

/// Weights are rounded when this is first asked for, into a folder that is kept.
const INT8: [&str; 4] = ["--weights", "int8", "--compute", "fast"];
/// Activations are rounded to bf16 before they are multiplied, as the rivals round them.
const FAST: [&str; 2] = ["--compute", "fast"];

/// The model's folder.
pub struct Ours {
    folder: PathBuf,
    vocab: u64,
}

impl Ours {
    /// Writes the shape's folder, and rounds its weights, unless that is done.
    pub fn prepare(shape: &str, found: &mut Found) -> Result<Self> {
        let said = output(command("kvasir-engine-bench")?.args(["shape", shape]))?;
        let bf16 = PathBuf::from(said.trim());
        println!("rounding its weights to int8");
        if let Err(error) = run(&bf16, &[&["decode", "--steps", "1", "--no-limits"], &INT8[..]].concat()) {
            found.miss(Who::OursInt8, &format!("{error:#}"));
        }
        let config: Value = serde_json::from_slice(&std::fs::read(bf16.join("config.json"))?)?;
        let vocab = config["vocab_size"].as_u64().context("a vocabulary has a size")?;
        Ok(Self { folder: bf16, vocab })
    }

    /// It, with weights in bf16.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Tokens of its vocabulary.
    pub fn vocab(&self) -> u64 {
        self.vocab
    }

    /// Tokens per second under a load.
    pub fn measure(&self, who: Who, load: Load, found: &mut Found) -> Result<f64> {
        let settings = match who {
            Who::OursInt8 => &INT8[..],
            Who::OursExact => &[],
            _ => &FAST,
        };
        let [context, steps] = [load.context(), load.steps()].map(|number| number.to_string());
        let said = match load {
            Load::Decode(batch) => {
                let batch = batch.to_string();
                let arguments = ["decode", "--batch", &batch, "--context", &context, "--steps", &steps];
                run(&self.folder, &[&arguments, settings].concat())?
            }
            Load::Prefill => {
                let arguments = ["prefill", "--tokens", &context, "--chunk", &CHUNK.to_string(), "--repeat", "1"];
                run(&self.folder, &[&arguments, settings].concat())?
            }
        };
        let of = |pointer| number(&said, pointer);
        let peak = of("/limits/bf16_gflops").unwrap_or(0.0).max(of("/limits/f32_gflops")?);
        found.products.entry((who, load)).or_default().add(of("/gflops")?, peak);
        if matches!(load, Load::Decode(_)) {
            let reads = found.reads.entry((who, load)).or_default();
            reads.add(of("/weight_gb_per_s")?, of("/limits/read_gb_per_s")?);
        }
        if (who, load) == (Who::Ours, Load::Decode(16)) {
            let needed = of("/memory/weight_bytes")? + of("/memory/cache_bytes")?;
            found.memory.add(of("/memory/peak_rss_bytes")? / f64::from(1 << 20), needed / f64::from(1 << 20));
        }
        // Of the median step, as the rivals'.
        match load {
            Load::Decode(batch) => Ok(batch as f64 / (of("/step_ms/p50")? / 1e3)),
            Load::Prefill => of("/tokens_per_s"),
        }
    }

    /// A long prompt arrives while others write.
    pub fn mixed(&self, found: &mut Found) -> Result<()> {
        let said =
            run(&self.folder, &["mixed", "--running", "8", "--context", "64", "--prompt", "4096", "--no-limits"])?;
        found.gaps.add(number(&said, "/chunked/gap_ms/max")?, number(&said, "/whole/gap_ms/max")?);
        Ok(())
    }

    /// Two requests begin alike.
    pub fn prefix(&self, found: &mut Found) -> Result<()> {
        let arguments = ["prefix", "--shared", "2000", "--own", "16", "--no-limits"];
        let said = run(&self.folder, &[&arguments[..], &FAST].concat())?;
        found.prefix.add(number(&said, "/second_ttft_ms")?, number(&said, "/first_ttft_ms")?);
        Ok(())
    }

    /// What the cache's operations cost.
    pub fn cache(&self, found: &mut Found) {
        found.cache = Some(cache().map_err(|error| format!("{error:#}")));
    }

    /// The tokens after the first prompt.
    pub fn tokens(&self) -> Result<Vec<u64>> {
        let load = Load::Decode(1);
        let [context, steps] = [load.context(), load.steps()].map(|number| number.to_string());
        let arguments = ["decode", "--context", &context, "--steps", &steps, "--show-tokens", "--no-limits"];
        let said = run(&self.folder, &[&arguments[..], &FAST].concat())?;
        let tokens = said["tokens"].as_array().context("it shows its tokens")?;
        Ok(tokens.iter().filter_map(Value::as_u64).take(steps_of(load)).collect())
    }
}

/// Tokens that everybody tells of a decode.
pub fn steps_of(load: Load) -> usize {
    WARM_UP + load.steps()
}

fn cache() -> Result<Vec<Operation>> {
    let said = output(command("examples/scale")?.arg("--json"))?;
    let sizes: Value = serde_json::from_str(&said)?;
    let sizes = sizes.as_array().context("one entry per size")?;
    let (few, many) = (sizes.first().context("the smallest")?, sizes.last().context("the largest")?);
    ensure!(many["blocks"] == 1_000_000, "a million blocks are what is shown");
    let operations = many["ns"].as_object().context("figures by operation")?;
    let row = |(name, ns): (&String, &Value)| {
        let few_ns = few["ns"][name].as_f64().with_context(|| format!("no {name}"))?;
        let many_ns = ns.as_f64().with_context(|| format!("no {name}"))?;
        Ok(Operation { name: name.clone(), many_ns, few_ns })
    };
    operations.iter().map(row).collect()
}

fn run(folder: &Path, arguments: &[&str]) -> Result<Value> {
    let mut command = command("kvasir-engine-bench")?;
    command.args(arguments).arg("--model").arg(folder).args(["--json", "--threads", &THREADS.to_string()]);
    let said = output(&mut command)?;
    let [line] = said.lines().collect::<Vec<_>>()[..] else { bail!("one measurement was asked for, not: {said}") };
    Ok(serde_json::from_str(line)?)
}

fn command(name: &str) -> Result<Command> {
    Ok(Command::new(workspace::binary(name)?))
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).lines().next_back().unwrap_or("it said nothing"));
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn number(found: &Value, pointer: &str) -> Result<f64> {
    found.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("no {pointer} in {found}"))
}
