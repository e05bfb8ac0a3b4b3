//! A child process of a test: its log in a file, its signals by name, its end guaranteed.
//!
//! Rule: only processes started here are ever signalled, by the id their parent holds; a child that has been reaped is
//! never signalled again (its id may be somebody else's by then). Dropping kills and reaps.

use std::{
    ffi::OsString,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait;

/// A child process.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` with standard output and error appended to `<dir>/<name>.log`.
    pub fn spawn(name: &str, mut command: Command, dir: &Path) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let out = File::options().create(true).append(true).open(&log).with_context(|| log.display().to_string())?;
        // What is said to tests is no configuration of a service's.
        let ours = |name: &OsString| name.to_str().is_some_and(|name| name.starts_with("KVASIR_TEST_"));
        std::env::vars_os().map(|(name, _)| name).filter(ours).for_each(|name| {
            command.env_remove(name);
        });
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = command.spawn().with_context(|| format!("start {name}: {command:?}"))?;
        Ok(Self { name: name.to_owned(), child, log, ended: None })
    }

    /// The process's name in this test.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Memory it has in RAM, in bytes; 0 once it has ended.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
        kib.unwrap_or(0u64) * 1024
    }

    /// Processor seconds so far, all threads, user and kernel; 0 once it has been reaped.
    pub fn cpu_seconds(&self) -> f64 {
        cpu_seconds(self.child.id())
    }

    /// What it has written so far, to standard output and error.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("a child can be waited for until it is reaped");
        }
        self.ended
    }

    /// Whether its end has been seen: it was killed, or waited for.
    pub fn is_reaped(&self) -> bool {
        self.ended.is_some()
    }

    /// Kills it as a crash would: no handler runs. Returns once it is gone.
    pub fn kill(&mut self) {
        if self.ended().is_none() {
            self.child.kill().expect("a child that is not reaped can be killed");
            self.ended = Some(self.child.wait().expect("a killed child can be reaped"));
        }
    }

    /// Stops it in mid-breath (SIGSTOP): its sockets stay open and say nothing.
    pub fn pause(&mut self) {
        self.signal(Signal::STOP);
    }

    /// Lets a paused process go on.
    pub fn resume(&mut self) {
        self.signal(Signal::CONT);
    }

    /// Asks it to leave (SIGTERM).
    pub fn terminate(&mut self) {
        self.signal(Signal::TERM);
    }

    /// Waits for its end.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("{} exits", self.name);
        wait::until(&what, limit, async || self.ended()).await
    }

    fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a child has a pid above 0");
            kill_process(pid, signal).expect("a child that is not reaped can be signalled");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Processor seconds that a process has used, all threads, user and kernel; 0 if there is none.
pub fn cpu_seconds(pid: u32) -> f64 {
    /// Unit of processor time in `/proc`: the same on every Linux.
    const TICKS_PER_SECOND: f64 = 100.0;
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before may hold anything, a parenthesis too.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
        Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
    };
    ticks().map_or(0.0, |ticks| ticks as f64 / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, dir: &Path) -> Process {
        let mut command = Command::new("sh");
        command.arg("-c").arg(script);
        Process::spawn("child", command, dir).unwrap()
    }

    #[tokio::test]
    async fn both_outputs_are_in_the_log_and_the_status_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = shell("echo out; echo err >&2; exit 3", dir.path());
        assert_eq!(child.wait(wait::SOON).await.unwrap().code(), Some(3));
        assert_eq!(child.ended().and_then(|status| status.code()), Some(3));
        assert_eq!(child.log(), "out\nerr\n");
        child.terminate(); // reaped: must not signal anybody
    }

    #[tokio::test]
    async fn a_paused_child_can_be_killed() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = shell("sleep 600", dir.path());
        assert!(child.resident_bytes() > 0);
        child.pause();
        assert!(child.ended().is_none());
        child.kill();
        assert!(child.ended().is_some());
    }
}
