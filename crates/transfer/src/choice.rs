//! Over what a peer is reached, and why.
//!
//! Of the transports of this engine, in order of preference, the first that the peer offers and that can reach it. With
//! `auto` the order is local, shm, ucx, tcp, and ucx is taken only where it is the better way: to memory of this host that
//! can't be mapped, or between RDMA devices, and not where connections are to be encrypted. (Over plain Ethernet our own sockets are several times faster than UCX's.)
//! Every transport that was passed over leaves its reason, for metrics, `kvasirctl` and the error if none is left.

use std::sync::{Arc, OnceLock};

use kvasir_types::{SegmentDescriptor, TransportKind, Transports};

use crate::{
    error::Error,
    transport::{Target, Transport},
};

/// A transport of this engine: started, to be started when it is first wanted, or not to be had.
pub(crate) struct Slot {
    pub(crate) kind: TransportKind,
    pub(crate) state: OnceLock<Result<Arc<dyn Transport>, String>>,
}

impl Slot {
    pub(crate) fn new(kind: TransportKind) -> Self {
        Self { kind, state: OnceLock::new() }
    }

    /// The transport, if it was started.
    pub(crate) fn started(&self) -> Option<&Arc<dyn Transport>> {
        self.state.get()?.as_ref().ok()
    }
}

/// How a batch is to travel.
pub(crate) struct Way {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) target: Arc<Target>,
    pub(crate) reason: Arc<str>,
}

/// What else bears on the choice.
pub(crate) struct Circumstances<'a> {
    /// Whether this engine chooses by itself.
    pub(crate) transports: &'a Transports,
    /// Whether all of the ranges at the far side can be mapped by processes of its host.
    pub(crate) mappable: bool,
    /// Whether this machine has an RDMA device.
    pub(crate) rdma: bool,
    /// Whether connections are to be encrypted.
    pub(crate) encrypted: bool,
}

/// Chooses the way to `target`; `start` starts a transport that was left for later.
pub(crate) fn choose(
    slots: &[Slot],
    target: &SegmentDescriptor,
    circumstances: &Circumstances<'_>,
    start: impl Fn(&Slot) -> Result<Arc<dyn Transport>, String>,
) -> Result<Way, Error> {
    let auto = *circumstances.transports == Transports::Auto;
    let mut passed = Vec::new();
    let mut same_host = false;
    for slot in slots {
        let kind = slot.kind;
        let offered = || target.transports.iter().filter(move |offer| offer.kind == kind);
        if offered().next().is_none() {
            passed.push((kind, "the peer doesn't offer it".to_owned()));
            continue;
        }
        let worthwhile = circumstances.rdma || (same_host && !circumstances.mappable);
        if auto && kind == TransportKind::Ucx && !worthwhile {
            passed.push((kind, "no RDMA device here".to_owned()));
            continue;
        }
        if auto && kind == TransportKind::Ucx && circumstances.encrypted {
            passed.push((kind, "certificates are set, and it does not encrypt".to_owned()));
            continue;
        }
        let transport = match start(slot) {
            Ok(transport) => transport,
            Err(reason) => {
                passed.push((kind, reason));
                continue;
            }
        };
        let mut addresses = Vec::new();
        let mut unreachable = None;
        for offer in offered() {
            match transport.reaches(&offer.address) {
                Ok(()) => addresses.push(offer.address.clone()),
                Err(reason) => unreachable = Some(reason),
            }
        }
        if addresses.is_empty() {
            passed.push((kind, unreachable.unwrap_or_default()));
            continue;
        }
        if kind == TransportKind::Shm && !circumstances.mappable {
            same_host = true;
            passed.push((kind, "the memory can't be mapped".to_owned()));
            continue;
        }
        let reason = reason(kind, auto, same_host, &passed);
        let target = Arc::new(Target { descriptor: target.clone(), addresses });
        return Ok(Way { transport, target, reason: reason.into() });
    }
    let allowed = match circumstances.transports {
        Transports::Auto => "auto".to_owned(),
        Transports::Named(kinds) => list(kinds.iter().copied()),
    };
    let why = list_passed(&passed);
    Err(Error::NoTransport {
        segment: target.segment,
        offered: list(target.transports.iter().map(|offer| offer.kind)),
        allowed: if why.is_empty() { allowed } else { format!("{allowed} ({why})") },
    })
}

