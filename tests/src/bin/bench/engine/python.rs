//! The rivals: programs of `tests/python` that keep their model loaded, take loads as lines and are stopped in between.

use std::{
    collections::HashMap,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use kvasir_tests::workspace;
use serde_json::{Value, json};

use super::{
    ours::{Ours, steps_of},
    plan::{Found, Load, THREADS, WARM_UP, Who},
};
use crate::{child::Child, report::median, rivals};

/// Loading torch and a model from a cold disk, or the longest load, on a busy machine.
const PATIENCE: Duration = Duration::from_mins(4);

/// One rival.
pub struct Python {
    who: Who,
    child: Child,
    vocab: u64,
    /// Settings it can be measured with; the first load of a kind chooses.
    settings: &'static [&'static str],
    chosen: HashMap<Load, &'static str>,
}

/// Installs, converts and starts all rivals; those that cannot be are missing.
pub fn start_all(ours: &Ours, dir: &Path, found: &mut Found) -> Vec<Python> {
    let started = [
        (Who::Llama, llama(Who::Llama, ours, "bf16", dir)),
        (Who::LlamaQ8, llama(Who::LlamaQ8, ours, "q8_0", dir)),
        (Who::Transformers, transformers(ours, dir)),
    ];
    let mut rivals = Vec::new();
    for (who, rival) in started {
        match rival {
            Ok(rival) => rivals.push(rival),
            Err(error) => found.miss(who, &format!("{error:#}")),
        }
    }
    rivals
}

fn llama(who: Who, ours: &Ours, kind: &str, dir: &Path) -> Result<Python> {
    let python = rivals::python("llama", false)?;
    let model = convert(&python, ours.folder(), kind)?;
    Python::start(who, &python, "llama_rival.py", (model.as_os_str(), ours.vocab()), &["auto", "off"], dir)
}

fn transformers(ours: &Ours, dir: &Path) -> Result<Python> {
    let python = rivals::python("transformers", false)?;
    Python::start(
        Who::Transformers,
        &python,
        "transformers_rival.py",
        (ours.folder().as_os_str(), ours.vocab()),
        &[""],
        dir,
    )
}

/// The folder as a GGUF file beside it, unless there is one that is newer.
fn convert(python: &Path, folder: &Path, kind: &str) -> Result<PathBuf> {
    let name = folder.file_name().and_then(OsStr::to_str).context("the folder has a name")?;
    let file = folder.with_file_name(format!("{name}.{kind}.gguf"));
    let modified = |path: &Path| path.metadata().and_then(|file| file.modified()).ok();
    let made = modified(&folder.join("model.safetensors"));
    if modified(&file).is_some_and(|done| made.is_some_and(|made| done > made)) {
        return Ok(file);
    }
    println!("converting to {}", file.display());
    let draft = file.with_extension("draft");
    let script = workspace::root().join("tests/python/gguf_convert.py");
    let output = Command::new(python).arg(script).arg(folder).arg(&draft).arg(kind).output()?;
    if !output.status.success() {
        bail!("not converted: {}", String::from_utf8_lossy(&output.stderr).lines().next_back().unwrap_or_default());
    }
    std::fs::rename(draft, &file)?;
    Ok(file)
}

impl Python {
    fn start(
        who: Who,
        python: &Path,
        script: &str,
        (model, vocab): (&OsStr, u64),
        settings: &'static [&'static str],
        dir: &Path,
    ) -> Result<Self> {
        println!("starting {}", who.name());
        let mut command = Command::new(python);
        command.arg(workspace::root().join("tests/python").join(script)).arg(model).arg(THREADS.to_string());
        let mut child = Child::start(&who.name().replace(' ', "-"), command, dir)?.patient(PATIENCE);
        println!("    {}", child.json()?["system"].as_str().unwrap_or_default());
        child.pause();
        Ok(Self { who, child, vocab, settings, chosen: HashMap::new() })
    }

    pub fn who(&self) -> Who {
        self.who
    }

    /// Tokens per second under a load. The first time it is given, with whichever setting serves it best.
    pub fn measure(&mut self, load: Load) -> Result<f64> {
        if let Some(setting) = self.chosen.get(&load) {
            return self.with(load, setting);
        }
        let mut best = None;
        for setting in self.settings {
            let figure = self.with(load, setting)?;
            if best.is_none_or(|(before, _)| figure > before) {
                best = Some((figure, *setting));
            }
        }
        let (figure, setting) = best.context("there is at least one setting")?;
        if self.settings.len() > 1 {
            println!("          {}: flash attention {setting} serves {} best", self.who.name(), load.name());
        }
        self.chosen.insert(load, setting);
        Ok(figure)
    }

    fn with(&mut self, load: Load, setting: &str) -> Result<f64> {
        match load {
            Load::Prefill => {
                let answer = self.ask(json!({"do": "prefill", "prompt": load.prompt(0, self.vocab)}), setting)?;
                Ok(load.context() as f64 / number(&answer["seconds"])?)
            }
            Load::Decode(batch) => {
                let answer = self.decode(load, batch, setting)?;
                let times = answer["step_seconds"].as_array().context("times of its steps")?;
                let times = times.iter().map(number).collect::<Result<Vec<_>>>()?;
                Ok(batch as f64 / median(times))
            }
        }
    }

    fn decode(&mut self, load: Load, batch: usize, setting: &str) -> Result<Value> {
        let prompts: Vec<_> = (0..batch as u64).map(|stream| load.prompt(stream, self.vocab)).collect();
        let ask = json!({"do": "decode", "prompts": prompts, "steps": load.steps(), "warm_up": WARM_UP});
        self.ask(ask, setting)
    }

    /// The tokens after the first prompt.
    pub fn tokens(&mut self) -> Result<Vec<u64>> {
        let load = Load::Decode(1);
        let answer = self.decode(load, 1, self.settings[0])?;
        let tokens = answer["tokens"].as_array().context("it tells its tokens")?;
        Ok(tokens.iter().filter_map(Value::as_u64).take(steps_of(load)).collect())
    }

    fn ask(&mut self, mut ask: Value, setting: &str) -> Result<Value> {
        if !setting.is_empty() {
            ask["flash"] = setting.into();
        }
        self.child.resume();
        let answer = self.child.ask(&ask);
        self.child.pause();
        answer
    }
}

fn number(value: &Value) -> Result<f64> {
    value.as_f64().with_context(|| format!("{value} is no number"))
}
