//! The engine under measurement: how it is set up, and its memory filled and checked.

use anyhow::{Result, ensure};
use kvasir_transfer::{Allocation, Config, HugePages, LocalNet, TlsConfig, TransferEngine, Transports};
use kvasir_types::TransportKind;

use crate::{
    cli::{EngineOptions, MemoryOptions, Pages, Transport},
    pattern,
};

/// Memory is filled and checked by way of a buffer of this size, which stays in the cache.
const STEP: u64 = 64 << 10;

/// An engine with one buffer.
pub struct Buffer {
    pub engine: TransferEngine,
    /// Where the buffer starts in the engine's segment.
    pub base: u64,
    /// Its length in bytes.
    pub len: u64,
}

impl Buffer {
    /// Starts an engine that offers `len` bytes.
    pub fn new(options: &EngineOptions, len: u64) -> Result<Self> {
        Self::with(config(options), LocalNet::new(), options.memory, len)
    }

    /// Starts an engine of these settings in that net. Its memory is touched, so that no page of it is the kernel's one
    /// page of zeros, which would always be in the cache.
    pub fn with(config: Config, net: LocalNet, memory: MemoryOptions, len: u64) -> Result<Self> {
        let huge_pages = match memory.huge_pages {
            Pages::Never => HugePages::Never,
            Pages::Try => HugePages::Try,
            Pages::Require => HugePages::Require,
        };
        let arena = Allocation { huge_pages, numa_node: memory.numa_node, ..Allocation::new(usize::try_from(len)?) };
        let engine = TransferEngine::builder().name("bench").config(config).local_net(net).arena(arena).build()?;
        let buffer = Self { engine, base: 0, len };
        buffer.fill(0, 0, len)?;
        Ok(buffer)
    }

    /// Writes the pattern for `place` at the far side into `len` bytes at `offset` of the buffer.
    pub fn fill_for(&self, seed: u64, place: u64, offset: u64, len: u64) -> Result<()> {
        let mut bytes = vec![0; STEP.min(len) as usize];
        for done in (0..len).step_by(STEP as usize) {
            let part = &mut bytes[..STEP.min(len - done) as usize];
            pattern::fill(seed, place + done, part);
            self.engine.write_bytes(self.base + offset + done, part)?;
        }
        Ok(())
    }

    /// As [`Buffer::fill_for`], for memory that is itself the far side.
    pub fn fill(&self, seed: u64, offset: u64, len: u64) -> Result<()> {
        self.fill_for(seed, offset, offset, len)
    }

    /// The first of `len` bytes at `offset` of the buffer that is not what belongs to `place` at the far side.
    pub fn first_wrong(&self, seed: u64, place: u64, offset: u64, len: u64) -> Result<Option<u64>> {
        let mut bytes = vec![0; STEP.min(len) as usize];
        for done in (0..len).step_by(STEP as usize) {
            let part = &mut bytes[..STEP.min(len - done) as usize];
            self.engine.read_bytes(self.base + offset + done, part)?;
            if let Some(at) = pattern::first_wrong(seed, place + done, part) {
                return Ok(Some(offset + done + at as u64));
            }
        }
        Ok(None)
    }

    /// Refuses more bytes than there are.
    pub fn check(&self, bytes: u64) -> Result<()> {
        ensure!(
            bytes <= self.len,
            "{bytes} bytes are asked for, the buffer has {}: start it with a larger --buffer",
            self.len
        );
        Ok(())
    }
}

fn config(options: &EngineOptions) -> Config {
    let mut config = Config { tcp_bind: options.bind, tcp_advertise: options.advertise.clone(), ..Config::default() };
    config.transports = match options.transport {
        Transport::Auto => Transports::Auto,
        Transport::Shm => Transports::Named(vec![TransportKind::Shm]),
        Transport::Ucx => Transports::Named(vec![TransportKind::Ucx]),
        Transport::Tcp => Transports::Named(vec![TransportKind::Tcp]),
    };
    config.ucx.bind.set_ip(options.bind.ip());
    config.ucx.advertise = options.advertise.clone();
    config.ucx.tls = options.ucx_tls.clone();
    config.ucx.net_devices = options.ucx_devices.clone();
    let EngineOptions { tls_certificate, tls_key, tls_authority, .. } = options.clone();
    if let (Some(certificate), Some(key), Some(authority)) = (tls_certificate, tls_key, tls_authority) {
        config.tls = Some(TlsConfig { certificate, key, authority, server_name: None });
    }
    if let Some(connections) = options.connections {
        config.connections_per_peer = connections;
    }
    if let Some(slice) = options.slice {
        config.slice_bytes = slice as usize;
    }
    if let Some(threads) = options.copy_threads {
        config.copy_threads = threads;
    }
    config
}
