//! What this engine knows of each peer: over what it is reached and why, how that goes, and whether it rests.
//!
//! A peer that failed [`PATIENCE`] times in a row is left alone for a moment ([`Error::Resting`]); then one batch may try,
//! and what becomes of it decides: a success ends the rest, a failure doubles it, up to [`LONGEST_REST`]. Only what
//! says something about the way to the peer counts as a failure: a refused key does not.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use kvasir_types::{Incarnation, PeerTraffic, SegmentDescriptor, SegmentId, TransportKind};

use crate::{
    batch::{Op, Report},
    counters::Counters,
    error::Error,
    histogram::{Histogram, LiveHistogram},
};

/// Failures in a row after which a peer rests.
const PATIENCE: u32 = 3;
/// The first rest.
const REST: Duration = Duration::from_millis(100);
/// The longest rest.
const LONGEST_REST: Duration = Duration::from_secs(5);
/// Most peers that are remembered; beyond it the one that was used longest ago is forgotten.
const MAX_PEERS: usize = 1024;

/// What this engine knows of a peer, for people and dashboards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStats {
    /// Its segment's name; empty if it has none.
    pub name: String,
    /// Its segment.
    pub segment: SegmentId,
    /// Over what the last batch went.
    pub transport: TransportKind,
    /// Why over that.
    pub reason: String,
    /// Bytes read from it.
    pub read_bytes: u64,
    /// Bytes written to it.
    pub written_bytes: u64,
    /// Batches that completed.
    pub completed: u64,
    /// Batches that failed, for whatever reason.
    pub failed: u64,
    /// Bytes of batches that are not over.
    pub in_flight_bytes: u64,
    /// How long completed batches took.
    pub latency: Histogram,
    /// The same together.
    pub busy: Duration,
    /// How often in a row the way to it failed.
    pub failures_in_a_row: u32,
    /// How long it still rests; zero if it does not.
    pub resting: Duration,
}

impl PeerStats {
    /// In short, as an operator is told.
    pub fn traffic(&self) -> PeerTraffic {
        PeerTraffic {
            name: if self.name.is_empty() { self.segment.to_string() } else { self.name.clone() },
            transport: Some(self.transport),
            reason: self.reason.clone(),
            read_bytes: self.read_bytes,
            written_bytes: self.written_bytes,
            completed: self.completed,
            failed: self.failed,
            in_flight_bytes: self.in_flight_bytes,
            p50_us: self.latency.quantile_us(0.5).unwrap_or_default(),
            p99_us: self.latency.quantile_us(0.99).unwrap_or_default(),
            failures_in_a_row: self.failures_in_a_row,
            resting_ms: self.resting.as_millis() as u64,
            busy_us: self.busy.as_micros() as u64,
        }
    }
}

/// One life of one peer.
pub(crate) struct Peer {
    name: String,
    segment: SegmentId,
    counters: Arc<Counters>,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    completed: AtomicU64,
    failed: AtomicU64,
    in_flight_bytes: AtomicU64,
    latency: LiveHistogram,
    busy_us: AtomicU64,
    state: Mutex<State>,
}

struct State {
    way: (TransportKind, Arc<str>),
    last_used: Instant,
    failures: u32,
    rest: Duration,
    rests_until: Option<Instant>,
}

impl Peer {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What errors call it.
    fn called(&self) -> String {
        if self.name.is_empty() { self.segment.to_string() } else { self.name.clone() }
    }

    /// Notes that a batch is about to go, and how, unless the peer rests.
    pub(crate) fn begin(&self, transport: TransportKind, reason: Arc<str>) -> Result<(), Error> {
        let mut state = self.lock();
        let now = Instant::now();
        if let Some(until) = state.rests_until {
            if now < until {
                let (failures, retry_in) = (state.failures, until - now);
                return Err(Error::Resting { peer: self.called(), failures, retry_in });
            }
            // This one tries; whoever comes meanwhile waits for what it finds.
            state.rests_until = Some(now + state.rest);
        }
        state.last_used = now;
        state.way = (transport, reason);
        Ok(())
    }

    pub(crate) fn started(&self, bytes: u64) {
        self.in_flight_bytes.fetch_add(bytes, Relaxed);
        self.counters.in_flight_bytes.fetch_add(bytes, Relaxed);
    }

    /// A batch that was started is over.
    pub(crate) fn ended(&self, op: Op, bytes: u64, outcome: &Result<Report, Error>) {
        self.in_flight_bytes.fetch_sub(bytes, Relaxed);
        self.counters.in_flight_bytes.fetch_sub(bytes, Relaxed);
        match outcome {
            Ok(report) => {
                let moved = if op == Op::Read { &self.read_bytes } else { &self.written_bytes };
                moved.fetch_add(bytes, Relaxed);
                self.completed.fetch_add(1, Relaxed);
                self.latency.add(report.elapsed);
                self.busy_us.fetch_add(report.elapsed.as_micros() as u64, Relaxed);
                self.counters.completed(report.transport, report.elapsed);
                let mut state = self.lock();
                (state.failures, state.rest, state.rests_until) = (0, REST, None);
            }
            Err(error) => {
                self.failed.fetch_add(1, Relaxed);
                self.counters.failed(error);
                if matches!(error, Error::Unreachable { .. } | Error::Disconnected { .. }) {
                    self.missed();
                }
            }
        }
    }

