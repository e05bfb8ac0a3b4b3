use std::{
    fs,
    os::unix::fs::{FileExt as _, symlink},
    path::Path,
    sync::mpsc,
    time::Duration,
};

use kvasir_transfer::Allocation;
use kvasir_types::BlockHash;
use proptest::prelude::*;

use super::{record::RECORD_BYTES, *};

const KIB: u64 = 1024;
const SLAB: u64 = 256 * KIB;
const CAPACITY: u64 = 8 * SLAB;
/// Blocks are written from the arena's first half and read into its second.
const ARENA: u64 = 4 << 20;

fn config(path: &Path) -> DiskConfig {
    DiskConfig { path: Some(path.to_owned()), capacity_bytes: CAPACITY, retry_ms: 3_600_000, ..DiskConfig::default() }
}

fn engine() -> TransferEngine {
    TransferEngine::builder().arena(Allocation::new(ARENA as usize)).build().unwrap()
}

/// A disk, its memory, and what it found when it was opened.
struct Opened {
    disk: Disk,
    engine: TransferEngine,
    found: Vec<Recovered>,
}

fn try_open(config: &DiskConfig, slab_bytes: u64) -> Result<Opened, Error> {
    let (engine, mut found) = (engine(), Vec::new());
    let settings = config.settings(slab_bytes).unwrap().unwrap();
    let disk = Disk::open(settings, engine.clone(), |block| found.push(block))?;
    Ok(Opened { disk, engine, found })
}

fn open(path: &Path) -> Opened {
    try_open(&config(path), SLAB).unwrap()
}

