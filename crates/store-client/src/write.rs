//! Writing: reserve at every node what is new to it, write that one-sided, commit what arrived.
//!
//! Nodes are served side by side; on each it is three steps in a row, for a part of the blocks at a time, so that the node
//! verifies one part while the next is written. The checksums are computed while the bytes move. A commit names only blocks
//! whose batch was acknowledged; what it does not name, the node takes back.

use std::time::Instant;

use futures_util::{
    StreamExt,
    future::{join, join_all},
    stream,
};
use kvasir_proto::{convert, v1};
use kvasir_transfer::{Batch, Op, Priority, Range};
use kvasir_types::{BlockHash, Deadline, PROTOCOL_VERSION, RequestId, SegmentDescriptor};

use tokio::sync::Mutex;

use crate::{Error, Inner, MAX_CALLS, Origin, in_flight::InFlight, placement::Share, read::later};

/// Bytes that are reserved and committed as one.
const PART_BYTES: u64 = 8 << 20;

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

type Client = v1::store_client::StoreClient<tonic::transport::Channel>;

/// A block that was written: which of the request's blocks, and what its bytes are.
struct Sum {
    block: usize,
    checksum: [u8; 16],
}

/// A block to write: which of the request's blocks, and where to.
#[derive(Clone, Copy)]
struct New {
    block: usize,
    offset: u64,
}

pub(crate) async fn write(
    inner: &Inner,
    request: &RequestId,
    origin: &Origin,
    blocks: &[(BlockHash, u64)],
    block_bytes: u64,
    deadline: Deadline,
) -> WriteReport {
    let offer = Offer { inner, request, origin, blocks, block_bytes, deadline, hashing: Mutex::new(()) };
    let most = usize::try_from(PART_BYTES / block_bytes.max(1)).unwrap_or(usize::MAX).max(1);
    let parts = inner.shares(blocks, 0).into_iter().flat_map(|share| parts(share, most));
    let mut reports = stream::iter(parts.map(|part| offer.write_share(part))).buffer_unordered(MAX_CALLS);
    let mut total = WriteReport::default();
    while let Some(report) = reports.next().await {
        total.written += report.written;
        total.present += report.present;
        total.error = total.error.or(report.error);
    }
    total.skipped = blocks.len() - total.written - total.present;
    total.bytes = total.written as u64 * block_bytes;
    total
}

/// A share in parts of so many blocks.
fn parts(share: Share, most: usize) -> Vec<Share> {
    share.blocks.chunks(most).map(|part| Share { blocks: part.to_vec(), ..share.clone() }).collect()
}

/// What all shares of one write have in common.
struct Offer<'a> {
    inner: &'a Inner,
    request: &'a RequestId,
    origin: &'a Origin,
    blocks: &'a [(BlockHash, u64)],
    block_bytes: u64,
    deadline: Deadline,
    /// Held while checksums are computed: all of them together take a core at most, and the first part is to be ready first.
    hashing: Mutex<()>,
}

impl Offer<'_> {
    async fn write_share(&self, share: Share) -> WriteReport {
        let mut report = WriteReport::default();
        match self.try_share(&share, &mut report).await {
            Ok(()) => {}
            Err(error) => report.error = report.error.or(Some(error)),
        }
        report
    }

    async fn try_share(&self, share: &Share, report: &mut WriteReport) -> Result<(), Error> {
        let asked = Instant::now();
        let response = self.reserve(share).await?;
        let member = || share.node.id.clone();
        if response.slots.len() != share.blocks.len() {
            return Err(Error::Count { member: member(), asked: share.blocks.len(), got: response.slots.len() });
        }
        let mut new = Vec::new();
        for (slot, &block) in response.slots.iter().zip(&share.blocks) {
            match slot.state() {
                v1::slot::State::Reserved => new.push(New { block, offset: slot.offset }),
                v1::slot::State::Present => report.present += 1,
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
        let (written, failure) = self.push(share, &new, &response, &segment, until).await;
        report.error = failure;
        let offered = written.len();
        let commit = v1::CommitRequest {
            reservation: response.reservation,
            hashes: convert::pack16(written.iter().map(|sum| &self.blocks[sum.block].0.0)),
            checksums: convert::pack16(written.iter().map(|sum| &sum.checksum)),
        };
        // Also with nothing to commit: it gives the room back at once.
        let call = async |mut client: Client| client.commit(commit).await;
        let committed = self.inner.peers.call(&share.node, until, call).await?.committed as usize;
        report.written = committed.min(offered);
        if committed < offered {
            return Err(Error::NotCommitted { member: member(), written: offered, committed });
        }
        Ok(())
    }

    async fn reserve(&self, share: &Share) -> Result<v1::ReserveResponse, Error> {
        let message = v1::ReserveRequest {
            protocol_version: PROTOCOL_VERSION,
            request_id: self.request.to_string(),
            hashes: convert::pack16(share.blocks.iter().map(|&block| &self.blocks[block].0.0)),
            block_bytes: self.block_bytes,
            positions: share.blocks.iter().map(|&block| u32::try_from(block).unwrap_or(u32::MAX)).collect(),
            model: self.origin.model.map_or_else(Default::default, |model| convert::bytes16(&model.0)),
            tenant: self.origin.tenant.clone(),
        };
        let call = async |mut client: Client| client.reserve(message).await;
        self.inner.peers.call(&share.node, self.deadline, call).await
    }

    /// Writes the new blocks, a batch for each group, and computes their checksums meanwhile. What to commit.
    async fn push(
        &self,
        share: &Share,
        new: &[New],
        reserved: &v1::ReserveResponse,
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
                grant: convert::grant_key(reserved.grant),
                ranges: part.iter().map(range).collect(),
                deadline: until,
                priority: Priority::Low,
                notice: None,
            };
            pieces.push((part, InFlight::new(self.inner.engine.submit(batch))));
        }
        let pieces = pieces.into_iter().map(|(part, transfer)| async move {
            let (moved, sums) = join(transfer, self.checksums(part)).await;
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

    async fn checksums(&self, part: &[New]) -> Result<Vec<Sum>, Error> {
        let _turn = self.hashing.lock().await;
        let mut sums = Vec::with_capacity(part.len());
        for new in part {
            let offset = self.blocks[new.block].1;
            let checksum = self.inner.engine.checksum(offset, self.block_bytes).map_err(Error::Local)?;
            sums.push(Sum { block: new.block, checksum });
            // A block is a millisecond of hashing at most; a prompt is not, and others use this thread too.
            tokio::task::yield_now().await;
        }
        Ok(sums)
    }
}
