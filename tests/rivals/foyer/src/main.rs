//! foyer's disk cache at the job of the KV store's disk: values from memory that is there to disk, and back at random into
//! memory that is there. Prints one JSON row.
//!
//! foyer gets the best it offers for this: values are encoded from, and decoded into, buffers that are kept and were
//! touched before, so that each byte is copied once on each way; its own cache in memory holds nothing, so that each read
//! is one of the disk's; direct access; blocks as large as a slab of ours; no compression. Its own checksum (xxhash) is on,
//! as is ours (BLAKE3).
//!
//! foyer-disk-bench DIR VALUE_BYTES TOTAL_BYTES READ_BYTES [--io psync|uring] [--buffered] [--depth N]
//! foyer-disk-bench DIR VALUE_BYTES TOTAL_BYTES 0 --trace FILE [--on-eviction]
//!     how many of the trace's blocks it finds with room for TOTAL_BYTES of them; with --on-eviction blocks that are read
//!     shortly before they would go are written once more

use std::{
    env, fs,
    io::{Read, Write},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use foyer::{
    BlockEngineConfig, Code, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder, HybridCachePolicy,
    IoEngineConfig, PsyncIoEngineConfig, RecoverMode, UringIoEngineConfig,
};

/// Bytes written that may wait for the disk at a time.
const IN_FLIGHT: u64 = 48 << 20;

/// Buffers of one size, kept: what stands for registered memory.
static POOL: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

/// A value in a buffer of the pool.
struct Value(Option<Box<[u8]>>);

impl Value {
    fn take(len: usize) -> Self {
        let kept = POOL.lock().unwrap().pop();
        Self(Some(kept.filter(|buffer| buffer.len() == len).unwrap_or_else(|| vec![1; len].into())))
    }

    fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap()
    }

    fn stamp(&mut self, key: u64) {
        self.0.as_mut().unwrap()[..8].copy_from_slice(&key.to_le_bytes());
    }
}

impl Drop for Value {
    fn drop(&mut self) {
        POOL.lock().unwrap().extend(self.0.take());
    }
}

impl Code for Value {
    fn encode(&self, writer: &mut impl Write) -> foyer::Result<()> {
        writer.write_all(&(self.bytes().len() as u64).to_le_bytes()).map_err(foyer::Error::io_error)?;
        writer.write_all(self.bytes()).map_err(foyer::Error::io_error)
    }

    fn decode(reader: &mut impl Read) -> foyer::Result<Self> {
        let mut len = [0; 8];
        reader.read_exact(&mut len).map_err(foyer::Error::io_error)?;
        let mut value = Self::take(u64::from_le_bytes(len) as usize);
        reader.read_exact(value.0.as_mut().unwrap()).map_err(foyer::Error::io_error)?;
        Ok(value)
    }

    fn estimated_size(&self) -> usize {
        8 + self.bytes().len()
    }
}

#[derive(Clone)]
struct Options {
    dir: PathBuf,
    value: usize,
    total: u64,
    reads: u64,
    uring: bool,
    direct: bool,
    depth: u64,
    trace: Option<String>,
    on_eviction: bool,
}

impl Options {
    fn parse() -> Self {
        let (mut plain, mut uring, mut direct, mut depth) = (Vec::new(), false, true, 8);
        let (mut trace, mut on_eviction) = (None, false);
        let mut arguments = env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut next = || arguments.next().expect("a value");
            match argument.as_str() {
                "--io" => uring = next() == "uring",
                "--buffered" => direct = false,
                "--depth" => depth = next().parse().expect("a number"),
                "--trace" => trace = Some(next()),
                "--on-eviction" => on_eviction = true,
                _ => plain.push(argument),
            }
        }
        let [dir, value, total, reads] = plain.try_into().expect("DIR VALUE_BYTES TOTAL_BYTES READ_BYTES");
        let number = |text: String| text.parse::<u64>().expect("a number");
        let (value, total, reads) = (number(value) as usize, number(total), number(reads));
        Self { dir: dir.into(), value, total, reads, uring, direct, depth, trace, on_eviction }
    }
}

type Cache = HybridCache<u64, Value>;

async fn open(options: &Options) -> Cache {
    // Half as much again as the values (large ones leave a part of each region empty), so that nothing is evicted. For the
    // trace just them, in as many regions as 16 MiB make of a disk with blocks of a MiB.
    let (capacity, region) = match options.trace {
        None => (options.total + options.total / 2, 16 << 20),
        Some(_) => (options.total, 17 * 4096),
    };
    let device = FsDeviceBuilder::new(&options.dir)
        .with_capacity(capacity as usize)
        .with_direct(options.direct)
        .build()
        .unwrap();
    let engine = BlockEngineConfig::new(device)
        .with_block_size(region)
        .with_flushers(2)
        .with_reclaimers(2)
        .with_buffer_pool_size(256 << 20)
        .with_submit_queue_size_threshold(512 << 20);
    let io: Box<dyn IoEngineConfig> = match options.uring {
        true => UringIoEngineConfig::new().with_threads(1).with_io_depth(64).boxed(),
        false => PsyncIoEngineConfig::new().boxed(),
    };
    HybridCacheBuilder::new()
        .with_policy(if options.on_eviction {
            HybridCachePolicy::WriteOnEviction
        } else {
            HybridCachePolicy::WriteOnInsertion
        })
        .memory(1)
        .with_shards(1)
        .with_weighter(|_: &u64, value: &Value| 8 + value.bytes().len())
        .storage()
        .with_io_engine_config(io)
        .with_engine_config(engine)
        .with_recover_mode(RecoverMode::None)
        .build()
        .await
        .unwrap()
}

