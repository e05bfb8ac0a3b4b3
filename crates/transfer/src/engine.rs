//! The engine: one arena, its grants, its transports and its threads, behind one handle.
//!
//! Threads, all named, all joined by shutdown: `transfer-timer` (deadlines, fences), `transfer-local` (copies within the
//! process), `transfer-accept` and a `transfer-serve` for each connection of a peer, a `transfer-send` for each lane to a peer
//! and a `transfer-recv` for each connection on one.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kvasir_types::{GrantKey, HostMemory, Incarnation, SegmentDescriptor, SegmentId, TransportKind};

use crate::{
    batch::{Batch, BatchState, Setting, Transfer},
    config::Config,
    counters::Counters,
    error::Error,
    gate::{Gate, Launch},
    grant::{Grant, GrantRange, GrantTable},
    local::{LocalNet, LocalTransport},
    memory::Arena,
    owner::{Owner, random_u64},
    plan::Plan,
    stats::Stats,
    tcp::{MAX_PAYLOAD, TcpTransport},
    threads::Threads,
    timer::Timer,
    transport::Transport,
};

/// Most ranges in one batch or grant: bounds what a caller's mistake can cost.
const MAX_RANGES: usize = 1 << 20;

/// Moves bytes between this process's arena and those of its peers.
///
/// A handle: clones share the engine, and dropping the last one shuts it down. Grants and transfers may outlive it.
#[derive(Clone)]
pub struct TransferEngine(Arc<Running>);

struct Running {
    config: Config,
    owner: Arc<Owner>,
    transports: Vec<Arc<dyn Transport>>,
    gate: Arc<Gate>,
    timer: Timer,
    threads: Arc<Threads>,
    stopped: AtomicBool,
}

impl fmt::Debug for TransferEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TransferEngine").field(&self.descriptor()).finish()
    }
}

impl TransferEngine {
    /// Maps a zeroed arena of `capacity_bytes`, listens, and becomes reachable in `local`.
    ///
    /// # Errors
    /// A setting out of range, a transport this build lacks, no memory, no port or no thread.
    pub fn new(config: Config, local: LocalNet, capacity_bytes: usize) -> Result<Self, Error> {
        check(&config)?;
        let (timer, threads, counters) = (Timer::default(), Arc::new(Threads::default()), Arc::<Counters>::default());
        let owner = Arc::new(Owner {
            segment: SegmentId(random_u64()),
            incarnation: Incarnation(random_u64()),
            arena: Arc::new(Arena::new(capacity_bytes)?),
            grants: GrantTable::new(timer.clone(), config.fence_grace, Arc::clone(&counters)),
            counters,
        });
        // Made first, so that what has been started is stopped by its drop if the next thing can't be had.
        let gate = Gate::new(config.max_inflight_bytes as u64);
        let stopped = AtomicBool::new(false);
        let mut running = Running { config, owner, transports: Vec::new(), gate, timer, threads, stopped };
        let timer = running.timer.clone();
        running.threads.spawn("transfer-timer", move || timer.run())?;
        for kind in running.config.transports.clone() {
            let transport: Arc<dyn Transport> = match kind {
                TransportKind::Local => Arc::new(LocalTransport::new(local.clone(), &running.owner, &running.threads)?),
                TransportKind::Tcp => Arc::new(TcpTransport::new(&running.config, &running.owner, &running.threads)?),
                TransportKind::Ucx => {
                    return Err(Error::TransportUnavailable { kind, reason: "not in this version".into() });
                }
            };
            running.transports.push(transport);
        }
        Ok(Self(Arc::new(running)))
    }

    /// The arena. It stays mapped while anybody holds it, also after shutdown.
    pub fn memory(&self) -> Arc<dyn HostMemory> {
        Arc::clone(&self.0.owner.arena) as Arc<dyn HostMemory>
    }

