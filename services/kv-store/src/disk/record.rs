//! Records: what is known of a block on disk besides its bytes, and where slots and their records lie.
//!
//! A record names its own place and carries a checksum of itself, so that one that is torn, old, moved or made up is none.
//!
//! ```text
//!   0      4          8      16         24     40      56         72      80      88       96         104    108     112
//!   | magic | position | slot | sequence | hash | parent | checksum | bytes | model | tenant | last use | uses | flags | seal |
//! ```
//!
//! All numbers are little-endian; the seal is the first half of BLAKE3 of everything before it.

use kvasir_types::BlockHash;

use super::Checksum;

/// Slots are whole pages: what direct access wants of the file's offset and length.
pub(super) const PAGE: u64 = 4096;
/// Bytes of one record. Divides a sector, so that no record is torn by a device that writes whole sectors.
pub(super) const RECORD_BYTES: usize = 128;

const MAGIC: [u8; 4] = *b"kvRc";
const SEAL_AT: usize = 112;
/// What is used of a record's first bytes; the rest up to its seal is zero, for later versions.
const USED: usize = 82;

/// Where a slot starts in the data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskOffset(pub u64);

/// Bytes that a block of so many bytes takes on disk: its slots are so far apart within a slab.
pub fn slot_bytes(block_bytes: u64) -> u64 {
    block_bytes.next_multiple_of(PAGE)
}

/// What is known of a block on disk. What the index wants to have again after a restart is kept for it, unread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its name.
    pub hash: BlockHash,
    /// Its size.
    pub bytes: u64,
    /// Of its bytes.
    pub checksum: Checksum,
    /// Its place in its prompt.
    pub position: u16,
    /// How the hash of the block before it in its prompt begins; zero: there is none.
    pub parent: u32,
    /// What decides which node has it: how the hash of its placement group's first block begins.
    pub group: u64,
    /// Whose it is: see `super::Origins`.
    pub origin: u32,
}

/// The n-th record written into a directory: of two that contradict one another the later one holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sequence(pub u64);

/// Where slots and records lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) slab_bytes: u64,
    pub(super) capacity_bytes: u64,
}

impl Geometry {
    /// Where in the file of records the record of a slot is; `None` if no block of this size has a slot there.
    pub(super) fn record_at(self, DiskOffset(slot): DiskOffset, block_bytes: u64) -> Option<u64> {
        if block_bytes == 0 || block_bytes > self.slab_bytes {
            return None;
        }
        let (slab, within) = (slot / self.slab_bytes, slot % self.slab_bytes);
        let size = slot_bytes(block_bytes);
        let inside = slot < self.capacity_bytes && within.is_multiple_of(size) && within + size <= self.slab_bytes;
        inside.then(|| slab * self.slab_record_bytes() + within / size * RECORD_BYTES as u64)
    }

    /// Bytes of records from one slab to the next: as many as slots of the smallest size.
    pub(super) fn slab_record_bytes(self) -> u64 {
        self.slab_bytes / PAGE * RECORD_BYTES as u64
    }

    /// Bytes of all records.
    pub(super) fn record_bytes(self) -> u64 {
        self.capacity_bytes / self.slab_bytes * self.slab_record_bytes()
    }
}

