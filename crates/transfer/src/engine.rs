//! The engine: one segment, its grants, its transports and its threads, behind one handle.
//!
//! Threads, all named, all joined by shutdown: `transfer-timer` (deadlines, fences), `transfer-copy` (copies within the
//! process and the host), `transfer-accept` and a `transfer-serve` for each connection of a peer, a `transfer-send` for
//! each lane to a peer and a `transfer-recv` for each connection on one, `transfer-shm` and `transfer-ucx` for the
//! transports of these names.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use kvasir_types::{GrantKey, HostMemory, SegmentDescriptor, TransportKind};

use crate::{
    batch::{Batch, BatchState, Op, Priority, Setting, Transfer},
    builder::Builder,
    checksum::Checksum,
    choice::{Circumstances, Slot, Way, choose},
    config::Config,
    copier::Copier,
    error::Error,
    gate::{Gate, Launch},
    grant::{Access, Grant, GrantRange},
    local::LocalNet,
    memory::{Allocation, Memory},
    notice::{MAX_NOTICE_BYTES, Notices},
    owner::{Owner, random_u64},
    peers::{Peer, PeerStats, Peers},
    plan::Plan,
    segment::{Directory, Segment},
    space::{Mapped, Snapshot, Unregister, Use},
    stats::Stats,
    threads::Threads,
    timer::Timer,
    transfers::Transfers,
};

/// Most ranges in one batch or grant: bounds what a caller's mistake can cost.
const MAX_RANGES: usize = 1 << 20;

/// Moves bytes between this process's registered memory and that of its peers.
///
/// A handle: clones share the engine, and dropping the last one shuts it down. Grants and transfers may outlive it.
#[derive(Clone)]
pub struct TransferEngine(Arc<Running>);

pub(crate) struct Running {
    pub(crate) config: Config,
    pub(crate) owner: Arc<Owner>,
    pub(crate) transports: Vec<Slot>,
    pub(crate) peers: Peers,
    pub(crate) local: LocalNet,
    pub(crate) rdma: bool,
    pub(crate) directory: Option<Arc<dyn Directory>>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) copier: Copier<Priority>,
    pub(crate) timer: Timer,
    pub(crate) threads: Arc<Threads>,
    pub(crate) stopped: AtomicBool,
}

/// Registered memory. It stays registered when this is dropped; [`Region::unregister`] ends it.
pub struct Region {
    mapped: Arc<Mapped>,
    engine: TransferEngine,
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("base", &self.mapped.base).field("len", &self.mapped.len).finish()
    }
}

impl Region {
    /// Offset of its first byte in the engine's segment: what batches, grants and peers name.
    pub fn base(&self) -> u64 {
        self.mapped.base
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.mapped.len
    }

    /// Never: a region holds at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The memory itself. It stays mapped while anybody holds it, also after it was unregistered.
    pub fn memory(&self) -> Arc<dyn HostMemory> {
        self.mapped.memory()
    }

    /// Takes it out of the segment: from now on no batch and no grant can name it, and grants over it are revoked. The
    /// future resolves when batches in progress have ended and peers are fenced off.
    pub fn unregister(self) -> Unregister {
        let owner = &self.engine.0.owner;
        owner.space.remove(self.mapped.base);
        owner.grants.close_over(self.mapped.base);
        Unregister(self.mapped)
    }
}

impl fmt::Debug for TransferEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TransferEngine").field(&self.descriptor()).finish()
    }
}

impl TransferEngine {
    /// Begins to make one.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// An engine with an arena of `capacity_bytes`, reachable in `local`: [`Builder`] in short.
    ///
    /// # Errors
    /// Those of [`Builder::build`].
    pub fn new(config: Config, local: LocalNet, capacity_bytes: usize) -> Result<Self, Error> {
        Self::builder().config(config).local_net(local).arena(Allocation::new(capacity_bytes)).build()
    }

    pub(crate) fn from_running(running: Running) -> Self {
        Self(Arc::new(running))
    }

    /// Registers memory: it gets a place in this engine's segment.
    ///
    /// ```
    /// use kvasir_transfer::{Access, Allocation, GrantRange, HugePages, Memory, TransferEngine};
    ///
    /// # fn main() -> Result<(), kvasir_transfer::Error> {
    /// let engine = TransferEngine::builder().name("decode-0").build()?;
    /// let blocks = Allocation { huge_pages: HugePages::Try, ..Allocation::new(1 << 20) };
    /// let region = engine.register(Memory::Allocate(blocks))?;
    /// let range = GrantRange { offset: region.base(), len: 4096, access: Access::Read };
    /// let grant = engine.grant(vec![range])?; // its key opens these 4096 bytes to a peer
    /// region.unregister().wait(); // ends the grant, too, and waits for who is using it
    /// # drop(grant);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// Memory that can't be had, or the engine is shut down.
    pub fn register(&self, memory: Memory) -> Result<Region, Error> {
        self.check_running()?;
        let mapped = self.0.owner.space.add(memory.realize()?)?;
        if mapped.backing.is_none() {
            // What peers of this host can't map they may want to reach by ucx.
            let ucx = self.0.transports.iter().find(|slot| slot.kind == TransportKind::Ucx);
            if let Some(Err(reason)) = ucx.map(|slot| self.0.started(slot)) {
                tracing::debug!(reason, "memory that can't be mapped goes by sockets");
            }
        }
        Ok(Region { mapped, engine: self.clone() })
    }

