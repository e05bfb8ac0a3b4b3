//! The cache as the engine sees it: sequences' tables over one pool, in all groups at once.
//!
//! **Reserved all or none.** A sequence gets everything it needs to start, in every group, or nothing: the whole prompt
//! in full groups, as much as one window and one chunk take in sliding ones ([`Geometry::needed_beyond`]), its state in
//! recurrent ones.
//!
//! **Prefixes of several groups.** A prompt may start after `n` blocks that were found if every full group has all `n` and
//! every sliding group has those that the next token's window sees: vLLM's hybrid coordinator looks for the same. With
//! the full groups' longest run as the first candidate, each sliding group shortens it to the nearest cut that suits it,
//! until all agree.
//!
//! **Recurrent groups** have a place only: one block for the state of a sequence, copied by a fork, never found by another
//! prompt, so a model that has one finds no prefixes at all. What comes next is to keep the state at some cuts (at block
//! boundaries, as vLLM does with Mamba's) as sealed blocks of their own, named like the token blocks of that cut; then
//! `lookup` asks them as one more group.

use kvasir_types::{BlockHash, BlockId, GroupKind};

use crate::{
    Batch, BlockPool, Counts, Geometry, Name, OnEvict, Sealed, Snapshot, Stored, Table, geometry::in_group, table::Slot,
};

/// How much of a prompt is there already; see [`KvCache::lookup`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hit {
    /// Blocks, from the first on, that need not be computed.
    pub blocks: usize,
    /// Blocks of all groups to be held for that, and of these, those that nobody holds now: holding them makes so many
    /// fewer available.
    pub pinned: usize,
    /// See `pinned`.
    pub idle: usize,
}

/// A pool and the rules by which sequences take from it.
#[derive(Debug)]
pub struct KvCache {
    pool: BlockPool,
    geometry: Geometry,
}

impl KvCache {
    /// A cache over an arena of `blocks` blocks; its log keeps `event_limit` events.
    pub fn new(geometry: Geometry, blocks: usize, event_limit: usize) -> Self {
        Self { pool: BlockPool::new(blocks, event_limit), geometry }
    }

    /// The sizes it works with.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// How many blocks are in which state.
    pub fn counts(&self) -> Counts {
        self.pool.counts()
    }

    /// How many blocks could be had now, cached ones included.
    pub fn available(&self) -> usize {
        self.pool.available()
    }

    /// Who hears of blocks that leave the cache because their place is needed.
    pub fn on_evict(&mut self, hears: Option<Box<dyn OnEvict>>) {
        self.pool.on_evict(hears);
    }

    /// The events since the last time.
    pub fn drain_events(&mut self) -> Batch {
        self.pool.drain_events()
    }

    /// Everything that can be found now.
    pub fn snapshot(&self) -> Snapshot {
        self.pool.snapshot()
    }

    /// The longest beginning of a chain (of the prompt's own hashes) that is there. Changes nothing, not even recency.
    pub fn lookup(&self, chain: &[BlockHash]) -> Hit {
        self.lookup_from(0, chain)
    }

    /// The same for a sequence that has the first `have` blocks itself.
    pub fn lookup_from(&self, have: usize, chain: &[BlockHash]) -> Hit {
        if !self.geometry.has_prefixes() || chain.len() <= have {
            return Hit { blocks: have, ..Hit::default() };
        }
        let kinds = self.geometry.kinds();
        let known = |group: usize, index: usize| self.pool.find(&in_group(chain[index], group)).is_some();
        let mut cut = chain.len();
        for (group, _) in kinds.iter().enumerate().filter(|(_, kind)| **kind == GroupKind::Full) {
            cut = (have..cut).find(|&index| !known(group, index)).unwrap_or(cut);
        }
        let mut settled = false;
        while !settled {
            settled = true;
            for (group, &kind) in kinds.iter().enumerate().filter(|(_, kind)| **kind != GroupKind::Full) {
                while let Some(missing) = self.needed(kind, have, cut).rev().find(|&index| !known(group, index)) {
                    (cut, settled) = (missing, false);
                }
            }
        }
        let mut hit = Hit { blocks: cut, ..Hit::default() };
        for (group, &kind) in kinds.iter().enumerate() {
            for index in self.needed(kind, have, cut) {
                hit.pinned += 1;
                hit.idle += usize::from(self.pool.find(&in_group(chain[index], group)) == Some(true));
            }
        }
        hit
    }

