//! What the machine has to move bytes with.

use anyhow::Result;
use kvasir_transfer::Topology;

use crate::cli;

/// Prints the topology, and what follows from it for memory of each node.
pub fn run(options: &cli::Topology) -> Result<()> {
    let topology = match &options.file {
        Some(path) => Topology::from_file(path)?,
        None => Topology::detect(),
    };
    if options.json {
        println!("{}", topology.to_json());
    } else {
        print!("{topology}");
    }
    Ok(())
}
