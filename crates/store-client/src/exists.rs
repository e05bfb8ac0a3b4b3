//! Looking without taking: how long a prompt's run in the store is. What a node's published index tells need not be asked
//! for ([`crate::glance`]).
//!
//! Callers who ask a node at the same time share calls: while one is under way, those who come meanwhile wait, and their
//! hashes go together in the next one. Who asks alone waits for nobody. No task does this: of those who wait, one makes the
//! call for all.
//!
//! ```text
//!   a  asks ──────▶ answered, hands the turn to b
//!   b     waits ────────────────▶ asks for b, c, d ──▶ answered, tells c and d
//!   c, d    wait ────────────────────────────────────▶ answered
//! ```

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kvasir_proto::{convert, v1};
use kvasir_types::{BlockHash, Deadline, Incarnation, MemberId, PROTOCOL_VERSION};
use tokio::sync::oneshot;

use crate::{
    Error, Inner, MAX_HASHES, glance,
    placement::{Node, Share},
};

/// Which calls can be one: to the same life of a node, for blocks of the same size.
type Key = (MemberId, Incarnation, u64);

/// Who waits for a turn, and with what.
struct Waiting {
    hashes: Vec<BlockHash>,
    tell: oneshot::Sender<Told>,
}

/// What becomes of waiting.
enum Told {
    /// Another's call asked for these too: for each of them, where it is.
    Tiers(Vec<u8>),
    /// It is this one's turn to ask.
    Ask(Turn),
}

