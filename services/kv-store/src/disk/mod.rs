//! Blocks on disk: bytes between slots of one sparse file and registered memory, and back after a restart.
//!
//! No policy: which block goes to the disk, into which slot, and which leaves it is the index's business. A block on disk
//! is named by the offset of its slot ([`DiskOffset`]); slots are whole pages, so that the device can read and write
//! registered memory itself (`O_DIRECT`).
//!
//! ```text
//!   path/lock        held by the node that uses the directory
//!   path/superblock  version and size of slabs: with another one, what lies here is dropped
//!   path/data        | slab 0: slot | slot | slot | tail | slab 1 ...        slots of one size in each slab
//!   path/origins     whose blocks they are, by number
//!   path/records     | slab 0: record | record | record | ...  | slab 1 ...  128 bytes each, at the slot's number
//! ```
//!
//! The rule this layer guards: **what comes back is what was written, or a miss.** A record is written after its bytes,
//! and names their BLAKE3 checksum, which is verified whenever they are read. So nothing is ever synchronized to the
//! device: after a crash of the process the kernel still has everything; after one of the machine a record may have
//! arrived without its bytes (their checksum tells), bytes without their record (nobody finds them), or half a record (its
//! own checksum tells). What is lost is cached, and computed again.
//!
//! Errors degrade. A full disk takes no more new slots (those it has can be written again), a failing one is left alone
//! for a while and then tried once; both are a state ([`State`]), a gauge and a line in the log, never somebody's error.
//!
//! Threads: `disk-0`, `disk-1`, …, which do all the input and output. Reads go before writes, since somebody waits for
//! them, and at most half of the threads write.

mod config;
mod directory;
mod health;
mod metrics;
mod origins;
mod queue;
mod record;
mod recovery;
mod worker;

#[cfg(test)]
mod tests;

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::Instant,
};

use kvasir_transfer::{MemoryRange, TransferEngine};

use directory::Directory;
use queue::{Job, Kind};
use worker::Shared;

pub use config::{Direct, DiskConfig, Settings};
pub use health::State;
pub use metrics::copy_at_scrape;
pub(crate) use origins::Origins;
pub use record::{DiskOffset, Record, Sequence, slot_bytes};
pub use recovery::Recovered;
pub use worker::Stats;

/// BLAKE3 of a block's bytes, first 16 bytes.
pub type Checksum = [u8; 16];

/// What is called when an operation has ended, on one of the disk's threads, exactly once.
pub type Done = Box<dyn FnOnce(Result<(), Failure>) + Send>;

/// Why the disk can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process has it.
    #[error("disk.path: {} is used by another node", .path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// There are files in it that a node did not write.
    #[error("disk.path: {} holds a file '{file}' that is not of a node's making; take an empty directory", .path.display())]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Its name.
        file: &'static str,
    },
    /// `disk.direct: on`, and the file system can't.
    #[error("disk.direct: on, but files in {} cannot be opened for direct access", .path.display())]
    NotDirect {
        /// The directory.
        path: PathBuf,
    },
    /// The system said no.
    #[error("disk.path: cannot {what} {}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// No thread was to be had.
    #[error("cannot start a thread for the disk")]
    Thread(#[source] io::Error),
}

impl Error {
    /// Whether it is the operator's to put right. Anything else is a disk that doesn't work, without which a node can do.
    pub fn is_mistake(&self) -> bool {
        matches!(self, Self::InUse { .. } | Self::Foreign { .. } | Self::NotDirect { .. })
    }
}

/// Why a block was not read or written. None is an error to a user: a block that can't be read is a miss, one that can't
/// be written is not on disk.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// As many operations wait as may.
    #[error("the disk has too much to do")]
    Busy,
    /// No room for a slot that was not in use before.
    #[error("the disk is full")]
    Full,
    /// It failed lately, and is left alone for a while.
    #[error("the disk is failing")]
    Resting,
    /// The disk was closed.
    #[error("the disk is closed")]
    Closed,
    /// The bytes are not the ones that were to be there: torn, overwritten, corrupted or cut off.
    #[error("what is on disk is not what was written")]
    Mismatch,
    /// Not a slot of this disk for this size, or not inside of the registered memory.
    #[error("no such slot")]
    NoSlot,
    /// The system said no.
    #[error("the disk failed")]
    Io(#[source] Arc<io::Error>),
}