    /// A share in the block that this name finds.
    pub fn hold(&mut self, name: &BlockHash) -> Option<Sealed> {
        self.pool.pin(name)
    }

    /// Gives back what [`hold`](Self::hold) took.
    pub fn let_go(&mut self, share: Sealed) {
        self.pool.release(share);
    }

    /// Blocks from `have` on that must be there for a sequence to go on at block `cut`.
    fn needed(&self, kind: GroupKind, have: usize, cut: usize) -> std::ops::Range<usize> {
        self.geometry.first_needed(kind, cut * self.geometry.block_size()).max(have).min(cut)..cut
    }

    /// What [`reserve`](Self::reserve) would start with, and how many blocks it would take beside that.
    pub fn plan(&self, chain: &[BlockHash], tokens: usize, chunk: usize) -> (Hit, usize) {
        let (hit, wanted) = self.plan_unbounded(chain, tokens, chunk);
        // Never more than there are: a sequence that has grown to the pool's size gets its turn, and ends there.
        (hit, wanted.min(self.counts().total - hit.pinned))
    }

    fn plan_unbounded(&self, chain: &[BlockHash], tokens: usize, chunk: usize) -> (Hit, usize) {
        let fresh = |cut: usize| -> usize {
            let kinds = self.geometry.kinds().iter();
            kinds.map(|&kind| self.geometry.needed_beyond(kind, cut, tokens, chunk)).sum()
        };
        let total = self.counts().total;
        let mut hit = self.lookup(chain);
        // The window before a cut and the one at the prompt's end may be too much for a small pool, which could well
        // compute the whole prompt.
        if hit.pinned + fresh(hit.blocks) > total && fresh(0) <= total {
            hit = Hit::default();
        }
        (hit, fresh(hit.blocks))
    }

    /// The table of a sequence that starts: what is found of `chain`, and room for `tokens` tokens of which no more than
    /// `chunk` are computed at once. `None`, and nothing is changed, if there are not enough blocks.
    pub fn reserve(&mut self, chain: &[BlockHash], tokens: usize, chunk: usize) -> Option<Table> {
        let (hit, wanted) = self.plan_unbounded(chain, tokens, chunk);
        let fresh = wanted.min(self.counts().total - hit.pinned);
        if self.available() - hit.idle < fresh {
            return None;
        }
        let mut table = Table::new(self.geometry.kinds().len());
        self.pin(&mut table, &chain[..hit.blocks]);
        table.stock = self.pool.take_many(fresh).expect("as many blocks are available, pinned ones apart");
        table.stock.reverse(); // taken from the end: tables then name blocks in the order in which the pool gave them
        table.computed = hit.blocks * self.geometry.block_size();
        for group in 0..self.geometry.kinds().len() {
            // One that has outgrown the pool takes what it needs chunk by chunk, as far as it goes.
            if fresh == wanted && !matches!(self.geometry.kinds()[group], GroupKind::Sliding { .. }) {
                self.grow_group(&mut table, group, tokens, false);
            }
        }
        Some(table)
    }

    /// Shares in the found blocks of a chain, behind those that the table has.
    fn pin(&mut self, table: &mut Table, chain: &[BlockHash]) {
        for group in 0..self.geometry.kinds().len() {
            let needed = self.needed(self.geometry.kinds()[group], 0, chain.len());
            for (index, &hash) in chain.iter().enumerate() {
                let slot = if needed.contains(&index) {
                    Slot::Sealed(self.pool.pin(&in_group(hash, group)).expect("looked up just now"))
                } else {
                    Slot::Gone
                };
                table.push(group, slot);
            }
        }
    }

    /// Makes the table long enough for `tokens` tokens, after giving back what is needed no more. False, and nothing is
    /// taken: there are not enough blocks.
    pub fn grow(&mut self, table: &mut Table, tokens: usize) -> bool {
        self.shorten(table);
        let missing: usize = (0..self.geometry.kinds().len()).map(|group| self.missing(table, group, tokens)).sum();
        missing <= table.stock.len() + self.available()
            && (0..self.geometry.kinds().len()).all(|group| self.grow_group(table, group, tokens, true))
    }