/// Bytes of the n-th block of a test.
fn bytes(number: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn record(number: u64, len: u64) -> Record {
    let mut checksum = [0; 16];
    checksum.copy_from_slice(&blake3::hash(&bytes(number, len)).as_bytes()[..16]);
    let mut hash = [7; 16];
    hash[..8].copy_from_slice(&number.to_le_bytes());
    Record {
        hash: BlockHash(hash),
        bytes: len,
        checksum,
        position: number as u16,
        parent: 3,
        group: number + 1,
        origin: number as u32 + 2,
    }
}

/// Waits for what `start` hands to `done`.
fn wait(start: impl FnOnce(Done) -> Result<(), Failure>) -> Result<(), Failure> {
    let (sender, receiver) = mpsc::channel();
    start(Box::new(move |result| sender.send(result).unwrap()))?;
    receiver.recv().unwrap()
}

impl Opened {
    fn write_at(&self, slot: u64, number: u64, len: u64) -> Result<(), Failure> {
        self.engine.write_bytes(0, &bytes(number, len)).unwrap();
        wait(|done| self.disk.write(DiskOffset(slot), record(number, len), 0, done))
    }

    fn read_at(&self, slot: u64, len: u64, checksum: Checksum) -> Result<Vec<u8>, Failure> {
        let into = MemoryRange { offset: ARENA / 2, len };
        wait(|done| self.disk.read(DiskOffset(slot), into, checksum, done))?;
        let mut bytes = vec![0; len as usize];
        self.engine.read_bytes(into.offset, &mut bytes).unwrap();
        Ok(bytes)
    }

    fn read(&self, slot: u64, number: u64, len: u64) -> Result<Vec<u8>, Failure> {
        self.read_at(slot, len, record(number, len).checksum)
    }

    fn forget(&self, slot: u64, len: u64) -> Result<(), Failure> {
        wait(|done| self.disk.forget(DiskOffset(slot), len, done))
    }

    fn found(&self) -> Vec<(u64, Record)> {
        self.found.iter().map(|found| (found.slot.0, found.record)).collect()
    }
}

fn file(dir: &Path, name: &str) -> fs::File {
    fs::File::options().read(true).write(true).open(dir.join(name)).unwrap()
}

#[test]
fn a_restart_brings_back_what_was_written() {
    for direct in [Direct::Auto, Direct::Off] {
        let dir = tempfile::tempdir().unwrap();
        let config = DiskConfig { direct, ..config(dir.path()) };
        // Whole pages, and sizes that are none: of slots of 64 KiB, of 8 KiB and of a whole slab.
        let blocks = [
            (0, 1, 64 * KIB),
            (64 * KIB, 2, 64 * KIB),
            (SLAB, 3, 5000),
            (SLAB + 2 * 8192, 4, 8192),
            (2 * SLAB, 5, SLAB),
        ];
        let opened = try_open(&config, SLAB).unwrap();
        assert!(opened.found.is_empty());
        for (slot, number, len) in blocks {
            opened.write_at(slot, number, len).unwrap();
            assert_eq!(opened.read(slot, number, len).unwrap(), bytes(number, len));
        }
        let written: u64 = blocks.iter().map(|block| block.2).sum();
        let stats = opened.disk.stats();
        assert_eq!((stats.writes, stats.written_bytes, stats.reads, stats.read_bytes), (5, written, 5, written));
        drop(opened);
        for _ in 0..2 {
            let again = try_open(&config, SLAB).unwrap();
            assert_eq!(again.found(), blocks.map(|(slot, number, len)| (slot, record(number, len))));
            for (slot, number, len) in blocks {
                assert_eq!(again.read(slot, number, len).unwrap(), bytes(number, len));
            }
        }
    }
}

#[test]
fn neighbours_written_and_read_together_are_each_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let opened = open(dir.path());
    let (len, count) = (16 * KIB, 3 * SLAB / (16 * KIB));
    let (sender, receiver) = mpsc::channel();
    let done = |number| {
        let sender = sender.clone();
        move |result: Result<(), Failure>| sender.send((number, result.is_ok())).unwrap()
    };
    for number in 0..count {
        opened.engine.write_bytes(number * len, &bytes(number, len)).unwrap();
        let (slot, from) = (DiskOffset(number * len), number * len);
        opened.disk.write(slot, record(number, len), from, done(number)).unwrap();
    }
    let mut ended: Vec<_> = receiver.iter().take(count as usize).collect();
    ended.sort_unstable();
    assert_eq!(ended, (0..count).map(|number| (number, true)).collect::<Vec<_>>());

    // One of them is not as its reader expects, and only that one fails.
    for number in 0..count {
        let into = MemoryRange { offset: ARENA / 2 + number * len, len };
        let checksum = if number == 5 { [0; 16] } else { record(number, len).checksum };
        opened.disk.read(DiskOffset(number * len), into, checksum, done(number)).unwrap();
    }
    let mut ended: Vec<_> = receiver.iter().take(count as usize).collect();
    ended.sort_unstable();
    assert_eq!(ended, (0..count).map(|number| (number, number != 5)).collect::<Vec<_>>());
    drop(opened);
    let again = open(dir.path());
    assert_eq!(again.found(), (0..count).map(|number| (number * len, record(number, len))).collect::<Vec<_>>());
}

#[test]
fn what_was_forgotten_or_overwritten_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let opened = open(dir.path());
    for number in 0..3 {
        opened.write_at(number * 4096, number, 4096).unwrap();
    }
    opened.forget(0, 4096).unwrap();
    opened.write_at(4096, 7, 4000).unwrap();
    drop(opened);
    let again = open(dir.path());
    assert_eq!(again.found(), [(4096, record(7, 4000)), (8192, record(2, 4096))]);
    // A later life's records are later than all of a former one's.
    let latest = again.found.iter().map(|found| found.sequence).max().unwrap();
    again.write_at(0, 8, 4096).unwrap();
    drop(again);
    assert!(open(dir.path()).found[0].sequence > latest);
}

