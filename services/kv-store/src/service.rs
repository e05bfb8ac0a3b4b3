//! The gRPC face of a node: messages in, messages out, and a task of its own for whatever must not stop halfway.
//!
//! `Lookup` and `Reserve` have no await in them: they happen or they don't. `Commit` and `Release` end a hold, which takes
//! a revocation in the middle; they run in tasks that outlive a caller who hangs up.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_proto::{check_protocol, convert, v1};
use kvasir_runtime::{Kind, Tasks};
use kvasir_types::{BlockHash, MemberId, PROTOCOL_VERSION};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use crate::{
    error::Error,
    metrics::{Call, Metrics},
    node::Node,
    store::{BlockBytes, Checksum, LeaseId, ReservationId, SlotState},
};

/// Most blocks in one call, as the protocol has it.
pub(crate) const MAX_HASHES: usize = 1024;
/// Bound on a message to the node: the largest is a commit of so many blocks, two times 16 bytes each and their framing.
pub(crate) const MAX_REQUEST_BYTES: usize = 64 * MAX_HASHES + (4 << 10);

/// Serves the calls of [`v1::store_server::Store`].
pub(crate) struct StoreService {
    pub(crate) id: MemberId,
    pub(crate) node: Arc<Node>,
    pub(crate) tasks: Tasks,
    pub(crate) metrics: Metrics,
    pub(crate) lease: Duration,
    pub(crate) reservation: Duration,
    pub(crate) started: Instant,
}

#[tonic::async_trait]
impl v1::store_server::Store for StoreService {
    async fn lookup(&self, request: Request<v1::LookupRequest>) -> Result<Response<v1::LookupResponse>, Status> {
        let _timer = self.metrics.time(Call::Lookup);
        let request = request.get_ref();
        request.ended.iter().take(MAX_HASHES).for_each(|&lease| self.end_lease(lease));
        Ok(Response::new(self.look_up(request)?))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        let _timer = self.metrics.time(Call::Release);
        self.end_lease(request.get_ref().lease);
        Ok(Response::new(v1::ReleaseResponse {}))
    }

    async fn reserve(&self, request: Request<v1::ReserveRequest>) -> Result<Response<v1::ReserveResponse>, Status> {
        let _timer = self.metrics.time(Call::Reserve);
        Ok(Response::new(self.make_room(request.get_ref())?))
    }

    async fn commit(&self, request: Request<v1::CommitRequest>) -> Result<Response<v1::CommitResponse>, Status> {
        let _timer = self.metrics.time(Call::Commit);
        let request = request.get_ref();
        let named = named(request)?;
        let committed = match self.node.close_reservation(ReservationId(request.reservation)) {
            Some(committing) => {
                let (node, (tell, told)) = (self.node.clone(), oneshot::channel());
                self.tasks.spawn(Kind::Request, "commit", async move {
                    // The caller may be gone; the commit counts all the same.
                    let _ = tell.send(node.commit(committing, named).await);
                    Ok(())
                });
                told.await.map_err(|_| Error::Leaving)?
            }
            // A repeated commit, or one that comes too late: what counts is what is there.
            None => self.node.count_present(&named),
        };
        Ok(Response::new(v1::CommitResponse { committed: committed as u32 }))
    }

    async fn exists(&self, request: Request<v1::ExistsRequest>) -> Result<Response<v1::ExistsResponse>, Status> {
        let _timer = self.metrics.time(Call::Exists);
        let request = request.get_ref();
        check_protocol(request.protocol_version).map_err(Error::from)?;
        let (size, hashes) = (block_bytes(request.block_bytes)?, hashes(&request.hashes).map_err(Error::from)?);
        let there = self.node.exists(size, &hashes);
        let tiers = there.iter().map(|&[memory, disk]| u8::from(memory) | u8::from(disk) << 1);
        Ok(Response::new(v1::ExistsResponse { tiers: tiers.collect::<Vec<u8>>().into() }))
    }

