//! Feeds against workers that say what the test tells them to: well-behaved, silent, lying, restarted, of another version.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use kvasir_cluster::{Member, ModelInfo, View};
use kvasir_proto::{
    convert,
    v1::{
        self,
        watch_event::Event,
        worker_server::{Worker as Serve, WorkerServer},
    },
};
use kvasir_runtime::{Context, Kind};
use kvasir_types::{
    BlockHash, Incarnation, KvDtype, KvLayout, ModelFingerprint, PROTOCOL_VERSION, Role, TokenId, chain,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status};

use super::*;
use crate::{
    external::Engines,
    fleet::{Crew, Desk, Fleet},
    metrics::CacheMetrics,
    text::demo,
};

const LIMIT: Duration = Duration::from_secs(20);
const LAYOUT: KvLayout =
    KvLayout { block_size: 16, layers: 5, kv_heads: 2, k_dim: 32, v_dim: 32, dtype: KvDtype::Bf16 };
const MODEL: ModelFingerprint = ModelFingerprint([7; 16]);

type Script = mpsc::Receiver<Result<v1::WatchEvent, Status>>;

/// A worker whose watchers get one script after the other; `None` says that it knows no such call.
struct Scripted(Option<Mutex<VecDeque<Script>>>);

#[tonic::async_trait]
impl Serve for Scripted {
    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn set_duty(&self, _: Request<v1::SetDutyRequest>) -> Result<Response<v1::SetDutyResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn trace(&self, _: Request<v1::TraceRequest>) -> Result<Response<v1::TraceResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn set_stage(&self, _: Request<v1::SetStageRequest>) -> Result<Response<v1::SetStageResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    type WatchStream = ReceiverStream<Result<v1::WatchEvent, Status>>;

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let Some(scripts) = &self.0 else { return Err(Status::unimplemented("an older worker")) };
        let script = scripts.lock().unwrap().pop_front();
        script
            .map(|script| Response::new(ReceiverStream::new(script)))
            .ok_or_else(|| Status::unavailable("no script is left"))
    }
}

/// A router's part of it all, and a decode worker.
struct Rig {
    context: Context,
    index: Arc<Index>,
    feeds: Feeds,
    fleet: Fleet,
    member: Member,
}

