//! Configuration of the disk, checked once at start.

use std::{path::PathBuf, time::Duration};

use anyhow::ensure;
use serde::{Deserialize, Serialize};

use super::record::PAGE;

/// Blocks on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiskConfig {
    /// Directory for blocks, of this node's alone; made if it isn't there. What is in it is found again after a restart.
    /// Default: none, which is no disk.
    pub path: Option<PathBuf>,
    /// Most bytes of blocks on disk, rounded down to whole slabs (`slab_bytes`); what is known of each block takes another
    /// 128 bytes. Room is taken as it is needed. Default 10737418240 (10 GiB).
    pub capacity_bytes: u64,
    /// Threads that read and write, each one request at a time: a device is fast only with several. At most half of them
    /// write. Default 8, at most 64.
    pub threads: usize,
    /// Whether bytes go past the system's page cache (`O_DIRECT`): `on`, `off`, or `auto`, which is on where the file
    /// system can. Blocks whose size is not a multiple of 4096 bytes always take the page cache. Default auto.
    pub direct: Direct,
    /// Most MiB per second written; 0 is no limit. Default 0.
    pub write_mib_per_s: u64,
    /// Most reads, and most writes, that wait; past that a block is not promoted, or not kept. Default 1024.
    pub queue: usize,
    /// How long a failing disk is left alone, and a full one not filled further, before it is tried again, in
    /// milliseconds. Default 30000.
    pub retry_ms: u64,
}

/// When bytes go past the system's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direct {
    /// Where the file system can.
    #[default]
    Auto,
    /// Always; a file system that can't is an error.
    On,
    /// Never.
    Off,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            path: None,
            capacity_bytes: 10 << 30,
            threads: 8,
            direct: Direct::Auto,
            write_mib_per_s: 0,
            queue: 1024,
            retry_ms: 30_000,
        }
    }
}

/// What a disk is opened with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where.
    pub path: PathBuf,
    /// Most bytes of slots: a multiple of `slab_bytes`.
    pub capacity_bytes: u64,
    /// Slabs are of so many bytes: a multiple of a page.
    pub slab_bytes: u64,
    /// Threads that read and write.
    pub threads: usize,
    /// Whether to go past the page cache.
    pub direct: Direct,
    /// Most bytes written per second.
    pub write_bytes_per_s: Option<u64>,
    /// Most reads, and most writes, that wait.
    pub queue: usize,
    /// How long a failing or full disk is left alone.
    pub retry: Duration,
}

impl DiskConfig {
    /// What the disk is opened with, `None` if there is to be none; an error names the key and what is allowed.
    /// `slab_bytes` is the node's, and was checked.
    ///
    /// # Errors
    /// A value no disk can be used with.
    pub fn settings(&self, slab_bytes: u64) -> anyhow::Result<Option<Settings>> {
        let &Self { capacity_bytes, threads, direct, write_mib_per_s, queue, retry_ms, .. } = self;
        let Some(path) = self.path.clone() else { return Ok(None) };
        debug_assert!(slab_bytes > 0 && slab_bytes.is_multiple_of(PAGE), "checked by the node");
        ensure!(
            (slab_bytes..=MAX_BYTES).contains(&capacity_bytes),
            "disk.capacity_bytes: {capacity_bytes}, allowed is one slab (slab_bytes: {slab_bytes}) to {MAX_BYTES}"
        );
        ensure!((1..=64).contains(&threads), "disk.threads: {threads}, allowed is 1 to 64");
        ensure!((1..=MAX_QUEUE).contains(&queue), "disk.queue: {queue}, allowed is 1 to {MAX_QUEUE}");
        ensure!(
            write_mib_per_s <= MAX_BYTES >> 20,
            "disk.write_mib_per_s: {write_mib_per_s}, allowed is at most {}",
            MAX_BYTES >> 20
        );
        ensure!((1..=3_600_000).contains(&retry_ms), "disk.retry_ms: {retry_ms}, allowed is 1 to 3600000");
        Ok(Some(Settings {
            path,
            capacity_bytes: capacity_bytes / slab_bytes * slab_bytes,
            slab_bytes,
            threads,
            direct,
            write_bytes_per_s: (write_mib_per_s > 0).then_some(write_mib_per_s << 20),
            queue,
            retry: Duration::from_millis(retry_ms),
        }))
    }
}

/// 1 PiB: beyond any disk, and far from where offsets overflow.
const MAX_BYTES: u64 = 1 << 50;
/// Each that waits holds memory of the node.
const MAX_QUEUE: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> DiskConfig {
        DiskConfig { path: Some("blocks".into()), ..DiskConfig::default() }
    }

    #[test]
    fn there_is_no_disk_unless_a_directory_is_named() {
        assert!(DiskConfig::default().settings(16 << 20).unwrap().is_none());
        let settings = DiskConfig { capacity_bytes: (33 << 20) + 5, write_mib_per_s: 3, ..config() }
            .settings(16 << 20)
            .unwrap()
            .unwrap();
        assert_eq!(settings.capacity_bytes, 32 << 20, "whole slabs");
        assert_eq!(settings.write_bytes_per_s, Some(3 << 20));
    }

    #[test]
    fn what_no_disk_can_be_used_with_is_refused_by_key() {
        let bad = |change: fn(&mut DiskConfig)| {
            let mut config = config();
            change(&mut config);
            config.settings(16 << 20).unwrap_err().to_string()
        };
        for (key, error) in [
            ("disk.capacity_bytes", bad(|c| c.capacity_bytes = (16 << 20) - 1)),
            ("disk.capacity_bytes", bad(|c| c.capacity_bytes = u64::MAX)),
            ("disk.threads", bad(|c| c.threads = 0)),
            ("disk.threads", bad(|c| c.threads = 65)),
            ("disk.queue", bad(|c| c.queue = 0)),
            ("disk.write_mib_per_s", bad(|c| c.write_mib_per_s = u64::MAX)),
            ("disk.retry_ms", bad(|c| c.retry_ms = 0)),
        ] {
            assert!(error.starts_with(key), "{error}");
        }
    }

    #[test]
    fn unknown_keys_are_refused_and_words_are_lower_case() {
        let config: DiskConfig = serde_json::from_str(r#"{"path": "/x", "direct": "off"}"#).unwrap();
        assert_eq!(config.direct, Direct::Off);
        assert!(serde_json::from_str::<DiskConfig>(r#"{"pth": "/x"}"#).is_err());
    }
}
