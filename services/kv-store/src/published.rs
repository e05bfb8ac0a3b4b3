//! The index that clients read by themselves ([`kvasir_store_client::published`] says how it is laid out): written here,
//! line by line, as blocks become readable in memory and cease to be.

use kvasir_store_client::published::{LINE_BYTES, Line, SET_BYTES, Shape, WAYS};
use kvasir_transfer::{Allocation, Memory, Region, TransferEngine};
use kvasir_types::BlockHash;

use crate::store::{BlockBytes, Checksum, Place, Publish};

/// Where clients find it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Whereabouts {
    pub(crate) offset: u64,
    pub(crate) shape: Shape,
}

/// The writer's side. There is one, under the node's lock.
pub(crate) struct Published {
    engine: TransferEngine,
    region: Region,
    shape: Shape,
    /// Whose line is where, so that nothing has to be read back; 0: nobody's.
    owners: Vec<[u64; WAYS]>,
    /// Which line of a full set goes next.
    hand: usize,
}

impl Published {
    /// An empty index of so many bytes, at least one set.
    pub(crate) fn new(engine: &TransferEngine, bytes: u64, seed: u64) -> Result<Self, kvasir_transfer::Error> {
        let sets = usize::try_from(bytes / SET_BYTES as u64).unwrap_or(usize::MAX / SET_BYTES).max(1);
        let region = engine.register(Memory::Allocate(Allocation::new(sets * SET_BYTES)))?;
        let shape = Shape { sets: sets as u64, seed };
        Ok(Self { engine: engine.clone(), region, shape, owners: vec![[0; WAYS]; sets], hand: 0 })
    }

    pub(crate) fn whereabouts(&self) -> Whereabouts {
        Whereabouts { offset: self.region.base(), shape: self.shape }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.region.len()
    }

    fn write(&self, set: usize, way: usize, line: &[u8; LINE_BYTES]) {
        let at = self.region.base() + (set * SET_BYTES + way * LINE_BYTES) as u64;
        self.engine.write_bytes(at, line).expect("a line lies in the region, which is ours and stays registered");
    }
}

impl Publish for Published {
    fn put(&mut self, place: &Place, checksum: &Checksum) {
        let Place { hash, offset, size } = *place;
        let Some(line) = self.shape.encode(&hash, size.0, &Line { offset, checksum: *checksum }) else { return };
        let (set, owner) = (self.shape.set(&hash) as usize, owner(&hash, size));
        let free = self.owners[set].iter().position(|&theirs| theirs == 0);
        // A block whose line is taken is found by asking.
        let way = free.unwrap_or_else(|| {
            self.hand = (self.hand + 1) % WAYS;
            self.hand
        });
        self.owners[set][way] = owner;
        self.write(set, way, &line);
    }

    fn take(&mut self, hash: &BlockHash, size: BlockBytes) {
        let (set, owner) = (self.shape.set(hash) as usize, owner(hash, size));
        if let Some(way) = self.owners[set].iter().position(|&theirs| theirs == owner) {
            self.owners[set][way] = 0;
            self.write(set, way, &[0; LINE_BYTES]);
        }
    }
}

/// Names a block among the eight of its set; never 0.
fn owner(hash: &BlockHash, size: BlockBytes) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&hash.0[8..]);
    (u64::from_le_bytes(eight) ^ size.0.rotate_left(32)).max(1)
}