impl Rig {
    async fn new(worker: Scripted) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = kvasir_rpc::server().add_service(WorkerServer::new(worker));
        let context = Context::detached("test");
        context.tasks.spawn(Kind::Background, "worker", async move {
            Ok(server.serve_with_incoming(TcpListenerStream::new(listener)).await?)
        });
        let index = Arc::new(Index::default());
        let metrics = CacheMetrics::new(&context.metrics, &index);
        let feeds = Feeds::new(Arc::clone(&index), context.tasks.clone(), metrics);
        let member = Member {
            id: "decode-0".parse().unwrap(),
            incarnation: Incarnation(1),
            role: Role::Decode,
            grpc: address,
            admin: String::new(),
            http: String::new(),
            protocol: PROTOCOL_VERSION,
            version: String::new(),
            model: Some(ModelInfo {
                name: "demo".into(),
                fingerprint: MODEL,
                layout: LAYOUT,
                max_model_len: 4096,
                tokenizer: demo().tokenizer_id().into(),
            }),
            segment: None,
            store: None,
            engine: None,
            draining: false,
            duty: kvasir_cluster::Duty::default(),
        };
        let mut rig = Self { context, index, feeds, fleet: Fleet::default(), member };
        rig.members(&[rig.member.clone()]);
        rig
    }

    fn members(&mut self, members: &[Member]) {
        let view = View { members: members.to_vec(), ..View::default() };
        let (fleet, misfits) = Fleet::build(&view, &Engines::default(), &[demo()], &self.fleet);
        assert!(misfits.is_empty());
        self.fleet = fleet;
        self.feeds.follow(&self.fleet);
    }

    /// Tokens of this prompt that the worker is known to hold.
    fn cached(&self, prompt: &[TokenId]) -> Option<u32> {
        let mut desk = Desk::default();
        let root = BlockHash::root(MODEL, &LAYOUT, "");
        self.index.lookup(chain(root, prompt, 16).into_iter(), &mut desk.lookup);
        self.crew().lay_out(&mut desk);
        desk.pool.decode.first().map(|option| option.cached_tokens)
    }

    fn crew(&self) -> &Crew {
        self.fleet.crew("demo").unwrap()
    }

    async fn until(&self, what: &str, so: impl Fn(&Self) -> bool) {
        let waiting = async {
            while !so(self) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(LIMIT, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    fn metric(&self, line: &str) -> bool {
        self.context.metrics.encode().lines().any(|found| found == line)
    }
}

fn scripts(count: usize) -> (Scripted, Vec<mpsc::Sender<Result<v1::WatchEvent, Status>>>) {
    let (to, from): (Vec<_>, VecDeque<_>) = (0..count).map(|_| mpsc::channel(64)).unzip();
    (Scripted(Some(Mutex::new(from))), to)
}

fn prompt() -> Vec<TokenId> {
    (0..100).map(TokenId).collect()
}

/// Names of the prompt's blocks.
fn names(blocks: std::ops::Range<usize>) -> tonic::codegen::Bytes {
    let chain = chain(BlockHash::root(MODEL, &LAYOUT, ""), &prompt(), 16);
    convert::pack16(chain[blocks].iter().map(|hash| &hash.0).collect::<Vec<_>>().into_iter())
}

fn part(next: u64, blocks: std::ops::Range<usize>) -> Result<v1::WatchEvent, Status> {
    let part = v1::CachePart { first: true, last: true, next, hashes: names(blocks) };
    Ok(v1::WatchEvent { event: Some(Event::Part(part)) })
}

fn changes(
    first: u64,
    stored: std::ops::Range<usize>,
    removed: std::ops::Range<usize>,
) -> Result<v1::WatchEvent, Status> {
    let count = (stored.len() + removed.len()) as u32;
    let changes = v1::CacheChanges { first, count, stored: names(stored), removed: names(removed) };
    Ok(v1::WatchEvent { event: Some(Event::Changes(changes)) })
}

#[tokio::test]
async fn what_a_worker_says_is_known_and_forgotten_with_the_worker() {
    let (worker, to) = scripts(1);
    let mut rig = Rig::new(worker).await;
    to[0].send(part(5, 0..2)).await.unwrap();
    rig.until("two blocks are known", |rig| rig.cached(&prompt()) == Some(32)).await;
    to[0].send(changes(5, 2..4, 1..1)).await.unwrap();
    rig.until("four blocks are known", |rig| rig.cached(&prompt()) == Some(64)).await;
    to[0].send(changes(7, 0..0, 1..2)).await.unwrap();
    rig.until("the second is gone", |rig| rig.cached(&prompt()) == Some(16)).await;
    assert!(rig.metric("kvasir_router_feeds_connected 1") && rig.metric("kvasir_router_indexed_blocks 3"));

    // The load counts at once, and the blocks' room.
    let load =
        v1::WorkerLoad { running: 3, free_blocks: 10, cached_blocks: 5, step_seconds: 0.25, ..Default::default() };
    to[0].send(Ok(v1::WatchEvent { event: Some(Event::Load(load)) })).await.unwrap();
    let option = |rig: &Rig| {
        let mut desk = Desk::default();
        rig.crew().lay_out(&mut desk);
        desk.pool.decode[0].clone()
    };
    rig.until("the load is known", |rig| option(rig).load.requests == 3).await;
    assert_eq!((option(&rig).room_tokens, option(&rig).speed.step_seconds), (Some(240), 0.25));

    // It leaves, and nothing of it is left.
    rig.members(&[]);
    rig.until("all is forgotten", |rig| rig.index.blocks() == 0 && rig.metric("kvasir_router_feeds_connected 0")).await;
    assert!(to[0].is_closed() || to[0].send(part(0, 0..1)).await.is_ok());
}

#[tokio::test]
async fn lost_changes_mean_another_snapshot() {
    let (worker, to) = scripts(2);
    let rig = Rig::new(worker).await;
    to[0].send(part(0, 0..4)).await.unwrap();
    rig.until("four blocks are known", |rig| rig.cached(&prompt()) == Some(64)).await;
    // The worker noticed it: in the same stream.
    to[0].send(part(90, 0..1)).await.unwrap();
    rig.until("only what is in the new one", |rig| rig.cached(&prompt()) == Some(16) && rig.index.blocks() == 1).await;
    assert!(rig.metric("kvasir_router_feed_resyncs_total{cause=\"gap\"} 1"));
    // It did not, but the router does: in another stream.
    to[0].send(changes(95, 1..2, 0..0)).await.unwrap();
    to[1].send(part(96, 0..3)).await.unwrap();
    rig.until("three blocks are known", |rig| rig.cached(&prompt()) == Some(48)).await;
    assert!(rig.metric("kvasir_router_feed_resyncs_total{cause=\"reconnect\"} 1"));
}

#[tokio::test]
async fn another_life_of_a_worker_begins_with_nothing() {
    let (worker, to) = scripts(2);
    let mut rig = Rig::new(worker).await;
    to[0].send(part(0, 0..4)).await.unwrap();
    rig.until("four blocks are known", |rig| rig.cached(&prompt()) == Some(64)).await;
    let reborn = Member { incarnation: Incarnation(2), ..rig.member.clone() };
    rig.members(&[reborn]);
    assert_eq!(rig.cached(&prompt()), Some(0), "at once");
    to[1].send(part(0, 0..1)).await.unwrap();
    rig.until("what it holds now", |rig| rig.cached(&prompt()) == Some(16) && rig.index.blocks() == 1).await;
}

#[tokio::test]
async fn a_worker_that_breaks_off_is_not_preferred_for_what_it_had() {
    let (worker, to) = scripts(1);
    let rig = Rig::new(worker).await;
    to[0].send(part(0, 0..4)).await.unwrap();
    rig.until("four blocks are known", |rig| rig.cached(&prompt()) == Some(64)).await;
    to[0].send(Err(Status::internal("gone"))).await.unwrap();
    rig.until("nothing is known", |rig| rig.cached(&prompt()) == Some(0)).await;
}

#[tokio::test]
async fn an_older_worker_is_one_whose_cache_is_not_known() {
    let rig = Rig::new(Scripted(None)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(rig.cached(&prompt()), Some(0));
    assert!(rig.metric("kvasir_router_feeds_connected 0"));
    assert!(rig.metric("kvasir_router_feed_resyncs_total{cause=\"reconnect\"} 0"), "asked once, and left alone");
}
