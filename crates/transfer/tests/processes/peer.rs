//! The peer process: an engine that does what it is asked, one JSON line in, one out.
//!
//! It is the test `peer::process` of this binary, ignored unless it is asked for by name; the harness's own lines on
//! standard output are told from answers by [`MARK`]. Anything unexpected is a panic: the asking side sees the end of the
//! output. So does the peer when the asking side is gone, and ends; should it be stopped then, the kernel kills it.

use std::{collections::HashMap, io::BufRead, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use kvasir_transfer::{
    Access, Allocation, Batch, Config, Directory, Error, Grant, Lookup, Op, Priority, Published, Range, Transfer,
    TransferEngine,
};
use kvasir_types::{Deadline, GrantKey, SegmentDescriptor, TransportKind};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    lies,
    support::{LONG, MIB, block_on, config, grant, pattern},
};

/// Opens every line of the peer's.
pub const MARK: &str = "kvasir-peer ";

/// What a peer is asked.
#[derive(Serialize, Deserialize)]
pub enum Ask {
    /// End the engine there was, start another: its descriptor.
    Start(Setup),
    /// Fill memory with the pattern of a seed.
    Fill { offset: u64, len: usize, seed: u64 },
    /// The checksum of memory.
    Sum { offset: u64, len: usize },
    /// Grant a range: its key.
    Grant { offset: u64, len: u64, write: bool },
    /// Revoke a grant, and wait until that has come to its end.
    Revoke { key: u64 },
    /// Begin to move: nothing to answer yet.
    Submit { write: bool, target: SegmentDescriptor, key: u64, ranges: Vec<(u64, u64, u64)>, deadline_ms: u64 },
    /// Wait for everything submitted: what became of each ([`Outcome`]).
    Wait,
    /// Open a segment by name in the directory and read its first bytes to the start of the arena: an [`Outcome`].
    Fetch { name: String, len: u64 },
    /// Misbehave in a way: whether the owner closed the connection.
    Lie { target: SegmentDescriptor, key: u64, lie: lies::Lie },
}

/// How to start an engine.
#[derive(Clone, Serialize, Deserialize)]
pub struct Setup {
    pub name: String,
    pub transport: TransportKind,
    pub bytes: usize,
    /// Where to listen.
    pub bind: SocketAddr,
    /// Connections to each peer.
    pub connections: usize,
    pub io_timeout_ms: u64,
    pub slice_bytes: usize,
    /// Where segments are found by name.
    pub directory: Option<PathBuf>,
}

impl Setup {
    pub fn new(name: &str, transport: TransportKind, bytes: usize) -> Self {
        Self {
            name: name.into(),
            transport,
            bytes,
            bind: ([127, 0, 0, 1], 0).into(),
            connections: 2,
            io_timeout_ms: 10_000,
            slice_bytes: MIB,
            directory: None,
        }
    }

    fn engine(self) -> Result<TransferEngine, Error> {
        let mut settings = Config {
            tcp_bind: self.bind,
            connections_per_peer: self.connections,
            io_timeout: Duration::from_millis(self.io_timeout_ms),
            slice_bytes: self.slice_bytes,
            ..config(self.transport)
        };
        settings.ucx.bind = self.bind;
        let mut builder = TransferEngine::builder().name(self.name).config(settings);
        if let Some(path) = self.directory {
            builder = builder.directory(Arc::new(FileDirectory(path)));
        }
        builder.arena(Allocation::new(self.bytes)).build()
    }
}

/// Bytes moved, or the error's cause and words.
pub type Outcome = Result<u64, (String, String)>;

fn outcome(result: Result<kvasir_transfer::Report, Error>) -> Outcome {
    result.map(|report| report.bytes).map_err(|error| (error.cause().to_owned(), error.to_string()))
}

/// A directory of files, one for each name: what the cluster's metadata is to the services.
pub struct FileDirectory(pub PathBuf);

impl FileDirectory {
    /// Publishes a life of `name`, in place of the one before.
    pub fn publish(&self, name: &str, descriptor: &SegmentDescriptor, key: u64) {
        let next = self.0.join(format!("{name}.next"));
        std::fs::write(&next, serde_json::to_vec(&(descriptor, key)).unwrap()).unwrap();
        std::fs::rename(next, self.0.join(name)).unwrap(); // a reader finds the one or the other, never half of one
    }
}

impl Directory for FileDirectory {
    fn find<'a>(&'a self, name: &'a str) -> Lookup<'a> {
        Box::pin(async move {
            let unknown = |reason: String| Error::UnknownSegment { name: name.to_owned(), reason };
            let file = std::fs::read(self.0.join(name)).map_err(|error| unknown(error.to_string()))?;
            let (descriptor, key): (SegmentDescriptor, u64) =
                serde_json::from_slice(&file).map_err(|error| unknown(error.to_string()))?;
            Ok(Published { descriptor, grant: Some(GrantKey(key)) })
        })
    }
}

#[test]
#[ignore = "not a test: the peer process that the tests start: cargo nextest run -p kvasir-transfer processes"]
fn process() {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let mut peer = Peer::default();
    for line in std::io::stdin().lock().lines() {
        let answer = peer.answer(serde_json::from_str(&line.unwrap()).unwrap());
        println!("\n{MARK}{answer}");
    }
}

#[derive(Default)]
struct Peer {
    grants: HashMap<u64, Grant>,
    transfers: Vec<Transfer>,
    engine: Option<TransferEngine>,
}

impl Peer {
    fn engine(&self) -> &TransferEngine {
        self.engine.as_ref().expect("started first")
    }

    fn answer(&mut self, ask: Ask) -> Value {
        match ask {
            Ask::Start(setup) => {
                self.grants.clear();
                self.engine = None; // before the next one binds
                let engine = self.engine.insert(setup.engine().unwrap());
                json!(engine.descriptor())
            }
            Ask::Fill { offset, len, seed } => json!(self.engine().write_bytes(offset, &pattern(seed, len)).unwrap()),
            Ask::Sum { offset, len } => json!(self.engine().checksum(offset, len as u64).unwrap()),
            Ask::Grant { offset, len, write } => {
                let grant = grant(self.engine(), offset, len, if write { Access::Write } else { Access::Read });
                let key = grant.key().0;
                self.grants.insert(key, grant);
                json!(key)
            }
            Ask::Revoke { key } => json!(self.grants.remove(&key).expect("granted before").revoke().wait()),
            Ask::Submit { write, target, key, ranges, deadline_ms } => {
                let ranges = ranges.into_iter().map(|(local, remote, len)| Range { local, remote, len }).collect();
                let deadline = Deadline::after(Duration::from_millis(deadline_ms));
                let op = if write { Op::Write } else { Op::Read };
                let transfer = self.engine().submit(Batch::new(op, target, GrantKey(key), ranges, deadline));
                self.transfers.push(transfer);
                json!(())
            }
            Ask::Wait => {
                let outcomes: Vec<Outcome> = self.transfers.drain(..).map(|it| outcome(it.wait())).collect();
                json!(outcomes)
            }
            Ask::Fetch { name, len } => json!(block_on(self.fetch(&name, len))),
            Ask::Lie { target, key, lie } => json!(lie.tell(&target, GrantKey(key))),
        }
    }

    async fn fetch(&self, name: &str, len: u64) -> Outcome {
        let read = async {
            let segment = self.engine().open(name).await?;
            let ranges = vec![Range { local: 0, remote: 0, len }];
            segment.transfer(Op::Read, ranges, Deadline::after(LONG), Priority::Normal).await
        };
        outcome(read.await)
    }
}
