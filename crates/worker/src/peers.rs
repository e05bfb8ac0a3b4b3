//! Connections to prefill workers: made when first needed, kept, and known to be dead soon after the peer is.

use std::{collections::HashMap, sync::Mutex, time::Duration};

use kvasir_proto::{MAX_MESSAGE_BYTES, v1::prefill_client::PrefillClient};
use tonic::transport::{Channel, Endpoint};

/// Most peers whose connections are kept; past it all are closed and made anew as needed. Workers come and go, their
/// addresses would otherwise pile up for ever.
const MAX_PEERS: usize = 1024;

/// Connections by address. Written and read by request tasks; the lock is held for a map look-up only.
pub(crate) struct Peers {
    channels: Mutex<HashMap<String, Channel>>,
    timeout: Duration,
}

impl Peers {
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { channels: Mutex::default(), timeout }
    }

    /// A client for the prefill worker at `address`; connects when first used.
    pub(crate) fn prefill(&self, address: &str) -> Result<PrefillClient<Channel>, tonic::transport::Error> {
        let mut channels = self.channels.lock().expect("no code panics while it holds this lock");
        let channel = match channels.get(address) {
            Some(channel) => channel.clone(),
            None => {
                if channels.len() >= MAX_PEERS {
                    channels.clear();
                }
                let channel = self.endpoint(address)?.connect_lazy();
                channels.insert(address.to_owned(), channel.clone());
                channel
            }
        };
        Ok(PrefillClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, tonic::transport::Error> {
        Ok(Endpoint::from_shared(format!("http://{address}"))?
            .connect_timeout(self.timeout)
            .tcp_nodelay(true)
            // Pings, not timeouts on answers: a long prompt may take minutes, a stopped process answers no ping.
            .http2_keep_alive_interval(self.timeout / 2)
            .keep_alive_timeout(self.timeout / 2)
            .keep_alive_while_idle(false))
    }
}
