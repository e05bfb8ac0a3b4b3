//! Connections to prefill workers: made when first needed, kept, and known to be dead soon after the peer is.
//!
//! A peer that failed rests for a moment: it is tried after the others. One that has died stays among the router's
//! proposals until its lease ends, and not every request of that time should find out anew.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use kvasir_proto::{MAX_MESSAGE_BYTES, v1::prefill_client::PrefillClient};
use tonic::transport::{Channel, Endpoint};

/// Most peers whose connections are kept; past it all are closed and made anew as needed. Workers come and go, their
/// addresses would otherwise pile up for ever.
const MAX_PEERS: usize = 1024;

/// Connections by address. Written and read by request tasks; the lock is held for a map look-up only.
pub(crate) struct Peers {
    peers: Mutex<HashMap<String, Peer>>,
    timeout: Duration,
    rest: Duration,
}

struct Peer {
    channel: Channel,
    rests_until: Option<Instant>,
}

impl Peers {
    pub(crate) fn new(timeout: Duration, rest: Duration) -> Self {
        Self { peers: Mutex::default(), timeout, rest }
    }

    /// A client for the prefill worker at `address`; connects when first used.
    pub(crate) fn prefill(&self, address: &str) -> Result<PrefillClient<Channel>, tonic::transport::Error> {
        let mut peers = self.lock();
        let channel = match peers.get(address) {
            Some(peer) => peer.channel.clone(),
            None => {
                if peers.len() >= MAX_PEERS {
                    peers.clear();
                }
                let channel = self.endpoint(address)?.connect_lazy();
                peers.insert(address.to_owned(), Peer { channel: channel.clone(), rests_until: None });
                channel
            }
        };
        Ok(PrefillClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }

    /// It failed just now.
    pub(crate) fn rest(&self, address: &str) {
        if let Some(peer) = self.lock().get_mut(address) {
            peer.rests_until = Some(Instant::now() + self.rest);
        }
    }

    /// Whether it failed a moment ago.
    pub(crate) fn rests(&self, address: &str) -> bool {
        self.lock().get(address).and_then(|peer| peer.rests_until).is_some_and(|until| Instant::now() < until)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Peer>> {
        self.peers.lock().expect("no code panics while it holds this lock")
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, tonic::transport::Error> {
        Ok(kvasir_rpc::endpoint(address)?
            .connect_timeout(self.timeout)
            // Pings, not timeouts on answers: a long prompt may take minutes, a stopped process answers no ping.
            .http2_keep_alive_interval(self.timeout / 2)
            .keep_alive_timeout(self.timeout / 2)
            .keep_alive_while_idle(false))
    }
}
