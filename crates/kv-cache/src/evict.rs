//! Who has to go: the order in which idle things are given up.
//!
//! A policy sees only keys that nobody uses: a key is inserted when its last user leaves, removed when somebody takes it
//! up again, and popped when its place is needed. The owner (block pool, store tier) keeps the values; so one policy
//! serves any of them. A policy may not invent, lose or double keys: `crate::model_tests` holds for every
//! implementation.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

/// An order of eviction over keys that nobody uses at present.
pub trait Evict<K>: Send {
    /// `key` is not used by anybody any more and may be evicted. Inserting a key that is there counts as [`touch`].
    ///
    /// [`touch`]: Evict::touch
    fn insert(&mut self, key: K);

    /// `key`, if it is there, was asked for, but is not held by the one who asked (a store's hit on an unpinned block).
    fn touch(&mut self, key: &K);

    /// `key` is in use again, or gone. Whether it was there.
    fn remove(&mut self, key: &K) -> bool;

    /// Takes out the key that should go first; `None` if there is none.
    fn pop(&mut self) -> Option<K>;

    /// How many keys could be popped.
    fn len(&self) -> usize;

    /// Whether none could.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Least recently used first. Every operation is O(log n) or better.
///
/// Recency is a counter, not a clock: the n-th use is younger than all before it.
#[derive(Debug)]
pub struct Lru<K> {
    uses: u64,
    last_use: HashMap<K, u64>,
    by_age: BTreeMap<u64, K>,
}

impl<K> Default for Lru<K> {
    fn default() -> Self {
        Self { uses: 0, last_use: HashMap::new(), by_age: BTreeMap::new() }
    }
}

impl<K: Clone + Eq + Hash + Send> Evict<K> for Lru<K> {
    fn insert(&mut self, key: K) {
        self.uses += 1;
        if let Some(before) = self.last_use.insert(key.clone(), self.uses) {
            self.by_age.remove(&before);
        }
        self.by_age.insert(self.uses, key);
    }

    fn touch(&mut self, key: &K) {
        if self.last_use.contains_key(key) {
            self.insert(key.clone());
        }
    }

    fn remove(&mut self, key: &K) -> bool {
        self.last_use.remove(key).and_then(|age| self.by_age.remove(&age)).is_some()
    }

    fn pop(&mut self) -> Option<K> {
        let (_, key) = self.by_age.pop_first()?;
        self.last_use.remove(&key);
        Some(key)
    }

    fn len(&self) -> usize {
        self.by_age.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_key_goes_first() {
        let mut lru = Lru::default();
        ["a", "b", "c", "d"].into_iter().for_each(|key| lru.insert(key));
        lru.touch(&"a");
        assert!(lru.remove(&"c"));
        lru.insert("b");
        assert_eq!(std::iter::from_fn(|| lru.pop()).collect::<Vec<_>>(), ["d", "a", "b"]);
    }

    #[test]
    fn a_key_that_is_not_there_is_neither_touched_nor_removed() {
        let mut lru = Lru::default();
        lru.touch(&1);
        assert!(!lru.remove(&1));
        assert_eq!(lru.pop(), None);
        assert!(lru.is_empty());
    }
}
