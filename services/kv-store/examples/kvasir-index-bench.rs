//! What the index of a store node takes in memory for each block, in a process of its own. Prints one JSON row.
//!
//! kvasir-index-bench BLOCKS

#![forbid(unsafe_code)]

use anyhow::{Context as _, Result};
use kvasir_kv_store::footprint::bytes_per_block;

fn main() -> Result<()> {
    let blocks: u64 = std::env::args().nth(1).context("how many blocks?")?.parse().context("not a number of blocks")?;
    println!("{}", serde_json::json!({ "blocks": blocks, "bytes_per_block": bytes_per_block(blocks)? }));
    Ok(())
}
