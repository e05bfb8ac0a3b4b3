//! The disk of a store node at the job of `tests/rivals/foyer`: blocks from registered memory to disk, and back at random
//! into registered memory. Prints one JSON row; with `--plain` that of a plain loop over one file, which is the bound.
//!
//! kvasir-disk-bench DIR VALUE_BYTES TOTAL_BYTES READ_BYTES [--plain] [--buffered] [--depth N] [--threads N]

#![forbid(unsafe_code)]

use std::{
    fs::{self, File},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use kvasir_kv_store::disk::{Direct, Disk, DiskConfig, DiskOffset, Failure, Record, Settings, slot_bytes};
use kvasir_transfer::{Allocation, MemoryRange, TransferEngine};
use kvasir_types::BlockHash;

/// Bytes written that may wait for the disk at a time, as in foyer's.
const IN_FLIGHT: u64 = 48 << 20;
const SLAB: u64 = 16 << 20;

#[derive(Clone)]
struct Options {
    dir: PathBuf,
    value: u64,
    total: u64,
    reads: u64,
    plain: bool,
    buffered: bool,
    depth: u64,
    threads: usize,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self {
            dir: PathBuf::new(),
            value: 0,
            total: 0,
            reads: 0,
            plain: false,
            buffered: false,
            depth: 8,
            threads: DiskConfig::default().threads,
        };
        let (mut plain, mut arguments) = (Vec::new(), std::env::args().skip(1));
        while let Some(argument) = arguments.next() {
            let mut next = || arguments.next().context("a value is missing")?.parse::<u64>().context("not a number");
            match argument.as_str() {
                "--plain" => options.plain = true,
                "--buffered" => options.buffered = true,
                "--depth" => options.depth = next()?,
                "--threads" => options.threads = next()? as usize,
                _ => plain.push(argument),
            }
        }
        let [dir, value, total, reads] = &plain[..] else { bail!("DIR VALUE_BYTES TOTAL_BYTES READ_BYTES") };
        options.dir = dir.into();
        (options.value, options.total, options.reads) = (value.parse()?, total.parse()?, reads.parse()?);
        Ok(options)
    }

    fn count(&self) -> u64 {
        self.total / self.value
    }

    fn per_slab(&self) -> u64 {
        SLAB / slot_bytes(self.value)
    }

    /// Where the n-th value lies on disk.
    fn slot(&self, key: u64) -> DiskOffset {
        DiskOffset(key / self.per_slab() * SLAB + key % self.per_slab() * slot_bytes(self.value))
    }

    fn settings(&self) -> Result<Settings> {
        let config = DiskConfig {
            path: Some(self.dir.clone()),
            capacity_bytes: (self.count() / self.per_slab() + 1) * SLAB,
            threads: self.threads,
            direct: if self.buffered { Direct::Off } else { Direct::Auto },
            queue: 1 << 20,
            ..DiskConfig::default()
        };
        config.settings(SLAB)?.context("there is a path")
    }
}

/// Memory slots of one size, given out and taken back.
#[derive(Clone)]
struct Slots(Arc<(Mutex<mpsc::Receiver<u64>>, mpsc::SyncSender<u64>)>);

impl Slots {
    fn new(count: u64, stride: u64) -> Result<Self> {
        let (sender, receiver) = mpsc::sync_channel(count as usize);
        for number in 0..count {
            sender.send(number * stride)?;
        }
        Ok(Self(Arc::new((Mutex::new(receiver), sender))))
    }

    fn take(&self) -> Result<u64> {
        Ok(self.0.0.lock().ok().context("nobody panics")?.recv()?)
    }

    fn put(&self, slot: u64) {
        let _ = self.0.1.send(slot);
    }
}

struct Row {
    who: &'static str,
    write_s: f64,
    write_cpu: f64,
    read_s: f64,
    read_cpu: f64,
    asked: u64,
    found: u64,
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    let _ = fs::remove_dir_all(&options.dir);
    fs::create_dir_all(&options.dir)?;
    let arena = (IN_FLIGHT + 64 * options.value).next_multiple_of(options.value);
    let engine = TransferEngine::builder().arena(Allocation::new(arena as usize)).build()?;
    for at in (0..arena).step_by(1 << 20) {
        engine.write_bytes(at, &vec![1; (arena - at).min(1 << 20) as usize])?; // touched before anything is timed
    }
    let row = if options.plain { plain(&options, &engine)? } else { ours(&options, &engine)? };
    print(&options, &row);
    let _ = fs::remove_dir_all(&options.dir);
    Ok(())
}

fn print(options: &Options, row: &Row) {
    let gib = (1u64 << 30) as f64;
    let (written, read) = ((options.count() * options.value) as f64, (row.found * options.value) as f64);
    let json = serde_json::json!({
        "who": row.who,
        "direct": !options.buffered,
        "value_bytes": options.value,
        "values": options.count(),
        "write_gb_per_s": written / row.write_s / 1e9,
        "write_cpu_s_per_gib": row.write_cpu / (written / gib),
        "written_per_byte": if options.plain { 1.0 } else { 1.0 + 128.0 / options.value as f64 },
        "read_gb_per_s": read / row.read_s / 1e9,
        "read_cpu_s_per_gib": row.read_cpu / (read / gib),
        "asked": row.asked,
        "found": row.found,
    });
    println!("{json}");
}