#[test]
fn a_slab_cut_anew_is_of_the_size_written_last() {
    let dir = tempfile::tempdir().unwrap();
    let opened = open(dir.path());
    for number in 0..SLAB / 4096 {
        opened.write_at(SLAB + number * 4096, number, 4096).unwrap();
    }
    opened.write_at(SLAB + 128 * KIB, 100, 128 * KIB).unwrap(); // record 1 of its size, over that of the second block
    drop(opened);
    let again = open(dir.path());
    assert_eq!(again.found(), [(SLAB + 128 * KIB, record(100, 128 * KIB))]);
    assert_eq!(again.read(SLAB + 128 * KIB, 100, 128 * KIB).unwrap(), bytes(100, 128 * KIB));
}

#[test]
fn torn_bytes_are_a_miss_and_a_torn_record_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let opened = open(dir.path());
    for number in 0..3 {
        opened.write_at(number * 8192, number, 8192).unwrap();
    }
    // Half of other bytes, as a write that was cut off leaves it.
    file(dir.path(), "data").write_all_at(&[1; 4096], 8192 + 4096).unwrap();
    file(dir.path(), "records").write_all_at(&[1; 64], 2 * RECORD_BYTES as u64).unwrap();
    assert!(matches!(opened.read(8192, 1, 8192), Err(Failure::Mismatch)));
    assert_eq!(opened.disk.stats().mismatches, 1);
    drop(opened);
    let again = open(dir.path());
    assert_eq!(again.found(), [(0, record(0, 8192)), (8192, record(1, 8192))]);
    assert!(matches!(again.read(8192, 1, 8192), Err(Failure::Mismatch)));
    assert_eq!(again.read(0, 0, 8192).unwrap(), bytes(0, 8192));
    assert_eq!(again.disk.state(), State::Working, "wrong bytes are no failing disk");
}

#[test]
fn a_file_cut_off_under_our_feet_is_misses() {
    let dir = tempfile::tempdir().unwrap();
    let opened = open(dir.path());
    for number in 0..3 {
        opened.write_at(number * 8192, number, 8192).unwrap();
    }
    file(dir.path(), "data").set_len(8192 + 100).unwrap();
    for number in [1, 2, 1, 2, 1] {
        assert!(matches!(opened.read(number * 8192, number, 8192), Err(Failure::Mismatch)));
    }
    assert_eq!(opened.read(0, 0, 8192).unwrap(), bytes(0, 8192));
    opened.write_at(8192, 1, 8192).unwrap();
    assert_eq!(opened.read(8192, 1, 8192).unwrap(), bytes(1, 8192));
    assert_eq!(opened.disk.state(), State::Working);
    drop(opened);
    assert_eq!(open(dir.path()).found(), [(0, record(0, 8192)), (8192, record(1, 8192))]);
}

#[test]
fn another_version_or_size_of_slabs_begins_empty_and_more_or_less_room_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let write = || {
        let opened = open(dir.path());
        for slab in 0..4 {
            opened.write_at(slab * SLAB, slab, 4096).unwrap();
        }
    };
    let count = |config: &DiskConfig, slab_bytes| try_open(config, slab_bytes).unwrap().found.len();
    let config = config(dir.path());
    write();
    assert_eq!(count(&DiskConfig { capacity_bytes: 2 * CAPACITY, ..config.clone() }, SLAB), 4);
    assert_eq!(count(&DiskConfig { capacity_bytes: 2 * SLAB, ..config.clone() }, SLAB), 2);
    write();
    assert_eq!(count(&config, SLAB / 2), 0);
    for damage in [vec![], vec![9; 36], vec![0; 5000]] {
        write();
        fs::write(dir.path().join("superblock"), damage).unwrap();
        assert_eq!(count(&config, SLAB), 0);
    }
    write();
    file(dir.path(), "superblock").write_all_at(&2u32.to_le_bytes(), 8).unwrap();
    assert_eq!(count(&config, SLAB), 0);
    write();
    assert_eq!(count(&config, SLAB), 4, "and is used from then on");
}

