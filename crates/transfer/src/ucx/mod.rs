//! The ucx transport: libucp moves the bytes.
//!
//! Read [`messages`] for what two engines tell one another, [`driver`] for the one thread on which all of UCX lives,
//! [`server`] for the side that owns the memory, [`client`] and [`connection`] for the side that submits, [`worker`]
//! and [`endpoint`] for UCX itself. Batches travel in one of two ways, agreed upon in the greeting:
//!
//! - **RMA** ([`flow`]), where both machines have an RDMA device and a libucp newer than 1.13 (or
//!   [`crate::UcxConfig::rma`] says so): puts and gets straight between registered memories, without the owner's part.
//! - **messages** ([`courier`]) otherwise: pieces of 64 KiB, each checked by the owner against its grant before a byte
//!   is touched, as over tcp. UCX would emulate RMA by messages of its own: slower (over loopback 0.3 to 0.6 GB/s for
//!   0.6 to 2.2), open to whoever connects, since the owner's UCX writes to any address it is told, and fatal in UCX
//!   1.13, which aborts the owner's process when a peer dies in the middle of a put. A context for messages is made
//!   without UCX's RMA feature, so it takes no such puts at all.
//!
//! # The fence
//!
//! With messages a grant is entered for each piece and left before its answer is sent: a revocation has nothing to wait
//! for, and what comes later is refused.
//!
//! With RMA the owner's processor takes no part, so a peer first opens a grant by its key and is told the ranges; from
//! then on it checks itself. When the grant is revoked, the owner tells the peer and waits until it answers that
//! nothing of its is under way (`left`). One that does not answer within the grace has its endpoint closed by force,
//! and the ranges count as free only when that close has ended. What a close is worth depends on the lane that UCX
//! took:
//!
//! | lane | after the owner's close |
//! | --- | --- |
//! | tcp | the connection's sockets are closed: bytes still in them are dropped. Puts that UCX emulates name the endpoint, and one that names a closed endpoint is dropped |
//! | rc (InfiniBand, RoCE) | the queue pair is in error: the adapter refuses what arrives for it |
//! | ud | puts are emulated, as over tcp |
//! | dc | the target end is shared by all peers: a close does **not** keep one away. Left out unless asked for |
//! | shared memory (posix, sysv, cma, xpmem, knem), cuda_ipc | the peer's own processor or device copies: a close does not keep it away. Left out unless asked for |
//!
//! Where a lane of the last two rows is allowed ([`crate::UcxConfig::tls`]), a peer is fenced by its answer or by its
//! death (seen on its connection) alone: a stopped peer then holds the ranges, which is logged after the grace, and
//! nothing is reused that it might still write.
//!
//! The remote key names a whole region, and peers keep it until their endpoint is closed. A peer that ignores a
//! revocation, or the ranges of a grant, is not held back by its key. So RMA is for peers that run the same program on
//! a network nobody else is on, as RDMA networks are. UCX's own protocol is not made for hostile peers either way.

mod client;
mod connection;
mod courier;
mod driver;
mod endpoint;
mod flow;
pub(crate) mod fuzz;
mod mailbox;
mod messages;
mod opening;
mod registry;
mod server;
mod worker;

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, mpsc},
};

use kvasir_types::{TransportAddress, TransportKind};

use self::{
    driver::{Limits, Setup, no_descriptor, unavailable},
    mailbox::{Command, Mailbox},
    worker::Settings,
};
use crate::{
    batch::Frame,
    config::Config,
    error::Error,
    owner::Owner,
    tcp::advertised,
    threads::Threads,
    transport::{Target, Transport},
};

/// Transports over which a close does not keep the peer away; UCX's aliases with them.
const UNFENCEABLE: [&str; 13] =
    ["all", "sm", "shm", "mm", "posix", "sysv", "cma", "knem", "xpmem", "dc", "dc_x", "dc_mlx5", "cuda_ipc"];

/// One engine's part in UCX: the progress thread behind a mailbox.
pub(crate) struct UcxTransport {
    mailbox: Arc<Mailbox>,
    addresses: Vec<String>,
}

