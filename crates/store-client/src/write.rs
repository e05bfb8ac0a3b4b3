//! Writing: reserve at every node what is new to it, write that one-sided, commit what arrived.
//!
//! Nodes are served side by side, those of all copies; on each it is three steps in a row, or one call that carries the bytes
//! where they are few; a single block may go into room that was made ahead (`ahead`). A node that knows a newer view of
//! the members says so instead of reserving: its share is then divided anew, by that view. The checksums are computed while
//! the bytes move. A commit names only blocks whose batch was acknowledged; what it does not name, the node takes back.

use std::{
    pin::pin,
    sync::{Arc, OnceLock},
    time::Instant,
};

use futures_util::{
    StreamExt,
    future::{Either, join, join_all, select},
    stream,
};
use kvasir_proto::{convert, v1};
use kvasir_rpc::trace;
use kvasir_transfer::{Batch, Checksum, Op, Priority, Range};
use kvasir_types::{BlockHash, Deadline, Epoch, MemberId, PROTOCOL_VERSION, RequestId, SegmentDescriptor};
use tokio::sync::Mutex;
use tonic::Request;

use crate::{
    Error, Inner, MAX_CALLS, MAX_HASHES, Origin,
    ahead::Ahead,
    hot,
    in_flight::InFlight,
    placement::{Node, Placement, Share, collect},
    read::later,
};

/// What became of blocks offered to the store.
#[derive(Debug, Default)]
pub struct WriteReport {
    /// Blocks written and visible now.
    pub written: usize,
    /// Blocks that were there already.
    pub present: usize,
    /// Blocks not written: another writer is at them, there is no room, or something went wrong.
    pub skipped: usize,
    /// Bytes of the blocks written.
    pub bytes: u64,
    /// The first thing that went wrong, if something did.
    pub error: Option<Error>,
}

/// Bytes that are reserved and committed as one, so that a node verifies them while the next are written.
const PART_BYTES: u64 = 8 << 20;
/// A share up to this size is sent along with one call: that is less than three steps cost.
const INLINE_BYTES: u64 = 128 << 10;
/// The checksums of a share up to this size are begun while its room is being made: wasted if it is there already.
const AHEAD_BYTES: u64 = 8 << 20;
/// Bytes hashed in one go: others use this thread too.
const HASHED_AT_ONCE: u64 = 256 << 10;
/// Most rounds of reservations for one write. There is a second one only if a node knew a newer view of the members.
const MAX_ROUNDS: usize = 3;

/// What became of a block: of several copies, the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fate {
    Skipped,
    Present,
    Written,
}

/// What became of a share.
#[derive(Default)]
pub(crate) struct ShareReport {
    pub(crate) fates: Vec<(usize, Fate)>,
    /// Blocks that are to be divided anew.
    pub(crate) moved: Vec<usize>,
    pub(crate) error: Option<Error>,
}

pub(crate) type Client = v1::store_client::StoreClient<tonic::transport::Channel>;

/// A block that was written: which of the request's blocks, and what its bytes are.
pub(crate) struct Sum {
    pub(crate) block: usize,
    pub(crate) checksum: [u8; 16],
}

/// A block to write: which of the request's blocks, and where to.
#[derive(Clone, Copy)]
pub(crate) struct New {
    pub(crate) block: usize,
    pub(crate) offset: u64,
}

/// Blocks of one placement group that a store node gives to others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupBlocks {
    /// First eight bytes, as a little-endian number, of the hash of the group's first block.
    pub group: u64,
    /// How many blocks of the prompt come before the first of these.
    pub position: u32,
    /// First four bytes of the hash of the block before the first of these, as a little-endian number; 0: there is none.
    pub parent: u32,
    /// Hash and offset of each; they follow one another.
    pub blocks: Vec<(BlockHash, u64)>,
    /// Who gives them.
    pub from: MemberId,
    /// On how many nodes they are to be, where that is more than is usual.
    pub copies: usize,
}