    fn missed(&self) {
        let mut state = self.lock();
        state.failures += 1;
        let now = Instant::now();
        // What was under way when the peer went to rest fails too, and must not lengthen the rest.
        let resting = state.rests_until.is_some_and(|until| until.saturating_duration_since(now) > state.rest / 2);
        if state.failures >= PATIENCE && (state.failures == PATIENCE || !resting) {
            if state.failures > PATIENCE {
                state.rest = (state.rest * 2).min(LONGEST_REST);
            }
            state.rests_until = Some(now + state.rest);
            tracing::debug!(peer = self.called(), failures = state.failures, rest = ?state.rest, "peer rests");
        }
    }

    fn stats(&self) -> PeerStats {
        let state = self.lock();
        PeerStats {
            name: self.name.clone(),
            segment: self.segment,
            transport: state.way.0,
            reason: state.way.1.to_string(),
            read_bytes: self.read_bytes.load(Relaxed),
            written_bytes: self.written_bytes.load(Relaxed),
            completed: self.completed.load(Relaxed),
            failed: self.failed.load(Relaxed),
            in_flight_bytes: self.in_flight_bytes.load(Relaxed),
            latency: self.latency.get(),
            busy: Duration::from_micros(self.busy_us.load(Relaxed)),
            failures_in_a_row: state.failures,
            resting: state.rests_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now())),
        }
    }
}

type Lives = HashMap<(SegmentId, Incarnation), Arc<Peer>>;

/// All peers of one engine.
#[derive(Default)]
pub(crate) struct Peers(Mutex<Lives>);

impl Peers {
    fn lock(&self) -> MutexGuard<'_, Lives> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The peer that a descriptor means.
    pub(crate) fn get(&self, target: &SegmentDescriptor, counters: &Arc<Counters>) -> Arc<Peer> {
        let mut lives = self.lock();
        let key = (target.segment, target.incarnation);
        if let Some(peer) = lives.get(&key) {
            return Arc::clone(peer);
        }
        if lives.len() >= MAX_PEERS
            && let Some(oldest) = lives.iter().min_by_key(|(_, peer)| peer.lock().last_used).map(|(key, _)| *key)
        {
            lives.remove(&oldest);
        }
        let state = State {
            way: (TransportKind::Local, "".into()),
            last_used: Instant::now(),
            failures: 0,
            rest: REST,
            rests_until: None,
        };
        let peer = Arc::new(Peer {
            name: target.name.clone(),
            segment: target.segment,
            counters: Arc::clone(counters),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            in_flight_bytes: AtomicU64::new(0),
            latency: LiveHistogram::default(),
            busy_us: AtomicU64::new(0),
            state: Mutex::new(state),
        });
        lives.insert(key, Arc::clone(&peer));
        peer
    }

    /// All of them, sorted by name.
    pub(crate) fn stats(&self) -> Vec<PeerStats> {
        let peers: Vec<_> = self.lock().values().cloned().collect();
        let mut stats: Vec<_> = peers.iter().map(|peer| peer.stats()).collect();
        stats.sort_by(|a, b| (&a.name, a.segment).cmp(&(&b.name, b.segment)));
        stats
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;

    fn descriptor(segment: u64) -> SegmentDescriptor {
        SegmentDescriptor {
            name: "decode-0".into(),
            segment: SegmentId(segment),
            incarnation: Incarnation(1),
            len: 0,
            regions: vec![],
            transports: vec![],
        }
    }

    fn begin(peer: &Peer) -> Result<(), Error> {
        peer.begin(TransportKind::Tcp, "tcp".into())
    }

    fn fail(peer: &Peer) {
        peer.started(10);
        peer.ended(Op::Read, 10, &Err(Error::Disconnected { peer: String::new(), reason: "gone".into() }));
    }

    #[test]
    fn a_peer_rests_after_failures_in_a_row_and_one_batch_finds_out_whether_it_is_back() {
        let (peers, counters) = (Peers::default(), Arc::<Counters>::default());
        let peer = peers.get(&descriptor(1), &counters);
        for _ in 0..PATIENCE {
            begin(&peer).unwrap();
            fail(&peer);
        }
        let error = begin(&peer).unwrap_err();
        assert!(error.to_string().starts_with("decode-0 failed 3 times in a row"), "{error}");
        assert!(peers.stats()[0].resting > Duration::ZERO);
        sleep(REST);
        begin(&peer).unwrap();
        assert!(matches!(begin(&peer), Err(Error::Resting { .. })), "one tries, the others wait");
        peer.started(10);
        let report = Report { bytes: 10, ops: 1, transport: TransportKind::Tcp, elapsed: Duration::from_micros(5) };
        peer.ended(Op::Read, 10, &Ok(report));
        begin(&peer).unwrap();
        let stats = &peers.stats()[0];
        assert_eq!((stats.completed, stats.failed, stats.in_flight_bytes, stats.read_bytes), (1, 3, 0, 10));
        assert_eq!((stats.latency.count(), stats.busy), (1, Duration::from_micros(5)));
    }

    #[test]
    fn a_refusal_says_nothing_about_the_way() {
        let peers = Peers::default();
        let peer = peers.get(&descriptor(1), &Arc::default());
        for _ in 0..2 * PATIENCE {
            begin(&peer).unwrap();
            peer.started(0);
            peer.ended(Op::Write, 0, &Err(Error::Cancelled));
        }
        begin(&peer).unwrap();
    }

    #[test]
    fn the_number_of_peers_remembered_is_bounded() {
        let (peers, counters) = (Peers::default(), Arc::<Counters>::default());
        for segment in 0..MAX_PEERS as u64 + 10 {
            peers.get(&descriptor(segment), &counters);
        }
        assert_eq!(peers.stats().len(), MAX_PEERS);
    }
}
