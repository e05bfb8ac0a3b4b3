//! The gRPC face of a node: messages in, messages out, and a task of its own for whatever must not stop halfway.
//!
//! Most calls are a look into a table and have no await in them: they happen or they don't. `Lookup` and `Get` may wait for
//! the disk, holding nothing meanwhile. `Commit` and `Put` end a reservation, which takes a revocation or a check of bytes
//! in the middle; they run in tasks that outlive a caller who hangs up.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use kvasir_cluster::{Event, EventKind, Member, Registry};
use kvasir_kv_cache::Ask;
use kvasir_proto::{check_protocol, convert, v1};
use kvasir_rpc::{
    operator::{Desk, Operator},
    trace,
};
use kvasir_runtime::{Kind, Tasks};
use kvasir_types::{BlockHash, Epoch, MemberId};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};
use tracing::{Instrument, debug_span};

use crate::{
    error::Error,
    exchange,
    handover::{HotGroups, Leaving, Progress},
    membership::Membership,
    messages::{self, MAX_HASHES, block_bytes, hashes},
    metrics::{Call, Metrics},
    node::{Committing, MAX_PIN, Node, Offer},
    store::{BlockBytes, Checksum, Keep, LeaseId, Origin, ReservationId, SlotState, Which},
};

/// Most bytes of blocks in one answer to `Get` or one `Put`.
pub(crate) const MAX_INLINE_BYTES: usize = 8 << 20;
/// Bound on a message to the node: the largest is a `Put` of so many bytes, with hashes, checksums and their framing.
pub(crate) const MAX_REQUEST_BYTES: usize = MAX_INLINE_BYTES + 64 * MAX_HASHES + (4 << 10);
/// Longest wait for the disk.
const MAX_WAIT: Duration = Duration::from_secs(5);

/// Serves the calls of [`v1::store_server::Store`].
pub(crate) struct StoreService {
    pub(crate) id: MemberId,
    pub(crate) node: Arc<Node>,
    pub(crate) tasks: Tasks,
    pub(crate) metrics: Metrics,
    pub(crate) lease: Duration,
    pub(crate) reservation: Duration,
    pub(crate) started: Instant,
    pub(crate) membership: Membership,
    pub(crate) hot: Arc<HotGroups>,
    pub(crate) drain: Drain,
    pub(crate) desk: Desk,
}

/// How the node says that it is about to leave.
pub(crate) struct Drain {
    /// Not held: with it, the record of a node that is gone would stay.
    pub(crate) registry: Weak<dyn Registry>,
    /// Its record, as long as it stays.
    pub(crate) member: Member,
    pub(crate) progress: Arc<Progress>,
}

