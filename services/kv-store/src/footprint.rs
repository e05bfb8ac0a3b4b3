//! What the index takes in memory: for the test that bounds it, and for the benchmark that shows it.

use std::{fs, time::Instant};

use anyhow::{Context as _, Result, ensure};
use kvasir_types::BlockHash;

use crate::{
    Config,
    store::{BlockBytes, Origin, Place, Recovered, Settings, Store},
};

/// Bytes of one block: of no account, nobody has any.
const BLOCK: BlockBytes = BlockBytes(1 << 20);

/// How many bytes this process takes for each of so many blocks, once a store as it is by default has them on its disk.
///
/// # Errors
/// If a block can't be found then, or the process not be measured.
pub fn bytes_per_block(blocks: u64) -> Result<f64> {
    let settings = Config { capacity_bytes: 1 << 30, published_bytes: Some(0), ..Config::default() }.settings(1)?;
    let before = resident_bytes()?;
    let mut store = Store::new(Settings { disk_bytes: blocks * BLOCK.0, ..settings }, Instant::now());
    let recovered = (0..blocks).map(|n| Recovered {
        place: Place { hash: hash(n), offset: n * BLOCK.0, size: BLOCK },
        checksum: [n as u8; 16],
        position: n as u16,
        parent: n as u32,
        group: n,
        origin: Origin::default(),
    });
    let recovered = store.recover(recovered) as u64;
    ensure!(recovered == blocks, "{recovered} of {blocks} blocks are in the index");
    let taken = resident_bytes()?.saturating_sub(before);
    let there = store.exists(BLOCK, &[0, blocks / 2, blocks - 1, blocks].map(hash));
    ensure!(there == [[false, true], [false, true], [false, true], [false, false]], "{there:?}: not what was put in");
    Ok(taken as f64 / blocks as f64)
}

fn hash(n: u64) -> BlockHash {
    let mut hash = [0; 16];
    hash.copy_from_slice(&blake3::hash(&n.to_le_bytes()).as_bytes()[..16]);
    BlockHash(hash)
}

/// Bytes of this process that are in memory.
fn resident_bytes() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS is missing")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("VmRSS is{line}"))?;
    Ok(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_of_ten_million_blocks_takes_under_100_bytes_for_each() {
        let each = bytes_per_block(10_000_000).unwrap();
        println!("{each:.1} bytes for each block");
        assert!(each < 100.0, "{each:.1} bytes for each block");
    }
}
