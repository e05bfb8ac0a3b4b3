//! The directory of a disk: whose it is, of which version, and its open files.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use super::{
    Error,
    config::{Direct, Settings},
    record::Geometry,
};

const LOCK: &str = "lock";
const SUPERBLOCK: &str = "superblock";
const DATA: &str = "data";
const RECORDS: &str = "records";

/// Of the files' layout: a node that finds another one begins anew.
const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"kvasirDk";
const SUPERBLOCK_BYTES: usize = 36;

/// An open directory. Nobody else has it while this lives: the kernel gives up the lock with the process, however it ends.
pub(super) struct Directory {
    pub(super) geometry: Geometry,
    /// The data by way of the page cache.
    pub(super) data: File,
    /// The same file past the page cache.
    pub(super) direct: Option<File>,
    pub(super) records: File,
    path: PathBuf,
    data_is: (u64, u64),
    _lock: File,
}

impl Directory {
    /// Opens or makes it. With a superblock of another version or size of slabs, or none that can be read, it is empty.
    pub(super) fn open(settings: &Settings) -> Result<Self, Error> {
        let path = &settings.path;
        let geometry = Geometry { slab_bytes: settings.slab_bytes, capacity_bytes: settings.capacity_bytes };
        fs::create_dir_all(path).map_err(failed("make directory", path))?;
        refuse_foreign(path)?;
        let lock = open_file(&path.join(LOCK), 0)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: path.clone() }),
            Err(TryLockError::Error(source)) => return Err(failed("lock", &path.join(LOCK))(source)),
        }
        // The superblock marks the other files as ours before they are there.
        let (superblock, place) = (superblock(geometry), path.join(SUPERBLOCK));
        let known = read_superblock(&place).map_err(failed("read", &place))?;
        let keep = known.as_deref() == Some(superblock.as_slice());
        if !keep {
            if known.is_some() {
                tracing::warn!(
                    path = %path.display(),
                    version = VERSION,
                    slab_bytes = geometry.slab_bytes,
                    "the blocks on disk are of another version or size of slabs, or their superblock is damaged: dropped"
                );
            }
            write_superblock(path, &superblock).map_err(failed("write", &place))?;
        }
        let (data_path, records_path) = (path.join(DATA), path.join(RECORDS));
        let (data, records) = (open_file(&data_path, 0)?, open_file(&records_path, 0)?);
        for (file, path, most) in
            [(&records, &records_path, geometry.record_bytes()), (&data, &data_path, geometry.capacity_bytes)]
        {
            shorten(file, if keep { most } else { 0 }).map_err(failed("shorten", path))?;
        }
        let metadata = data.metadata().map_err(failed("look at", &data_path))?;
        let direct = open_direct(settings, &data_path)?;
        let data_is = (metadata.dev(), metadata.ino());
        Ok(Self { geometry, data, direct, records, path: path.clone(), data_is, _lock: lock })
    }

    /// Whether a restart would find the files that are open here.
    pub(super) fn check_in_place(&self) -> io::Result<()> {
        let there = fs::metadata(self.path.join(DATA))?;
        if (there.dev(), there.ino()) == self.data_is {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::NotFound, "its file was replaced by another"))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// A directory with files of these names but without a superblock or a lock is somebody else's: they would be overwritten.
fn refuse_foreign(path: &Path) -> Result<(), Error> {
    let ours = [LOCK, SUPERBLOCK].iter().any(|file| path.join(file).exists());
    match [DATA, RECORDS].into_iter().find(|file| path.join(file).exists()) {
        Some(file) if !ours => Err(Error::Foreign { path: path.to_owned(), file }),
        _ => Ok(()),
    }
}

fn open_file(path: &Path, flags: i32) -> Result<File, Error> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).custom_flags(flags);
    options.open(path).map_err(failed("open", path))
}

fn open_direct(settings: &Settings, data: &Path) -> Result<Option<File>, Error> {
    if settings.direct == Direct::Off {
        return Ok(None);
    }
    match open_file(data, rustix::fs::OFlags::DIRECT.bits().cast_signed()) {
        Ok(file) => Ok(Some(file)),
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::InvalidInput => {
            if settings.direct == Direct::On {
                return Err(Error::NotDirect { path: settings.path.clone() });
            }
            tracing::info!(path = %settings.path.display(), "no direct access here: blocks go by way of the page cache");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn shorten(file: &File, most: u64) -> io::Result<()> {
    if file.metadata()?.len() > most { file.set_len(most) } else { Ok(()) }
}

/// The capacity is not in it: a disk may be given more or less room and keeps what still fits.
fn superblock(geometry: Geometry) -> [u8; SUPERBLOCK_BYTES] {
    let mut out = [0; SUPERBLOCK_BYTES];
    out[..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..20].copy_from_slice(&geometry.slab_bytes.to_le_bytes());
    let seal = blake3::hash(&out[..20]);
    out[20..].copy_from_slice(&seal.as_bytes()[..16]);
    out
}

/// What is there, cut to a little more than a superblock: whatever lies there is not read as a whole.
fn read_superblock(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(SUPERBLOCK_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// In one step: a torn superblock would drop all blocks.
fn write_superblock(dir: &Path, superblock: &[u8]) -> io::Result<()> {
    let new = dir.join("superblock.new");
    let mut file = File::create(&new)?;
    file.write_all(superblock)?;
    file.sync_all()?;
    fs::rename(&new, dir.join(SUPERBLOCK))
}

pub(super) fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}
