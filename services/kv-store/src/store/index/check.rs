//! Compares everything the index keeps count of with what is there.

use super::*;

impl Index {
    /// Every block that is readable in memory.
    pub(crate) fn readable(&self) -> std::collections::HashMap<(BlockBytes, BlockHash), (u64, Checksum)> {
        let all = (0..self.capacity()).map(BlockId).filter(|&id| self.entry(id).good_in(Level::Memory));
        let named = all.map(|id| (self.place(id, Level::Memory), self.entry(id).checksum));
        named.map(|(place, sum)| ((place.size, place.hash), (place.offset, sum))).collect()
    }

    /// Compares every counter and every order with the entries.
    pub(crate) fn check(&self) {
        let mut blocks = Blocks::default();
        let mut places: [Vec<(u64, u64)>; 2] = Default::default();
        let (mut live, mut idle, mut by_class) = (0, [[0; 2]; 2], std::collections::HashMap::new());
        for id in 0..self.capacity() {
            let (id, entry) = (BlockId(id), self.entry(BlockId(id)));
            if entry.state() == State::Vacant {
                continue;
            }
            live += 1;
            blocks.enter(entry);
            *by_class.entry(entry.class.0).or_insert(0) += 1;
            assert_eq!(self.find(self.size(id), entry.hash), Some(id));
            assert!(Level::ALL.iter().any(|&level| entry.has_slot(level)), "{id} is nowhere");
            for level in Level::ALL {
                if entry.has_slot(level) {
                    let place = self.place(id, level);
                    places[level as usize].push((place.offset, place.offset + place.size.0));
                }
                if entry.has_slot(level) {
                    let key = self.order_key(id, entry, level);
                    assert_eq!(self.block_at(self.size(id), level, key), id, "keys name blocks");
                }
                if entry.idle_in(level) {
                    idle[level as usize][usize::from(entry.keep() != Keep::Cached)] += 1;
                }
            }
        }
        assert_eq!(blocks, self.blocks);
        assert_eq!(live, self.table.len());
        assert_eq!(live + self.vacant.len(), self.capacity() as usize);
        for (class, at) in self.classes.iter().zip(0u8..) {
            assert_eq!(class.blocks, by_class.get(&at).copied().unwrap_or(0));
        }
        for level in Level::ALL {
            let at = level as usize;
            self.slabs[at].check();
            let listed =
                self.classes.iter().map(|class| class.idle(level)).fold([0; 2], |[a, b], [c, d]| [a + c, b + d]);
            assert_eq!(listed, idle[at], "{level:?}: listed = what may be given up");
            places[at].sort_unstable();
            assert!(places[at].windows(2).all(|pair| pair[0].1 <= pair[1].0), "two blocks share a byte");
            assert!(places[at].last().is_none_or(|last| last.1 <= self.slabs[at].capacity_bytes()));
        }
    }
}