/// A record as it is written.
pub(super) fn encode(
    record: &Record,
    DiskOffset(slot): DiskOffset,
    Sequence(sequence): Sequence,
) -> [u8; RECORD_BYTES] {
    let Record { hash, bytes, checksum, position, parent, group, origin } = *record;
    let mut out = [0; RECORD_BYTES];
    let mut at = 0;
    let mut put = |part: &[u8]| {
        out[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    };
    put(&MAGIC);
    put(&parent.to_le_bytes());
    put(&slot.to_le_bytes());
    put(&sequence.to_le_bytes());
    put(&hash.0);
    put(&checksum);
    put(&bytes.to_le_bytes());
    put(&group.to_le_bytes());
    put(&origin.to_le_bytes());
    put(&[0; 4]);
    put(&position.to_le_bytes());
    debug_assert_eq!(at, USED);
    let seal = seal(&out);
    out[SEAL_AT..].copy_from_slice(&seal);
    out
}

/// The record of these bytes, if they are one.
pub(super) fn decode(bytes: &[u8; RECORD_BYTES]) -> Option<(Record, DiskOffset, Sequence)> {
    if bytes[..4] != MAGIC || seal(bytes) != bytes[SEAL_AT..] {
        return None;
    }
    let four = |at: usize| u32::from_le_bytes(part(bytes, at));
    let eight = |at: usize| u64::from_le_bytes(part(bytes, at));
    let record = Record {
        hash: BlockHash(part(bytes, 24)),
        checksum: part(bytes, 40),
        bytes: eight(56),
        group: eight(64),
        origin: four(72),
        position: u16::from_le_bytes(part(bytes, 80)),
        parent: four(4),
    };
    Some((record, DiskOffset(eight(8)), Sequence(eight(16))))
}

fn part<const N: usize>(bytes: &[u8; RECORD_BYTES], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[at..at + N]);
    part
}

fn seal(bytes: &[u8; RECORD_BYTES]) -> [u8; 16] {
    let mut seal = [0; 16];
    seal.copy_from_slice(&blake3::hash(&bytes[..SEAL_AT]).as_bytes()[..16]);
    seal
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn records() -> impl Strategy<Value = Record> {
        let names = (any::<[u8; 16]>(), any::<[u8; 16]>());
        let numbers = (any::<u64>(), any::<u16>(), any::<u32>(), any::<u64>(), any::<u32>());
        (names, numbers).prop_map(|((hash, checksum), (bytes, position, parent, group, origin))| {
            let hash = BlockHash(hash);
            Record { hash, bytes, checksum, position, parent, group, origin }
        })
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(record in records(), slot: u64, sequence: u64) {
            let bytes = encode(&record, DiskOffset(slot), Sequence(sequence));
            prop_assert_eq!(decode(&bytes), Some((record, DiskOffset(slot), Sequence(sequence))));
        }

        #[test]
        fn a_changed_byte_is_no_record(record in records(), at in 0..RECORD_BYTES, flip in 1u8..) {
            let mut bytes = encode(&record, DiskOffset(0), Sequence(1));
            bytes[at] ^= flip;
            prop_assert_eq!(decode(&bytes), None);
        }

        #[test]
        fn no_two_slots_of_a_slab_share_a_record(bytes in 1u64..300_000, slab in 0u64..4) {
            let geometry = Geometry { slab_bytes: 1 << 20, capacity_bytes: 4 << 20 };
            let slots = (1 << 20) / slot_bytes(bytes);
            for number in 0..slots {
                let at = geometry.record_at(DiskOffset(slab * (1 << 20) + number * slot_bytes(bytes)), bytes).unwrap();
                prop_assert_eq!(at, slab * geometry.slab_record_bytes() + number * 128);
                prop_assert!(at + 128 <= (slab + 1) * geometry.slab_record_bytes());
            }
            let beyond = DiskOffset(slab * (1 << 20) + slots * slot_bytes(bytes));
            if slots * slot_bytes(bytes) < 1 << 20 {
                prop_assert_eq!(geometry.record_at(beyond, bytes), None);
            }
        }
    }

    #[test]
    fn what_is_no_slot_has_no_record() {
        let geometry = Geometry { slab_bytes: 1 << 20, capacity_bytes: 4 << 20 };
        for (slot, bytes) in [(0, 0), (0, (1 << 20) + 1), (4096, 8192), (1, 4096), (4 << 20, 4096), (u64::MAX, 1)] {
            assert_eq!(geometry.record_at(DiskOffset(slot), bytes), None, "{bytes} at {slot}");
        }
        assert_eq!(geometry.record_at(DiskOffset(3 << 20), 1 << 20), Some(3 * geometry.slab_record_bytes()));
    }
}