#[test]
fn a_directory_has_one_user_and_is_nobody_elses() {
    let dir = tempfile::tempdir().unwrap();
    let opened = open(dir.path());
    let refused = |config: &DiskConfig| try_open(config, SLAB).err().expect("refused");
    let error = refused(&config(dir.path()));
    assert!(matches!(&error, Error::InUse { path } if path == dir.path()) && error.is_mistake());
    drop(opened);
    open(dir.path());
    let theirs = tempfile::tempdir().unwrap();
    fs::write(theirs.path().join("data"), "precious").unwrap();
    let error = refused(&config(theirs.path()));
    assert!(matches!(error, Error::Foreign { file: "data", .. }) && error.is_mistake());
    assert_eq!(fs::read(theirs.path().join("data")).unwrap(), b"precious");
    let no_directory = refused(&config(&theirs.path().join("data")));
    assert!(matches!(no_directory, Error::Io { .. }) && !no_directory.is_mistake());
}

/// A directory whose file of data is in truth another one.
fn with_data(target: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("lock"), "").unwrap();
    symlink(target, dir.path().join("data")).unwrap();
    dir
}

#[test]
fn a_full_disk_takes_no_more_new_blocks_and_says_so() {
    let dir = with_data("/dev/full");
    let opened = open(dir.path());
    assert!(opened.disk.may_grow());
    assert!(matches!(opened.write_at(0, 1, 4096), Err(Failure::Full)));
    assert_eq!(opened.disk.state(), State::Full);
    assert!(!opened.disk.may_grow());
    let refused = opened.disk.write(DiskOffset(0), record(1, 4096), 0, |_| panic!("refused at once"));
    assert!(matches!(refused, Err(Failure::Full)));
    opened.forget(0, 4096).unwrap();
    assert_eq!(opened.disk.stats().full, 2);
}

#[test]
fn a_full_disk_ends_every_write_that_it_took_however_often_it_is_tried() {
    let dir = with_data("/dev/full");
    let opened = try_open(&DiskConfig { retry_ms: 5, ..config(dir.path()) }, SLAB).unwrap();
    let (sender, receiver) = mpsc::channel();
    for _ in 0..50 {
        while !opened.disk.may_grow() {}
        // All are taken, for the disk is to be tried; one of them tries it, and the others, no neighbours, are refused.
        let write = |number: u64| {
            let sender = sender.clone();
            let done = move |result: Result<(), Failure>| sender.send(result).unwrap();
            opened.disk.write(DiskOffset(number * 8192), record(number, 4096), 0, done).is_ok()
        };
        let taken = (0..4).filter(|&number| write(number)).count();
        for _ in 0..taken {
            let ended = receiver.recv_timeout(Duration::from_secs(30)).expect("it is told what became of it");
            assert!(matches!(ended, Err(Failure::Full)));
        }
    }
}

/// Says that tests which mount a file system are not to be run.
const LEFT_OUT: &str = "KVASIR_TEST_NO_MOUNTS";
/// Where the test below finds the file system that was mounted for it.
const MOUNTED: &str = "KVASIR_TEST_MOUNTED";

