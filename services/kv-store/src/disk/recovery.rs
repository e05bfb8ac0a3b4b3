//! What a node finds on its disk after a restart: one pass over the records, none over the bytes.
//!
//! Reads as far as records were ever written (the file has holes for the rest), a slab at a time. Whatever is not a whole
//! record of this place is passed over. What contradicts itself within a slab is settled here: a slab that was cut anew
//! may still hold records of its former size, and the latest record says which size it has now.

use std::{fs::File, os::unix::fs::FileExt as _};

use rustix::{fs::SeekFrom, io::Errno};

use super::{
    Error,
    directory::{Directory, failed},
    record::{DiskOffset, RECORD_BYTES, Record, Sequence, decode, slot_bytes},
};

/// A block that was on disk when the node began.
///
/// Within one slab all slots found are of one size ([`slot_bytes`]), at multiples of it, and no two are the same. Its bytes
/// were not looked at: reading them may find that they are not what the record says. The same hash may be found in two slots:
/// the greater [`Sequence`] was written later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Where.
    pub slot: DiskOffset,
    /// What.
    pub record: Record,
    /// How late it was written.
    pub sequence: Sequence,
}

/// What a recovery leaves for those who write.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Recovery {
    /// For the next record.
    pub(super) next: Sequence,
    /// For each slab, how far it has been written at least.
    pub(super) written: Vec<u64>,
}

pub(super) fn recover(directory: &Directory, found: &mut dyn FnMut(Recovered)) -> Result<Recovery, Error> {
    let Directory { geometry, records, data, .. } = directory;
    let looked = failed("look at", directory.path());
    let (data_len, records_len) = match (data.metadata(), records.metadata()) {
        (Ok(data), Ok(records)) => (data.len(), records.len()),
        (Err(error), _) | (_, Err(error)) => return Err(looked(error)),
    };
    let slab_records = geometry.slab_record_bytes();
    let mut recovery =
        Recovery { next: Sequence(1), written: vec![0; (geometry.capacity_bytes / geometry.slab_bytes) as usize] };
    let (mut blocks, mut damaged, mut at) = (0u64, 0u64, 0);
    let mut slab_found = Vec::new();
    let mut bytes = Vec::new();
    while let Some(start) = next_data(records, at).filter(|&start| start < records_len) {
        let slab = start / slab_records;
        let end = (slab + 1) * slab_records;
        at = start;
        while let Some((from, to)) = extent(records, at, end.min(records_len)) {
            bytes.resize((to - from) as usize, 0);
            if let Err(error) = records.read_exact_at(&mut bytes, from) {
                tracing::warn!(%error, slab, "records of blocks on disk cannot be read, these blocks are lost");
            } else {
                for (record, place) in bytes.as_chunks::<RECORD_BYTES>().0.iter().zip((from..).step_by(RECORD_BYTES)) {
                    match decode(record) {
                        // One that is not where its slot's record belongs is a copy that something went wrong with.
                        Some((record, slot, _)) if geometry.record_at(slot, record.bytes) != Some(place) => {
                            damaged += 1
                        }
                        Some((record, slot, sequence)) => slab_found.push(Recovered { slot, record, sequence }),
                        None if record.iter().all(|&byte| byte == 0) => {}
                        None => damaged += 1,
                    }
                }
            }
            at = to;
        }
        at = end;
        // A record counts only if its bytes can be there at all.
        slab_found.retain(|Recovered { slot, record, .. }| slot.0 + record.bytes <= data_len);
        if let Some(latest) = slab_found.iter().max_by_key(|found| found.sequence) {
            let size = slot_bytes(latest.record.bytes);
            recovery.next = recovery.next.max(Sequence(latest.sequence.0.saturating_add(1)));
            slab_found.retain(|found| slot_bytes(found.record.bytes) == size);
            for found_here in slab_found.drain(..) {
                let end = found_here.slot.0 % geometry.slab_bytes + size;
                let written = &mut recovery.written[slab as usize];
                *written = end.max(*written);
                blocks += 1;
                found(found_here);
            }
        }
    }
    tracing::info!(path = %directory.path().display(), blocks, damaged, "blocks on disk");
    Ok(recovery)
}

/// The next part of `from..to` that is no hole, in whole records.
fn extent(file: &File, from: u64, to: u64) -> Option<(u64, u64)> {
    let start = next_data(file, from).filter(|&start| start < to)?;
    let hole = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap_or(to).min(to);
    let record = RECORD_BYTES as u64;
    let end = hole.next_multiple_of(record).min(to / record * record);
    (start < end).then_some((start, end))
}

/// Where the next bytes are that were written, at a record's beginning.
fn next_data(file: &File, from: u64) -> Option<u64> {
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(at) => Some((at / RECORD_BYTES as u64 * RECORD_BYTES as u64).max(from)),
        Err(Errno::NXIO) => None,
        // A file system that knows of no holes.
        Err(_) => file.metadata().ok().filter(|it| from < it.len()).map(|_| from),
    }
}