    /// The memory at offset 0: the arena it was built with. It stays mapped while anybody holds it, also after shutdown.
    ///
    /// # Panics
    /// If it was built without an arena and none was registered.
    pub fn memory(&self) -> Arc<dyn HostMemory> {
        self.0.owner.space.find(0, 0).expect("an engine built with an arena").memory()
    }

    /// What peers need to reach it: publish it. It changes when memory is registered or unregistered.
    pub fn descriptor(&self) -> SegmentDescriptor {
        let Owner { name, segment, incarnation, space, .. } = &*self.0.owner;
        // In one order whatever our own preference: a peer for which the first works should see it first.
        let mut transports: Vec<_> =
            self.0.transports.iter().filter_map(Slot::started).flat_map(|transport| transport.addresses()).collect();
        transports.sort_by_key(|address| address.kind);
        let regions = space.snapshot();
        SegmentDescriptor {
            name: name.clone(),
            segment: *segment,
            incarnation: *incarnation,
            len: regions.end(),
            regions: regions.infos(),
            transports,
        }
    }

    /// Opens ranges of the segment to whoever shows the grant's key. Ranges of one access that touch or overlap count as
    /// one.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] for a range not wholly inside a region, [`Error::ReadOnly`], more ranges than any request has,
    /// or the engine is shut down.
    pub fn grant(&self, ranges: Vec<GrantRange>) -> Result<Grant, Error> {
        limit_ranges(ranges.len())?;
        self.check_running()?;
        let regions = self.0.owner.space.snapshot();
        let mut uses = Uses::default();
        for range in &ranges {
            let region = self.find(&regions, range.offset, range.len)?;
            if range.access == Access::Write {
                self.check_writable(region, range.offset, range.len)?;
            }
            uses.add(region);
        }
        Ok(self.0.owner.grants.open(&ranges, uses.0, GrantKey(random_u64())))
    }

    /// Starts moving. Never blocks (small batches within the host are copied right here, which takes microseconds); what
    /// goes wrong comes out of the future. A batch without bytes and notice is complete at once, without asking the owner.
    pub fn submit(&self, batch: Batch) -> Transfer {
        Transfer::new(match self.prepare(&batch) {
            Ok(Prepared { way, plan, uses, peer }) => {
                let setting = self.setting(way.transport.kind(), uses, Some(peer));
                if plan.frames.is_empty() && batch.notice.is_none() {
                    BatchState::ended(&batch, setting, Ok(()))
                } else {
                    let state = BatchState::new(&batch, plan, setting);
                    self.0.gate.submit(Launch { batch: Arc::clone(&state), start: Box::new(|batch| way.start(batch)) });
                    state.run_deadline(batch.deadline);
                    state
                }
            }
            Err(error) => BatchState::ended(&batch, self.setting(TransportKind::Local, Vec::new(), None), Err(error)),
        })
    }

    /// The notices that peers send along with their writes.
    pub fn notices(&self) -> Notices {
        self.0.owner.notices.clone()
    }

    /// Submits batches to any number of peers at once; each resolves by itself, and one's failure is not another's.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use kvasir_transfer::{
    ///     Access, Allocation, Batch, GrantRange, LocalNet, Op, Priority, Range, TransferEngine,
    /// };
    /// use kvasir_types::Deadline;
    ///
    /// # fn main() -> Result<(), kvasir_transfer::Error> {
    /// let net = LocalNet::new();
    /// let new = || TransferEngine::builder().local_net(net.clone()).arena(Allocation::new(1 << 20)).build();
    /// let (prefill, decode, store) = (new()?, new()?, new()?);
    /// let open = |engine: &TransferEngine| engine.grant(vec![GrantRange { offset: 0, len: 4096, access: Access::Write }]);
    /// let (to_decode, to_store) = (open(&decode)?, open(&store)?);
    ///
    /// let block = || vec![Range { local: 0, remote: 0, len: 4096 }];
    /// let deadline = Deadline::after(Duration::from_secs(5));
    /// let push = Batch {
    ///     priority: Priority::High,
    ///     notice: Some(b"layer 0".as_slice().into()),
    ///     ..Batch::new(Op::Write, decode.descriptor(), to_decode.key(), block(), deadline)
    /// };
    /// let write_back = Batch {
    ///     priority: Priority::Low,
    ///     ..Batch::new(Op::Write, store.descriptor(), to_store.key(), block(), deadline)
    /// };
    /// let outcomes = prefill.submit_all([push, write_back]).wait();
    /// assert!(outcomes.iter().all(Result::is_ok));
    /// assert_eq!(&*decode.notices().next_within(Duration::from_secs(5)).unwrap().bytes, b"layer 0");
    /// # Ok(()) }
    /// ```
    pub fn submit_all(&self, batches: impl IntoIterator<Item = Batch>) -> Transfers {
        Transfers::new(batches.into_iter().map(|batch| self.submit(batch)).collect())
    }