/// The disk of a node. Dropping it stops its threads after what they are at.
pub struct Disk {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Disk {
    /// Opens the directory, or makes it. `found` is called for each block that is there, sorted by slab; see
    /// [`Recovered`] for what it can rely on. Blocks until all records have been read.
    ///
    /// # Errors
    /// A directory of somebody else's, or that can't be read and written.
    pub fn open(settings: Settings, engine: TransferEngine, mut found: impl FnMut(Recovered)) -> Result<Self, Error> {
        let directory = Directory::open(&settings)?;
        let recovery = recovery::recover(&directory, &mut found)?;
        let threads = settings.threads;
        let shared = Arc::new(Shared::new(settings, engine, directory, recovery));
        let disk = Self { shared, threads: Mutex::new(Vec::new()) };
        for number in 0..threads {
            let shared = Arc::clone(&disk.shared);
            let thread = thread::Builder::new()
                .name(format!("disk-{number}"))
                .spawn(move || shared.run())
                .map_err(Error::Thread)?;
            disk.threads.lock().expect("nothing panics under this lock").push(thread);
        }
        Ok(disk)
    }

    /// Writes a block into a slot, and makes it findable after a restart.
    ///
    /// The slot is the caller's alone from here until `done` is called: nobody reads it, writes it or forgets it. So are
    /// the block's bytes at `from` in the engine's segment, which nobody may write meanwhile: the caller holds the block.
    ///
    /// # Errors
    /// At once, and then `done` is not called: [`Failure::Busy`], [`Failure::Full`] for a slot never written before,
    /// [`Failure::Resting`], [`Failure::Closed`], [`Failure::NoSlot`].
    pub fn write(
        &self,
        slot: DiskOffset,
        record: Record,
        from: u64,
        done: impl FnOnce(Result<(), Failure>) + Send + 'static,
    ) -> Result<(), Failure> {
        let memory = MemoryRange { offset: from, len: record.bytes };
        self.push(Job { kind: Kind::Write(record), slot, memory, done: Box::new(done) })
    }

    /// Reads a block's bytes into registered memory and compares them with their checksum. Many may read one slot.
    ///
    /// Nobody may touch the memory at `into.offset` until `done` is called, which after [`Failure::Mismatch`] holds
    /// anything.
    ///
    /// # Errors
    /// As those of [`Disk::write`], except for [`Failure::Full`].
    pub fn read(
        &self,
        slot: DiskOffset,
        into: MemoryRange,
        checksum: Checksum,
        done: impl FnOnce(Result<(), Failure>) + Send + 'static,
    ) -> Result<(), Failure> {
        self.push(Job { kind: Kind::Read(checksum), slot, memory: into, done: Box::new(done) })
    }

    /// Makes sure that the block of this size in a slot is not found after a restart. Not needed where another block of
    /// the same size is written into the slot at once. The slot is the caller's alone until `done` is called.
    ///
    /// # Errors
    /// As those of [`Disk::write`], except for [`Failure::Full`].
    pub fn forget(
        &self,
        slot: DiskOffset,
        bytes: u64,
        done: impl FnOnce(Result<(), Failure>) + Send + 'static,
    ) -> Result<(), Failure> {
        let memory = MemoryRange { offset: 0, len: bytes };
        self.push(Job { kind: Kind::Forget, slot, memory, done: Box::new(done) })
    }

    /// How it is.
    pub fn state(&self) -> State {
        self.shared.state()
    }

    /// Whether slots that were never in use may be written: not while the disk is full, except for one now and then to
    /// see if it still is.
    pub fn may_grow(&self) -> bool {
        self.shared.may_grow(Instant::now())
    }

    /// Asks a file system that was full for room again, without writing: whether there is some now. It is not asked before
    /// the time, nor if it can't tell without being written to.
    pub fn has_room_again(&self) -> bool {
        self.shared.has_room_again(Instant::now())
    }

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Stops: what the threads are at is finished, what waits fails with [`Failure::Closed`]. When it returns, no thread
    /// touches registered memory any more. Done again, it does nothing.
    pub fn close(&self) {
        self.shared.close();
        let threads = std::mem::take(&mut *self.threads.lock().expect("nothing panics under this lock"));
        for thread in threads {
            // The last handle may be dropped by an operation's callback, on a thread of the disk's own.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join(); // a panic has been reported where it happened
            }
        }
    }

    fn push(&self, job: Job) -> Result<(), Failure> {
        self.shared.push(job, Instant::now())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.close();
    }
}