#[test]
fn a_full_file_system_keeps_what_it_has_and_is_filled_again_once_there_is_room() {
    if std::env::var(LEFT_OUT).is_ok_and(|value| value == "1") {
        return eprintln!("left out, nothing was tested: {LEFT_OUT}=1");
    }
    let dir = tempfile::tempdir().unwrap();
    let this = std::env::current_exe().unwrap();
    let script = format!(
        "mount -t tmpfs -o size=1m none {0} && {MOUNTED}={0} exec {1} --exact disk::tests::in_a_small_file_system --ignored",
        dir.path().display(),
        this.display()
    );
    let command = ["--map-root-user", "--mount", "--", "sh", "-c", &script];
    let output = std::process::Command::new("unshare").args(command).output().expect("util-linux is there");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "needs mount namespaces, or {LEFT_OUT}=1:\n{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
#[ignore = "not a test: the inside of the one above: cargo nextest run -p kvasir-kv-store -E 'test(a_full_file_system)'"]
fn in_a_small_file_system() {
    let dir = PathBuf::from(std::env::var(MOUNTED).unwrap());
    let opened = try_open(&DiskConfig { retry_ms: 1, ..config(&dir) }, SLAB).unwrap();
    fs::write(dir.join("ballast"), vec![1; 300 << 10]).unwrap();
    let len = 64 * KIB;
    let fits = (0..32).take_while(|&number| opened.write_at(number * len, number, len).is_ok()).count() as u64;
    assert!((4..16).contains(&fits), "{fits} blocks in 724 KiB");
    assert_eq!(opened.disk.state(), State::Full);
    // What is there can be read, and written over.
    opened.write_at(0, 100, len).unwrap();
    assert_eq!(opened.read(0, 100, len).unwrap(), bytes(100, len));
    assert_eq!(opened.read(len, 1, len).unwrap(), bytes(1, len));
    assert_eq!(opened.disk.state(), State::Full);
    while !matches!(opened.write_at(fits * len, fits, len), Err(Failure::Full)) {}
    fs::remove_file(dir.join("ballast")).unwrap();
    while opened.write_at(fits * len, fits, len).is_err() {} // until it is tried again
    assert_eq!(opened.disk.state(), State::Working);
    drop(opened);
    assert_eq!(open(&dir).found.len() as u64, fits + 1);
}

#[test]
fn a_failing_disk_is_left_alone() {
    // Its first pages can never be read or written: input/output error.
    let dir = with_data("/proc/self/mem");
    let opened = open(dir.path());
    for _ in 0..3 {
        assert!(matches!(opened.read(0, 1, 4096), Err(Failure::Io(_))));
    }
    assert_eq!(opened.disk.state(), State::Failing);
    assert!(!opened.disk.may_grow());
    assert!(matches!(opened.read(0, 1, 4096), Err(Failure::Resting)));
    assert!(matches!(opened.write_at(0, 1, 4096), Err(Failure::Resting)));
    assert_eq!((opened.disk.stats().io_errors, opened.disk.stats().resting), (3, 2));
}

#[test]
fn a_failing_disk_that_works_again_is_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let opened = try_open(&DiskConfig { retry_ms: 1, ..config(dir.path()) }, SLAB).unwrap();
    let (data, aside) = (dir.path().join("data"), dir.path().join("aside"));
    fs::rename(&data, &aside).unwrap();
    assert!(opened.write_at(0, 1, 4096).is_err(), "a restart would not find it");
    assert_eq!(opened.disk.state(), State::Failing);
    fs::write(&data, "another").unwrap();
    while !matches!(opened.write_at(0, 1, 4096), Err(Failure::Io(_))) {} // the next trial
    assert_eq!(opened.disk.state(), State::Failing);
    fs::rename(&aside, &data).unwrap();
    while opened.write_at(0, 1, 4096).is_err() {}
    assert_eq!(opened.disk.state(), State::Working);
    assert_eq!(opened.read(0, 1, 4096).unwrap(), bytes(1, 4096));
}

#[test]
fn the_queue_is_bounded_and_closing_ends_what_waits() {
    let dir = tempfile::tempdir().unwrap();
    let slab = 2 << 20;
    let config = DiskConfig { capacity_bytes: 8 * slab, queue: 3, write_mib_per_s: 1, ..config(dir.path()) };
    let opened = try_open(&config, slab).unwrap();
    // After it the bandwidth is used up for two seconds: what is queued meanwhile stays.
    opened.write_at(0, 0, slab).unwrap();
    let (sender, receiver) = mpsc::channel();
    let write = |number: u64| {
        let sender = sender.clone();
        let (slot, done) = (DiskOffset(number * slab), move |result| sender.send(result).unwrap());
        opened.disk.write(slot, record(0, slab), 0, done)
    };
    for number in 1..4 {
        write(number).unwrap();
    }
    assert!(matches!(write(4), Err(Failure::Busy)));
    let stats = opened.disk.stats();
    assert_eq!((stats.waiting_writes, stats.busy), (3, 1));
    opened.disk.close();
    assert!(matches!(write(5), Err(Failure::Closed)));
    drop(sender);
    let ended: Vec<_> = receiver.try_iter().collect();
    assert_eq!(ended.len(), 3, "each is told once");
    assert!(ended.iter().all(|result| matches!(result, Err(Failure::Closed))));
}

