//! What the client believes of the store's nodes: how blocks are divided among the members it knows.
//!
//! Members are seen through a watch of the metadata, which may lag behind what a node knows. A node whose epoch is greater
//! than that of a request sends its view along; it is **adopted** until the own watch has caught up, for a bounded time:
//! the watch is what counts in the long run.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use kvasir_cluster::{StoreInfo, View};
use kvasir_proto::v1;
use kvasir_types::{Epoch, Incarnation};
use tokio::sync::watch;

use crate::placement::{Node, Odd, Placement};

/// How long a view of a node's is believed while the own watch says otherwise.
const BELIEVED: Duration = Duration::from_secs(10);
/// Most members of a view that is accepted; far above any cluster.
const MAX_MEMBERS: usize = 10_000;
/// Longest address that is accepted.
const MAX_ADDRESS: usize = 512;

/// The placement that goes with the newest view. Asked by whatever task makes a request; the lock is held for as long as
/// it takes to make a placement of a view at worst.
pub(crate) struct Views {
    members: watch::Receiver<Arc<View>>,
    known: Mutex<Known>,
}

struct Known {
    /// What the own placement was made of.
    view: Arc<View>,
    own: Arc<Placement>,
    /// A newer one that a node told, and until when it is believed.
    adopted: Option<(Arc<Placement>, Instant)>,
    /// What was complained about already.
    odd: Vec<Odd>,
}

impl Views {
    pub(crate) fn new(members: watch::Receiver<Arc<View>>) -> Self {
        let none = Arc::new(View::default());
        let own = Arc::new(Placement::of(&none));
        Self { members, known: Mutex::new(Known { view: none, own, adopted: None, odd: Vec::new() }) }
    }

    /// How blocks are divided now, and whether that is news.
    pub(crate) fn placement(&self, now: Instant) -> (Arc<Placement>, bool) {
        let view = self.members.borrow().clone();
        // Nothing below can leave it half changed.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let news = !Arc::ptr_eq(&view, &known.view);
        if news {
            known.own = Arc::new(Placement::of(&view));
            known.view = view;
            known.complain();
        }
        let own = known.own.epoch;
        match &known.adopted {
            Some((adopted, until)) if adopted.epoch > own && now < *until => (adopted.clone(), news),
            Some(_) => {
                known.adopted = None;
                (known.own.clone(), true)
            }
            None => (known.own.clone(), news),
        }
    }

    /// A node knows this view. Whether it is a newer one in which blocks are divided otherwise; an error says why it is
    /// not acceptable.
    pub(crate) fn offer(&self, wire: &v1::StoreView, now: Instant) -> Result<bool, String> {
        let (placement, _) = self.placement(now);
        if Epoch(wire.epoch) <= placement.epoch {
            return Ok(false);
        }
        let newer = Placement::new(Epoch(wire.epoch), nodes(wire)?);
        let same = newer.divides_like(&placement);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if newer.divides_like(&known.own) {
            // Nothing that the own watch does not know; but now it is known to be true for longer.
            known.own = Arc::new(newer);
            known.adopted = None;
        } else {
            known.adopted = Some((Arc::new(newer), now + BELIEVED));
        }
        Ok(!same)
    }
}

impl Known {
    /// Tells of nodes that are set otherwise than others, once.
    fn complain(&mut self) {
        let odd = self.own.odd();
        for Odd { member, key, value, counts } in odd.iter().filter(|odd| !self.odd.contains(odd)) {
            tracing::warn!(%member, key, value, counts, "a store node is set otherwise than most, set it like them");
        }
        self.odd = odd;
    }
}

