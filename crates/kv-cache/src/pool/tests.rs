//! The pool's laws one by one; `crate::model_tests` has them all at once.

use std::sync::{Arc, Mutex};

use super::*;

fn hash(name: u8) -> BlockHash {
    BlockHash([name; 16])
}

fn name(name: u8, parent: u8) -> Name {
    Name { stored: Stored { hash: hash(name), parent: hash(parent), group: 0 }, chained: true, first: parent == 0 }
}

fn sealed(pool: &mut BlockPool, block: u8, parent: u8) -> Sealed {
    let filling = pool.take().unwrap();
    pool.seal(filling, name(block, parent))
}

/// Seals fresh blocks under the names, each behind the one before it, and gives them back tail first.
fn cache(pool: &mut BlockPool, names: &[u8]) {
    let chain: Vec<_> = names.iter().zip([&0].into_iter().chain(names)).map(|(&n, &p)| sealed(pool, n, p)).collect();
    chain.into_iter().rev().for_each(|share| pool.release(share));
}

fn found(pool: &BlockPool, names: &[u8]) -> Vec<u8> {
    names.iter().copied().filter(|&name| pool.find(&hash(name)).is_some()).collect()
}

fn counts(pool: &BlockPool) -> (usize, usize, usize) {
    let Counts { total, free, cached, in_use, .. } = pool.counts();
    assert_eq!(free + cached + in_use, total);
    (free, cached, in_use)
}

#[test]
fn a_record_is_as_small_as_the_page_says() {
    assert!(size_of::<Record>() <= 60, "{}", size_of::<Record>());
}

#[test]
fn a_block_being_written_is_not_found() {
    let mut pool = BlockPool::new(2, 0);
    let block = pool.take().unwrap();
    assert_eq!(pool.find(&hash(1)), None);
    assert_eq!(pool.counts().reserved, 1);
    pool.give_back(block);
    assert_eq!(counts(&pool), (2, 0, 0));
}

#[test]
fn a_landing_block_is_nobodys_before_its_fence() {
    let mut pool = BlockPool::new(1, 0);
    let block = pool.take().unwrap();
    let landing = pool.open(block);
    assert_eq!((pool.take(), pool.counts().landing, pool.counts().reserved), (None, 1, 0));
    let block = pool.fence(landing);
    let share = pool.seal(block, name(1, 0));
    assert_eq!(pool.find(&hash(1)), Some(false));
    pool.release(share);
    assert_eq!(pool.find(&hash(1)), Some(true));
}

#[test]
fn the_tail_of_a_chain_is_evicted_before_its_head() {
    let mut pool = BlockPool::new(3, 0);
    cache(&mut pool, &[1, 2, 3]);
    for left in [&[1, 2][..], &[1], &[]] {
        let _taken = pool.take().unwrap();
        assert_eq!(found(&pool, &[1, 2, 3]), left);
    }
}

#[test]
fn a_head_that_was_used_long_ago_outlives_the_tail_that_hangs_on_it() {
    let mut pool = BlockPool::new(4, 0);
    let head = sealed(&mut pool, 1, 0);
    let tail = sealed(&mut pool, 2, 1);
    pool.release(head);
    cache(&mut pool, &[7]);
    pool.release(tail);
    // By recency alone: 1, 7, 2. But 2 hangs on 1.
    let _free = pool.take().unwrap();
    let order: Vec<_> = (0..3)
        .map(|_| {
            let before = found(&pool, &[1, 2, 7]);
            let _taken = pool.take().unwrap();
            let after = found(&pool, &[1, 2, 7]);
            before.into_iter().find(|name| !after.contains(name)).unwrap()
        })
        .collect();
    assert_eq!(order, [7, 2, 1]);
}

#[test]
fn a_pinned_block_is_never_evicted() {
    let mut pool = BlockPool::new(2, 0);
    cache(&mut pool, &[1]);
    let pinned = pool.pin(&hash(1)).unwrap();
    let taken = pool.take().unwrap();
    assert_ne!(taken.id(), pinned.id());
    assert_eq!((pool.take(), pool.take_many(1)), (None, None));
    pool.release(pinned);
    assert!(pool.take().is_some());
}