/// Offers a prompt's blocks to their homes.
pub(crate) async fn write(
    inner: &Inner,
    request: &RequestId,
    origin: &Origin,
    blocks: &[(BlockHash, u64)],
    have: usize,
    block_bytes: u64,
    deadline: Deadline,
) -> WriteReport {
    let sums = blocks.iter().map(|_| OnceLock::new()).collect();
    let (known, hashing) = (inner.known.of(blocks), Mutex::new(()));
    Offer { inner, request, origin, blocks, known, group: None, block_bytes, deadline, sums, hashing }.run(have).await
}

/// Offers a group's blocks to its homes other than the one that gives them.
pub(crate) async fn hand_over(
    inner: &Inner,
    request: &RequestId,
    origin: &Origin,
    group: &GroupBlocks,
    block_bytes: u64,
    deadline: Deadline,
) -> WriteReport {
    let (blocks, sums) = (&group.blocks, group.blocks.iter().map(|_| OnceLock::new()).collect());
    let (known, hashing) = (0, Mutex::new(()));
    Offer { inner, request, origin, blocks, known, group: Some(group), block_bytes, deadline, sums, hashing }
        .run(0)
        .await
}

/// What all shares of one write have in common.
pub(crate) struct Offer<'a> {
    pub(crate) inner: &'a Inner,
    request: &'a RequestId,
    pub(crate) origin: &'a Origin,
    pub(crate) blocks: &'a [(BlockHash, u64)],
    /// So many of them, from the first on, were known to some node when they were looked for.
    known: usize,
    /// Set if they are one group's, whose place in its prompt it tells; else they are a prompt's, from its first block on.
    group: Option<&'a GroupBlocks>,
    pub(crate) block_bytes: u64,
    pub(crate) deadline: Deadline,
    /// Checksums of the blocks' bytes, computed once for all copies.
    sums: Vec<OnceLock<[u8; 16]>>,
    /// Held while checksums are computed: all of them together take a core at most, and the first part is to be ready first.
    hashing: Mutex<()>,
}

