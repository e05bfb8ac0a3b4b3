//! Glancing: what a node has, read in its published index ([`crate::published`]) without asking it.
//!
//! A glance costs no call and no thread of the node, holds nothing, and may be wrong in one way only: what it does not see
//! may be there. So what it finds saves a lookup, and what it does not find is asked for as ever. What is read by it is
//! verified like everything else; a block that was given up in between is found to have other bytes, and asked for.

use std::sync::{Mutex, OnceLock, PoisonError};

use kvasir_proto::{convert, v1};
use kvasir_transfer::{Allocation, Batch, Memory, Op, Range, Region, TransferEngine};
use kvasir_types::{BlockHash, Deadline, GrantKey, SegmentDescriptor};

use crate::{
    Error, Inner,
    in_flight::InFlight,
    placement::Node,
    published::{Line, SET_BYTES, Shape},
};

/// Sets read at a time: as many bytes as the transfer engine copies within a host without waking another thread.
const SETS: usize = (32 << 10) / SET_BYTES;
/// Bytes of such a read.
const PLACE: u64 = (SETS * SET_BYTES) as u64;
/// Glances at the same time; more ask.
const PLACES: usize = 32;

/// Where a node's index is.
#[derive(Debug)]
pub(crate) struct Index {
    pub(crate) segment: SegmentDescriptor,
    pub(crate) grant: GrantKey,
    offset: u64,
    shape: Shape,
}

impl Index {
    /// From what a node says.
    pub(crate) fn new(told: &v1::PublishedIndex) -> Result<Self, kvasir_proto::Error> {
        let segment = told.segment.as_ref().ok_or(kvasir_proto::Error::Missing("segment"))?;
        if told.sets == 0 {
            return Err(kvasir_proto::Error::Missing("sets"));
        }
        Ok(Self {
            segment: segment.try_into()?,
            grant: convert::grant_key(told.grant),
            offset: told.offset,
            shape: Shape { sets: told.sets, seed: told.seed },
        })
    }
}

/// Registered memory into which sets are read, in places of its own. Made when first needed; an engine that gives none is
/// asked once.
#[derive(Default)]
pub(crate) struct Scratch {
    region: OnceLock<Option<Region>>,
    /// Places in use. Written by whatever task glances, for a moment.
    taken: Mutex<u32>,
}

impl Scratch {
    fn take(&self, engine: &TransferEngine) -> Option<Place<'_>> {
        let make = || {
            let memory = Memory::Allocate(Allocation::new(PLACES * PLACE as usize));
            let region = engine.register(memory);
            region.inspect_err(|error| tracing::debug!(%error, "no memory to read indexes into")).ok()
        };
        let region = self.region.get_or_init(make).as_ref()?;
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let number = taken.trailing_ones();
        if number as usize >= PLACES {
            return None;
        }
        *taken |= 1 << number;
        Some(Place { scratch: self, number, offset: region.base() + u64::from(number) * PLACE })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(Some(region)) = self.region.take() {
            // It is out of reach at once. Nobody reads into it any more: each read holds what this belongs to.
            drop(region.unregister());
        }
    }
}

/// A place that nobody else reads into.
struct Place<'a> {
    scratch: &'a Scratch,
    number: u32,
    offset: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *self.scratch.taken.lock().unwrap_or_else(PoisonError::into_inner) &= !(1 << self.number);
    }
}

/// The blocks, from the first on, that the index tells. Fewer if it could not be read.
pub(crate) async fn glance(
    inner: &Inner,
    node: &Node,
    index: &Index,
    hashes: impl ExactSizeIterator<Item = BlockHash>,
    block_bytes: u64,
    deadline: Deadline,
) -> Vec<Line> {
    let mut lines = Vec::with_capacity(hashes.len());
    let Some(place) = inner.scratch.take(&inner.engine) else { return lines };
    let (whole, deadline) = (deadline, deadline.min(Deadline::after(inner.peers.lookup_timeout)));
    let hashes: Vec<BlockHash> = hashes.collect();
    for part in hashes.chunks(SETS) {
        let found = match read(inner, index, &place, part, block_bytes, deadline).await {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(member = %node.id, %error, "a node's index was not read");
                // It may have moved; whoever asks the node next is told where it is.
                inner.peers.forget_index(node);
                inner.transfer_failed(node, &error);
                // One that hangs is not waited for a second time, by a call.
                if matches!(error, kvasir_transfer::Error::DeadlineExceeded) && !whole.passed() {
                    inner.peers.failed(node);
                }
                break;
            }
        };
        let all = found.len() == part.len();
        lines.extend(found);
        if !all {
            break;
        }
    }
    lines
}

async fn read(
    inner: &Inner,
    index: &Index,
    place: &Place<'_>,
    hashes: &[BlockHash],
    block_bytes: u64,
    deadline: Deadline,
) -> Result<Vec<Line>, kvasir_transfer::Error> {
    let local = |n: usize| place.offset + (n * SET_BYTES) as u64;
    let range = |(n, hash): (usize, &BlockHash)| Range {
        local: local(n),
        remote: index.offset.saturating_add(index.shape.set(hash).saturating_mul(SET_BYTES as u64)),
        len: SET_BYTES as u64,
    };
    let ranges = hashes.iter().enumerate().map(range).collect();
    let batch = Batch::new(Op::Read, index.segment.clone(), index.grant, ranges, deadline);
    InFlight::new(inner.engine.submit(batch)).await?;
    let mut lines = Vec::with_capacity(hashes.len());
    for (n, hash) in hashes.iter().enumerate() {
        let mut set = [0; SET_BYTES];
        inner.engine.read_bytes(local(n), &mut set)?;
        match index.shape.find(&set, hash, block_bytes) {
            Some(line) => lines.push(line),
            None => break,
        }
    }
    Ok(lines)
}

/// A node was asked where its index is, and said so.
pub(crate) fn told(inner: &Inner, node: &Node, index: Option<&v1::PublishedIndex>) {
    let Some(told) = index else { return };
    match Index::new(told) {
        Ok(index) => inner.peers.learn_index(node, index),
        Err(source) => {
            let error = Error::Answer { member: node.id.clone(), source };
            tracing::warn!(error = error.to_string(), "a store node's index can't be read");
        }
    }
}
