//! A program under measurement: started here, spoken to by lines, paused while others are measured, killed at the end.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child as Process, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long a program may take to start or to answer, unless somebody knows better.
const PATIENCE: Duration = Duration::from_secs(60);

/// A child process whose standard output is read line by line.
pub struct Child {
    name: String,
    process: Process,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    log: PathBuf,
    patience: Duration,
}

impl Child {
    /// Starts it, with what it says on standard error in a file of `dir`.
    pub fn start(name: &str, mut command: Command, dir: &Path) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&log)?);
        let mut process = command.spawn().with_context(|| format!("start {command:?}"))?;
        let input = process.stdin.take();
        let output = BufReader::new(process.stdout.take().expect("its output is a pipe"));
        let (sender, lines) = channel();
        // Reads on whatever happens: a full pipe would stop the program. Ends with it.
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Ok(Self { name: name.to_owned(), process, input, lines, log, patience: PATIENCE })
    }

    /// The same, with so long to start or to answer.
    pub fn patient(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The next line it writes.
    pub fn line(&mut self) -> Result<String> {
        match self.lines.recv_timeout(self.patience) {
            Ok(line) => Ok(line),
            Err(_) => bail!("{} said nothing more; its log ends with: {}", self.name, self.complaint()),
        }
    }

    /// The next line, as JSON.
    pub fn json(&mut self) -> Result<Value> {
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("{} wrote {line}", self.name))
    }

    /// Sends one line of JSON and takes one in; an answer with an `error` is one.
    pub fn ask(&mut self, ask: &Value) -> Result<Value> {
        let input = self.input.as_mut().context("its input is a pipe")?;
        writeln!(input, "{ask}").with_context(|| format!("{} hung up", self.name))?;
        let answer = self.json()?;
        match answer["error"].as_str() {
            Some(error) => bail!("{}: {error}", self.name),
            None => Ok(answer),
        }
    }

    /// Waits for its end: all it has written meanwhile, and the processor seconds of its whole life.
    pub fn finish(mut self) -> Result<(String, f64)> {
        drop(self.input.take());
        let end = Instant::now() + self.patience;
        // A zombie's account is complete and still there; reaping takes it away.
        while self.state().is_some_and(|state| state != 'Z') {
            if Instant::now() > end {
                bail!("{} does not end", self.name);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let cpu = self.cpu_seconds();
        let status = self.process.wait()?;
        let said: Vec<_> = self.lines.iter().collect();
        if !status.success() {
            bail!("{} ended with {status}: {}", self.name, self.complaint());
        }
        Ok((said.join("\n"), cpu))
    }

    /// What it has written to standard error.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    fn complaint(&self) -> String {
        let log = self.log();
        log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing").to_owned()
    }

    /// Processor seconds so far, all threads, user and kernel.
    pub fn cpu_seconds(&self) -> f64 {
        kvasir_tests::process::cpu_seconds(self.process.id())
    }

    /// What the kernel says it is doing.
    fn state(&self) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id())).ok()?;
        // The name before may hold anything, a parenthesis too.
        stat.rsplit_once(')')?.1.trim_start().chars().next()
    }

    /// Stops it: a program that polls while it waits would take a core from the others.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.process.id()).ok().and_then(Pid::from_raw).expect("a child has a pid above 0");
        // It is reaped by `finish` and `drop` only, which take it: the id is still its own.
        let _ = kill_process(pid, signal);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