fn ours(options: &Options, engine: &TransferEngine) -> Result<Row> {
    let disk = Disk::open(options.settings()?, engine.clone(), |_| {})?;
    let slots = Slots::new(IN_FLIGHT / options.value, options.value)?;
    // In a node a block comes with its writer's checksum: making it is not the disk's.
    let checksums = (0..options.count()).map(|key| {
        engine.write_bytes(0, &key.to_le_bytes())?;
        engine.checksum(0, options.value)
    });
    let checksums = checksums.collect::<Result<Vec<_>, _>>()?;
    let (cpu, start) = (cpu_s(), Instant::now());
    for key in 0..options.count() {
        let from = slots.take()?;
        engine.write_bytes(from, &key.to_le_bytes())?;
        let record = record(key, options.value, checksums[key as usize]);
        let done = slots.clone();
        disk.write(options.slot(key), record, from, move |result: Result<(), Failure>| {
            result.expect("written");
            done.put(from);
        })?;
    }
    for _ in 0..IN_FLIGHT / options.value {
        slots.take()?;
    }
    let (write_s, write_cpu) = (start.elapsed().as_secs_f64(), cpu_s() - cpu);

    let slots = Slots::new(options.depth, options.value)?;
    let (asked, found) = (options.reads / options.value, Arc::new(AtomicU64::new(0)));
    let (cpu, start) = (cpu_s(), Instant::now());
    for turn in 0..asked {
        let (key, into) = (random(turn) % options.count(), slots.take()?);
        let (done, found, ours) = (slots.clone(), found.clone(), engine.clone());
        let memory = MemoryRange { offset: into, len: options.value };
        disk.read(options.slot(key), memory, checksums[key as usize], move |result: Result<(), Failure>| {
            let mut stamp = [0; 8];
            ours.read_bytes(into, &mut stamp).expect("inside the arena");
            assert!(result.is_err() || stamp == key.to_le_bytes(), "the right value");
            found.fetch_add(u64::from(result.is_ok()), Ordering::Relaxed);
            done.put(into);
        })?;
    }
    for _ in 0..options.depth {
        slots.take()?;
    }
    let (read_s, read_cpu) = (start.elapsed().as_secs_f64(), cpu_s() - cpu);
    let found = found.load(Ordering::Relaxed);
    Ok(Row { who: "kvasir", write_s, write_cpu, read_s, read_cpu, asked, found })
}

/// What the disk does for as many threads that do nothing else, without records and checksums.
fn plain(options: &Options, engine: &TransferEngine) -> Result<Row> {
    let mut open = File::options();
    open.read(true).write(true).create(true).truncate(false);
    if !options.buffered {
        open.custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed());
    }
    let file = open.open(options.dir.join("plain"))?;
    let each = |count: u64, act: &(dyn Fn(u64, MemoryRange) -> Result<(), kvasir_transfer::Error> + Sync)| {
        let (turn, cpu, start) = (AtomicU64::new(0), cpu_s(), Instant::now());
        thread::scope(|scope| {
            for thread in 0..options.depth.min(64) {
                let memory = MemoryRange { offset: thread * options.value, len: options.value };
                let turn = &turn;
                scope.spawn(move || {
                    while let Some(turn) = Some(turn.fetch_add(1, Ordering::Relaxed)).filter(|&turn| turn < count) {
                        act(turn, memory).expect("the disk works");
                    }
                });
            }
        });
        (start.elapsed().as_secs_f64(), cpu_s() - cpu)
    };
    let (write_s, write_cpu) =
        each(options.count(), &|turn, memory| engine.write_file_at(&file, turn * options.value, &[memory]));
    let asked = options.reads / options.value;
    let (read_s, read_cpu) = each(asked, &|turn, memory| {
        engine.read_file_at(&file, random(turn) % options.count() * options.value, &[memory])
    });
    Ok(Row { who: "plain loop", write_s, write_cpu, read_s, read_cpu, asked, found: asked })
}

fn record(key: u64, bytes: u64, checksum: [u8; 16]) -> Record {
    let mut hash = [0; 16];
    hash[..8].copy_from_slice(&key.to_le_bytes());
    Record { hash: BlockHash(hash), bytes, checksum, position: 0, parent: 0, group: 0, origin: 0 }
}

/// The same keys in every run (splitmix64), and the same as foyer's.
fn random(turn: u64) -> u64 {
    let mut z = turn.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Seconds of processor time of this process so far.
fn cpu_s() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    [11, 12].iter().filter_map(|&at| fields.get(at)?.parse::<f64>().ok()).sum::<f64>() / 100.0
}
