//! Which workers hold which beginning of a prompt.
//!
//! ```text
//!   feeds (one task a worker) ──stored, removed──▶ 1024 shards, each under a lock of its own ◀──lookup── requests
//! ```
//!
//! A lookup takes the locks of a few blocks' shards at a time, so that the processor waits for the memory of all of them at once
//! (in the order of the shards: then nobody waits for somebody who waits for him); a change takes one. Each is held for some
//! hundred nanoseconds: nobody waits for long, and for whom it does is one in a hundred. (A shard that grows copies its part of the table: with ten million blocks
//! 80 kB.) What a lookup says is an estimate by the time it is used, so it need not see all shards at the same moment.
//!
//! A worker that leaves, or begins anew, is swept out: every shard is looked through, which for ten million blocks takes tens
//! of milliseconds in all and spares a list of its blocks for every worker. It is done shard by shard
//! ([`Index::sweep`]), so that whoever does it can let others go first.

use std::sync::{
    Mutex, PoisonError, RwLock, RwLockReadGuard,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use kvasir_types::BlockHash;

use super::table::{Changed, Holders, MAX_WORKERS, TAG_BITS, Table};

const SHARD_BITS: u32 = 10;
/// Parts of the index.
pub const SHARDS: usize = 1 << SHARD_BITS;
/// Blocks that are looked for at once: about as many lines of memory as a processor's core waits for together.
const AT_ONCE: usize = 16;

/// A worker's number in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Number(pub u32);

/// Who holds what.
#[derive(Debug)]
pub struct Index {
    shards: Box<[Shard]>,
    blocks: AtomicU64,
    held: AtomicU64,
    numbers: Mutex<Numbers>,
}

/// A line of its own, so that locks of neighbours do not disturb one another.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Shard(RwLock<Table>);

/// Numbers that are taken. Written when workers come and go.
#[derive(Debug, Default)]
struct Numbers {
    next: u32,
    free: Vec<u32>,
}

/// Room for a lookup, to be used again for the next one, and its answer.
#[derive(Clone, Debug, Default)]
pub struct Lookup {
    alive: Vec<u64>,
    found: Vec<(Number, u32)>,
}

impl Lookup {
    /// The workers that hold the prompt's first block, and how many blocks from there on.
    pub fn found(&self) -> &[(Number, u32)] {
        &self.found
    }

    /// Nobody.
    pub fn clear(&mut self) {
        self.found.clear();
    }

    fn drop_word(&mut self, at: usize, mut bits: u64, depth: u32) {
        while bits != 0 {
            self.found.push((Number(at as u32 * 64 + bits.trailing_zeros()), depth));
            bits &= bits - 1;
        }
    }

    /// Keeps those who hold the next block, too; false: nobody is left.
    fn step(&mut self, holders: Holders<'_>, depth: u32) -> bool {
        let mut left = false;
        match holders {
            Holders::Few(workers) => {
                for at in 0..self.alive.len() {
                    let bits = self.alive[at];
                    if bits != 0 {
                        let here = workers.iter().filter(|&&worker| worker as usize / 64 == at);
                        let kept = bits & here.fold(0, |bits, worker| bits | 1 << (worker % 64));
                        self.alive[at] = kept;
                        left |= kept != 0;
                        self.drop_word(at, bits & !kept, depth);
                    }
                }
            }
            Holders::Many(map) => {
                for at in 0..self.alive.len() {
                    let bits = self.alive[at];
                    let kept = bits & map.get(at).copied().unwrap_or(0);
                    self.alive[at] = kept;
                    left |= kept != 0;
                    self.drop_word(at, bits & !kept, depth);
                }
            }
        }
        left
    }

    fn start(&mut self, holders: Holders<'_>) {
        match holders {
            Holders::Few(workers) => {
                let most = workers.iter().copied().max().unwrap_or(0);
                self.alive.resize(most as usize / 64 + 1, 0);
                workers.iter().for_each(|&worker| self.alive[worker as usize / 64] |= 1 << (worker % 64));
            }
            Holders::Many(map) => self.alive.extend_from_slice(map),
        }
    }

    fn end(&mut self, depth: u32) {
        for at in 0..self.alive.len() {
            let bits = std::mem::take(&mut self.alive[at]);
            self.drop_word(at, bits, depth);
        }
        self.alive.clear();
    }
}

impl Default for Index {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            blocks: AtomicU64::new(0),
            held: AtomicU64::new(0),
            numbers: Mutex::default(),
        }
    }
}