    async fn store_status(
        &self,
        _request: Request<v1::StoreStatusRequest>,
    ) -> Result<Response<v1::StoreStatusResponse>, Status> {
        let (usage, (totals, _)) = (self.node.usage(), self.node.totals());
        Ok(Response::new(v1::StoreStatusResponse {
            member: self.id.to_string(),
            incarnation: self.node.engine().descriptor().incarnation.0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol_version: PROTOCOL_VERSION,
            capacity_bytes: usage.capacity_bytes,
            used_bytes: usage.used_bytes,
            blocks: usage.blocks,
            pinned: usage.pinned,
            reserved: usage.reserved,
            lookups_total: totals.lookups,
            hit_blocks_total: totals.hit_blocks,
            committed_blocks_total: totals.committed_blocks,
            evicted_blocks_total: totals.evicted_blocks,
            uptime_ms: self.started.elapsed().as_millis() as u64,
        }))
    }
}

impl StoreService {
    /// Whether it was still open is nobody's business: the answer would be the same.
    fn end_lease(&self, lease: u64) {
        if let Some(closed) = self.node.close_lease(LeaseId(lease)) {
            let node = self.node.clone();
            self.tasks.spawn(Kind::Request, "release", async move {
                node.end_lease(closed).await;
                Ok(())
            });
        }
    }

    fn look_up(&self, request: &v1::LookupRequest) -> Result<v1::LookupResponse, Error> {
        check_protocol(request.protocol_version)?;
        let (size, hashes) = (block_bytes(request.block_bytes)?, hashes(&request.hashes)?);
        let found = self.node.lookup(Instant::now(), size, &hashes)?;
        let asked = hashes.len();
        tracing::debug!(
            request_id = request.request_id,
            asked,
            found = found.as_ref().map_or(0, |(f, _)| f.blocks.len()),
            "lookup"
        );
        let Some((found, key)) = found else { return Ok(v1::LookupResponse::default()) };
        Ok(v1::LookupResponse {
            offsets: found.blocks.iter().map(|block| block.offset).collect(),
            checksums: convert::pack16(found.blocks.iter().map(|block| &block.checksum)),
            segment: Some((&self.node.engine().descriptor()).into()),
            grant: key.0,
            lease: found.lease.0,
            lease_ms: self.lease.as_millis() as u64,
        })
    }

    fn make_room(&self, request: &v1::ReserveRequest) -> Result<v1::ReserveResponse, Error> {
        check_protocol(request.protocol_version)?;
        let (size, hashes) = (block_bytes(request.block_bytes)?, hashes(&request.hashes)?);
        let (reserved, key) = self.node.reserve(Instant::now(), size, &hashes)?;
        let slots = reserved.slots.iter().map(|slot| match *slot {
            SlotState::Reserved { offset } => (v1::slot::State::Reserved, offset),
            SlotState::Present => (v1::slot::State::Present, 0),
            SlotState::Busy => (v1::slot::State::Busy, 0),
            SlotState::Full => (v1::slot::State::Full, 0),
        });
        Ok(v1::ReserveResponse {
            slots: slots.map(|(state, offset)| v1::Slot { state: state.into(), offset }).collect(),
            segment: key.map(|_| (&self.node.engine().descriptor()).into()),
            grant: key.map_or(0, |key| key.0),
            reservation: reserved.reservation.map_or(0, |id| id.0),
            reservation_ms: self.reservation.as_millis() as u64,
        })
    }
}

fn block_bytes(wire: u64) -> Result<BlockBytes, Error> {
    if wire == 0 { Err(kvasir_proto::Error::Missing("block_bytes").into()) } else { Ok(BlockBytes(wire)) }
}

fn hashes(wire: &[u8]) -> Result<Vec<BlockHash>, kvasir_proto::Error> {
    convert::block_hashes(wire, MAX_HASHES)
}

/// Blocks and their checksums, as a commit names them.
fn named(request: &v1::CommitRequest) -> Result<HashMap<BlockHash, Checksum>, Error> {
    let (hashes, sums) = (hashes(&request.hashes)?, convert::checksums(&request.checksums, MAX_HASHES)?);
    if hashes.len() != sums.len() {
        return Err(Error::Count { field: "checksums", got: sums.len(), blocks: hashes.len() });
    }
    Ok(hashes.into_iter().zip(sums).collect())
}
