//! One task for each worker that the fleet has: it keeps the index and the worker's pulse what the worker says.
//!
//! A stream that ends, breaks, says nothing for [`SILENCE`] or says what can't be is opened again after a pause that grows;
//! what was known of that worker's cache is forgotten first: it may be gone, and a worker that does not answer should not be
//! preferred for what it has. A worker that knows no `Watch` (an older version) is left alone: nothing is known of its cache
//! then, and its load is what this router gives it.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_proto::v1::{self, worker_client::WorkerClient};
use kvasir_runtime::{Kind, Tasks, random_u64};
use kvasir_types::{BlockHash, PROTOCOL_VERSION};
use tokio::sync::oneshot;
use tonic::Code;
use tracing::{Span, debug, warn};

use super::{
    follow::{self, Follow, Step},
    index::{Index, Number, SHARDS},
};
use crate::{
    external,
    fleet::{Fleet, Worker},
    metrics::CacheMetrics,
    upstream,
};

/// For a worker to begin to answer.
const OPEN: Duration = Duration::from_secs(5);
/// A worker tells its load every second: this long without a word, something is wrong.
const SILENCE: Duration = Duration::from_secs(4);
/// Before the first try after a failure, and the longest pause.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A stream that lasted so long was a good one: the next pause is the shortest again.
const GOOD: Duration = Duration::from_secs(10);
/// Largest message: 4096 names twice, and some air.
const MAX_BYTES: usize = 256 << 10;
/// Changes between which others get a turn: some 100 µs.
const AT_ONCE: usize = 512;
/// The same for shards that are swept.
const SHARDS_AT_ONCE: usize = 32;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("can't be reached")]
    Connect(#[from] upstream::Error),
    #[error("refuses or breaks off")]
    Status(#[from] Box<tonic::Status>),
    #[error("ended")]
    Ended,
    #[error("nothing for {SILENCE:?}")]
    Silent,
    #[error("said what makes no sense")]
    Follow(#[from] follow::Error),
}

/// All feeds. Used by the task that watches the members.
pub(crate) struct Feeds {
    index: Arc<Index>,
    tasks: Tasks,
    metrics: CacheMetrics,
    /// By the worker's address, which is its own while its task runs. Dropping the sender ends the task.
    running: HashMap<usize, oneshot::Sender<()>>,
}

impl Feeds {
    /// None yet.
    pub(crate) fn new(index: Arc<Index>, tasks: Tasks, metrics: CacheMetrics) -> Self {
        Self { index, tasks, metrics, running: HashMap::new() }
    }

    /// Follows the workers of this fleet, and no others.
    pub(crate) fn follow(&mut self, fleet: &Fleet) {
        let mut before = std::mem::take(&mut self.running);
        for worker in fleet.workers() {
            let name = Arc::as_ptr(worker).addr();
            let running = before.remove(&name).unwrap_or_else(|| self.start(worker));
            self.running.insert(name, running);
        }
        // Those that are left in `before` are dropped, and their tasks end.
    }

    fn start(&self, worker: &Arc<Worker>) -> oneshot::Sender<()> {
        let (stop, stopped) = oneshot::channel();
        let feed = Feed { worker: Arc::clone(worker), index: Arc::clone(&self.index), metrics: self.metrics.clone() };
        self.tasks.spawn_in(Kind::Background, "cache feed", Span::none(), async move {
            feed.run(stopped).await;
            Ok(())
        });
        stop
    }
}

struct Feed {
    worker: Arc<Worker>,
    index: Arc<Index>,
    metrics: CacheMetrics,
}

impl Feed {
    async fn run(self, stopped: oneshot::Receiver<()>) {
        let Some(number) = self.index.join() else {
            warn!(worker = %self.worker.member.id, "more workers than the cache index has numbers: its cache is not known");
            return;
        };
        self.worker.pulse.set_number(Some(number));
        match &self.worker.engine {
            Some(engine) => external::feed(&self.worker, engine, number, stopped).await,
            // Losing the first loses nothing that is not forgotten right after.
            None => tokio::select! {
                () = self.keep_on(number) => {}
                _ = stopped => {}
            },
        }
        self.worker.pulse.set_number(None);
        self.forget(number).await;
        self.index.leave(number);
    }

    async fn keep_on(&self, number: Number) {
        let mut pause = PAUSE;
        loop {
            let began = Instant::now();
            let Err(error) = self.one_stream(number).await;
            self.worker.silent();
            self.forget(number).await;
            let worker = &self.worker.member.id;
            if let Error::Status(status) = &error
                && status.code() == Code::Unimplemented
            {
                debug!(%worker, "knows no Watch: its cache is not known");
                return std::future::pending().await;
            }
            if let Error::Follow(_) = &error {
                warn!(%worker, error = kvasir_runtime::chain(&error), "a worker's cache events make no sense, beginning anew");
            } else {
                debug!(%worker, error = kvasir_runtime::chain(&error), "no cache events, trying again");
            }
            self.metrics.resync("reconnect");
            if began.elapsed() >= GOOD {
                pause = PAUSE;
            }
            // Many routers, one worker that is back: not all in the same moment.
            tokio::time::sleep(pause.mul_f64(0.5 + (random_u64() % 1000) as f64 / 1000.0)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn one_stream(&self, number: Number) -> Result<std::convert::Infallible, Error> {
        let mut client = WorkerClient::new(self.worker.channel()?).max_decoding_message_size(MAX_BYTES);
        let opening = client.watch(v1::WatchRequest { protocol_version: PROTOCOL_VERSION });
        let opened = tokio::time::timeout(OPEN, opening).await.map_err(|_| Error::Silent)?;
        let mut stream = opened.map_err(Box::new)?.into_inner();
        let _connected = self.metrics.connected();
        let mut follow = Follow::default();
        loop {
            let heard = tokio::time::timeout(SILENCE, stream.message()).await.map_err(|_| Error::Silent)?;
            let message = heard.map_err(Box::new)?.ok_or(Error::Ended)?;
            let again = follow != Follow::default();
            match follow.hear(message)? {
                Step::Load(load) => self.worker.hears(load),
                Step::Anew(holds) => {
                    if again {
                        self.metrics.resync("gap");
                        self.forget(number).await;
                    }
                    self.change(number, &holds, Index::insert).await;
                }
                Step::Change(stored, removed) => {
                    self.change(number, &stored, Index::insert).await;
                    self.change(number, &removed, Index::remove).await;
                }
            }
        }
    }

    async fn change(&self, number: Number, hashes: &[BlockHash], change: fn(&Index, &BlockHash, Number)) {
        for some in hashes.chunks(AT_ONCE) {
            some.iter().for_each(|hash| change(&self.index, hash, number));
            tokio::task::yield_now().await;
        }
    }

    /// Forgets what it holds.
    async fn forget(&self, number: Number) {
        for shard in 0..SHARDS {
            self.index.sweep(shard, number);
            if shard % SHARDS_AT_ONCE == 0 {
                tokio::task::yield_now().await;
            }
        }
    }
}
