//! Finished blocks that wait to be written: in order, so many at most, the oldest forgotten first.

use std::{collections::VecDeque, ops::Range, sync::Arc};

use kvasir_rpc::trace::Here;
use kvasir_types::{BlockHash, RequestId};

/// Blocks of one chain.
pub(super) struct Entry<S> {
    pub(super) request: RequestId,
    /// Whose they are; empty: nobody's in particular.
    pub(super) tenant: Arc<str>,
    /// Names, from the first block of the chain on: where a block goes depends on those before it.
    pub(super) chain: Arc<[BlockHash]>,
    /// The blocks to be written.
    pub(super) range: Range<usize>,
    /// Where their bytes are.
    pub(super) source: S,
    /// Whose doing it is.
    pub(super) trace: Here,
}

impl<S: Clone> Entry<S> {
    /// Takes the first blocks out, at most so many.
    fn split(&mut self, limit: usize) -> Self {
        let end = self.range.end.min(self.range.start + limit);
        let first = Self {
            request: self.request.clone(),
            tenant: Arc::clone(&self.tenant),
            chain: Arc::clone(&self.chain),
            range: self.range.start..end,
            source: self.source.clone(),
            trace: self.trace.clone(),
        };
        self.range.start = end;
        first
    }
}

/// The queue.
pub(super) struct Queue<S> {
    entries: VecDeque<Entry<S>>,
    blocks: usize,
    limit: usize,
}

impl<S: Clone> Queue<S> {
    /// Of so many blocks at most.
    pub(super) fn new(limit: usize) -> Self {
        Self { entries: VecDeque::new(), blocks: 0, limit }
    }

    /// Blocks that wait.
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// The last entry waits from now on. The blocks for which there was no room: the oldest, and of an entry that is too
    /// long for the queue its end, which is of no use without its beginning.
    pub(super) fn push(&mut self, mut entry: Entry<S>) -> usize {
        let all = self.blocks + entry.range.len();
        entry.range.end = entry.range.end.min(entry.range.start + self.limit);
        self.blocks += entry.range.len();
        self.entries.push_back(entry);
        while self.blocks > self.limit {
            let Some(oldest) = self.entries.pop_front() else { break };
            self.blocks -= oldest.range.len();
        }
        all - self.blocks
    }

    /// The block before those of the last entry joins them, if it has that name and `grow` can add it to where their bytes
    /// are. False: it needs an entry of its own.
    pub(super) fn join(&mut self, name: BlockHash, grow: impl FnOnce(&mut S) -> bool) -> bool {
        let Some(last) = self.entries.back_mut() else { return false };
        let before = last.range.start.checked_sub(1).filter(|&before| last.chain[before] == name);
        let joined = before.is_some() && self.blocks < self.limit && grow(&mut last.source);
        if joined {
            last.range.start -= 1;
            self.blocks += 1;
        }
        joined
    }

    /// The next blocks, of one entry, at most so many.
    pub(super) fn pop(&mut self, limit: usize) -> Option<Entry<S>> {
        let entry = self.entries.front_mut()?;
        let first = entry.split(limit.max(1));
        if entry.range.is_empty() {
            self.entries.pop_front();
        }
        self.blocks -= first.range.len();
        Some(first)
    }

    /// Gives up the rest of what was popped last, if it still waits: its beginning is gone. How many blocks.
    pub(super) fn give_up(&mut self, chain: &Arc<[BlockHash]>) -> usize {
        match self.entries.front() {
            Some(entry) if Arc::ptr_eq(&entry.chain, chain) => {
                let rest = entry.range.len();
                self.entries.pop_front();
                self.blocks -= rest;
                rest
            }
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: u8, range: Range<usize>) -> Entry<u8> {
        let chain = vec![BlockHash([name; 16]); range.end].into();
        Entry {
            request: "test".parse().unwrap(),
            tenant: "".into(),
            chain,
            range,
            source: name,
            trace: Here::nowhere(),
        }
    }

    fn drain(queue: &mut Queue<u8>, limit: usize) -> Vec<(u8, Range<usize>)> {
        std::iter::from_fn(|| queue.pop(limit)).map(|entry| (entry.source, entry.range)).collect()
    }

    #[test]
    fn entries_leave_in_order_and_in_pieces() {
        let mut queue = Queue::new(100);
        assert_eq!(queue.push(entry(1, 2..7)) + queue.push(entry(2, 0..2)), 0);
        assert_eq!(queue.blocks(), 7);
        assert_eq!(drain(&mut queue, 3), [(1, 2..5), (1, 5..7), (2, 0..2)]);
        assert_eq!(queue.blocks(), 0);
    }

    #[test]
    fn the_oldest_make_room() {
        let mut queue = Queue::new(10);
        assert_eq!(queue.push(entry(1, 0..6)), 0);
        assert_eq!(queue.push(entry(2, 0..4)), 0);
        assert_eq!(queue.push(entry(3, 0..1)), 6);
        assert_eq!(queue.push(entry(4, 5..30)), 4 + 1 + 15, "of a long one the beginning stays");
        assert_eq!(drain(&mut queue, 100), [(4, 5..15)]);
    }

    #[test]
    fn blocks_that_come_last_first_are_one_entry() {
        let name = |name: usize| BlockHash([name as u8; 16]);
        let mut queue = Queue::new(4);
        let chain: Arc<[BlockHash]> = (0..9).map(name).collect();
        let entry = Entry { chain, range: 8..9, ..entry(0, 0..1) };
        assert!(!queue.join(name(8), |_| true), "nothing to join");
        queue.push(entry);
        assert!(!queue.join(name(6), |_| true), "not the one before");
        assert!(!queue.join(name(7), |_| false));
        assert!((5..8).rev().all(|block| queue.join(name(block), |_| true)));
        assert!(!queue.join(name(4), |_| true), "the queue is full");
        assert_eq!((queue.blocks(), drain(&mut queue, 3)), (4, vec![(0, 5..8), (0, 8..9)]));
    }

    #[test]
    fn what_lost_its_beginning_is_given_up() {
        let mut queue = Queue::new(100);
        queue.push(entry(1, 0..9));
        queue.push(entry(2, 0..9));
        let first = queue.pop(4).unwrap();
        assert_eq!(queue.give_up(&first.chain), 5);
        let second = queue.pop(9).unwrap();
        assert_eq!((second.source, queue.give_up(&second.chain), queue.blocks()), (2, 0, 0));
    }
}