/// The nodes of a view from outside.
fn nodes(wire: &v1::StoreView) -> Result<Vec<Node>, String> {
    if wire.members.len() > MAX_MEMBERS {
        return Err(format!("{} members, at most {MAX_MEMBERS} are allowed", wire.members.len()));
    }
    let mut nodes = Vec::with_capacity(wire.members.len());
    for member in &wire.members {
        let store = StoreInfo {
            weight: member.weight,
            zone: member.zone.clone(),
            group_blocks: member.group_blocks,
            replicas: member.replicas,
        };
        store.check()?;
        if member.grpc.len() > MAX_ADDRESS {
            return Err(format!("an address of {} bytes", member.grpc.len()));
        }
        nodes.push(Node {
            id: member.id.parse().map_err(|error: kvasir_types::BadId| error.to_string())?,
            incarnation: Incarnation(member.incarnation),
            grpc: member.grpc.clone(),
            store,
            draining: member.draining,
        });
    }
    nodes.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    if nodes.windows(2).any(|pair| pair[0].id == pair[1].id) {
        return Err("a member is named twice".to_owned());
    }
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: &str) -> v1::StoreMember {
        v1::StoreMember {
            id: id.into(),
            incarnation: 1,
            grpc: "127.0.0.1:1".into(),
            weight: 256.0,
            zone: String::new(),
            group_blocks: 32,
            replicas: 1,
            draining: false,
        }
    }

    fn view(epoch: u64, ids: &[&str]) -> v1::StoreView {
        v1::StoreView { epoch, members: ids.iter().map(|id| member(id)).collect() }
    }

    #[test]
    fn a_newer_view_is_adopted_until_the_watch_has_caught_up_or_time_is_over() {
        let (sender, receiver) = watch::channel(Arc::new(View { epoch: Epoch(5), ..View::default() }));
        let (views, now) = (Views::new(receiver), Instant::now());
        let at = |now| {
            let (placement, _) = views.placement(now);
            (placement.epoch, placement.len())
        };
        assert_eq!(views.offer(&view(4, &["a"]), now), Ok(false), "older");
        assert_eq!(views.offer(&view(5, &["a"]), now), Ok(false), "not newer");
        assert_eq!(at(now), (Epoch(5), 0));
        assert_eq!(views.offer(&view(8, &["a", "b"]), now), Ok(true));
        assert_eq!(views.offer(&view(7, &["a"]), now), Ok(false), "older than what was adopted");
        assert_eq!(at(now), (Epoch(8), 2));
        sender.send_replace(Arc::new(View { epoch: Epoch(7), ..View::default() }));
        assert_eq!(at(now), (Epoch(8), 2), "on its way");
        assert_eq!(at(now + BELIEVED), (Epoch(7), 0), "it never came");
        assert_eq!(views.offer(&view(8, &["a"]), now), Ok(true));
        sender.send_replace(Arc::new(View { epoch: Epoch(8), ..View::default() }));
        assert_eq!(at(now), (Epoch(8), 0), "the watch has caught up");
    }

    #[test]
    fn a_newer_view_of_the_same_members_is_no_reason_to_ask_again() {
        let (_sender, receiver) = watch::channel(Arc::new(View { epoch: Epoch(5), ..View::default() }));
        let (views, now) = (Views::new(receiver), Instant::now());
        assert_eq!(views.offer(&view(9, &[]), now), Ok(false));
        assert_eq!(views.placement(now + BELIEVED).0.epoch, Epoch(9), "it stays known");
    }

    #[test]
    fn views_that_could_harm_are_refused_and_change_nothing() {
        let (_sender, receiver) = watch::channel(Arc::new(View::default()));
        let (views, now) = (Views::new(receiver), Instant::now());
        let bad = |change: fn(&mut v1::StoreMember)| {
            let mut bad = view(9, &["a"]);
            change(&mut bad.members[0]);
            bad
        };
        for bad in [
            view(9, &["a", "a"]),
            bad(|member| member.id = "a/b".into()),
            bad(|member| member.weight = f64::NAN),
            bad(|member| member.group_blocks = 0),
            bad(|member| member.replicas = 9),
            bad(|member| member.grpc = "x".repeat(513)),
            v1::StoreView { epoch: 9, members: vec![member("a"); MAX_MEMBERS + 1] },
        ] {
            assert!(views.offer(&bad, now).is_err());
        }
        assert_eq!((views.placement(now).0.epoch, views.placement(now).0.len()), (Epoch(0), 0));
    }
}
