//! What is measured: loads, on whose side, and the figures that come out.

use std::collections::HashMap;

/// Bytes of the values that are put and got in one go, in a whole run: several times any third-level cache of one
/// socket's share.
pub const WORKING_SET: u64 = 256 << 20;
/// The same if it is only to be seen that everything works.
pub const SMOKE_WORKING_SET: u64 = 64 << 20;
/// Sizes of values.
pub const SIZES: [u64; 3] = [64 << 10, 1 << 20, 4 << 20];
/// Bytes of a batch.
const BATCH: u64 = 32 << 20;
/// Blocks of a prompt that is looked up.
pub const PROMPT: u64 = 100;
/// Callers that look up at the same time, each one prompt after the other.
pub const CALLERS: [u64; 3] = [1, 4, 16];
/// Nodes among which the same load is spread.
pub const NODES: [usize; 3] = [1, 2, 4];
/// Prompts whose cost is compared between clusters of so many nodes, in blocks: one placement group, and several.
pub const SPREAD: [u64; 2] = [32, 256];

/// Which way the values go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    Put,
    Get,
}

impl Way {
    pub fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
        }
    }
}

/// One thing that is asked of everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Load {
    /// Values of that size, so many in one call, one call after the other.
    Values { way: Way, block: u64, batch: u64 },
    /// Prompts of [`PROMPT`] blocks looked up by so many callers.
    Lookups { callers: u64 },
}

impl Load {
    /// As the table names it.
    pub fn name(&self) -> String {
        match *self {
            Self::Values { way, block, batch: 1 } => format!("{} {}", way.name(), size(block)),
            Self::Values { way, block, batch } => format!("batch {} {batch} x {}", way.name(), size(block)),
            Self::Lookups { callers } => {
                format!("lookups, {PROMPT} blocks, {callers} caller{}", if callers == 1 { "" } else { "s" })
            }
        }
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        bytes if bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        bytes => format!("{} KiB", bytes >> 10),
    }
}

/// How many values of a size one call may name: one, and a batch.
pub fn batches(block: u64) -> [u64; 2] {
    [1, (BATCH / block).max(1)]
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Ours, by the transport it chooses: on one host, shared memory.
    Auto,
    /// Ours by TCP, as Mooncake.
    Tcp,
    Mooncake,
}

impl Side {
    pub const ALL: [Self; 3] = [Self::Auto, Self::Mooncake, Self::Tcp];

    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Tcp => "tcp",
            Self::Mooncake => "Mooncake Store",
        }
    }
}

/// What one measurement found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figure {
    pub gb_per_s: f64,
    pub calls_per_s: f64,
    pub p99_us: f64,
    pub p50_us: f64,
}

/// All that was found, in order of the repetitions, and why nothing was.
#[derive(Default)]
pub struct Found {
    figures: HashMap<(Side, Load), Vec<Figure>>,
    missing: HashMap<Side, String>,
    /// Processor time of one prompt's get in µs, by its blocks and the number of nodes.
    pub spread: HashMap<(u64, usize), Vec<f64>>,
}

impl Found {
    pub fn add(&mut self, side: Side, load: Load, figure: Figure) {
        self.figures.entry((side, load)).or_default().push(figure);
    }

    /// Notes that a side can't be measured (any more). What was found before stays.
    pub fn miss(&mut self, side: Side, reason: &str) {
        self.missing.entry(side).or_insert_with(|| reason.to_owned());
    }

    pub fn is_missing(&self, side: Side) -> bool {
        self.missing.contains_key(&side)
    }

    /// One figure of each repetition, or why there is none.
    pub fn get(&self, side: Side, load: Load, pick: fn(&Figure) -> f64) -> Result<Vec<f64>, &str> {
        match self.figures.get(&(side, load)) {
            Some(figures) => Ok(figures.iter().map(pick).collect()),
            None => Err(self.missing.get(&side).map_or("not measured", String::as_str)),
        }
    }
}