/// Those who ask while somebody else does. A key is there for as long as a call is under way.
#[derive(Default)]
pub(crate) struct Shared(Mutex<HashMap<Key, Vec<Waiting>>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Vec<Waiting>>> {
        // Nothing below can leave the map half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The turn, or what to wait for.
    fn enter(self: &Arc<Self>, key: &Key, hashes: &[BlockHash]) -> Result<Turn, oneshot::Receiver<Told>> {
        let mut asking = self.lock();
        match asking.get_mut(key) {
            None => {
                asking.insert(key.clone(), Vec::new());
                Ok(Turn { shared: Some(Arc::clone(self)), key: key.clone() })
            }
            Some(waiting) => {
                let (tell, told) = oneshot::channel();
                waiting.push(Waiting { hashes: hashes.to_vec(), tell });
                Err(told)
            }
        }
    }
}

/// The right to ask. Dropped, however that comes, it is the next one's: also on its way to somebody who has given up.
struct Turn {
    /// `None` once it was handed on.
    shared: Option<Arc<Shared>>,
    key: Key,
}

impl Turn {
    /// Those who can be asked for together with so many hashes.
    fn others(&self, own: usize) -> Vec<Waiting> {
        let Some(shared) = &self.shared else { return Vec::new() };
        let mut asking = shared.lock();
        let waiting = asking.get_mut(&self.key).expect("a key is there for as long as somebody has the turn");
        let mut room = MAX_HASHES.saturating_sub(own);
        let fit = waiting.iter().take_while(|one| {
            let fits = one.hashes.len() <= room;
            room = room.saturating_sub(one.hashes.len());
            fits
        });
        let fit = fit.count();
        waiting.drain(..fit).collect()
    }

    /// Who waits longest; if nobody does, the turn is nobody's.
    fn next(shared: &Shared, key: &Key) -> Option<Waiting> {
        let mut asking = shared.lock();
        let waiting = asking.get_mut(key).expect("a key is there for as long as somebody has the turn");
        if waiting.is_empty() {
            asking.remove(key);
            return None;
        }
        Some(waiting.remove(0))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(shared) = self.shared.take() else { return };
        while let Some(next) = Self::next(&shared, &self.key) {
            let turn = Self { shared: Some(Arc::clone(&shared)), key: self.key.clone() };
            match next.tell.send(Told::Ask(turn)) {
                // Gave up meanwhile. This turn is not handed on by its own drop, but by the next round here.
                Err(Told::Ask(mut turn)) => drop(turn.shared.take()),
                Ok(()) | Err(Told::Tiers(_)) => return,
            }
        }
    }
}

/// How many blocks, from the first on, one share has; and what went wrong.
pub(crate) async fn exists(
    inner: &Inner,
    share: &Share,
    mut hashes: Vec<BlockHash>,
    block_bytes: u64,
    deadline: Deadline,
) -> Result<usize, Error> {
    let node: &Node = &share.node;
    if let Some(index) = inner.peers.index(node) {
        let seen = glance::glance(inner, node, &index, hashes.iter().copied(), block_bytes, deadline).await.len();
        if seen == hashes.len() {
            return Ok(seen);
        }
        let rest = hashes.split_off(seen);
        return Ok(seen + by_call(inner, node, rest, block_bytes, deadline).await?);
    }
    by_call(inner, node, hashes, block_bytes, deadline).await
}

/// The same, by asking.
async fn by_call(
    inner: &Inner,
    node: &Node,
    hashes: Vec<BlockHash>,
    block_bytes: u64,
    deadline: Deadline,
) -> Result<usize, Error> {
    let key = (node.id.clone(), node.incarnation, block_bytes);
    let turn = match inner.shared.enter(&key, &hashes) {
        Ok(turn) => Some(turn),
        Err(told) => match tokio::time::timeout(deadline.remaining(), told).await {
            Ok(Ok(Told::Tiers(tiers))) => return Ok(run(&tiers)),
            Ok(Ok(Told::Ask(turn))) => Some(turn),
            // Whoever asked for all has failed or is gone: each for himself, then.
            Ok(Err(_)) => None,
            Err(_) => return Err(Error::Timeout { member: node.id.clone(), waited: deadline.remaining() }),
        },
    };
    let others = turn.as_ref().map(|turn| turn.others(hashes.len())).unwrap_or_default();
    let asked: Vec<BlockHash> = hashes.iter().chain(others.iter().flat_map(|one| &one.hashes)).copied().collect();
    let tiers = ask(inner, node, &asked, block_bytes, deadline).await?;
    // Others go on while the answers are told.
    drop(turn);
    let (own, mut rest) = tiers.split_at(hashes.len());
    for one in others {
        let (its, behind) = rest.split_at(one.hashes.len());
        rest = behind;
        // One who gave up meanwhile wants no answer.
        let _ = one.tell.send(Told::Tiers(its.to_vec()));
    }
    Ok(run(own))
}

async fn ask(
    inner: &Inner,
    node: &Node,
    hashes: &[BlockHash],
    block_bytes: u64,
    deadline: Deadline,
) -> Result<Vec<u8>, Error> {
    let message = v1::ExistsRequest {
        protocol_version: PROTOCOL_VERSION,
        block_bytes,
        hashes: convert::pack16(hashes.iter().map(|hash| &hash.0)),
        index: inner.peers.index(node).is_none(),
    };
    let call = async |mut client: v1::store_client::StoreClient<_>| client.exists(message).await;
    let v1::ExistsResponse { tiers, index } = inner.peers.call(node, deadline, call).await?;
    glance::told(inner, node, index.as_ref());
    if tiers.len() == hashes.len() {
        return Ok(tiers.into());
    }
    Err(Error::Count { member: node.id.clone(), asked: hashes.len(), got: tiers.len() })
}

/// Those that are somewhere, from the first on.
fn run(tiers: &[u8]) -> usize {
    tiers.iter().take_while(|&&tier| tier != 0).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        ("kv-0".parse().unwrap(), Incarnation(1), 4096)
    }

    fn hashes(count: usize) -> Vec<BlockHash> {
        vec![BlockHash([7; 16]); count]
    }

    fn first(shared: &Arc<Shared>) -> Turn {
        shared.enter(&key(), &hashes(1)).unwrap_or_else(|_| panic!("somebody asks"))
    }

    fn waits(shared: &Arc<Shared>, blocks: usize) -> oneshot::Receiver<Told> {
        shared.enter(&key(), &hashes(blocks)).err().expect("nobody asks")
    }

    #[test]
    fn one_asks_at_a_time_and_takes_with_it_what_fits() {
        let shared = Arc::default();
        let turn = first(&shared);
        let mut told: Vec<_> = (0..12).map(|_| waits(&shared, 100)).collect();
        assert!(shared.enter(&(key().0, key().1, 1), &hashes(1)).is_ok(), "other sizes are asked for apart");
        assert_eq!(turn.others(100).len(), 9, "1024 in one call");
        drop(turn);
        // The nine were dropped unanswered; the tenth has the turn.
        assert!(told[..9].iter_mut().all(|told| told.try_recv().is_err()));
        assert!(told[10].try_recv().is_err());
        assert!(matches!(told[9].try_recv(), Ok(Told::Ask(turn)) if turn.others(100).len() == 2));
    }

    #[test]
    fn the_turn_passes_over_those_who_gave_up_and_ends_with_the_last() {
        let shared = Arc::default();
        let turn = first(&shared);
        drop(waits(&shared, 1));
        let mut third = waits(&shared, 1);
        let (unread, mut fifth) = (waits(&shared, 1), waits(&shared, 1));
        drop(turn);
        drop(third.try_recv());
        assert!(fifth.try_recv().is_err(), "it is the fourth's turn");
        drop(unread);
        assert!(matches!(fifth.try_recv(), Ok(Told::Ask(_))), "who gave up with the turn in hand hands it on");
        assert!(shared.lock().is_empty());
        drop(first(&shared));
    }
}
