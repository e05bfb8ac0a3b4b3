//! A sequence whose blocks are being read back while its owner lets go of it.

use std::{sync::Arc, time::Duration};

use kvasir_cluster::{Member, MemoryHub, Registry};
use kvasir_engine::{Mode, Parts, Priority, Request as Prompt, RunnerSpec, ScriptedRunner};
use kvasir_proto::v1::{self, store_server};
use kvasir_runtime::Context;
use kvasir_transfer::LocalNet;
use kvasir_types::{Incarnation, KvDtype, KvGroups, ModelFingerprint, PROTOCOL_VERSION, Role, Sampling, TokenId};
use tokio::{net::TcpListener, sync::Semaphore};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

use super::*;

const LAYOUT: KvLayout = KvLayout { block_size: 4, layers: 1, kv_heads: 1, k_dim: 2, v_dim: 2, dtype: KvDtype::Bf16 };
const BLOCKS: usize = 12;

/// A store that takes nothing, and finds nothing once it may say so.
#[derive(Clone)]
struct Slow {
    may_answer: Arc<Semaphore>,
}

#[tonic::async_trait]
impl store_server::Store for Slow {
    async fn lookup(&self, _: Request<v1::LookupRequest>) -> Result<Response<v1::LookupResponse>, Status> {
        let _leave = self.may_answer.acquire().await.map_err(|_| Status::internal("closed"))?;
        Ok(Response::new(Default::default()))
    }
    async fn release(&self, _: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn reserve(&self, request: Request<v1::ReserveRequest>) -> Result<Response<v1::ReserveResponse>, Status> {
        let full = v1::Slot { state: v1::slot::State::Full.into(), offset: 0 };
        let slots = vec![full; request.into_inner().hashes.len() / 16];
        Ok(Response::new(v1::ReserveResponse { slots, ..Default::default() }))
    }
    async fn commit(&self, _: Request<v1::CommitRequest>) -> Result<Response<v1::CommitResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn exists(&self, _: Request<v1::ExistsRequest>) -> Result<Response<v1::ExistsResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn used(&self, _: Request<v1::UsedRequest>) -> Result<Response<v1::UsedResponse>, Status> {
        Err(Status::internal("no"))
    }
    async fn get(&self, _: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn put(&self, request: Request<v1::PutRequest>) -> Result<Response<v1::PutResponse>, Status> {
        let states = vec![v1::slot::State::Full.into(); request.into_inner().hashes.len() / 16];
        Ok(Response::new(v1::PutResponse { states, ..Default::default() }))
    }
    async fn report(&self, _: Request<v1::ReportRequest>) -> Result<Response<v1::ReportResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn pin(&self, _: Request<v1::PinRequest>) -> Result<Response<v1::PinResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn evict(&self, _: Request<v1::EvictRequest>) -> Result<Response<v1::EvictResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn learned(&self, _: Request<v1::LearnedRequest>) -> Result<Response<v1::LearnedResponse>, Status> {
        Err(Status::internal("no"))
    }
    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn store_status(
        &self,
        _: Request<v1::StoreStatusRequest>,
    ) -> Result<Response<v1::StoreStatusResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
}

/// An engine with few blocks whose sequences are moved out to a slow store.
struct World {
    engine: Handle,
    spills: Spills,
    may_answer: Arc<Semaphore>,
    _context: Context,
    _registry: Arc<dyn Registry>,
}

async fn world() -> World {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let may_answer = Arc::new(Semaphore::new(0));
    let (grpc, slow) = (listener.local_addr().unwrap().to_string(), Slow { may_answer: may_answer.clone() });
    let context = Context::detached("test");
    context.tasks.spawn(Kind::Background, "store", async move {
        let server = tonic::transport::Server::builder().add_service(store_server::StoreServer::new(slow));
        Ok(server.serve_with_incoming(TcpIncoming::from(listener)).await?)
    });
    let registry = MemoryHub::new().registry();
    let member = Member {
        id: "slow".parse().unwrap(),
        incarnation: Incarnation(1),
        role: Role::KvStore,
        grpc,
        admin: String::new(),
        http: String::new(),
        protocol: PROTOCOL_VERSION,
        version: String::new(),
        model: None,
        segment: None,
        store: None,
        engine: None,
        draining: false,
        duty: kvasir_cluster::Duty::default(),
    };
    registry.register(member).await.unwrap();

    let mut config = Config::default();
    config.store.spill.read_timeout_ms = 60_000;
    let bytes = BLOCKS * LAYOUT.block_bytes();
    let transfer = TransferEngine::new(kvasir_transfer::Config::default(), LocalNet::new(), bytes).unwrap();
    let patient = kvasir_store_client::Config { timeout_ms: 60_000, lookup_timeout_ms: 60_000, ..Default::default() };
    let store = StoreClient::new(patient, registry.view(), transfer.clone());
    let metrics = SpillMetrics::new(&context.metrics);
    let spills = Spills::new(&config, LAYOUT, &transfer, &store, &context.tasks, metrics).unwrap().unwrap();
    let spec = RunnerSpec { vocab: 61, max_len: 4 * BLOCKS, eos: vec![TokenId(0)], groups: KvGroups::full(1) };
    let parts =
        Parts { spill: Some(Box::new(spills.clone())), ..Parts::from(Box::new(ScriptedRunner::new(spec, &LAYOUT))) };
    let (engine, _thread) = kvasir_engine::spawn(kvasir_engine::Config::default(), LAYOUT, BLOCKS, parts);
    World { engine, spills, may_answer, _context: context, _registry: registry }
}

impl World {
    /// A sequence that computes by itself from the start.
    fn start(&self, name: u32, prompt: usize, answer: u32) -> SeqId {
        let request = Prompt {
            id: "test".parse().unwrap(),
            prompt: (0..prompt as u32).map(|at| TokenId(1 + (name * 7 + at * at) % 60)).collect(),
            root: BlockHash::root(ModelFingerprint([1; 16]), &LAYOUT, ""),
            sampling: Sampling { max_tokens: answer, ignore_eos: true, ..Sampling::default() },
            mode: Mode::Generate,
            priority: Priority::Online,
            choices: 1,
        };
        let seq = self.engine.admit(request, Box::new(|_| {})).unwrap();
        self.spills.enter(seq, self.engine.clone(), "test".parse().unwrap());
        self.engine.compute(seq, None);
        seq
    }

    async fn until(&self, what: &str, condition: impl Fn(&kvasir_engine::Stats) -> bool) {
        for _ in 0..3000 {
            if condition(&self.engine.stats()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not in 30 s: {what}; {:?}", self.engine.stats());
    }
}

#[tokio::test]
async fn blocks_that_a_read_may_write_into_are_not_given_back() {
    let world = world().await;
    // Together they outgrow the pool: the younger one gives way, and its blocks are taken.
    let older = world.start(1, 8, 40);
    let younger = world.start(2, 8, 36);
    world.until("the younger one is being brought back", |stats| stats.held == 1).await;
    assert!(!world.spills.leave(older), "nothing reads into the blocks of one that ended");
    let held = world.engine.stats().blocks.in_use;
    assert!(held > 0);

    assert!(world.spills.leave(younger), "its owner must not abort it now");
    let other = world.start(3, 4, 4);
    world.until("another one comes and goes", |stats| stats.finished == 2).await;
    let stats = world.engine.stats();
    assert_eq!((stats.held, stats.blocks.in_use), (1, held), "the blocks stay where they are");
    assert!(!world.spills.leave(other));

    world.may_answer.add_permits(100);
    world.until("the read has returned and all blocks are free", |stats| stats.blocks.in_use == 0).await;
    assert_eq!(world.engine.stats().held, 0);
    assert_eq!(lock(&world.spills.0.slots).len() as u64, 64 * (1 << 20) / LAYOUT.block_bytes() as u64);
}

#[tokio::test]
async fn a_store_that_has_nothing_costs_a_question_and_the_sequence_goes_on() {
    let world = world().await;
    world.start(1, 8, 40);
    world.start(2, 8, 36);
    world.until("the younger one is being brought back", |stats| stats.held == 1).await;
    world.may_answer.add_permits(100);
    world.until("both are written to their end", |stats| stats.finished == 2).await;
    assert_eq!(world.spills.0.metrics.recalled.get(), 0);
}

#[tokio::test]
async fn one_whose_owner_left_is_not_brought_back() {
    let world = world().await;
    let older = world.start(1, 8, 40);
    let younger = world.start(2, 8, 36);
    world.until("the younger one has lost its blocks", |stats| stats.preempted == 1 || stats.held == 1).await;
    if !world.spills.leave(younger) {
        world.engine.abort(younger);
    }
    world.may_answer.add_permits(100);
    world.until("the older one is written to its end", |stats| stats.finished == 1).await;
    world.until("all blocks are free", |stats| stats.blocks.in_use == 0).await;
    world.spills.leave(older);
    assert!(lock(&world.spills.0.sequences).is_empty());
}
