//! Nodes tell one another what they have learned about which blocks come back.
//!
//! A prompt's blocks lie on many nodes and are of use only together. Nodes that each learn for themselves give up different
//! prompts, and what they know is used up by that (docs/eviction.md). So each asks the others, now and then, what they have
//! counted, and counts it with its own. Nothing is counted twice: a node tells only what it has counted itself, who asks keeps
//! the last answer of each member, and forgets it with the member.
//!
//! Answers come from outside: they are bounded, decoded with care, and spoil the order of eviction at worst. Without any,
//! a node goes on with what it knows.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use kvasir_cluster::View;
use kvasir_kv_cache::Learned;
use kvasir_proto::v1::{self, store_client::StoreClient};
use kvasir_runtime::Shutdown;
use kvasir_types::{Incarnation, MemberId, PROTOCOL_VERSION, Role};
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::{node::Node, store::BlockBytes};

/// Block sizes of which counts are told; a store has one for each model.
const MAX_SIZES: usize = 4;
/// Bound on an answer.
const MAX_ANSWER_BYTES: usize = MAX_SIZES * (Learned::MAX_BYTES + 64);
/// Nodes asked in one round; in a larger cluster it takes several until each was asked.
const MAX_ASKED: usize = 16;
/// Of those, asked at the same time.
const MAX_CALLS: usize = 4;
/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(2);

/// What this node tells: its own counts, of the sizes it has most blocks of.
pub(crate) fn told(node: &Node) -> v1::LearnedResponse {
    let learned = node.lock().store.learned(MAX_SIZES);
    let size = |(BlockBytes(block_bytes), learned): (BlockBytes, Learned)| v1::LearnedOfSize {
        block_bytes,
        counts: learned.encode().into(),
    };
    v1::LearnedResponse { sizes: learned.into_iter().map(size).collect() }
}

/// What another node said last.
struct Other {
    incarnation: Incarnation,
    channel: Channel,
    /// As it came: much smaller than decoded. Good ones only.
    counts: Vec<(BlockBytes, Vec<u8>)>,
}

/// Who asks.
pub(crate) struct Exchange {
    pub(crate) id: MemberId,
    pub(crate) node: Arc<Node>,
    pub(crate) interval: Duration,
}

impl Exchange {
    /// Asks whoever is there, again and again until shutdown.
    pub(crate) async fn run(self, view: watch::Receiver<Arc<View>>, shutdown: Shutdown) {
        let (mut others, mut turn) = (HashMap::new(), 0);
        loop {
            // Not all at the same moment, also if all were started by one hand.
            let part = 0.75 + (kvasir_runtime::random_u64() % 512) as f64 / 1024.0;
            tokio::time::timeout(self.interval.mul_f64(part), shutdown.wait()).await.ok();
            if shutdown.is_triggered() {
                return;
            }
            self.meet(&view.borrow().clone(), &mut others);
            self.ask(&mut others, turn).await;
            turn += MAX_ASKED;
            self.hear(&others);
        }
    }

    /// Forgets who is gone, and gets to know who has come.
    fn meet(&self, view: &View, others: &mut HashMap<MemberId, Other>) {
        let members: HashMap<_, _> = view
            .role(Role::KvStore)
            .filter(|member| member.id != self.id && member.protocol == PROTOCOL_VERSION)
            .map(|member| (&member.id, member))
            .collect();
        others.retain(|id, other| members.get(id).is_some_and(|member| member.incarnation == other.incarnation));
        for (id, member) in members {
            if others.contains_key(id) {
                continue;
            }
            match kvasir_rpc::endpoint(&member.grpc) {
                Ok(endpoint) => {
                    let channel = endpoint.connect_timeout(TIMEOUT).connect_lazy();
                    let other = Other { incarnation: member.incarnation, channel, counts: Vec::new() };
                    others.insert(id.clone(), other);
                }
                Err(error) => tracing::debug!(member = %id, error = kvasir_runtime::chain(&error), "no address to ask"),
            }
        }
    }

