//! What the transfer engine counts, copied over when somebody looks.

use kvasir_runtime::metrics::{Counter, Distribution, Family, Gauge, set_total};
use kvasir_transfer::{Histogram, PeerStats, Side, Stats, TransferEngine};
use kvasir_types::TransportKind;

type Labels<const N: usize> = [(&'static str, &'static str); N];
type PeerLabels = Vec<(&'static str, String)>;

/// The metrics that begin with `kvasir_transfer_`.
pub(super) struct TransferPage {
    bytes: Family<Labels<3>, Counter>,
    refused: Family<Labels<1>, Counter>,
    failed: Family<Labels<1>, Counter>,
    retries: Counter,
    fenced: Counter,
    held: Counter,
    connections: Gauge,
    in_flight: Gauge,
    peer_bytes: Family<PeerLabels, Counter>,
    peer_transfers: Family<PeerLabels, Counter>,
    peer_route: Family<PeerLabels, Gauge>,
    peer_resting: Family<PeerLabels, Gauge>,
}

impl TransferPage {
    /// Puts them on the page.
    pub(super) fn register(page: &kvasir_runtime::Metrics, transfer: TransferEngine) {
        let this = Self {
            bytes: page.counters("kvasir_transfer_bytes", "KV bytes moved, by side, direction and transport"),
            refused: page.counters("kvasir_transfer_refused", "Peers' operations refused, by cause"),
            failed: page.counters("kvasir_transfer_failed", "Transfers begun here that failed, by cause"),
            retries: page.counter("kvasir_transfer_retries", "Frames sent again after their connection died"),
            fenced: page
                .counter("kvasir_transfer_fenced_connections", "Connections cut so that memory could be reused"),
            held: page.counter(
                "kvasir_transfer_held_fences",
                "Revoked grants whose memory a stalled peer of this host kept out of use beyond the grace",
            ),
            connections: page.gauge("kvasir_transfer_open_connections", "Connections open to peers"),
            in_flight: page.gauge("kvasir_transfer_in_flight_bytes", "Bytes of transfers begun here that are not over"),
            peer_bytes: page.counters("kvasir_transfer_peer_bytes", "KV bytes moved, by peer and direction"),
            peer_transfers: page.counters("kvasir_transfer_peer_transfers", "Transfers by peer and outcome"),
            peer_route: page.gauges("kvasir_transfer_peer_route", "1: this peer is reached so, for this reason"),
            peer_resting: page.gauges("kvasir_transfer_peer_resting", "Whether a peer that kept failing is left alone"),
        };
        let latency = transfer.clone();
        page.distributions(
            "kvasir_transfer_seconds",
            "Completed transfers from submit to the end, by transport",
            move || by_transport(&latency.stats()),
        );
        let latency = transfer.clone();
        page.distributions(
            "kvasir_transfer_peer_seconds",
            "Completed transfers from submit to the end, by peer",
            move || latency.peers().iter().map(|peer| distribution(vec![called(peer)], &peer.latency)).collect(),
        );
        page.on_scrape(move || this.refresh(&transfer.stats(), &transfer.peers()));
    }

    fn refresh(&self, stats: &Stats, peers: &[PeerStats]) {
        self.moved("client", &stats.client);
        self.moved("owner", &stats.owner);
        let refused = &stats.refused;
        for (cause, count) in [
            ("unknown_grant", refused.unknown_grant),
            ("access", refused.access),
            ("bounds", refused.bounds),
            ("full", refused.full),
            ("stale", refused.stale),
            ("version", refused.version),
            ("untrusted", refused.untrusted),
            ("busy", refused.busy),
            ("forbidden", refused.forbidden),
            ("malformed", refused.malformed),
        ] {
            set_total(&self.refused.get_or_create(&[("cause", cause)]), count);
        }
        for (cause, count) in stats.failures {
            set_total(&self.failed.get_or_create(&[("cause", cause)]), count);
        }
        set_total(&self.retries, stats.retries);
        set_total(&self.fenced, stats.fenced_connections);
        set_total(&self.held, stats.held_fences);
        self.connections.set(stats.open_connections as i64);
        self.in_flight.set(stats.in_flight_bytes as i64);
        self.peers(peers);
    }

    fn moved(&self, side: &'static str, traffic: &Side) {
        for kind in TransportKind::ALL {
            let traffic = traffic.of(kind);
            for (direction, bytes) in [("read", traffic.read_bytes), ("write", traffic.written_bytes)] {
                let labels = [("side", side), ("direction", direction), ("transport", kind.name())];
                set_total(&self.bytes.get_or_create(&labels), bytes);
            }
        }
    }

    /// Peers come and go: those that were forgotten disappear.
    fn peers(&self, peers: &[PeerStats]) {
        self.peer_bytes.clear();
        self.peer_transfers.clear();
        self.peer_route.clear();
        self.peer_resting.clear();
        for peer in peers {
            let with = |label, value: &str| vec![called(peer), (label, value.to_owned())];
            for (direction, bytes) in [("read", peer.read_bytes), ("write", peer.written_bytes)] {
                self.peer_bytes.get_or_create(&with("direction", direction)).inc_by(bytes);
            }
            for (outcome, count) in [("completed", peer.completed), ("failed", peer.failed)] {
                self.peer_transfers.get_or_create(&with("outcome", outcome)).inc_by(count);
            }
            let mut route = with("transport", peer.transport.name());
            route.push(("reason", peer.reason.clone()));
            self.peer_route.get_or_create(&route).set(1);
            self.peer_resting.get_or_create(&vec![called(peer)]).set((!peer.resting.is_zero()).into());
        }
    }
}

fn called(peer: &PeerStats) -> (&'static str, String) {
    ("peer", if peer.name.is_empty() { peer.segment.to_string() } else { peer.name.clone() })
}

fn by_transport(stats: &Stats) -> Vec<Distribution> {
    let of = |(kind, latency): (TransportKind, &Histogram)| {
        distribution(vec![("transport", kind.name().to_owned())], latency)
    };
    TransportKind::ALL.into_iter().zip(&stats.latency).map(of).collect()
}

fn distribution(labels: PeerLabels, latency: &Histogram) -> Distribution {
    let bound = |bucket| Histogram::bound(bucket).unwrap_or(f64::INFINITY);
    let buckets = latency.buckets.iter().enumerate().map(|(bucket, &count)| (bound(bucket), count)).collect();
    Distribution { labels, buckets, sum: latency.sum_us as f64 / 1e6 }
}
