//! What a pass over a trace came to, for people and for programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use serde::Serialize;

use super::lane::Outcome;
use crate::live::{
    Header,
    bound::Bound,
    drive::Tally,
    pass::Pass,
    stats::{self, Errors, Latencies, Summary, share},
};

/// What one pass over a trace came to.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Which pass.
    #[serde(flatten)]
    pub header: Header,
    /// Bytes of each block of the store, which is what is counted here.
    pub block_bytes: u64,
    /// How many of them one of the trace's blocks is.
    pub split: u64,
    /// Requests served.
    pub requests: usize,
    /// What became of their blocks.
    pub blocks: Blocks,
    /// Blocks read and right, of all blocks asked for.
    pub hit_rate: f64,
    /// Those that were in memory.
    pub memory_hit_rate: f64,
    /// Those that were waited for because they, or blocks before them, were on disk.
    pub disk_hit_rate: f64,
    /// What a store without limit hits that holds nothing of the namespace before the first pass, if these requests come
    /// one after the other.
    pub bound: f64,
    /// Bytes moved.
    pub bytes: Bytes,
    /// How long things took.
    pub latency_us: Times,
    /// What went wrong, by kind. All of it is a miss, or a block not written.
    pub errors: Errors,
    /// Whence blocks were read: every node that is known, or gave one.
    pub nodes: Vec<NodeShare>,
    /// How many times as many the busiest gave as the mean one.
    pub imbalance: f64,
}

/// What became of blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Blocks {
    /// Asked for.
    pub asked: u64,
    /// Read and right.
    pub hit: u64,
    /// Of those read: in memory when they were asked for.
    pub memory: u64,
    /// Of those read: waited for.
    pub disk: u64,
    /// Read, and not what was written under that name.
    pub wrong: u64,
    /// Found, and not to be had: their node failed, or their bytes were not what they had been.
    pub lost: u64,
    /// Written.
    pub written: u64,
    /// Not written: somebody else had.
    pub present: u64,
    /// Not written: no room, another was at it, or something went wrong.
    pub skipped: u64,
}

/// Bytes moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// Out of the store.
    pub read: u64,
    /// Into it.
    pub written: u64,
}

/// How long things took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Times {
    /// Asking all nodes what they have, and waiting for their disks.
    pub lookup: Summary,
    /// Reading the blocks of a request and verifying them.
    pub read: Summary,
    /// Writing the blocks of a request until they can be found.
    pub write: Summary,
    /// All of it, from when the request was due.
    pub request: Summary,
}

/// What one node gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodeShare {
    /// Its name.
    pub id: String,
    /// Blocks read from it.
    pub blocks: u64,
    /// Bytes of those.
    pub bytes: u64,
}

/// How blocks of the trace are put into the store.
pub(super) struct Shape {
    /// Bytes of a block of the store.
    pub(super) block_bytes: u64,
    /// Blocks of the store for one of the trace.
    pub(super) split: u64,
}

/// A report while it is being counted.
#[derive(Default)]
pub(super) struct Counts {
    /// Numbers of the requests served.
    served: Vec<usize>,
    blocks: Blocks,
    nodes: BTreeMap<String, u64>,
    lookup: Latencies,
    read: Latencies,
    write: Latencies,
    request: Latencies,
    errors: Errors,
}

impl Tally<Outcome> for Counts {
    fn add(&mut self, number: usize, outcome: Outcome) {
        self.served.push(number);
        let blocks = &mut self.blocks;
        for (sum, part) in [
            (&mut blocks.asked, outcome.asked),
            (&mut blocks.hit, outcome.hit),
            (&mut blocks.wrong, outcome.wrong),
            (&mut blocks.lost, outcome.lost),
            (&mut blocks.written, outcome.written),
            (&mut blocks.present, outcome.present),
            (&mut blocks.skipped, outcome.skipped),
        ] {
            *sum += part as u64;
        }
        for source in outcome.sources {
            blocks.memory += source.memory as u64;
            blocks.disk += source.disk as u64;
            *self.nodes.entry(source.member.to_string()).or_default() += (source.memory + source.disk) as u64;
        }
        for (sum, part) in
            [(&mut self.lookup, outcome.lookup), (&mut self.read, outcome.read), (&mut self.write, outcome.write)]
        {
            part.into_iter().for_each(|part| sum.add(part));
        }
        self.request.add(outcome.whole);
        outcome.errors.into_iter().for_each(|kind| self.errors.add(kind));
    }

    fn line(&self) -> String {
        let Blocks { asked, hit, written, wrong, .. } = self.blocks;
        let errors = self.errors.count();
        format!("hit {:.4} of {asked} blocks, {written} written, {errors} errors, {wrong} wrong", share(hit, asked))
    }
}

impl Counts {
    /// The report of a pass: with all nodes that are known, whether or not they gave something. The bound counts the requests
    /// that were served, in the trace's order.
    pub(super) fn report(
        mut self,
        pass: &Pass<'_>,
        Shape { block_bytes, split }: Shape,
        nodes: BTreeSet<String>,
        bound: &mut Bound,
    ) -> Report {
        self.served.sort_unstable();
        let bound: usize = self.served.iter().map(|&number| bound.ask(&pass.trace.requests[number].blocks)).sum();
        for id in nodes {
            self.nodes.entry(id).or_default();
        }
        let blocks = self.blocks;
        let (busiest, all) = (self.nodes.values().max().copied().unwrap_or(0), self.nodes.values().sum());
        Report {
            header: pass.header(),
            block_bytes,
            split,
            requests: self.served.len(),
            hit_rate: share(blocks.hit, blocks.asked),
            memory_hit_rate: share(blocks.memory, blocks.asked),
            disk_hit_rate: share(blocks.disk, blocks.asked),
            bound: share(bound as u64 * split, blocks.asked),
            bytes: Bytes { read: (blocks.hit + blocks.wrong) * block_bytes, written: blocks.written * block_bytes },
            blocks,
            latency_us: Times {
                lookup: self.lookup.summary(),
                read: self.read.summary(),
                write: self.write.summary(),
                request: self.request.summary(),
            },
            errors: self.errors,
            imbalance: share(busiest * self.nodes.len() as u64, all),
            nodes: self
                .nodes
                .into_iter()
                .map(|(id, blocks)| NodeShare { id, blocks, bytes: blocks * block_bytes })
                .collect(),
        }
    }
}

impl Report {
    /// For people.
    pub(super) fn table(&self) -> String {
        let Self { requests, blocks, hit_rate, memory_hit_rate, disk_hit_rate, bound, .. } = self;
        let Blocks { asked, wrong, lost, written, present, skipped, .. } = blocks;
        let Times { lookup, read, write, request } = self.latency_us;
        let nodes: Vec<_> = self.nodes.iter().map(|node| format!("{} {}", node.id, node.blocks)).collect();
        let mut table = self.header.line(&format!("{requests} requests"));
        write!(
            table,
            "  hit        {hit_rate:.4} of {asked} blocks (memory {memory_hit_rate:.4}, disk {disk_hit_rate:.4}), \
             bound {bound:.4}\n  \
             blocks     {written} written, {present} there already, {skipped} not taken, {lost} lost, {wrong} wrong\n  \
             bytes      {} read, {} written\n{}  \
             nodes      {}; busiest / mean {:.2}\n  \
             errors     {}\n",
            stats::bytes(self.bytes.read),
            stats::bytes(self.bytes.written),
            stats::table(&[("lookup", lookup), ("read", read), ("write", write), ("request", request)]),
            nodes.join(", "),
            self.imbalance,
            self.errors.line(),
        )
        .expect("a string takes all");
        table
    }
}
