//! Entries of blocks that have a slot before they have a name.

use kvasir_types::{BlockHash, BlockId};

use super::{Index, PIECE};
use crate::store::{
    entry::{Entry, Facts, Level, State},
    slab::{BlockBytes, Use},
};

impl Index {
    /// Room in memory, as for [`Index::reserve`], for a block that is yet to be named, of which no policy is told: `stand_in` is
    /// nobody's hash.
    pub(crate) fn reserve_ahead(
        &mut self,
        size: BlockBytes,
        stand_in: BlockHash,
        facts: Facts,
        now: Use,
    ) -> Option<BlockId> {
        let class = self.class_for(size, facts, now)?;
        let id = self.enter(class, stand_in, facts, now)?;
        let Some(slot) = self.room(Level::Memory, class, id) else {
            self.leave(id);
            return None;
        };
        self.fill_slot(id, Level::Memory, slot);
        self.change(id, |entry| entry.set_state(State::Reserved));
        Some(id)
    }

    /// What was reserved ahead is this block.
    ///
    /// # Panics
    /// If something is known under that hash and size, or the block is of another origin.
    pub(crate) fn name(&mut self, id: BlockId, hash: BlockHash, facts: Facts) {
        let before = *self.entry(id);
        assert!(self.find(self.size(id), hash).is_none(), "a block is entered once");
        assert_eq!((before.state(), before.origin), (State::Reserved, facts.origin), "reserved ahead, for this origin");
        self.table.remove(before.hash, id);
        let named = Entry::new(hash, before.class, facts, before.last_use);
        self.change(id, |entry| {
            *entry = named;
            entry.slots = before.slots;
            entry.set_state(State::Reserved);
        });
        let entries = &self.entries;
        self.table.insert(hash, id, |id| entries[id.0 as usize / PIECE][id.0 as usize % PIECE].hash);
        self.describe(id, Level::Memory, None);
    }
}