    /// Blocks that a group's table lacks for `tokens` tokens.
    fn missing(&self, table: &Table, group: usize, tokens: usize) -> usize {
        let kind = self.geometry.kinds()[group];
        let wanted = match kind {
            GroupKind::Recurrent => 1,
            _ => tokens.div_ceil(self.geometry.block_size()),
        };
        wanted.saturating_sub(table.slots[group].len().max(self.geometry.first_needed(kind, table.computed)))
    }

    /// From the stock, and then, if `more`, from the pool.
    fn grow_group(&mut self, table: &mut Table, group: usize, tokens: usize, more: bool) -> bool {
        let kind = self.geometry.kinds()[group];
        let wanted = match kind {
            GroupKind::Recurrent => 1,
            _ => tokens.div_ceil(self.geometry.block_size()),
        };
        let first = self.geometry.first_needed(kind, table.computed);
        while table.slots[group].len() < wanted {
            if table.slots[group].len() < first {
                table.push(group, Slot::Gone);
                continue;
            }
            let fresh = table.stock.pop().or_else(|| if more { self.pool.take() } else { None });
            let Some(block) = fresh else { return false };
            table.push(group, Slot::Open(block));
        }
        true
    }

    /// Gives back the blocks that no window sees any more.
    fn shorten(&mut self, table: &mut Table) {
        for group in 0..self.geometry.kinds().len() {
            let first = self.geometry.first_needed(self.geometry.kinds()[group], table.computed);
            let end = first.min(table.slots[group].len());
            for index in (table.gone[group]..end).rev() {
                match table.replace(group, index, Slot::Gone) {
                    Slot::Gone => {}
                    Slot::Open(block) => table.stock.push(block),
                    Slot::Landing(_) => unreachable!("what may be landing is not computed yet"),
                    Slot::Sealed(share) => self.pool.release(share),
                }
            }
            table.gone[group] = table.gone[group].max(end);
            table.sealed[group] = table.sealed[group].max(end);
        }
    }

    /// Gives back what was reserved for a prompt and is not needed for the answer.
    pub fn give_back_stock(&mut self, table: &mut Table) {
        table.stock.drain(..).for_each(|block| self.pool.give_back(block));
    }

    /// Lets a peer write the blocks of a prompt of `tokens` tokens that were not found: in sliding groups only those that
    /// its last token sees.
    ///
    /// # Panics
    /// If the table was not reserved for so many tokens.
    pub fn open(&mut self, table: &mut Table, tokens: usize) {
        let found = table.computed / self.geometry.block_size();
        for group in 0..self.geometry.kinds().len() {
            let kind = self.geometry.kinds()[group];
            // The last token may have to be computed here after all, so its window must be there.
            let first = self.geometry.first_needed(kind, tokens - 1);
            while table.slots[group].len() < first {
                table.push(group, Slot::Gone);
            }
            assert!(self.grow_group(table, group, tokens, false), "reserved for the whole prompt");
            let end = tokens.div_ceil(self.geometry.block_size()).min(table.slots[group].len());
            for index in found.min(end)..end {
                match std::mem::replace(&mut table.slots[group][index], Slot::Gone) {
                    Slot::Open(block) => table.slots[group][index] = Slot::Landing(self.pool.open(block)),
                    slot => table.slots[group][index] = slot,
                }
            }
        }
    }

    /// No peer can write into the first `blocks` blocks any more: the caller has made sure.
    pub fn fence(&mut self, table: &mut Table, blocks: usize) {
        for slots in &mut table.slots {
            for slot in slots.iter_mut().take(blocks) {
                if let Slot::Landing(_) = slot
                    && let Slot::Landing(block) = std::mem::replace(slot, Slot::Gone)
                {
                    *slot = Slot::Open(self.pool.fence(block));
                }
            }
        }
    }

    /// Whether the table has all that a sequence needs to go on after its first `tokens` tokens.
    pub fn covers(&self, table: &Table, tokens: usize) -> bool {
        let end = tokens.div_ceil(self.geometry.block_size());
        self.geometry.kinds().iter().enumerate().all(|(group, &kind)| {
            let needed = self.geometry.first_needed(kind, tokens)..end;
            kind == GroupKind::Recurrent
                || table.slots[group]
                    .get(needed.clone())
                    .is_some_and(|slots| slots.iter().all(|slot| !matches!(slot, Slot::Gone)))
        })
    }