    /// Opens a segment by its name, in the directory the engine was built with.
    ///
    /// # Errors
    /// [`Error::UnknownSegment`] if nothing is published under the name, or there is no directory.
    pub async fn open(&self, name: &str) -> Result<Segment, Error> {
        let missing = || Error::UnknownSegment { name: name.to_owned(), reason: "the engine has no directory".into() };
        let directory = self.0.directory.clone().ok_or_else(missing)?;
        Segment::open(self.clone(), directory, name.to_owned()).await
    }

    /// What is known of each peer: over what it is reached and why, how that goes. Sorted by name.
    pub fn peers(&self) -> Vec<PeerStats> {
        self.0.peers.stats()
    }

    /// What moved and what was refused so far.
    pub fn stats(&self) -> Stats {
        self.0.owner.counters.snapshot()
    }

    /// BLAKE3 of registered bytes, the first 16 bytes of it: what the KV store's `commit` carries. The usual discipline
    /// applies: the caller holds the block and nobody writes it.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`].
    pub fn checksum(&self, offset: u64, len: u64) -> Result<[u8; 16], Error> {
        let mut sum = Checksum::new(self);
        sum.add(offset, len)?;
        Ok(sum.finish())
    }

    /// Copies registered bytes out: for tests and small uses. The usual discipline applies: nobody writes them meanwhile,
    /// or what is read is a mixture.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`].
    pub fn read_bytes(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        let region = self.own(offset, into.len() as u64)?;
        let from = region.at(offset, into.len() as u64);
        // SAFETY: the range was checked; `region` keeps it mapped; `into` is a live exclusive slice that cannot overlap
        // memory nobody has references into.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes into registered memory: for tests and small uses. The usual discipline applies: the caller holds the
    /// block, and nobody reads or writes these bytes meanwhile.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`], [`Error::ReadOnly`].
    pub fn write_bytes(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let len = bytes.len() as u64;
        let region = self.own(offset, len)?;
        self.check_writable(&region, offset, len)?;
        // SAFETY: as in `read_bytes`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), region.at(offset, len), bytes.len()) };
        Ok(())
    }

    /// Copies registered bytes to another place of this segment, at once and on this thread. The usual discipline applies:
    /// nobody writes the bytes at `from` meanwhile, nobody reads or writes those at `to`.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`], [`Error::ReadOnly`].
    pub fn copy_within(&self, from: u64, to: u64, len: u64) -> Result<(), Error> {
        let (source, sink) = (self.own(from, len)?, self.own(to, len)?);
        self.check_writable(&sink, to, len)?;
        // SAFETY: both ranges were checked against their regions, which `source` and `sink` keep mapped; no references into
        // them exist; `copy` allows for overlap.
        unsafe { std::ptr::copy(source.at(from, len).cast_const(), sink.at(to, len), len as usize) };
        Ok(())
    }

    /// Stops everything: transfers in progress fail with [`Error::Shutdown`], grants are revoked, connections cut,
    /// threads joined. When it returns, no thread of this engine touches registered memory any more. Done again, it does
    /// nothing.
    pub fn shutdown(&self) {
        self.0.shutdown();
    }

    fn setting(&self, transport: TransportKind, uses: Vec<Use>, peer: Option<Arc<Peer>>) -> Setting {
        let copies = matches!(transport, TransportKind::Local | TransportKind::Shm);
        let copier = copies.then(|| self.0.copier.clone());
        Setting { uses, transport, copier, timer: self.0.timer.clone(), grace: self.0.config.fence_grace, peer }
    }

    fn check_running(&self) -> Result<(), Error> {
        if self.0.stopped.load(Ordering::SeqCst) { Err(Error::Shutdown) } else { Ok(()) }
    }

    pub(crate) fn own(&self, offset: u64, len: u64) -> Result<Arc<Mapped>, Error> {
        self.find(&self.0.owner.space.snapshot(), offset, len).cloned()
    }

    /// The region of our own segment that holds all of a range.
    fn find<'a>(&self, regions: &'a Snapshot, offset: u64, len: u64) -> Result<&'a Arc<Mapped>, Error> {
        let segment = self.0.owner.segment;
        regions.find(offset, len).ok_or_else(|| Error::OutOfBounds { segment, offset, len, limit: regions.end() })
    }

    pub(crate) fn check_writable(&self, region: &Mapped, offset: u64, len: u64) -> Result<(), Error> {
        let segment = self.0.owner.segment;
        if region.writable { Ok(()) } else { Err(Error::ReadOnly { segment, offset, len }) }
    }

    /// Checks a batch against both segments and chooses its way.
    fn prepare(&self, batch: &Batch) -> Result<Prepared, Error> {
        limit_ranges(batch.ranges.len())?;
        if let Some(notice) = batch.notice.as_ref().filter(|notice| notice.len() > MAX_NOTICE_BYTES) {
            let reason = format!("{} bytes are more than {MAX_NOTICE_BYTES}", notice.len());
            return Err(Error::Config { setting: "notice", reason });
        }
        let regions = self.0.owner.space.snapshot();
        let mut uses = Uses::default();
        let mut mappable = true;
        for range in &batch.ranges {
            let region = self.find(&regions, range.local, range.len)?;
            if batch.op == Op::Read {
                self.check_writable(region, range.local, range.len)?;
            }
            uses.add(region);
            mappable &= check_remote(&batch.target, range.remote, range.len)?;
        }
        if batch.deadline.passed() {
            return Err(Error::DeadlineExceeded);
        }
        self.check_running()?;
        let Running { config, transports, rdma, owner, peers, .. } = &*self.0;
        let circumstances =
            Circumstances { transports: &config.transports, mappable, rdma: *rdma, encrypted: config.tls.is_some() };
        let way = choose(transports, &batch.target, &circumstances, |slot| self.0.started(slot))?;
        let peer = peers.get(&batch.target, &owner.counters);
        peer.begin(way.transport.kind(), Arc::clone(&way.reason))?;
        let plan = Plan::new(&batch.ranges, config.slice_bytes as u64);
        Ok(Prepared { way, plan, uses: uses.0, peer })
    }
}

