//! What the program understands, and what `--help` teaches.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use kvasir_transfer::Op;
use serde::{Deserialize, Serialize};

/// Measures the Kvasir transfer engine between two processes, on one host or on two.
///
/// Start a target, which owns memory, then an initiator, which reads or writes it:
///
///     kvasir-transfer-bench target --control 127.0.0.1:7000 &
///     kvasir-transfer-bench initiator 127.0.0.1:7000 --op read,write --block 4KiB,64KiB,1MiB
///
/// One outstanding batch of one block is the latency of a single operation; larger batches, more outstanding ones and
/// more threads show what the transport can carry. A working set above the L3 cache (the default) keeps the caches from
/// flattering. `--verify` checks every byte that was moved.
#[derive(Parser)]
#[command(version, verbatim_doc_comment)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Owns memory that initiators read and write; prints one JSON line when it is ready, then serves until killed
    Target(Target),
    /// Reads or writes a target's memory and prints what that took
    Initiator(Initiator),
    /// The engine's local transport and a plain memcpy in this process: what nothing can beat
    Local(Local),
    /// A plain loop over one TCP connection between two processes: what a tcp transport can be held against
    #[command(subcommand)]
    Socket(Socket),
    /// The network devices and NUMA nodes of this machine, and which device is preferred for memory of which node
    Topology(Topology),
}

#[derive(Subcommand)]
pub enum Socket {
    /// Accepts clients and sends or receives as they ask; prints one JSON line when it is ready
    Server(SocketServer),
    /// Streams blocks to or from a server and prints what that took
    Client(SocketClient),
}

/// How the engine is set up: alike for target and initiator.
#[derive(Args, Clone)]
pub struct EngineOptions {
    /// How the bytes travel. `auto` takes the best way that both sides offer; any other is taken or the run fails
    #[arg(long, value_enum, default_value_t = Transport::Auto)]
    pub transport: Transport,
    /// Where the engine listens for peers
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub bind: SocketAddr,
    /// Host or host:port that peers are told, where it is another than the address bound
    #[arg(long, value_name = "HOST")]
    pub advertise: Option<String>,
    /// Connections to each peer [default: the engine's]
    #[arg(long, value_name = "N")]
    pub connections: Option<usize>,
    /// Most bytes in one wire operation; larger blocks are cut [default: the engine's]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub slice: Option<u64>,
    /// Threads that copy for the local and shm transports [default: the engine's]
    #[arg(long, value_name = "N")]
    pub copy_threads: Option<usize>,
    /// UCX's transports, as in UCX_TLS
    #[arg(long, value_name = "LIST")]
    pub ucx_tls: Option<String>,
    /// UCX's devices, as in UCX_NET_DEVICES
    #[arg(long, value_name = "LIST")]
    pub ucx_devices: Option<String>,
    /// Encrypt tcp: this side's certificate, in PEM form
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_authority"])]
    pub tls_certificate: Option<PathBuf>,
    /// The certificate's private key
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    pub tls_key: Option<PathBuf>,
    /// The authority that the other side's certificate must come from
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    pub tls_authority: Option<PathBuf>,
    #[command(flatten)]
    pub memory: MemoryOptions,
}

/// What memory is measured.
#[derive(Args, Clone, Copy)]
pub struct MemoryOptions {
    /// Whether it lies in huge pages
    #[arg(long, value_enum, default_value_t = Pages::Try)]
    pub huge_pages: Pages,
    /// The NUMA node it is taken from [default: the kernel's choice]
    #[arg(long, value_name = "NODE")]
    pub numa_node: Option<u32>,
}

/// Huge pages.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pages {
    /// Pages of the ordinary size
    Never,
    /// Transparent huge pages where the kernel gives them
    Try,
    /// From the kernel's reserved pool, or the run fails
    Require,
}

/// `target`.
#[derive(Args)]
pub struct Target {
    #[command(flatten)]
    pub engine: EngineOptions,
    /// Where initiators ask for descriptor and key; port 0 takes a free one, which the JSON line names
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub control: SocketAddr,
    /// Memory to offer
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "256MiB")]
    pub buffer: u64,
    /// Leave when standard input ends: for programs that start targets and may die
    #[arg(long)]
    pub until_eof: bool,
}

