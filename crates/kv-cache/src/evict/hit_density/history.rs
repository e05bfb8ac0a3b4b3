//! How often blocks that were evicted had been asked for: a block that comes back is no new one.
//!
//! A table without chains: 16 bits for each of four times as many blocks as there is room for, at the place that its name says.
//! A newer block may take an older one's place, which forgets that; one block in a thousand may be taken for another.

/// Bits for the uses.
const USES_BITS: u32 = 3;
/// Fewer places are not worth saving.
const LEAST: usize = 1 << 13;

#[derive(Debug)]
pub(super) struct History {
    /// A part of the name that is not in the place, and the uses. Zero: nothing.
    places: Vec<u16>,
}

impl History {
    pub(super) fn new(capacity: usize) -> Self {
        Self { places: vec![0; (capacity * 4).next_power_of_two().max(LEAST)] }
    }

    /// Makes room for the history of that many blocks. What was known is forgotten where the table grows: it does while
    /// nothing has been evicted yet.
    pub(super) fn grow(&mut self, capacity: usize) {
        if capacity * 4 > self.places.len() {
            *self = Self::new(capacity);
        }
    }

    pub(super) fn put(&mut self, name: u32, uses: u8) {
        let (place, tag) = self.place(name);
        self.places[place] = tag | u16::from(uses);
    }

    /// Uses of a block of that name before it was evicted, if it was, not too long ago.
    pub(super) fn uses(&self, name: u32) -> Option<u8> {
        let (place, tag) = self.place(name);
        let found = self.places[place];
        let uses = found & ((1 << USES_BITS) - 1);
        (found - uses == tag).then_some(uses as u8)
    }

    fn place(&self, name: u32) -> (usize, u16) {
        // Two mixes of one name: neighbours in one do not share the other.
        let place = name.wrapping_mul(0x9e37_79b1) as usize & (self.places.len() - 1);
        let tag = (name.rotate_left(16).wrapping_mul(0x85eb_ca6b) >> 16) as u16;
        (place, tag.max(1 << USES_BITS) >> USES_BITS << USES_BITS)
    }
}