    /// What peers need to reach it: publish it.
    pub fn descriptor(&self) -> SegmentDescriptor {
        let Owner { segment, incarnation, arena, .. } = &*self.0.owner;
        // Local first whatever our own order: a peer for which it works should see it first.
        let mut transports: Vec<_> = self.0.transports.iter().map(|transport| transport.address()).collect();
        transports.sort_by_key(|address| address.kind);
        SegmentDescriptor { segment: *segment, incarnation: *incarnation, len: arena.len() as u64, transports }
    }

    /// Opens ranges of the arena to whoever shows the grant's key. Ranges of one access that touch or overlap count as
    /// one.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`], more ranges than any request has, or the engine is shut down.
    pub fn grant(&self, ranges: Vec<GrantRange>) -> Result<Grant, Error> {
        limit_ranges(ranges.len())?;
        self.check_running()?;
        for range in &ranges {
            self.check_own(range.offset, range.len)?;
        }
        Ok(self.0.owner.grants.open(&ranges, GrantKey(random_u64())))
    }

    /// Starts moving. Never blocks (small local batches are copied right here, which takes microseconds); what goes
    /// wrong comes out of the future. A batch without bytes is complete at once, without asking the owner.
    pub fn submit(&self, batch: Batch) -> Transfer {
        Transfer::new(match self.prepare(&batch) {
            Ok((transport, address, plan)) => {
                let setting = self.setting(transport.kind());
                if plan.frames.is_empty() {
                    BatchState::ended(&batch, setting, Ok(()))
                } else {
                    let state = BatchState::new(&batch, plan, setting);
                    let target = batch.target;
                    let start = Box::new(move |batch: &Arc<BatchState>| transport.start(batch, &target, &address));
                    self.0.gate.submit(Launch { batch: Arc::clone(&state), start });
                    state
                }
            }
            Err(error) => BatchState::ended(&batch, self.setting(TransportKind::Local), Err(error)),
        })
    }

    /// What moved and what was refused so far.
    pub fn stats(&self) -> Stats {
        self.0.owner.counters.snapshot()
    }

    /// BLAKE3 of arena bytes, the first 16 bytes of it: what the KV store's `commit` carries. The usual discipline
    /// applies: the caller holds the block and nobody writes it.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`].
    pub fn checksum(&self, offset: u64, len: u64) -> Result<[u8; 16], Error> {
        self.check_own(offset, len)?;
        // By way of a buffer that stays in the first-level cache: no reference into the arena is formed, and 16 KiB
        // feed all of BLAKE3's vector lanes.
        let mut buffer = [0; 16 << 10];
        let mut hasher = blake3::Hasher::new();
        let mut done = 0;
        while done < len {
            let step = (len - done).min(buffer.len() as u64);
            let part = &mut buffer[..step as usize];
            self.0.owner.arena.copy_out(offset + done, part);
            hasher.update(part);
            done += step;
        }
        let mut short = [0; 16];
        short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Ok(short)
    }

    /// Copies arena bytes out: for tests and small uses. The usual discipline applies: nobody writes them meanwhile, or
    /// what is read is a mixture.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`].
    pub fn read_bytes(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        self.check_own(offset, into.len() as u64)?;
        self.0.owner.arena.copy_out(offset, into);
        Ok(())
    }

    /// Copies bytes into the arena: for tests and small uses. The usual discipline applies: the caller holds the block,
    /// and nobody reads or writes these bytes meanwhile.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`].
    pub fn write_bytes(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.check_own(offset, bytes.len() as u64)?;
        self.0.owner.arena.copy_in(offset, bytes);
        Ok(())
    }

    /// Stops everything: transfers in progress fail with [`Error::Shutdown`], grants are revoked, connections cut,
    /// threads joined. When it returns, nothing touches the arena any more but its holders. Done again, it does nothing.
    pub fn shutdown(&self) {
        self.0.shutdown();
    }

    fn setting(&self, transport: TransportKind) -> Setting {
        let (arena, timer) = (Arc::clone(&self.0.owner.arena), self.0.timer.clone());
        Setting { arena, transport, timer, grace: self.0.config.fence_grace }
    }