impl Offer<'_> {
    /// Offers them but for the first `have`.
    async fn run(&self, have: usize) -> WriteReport {
        let (mut fates, mut error) = (vec![Fate::Skipped; self.blocks.len()], None);
        let mut todo: Vec<usize> = (have..self.blocks.len()).collect();
        for _ in 0..MAX_ROUNDS {
            let placement = self.inner.placement();
            let shares =
                self.shares(&placement, &todo).into_iter().map(|share| self.write_share(share, placement.epoch));
            let reports: Vec<_> = stream::iter(shares).buffer_unordered(MAX_CALLS).collect().await;
            todo.clear();
            for report in reports {
                report.fates.into_iter().for_each(|(block, fate)| fates[block] = fates[block].max(fate));
                todo.extend(report.moved);
                error = error.or(report.error);
            }
            todo.sort_unstable();
            todo.dedup();
            if todo.is_empty() {
                break;
            }
        }
        let count = |fate| fates.iter().filter(|&&each| each == fate).count();
        let (written, present) = (count(Fate::Written), count(Fate::Present));
        let skipped = self.blocks.len() - have - written - present;
        WriteReport { written, present, skipped, bytes: written as u64 * self.block_bytes, error }
    }

    /// What to write where: the groups in which these blocks are go to as many nodes as there are to be copies.
    fn shares(&self, placement: &Placement, blocks: &[usize]) -> Vec<Share> {
        let size = self.group_blocks(placement);
        let copies = placement.replicas().max(self.group.map_or(1, |group| group.copies));
        let groups = || blocks.chunk_by(|a, b| a / size == b / size);
        let homes: Vec<Vec<Arc<Node>>> =
            groups().map(|part| self.homes(placement, part[0] / size * size, copies)).collect();
        let most = usize::try_from(PART_BYTES / self.block_bytes.max(1)).unwrap_or(MAX_HASHES).clamp(1, MAX_HASHES);
        let of_copy = |copy: usize| {
            let parts = groups().zip(&homes).filter_map(move |(part, homes)| {
                let node = homes.get(copy)?;
                Some((node.clone(), part[0]..part[part.len() - 1] + 1))
            });
            collect(parts, size, most)
        };
        (0..copies).flat_map(of_copy).collect()
    }

    /// How many of the blocks are placed together.
    fn group_blocks(&self, placement: &Placement) -> usize {
        if self.group.is_some() { self.blocks.len().max(1) } else { placement.group_blocks() }
    }

    /// The nodes that are to have the group which begins with that block.
    fn homes(&self, placement: &Placement, first: usize, copies: usize) -> Vec<Arc<Node>> {
        let Some(group) = self.group else { return placement.homes(self.blocks[first].0, copies) };
        let mut homes = placement.homes(hot::key(group.group), copies);
        homes.retain(|node| node.id != group.from);
        homes
    }

    async fn write_share(&self, share: Share, epoch: Epoch) -> ShareReport {
        let mut report = ShareReport::default();
        let bytes = (share.blocks.len() as u64).saturating_mul(self.block_bytes);
        let result = if bytes <= INLINE_BYTES {
            self.put(&share, epoch, &mut report).await
        } else if bytes <= AHEAD_BYTES {
            let hashing = pin!(self.checksums(share.blocks.iter().copied()));
            match select(pin!(self.small_share(&share, epoch, &mut report)), hashing).await {
                Either::Left((result, _)) => result,
                // What went wrong with it goes wrong there, too.
                Either::Right((_, rest)) => rest.await,
            }
        } else {
            self.try_share(&share, epoch, &mut report).await
        };
        if let Err(error) = result {
            report.error = report.error.or(Some(error));
        }
        report
    }

    /// The bytes along with the call.
    async fn put(&self, share: &Share, epoch: Epoch, report: &mut ShareReport) -> Result<(), Error> {
        let sums = self.checksums(share.blocks.iter().copied()).await?;
        let bytes = |&block: &usize| {
            let mut bytes = vec![0; self.block_bytes as usize];
            self.inner.engine.read_bytes(self.blocks[block].1, &mut bytes).map_err(Error::Local)?;
            Ok::<_, Error>(bytes.into())
        };
        let message = v1::PutRequest {
            protocol_version: PROTOCOL_VERSION,
            request_id: self.request.to_string(),
            hashes: convert::pack16(share.blocks.iter().map(|&block| &self.blocks[block].0.0)),
            blocks: share.blocks.iter().map(bytes).collect::<Result<_, _>>()?,
            checksums: convert::pack16(sums.iter().map(|sum| &sum.checksum)),
            runs: self.runs(share),
            model: self.origin.model.map_or_else(Default::default, |model| convert::bytes16(&model.0)),
            tenant: self.origin.tenant.clone(),
            prompt_blocks: u32::try_from(self.blocks.len()).unwrap_or(u32::MAX),
            prompt_known: u32::try_from(self.known).unwrap_or(u32::MAX),
            ended: self.inner.peers.take_ended(&share.node),
            epoch: epoch.0,
        };
        let call = async |mut client: Client| client.put(trace::carry(Request::new(message))).await;
        let response = self.inner.peers.call(&share.node, self.deadline, call).await?;
        if let Some(view) = &response.view
            && response.states.is_empty()
        {
            self.inner.newer(&share.node, view);
            report.moved.clone_from(&share.blocks);
            return Ok(());
        }
        let (asked, got) = (share.blocks.len(), response.states.len());
        if got != asked {
            return Err(Error::Count { member: share.node.id.clone(), asked, got });
        }
        for (state, &block) in response.states().zip(&share.blocks) {
            match state {
                v1::slot::State::Reserved => report.fates.push((block, Fate::Written)),
                v1::slot::State::Present => report.fates.push((block, Fate::Present)),
                v1::slot::State::Busy | v1::slot::State::Full | v1::slot::State::Unspecified => {}
            }
        }
        Ok(())
    }

    /// Into room that was made ahead, if there is any.
    async fn small_share(&self, share: &Share, epoch: Epoch, report: &mut ShareReport) -> Result<(), Error> {
        if !self.put_ahead(share, epoch, report).await? {
            self.try_share(share, epoch, report).await?;
        }
        Ok(())
    }

    async fn try_share(&self, share: &Share, epoch: Epoch, report: &mut ShareReport) -> Result<(), Error> {
        let asked = Instant::now();
        let response = self.reserve(share, epoch).await?;
        let member = || share.node.id.clone();
        if let Some(view) = &response.view
            && response.slots.is_empty()
        {
            self.inner.newer(&share.node, view);
            report.moved.clone_from(&share.blocks);
            return Ok(());
        }
        if response.slots.len() != share.blocks.len() {
            return Err(Error::Count { member: member(), asked: share.blocks.len(), got: response.slots.len() });
        }
        let mut new = Vec::new();
        for (slot, &block) in response.slots.iter().zip(&share.blocks) {
            match slot.state() {
                v1::slot::State::Reserved => new.push(New { block, offset: slot.offset }),
                v1::slot::State::Present => report.fates.push((block, Fate::Present)),
                v1::slot::State::Busy | v1::slot::State::Full | v1::slot::State::Unspecified => {}
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        let segment = response.segment.as_ref().ok_or(kvasir_proto::Error::Missing("segment"));
        let segment = segment
            .and_then(SegmentDescriptor::try_from)
            .map_err(|source| Error::Answer { member: member(), source })?;
        // The node's clock for it started after we asked: it lasts at least this long.
        let until = self.deadline.min(later(asked, response.reservation_ms));
        if let Some(ahead) = &response.ahead {
            self.inner.peers.keep_ahead(&share.node, Ahead::new(ahead, self.origin, &segment, asked));
        }
        let (written, failure) = self.push(share, &new, response.grant, &segment, until).await;
        report.error = failure;
        let offered = written.len();
        let commit = v1::CommitRequest {
            reservation: response.reservation,
            hashes: convert::pack16(written.iter().map(|sum| &self.blocks[sum.block].0.0)),
            checksums: convert::pack16(written.iter().map(|sum| &sum.checksum)),
            named: None,
        };
        // Also with nothing to commit: it gives the room back at once.
        let call = async |mut client: Client| client.commit(trace::carry(Request::new(commit))).await;
        let committed = self.inner.peers.call(&share.node, until, call).await?.committed as usize;
        // Where not all were, it does not say which.
        report.fates.extend(written.iter().take(committed).map(|sum| (sum.block, Fate::Written)));
        if committed < offered {
            return Err(Error::NotCommitted { member: member(), written: offered, committed });
        }
        Ok(())
    }

    async fn reserve(&self, share: &Share, epoch: Epoch) -> Result<v1::ReserveResponse, Error> {
        let message = self.reservation(share, epoch);
        let call = async |mut client: Client| client.reserve(trace::carry(Request::new(message))).await;
        self.inner.peers.call(&share.node, self.deadline, call).await
    }

    /// What a node is to know of blocks that are offered to it.
    pub(crate) fn reservation(&self, share: &Share, epoch: Epoch) -> v1::ReserveRequest {
        v1::ReserveRequest {
            protocol_version: PROTOCOL_VERSION,
            request_id: self.request.to_string(),
            hashes: convert::pack16(share.blocks.iter().map(|&block| &self.blocks[block].0.0)),
            block_bytes: self.block_bytes,
            runs: self.runs(share),
            prompt_blocks: u32::try_from(self.blocks.len()).unwrap_or(u32::MAX),
            prompt_known: u32::try_from(self.known).unwrap_or(u32::MAX),
            model: self.origin.model.map_or_else(Default::default, |model| convert::bytes16(&model.0)),
            tenant: self.origin.tenant.clone(),
            ended: self.inner.peers.take_ended(&share.node),
            // Who writes one block may be about to write one after the other.
            ahead: share.blocks.len() == 1,
            epoch: epoch.0,
        }
    }

    /// Where in the prompt the share's blocks are, a run for each stretch of a placement group.
    fn runs(&self, share: &Share) -> Vec<v1::BlockRun> {
        let group = share.group_blocks;
        let run = |part: &[usize]| {
            let first = part[0];
            let (mut position, mut key) = (0, hot::group(self.blocks[first / group * group].0));
            let mut parent = first.checked_sub(1).map(|before| self.blocks[before].0.0);
            if let Some(given) = self.group {
                (position, key) = (given.position, given.group);
                let tag = |tag: u32| std::array::from_fn(|byte| tag.to_le_bytes().get(byte).copied().unwrap_or(0));
                parent = parent.or_else(|| (given.parent != 0).then(|| tag(given.parent)));
            }
            v1::BlockRun {
                blocks: u32::try_from(part.len()).unwrap_or(u32::MAX),
                position: position.saturating_add(u32::try_from(first).unwrap_or(u32::MAX)),
                group: key,
                parent: parent.map_or_else(Default::default, |parent| convert::bytes16(&parent)),
            }
        };
        share.blocks.chunk_by(|a, b| a / group == b / group && a + 1 == *b).map(run).collect()
    }

    /// Writes the new blocks, a batch for each group, and computes their checksums meanwhile. What to commit.
    pub(crate) async fn push(
        &self,
        share: &Share,
        new: &[New],
        grant: u64,
        segment: &SegmentDescriptor,
        until: Deadline,
    ) -> (Vec<Sum>, Option<Error>) {
        let group = share.group_blocks;
        let mut pieces = Vec::new();
        for part in new.chunk_by(|a, b| a.block / group == b.block / group) {
            let range =
                |new: &New| Range { local: self.blocks[new.block].1, remote: new.offset, len: self.block_bytes };
            let batch = Batch {
                op: Op::Write,
                target: segment.clone(),
                grant: convert::grant_key(grant),
                ranges: part.iter().map(range).collect(),
                deadline: until,
                priority: Priority::Low,
                notice: None,
            };
            pieces.push((part, InFlight::new(self.inner.engine.submit(batch))));
        }
        let pieces = pieces.into_iter().map(|(part, transfer)| async move {
            let (moved, sums) = join(transfer, self.checksums(part.iter().map(|new| new.block))).await;
            if let Err(source) = moved {
                self.inner.transfer_failed(&share.node, &source);
                return Err(Error::Transfer { member: share.node.id.clone(), source });
            }
            sums
        });
        let (mut commit, mut failure) = (Vec::new(), None);
        for result in join_all(pieces).await {
            match result {
                Ok(sums) => commit.extend(sums),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        (commit, failure)
    }

    async fn checksums(&self, blocks: impl Iterator<Item = usize>) -> Result<Vec<Sum>, Error> {
        let _turn = self.hashing.lock().await;
        let mut sums = Vec::with_capacity(blocks.size_hint().0);
        for block in blocks {
            let checksum = match self.sums[block].get() {
                Some(&known) => known,
                None => self.checksum(self.blocks[block].1).await.map_err(Error::Local)?,
            };
            let _ = self.sums[block].set(checksum); // or another copy's writer came first, with the same
            sums.push(Sum { block, checksum });
        }
        Ok(sums)
    }

    async fn checksum(&self, offset: u64) -> Result<[u8; 16], kvasir_transfer::Error> {
        let (mut sum, mut done) = (Checksum::new(&self.inner.engine), 0);
        while done < self.block_bytes {
            let len = HASHED_AT_ONCE.min(self.block_bytes - done);
            sum.add(offset.saturating_add(done), len)?;
            done += len;
            // A piece is a fraction of a millisecond of hashing; a prompt is not, and others use this thread too.
            tokio::task::yield_now().await;
        }
        Ok(sum.finish())
    }
}
