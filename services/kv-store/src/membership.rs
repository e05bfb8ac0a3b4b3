//! What the node knows of the others, and tells clients that know less.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_cluster::View;
use kvasir_proto::v1;
use kvasir_types::{Epoch, PROTOCOL_VERSION, Role};
use tokio::sync::watch;

/// The node's sight of the cluster. Read by whatever task serves a call; nothing here waits.
pub(crate) struct Membership {
    view: watch::Receiver<Arc<View>>,
    /// Until then others may have blocks that this node has not got yet.
    warm_at: Instant,
}

impl Membership {
    pub(crate) fn new(view: watch::Receiver<Arc<View>>, warm: Duration) -> Self {
        Self { view, warm_at: Instant::now() + warm }
    }

    /// The members of the store, if the node knows a newer view of them than that of this epoch. A caller without any
    /// (epoch 0) does not care.
    pub(crate) fn newer_than(&self, epoch: Epoch) -> Option<v1::StoreView> {
        let view = self.view.borrow();
        (epoch != Epoch::default() && view.epoch > epoch).then(|| wire(&view))
    }

    /// Whether the node joined so lately that those who had its blocks before may not have handed them over yet.
    pub(crate) fn warming(&self, now: Instant) -> bool {
        now < self.warm_at
    }
}

/// The store nodes of a view that speak our protocol.
fn wire(view: &View) -> v1::StoreView {
    let nodes = view.role(Role::KvStore).filter(|member| member.protocol == PROTOCOL_VERSION);
    let member = |member: &kvasir_cluster::Member| {
        let store = member.store.clone().unwrap_or_default();
        v1::StoreMember {
            id: member.id.to_string(),
            incarnation: member.incarnation.0,
            grpc: member.grpc.clone(),
            weight: store.weight,
            zone: store.zone,
            group_blocks: store.group_blocks,
            replicas: store.replicas,
            draining: member.draining,
        }
    };
    v1::StoreView { epoch: view.epoch.0, members: nodes.map(member).collect() }
}