impl Index {
    /// A number for a worker; `None`: there are no more.
    pub fn join(&self) -> Option<Number> {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(free) = numbers.free.pop() {
            return Some(Number(free));
        }
        let number = numbers.next;
        (number < MAX_WORKERS).then(|| {
            numbers.next += 1;
            Number(number)
        })
    }

    /// The number is free again. Its blocks must have been swept out.
    pub fn leave(&self, number: Number) {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).free.push(number.0);
    }

    /// The worker holds this block.
    pub fn insert(&self, hash: &BlockHash, worker: Number) {
        let (shard, tag) = place(hash);
        let changed = self.write(shard, |table| table.insert(tag, worker.0));
        if changed == Changed::Blocks {
            self.blocks.fetch_add(1, Relaxed);
        }
        if changed != Changed::No {
            self.held.fetch_add(1, Relaxed);
        }
    }

    /// The worker holds this block no more.
    pub fn remove(&self, hash: &BlockHash, worker: Number) {
        let (shard, tag) = place(hash);
        let changed = self.write(shard, |table| table.remove(tag, worker.0));
        if changed == Changed::Blocks {
            self.blocks.fetch_sub(1, Relaxed);
        }
        if changed != Changed::No {
            self.held.fetch_sub(1, Relaxed);
        }
    }

    /// The worker holds nothing of this shard (below [`SHARDS`]) any more.
    pub fn sweep(&self, shard: usize, worker: Number) {
        let (gone, shared) = self.write(shard, |table| table.forget(worker.0));
        self.blocks.fetch_sub(gone as u64, Relaxed);
        self.held.fetch_sub((gone + shared) as u64, Relaxed);
    }

    /// Who holds how many of these blocks, from the first on; added to what was found before. No more of the chain is asked
    /// for than somebody holds, and a few blocks: it can be made as it is asked for.
    pub fn lookup(&self, mut chain: impl Iterator<Item = BlockHash>, lookup: &mut Lookup) {
        // Of many prompts nobody has anything.
        let (mut depth, mut at_once) = (0, 1);
        loop {
            let mut places = [(0, 0); AT_ONCE];
            let mut count = 0;
            for (to, hash) in places[..at_once].iter_mut().zip(&mut chain) {
                *to = place(&hash);
                count += 1;
            }
            let held = self.look(&places[..count], depth, lookup);
            depth += held as u32;
            if held < at_once {
                break; // nobody has more, or there is no more
            }
            at_once = (at_once * 4).min(AT_ONCE);
        }
        lookup.end(depth);
    }

    /// Looks for the next few blocks: how many of them somebody has who has all before.
    fn look(&self, places: &[(usize, u64)], depth: u32, lookup: &mut Lookup) -> usize {
        // Shard and place of each, as one small number.
        let mut order = [0u32; AT_ONCE];
        let order = &mut order[..places.len()];
        for (at, (to, (shard, _))) in order.iter_mut().zip(places).enumerate() {
            *to = (*shard * AT_ONCE + at) as u32;
        }
        order.sort_unstable();
        let mut locks: [Option<RwLockReadGuard<'_, Table>>; AT_ONCE] = [const { None }; AT_ONCE];
        let (mut lock_of, mut taken, mut last) = ([0; AT_ONCE], 0, usize::MAX);
        for &mut one in order {
            let (shard, at) = (one as usize / AT_ONCE, one as usize % AT_ONCE);
            if shard != last {
                locks[taken] = Some(self.shards[shard].0.read().unwrap_or_else(PoisonError::into_inner));
                (taken, last) = (taken + 1, shard);
            }
            lock_of[at] = taken - 1;
        }
        let tables = || lock_of.iter().map_while(|&lock| locks[lock].as_deref()).zip(places);
        // All are sent for before the first is waited for.
        std::hint::black_box(tables().fold(0, |all, (table, (_, tag))| all ^ table.touch(*tag)));
        let held = |(at, (table, (_, tag))): (usize, (&Table, &(usize, u64)))| {
            let depth = depth + at as u32;
            let left = table.holders(*tag, |holders| match depth {
                0 => {
                    lookup.start(holders);
                    true
                }
                _ => lookup.step(holders, depth),
            });
            left == Some(true)
        };
        tables().enumerate().map(held).take_while(|held| *held).count()
    }

    /// Blocks that are somewhere.
    pub fn blocks(&self) -> u64 {
        self.blocks.load(Relaxed)
    }

    /// The same, counted once for each worker that holds them.
    pub fn held(&self) -> u64 {
        self.held.load(Relaxed)
    }

    /// Bytes that it takes. Looks at every shard.
    pub fn bytes(&self) -> usize {
        let read = |shard: &Shard| shard.0.read().unwrap_or_else(PoisonError::into_inner).bytes();
        self.shards.iter().map(read).sum()
    }

    fn write<T>(&self, shard: usize, change: impl FnOnce(&mut Table) -> T) -> T {
        change(&mut self.shards[shard].0.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A block's shard and tag: hashes are random bits, but tests make their own.
fn place(hash: &BlockHash) -> (usize, u64) {
    let number = u128::from_le_bytes(hash.0);
    let mixed = ((number as u64) ^ ((number >> 64) as u64).rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    ((mixed >> (64 - SHARD_BITS)) as usize, mixed >> (64 - SHARD_BITS - TAG_BITS) & ((1 << TAG_BITS) - 1))
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    fn name(number: u16) -> BlockHash {
        BlockHash(u128::from(number).to_le_bytes())
    }

    #[derive(Clone, Debug)]
    enum Change {
        Insert(u16, u32),
        Remove(u16, u32),
        Sweep(u32),
    }

    fn changes() -> impl Strategy<Value = Vec<Change>> {
        let worker = prop_oneof![0u32..12, Just(70), Just(200), Just(5000)]; // the last is too wide for a pair
        let change = (0u8..40, 0u16..40, worker).prop_map(|(kind, block, worker)| match kind {
            0 => Change::Sweep(worker),
            1..14 => Change::Remove(block, worker),
            _ => Change::Insert(block, worker),
        });
        prop::collection::vec(change, 0..400)
    }

    /// The ten-line index: for each worker what it holds.
    type Oracle = HashMap<u32, HashSet<u16>>;

    fn naive(oracle: &Oracle, chain: &[u16]) -> HashMap<u32, u32> {
        let depth = |held: &HashSet<u16>| chain.iter().take_while(|block| held.contains(*block)).count() as u32;
        oracle.iter().map(|(&worker, held)| (worker, depth(held))).filter(|(_, depth)| *depth > 0).collect()
    }

    proptest! {
        #[test]
        fn it_says_what_a_naive_index_says(changes in changes(), chain in prop::collection::vec(0u16..40, 0..20)) {
            let (index, mut oracle) = (Index::default(), Oracle::new());
            for change in changes {
                match change {
                    Change::Insert(block, worker) => {
                        index.insert(&name(block), Number(worker));
                        oracle.entry(worker).or_default().insert(block);
                    }
                    Change::Remove(block, worker) => {
                        index.remove(&name(block), Number(worker));
                        oracle.entry(worker).or_default().remove(&block);
                    }
                    Change::Sweep(worker) => {
                        (0..SHARDS).for_each(|shard| index.sweep(shard, Number(worker)));
                        oracle.remove(&worker);
                    }
                }
            }
            let mut lookup = Lookup::default();
            // Twice with the same room: nothing of the first is left in the second.
            for chain in [&chain[..], &chain[chain.len() / 2..]] {
                let hashes: Vec<BlockHash> = chain.iter().map(|&block| name(block)).collect();
                lookup.clear();
                index.lookup(hashes.iter().copied(), &mut lookup);
                let found: HashMap<u32, u32> = lookup.found().iter().map(|(worker, depth)| (worker.0, *depth)).collect();
                prop_assert_eq!(found.len(), lookup.found().len(), "each worker is told once");
                prop_assert_eq!(found, naive(&oracle, chain));
            }
            let blocks: HashSet<u16> = oracle.values().flatten().copied().collect();
            prop_assert_eq!(index.blocks(), blocks.len() as u64);
            prop_assert_eq!(index.held(), oracle.values().map(|held| held.len() as u64).sum::<u64>());
        }

        #[test]
        fn one_crowded_shard_forgets_nothing(changes in prop::collection::vec((any::<bool>(), 0u64..300, 0u32..9), 0..900)) {
            // Tags that crowd at both ends of the table: probing goes round its end.
            let tag = |number: u64| if number.is_multiple_of(2) { number } else { (1 << TAG_BITS) - 1 - number };
            let (mut table, mut oracle) = (Table::default(), HashSet::new());
            for (add, number, worker) in changes {
                if add {
                    table.insert(tag(number), worker);
                    oracle.insert((number, worker));
                } else {
                    table.remove(tag(number), worker);
                    oracle.remove(&(number, worker));
                }
            }
            for number in 0..300 {
                let told = table.holders(tag(number), |holders| match holders {
                    Holders::Few(workers) => workers.iter().copied().collect::<HashSet<u32>>(),
                    Holders::Many(map) => (0..9).filter(|worker| map[0] >> worker & 1 == 1).collect(),
                });
                let truth: HashSet<u32> = oracle.iter().filter(|held| held.0 == number).map(|held| held.1).collect();
                prop_assert_eq!(told.unwrap_or_default(), truth);
            }
        }
    }

    #[test]
    fn numbers_are_given_again_after_their_worker_has_left() {
        let index = Index::default();
        let (a, b) = (index.join().unwrap(), index.join().unwrap());
        assert_ne!(a, b);
        index.leave(a);
        assert_eq!(index.join(), Some(a));
    }

    #[test]
    fn readers_and_writers_at_once_agree_in_the_end() {
        let index = Index::default();
        let hashes: Vec<BlockHash> = (0..2000).map(name).collect();
        std::thread::scope(|scope| {
            for worker in 0..4 {
                let (index, hashes) = (&index, &hashes);
                scope.spawn(move || {
                    for round in 0..5 {
                        hashes.iter().for_each(|hash| index.insert(hash, Number(worker)));
                        if round < 4 {
                            (0..SHARDS).for_each(|shard| index.sweep(shard, Number(worker)));
                        }
                    }
                });
            }
            let mut lookup = Lookup::default();
            for _ in 0..200 {
                lookup.clear();
                index.lookup(hashes.iter().copied(), &mut lookup);
                assert!(lookup.found().iter().all(|(worker, depth)| worker.0 < 4 && *depth <= 2000));
            }
        });
        let mut lookup = Lookup::default();
        index.lookup(hashes.iter().copied(), &mut lookup);
        assert_eq!(lookup.found().len(), 4);
        assert!(lookup.found().iter().all(|(_, depth)| *depth == 2000));
        assert_eq!((index.blocks(), index.held()), (2000, 8000));
    }
}