    /// The sequence goes on at `table.computed` although peers were to write more: sliding groups, which had room for the
    /// end of the prompt only, get it back for the part that is computed now.
    pub fn rewind(&mut self, table: &mut Table) {
        let keep = table.computed.div_ceil(self.geometry.block_size());
        for (group, &kind) in self.geometry.kinds().iter().enumerate() {
            if !matches!(kind, GroupKind::Sliding { .. }) {
                continue;
            }
            while table.slots[group].len() > keep {
                table.ids[group].pop();
                match table.slots[group].pop() {
                    Some(Slot::Open(block)) => table.stock.push(block),
                    Some(Slot::Sealed(share)) => self.pool.release(share),
                    Some(Slot::Gone) | None => {}
                    Some(Slot::Landing(_)) => unreachable!("fenced before it is computed"),
                }
            }
            table.sealed[group] = table.sealed[group].min(keep);
        }
    }

    /// The first `chain.len()` blocks are complete for good: makes them findable. `root` is where the chain starts.
    ///
    /// # Panics
    /// If a peer may be writing one of them.
    pub fn seal(&mut self, table: &mut Table, root: BlockHash, chain: &[BlockHash]) {
        for (group, &kind) in self.geometry.kinds().iter().enumerate() {
            if kind == GroupKind::Recurrent {
                continue;
            }
            let slots = &mut table.slots[group];
            let end = chain.len().min(slots.len());
            for index in table.sealed[group]..end {
                let parent = if index == 0 { root } else { chain[index - 1] };
                let stored = Stored {
                    hash: in_group(chain[index], group),
                    parent: in_group(parent, group),
                    group: group as u16,
                };
                slots[index] = match std::mem::replace(&mut slots[index], Slot::Gone) {
                    Slot::Open(block) => {
                        let name = Name { stored, chained: kind == GroupKind::Full, first: index == 0 };
                        Slot::Sealed(self.pool.seal(block, name))
                    }
                    Slot::Landing(block) => panic!("{} is sealed while a peer may write it", block.id()),
                    slot => slot,
                };
            }
            table.sealed[group] = table.sealed[group].max(end);
        }
    }

    /// A second table for a sequence that goes on differently after the first `tokens` tokens, all of which are computed:
    /// whole blocks are shared, what is begun is to be copied before either writes on (`copies`: from, to). `None`, and
    /// nothing is changed, if there are not enough blocks.
    pub fn fork(&mut self, table: &mut Table, tokens: usize) -> Option<(Table, Vec<(BlockId, BlockId)>)> {
        let block_size = self.geometry.block_size();
        let (whole, begun) = (tokens / block_size, !tokens.is_multiple_of(block_size));
        let copied = |kind: GroupKind| usize::from(begun || kind == GroupKind::Recurrent);
        let needed = self.geometry.kinds().iter().map(|&kind| copied(kind)).sum();
        let mut fresh = self.pool.take_many(needed)?;
        let mut fork = Table::new(table.ids.len());
        fork.computed = tokens;
        let mut copies = Vec::new();
        for (group, &kind) in self.geometry.kinds().iter().enumerate() {
            let shared = if kind == GroupKind::Recurrent { 0 } else { whole };
            for index in 0..shared {
                let share = match std::mem::replace(&mut table.slots[group][index], Slot::Gone) {
                    Slot::Gone => Slot::Gone,
                    Slot::Sealed(share) => {
                        let second = self.pool.share(&share);
                        table.slots[group][index] = Slot::Sealed(share);
                        Slot::Sealed(second)
                    }
                    // Without a prefix cache blocks bear no names; two sequences can share them all the same.
                    Slot::Open(block) => {
                        let share = self.pool.seal_nameless(block);
                        let second = self.pool.share(&share);
                        table.slots[group][index] = Slot::Sealed(share);
                        Slot::Sealed(second)
                    }
                    Slot::Landing(block) => panic!("{} is forked while a peer may write it", block.id()),
                };
                fork.push(group, share);
            }
            if copied(kind) == 1 {
                let block = fresh.pop().expect("one is taken for each group");
                copies.push((table.ids[group][shared], block.id()));
                fork.push(group, Slot::Open(block));
            }
        }
        Some((fork, copies))
    }

