//! How large a tier is: in blocks, in bytes, or beside what the trace asks for.

use std::{fmt, str::FromStr};

/// Room for blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// So many.
    Blocks(u64),
    /// As many as fit.
    Bytes(u64),
    /// So many of a hundred distinct blocks of the trace.
    Percent(f64),
}

/// A size that can't be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no size: 5000 (blocks), 5% (of the trace's distinct blocks), 64MiB, 10GiB or 2TiB")]
pub struct NoSize(String);

impl Size {
    /// In blocks of `block_bytes`, beside `distinct` blocks of a trace.
    pub fn blocks(self, distinct: u32, block_bytes: u64) -> usize {
        match self {
            Self::Blocks(blocks) => blocks as usize,
            Self::Bytes(bytes) => (bytes / block_bytes.max(1)) as usize,
            Self::Percent(percent) => (f64::from(distinct) * percent / 100.0).round() as usize,
        }
    }
}

impl FromStr for Size {
    type Err = NoSize;

    fn from_str(text: &str) -> Result<Self, NoSize> {
        let no_size = || NoSize(text.to_owned());
        let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
        if let Some(percent) = text.strip_suffix('%') {
            let percent: f64 = percent.parse().map_err(|_| no_size())?;
            return (0.0..=1000.0).contains(&percent).then_some(Self::Percent(percent)).ok_or_else(no_size);
        }
        for (unit, shift) in units {
            if let Some(number) = text.strip_suffix(unit) {
                let number: u64 = number.parse().map_err(|_| no_size())?;
                return number.checked_mul(1 << shift).map(Self::Bytes).ok_or_else(no_size);
            }
        }
        text.parse().map(Self::Blocks).map_err(|_| no_size())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocks(blocks) => write!(f, "{blocks}"),
            Self::Bytes(bytes) => write!(f, "{} MiB", bytes >> 20),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_every_unit() {
        let blocks = |text: &str| text.parse::<Size>().unwrap().blocks(2000, 1 << 20);
        assert_eq!(["7", "5%", "0.5%", "64MiB", "2GiB"].map(blocks), [7, 100, 10, 64, 2048]);
        for wrong in ["", "-1", "5 %", "x%", "-3%", "NaN%", "5GB", "99999999999TiB"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
    }
}