/// How much is moved at a time, and for how long.
#[derive(Args, Clone)]
pub struct Load {
    /// Bytes of a block; several, parted by commas, are measured one after the other
    #[arg(long, value_name = "SIZE", value_parser = size, value_delimiter = ',', default_value = "64KiB")]
    pub block: Vec<u64>,
    /// Bytes that are walked through, on either side: above the L3 cache, or the cache is what is measured
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "256MiB")]
    pub working_set: u64,
    /// Seconds to measure, after a first pass through the working set
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "2")]
    pub duration: f64,
    /// Walk the far side in order instead of scattered. Neighbouring blocks may then be merged into one operation
    #[arg(long)]
    pub sequential: bool,
    /// Print one JSON object per measurement instead of a table
    #[arg(long)]
    pub json: bool,
}

/// `initiator`.
#[derive(Args)]
pub struct Initiator {
    /// The target's control address
    #[arg(value_name = "CONTROL")]
    pub control: String,
    #[command(flatten)]
    pub engine: EngineOptions,
    #[command(flatten)]
    pub load: Load,
    /// Which way: read from the target, write into it, or both one after the other
    #[arg(long, value_enum, value_delimiter = ',', default_value = "read")]
    pub op: Vec<Direction>,
    /// Blocks in a batch, which is submitted as a whole; latency is that of a batch
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub batch: u32,
    /// Threads that submit
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub threads: u32,
    /// Batches that each thread keeps in progress
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub outstanding: u32,
    /// Check every byte after each pass through the working set; checking is not timed
    #[arg(long)]
    pub verify: bool,
}

/// `local`.
#[derive(Args)]
pub struct Local {
    #[command(flatten)]
    pub load: Load,
    #[command(flatten)]
    pub memory: MemoryOptions,
    /// Blocks in a batch
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub batch: u32,
}

/// `socket server`.
#[derive(Args)]
pub struct SocketServer {
    /// Where to listen; port 0 takes a free one, which the JSON line names
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Leave when standard input ends: for programs that start servers and may die
    #[arg(long)]
    pub until_eof: bool,
}

/// `socket client`.
#[derive(Args)]
pub struct SocketClient {
    /// The server's address
    #[arg(value_name = "SERVER")]
    pub server: String,
    #[command(flatten)]
    pub load: Load,
    /// Which way: read from the server, write to it, or both one after the other
    #[arg(long, value_enum, value_delimiter = ',', default_value = "read")]
    pub op: Vec<Direction>,
}

/// `topology`.
#[derive(Args)]
pub struct Topology {
    /// Read it from this file instead of asking the system
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Print it in the form such a file has
    #[arg(long)]
    pub json: bool,
}

/// A way for the bytes.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// The best that both sides offer
    Auto,
    /// The target's memory is mapped; same host only
    Shm,
    /// libucp: RDMA, or what else UCX finds
    Ucx,
    /// Sockets
    Tcp,
}

/// Which way the bytes go, seen from the initiator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From the target
    Read,
    /// Into the target
    Write,
}

impl Direction {
    pub fn op(self) -> Op {
        match self {
            Self::Read => Op::Read,
            Self::Write => Op::Write,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// `4096`, `64KiB`, `1M`: binary units, with or without `iB`.
pub fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        _ => return Err(format!("'{unit}' is no unit; there are KiB, MiB and GiB")),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    match bytes {
        Some(0) => Err("must be more than nothing".into()),
        Some(bytes) if bytes <= 1 << 40 => Ok(bytes),
        _ => Err("wants a whole number of bytes up to 1024GiB, such as 64KiB".into()),
    }
}

/// The shortest honest name of a size.
pub fn size_name(bytes: u64) -> String {
    for (unit, factor) in [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes >= factor && bytes.is_multiple_of(factor) {
            return format!("{} {unit}", bytes / factor);
        }
    }
    format!("{bytes} B")
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.01..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("wants 0.01 to 3600 seconds".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_in_binary_units_and_written_back() {
        for (text, bytes) in [("4096", 4096), ("64KiB", 65536), ("64k", 65536), ("16M", 16 << 20), ("1GiB", 1 << 30)] {
            assert_eq!(size(text), Ok(bytes));
            assert_eq!(size(&size_name(bytes).replace(' ', "")), Ok(bytes));
        }
        for text in ["", "0", "KiB", "1.5M", "-1", "4 parsecs", "99999999999999999999", "2000GiB"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