    /// Takes the blocks from the table's next one up to `hit.blocks` over from whoever computed them, by sharing them in
    /// place of its own, which are given back. `hit` is what [`lookup_from`](Self::lookup_from) said just now.
    pub fn adopt(&mut self, table: &mut Table, hit: Hit, chain: &[BlockHash]) {
        let have = table.computed / self.geometry.block_size();
        for (group, &kind) in self.geometry.kinds().iter().enumerate() {
            let needed = self.geometry.first_needed(kind, hit.blocks * self.geometry.block_size()).max(have);
            for (index, &hash) in chain.iter().enumerate().take(hit.blocks).skip(have) {
                let slot = if index < needed {
                    Slot::Gone
                } else {
                    Slot::Sealed(self.pool.pin(&in_group(hash, group)).expect("looked up just now"))
                };
                if index >= table.slots[group].len() {
                    table.push(group, slot);
                    continue;
                }
                match table.replace(group, index, slot) {
                    Slot::Open(block) if kind == GroupKind::Full => self.pool.give_back(block),
                    Slot::Open(block) => table.stock.push(block),
                    Slot::Sealed(share) => self.pool.release(share),
                    Slot::Gone => {}
                    Slot::Landing(block) => panic!("{} is exchanged while a peer may write it", block.id()),
                }
                table.sealed[group] = table.sealed[group].max(index + 1);
            }
        }
        table.computed = hit.blocks * self.geometry.block_size();
    }

    /// The same by copying, for a sequence whose blocks are known outside and must stay: what to copy, from where to
    /// where. To be done at once, before anything else changes. `None`: the table lacks a block to copy to.
    pub fn adopt_copies(
        &mut self,
        table: &mut Table,
        hit: Hit,
        chain: &[BlockHash],
    ) -> Option<Vec<(BlockId, BlockId)>> {
        let geometry = self.geometry.clone();
        let block_size = geometry.block_size();
        let have = table.computed / block_size;
        let mut copies = Vec::new();
        for (group, &kind) in geometry.kinds().iter().enumerate() {
            let first = geometry.first_needed(kind, hit.blocks * block_size).max(have);
            while table.slots[group].len() < first {
                table.push(group, Slot::Gone);
            }
            if !self.grow_group(table, group, hit.blocks * block_size, false) {
                self.rewind(table);
                return None;
            }
            for (index, &hash) in chain.iter().enumerate().take(hit.blocks).skip(first) {
                let from = self.pool.pin(&in_group(hash, group)).expect("looked up just now");
                copies.push((from.id(), table.ids[group][index]));
                self.pool.release(from);
            }
        }
        table.computed = hit.blocks * block_size;
        Some(copies)
    }

    /// The sequence needs its blocks no more. Tails first, so that they are evicted first. No peer may write into any of
    /// them: the caller has made sure.
    pub fn give_back(&mut self, mut table: Table) {
        self.fence(&mut table, usize::MAX);
        self.give_back_stock(&mut table);
        let give = |pool: &mut BlockPool, slot| match slot {
            Slot::Gone => {}
            Slot::Open(block) => pool.give_back(block),
            Slot::Sealed(share) => pool.release(share),
            Slot::Landing(_) => unreachable!("fenced above"),
        };
        for slots in table.slots.drain(..) {
            slots.into_iter().rev().for_each(|slot| give(&mut self.pool, slot));
        }
    }

    /// Blocks that giving this table back would make available: those that nobody else holds.
    pub fn exclusive(&self, table: &Table) -> usize {
        let sole = |slot: &&Slot| match slot {
            Slot::Gone => false,
            Slot::Open(_) | Slot::Landing(_) => true,
            Slot::Sealed(share) => self.pool.is_sole(share),
        };
        table.slots.iter().flatten().filter(sole).count() + table.stock.len()
    }

    /// Forgets every cached block.
    pub fn clear_cached(&mut self) {
        self.pool.clear_cached();
    }
}
