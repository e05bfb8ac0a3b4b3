//! The conversation beside the transfer: one JSON line asked, one JSON line answered, over a TCP connection of its own.
//!
//! What is opened to an initiator stays open as long as its connection. A line is bounded, so neither side can be made to
//! hold more than that.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use kvasir_types::SegmentDescriptor;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::cli::Direction;

/// Longest line: a descriptor takes a few hundred bytes.
const LINE_BYTES: u64 = 64 << 10;
/// How long the other side may take to answer: filling and checking a large buffer takes seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// What an initiator asks of a target.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Open the first `bytes` of the buffer for this direction.
    Open { op: Direction, bytes: u64 },
    /// How much processor time have you used so far?
    Cpu,
    /// Write the pattern of `seed` into the first `bytes`, or, without a seed, anything else.
    Fill { seed: Option<u64>, bytes: u64 },
    /// Do the first `bytes` hold the pattern of `seed`?
    Check { seed: u64, bytes: u64 },
}

/// What a target answers.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Opened: where, under which grant's key, and where the buffer starts in the segment.
    Opened { descriptor: SegmentDescriptor, key: u64, base: u64 },
    /// Processor seconds.
    Cpu { seconds: f64 },
    /// Done.
    Filled,
    /// The first place that does not hold what it should.
    Checked { first_wrong: Option<u64> },
    /// It can't be done; why.
    Refused { reason: String },
}

/// One end of a control connection.
pub struct Line(BufReader<TcpStream>);

impl Line {
    /// Takes over a connection.
    pub fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Connects to a target.
    pub fn connect(address: &str) -> Result<Self> {
        let connect = || -> Result<TcpStream> {
            let address = address.to_socket_addrs()?.next().context("no such address")?;
            let stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        };
        Self::new(connect().with_context(|| format!("connect to the target's control address {address}"))?)
    }

    /// Asks and waits for the answer; a refusal is an error.
    pub fn ask(&mut self, ask: &Ask) -> Result<Answer> {
        self.send(ask)?;
        match self.receive()? {
            Some(Answer::Refused { reason }) => bail!("the target refused: {reason}"),
            Some(answer) => Ok(answer),
            None => bail!("the target hung up"),
        }
    }

    /// Writes one line.
    pub fn send(&mut self, message: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        Ok(self.0.get_mut().write_all(&line)?)
    }

    /// Reads one line; `None` when the other side has hung up.
    pub fn receive<M: DeserializeOwned>(&mut self) -> Result<Option<M>> {
        let mut line = Vec::new();
        if self.0.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        ensure!(line.ends_with(b"\n"), "a control line was cut off or is longer than {LINE_BYTES} bytes");
        serde_json::from_slice(&line).context("a control line that makes no sense").map(Some)
    }
}

/// The error of an answer to another question; without the answer, which may hold a key.
pub fn unexpected(_: &Answer) -> anyhow::Error {
    anyhow::anyhow!("the target answered another question: it is of another version")
}