#[test]
fn shares_are_counted() {
    let mut pool = BlockPool::new(1, 0);
    let a = sealed(&mut pool, 1, 0);
    let b = pool.share(&a);
    let c = pool.pin(&hash(1)).unwrap();
    assert_eq!(pool.counts().shared, 1);
    pool.release(a);
    pool.release(c);
    assert_eq!((pool.counts().shared, counts(&pool)), (0, (0, 0, 1)));
    pool.release(b);
    assert_eq!(counts(&pool), (0, 1, 0));
}

#[test]
fn a_nameless_block_is_shared_but_never_found_nor_kept() {
    let mut pool = BlockPool::new(1, 8);
    let block = pool.take().unwrap();
    let a = pool.seal_nameless(block);
    let b = pool.share(&a);
    pool.release(a);
    assert_eq!(counts(&pool), (0, 0, 1));
    pool.release(b);
    assert_eq!(counts(&pool), (1, 0, 0));
    assert_eq!(pool.drain_events(), Batch::default());
}

#[test]
fn a_twin_keeps_its_block_and_frees_it_when_released() {
    let mut pool = BlockPool::new(2, 0);
    let (a, b) = (sealed(&mut pool, 1, 0), sealed(&mut pool, 1, 0));
    assert_ne!(a.id(), b.id());
    assert_eq!(pool.pin(&hash(1)).map(|share| (share.id(), pool.release(share)).0), Some(a.id()));
    pool.release(b);
    assert_eq!(counts(&pool), (1, 0, 1));
    pool.release(a);
    assert_eq!(counts(&pool), (1, 1, 0));
}

#[test]
fn a_twin_takes_the_place_of_an_evicted_block() {
    let mut pool = BlockPool::new(2, 8);
    let (a, b) = (sealed(&mut pool, 1, 0), sealed(&mut pool, 1, 0));
    let twin = b.id();
    pool.release(a);
    let evicting = pool.take().unwrap();
    assert_eq!(pool.pin(&hash(1)), None);
    pool.release(b);
    assert_eq!(pool.pin(&hash(1)).map(|share| (share.id(), pool.release(share)).0), Some(twin));
    pool.give_back(evicting);
    let stored = CacheEvent::Stored(name(1, 0).stored);
    assert_eq!(pool.drain_events().events, [stored, CacheEvent::Removed(hash(1)), stored]);
}

#[test]
fn clearing_forgets_what_nobody_holds_and_nothing_else() {
    let mut pool = BlockPool::new(3, 0);
    cache(&mut pool, &[1, 2]);
    let held = pool.pin(&hash(1)).unwrap();
    pool.clear_cached();
    assert_eq!((counts(&pool), found(&pool, &[1, 2])), ((2, 0, 1), vec![1]));
    pool.release(held);
}

/// What left: its name, and the chain it was in.
type Left = (u8, Option<Vec<u8>>);

/// Writes it down.
#[derive(Debug, Default)]
struct Diary(Arc<Mutex<Vec<Left>>>);

impl OnEvict for Diary {
    fn evicted(&mut self, leaving: &Leaving<'_>) {
        let names = |chain: Vec<BlockHash>| chain.into_iter().map(|hash| hash.0[0]).collect();
        self.0.lock().unwrap().push((leaving.stored().hash.0[0], leaving.chain().map(names)));
    }
}

#[test]
fn blocks_that_leave_are_told_with_the_chain_they_are_in() {
    let mut pool = BlockPool::new(4, 0);
    let told = Arc::new(Mutex::new(Vec::new()));
    pool.on_evict(Some(Box::new(Diary(Arc::clone(&told)))));
    cache(&mut pool, &[1, 2, 3]);
    let last = pool.take().unwrap();
    assert!(told.lock().unwrap().is_empty(), "there was a free one");
    let taken = pool.take_many(3).unwrap();
    let expected = [(3, Some(vec![1, 2, 3])), (2, Some(vec![1, 2])), (1, Some(vec![1]))];
    assert_eq!(*told.lock().unwrap(), expected);
    told.lock().unwrap().clear();

    // One whose parent is nowhere.
    let orphan = pool.seal(last, name(9, 8));
    taken.into_iter().for_each(|block| pool.give_back(block));
    pool.release(orphan);
    pool.clear_cached();
    assert!(told.lock().unwrap().is_empty(), "nobody needed its place");
    let orphan = sealed(&mut pool, 9, 8);
    pool.release(orphan);
    let _all = pool.take_many(4).unwrap();
    assert_eq!(*told.lock().unwrap(), [(9, None)]);
}
