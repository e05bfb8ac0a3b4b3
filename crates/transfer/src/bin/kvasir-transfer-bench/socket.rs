//! A plain loop over one connection: what the kernel's sockets carry between two processes without any protocol.
//!
//! The client says once per pass what it wants, then one side writes block after block out of a working set and the other
//! reads block after block into one as large. Only the end of a pass is acknowledged: no program that must know what
//! arrived can be faster over one connection.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{
    cli::{self, Direction},
    measure::{Histogram, cpu_seconds},
    output::{Found, Output},
    pattern,
    target::leave_at_eof,
};

/// Largest working set a client may ask a server for.
const LIMIT: u64 = 1 << 36;

/// What a client wants next: direction, block size, blocks of the pass.
struct Pass {
    op: Direction,
    block: u64,
    blocks: u64,
}

impl Pass {
    const BYTES: usize = 24;

    fn encode(&self) -> [u8; Self::BYTES] {
        let op = match self.op {
            Direction::Read => 0,
            Direction::Write => 1,
        };
        let mut bytes = [0; Self::BYTES];
        for (place, word) in bytes.chunks_exact_mut(8).zip([op, self.block, self.blocks]) {
            place.copy_from_slice(&u64::to_le_bytes(word));
        }
        bytes
    }

    fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let word =
            |at: usize| bytes[8 * at..8 * (at + 1)].iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        let op = match word(0) {
            0 => Direction::Read,
            1 => Direction::Write,
            other => anyhow::bail!("a client asked for operation {other}"),
        };
        let (block, blocks) = (word(1), word(2));
        let total = block.saturating_mul(blocks);
        ensure!((1..=LIMIT).contains(&total), "a client asked for {blocks} blocks of {block} bytes");
        Ok(Self { op, block, blocks })
    }

    /// Moves the pass's blocks out of or into `memory`.
    fn stream(&self, socket: &mut TcpStream, memory: &mut [u8], send: bool) -> Result<()> {
        let total = (self.block * self.blocks) as usize;
        for block in memory[..total].chunks_exact_mut(self.block as usize) {
            if send { socket.write_all(block)? } else { socket.read_exact(block)? }
        }
        Ok(())
    }
}

/// Serves clients one after the other until it is killed (or standard input ends, if that was asked for).
pub fn serve(options: &cli::SocketServer) -> Result<()> {
    let listener = TcpListener::bind(options.listen).with_context(|| format!("listen on {}", options.listen))?;
    println!("{}", json!({"ready": true, "listen": listener.local_addr()?}));
    if options.until_eof {
        leave_at_eof();
    }
    let mut memory = Vec::new();
    for socket in listener.incoming() {
        if let Err(error) = serve_client(socket?, &mut memory) {
            eprintln!("kvasir-transfer-bench: a client left in the middle: {error:#}");
        }
    }
    Ok(())
}

fn serve_client(mut socket: TcpStream, memory: &mut Vec<u8>) -> Result<()> {
    socket.set_nodelay(true)?;
    let mut head = [0; Pass::BYTES];
    while socket.read_exact(&mut head).is_ok() {
        let pass = Pass::decode(&head)?;
        grow(memory, pass.block * pass.blocks)?;
        pass.stream(&mut socket, memory, pass.op == Direction::Read)?;
        socket.write_all(&cpu_seconds().to_le_bytes())?;
    }
    Ok(())
}

/// Touched memory of at least `len` bytes.
fn grow(memory: &mut Vec<u8>, len: u64) -> Result<()> {
    let (before, len) = (memory.len(), usize::try_from(len)?);
    if before < len {
        memory.try_reserve_exact(len - before).context("no memory for a working set as large")?;
        memory.resize(len, 0);
        pattern::fill(0, before as u64, &mut memory[before..]);
    }
    Ok(())
}

/// Measures what was asked for, in turn.
pub fn run(options: &cli::SocketClient) -> Result<()> {
    let mut socket = TcpStream::connect(&options.server).with_context(|| format!("connect to {}", options.server))?;
    socket.set_nodelay(true)?;
    let mut memory = Vec::new();
    grow(&mut memory, options.load.working_set)?;
    let mut output = Output::new(options.load.json);
    for &block in &options.load.block {
        for &op in &options.op {
            let blocks = options.load.working_set / block;
            ensure!(blocks > 0, "a working set holds at least one block");
            let pass = Pass { op, block, blocks };
            output.show(&measure(&mut socket, &mut memory, &pass, options.load.duration)?)?;
        }
    }
    Ok(())
}

fn measure(socket: &mut TcpStream, memory: &mut [u8], pass: &Pass, duration: f64) -> Result<Found> {
    let far_before = once(socket, memory, pass)?; // touches the far side's memory
    let (near_before, started) = (cpu_seconds(), Instant::now());
    let mut latencies = Histogram::default();
    let mut far_after = far_before;
    while started.elapsed() < Duration::from_secs_f64(duration) {
        let begun = Instant::now();
        far_after = once(socket, memory, pass)?;
        latencies.record(begun.elapsed());
    }
    let (seconds, near_after) = (started.elapsed().as_secs_f64(), cpu_seconds());
    let pass_bytes = pass.block * pass.blocks;
    let bytes = latencies.taken() * pass_bytes;
    let gib = bytes as f64 / f64::from(1 << 30);
    Ok(Found {
        over: "socket".into(),
        op: pass.op,
        block_bytes: pass.block,
        batch_blocks: u32::try_from(pass.blocks)?,
        threads: 1,
        outstanding: 1,
        working_set_bytes: pass_bytes,
        seconds,
        bytes,
        batches: latencies.taken(),
        gb_per_s: bytes as f64 / seconds / 1e9,
        latency_us: latencies.latency(),
        cpu_s_per_gib: (near_after - near_before) / gib,
        far_cpu_s_per_gib: Some((far_after - far_before) / gib),
        verified_bytes: None,
    })
}

/// One pass; the server's processor seconds so far.
fn once(socket: &mut TcpStream, memory: &mut [u8], pass: &Pass) -> Result<f64> {
    socket.write_all(&pass.encode())?;
    pass.stream(socket, memory, pass.op == Direction::Write)?;
    let mut done = [0; 8];
    socket.read_exact(&mut done)?;
    Ok(f64::from_le_bytes(done))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_wants_is_understood_and_bounded() {
        let pass = Pass::decode(&Pass { op: Direction::Write, block: 4096, blocks: 7 }.encode()).unwrap();
        assert_eq!((pass.op, pass.block, pass.blocks), (Direction::Write, 4096, 7));
        for (block, blocks) in [(0, 1), (1, 0), (u64::MAX, 2), (1 << 30, 1 << 30)] {
            assert!(Pass::decode(&Pass { op: Direction::Read, block, blocks }.encode()).is_err());
        }
        assert!(Pass::decode(&[9; Pass::BYTES]).is_err());
    }
}