    /// Asks so many of them, from the `turn`-th on. Who does not answer is believed what it said before.
    async fn ask(&self, others: &mut HashMap<MemberId, Other>, turn: usize) {
        let mut ids: Vec<MemberId> = others.keys().cloned().collect();
        ids.sort_unstable();
        let first = turn % ids.len().max(1);
        ids.rotate_left(first);
        ids.truncate(MAX_ASKED);
        let calls = ids.into_iter().map(|id| {
            let channel = others[&id].channel.clone();
            async move { (id, ask(channel).await) }
        });
        let answers: Vec<_> = stream::iter(calls).buffer_unordered(MAX_CALLS).collect().await;
        for (id, answer) in answers {
            match answer {
                Ok(counts) => {
                    others.get_mut(&id).expect("only known ones were asked").counts = counts;
                }
                Err(reason) => tracing::debug!(member = %id, reason, "what it has learned is not known"),
            }
        }
    }

    /// Has the node count what all of them said with its own.
    fn hear(&self, others: &HashMap<MemberId, Other>) {
        let mut sums: HashMap<BlockBytes, Learned> = HashMap::new();
        for (size, counts) in others.values().flat_map(|other| &other.counts) {
            let learned = Learned::decode(counts).expect("only what can be decoded is kept");
            sums.entry(*size).or_default().add(&learned);
        }
        let heard_from = others.values().filter(|other| !other.counts.is_empty()).count();
        self.node.lock().store.hear(&sums);
        self.node.heard_from.store(heard_from as u64, Ordering::Relaxed);
    }
}

/// What a node has counted, as far as it can be used.
async fn ask(channel: Channel) -> Result<Vec<(BlockBytes, Vec<u8>)>, String> {
    let mut client = StoreClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
    let request = v1::LearnedRequest { protocol_version: PROTOCOL_VERSION };
    let answer = tokio::time::timeout(TIMEOUT, client.learned(request));
    let answer =
        answer.await.map_err(|_| format!("no answer for {TIMEOUT:?}"))?.map_err(|status| status.to_string())?;
    usable(answer.into_inner().sizes)
}

/// The same, of what came from outside; all of an answer is good, or none of it is kept.
fn usable(sizes: Vec<v1::LearnedOfSize>) -> Result<Vec<(BlockBytes, Vec<u8>)>, String> {
    if sizes.len() > MAX_SIZES {
        return Err(format!("counts for {} block sizes", sizes.len()));
    }
    let mut counts: Vec<(BlockBytes, Vec<u8>)> = Vec::new();
    for v1::LearnedOfSize { block_bytes, counts: bytes } in sizes {
        let size = BlockBytes(block_bytes);
        if counts.iter().any(|&(other, _)| other == size) {
            return Err(format!("counts for blocks of {block_bytes} bytes twice"));
        }
        Learned::decode(&bytes).map_err(|error| error.to_string())?;
        counts.push((size, bytes.into()));
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_is_wrong_anywhere_is_not_kept() {
        let good = Learned::default().encode();
        let of = |block_bytes: u64, counts: &[u8]| v1::LearnedOfSize { block_bytes, counts: counts.to_vec().into() };
        assert_eq!(usable(vec![of(1, &good), of(2, &good)]).unwrap().len(), 2);
        assert_eq!(usable(Vec::new()).unwrap(), []);
        let newer = [&[good[0] + 1], &good[1..]].concat();
        for wrong in [
            vec![of(1, &good), of(1, &good)],
            vec![of(1, &good), of(2, &newer)],
            vec![of(1, &good), of(2, &[])],
            vec![of(1, &[good[0], 7])],
            (0..=MAX_SIZES as u64).map(|size| of(size, &good)).collect(),
        ] {
            assert!(usable(wrong.clone()).is_err(), "{wrong:?}");
        }
    }
}