impl UcxTransport {
    /// Loads libucp, opens devices, listens.
    pub(crate) fn new(config: &Config, owner: &Arc<Owner>, threads: &Arc<Threads>) -> Result<Self, Error> {
        let ucx = &config.ucx;
        let mailbox = Arc::new(Mailbox::new().map_err(|error| no_descriptor(&error))?);
        let tls = ucx.tls.clone().unwrap_or_else(fenceable);
        let limits = Limits {
            io_timeout: config.io_timeout,
            retries: config.retries,
            retry_pause: config.retry_pause,
            max_open: config.max_open_connections,
            max_accepted: config.max_accepted_connections,
            max_puts: ucx.max_outstanding_puts,
            max_gets: ucx.max_outstanding_gets,
            rma: false, // until the library is known
            close_fences: ucx.tls.as_deref().is_none_or(close_fences),
        };
        let setup = Setup {
            settings: Settings { tls, net_devices: ucx.net_devices.clone(), rma: false },
            bind: ucx.bind,
            rma: ucx.rma,
            limits,
            owner: Arc::clone(owner),
            threads: Arc::clone(threads),
            mailbox: Arc::clone(&mailbox),
        };
        let (sender, started) = mpsc::sync_channel(1);
        threads.spawn("transfer-ucx", move || driver::run(setup, &sender))?;
        let bound: SocketAddr = match started.recv() {
            Ok(begun) => begun.map_err(unavailable)?,
            Err(_) => return Err(unavailable("its thread ended at once".into())),
        };
        Ok(Self { mailbox, addresses: advertised(ucx.advertise.as_deref(), bound) })
    }
}

/// The last version that aborts the process of an owner whose peer leaves in the middle of an emulated put.
const ABORTS: (u32, u32) = (1, 13);

/// Whether to use RMA with a libucp of this version, if that was left to us or asked for.
fn use_rma(wanted: Option<bool>, version: (u32, u32), rdma: bool) -> Result<bool, String> {
    match wanted {
        // Devices do not mean that every peer is reached over them: where not, UCX emulates.
        None => Ok(rdma && version > ABORTS),
        Some(true) if !rdma && version <= ABORTS => Err(format!(
            "UCX {}.{} only emulates RMA here, and aborts the process when a peer leaves in the middle of a put; install a \
             newer one, or leave ucx.rma unset",
            version.0, version.1
        )),
        Some(wanted) => Ok(wanted),
    }
}

/// UCX's transports where the configuration names none: those that a close fences. What this machine can't have needs no
/// excluding, and libucp complains when it is excluded.
fn fenceable() -> String {
    let mut without = vec!["sm"];
    if has_rdma() {
        without.push("dc");
    }
    if Path::new("/dev/nvidiactl").exists() {
        without.push("cuda_ipc");
    }
    format!("^{}", without.join(","))
}

/// Whether the kernel knows an RDMA device.
fn has_rdma() -> bool {
    std::fs::read_dir("/sys/class/infiniband").is_ok_and(|mut devices| devices.next().is_some())
}

/// Whether every lane that a list of UCX's transports allows is fenced by closing its endpoint.
fn close_fences(tls: &str) -> bool {
    let names =
        |list: &str| list.split(',').map(|name| name.trim().trim_start_matches('\\').to_owned()).collect::<Vec<_>>();
    match tls.trim().strip_prefix('^') {
        Some(without) => {
            let without = names(without);
            let any = |wanted: &[&str]| wanted.iter().any(|name| without.iter().any(|named| named == name));
            any(&["sm", "shm"]) && any(&["dc", "dc_x"]) && any(&["cuda_ipc", "cuda"])
        }
        None => names(tls).iter().all(|name| !UNFENCEABLE.contains(&name.as_str()) && name != "cuda"),
    }
}

impl Transport for UcxTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Ucx
    }

    fn addresses(&self) -> Vec<TransportAddress> {
        let address = |address: &String| TransportAddress { kind: TransportKind::Ucx, address: address.clone() };
        self.addresses.iter().map(address).collect()
    }

    fn reaches(&self, _address: &str) -> Result<(), String> {
        Ok(()) // only trying tells
    }

    fn start(&self, frames: Vec<Frame>, target: &Arc<Target>) {
        self.mailbox.send(Command::Start { frames, target: Arc::clone(target) });
    }

    fn shutdown(&self) {
        self.mailbox.send(Command::Stop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rma_is_used_with_devices_and_never_where_it_would_kill_us() {
        let (old, new) = ((1, 13), (1, 22));
        assert_eq!(use_rma(None, new, true), Ok(true));
        assert_eq!([use_rma(None, new, false), use_rma(None, old, true)], [Ok(false), Ok(false)]);
        assert_eq!([use_rma(Some(true), new, false), use_rma(Some(true), old, true)], [Ok(true), Ok(true)]);
        assert!(use_rma(Some(true), old, false).unwrap_err().contains("UCX 1.13 only emulates RMA here"));
        assert_eq!(use_rma(Some(false), new, true), Ok(false));
    }

    #[test]
    fn lanes_that_a_close_does_not_fence_are_known() {
        for tls in ["^sm,dc,cuda_ipc", "tcp", "rc,tcp", "rc_mlx5,ud", "ib,tcp,self"] {
            assert!(close_fences(tls), "{tls}");
        }
        for tls in ["all", "tcp,sm", "posix,cma", "rc,dc", "^tcp", "^sm", "^dc,sm", "tcp,cuda", " shm"] {
            assert!(!close_fences(tls), "{tls}");
        }
    }
}