impl Drain {
    /// Takes no new blocks from here on. What is there is handed over once the node sees that others know.
    async fn begin(&self, who: &Operator) -> Result<(), Error> {
        let registry = self.registry.upgrade().ok_or(Error::Leaving)?;
        if self.progress.leaving() == Leaving::No {
            self.progress.set_leaving(Leaving::Draining);
            tracing::info!("draining");
            let id = &self.member.id;
            registry.note(Event::now(EventKind::Stage, id, id.as_str(), "is to be drained").by(who.to_string()));
        }
        registry.update(Member { draining: true, ..self.member.clone() }).await.map_err(Error::Registry)
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl v1::store_server::Store for StoreService {
    async fn lookup(&self, request: Request<v1::LookupRequest>) -> Answer<v1::LookupResponse> {
        let _timer = self.metrics.time(Call::Lookup);
        let span = debug_span!("lookup", blocks = blocks(&request.get_ref().hashes));
        trace::adopt(&span, request.metadata());
        Ok(Response::new(self.look_up(request.get_ref()).instrument(span).await?))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Answer<v1::ReleaseResponse> {
        let _timer = self.metrics.time(Call::Release);
        // Whether it was still open is nobody's business: the answer would be the same.
        self.node.end_leases([LeaseId(request.get_ref().lease)]);
        Ok(Response::new(v1::ReleaseResponse {}))
    }

    async fn reserve(&self, request: Request<v1::ReserveRequest>) -> Answer<v1::ReserveResponse> {
        let _timer = self.metrics.time(Call::Reserve);
        let span =
            trace::part_of(request.metadata(), || debug_span!("reserve", blocks = blocks(&request.get_ref().hashes)));
        Ok(Response::new(span.in_scope(|| self.make_room(request.get_ref()))?))
    }

    async fn commit(&self, request: Request<v1::CommitRequest>) -> Answer<v1::CommitResponse> {
        let _timer = self.metrics.time(Call::Commit);
        let span =
            trace::part_of(request.metadata(), || debug_span!("commit", blocks = blocks(&request.get_ref().hashes)));
        Ok(Response::new(self.make_visible(request.get_ref()).instrument(span).await?))
    }

    async fn used(&self, request: Request<v1::UsedRequest>) -> Answer<v1::UsedResponse> {
        let _timer = self.metrics.time(Call::Used);
        Ok(Response::new(self.count_used(request.get_ref())?))
    }

    async fn exists(&self, request: Request<v1::ExistsRequest>) -> Answer<v1::ExistsResponse> {
        let _timer = self.metrics.time(Call::Exists);
        let request = request.get_ref();
        check_protocol(request.protocol_version).map_err(Error::from)?;
        let (size, hashes) = (block_bytes(request.block_bytes)?, hashes(&request.hashes)?);
        let there = self.node.exists(size, &hashes);
        let tiers = there.iter().map(|&[memory, disk]| u8::from(memory) | u8::from(disk) << 1);
        let index = self.index(request.index);
        Ok(Response::new(v1::ExistsResponse { tiers: tiers.collect::<Vec<u8>>().into(), index }))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Answer<v1::GetResponse> {
        let _timer = self.metrics.time(Call::Get);
        Ok(Response::new(self.read_out(request.get_ref()).await?))
    }

    async fn put(&self, request: Request<v1::PutRequest>) -> Answer<v1::PutResponse> {
        let _timer = self.metrics.time(Call::Put);
        let span =
            trace::part_of(request.metadata(), || debug_span!("put", blocks = blocks(&request.get_ref().hashes)));
        Ok(Response::new(self.take_in(request.get_ref()).instrument(span).await?))
    }

    async fn report(&self, request: Request<v1::ReportRequest>) -> Answer<v1::ReportResponse> {
        let _timer = self.metrics.time(Call::Report);
        let request = request.get_ref();
        let (size, hashes) = (block_bytes(request.block_bytes)?, hashes(&request.hashes)?);
        self.node.end_leases(request.ended.iter().take(MAX_HASHES).map(|&lease| LeaseId(lease)));
        let dropped = self.node.report(size, &hashes).await?;
        Ok(Response::new(v1::ReportResponse { dropped: dropped as u32 }))
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Answer<v1::PinResponse> {
        let _timer = self.metrics.time(Call::Pin);
        let what = |asked: &v1::PinRequest| {
            let kept = if asked.keep() == v1::pin_request::Keep::Cached { "unpin" } else { "pin" };
            format!("{kept} {} blocks", asked.hashes.len() / 16)
        };
        let act = |asked: v1::PinRequest, _| async move { Ok(self.keep(&asked).await?) };
        self.desk.call(request, self.id.as_str(), what, act).await
    }

    async fn evict(&self, request: Request<v1::EvictRequest>) -> Answer<v1::EvictResponse> {
        let _timer = self.metrics.time(Call::Evict);
        let what = |asked: &v1::EvictRequest| match (&asked.tenant, asked.all) {
            (_, true) => "evict all blocks".to_owned(),
            (Some(tenant), _) => format!("evict the blocks of tenant {tenant:?}"),
            _ if !asked.model.is_empty() => "evict the blocks of a model".to_owned(),
            _ if !asked.after.is_empty() => format!("evict what follows {} blocks", asked.after.len()),
            _ => format!("evict {} blocks", asked.hashes.len() / 16),
        };
        let act = |asked: v1::EvictRequest, _| async move { Ok(self.give_up(&asked).await?) };
        self.desk.call(request, self.id.as_str(), what, act).await
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Answer<v1::DrainResponse> {
        let _timer = self.metrics.time(Call::Drain);
        let act = |_, who: Operator| async move {
            self.drain.begin(&who).await?;
            Ok(v1::DrainResponse {})
        };
        self.desk.call(request, self.id.as_str(), |_| "drain".to_owned(), act).await
    }

    async fn learned(&self, request: Request<v1::LearnedRequest>) -> Answer<v1::LearnedResponse> {
        let _timer = self.metrics.time(Call::Learned);
        check_protocol(request.get_ref().protocol_version).map_err(Error::from)?;
        Ok(Response::new(exchange::told(&self.node)))
    }

    async fn store_status(&self, _request: Request<v1::StoreStatusRequest>) -> Answer<v1::StoreStatusResponse> {
        let (status, progress) = (messages::status(&self.id, &self.node, self.started), &self.drain.progress);
        Ok(Response::new(v1::StoreStatusResponse {
            leaving: progress.leaving().name().to_owned(),
            handed_over_blocks_total: progress.blocks(),
            not_handed_over_blocks: progress.refused(),
            handover_groups_left: progress.groups_left(),
            hot_groups: self.hot.count() as u64,
            ..status
        }))
    }
}

/// How many a message names.
fn blocks(hashes: &[u8]) -> usize {
    hashes.len() / size_of::<BlockHash>()
}

impl StoreService {
    async fn look_up(&self, request: &v1::LookupRequest) -> Result<v1::LookupResponse, Error> {
        check_protocol(request.protocol_version)?;
        let (size, hashes) = (block_bytes(request.block_bytes)?, hashes(&request.hashes)?);
        self.end(&request.ended)?;
        let (found, coming) = self.node.lookup(size, &hashes, request.prompt_blocks, until(request.wait_ms)).await?;
        let blocks = found.as_ref().map_or(0, |found| found.blocks.len());
        let known = self.node.known(size, &hashes, blocks);
        tracing::debug!(request_id = request.request_id, asked = hashes.len(), found = blocks, coming, "lookup");
        let rest = v1::LookupResponse {
            coming: coming as u32,
            known: known as u32,
            hot: found.as_ref().map_or_else(Vec::new, |found| {
                self.hot.seen(found.blocks.iter().map(|block| block.group).filter(|&group| group != 0), Instant::now())
            }),
            view: self.membership.newer_than(Epoch(request.epoch)),
            warming: self.membership.warming(Instant::now()),
            index: self.index(request.index),
            ..Default::default()
        };
        let Some(found) = found else { return Ok(rest) };
        Ok(v1::LookupResponse {
            offsets: found.blocks.iter().map(|block| block.offset).collect(),
            checksums: convert::pack16(found.blocks.iter().map(|block| &block.checksum)),
            segment: Some((&self.node.engine().descriptor()).into()),
            grant: self.node.reading().0,
            lease: found.lease.0,
            lease_ms: self.lease.as_millis() as u64,
            ..rest
        })
    }

    /// Where the published index is, for a caller who wants to know.
    fn index(&self, wanted: bool) -> Option<v1::PublishedIndex> {
        let there = self.node.published().filter(|_| wanted)?;
        Some(v1::PublishedIndex {
            segment: Some((&self.node.engine().descriptor()).into()),
            grant: self.node.reading().0,
            offset: there.offset,
            sets: there.shape.sets,
            seed: there.shape.seed,
        })
    }

    fn count_used(&self, request: &v1::UsedRequest) -> Result<v1::UsedResponse, Error> {
        check_protocol(request.protocol_version)?;
        let mut runs = Vec::with_capacity(request.runs.len().min(MAX_HASHES));
        let mut blocks = 0;
        for run in &request.runs {
            let hashes = hashes(&run.hashes)?;
            blocks += hashes.len().max(1);
            if blocks > MAX_HASHES {
                return Err(kvasir_proto::Error::TooMany { field: "runs", got: blocks, limit: MAX_HASHES }.into());
            }
            runs.push((block_bytes(run.block_bytes)?, hashes, run.prompt_blocks));
        }
        let mut hot = Vec::new();
        for (size, hashes, prompt_blocks) in runs {
            let groups = self.node.used(size, &hashes, prompt_blocks);
            hot.extend(self.hot.seen(groups.into_iter().filter(|&group| group != 0), Instant::now()));
        }
        Ok(v1::UsedResponse { hot })
    }

    /// Leases that a caller gives back along with what it wants.
    fn end(&self, leases: &[u64]) -> Result<(), Error> {
        if leases.len() > MAX_HASHES {
            return Err(kvasir_proto::Error::TooMany { field: "ended", got: leases.len(), limit: MAX_HASHES }.into());
        }
        self.node.end_leases(leases.iter().map(|&lease| LeaseId(lease)));
        Ok(())
    }

    fn make_room(&self, request: &v1::ReserveRequest) -> Result<v1::ReserveResponse, Error> {
        check_protocol(request.protocol_version)?;
        let (size, hashes) = (block_bytes(request.block_bytes)?, hashes(&request.hashes)?);
        self.end(&request.ended)?;
        if let Some(view) = self.membership.newer_than(Epoch(request.epoch)) {
            // Written here, others might not look for it here.
            return Ok(v1::ReserveResponse { view: Some(view), ..Default::default() });
        }
        let facts = messages::facts(&request.runs, &hashes)?;
        let origin = messages::origin(&request.model, &request.tenant)?;
        let prompt = Ask { found: request.prompt_known, blocks: request.prompt_blocks };
        let offer = Offer { size, hashes: &hashes, facts: &facts, origin: &origin, prompt };
        let (reserved, key) = self.node.reserve(Instant::now(), &offer)?;
        let ahead = self.ahead(request.ahead && key.is_some(), size, &origin);
        Ok(v1::ReserveResponse {
            slots: reserved.slots.iter().map(messages::slot).collect(),
            segment: key.map(|_| (&self.node.engine().descriptor()).into()),
            grant: key.map_or(0, |key| key.0),
            reservation: reserved.reservation.map_or(0, |id| id.0),
            reservation_ms: self.reservation.as_millis() as u64,
            ahead,
            view: None,
        })
    }

    async fn make_visible(&self, request: &v1::CommitRequest) -> Result<v1::CommitResponse, Error> {
        let (id, named) = (ReservationId(request.reservation), messages::named(&request.hashes, &request.checksums)?);
        if let Some(offered) = &request.named {
            return self.make_visible_as(id, offered, named).await;
        }
        let committed = match self.node.close_reservation(id) {
            Some(committing) => self.finish(committing, named).await?,
            // A repeated commit, or one that comes too late: what counts is what is there.
            None => self.node.count_present(&named),
        };
        Ok(v1::CommitResponse { committed: committed as u32, ..Default::default() })
    }

    /// The same for a reservation that was made ahead: its block gets its name now.
    async fn make_visible_as(
        &self,
        id: ReservationId,
        offered: &v1::ReserveRequest,
        named: HashMap<BlockHash, Checksum>,
    ) -> Result<v1::CommitResponse, Error> {
        check_protocol(offered.protocol_version)?;
        let (size, hashes) = (block_bytes(offered.block_bytes)?, hashes(&offered.hashes)?);
        if hashes.len() != 1 {
            return Err(Error::Count { field: "named", got: hashes.len(), blocks: 1 });
        }
        self.end(&offered.ended)?;
        if let Some(view) = self.membership.newer_than(Epoch(offered.epoch)) {
            // Its slot ends by itself.
            return Ok(v1::CommitResponse { view: Some(view), ..Default::default() });
        }
        let facts = messages::facts(&offered.runs, &hashes)?;
        let origin = messages::origin(&offered.model, &offered.tenant)?;
        let prompt = Ask { found: offered.prompt_known, blocks: offered.prompt_blocks };
        let offer = Offer { size, hashes: &hashes, facts: &facts, origin: &origin, prompt };
        let Some((state, committing)) = self.node.close_ahead(id, &offer) else {
            let committed = self.node.count_present(&named) as u32;
            return Ok(v1::CommitResponse { committed, ..Default::default() });
        };
        let committed = self.finish(committing, named).await?;
        // Whose block is there already may well have more of them.
        let ahead = self.ahead(offered.ahead && committed > 0, size, &origin);
        let state = messages::slot(&state).state;
        Ok(v1::CommitResponse { committed: committed as u32, state, ahead, view: None })
    }

    /// Room for the block that a writer may write next, if it says so.
    fn ahead(&self, wanted: bool, size: BlockBytes, origin: &Origin) -> Option<v1::Ahead> {
        if !wanted || self.drain.progress.leaving() != Leaving::No {
            return None;
        }
        let (ahead, key) = self.node.reserve_ahead(Instant::now(), size, origin)?;
        Some(messages::ahead(&ahead, key))
    }

    /// Ends a reservation in a task of its own. How many blocks became visible.
    async fn finish(&self, committing: Committing, named: HashMap<BlockHash, Checksum>) -> Result<usize, Error> {
        let (node, (tell, told)) = (self.node.clone(), oneshot::channel());
        self.tasks.spawn(Kind::Request, "commit", async move {
            let (committed, unverified) = node.commit(committing, named).await;
            // The caller may be gone; the commit counts all the same.
            let _ = tell.send(committed);
            if let Some(unverified) = unverified {
                node.verify(unverified).await;
            }
            Ok(())
        });
        told.await.map_err(|_| Error::Leaving)
    }

    async fn read_out(&self, request: &v1::GetRequest) -> Result<v1::GetResponse, Error> {
        check_protocol(request.protocol_version)?;
        let (size, hashes) = (block_bytes(request.block_bytes)?, hashes(&request.hashes)?);
        let fit = (MAX_INLINE_BYTES as u64 / size.0) as usize;
        if fit == 0 {
            return Err(Error::TooLarge { bytes: size.0, limit: MAX_INLINE_BYTES as u64 });
        }
        let wanted = &hashes[..hashes.len().min(fit)];
        let (found, _) = self.node.lookup(size, wanted, 0, until(request.wait_ms)).await?;
        let Some(found) = found else { return Ok(v1::GetResponse::default()) };
        let read = |offset| {
            let mut bytes = vec![0; size.0 as usize];
            self.node.engine().read_bytes(offset, &mut bytes).map(|()| bytes.into())
        };
        let blocks = found.blocks.iter().map(|block| read(block.offset)).collect::<Result<_, _>>();
        self.node.end_leases([found.lease]);
        let checksums = convert::pack16(found.blocks.iter().map(|block| &block.checksum));
        Ok(v1::GetResponse { blocks: blocks.map_err(Error::Grant)?, checksums })
    }

    async fn take_in(&self, request: &v1::PutRequest) -> Result<v1::PutResponse, Error> {
        check_protocol(request.protocol_version)?;
        self.end(&request.ended)?;
        if let Some(view) = self.membership.newer_than(Epoch(request.epoch)) {
            return Ok(v1::PutResponse { view: Some(view), ..Default::default() });
        }
        let Some(first) = request.blocks.first() else { return Ok(v1::PutResponse::default()) };
        let (size, hashes) = (block_bytes(first.len() as u64)?, hashes(&request.hashes)?);
        let named = messages::named(&request.hashes, &request.checksums)?;
        if request.blocks.len() != hashes.len() {
            return Err(Error::Count { field: "blocks", got: request.blocks.len(), blocks: hashes.len() });
        }
        if request.blocks.iter().any(|block| block.len() as u64 != size.0) {
            return Err(kvasir_proto::Error::Range {
                field: "blocks",
                got: "blocks of several sizes".to_owned(),
                allowed: "blocks of one size",
            }
            .into());
        }
        let facts = messages::facts(&request.runs, &hashes)?;
        let origin = messages::origin(&request.model, &request.tenant)?;
        let prompt = Ask { found: request.prompt_known, blocks: request.prompt_blocks };
        let offer = Offer { size, hashes: &hashes, facts: &facts, origin: &origin, prompt };
        let (committing, slots) = self.node.reserve_and_fill(Instant::now(), &offer, &request.blocks)?;
        let committed = match committing {
            Some(committing) => self.finish(committing, named).await?,
            None => 0,
        };
        let present = slots.iter().filter(|&&slot| slot == SlotState::Present).count() as u32;
        let states = slots.iter().map(|slot| messages::slot(slot).state).collect();
        Ok(v1::PutResponse { committed: committed as u32, present, states, view: None })
    }

    async fn keep(&self, request: &v1::PinRequest) -> Result<v1::PinResponse, Error> {
        check_protocol(request.protocol_version)?;
        let (size, hashes) = (block_bytes(request.block_bytes)?, hashes(&request.hashes)?);
        let keep = match request.keep() {
            v1::pin_request::Keep::Cached => Keep::Cached,
            v1::pin_request::Keep::Soft => Keep::Soft,
            v1::pin_request::Keep::Hard => Keep::Hard,
            v1::pin_request::Keep::Unspecified => return Err(kvasir_proto::Error::Missing("keep").into()),
        };
        if keep == Keep::Hard {
            // Only memory keeps a promise.
            let (found, _) = self.node.lookup(size, &hashes, 0, Instant::now() + MAX_WAIT).await?;
            self.node.end_leases(found.map(|found| found.lease));
        }
        let until = Instant::now() + Duration::from_millis(request.ttl_ms).min(MAX_PIN);
        Ok(v1::PinResponse { blocks: self.node.keep(size, &hashes, keep, until) as u32 })
    }

    async fn give_up(&self, request: &v1::EvictRequest) -> Result<v1::EvictResponse, Error> {
        check_protocol(request.protocol_version)?;
        if !request.hashes.is_empty() {
            let (size, hashes) = (block_bytes(request.block_bytes)?, hashes(&request.hashes)?);
            let sift = self.node.evict_these(size, &hashes).await;
            let gone = hashes.iter().map(|&hash| crate::store::tag(hash)).collect();
            return Ok(v1::EvictResponse { evicted: sift.evicted, in_use: sift.in_use, gone });
        }
        let (model, tenant) = (&request.model, &request.tenant);
        let which = if !request.after.is_empty() {
            Which::After(request.after.iter().copied().collect())
        } else if !model.is_empty() || tenant.is_some() {
            let model = (!model.is_empty()).then(|| convert::fingerprint(model)).transpose()?.map(|model| model.0);
            let tenant = tenant.as_deref().map(convert::tenant).transpose()?.map(str::to_owned);
            Which::Of { model, tenant }
        } else if request.all {
            Which::All
        } else {
            return Err(kvasir_proto::Error::Missing("hashes, after, model, tenant or all").into());
        };
        let (evicted, in_use, gone) = self.node.evict(&which).await;
        Ok(v1::EvictResponse { evicted, in_use, gone })
    }
}

/// When a wait of so many milliseconds is over: bounded, the number comes from outside.
fn until(wait_ms: u32) -> Instant {
    Instant::now() + Duration::from_millis(wait_ms.into()).min(MAX_WAIT)
}