    fn check_running(&self) -> Result<(), Error> {
        if self.0.stopped.load(Ordering::SeqCst) { Err(Error::Shutdown) } else { Ok(()) }
    }

    fn check_own(&self, offset: u64, len: u64) -> Result<(), Error> {
        let Owner { segment, arena, .. } = &*self.0.owner;
        check_bounds(*segment, offset, len, arena.len() as u64)
    }

    /// Checks a batch against both segments and chooses its transport.
    fn prepare(&self, batch: &Batch) -> Result<(Arc<dyn Transport>, String, Plan), Error> {
        limit_ranges(batch.ranges.len())?;
        for range in &batch.ranges {
            self.check_own(range.local, range.len)?;
            check_bounds(batch.target.segment, range.remote, range.len, batch.target.len)?;
        }
        if batch.deadline.passed() {
            return Err(Error::DeadlineExceeded);
        }
        self.check_running()?;
        let (transport, address) = self.choose(&batch.target)?;
        Ok((transport, address, Plan::new(&batch.ranges, self.0.config.slice_bytes as u64)))
    }

    /// The first of our transports, in our order, that the peer offers and that can reach it.
    fn choose(&self, target: &SegmentDescriptor) -> Result<(Arc<dyn Transport>, String), Error> {
        for transport in &self.0.transports {
            let offered = target.transports.iter().filter(|offer| offer.kind == transport.kind());
            if let Some(offer) = offered.into_iter().find(|offer| transport.reaches(&offer.address)) {
                return Ok((Arc::clone(transport), offer.address.clone()));
            }
        }
        Err(Error::NoTransport {
            segment: target.segment,
            offered: list(target.transports.iter().map(|offer| offer.kind)),
            allowed: list(self.0.transports.iter().map(|transport| transport.kind())),
        })
    }
}

impl Running {
    fn shutdown(&self) {
        if self.stopped.swap(true, Ordering::SeqCst) {
            return;
        }
        self.gate.close();
        self.owner.grants.close_all();
        self.transports.iter().for_each(|transport| transport.shutdown());
        self.timer.stop();
        self.threads.join_all();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn list(kinds: impl Iterator<Item = TransportKind>) -> String {
    let names: Vec<_> = kinds.map(|kind| kind.to_string()).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

fn check_bounds(segment: SegmentId, offset: u64, len: u64, limit: u64) -> Result<(), Error> {
    match offset.checked_add(len) {
        Some(end) if end <= limit => Ok(()),
        _ => Err(Error::OutOfBounds { segment, offset, len, limit }),
    }
}

fn limit_ranges(count: usize) -> Result<(), Error> {
    if count <= MAX_RANGES {
        return Ok(());
    }
    Err(Error::Busy { who: "this engine".into(), what: "too many ranges in one batch or grant" })
}

fn check(config: &Config) -> Result<(), Error> {
    let bad = |setting, reason: String| Err(Error::Config { setting, reason });
    let (slice, connections) = (config.slice_bytes, config.connections_per_peer);
    if !(4 << 10..=MAX_PAYLOAD as usize).contains(&slice) {
        return bad("slice_bytes", format!("{slice} is not in 4096 to {MAX_PAYLOAD}"));
    }
    if !(1..=16).contains(&connections) {
        return bad("connections_per_peer", format!("{connections} is not in 1 to 16"));
    }
    if config.max_accepted_connections == 0 {
        return bad("max_accepted_connections", "must be at least 1".into());
    }
    if config.io_timeout < Duration::from_millis(10) {
        return bad("io_timeout", format!("{:?} is less than 10 ms", config.io_timeout));
    }
    for (index, kind) in config.transports.iter().enumerate() {
        if config.transports[..index].contains(kind) {
            return bad("transports", format!("{kind} is listed twice"));
        }
    }
    if config.transports.is_empty() {
        return bad("transports", "must name at least one of local, tcp".into());
    }
    Ok(())
}
