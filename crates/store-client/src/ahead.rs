//! Writing one block after the other: each into room that its node made when the one before was written, so that all it takes
//! is a single call, its commit.
//!
//! The room has no name until then. Where it turns out to be of no use (it has ended, the node was started anew, its bytes did
//! not arrive), the block goes the usual way: nothing is lost but the time it took.

use std::time::Instant;

use kvasir_proto::{convert, v1};
use kvasir_rpc::trace;
use kvasir_types::{Deadline, Epoch, SegmentDescriptor};
use tonic::Request;

use crate::{
    Error, Origin,
    placement::Share,
    read::later,
    write::{Client, Fate, New, Offer, ShareReport},
};

/// Room for one block on a node.
#[derive(Clone, Debug)]
pub(crate) struct Ahead {
    reservation: u64,
    grant: u64,
    offset: u64,
    block_bytes: u64,
    origin: Origin,
    segment: SegmentDescriptor,
    /// Until then it is worth beginning to write there.
    pub(crate) until: Deadline,
    /// And until then it can be committed.
    ends: Deadline,
}

impl Ahead {
    /// What a node told in an answer to what it was asked then.
    pub(crate) fn new(told: &v1::Ahead, origin: &Origin, segment: &SegmentDescriptor, asked: Instant) -> Self {
        let &v1::Ahead { reservation, reservation_ms, grant, offset, block_bytes } = told;
        let (until, ends) = (later(asked, reservation_ms / 2), later(asked, reservation_ms));
        let (origin, segment) = (origin.clone(), segment.clone());
        Self { reservation, grant, offset, block_bytes, origin, segment, until, ends }
    }

    /// Whether a block of that size and origin may be written there.
    pub(crate) fn fits(&self, block_bytes: u64, origin: &Origin) -> bool {
        self.block_bytes == block_bytes && self.origin == *origin
    }
}

impl Offer<'_> {
    /// Writes a share of one block into room that was made ahead. Whether that is done, and the report says what became of
    /// it; else it is to be written the usual way.
    pub(crate) async fn put_ahead(&self, share: &Share, epoch: Epoch, report: &mut ShareReport) -> Result<bool, Error> {
        let &[block] = share.blocks.as_slice() else { return Ok(false) };
        let Some(ahead) = self.inner.peers.take_ahead(&share.node, self.block_bytes, self.origin) else {
            return Ok(false);
        };
        let (asked, until) = (Instant::now(), self.deadline.min(ahead.ends));
        let new = [New { block, offset: ahead.offset }];
        let (written, failure) = self.push(share, &new, ahead.grant, &ahead.segment, until).await;
        let [sum] = written.as_slice() else {
            if let Some(error) = failure {
                tracing::debug!(member = %share.node.id, %error, "not written into room made ahead");
            }
            return Ok(false);
        };
        let commit = v1::CommitRequest {
            reservation: ahead.reservation,
            hashes: convert::bytes16(&self.blocks[block].0.0),
            checksums: convert::bytes16(&sum.checksum),
            named: Some(self.reservation(share, epoch)),
        };
        let call = async |mut client: Client| client.commit(trace::carry(Request::new(commit))).await;
        let response = self.inner.peers.call(&share.node, until, call).await?;
        if let Some(view) = &response.view {
            self.inner.newer(&share.node, view);
            report.moved.push(block);
            return Ok(true);
        }
        if let Some(next) = &response.ahead {
            self.inner.peers.keep_ahead(&share.node, Ahead::new(next, self.origin, &ahead.segment, asked));
        }
        match response.state() {
            _ if response.committed > 0 => report.fates.push((block, Fate::Written)),
            v1::slot::State::Reserved => {
                let member = share.node.id.clone();
                return Err(Error::NotCommitted { member, written: 1, committed: 0 });
            }
            v1::slot::State::Present => report.fates.push((block, Fate::Present)),
            v1::slot::State::Busy => {}
            v1::slot::State::Full | v1::slot::State::Unspecified => return Ok(false),
        }
        Ok(true)
    }
}
