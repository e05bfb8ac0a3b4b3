//! What a node counts of its disk.
//!
//! | name | unit | labels |
//! | --- | --- | --- |
//! | `kvasir_kv_store_disk_state` | 1 for the state it is in | `state`: working, full, failing |
//! | `kvasir_kv_store_disk_waiting` | operations | `operation`: read, write (forgotten ones too) |
//! | `kvasir_kv_store_disk_bytes_total` | bytes | `direction`: read, written |
//! | `kvasir_kv_store_disk_failed_total` | operations | `reason`: mismatch, full, io, busy, resting |

use std::sync::Arc;

use kvasir_runtime::metrics::set_total;

use super::{Disk, State, Stats};

/// Shows the disk's counters on the node's page of metrics.
pub fn copy_at_scrape(page: &kvasir_runtime::Metrics, disk: &Arc<Disk>) {
    type One = [(&'static str, &'static str); 1];
    let states = page.gauges::<One>("kvasir_kv_store_disk_state", "1 for the state the disk is in.");
    let waiting = page.gauges::<One>("kvasir_kv_store_disk_waiting", "Operations that wait for the disk's threads.");
    let moved = page.counters::<One>("kvasir_kv_store_disk_bytes", "Bytes of blocks read from and written to disk.");
    let failed = page.counters::<One>("kvasir_kv_store_disk_failed", "Blocks that could not be read or written.");
    // The page outlives the node where the process does, and a disk in use is no other node's.
    let disk = Arc::downgrade(disk);
    page.on_scrape(move || {
        let Some(disk) = disk.upgrade() else { return };
        let (state, stats) = (disk.state(), disk.stats());
        for known in State::ALL {
            states.get_or_create(&[("state", known.name())]).set(i64::from(known == state));
        }
        let Stats { read_bytes, written_bytes, mismatches, full, io_errors, busy, resting, .. } = stats;
        for (operation, count) in [("read", stats.waiting_reads), ("write", stats.waiting_writes)] {
            waiting.get_or_create(&[("operation", operation)]).set(count.try_into().unwrap_or(i64::MAX));
        }
        for (direction, bytes) in [("read", read_bytes), ("written", written_bytes)] {
            set_total(&moved.get_or_create(&[("direction", direction)]), bytes);
        }
        for (reason, count) in
            [("mismatch", mismatches), ("full", full), ("io", io_errors), ("busy", busy), ("resting", resting)]
        {
            set_total(&failed.get_or_create(&[("reason", reason)]), count);
        }
    });
}