async fn write(cache: &Cache, options: &Options) -> u64 {
    let count = options.total / options.value as u64;
    let start = cache.statistics().disk_write_bytes() as u64;
    for key in 0..count {
        while key * options.value as u64 > cache.statistics().disk_write_bytes() as u64 - start + IN_FLIGHT {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        let mut value = Value::take(options.value);
        value.stamp(key);
        cache.storage_writer(key).force().insert(value);
    }
    cache.storage().wait().await;
    count
}

/// How many blocks of the trace were asked for, and found.
async fn replay(cache: &Cache, options: &Options, trace: &str) -> (u64, u64) {
    let (mut asked, mut hits) = (0, 0);
    for line in fs::read_to_string(trace).unwrap().lines() {
        let request: serde_json::Value = serde_json::from_str(line).unwrap();
        for block in request["hash_ids"].as_array().unwrap() {
            let key = block.as_u64().unwrap();
            asked += 1;
            match cache.get(&key).await.unwrap() {
                Some(entry) => {
                    assert_eq!(entry.value().bytes()[..8], key.to_le_bytes(), "the right value");
                    hits += 1;
                }
                None => {
                    let mut value = Value::take(options.value);
                    value.stamp(key);
                    match options.on_eviction {
                        true => drop(cache.insert(key, value)),
                        false => drop(cache.storage_writer(key).force().insert(value)),
                    }
                }
            }
        }
        cache.storage().wait().await; // as if the disk were as fast as need be
    }
    (asked, hits)
}

/// How many were asked for, and found.
async fn read(cache: &Cache, options: &Options, count: u64) -> (u64, u64) {
    let asked = options.reads / options.value as u64;
    let (turn, hits) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let tasks: Vec<_> = (0..options.depth)
        .map(|_| {
            let (cache, turn, hits) = (cache.clone(), turn.clone(), hits.clone());
            tokio::spawn(async move {
                loop {
                    let turn = turn.fetch_add(1, Ordering::Relaxed);
                    if turn >= asked {
                        return;
                    }
                    let key = random(turn) % count;
                    if let Some(entry) = cache.get(&key).await.unwrap() {
                        assert_eq!(entry.value().bytes()[..8], key.to_le_bytes(), "the right value");
                        hits.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    (asked, hits.load(Ordering::Relaxed))
}

/// The same keys in every run (splitmix64).
fn random(turn: u64) -> u64 {
    let mut z = turn.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Seconds of processor time of this process so far.
fn cpu_s() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    [11, 12].iter().map(|&at| fields[at].parse::<f64>().unwrap()).sum::<f64>() / 100.0
}

#[tokio::main]
async fn main() {
    let options = Options::parse();
    let _ = fs::remove_dir_all(&options.dir);
    fs::create_dir_all(&options.dir).unwrap();
    // Touched before anything is timed.
    for _ in 0..4 * IN_FLIGHT / options.value as u64 {
        POOL.lock().unwrap().push(vec![1; options.value].into());
    }
    let cache = open(&options).await;
    if let Some(trace) = &options.trace {
        let (asked, hits) = replay(&cache, &options, trace).await;
        let policy = if options.on_eviction { "on eviction" } else { "on insertion" };
        let blocks = options.total / 4096 / 17 * 16;
        let row = serde_json::json!({
            "who": "foyer", "policy": policy, "room_blocks": blocks, "asked": asked, "found": hits,
            "hit_rate": hits as f64 / asked as f64,
        });
        println!("{row}");
        cache.close().await.unwrap();
        let _ = fs::remove_dir_all(&options.dir);
        return;
    }
    let (cpu, start) = (cpu_s(), Instant::now());
    let count = write(&cache, &options).await;
    let (write_s, write_cpu) = (start.elapsed().as_secs_f64(), cpu_s() - cpu);
    let on_disk = cache.statistics().disk_write_bytes();
    let (cpu, start) = (cpu_s(), Instant::now());
    let (asked, hits) = read(&cache, &options, count).await;
    let (read_s, read_cpu) = (start.elapsed().as_secs_f64(), cpu_s() - cpu);
    let gib = (1u64 << 30) as f64;
    let (written, read) = ((count * options.value as u64) as f64, (hits * options.value as u64) as f64);
    let row = serde_json::json!({
        "who": format!("foyer {}", if options.uring { "io_uring" } else { "psync" }),
        "direct": options.direct,
        "value_bytes": options.value,
        "values": count,
        "write_gb_per_s": written / write_s / 1e9,
        "write_cpu_s_per_gib": write_cpu / (written / gib),
        "written_per_byte": on_disk as f64 / written,
        "read_gb_per_s": read / read_s / 1e9,
        "read_cpu_s_per_gib": read_cpu / (read / gib),
        "asked": asked,
        "found": hits,
    });
    println!("{row}");
    cache.close().await.unwrap();
    drop(cache);
    let _ = fs::remove_dir_all(&options.dir);
}
