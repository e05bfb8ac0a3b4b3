//! What is measured: loads, who carries them, and the figures that come out.

use std::collections::HashMap;

/// Bytes walked through on either side: several times any third-level cache of one socket's share.
pub const WORKING_SET: u64 = 256 << 20;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    Read,
    Write,
}

impl Way {
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// So many blocks of that size at a time, one batch after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Load {
    pub op: Way,
    pub block: u64,
    pub batch: u64,
}

impl Load {
    /// As the table names it.
    pub fn name(&self) -> String {
        let size = match self.block {
            block if block.is_multiple_of(1 << 20) => format!("{} MiB", block >> 20),
            block => format!("{} KiB", block >> 10),
        };
        format!("{size} {}", self.op.name())
    }
}

/// Block sizes, and how many blocks a batch of each has. From 64 KiB on a batch is 64 MiB, so that even a program that
/// moves the same batch again and again (Mooncake's) has twice the third-level cache to go through.
pub const STREAMS: [(u64, u64); 5] = [(4 << 10, 1024), (64 << 10, 1024), (1 << 20, 64), (16 << 20, 4), (64 << 20, 1)];

/// One operation at a time: what counts is how long it takes.
pub const SINGLE: u64 = 4 << 10;

/// All loads.
pub fn loads() -> Vec<Load> {
    let streams = STREAMS.into_iter().chain([(SINGLE, 1)]);
    streams.flat_map(|(block, batch)| [Way::Read, Way::Write].map(|op| Load { op, block, batch })).collect()
}

/// Who carries a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Carrier {
    Auto,
    Tcp,
    Ucx,
    Local,
    Memcpy,
    Socket,
    Mooncake,
    NixlHost,
    NixlTcp,
}

impl Carrier {
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Tcp => "tcp",
            Self::Ucx => "ucx",
            Self::Local => "local",
            Self::Memcpy => "memcpy",
            Self::Socket => "plain socket loop",
            Self::Mooncake => "Mooncake TCP",
            Self::NixlHost => "NIXL same host",
            Self::NixlTcp => "NIXL TCP",
        }
    }
}

/// What one measurement found.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    pub gb_per_s: f64,
    /// Median of a batch's; the mean where that is all a program tells.
    pub latency_us: f64,
    /// Both processes together.
    pub cpu_s_per_gib: f64,
}

/// All that was found, in order of the repetitions, and why nothing was.
#[derive(Default)]
pub struct Found {
    figures: HashMap<(Carrier, Load), Vec<Figure>>,
    missing: HashMap<Carrier, String>,
}

impl Found {
    pub fn add(&mut self, carrier: Carrier, load: Load, figure: Figure) {
        self.figures.entry((carrier, load)).or_default().push(figure);
    }

    /// Notes that a carrier can't be measured (any more). What was found before stays.
    pub fn miss(&mut self, carrier: Carrier, reason: &str) {
        self.missing.entry(carrier).or_insert_with(|| reason.to_owned());
    }

    pub fn is_missing(&self, carrier: Carrier) -> bool {
        self.missing.contains_key(&carrier)
    }

    /// One figure of each repetition, or why there is none.
    pub fn get(&self, carrier: Carrier, load: Load, pick: fn(&Figure) -> f64) -> Result<Vec<f64>, &str> {
        match self.figures.get(&(carrier, load)) {
            Some(figures) => Ok(figures.iter().map(pick).collect()),
            None => Err(self.missing.get(&carrier).map_or("not measured", String::as_str)),
        }
    }
}