#[test]
fn what_is_no_slot_or_no_memory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let opened = open(dir.path());
    for (slot, len) in [(1, 4096), (CAPACITY, 4096), (0, 0), (0, SLAB + 1), (4096, 8192)] {
        let write = opened.disk.write(DiskOffset(slot), Record { bytes: len, ..record(0, 0) }, 0, |_| panic!());
        assert!(matches!(write, Err(Failure::NoSlot)), "{len} at {slot}");
    }
    let beyond = wait(|done| opened.disk.write(DiskOffset(0), record(0, 4096), ARENA, done));
    assert!(matches!(beyond, Err(Failure::NoSlot)));
    assert_eq!(opened.disk.state(), State::Working);
}

#[test]
fn a_disk_may_be_dropped_by_its_own_thread() {
    let dir = tempfile::tempdir().unwrap();
    let Opened { disk, .. } = open(dir.path());
    let disk = Arc::new(disk);
    let (held, (sender, receiver)) = (disk.clone(), mpsc::channel());
    disk.write(DiskOffset(0), record(0, 4096), 0, move |_| {
        drop(held);
        sender.send(()).unwrap();
    })
    .unwrap();
    drop(disk);
    receiver.recv().unwrap();
}

/// The time that a large node's restart takes; says it, and asserts none.
#[test]
#[ignore = "writes gigabytes: cargo test --release -p kvasir-kv-store --lib ten_million_blocks -- --ignored --nocapture"]
fn ten_million_blocks_are_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let (slab, len, count) = (16 << 20, 64 * KIB, 10_000_000);
    let slots = slab / len;
    let config = DiskConfig { capacity_bytes: (count / slots + 1) * slab, ..config(dir.path()) };
    drop(try_open(&config, slab).unwrap());
    let geometry = record::Geometry { slab_bytes: slab, capacity_bytes: config.capacity_bytes };
    let records = file(dir.path(), "records");
    file(dir.path(), "data").set_len(config.capacity_bytes).unwrap();
    for first in (0..count).step_by(slots as usize) {
        let slab_start = first / slots * slab;
        let encoded: Vec<u8> = (first..(first + slots).min(count))
            .flat_map(|number| {
                let record = Record { bytes: len, ..record(number, 0) };
                record::encode(&record, DiskOffset(slab_start + number % slots * len), Sequence(number + 1))
            })
            .collect();
        records.write_all_at(&encoded, geometry.record_at(DiskOffset(slab_start), len).unwrap()).unwrap();
    }
    records.sync_all().unwrap();
    for cache in ["cold", "warm"] {
        if cache == "cold" {
            rustix::fs::fadvise(&records, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
        let (mut found, start) = (0, Instant::now());
        let settings = config.settings(slab).unwrap().unwrap();
        let disk = Disk::open(settings, engine(), |_| found += 1).unwrap();
        println!("{cache}: {found} blocks found in {:.2} s", start.elapsed().as_secs_f64());
        assert_eq!(found, count);
        drop(disk);
    }
}

/// What happens to a file between two lives.
#[derive(Clone, Debug)]
enum Damage {
    Bytes { at: u64, bytes: Vec<u8> },
    Cut { len: u64 },
    Zeros { at: u64, len: u64 },
    Copy { from: u64, to: u64, len: u64 },
    Gone,
}

fn damages() -> impl Strategy<Value = (usize, Damage)> {
    let damage = prop_oneof![
        4 => (any::<u64>(), prop::collection::vec(any::<u8>(), 1..200)).prop_map(|(at, bytes)| Damage::Bytes { at, bytes }),
        1 => any::<u64>().prop_map(|len| Damage::Cut { len }),
        1 => (any::<u64>(), 1u64..10_000).prop_map(|(at, len)| Damage::Zeros { at, len }),
        2 => (any::<u64>(), any::<u64>(), 1u64..10_000).prop_map(|(from, to, len)| Damage::Copy { from, to, len }),
        1 => Just(Damage::Gone),
    ];
    (0..3usize, damage)
}

fn inflict(dir: &Path, which: usize, damage: &Damage) {
    let name = ["data", "records", "superblock"][which];
    let path = dir.join(name);
    let Ok(file) = fs::File::options().read(true).write(true).open(&path) else { return }; // gone before
    let len = file.metadata().unwrap().len().max(1);
    // Mostly where something is: the beginning of a slab's records.
    let place = |at: u64| if which == 1 { at % 8 * (SLAB / 32) + at / 8 % 512 } else { at % len } % len;
    match damage {
        Damage::Bytes { at, bytes } => file.write_all_at(bytes, place(*at)).unwrap(),
        Damage::Cut { len } => file.set_len(place(*len)).unwrap(),
        Damage::Zeros { at, len } => file.write_all_at(&vec![0; *len as usize], place(*at)).unwrap(),
        Damage::Copy { from, to, len } => {
            let mut bytes = vec![0; *len as usize];
            let read = file.read_at(&mut bytes, place(*from) / 128 * 128).unwrap();
            file.write_all_at(&bytes[..read], place(*to) / 128 * 128).unwrap();
        }
        Damage::Gone => fs::remove_file(path).unwrap(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever became of the files: no panic, and never other bytes than those that were written under the name.
    #[test]
    fn damaged_files_yield_the_right_bytes_or_a_miss(
        writes in prop::collection::vec((0u64..8, 0u64..64, 0usize..4), 1..30),
        damage in prop::collection::vec(damages(), 0..6),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let opened = open(dir.path());
        let mut expected = std::collections::HashMap::new();
        for (number, (slab, place, size)) in writes.into_iter().enumerate() {
            let (number, len) = (number as u64, [4096, 5000, 12 * KIB, 64 * KIB][size]);
            let slot = slab * SLAB + place % (SLAB / slot_bytes(len)) * slot_bytes(len);
            opened.write_at(slot, number, len).unwrap();
            expected.insert(record(number, len).hash, (number, len));
        }
        drop(opened);
        let whole = damage.is_empty();
        for (which, damage) in &damage {
            inflict(dir.path(), *which, damage);
        }
        let again = open(dir.path());
        let mut taken = std::collections::BTreeMap::new();
        for Recovered { slot, record: found, sequence } in again.found.clone() {
            prop_assert!(sequence > Sequence(0));
            let (number, len) = expected[&found.hash];
            prop_assert_eq!(found, record(number, len));
            match again.read(slot.0, number, len) {
                Ok(read) => prop_assert_eq!(read, bytes(number, len)),
                Err(failure) => prop_assert!(matches!(failure, Failure::Mismatch), "{:?}", failure),
            }
            prop_assert_eq!(taken.insert(slot.0, slot_bytes(len)), None);
        }
        for ((slot, len), next) in taken.iter().zip(taken.keys().skip(1)) {
            prop_assert!(slot + len <= *next, "no two slots share a byte");
        }
        prop_assert!(!whole || again.disk.stats().mismatches < again.found.len() as u64);
        // It goes on.
        again.write_at(0, 1000, 4096).unwrap();
        prop_assert_eq!(again.read(0, 1000, 4096).unwrap(), bytes(1000, 4096));
    }
}