fn reason(kind: TransportKind, auto: bool, same_host: bool, passed: &[(TransportKind, String)]) -> String {
    let fits = match kind {
        _ if !auto => "named in the settings",
        TransportKind::Local => "same process",
        TransportKind::Shm => "same host",
        TransportKind::Ucx if same_host => "same host, memory that can't be mapped",
        TransportKind::Ucx => "RDMA device",
        TransportKind::Tcp => "always possible",
    };
    // Not being of one process is what peers are like; it explains nothing.
    let telling: Vec<_> = passed.iter().filter(|(kind, _)| *kind != TransportKind::Local).cloned().collect();
    if telling.is_empty() { fits.to_owned() } else { format!("{fits}; {}", list_passed(&telling)) }
}

fn list_passed(passed: &[(TransportKind, String)]) -> String {
    let passed: Vec<_> = passed.iter().map(|(kind, reason)| format!("{kind}: {reason}")).collect();
    passed.join("; ")
}

fn list(kinds: impl Iterator<Item = TransportKind>) -> String {
    let mut names: Vec<_> = kinds.map(|kind| kind.to_string()).collect();
    names.dedup();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use kvasir_types::{Incarnation, SegmentId, TransportAddress};

    use super::*;
    use crate::batch::Frame;

    /// Reaches addresses that begin with `near`.
    struct Fake(TransportKind);

    impl Transport for Fake {
        fn kind(&self) -> TransportKind {
            self.0
        }
        fn addresses(&self) -> Vec<TransportAddress> {
            Vec::new()
        }
        fn reaches(&self, address: &str) -> Result<(), String> {
            if address.starts_with("near") { Ok(()) } else { Err("another host".into()) }
        }
        fn start(&self, _: Vec<Frame>, _: &Arc<Target>) {}
        fn shutdown(&self) {}
    }

    fn choose_of(
        transports: &Transports,
        offers: &[(TransportKind, &str)],
        mappable: bool,
        rdma: bool,
    ) -> Result<(TransportKind, String), Error> {
        let kinds = match transports {
            Transports::Auto => TransportKind::ALL.to_vec(),
            Transports::Named(kinds) => kinds.clone(),
        };
        let slots: Vec<_> = kinds.into_iter().map(Slot::new).collect();
        let transports_offered =
            offers.iter().map(|&(kind, address)| TransportAddress { kind, address: address.into() }).collect();
        let target = SegmentDescriptor {
            name: String::new(),
            segment: SegmentId(1),
            incarnation: Incarnation(1),
            len: 1,
            regions: vec![],
            transports: transports_offered,
        };
        let circumstances = Circumstances { transports, mappable, rdma, encrypted: false };
        let way = choose(&slots, &target, &circumstances, |slot| Ok(Arc::new(Fake(slot.kind)) as Arc<dyn Transport>))?;
        Ok((way.transport.kind(), way.reason.to_string()))
    }

    use TransportKind::{Local, Shm, Tcp, Ucx};

    #[test]
    fn auto_takes_the_nearest_way_and_says_why() {
        let auto = Transports::Auto;
        let everything = |host| [(Local, host), (Shm, host), (Ucx, "near"), (Tcp, "near")];
        let of = |offers: &[_], mappable, rdma| choose_of(&auto, offers, mappable, rdma).unwrap();
        assert_eq!(of(&everything("near"), true, false), (Local, "same process".into()));
        let other_process = [(Local, "far"), (Shm, "near"), (Ucx, "near"), (Tcp, "near")];
        assert_eq!(of(&other_process, true, true), (Shm, "same host".into()));
        let (kind, why) = of(&other_process, false, false);
        assert_eq!(kind, Ucx);
        assert_eq!(why, "same host, memory that can't be mapped; shm: the memory can't be mapped");
        assert_eq!(of(&everything("far"), true, true), (Ucx, "RDMA device; shm: another host".into()));
        let (kind, why) = of(&everything("far"), true, false);
        assert_eq!(kind, Tcp);
        assert_eq!(why, "always possible; shm: another host; ucx: no RDMA device here");
    }

    #[test]
    fn a_named_transport_is_taken_or_missed_but_never_replaced() {
        let only = |kind| Transports::Named(vec![kind]);
        let offers = [(Shm, "far"), (Ucx, "near"), (Tcp, "near")];
        assert_eq!(choose_of(&only(Ucx), &offers, true, false).unwrap(), (Ucx, "named in the settings".into()));
        let error = choose_of(&only(Shm), &offers, true, false).unwrap_err().to_string();
        assert!(error.ends_with("it offers shm, ucx, tcp, allowed here are shm (shm: another host)"), "{error}");
        let error = choose_of(&only(Local), &offers, true, false).unwrap_err().to_string();
        assert!(error.ends_with("allowed here are local (local: the peer doesn't offer it)"), "{error}");
    }
}
