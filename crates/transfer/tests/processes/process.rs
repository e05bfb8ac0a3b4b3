//! A peer process as its test sees it: started, asked, stopped, killed.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc,
    thread,
};

use kvasir_types::SegmentDescriptor;
use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;

use crate::{
    peer::{Ask, MARK, Outcome, Setup},
    support::{LONG, wait_until},
};

/// A running peer; killed when dropped.
pub struct Process {
    child: Child,
    asks: ChildStdin,
    answers: mpsc::Receiver<String>,
}

impl Process {
    /// A peer that shares our network.
    pub fn spawn() -> Self {
        Self::run(Command::new(std::env::current_exe().unwrap()))
    }

    /// A peer in a network namespace of its own, which has only a loopback device that is down, and ends with it.
    pub fn spawn_in_own_network() -> Self {
        let mut unshare = Command::new("unshare"); // becomes the program it is given: the process is the peer
        unshare.arg("--net").arg("--").arg(std::env::current_exe().unwrap());
        Self::run(unshare)
    }

    fn run(mut command: Command) -> Self {
        command.args(["--exact", "peer::process", "--ignored", "--nocapture", "--test-threads=1"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let Some(answer) = line.strip_prefix(MARK) else { continue };
                if sender.send(answer.to_owned()).is_err() {
                    return;
                }
            }
        });
        let asks = child.stdin.take().unwrap();
        Self { child, asks, answers }
    }

    /// Asks and waits for the answer.
    pub fn ask<T: DeserializeOwned>(&mut self, ask: &Ask) -> T {
        let mut line = serde_json::to_vec(ask).unwrap();
        line.push(b'\n');
        self.asks.write_all(&line).expect("the peer runs");
        let answer = self.answers.recv_timeout(LONG).expect("the peer answers");
        serde_json::from_str(&answer).unwrap()
    }

    pub fn start(&mut self, setup: Setup) -> SegmentDescriptor {
        self.ask(&Ask::Start(setup))
    }

    pub fn fill(&mut self, offset: u64, len: usize, seed: u64) {
        self.ask(&Ask::Fill { offset, len, seed })
    }

    pub fn sum(&mut self, offset: u64, len: usize) -> [u8; 16] {
        self.ask(&Ask::Sum { offset, len })
    }

    pub fn grant(&mut self, offset: u64, len: u64, write: bool) -> u64 {
        self.ask(&Ask::Grant { offset, len, write })
    }

    /// What became of all that it has submitted.
    pub fn wait(&mut self) -> Vec<Outcome> {
        self.ask(&Ask::Wait)
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// SIGKILL; the process is gone when it returns.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }

    /// SIGSTOP; no thread of it runs when it returns.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        wait_until("every thread of the peer has stopped", || {
            let tasks = fs::read_dir(format!("/proc/{}/task", self.id())).unwrap();
            tasks.flatten().all(|task| {
                // pid (name) state …: no name of ours has a parenthesis in it.
                let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T'))
            })
        });
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill(); // fails if it is gone already
        let _ = self.child.wait();
    }
}
