//! Settings of a client: every field public.

/// How the store is used. `Config::default()` suits a cluster in one room.
#[derive(Clone, Debug)]
pub struct Config {
    /// How long a node may take to answer one call; it is also how long it may take to connect. Reading and writing bytes is
    /// bound by the caller's deadline instead. Default 500.
    pub timeout_ms: u64,
    /// The same for a lookup, which a request waits for that could be computing. Default 500.
    pub lookup_timeout_ms: u64,
    /// For how long a node that did not answer is left alone; after that, one request tries it. Default 1000.
    pub breaker_ms: u64,
    /// Where this client is: of several copies, those of store nodes of the same zone are read first. Default: empty, nowhere
    /// in particular.
    pub zone: String,
    /// How nodes are called. Default: in the clear.
    pub rpc: kvasir_rpc::Rpc,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            timeout_ms: 500,
            lookup_timeout_ms: 500,
            breaker_ms: 1_000,
            zone: String::new(),
            rpc: kvasir_rpc::Rpc::default(),
        }
    }
}