impl Way {
    fn start(self, batch: &Arc<BatchState>) {
        let frames = batch.frames();
        if !frames.is_empty() {
            self.transport.start(frames, &self.target);
        }
        batch.on_data_sent(move |notice| self.transport.start(vec![notice], &self.target));
    }
}

/// A batch that was found in order.
struct Prepared {
    way: Way,
    plan: Plan,
    uses: Vec<Use>,
    peer: Arc<Peer>,
}

/// Uses of regions, each once.
#[derive(Default)]
struct Uses(Vec<Use>);

impl Uses {
    fn add(&mut self, region: &Arc<Mapped>) {
        // Ranges of one batch lie in few regions, mostly in one, and mostly in that of their predecessor.
        if !self.0.iter().rev().any(|known| Arc::ptr_eq(known, region)) {
            self.0.push(Use::new(region));
        }
    }
}

/// Whether the range's region can be mapped by processes of its host.
fn check_remote(target: &SegmentDescriptor, offset: u64, len: u64) -> Result<bool, Error> {
    let end = offset.checked_add(len);
    let inside = if target.regions.is_empty() {
        end.is_some_and(|end| end <= target.len).then_some(false)
    } else {
        let holds = |region: &&kvasir_types::RegionInfo| {
            let region_end = region.base.saturating_add(region.len);
            offset >= region.base && end.is_some_and(|end| end <= region_end)
        };
        target.regions.iter().find(holds).map(|region| region.shared)
    };
    inside.ok_or(Error::OutOfBounds { segment: target.segment, offset, len, limit: target.len })
}

fn limit_ranges(count: usize) -> Result<(), Error> {
    if count <= MAX_RANGES {
        return Ok(());
    }
    Err(Error::Busy { who: "this engine".into(), what: "too many ranges in one batch or grant" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remote_range_lies_in_one_region_or_is_out_of_bounds() {
        let region = |base, shared| kvasir_types::RegionInfo { base, len: 10, shared };
        let mut target = SegmentDescriptor {
            name: String::new(),
            segment: kvasir_types::SegmentId(1),
            incarnation: kvasir_types::Incarnation(1),
            len: 30,
            regions: vec![region(0, true), region(20, false)],
            transports: vec![],
        };
        assert!(check_remote(&target, 0, 10).unwrap());
        assert!(!check_remote(&target, 25, 5).unwrap());
        for (offset, len) in [(5, 6), (15, 1), (0, 30), (u64::MAX, 2)] {
            assert!(matches!(check_remote(&target, offset, len), Err(Error::OutOfBounds { .. })), "{offset}+{len}");
        }
        target.regions.clear();
        assert!(!check_remote(&target, 5, 25).unwrap(), "an old peer's: all of it, not mappable");
        assert!(check_remote(&target, 5, 26).is_err());
    }
}
