//! Between memory and disk: what is written down, what is fetched up, and what the disk held at the start.
//!
//! Every block that becomes visible is **written behind** to the disk, in the order of arrival. So what memory gives up is
//! on disk already and giving it up costs nothing: writers never wait for the disk, and a node that dies has most of its
//! blocks when it comes back. A block that is asked for while it is on disk only is **fetched** into memory, and so is
//! what follows it in the run that was asked for. What must be moved is handed out as [`Move`]s; who moves bytes says how
//! it ended.

use kvasir_types::{BlockHash, BlockId};

use super::{
    Checksum, Facts, Level, Origin, Place, ReadEnd, Store,
    entry::Moving,
    slab::{BlockBytes, Use},
};

/// Most blocks that are remembered because the disk did not take them.
const MAX_REFUSED: usize = 1 << 16;

/// Bytes to be moved between the tiers. Nobody else touches either place until its end is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) block: BlockId,
    pub(crate) memory_offset: u64,
    pub(crate) disk_offset: u64,
    pub(crate) size: BlockBytes,
    pub(crate) hash: BlockHash,
    pub(crate) checksum: Checksum,
}

/// What it takes to have a run in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fetch {
    /// Blocks of the run that are in memory, from its first one on.
    pub(crate) ready: usize,
    /// Blocks behind them that are there but not in memory yet; some of `reads` or of an earlier fetch bring them.
    pub(crate) coming: usize,
    /// To be read now.
    pub(crate) reads: Vec<Move>,
}

/// A block that the disk held when the process started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    pub(crate) place: Place,
    pub(crate) checksum: Checksum,
    pub(crate) position: u16,
    pub(crate) parent: u32,
    pub(crate) group: u64,
    pub(crate) origin: Origin,
}

impl Store {
    /// Starts to bring into memory what of the run of `hashes` is on disk only.
    pub(crate) fn fetch(&mut self, size: BlockBytes, hashes: &[BlockHash]) -> Fetch {
        let there = |&hash: &BlockHash| {
            let id = self.index.find(size, hash)?;
            let entry = self.index.entry(id);
            Level::ALL.iter().any(|&level| entry.good_in(level)).then_some(id)
        };
        let run: Vec<BlockId> = hashes.iter().map_while(there).collect();
        let ready = run.iter().take_while(|&&id| self.index.entry(id).good_in(Level::Memory)).count();
        if ready == run.len() {
            return Fetch { ready, ..Fetch::default() };
        }
        // What is there stays while room is made for the rest: the run's end must not push out its beginning.
        let held = self.index.hold(&run);
        let (mut reads, mut coming) = (Vec::new(), 0);
        for (n, &id) in run.iter().enumerate().skip(ready) {
            let entry = *self.index.entry(id);
            let on_its_way = entry.moving() == Moving::Up || entry.good_in(Level::Memory);
            if !on_its_way {
                if self.moves[Level::Disk as usize] >= self.settings.max_moves {
                    // It is there and will be fetched when asked for again.
                    coming = run.len() - ready;
                    break;
                }
                let after = n.checked_sub(1).map(|before| run[before]);
                let Some(memory_offset) = self.index.start_read(id, after) else { break };
                self.moves[Level::Disk as usize] += 1;
                reads.push(self.moving(id, memory_offset, self.index.place(id, Level::Disk).offset));
            }
            coming += 1;
        }
        self.index.let_go(&held);
        Fetch { ready, coming, reads }
    }

    /// A fetched block's bytes are in memory, or are not.
    pub(crate) fn fetched(&mut self, block: BlockId, end: ReadEnd) {
        self.moves[Level::Disk as usize] -= 1;
        match end {
            ReadEnd::Good => self.totals.promoted_blocks += 1,
            ReadEnd::Torn => {
                self.totals.torn_on_disk_blocks += 1;
                self.pins.forget(block);
            }
            ReadEnd::Failed => {}
        }
        self.index.end_read(block, end);
    }

    /// What is to be written to disk now.
    pub(crate) fn writes(&mut self) -> Vec<Move> {
        let mut writes = Vec::new();
        while self.moves[Level::Memory as usize] < self.settings.max_moves
            && let Some(id) = self.dirty.pop_front()
        {
            let Some(disk_offset) = self.index.start_write(id) else { continue };
            self.moves[Level::Memory as usize] += 1;
            writes.push(self.moving(id, self.index.place(id, Level::Memory).offset, disk_offset));
        }
        writes
    }

    /// A block's bytes are on disk, or are not.
    pub(crate) fn written(&mut self, block: BlockId, good: bool) {
        self.moves[Level::Memory as usize] -= 1;
        self.totals.written_blocks += u64::from(good);
        self.index.end_write(block, good);
    }

    /// The disk did not take a block, because it is full or is left alone: it stays where it is, and may be written later.
    pub(crate) fn refused(&mut self, block: BlockId) {
        self.written(block, false);
        if self.refused.len() == MAX_REFUSED {
            // The oldest: it has most likely been given up since.
            self.refused.pop_front();
        }
        self.refused.push_back(block);
    }

    /// The disk takes blocks again: those that it did not take are to be written after all.
    pub(crate) fn try_again(&mut self) {
        self.dirty.append(&mut self.refused);
    }

    /// A disk that is full takes no more than it has; one that is not is used to its capacity.
    pub(crate) fn disk_is_full(&mut self, full: bool) {
        self.index.slabs_mut(Level::Disk).close(full);
    }

    /// Blocks that the disk held at the start, the least recently used first. How many are used; others lie where none can
    /// be, or were there twice.
    pub(crate) fn recover(&mut self, blocks: impl IntoIterator<Item = Recovered>) -> usize {
        let one = |block: Recovered| {
            let Recovered { place, checksum, position, parent, group, origin } = block;
            let facts = Facts { position, parent, group, origin: self.index.quotas().origin(&origin) };
            self.index.recover(place, checksum, facts, Use::default())
        };
        blocks.into_iter().map(one).filter(|&used| used).count()
    }

    /// What a record on disk says of a block besides its place.
    pub(crate) fn facts(&mut self, block: BlockId) -> (Facts, Origin) {
        let entry = *self.index.entry(block);
        let facts = entry.facts();
        (facts, self.index.quotas().name(entry.origin).clone())
    }

    fn moving(&self, block: BlockId, memory_offset: u64, disk_offset: u64) -> Move {
        let entry = self.index.entry(block);
        let (hash, checksum) = (entry.hash, entry.checksum);
        Move { block, memory_offset, disk_offset, size: self.index.size(block), hash, checksum }
    }
}
