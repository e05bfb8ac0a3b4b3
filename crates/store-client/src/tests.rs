//! A node that lies: whatever it answers, a read is a miss, a write is skipped, and nobody panics.
//!
//! What an honest node and this client do together is tested where the node is, in `kvasir-kv-store`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use kvasir_cluster::{Member, MemoryHub, Registry};
use kvasir_proto::v1::{self, store_server};
use kvasir_transfer::{LocalNet, TransferEngine};
use kvasir_types::{BlockHash, Deadline, Incarnation, PROTOCOL_VERSION, Role};
use tokio::{net::TcpListener, task::JoinSet};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

use crate::{Config, Error, Origin, StoreClient};

/// Too large to be sent along with a call.
const BLOCK: u64 = 64 << 10;

/// Answers what it was told to answer.
#[derive(Clone, Default)]
struct Liar {
    lookup: v1::LookupResponse,
    reserve: v1::ReserveResponse,
    commit: v1::CommitResponse,
    tiers: Vec<u8>,
    /// What the last reservation said that was known of its prompt.
    told_known: Arc<AtomicU32>,
    /// Reservations that were asked for.
    reservations: Arc<AtomicU32>,
    /// Where it says its index is.
    index: Option<v1::PublishedIndex>,
    /// Questions of what it has.
    questions: Arc<AtomicU32>,
}

#[tonic::async_trait]
impl store_server::Store for Liar {
    async fn lookup(&self, _: Request<v1::LookupRequest>) -> Result<Response<v1::LookupResponse>, Status> {
        self.questions.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(v1::LookupResponse { index: self.index.clone(), ..self.lookup.clone() }))
    }
    async fn release(&self, _: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        Err(Status::internal("no"))
    }
    async fn reserve(&self, request: Request<v1::ReserveRequest>) -> Result<Response<v1::ReserveResponse>, Status> {
        self.told_known.store(request.get_ref().prompt_known, Ordering::Relaxed);
        self.reservations.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(self.reserve.clone()))
    }
    async fn commit(&self, _: Request<v1::CommitRequest>) -> Result<Response<v1::CommitResponse>, Status> {
        Ok(Response::new(self.commit.clone()))
    }
    async fn exists(&self, _: Request<v1::ExistsRequest>) -> Result<Response<v1::ExistsResponse>, Status> {
        self.questions.fetch_add(1, Ordering::Relaxed);
        let (tiers, index) = (self.tiers.clone().into(), self.index.clone());
        Ok(Response::new(v1::ExistsResponse { tiers, index }))
    }
    async fn used(&self, _: Request<v1::UsedRequest>) -> Result<Response<v1::UsedResponse>, Status> {
        Err(Status::internal("no"))
    }
    async fn get(&self, _: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        Err(Status::internal("no"))
    }
    async fn put(&self, _: Request<v1::PutRequest>) -> Result<Response<v1::PutResponse>, Status> {
        Err(Status::internal("no"))
    }
    async fn report(&self, _: Request<v1::ReportRequest>) -> Result<Response<v1::ReportResponse>, Status> {
        Err(Status::internal("no"))
    }
    async fn pin(&self, _: Request<v1::PinRequest>) -> Result<Response<v1::PinResponse>, Status> {
        Err(Status::internal("no"))
    }
    async fn learned(&self, _: Request<v1::LearnedRequest>) -> Result<Response<v1::LearnedResponse>, Status> {
        Err(Status::internal("no"))
    }
    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        Err(Status::internal("no"))
    }
    async fn evict(&self, _: Request<v1::EvictRequest>) -> Result<Response<v1::EvictResponse>, Status> {
        Err(Status::internal("no"))
    }
    async fn store_status(
        &self,
        _: Request<v1::StoreStatusRequest>,
    ) -> Result<Response<v1::StoreStatusResponse>, Status> {
        Err(Status::internal("no"))
    }
}

/// A client in a cluster whose only node is a liar.
struct World {
    client: StoreClient,
    _registry: Arc<dyn Registry>,
    _server: JoinSet<Result<(), tonic::transport::Error>>,
}

async fn world(liar: Liar) -> World {
    world_with(liar, Config::default()).await
}

async fn world_with(liar: Liar, config: Config) -> World {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let grpc = listener.local_addr().unwrap().to_string();
    let mut server = JoinSet::new();
    server.spawn(
        tonic::transport::Server::builder()
            .add_service(store_server::StoreServer::new(liar))
            .serve_with_incoming(TcpIncoming::from(listener)),
    );
    let registry = MemoryHub::new().registry();
    let member = Member {
        id: "liar".parse().unwrap(),
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
    let engine = TransferEngine::new(kvasir_transfer::Config::default(), LocalNet::new(), 8 * BLOCK as usize).unwrap();
    let client = StoreClient::new(config, registry.view(), engine);
    World { client, _registry: registry, _server: server }
}

fn blocks() -> Vec<(BlockHash, u64)> {
    (0..4u8).map(|n| (BlockHash([n; 16]), u64::from(n) * BLOCK)).collect()
}

/// A segment that nobody has.
fn nowhere() -> v1::SegmentDescriptor {
    let transport = v1::TransportAddress { kind: "tcp".into(), address: "127.0.0.1:1".into() };
    v1::SegmentDescriptor {
        segment: 7,
        incarnation: 7,
        len: 1 << 20,
        transports: vec![transport],
        ..Default::default()
    }
}

fn found(blocks: usize) -> v1::LookupResponse {
    v1::LookupResponse {
        offsets: (0..blocks as u64).map(|n| n * BLOCK).collect(),
        checksums: vec![0; blocks * 16].into(),
        segment: Some(nowhere()),
        grant: 1,
        lease: 1,
        lease_ms: 5_000,
        ..Default::default()
    }
}

#[tokio::test]
async fn no_answer_to_a_lookup_makes_a_read_more_than_a_miss() {
    type Expected = fn(&Error) -> bool;
    let cases: [(&str, v1::LookupResponse, Expected); 8] = [
        ("more blocks than asked for", found(5), |e| matches!(e, Error::Answer { .. })),
        ("fewer checksums than blocks", v1::LookupResponse { checksums: vec![0; 48].into(), ..found(4) }, |e| {
            matches!(e, Error::Count { asked: 4, got: 4, .. })
        }),
        ("half a checksum", v1::LookupResponse { checksums: vec![0; 8].into(), ..found(1) }, |e| {
            matches!(e, Error::Answer { .. })
        }),
        ("no segment", v1::LookupResponse { segment: None, ..found(1) }, |e| matches!(e, Error::Answer { .. })),
        ("offset outside", v1::LookupResponse { offsets: vec![u64::MAX], ..found(1) }, |e| {
            matches!(e, Error::Transfer { .. })
        }),
        ("nobody there", found(4), |e| matches!(e, Error::Transfer { .. })),
        ("an endless lease", v1::LookupResponse { lease_ms: u64::MAX, ..found(4) }, |e| {
            matches!(e, Error::Transfer { .. })
        }),
        ("a lease that is over", v1::LookupResponse { lease_ms: 0, ..found(4) }, |e| {
            matches!(e, Error::Transfer { .. })
        }),
    ];
    for (lie, lookup, expected) in cases {
        let world = world(Liar { lookup, ..Liar::default() }).await;
        let deadline = Deadline::after(Duration::from_secs(5));
        let report = world.client.read(&"test".parse().unwrap(), &blocks(), BLOCK, deadline).await;
        assert_eq!((report.blocks, report.bytes), (0, 0), "{lie}");
        assert!(report.error.as_ref().is_some_and(expected), "{lie}: {report:?}");
        assert!(!deadline.passed(), "{lie}: took too long");
    }
}

#[tokio::test]
async fn no_answer_to_a_reservation_makes_a_write_more_than_skipped() {
    let slot = |state: v1::slot::State, offset| v1::Slot { state: state.into(), offset };
    let reserved = v1::slot::State::Reserved;
    let reserve = |slots| v1::ReserveResponse {
        slots,
        segment: Some(nowhere()),
        grant: 1,
        reservation: 1,
        reservation_ms: 5_000,
        ..Default::default()
    };
    let cases = [
        ("too few slots", reserve(vec![slot(reserved, 0); 3]), 0),
        ("too many slots", reserve(vec![slot(reserved, 0); 5]), 0),
        ("no segment", v1::ReserveResponse { segment: None, ..reserve(vec![slot(reserved, 0); 4]) }, 0),
        ("offset outside", reserve(vec![slot(reserved, u64::MAX - 5); 4]), 0),
        ("nobody there", reserve(vec![slot(reserved, 0); 4]), 0),
        ("states of the future", reserve(vec![v1::Slot { state: 99, offset: 0 }; 4]), 0),
        ("one is there", reserve([vec![slot(v1::slot::State::Present, 0)], vec![slot(reserved, 0); 3]].concat()), 1),
    ];
    for (lie, reserve, present) in cases {
        // It claims to have committed more than it was offered.
        let commit = v1::CommitResponse { committed: 1000, ..Default::default() };
        let world = world(Liar { reserve, commit, ..Liar::default() }).await;
        let deadline = Deadline::after(Duration::from_secs(5));
        let report = world.client.write(&"test".parse().unwrap(), &Origin::default(), &blocks(), BLOCK, deadline).await;
        assert_eq!((report.written, report.present, report.skipped), (0, present, 4 - present), "{lie}: {report:?}");
        assert!(!deadline.passed(), "{lie}: took too long");
    }
}

/// A segment that takes in what is written to it, and the grant for that: the way to a node's memory for those who lie about
/// what becomes of it.
fn sink() -> (TransferEngine, v1::SegmentDescriptor, u64) {
    let engine = TransferEngine::new(kvasir_transfer::Config::default(), LocalNet::new(), 4 * ROOM as usize).unwrap();
    let range = kvasir_transfer::GrantRange { offset: 0, len: 4 * ROOM, access: kvasir_transfer::Access::Write };
    let grant = engine.grant(vec![range]).unwrap();
    let (segment, key) = ((&engine.descriptor()).into(), grant.key().0);
    std::mem::forget(grant); // it lasts as long as the test
    (engine, segment, key)
}

/// One block that is written one-sided.
const ROOM: u64 = 2 * BLOCK + 64;

#[tokio::test]
async fn no_answer_about_room_made_ahead_loses_a_block_or_counts_one_that_is_not_there() {
    let (_engine, segment, grant) = sink();
    let slot = v1::Slot { state: Reserved.into(), offset: 0 };
    let reserve = |ahead| v1::ReserveResponse {
        slots: vec![slot],
        segment: Some(segment.clone()),
        grant,
        reservation: 1,
        reservation_ms: 5_000,
        ahead: Some(ahead),
        view: None,
    };
    let good = v1::Ahead { reservation: 2, reservation_ms: 500_000, grant, offset: ROOM, block_bytes: ROOM };
    let answer =
        |committed, state: v1::slot::State| v1::CommitResponse { committed, state: state.into(), ..Default::default() };
    use v1::slot::State::{Busy, Full, Present, Reserved, Unspecified};
    // What it says of each commit; what becomes of the second block; how many reservations there were for two.
    let cases = [
        ("room as it should be", good, answer(1, Reserved), (1, 0), 1),
        ("it is there", good, answer(0, Present), (0, 1), 1),
        ("another is at it", good, answer(0, Busy), (0, 0), 1),
        ("torn", good, answer(0, Reserved), (0, 0), 1),
        ("no such reservation any more, or a node that knows none of this", good, answer(0, Unspecified), (0, 0), 2),
        ("nothing for this origin", good, answer(0, Full), (0, 0), 2),
        ("states of the future", good, v1::CommitResponse { state: 99, ..Default::default() }, (0, 0), 2),
        ("outside of the segment", v1::Ahead { offset: u64::MAX - 7, ..good }, answer(1, Reserved), (1, 0), 2),
        ("a grant that is none", v1::Ahead { grant: 3, ..good }, answer(1, Reserved), (1, 0), 2),
        ("over already", v1::Ahead { reservation_ms: 0, ..good }, answer(1, Reserved), (1, 0), 2),
        ("of another size", v1::Ahead { block_bytes: 7, ..good }, answer(1, Reserved), (1, 0), 2),
    ];
    for (lie, ahead, commit, fate, reservations) in cases {
        let liar = Liar { reserve: reserve(ahead), commit, ..Liar::default() };
        let asked = liar.reservations.clone();
        let world = world(liar).await;
        let (request, origin) = ("test".parse().unwrap(), Origin::default());
        let deadline = Deadline::after(Duration::from_secs(5));
        let write = |n: u8| {
            let block = [(BlockHash([n; 16]), 0)];
            let (client, request, origin) = (&world.client, &request, &origin);
            async move { client.write(request, origin, &block, ROOM, deadline).await }
        };
        write(1).await;
        let report = write(2).await;
        assert_eq!((report.written, report.present), fate, "{lie}: {report:?}");
        assert_eq!(asked.load(Ordering::Relaxed), reservations, "{lie}");
        assert!(!deadline.passed(), "{lie}: took too long");
    }
}

#[tokio::test]
async fn no_answer_to_a_question_makes_a_run_that_is_not_there() {
    let hashes: Vec<_> = blocks().into_iter().map(|(hash, _)| hash).collect();
    for (tiers, run, wrong) in [(vec![1, 3, 0, 2], 2, false), (vec![1; 3], 0, true), (vec![1; 5], 0, true)] {
        let world = world(Liar { tiers: tiers.clone(), ..Liar::default() }).await;
        let (found, error) = world.client.exists(&hashes, BLOCK, Deadline::after(Duration::from_secs(5))).await;
        assert_eq!(found, run, "{tiers:?}");
        assert_eq!(matches!(error, Some(Error::Count { asked: 4, .. })), wrong, "{tiers:?}: {error:?}");
    }
}

#[tokio::test]
async fn whoever_writes_a_prompt_tells_how_far_it_was_known() {
    let told = Arc::new(AtomicU32::new(0));
    for (known, told_known) in [(0, 0), (3, 3), (u32::MAX, 4)] {
        let lookup = v1::LookupResponse { known, ..Default::default() };
        let world = world(Liar { lookup, told_known: told.clone(), ..Liar::default() }).await;
        let (request, soon) = ("test".parse().unwrap(), Deadline::after(Duration::from_secs(20)));
        assert_eq!(world.client.read(&request, &blocks(), BLOCK, soon).await.blocks, 0);
        world.client.write(&request, &Origin::default(), &blocks(), BLOCK, soon).await;
        assert_eq!(told.load(Ordering::Relaxed), told_known);
    }
}

#[tokio::test]
async fn a_node_that_hangs_is_waited_for_once_by_whoever_glances_not_by_a_call_too() {
    // Takes connections and says nothing: a node that was stopped.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let transports = vec![v1::TransportAddress { kind: "tcp".into(), address }];
    let segment = Some(v1::SegmentDescriptor { transports, ..nowhere() });
    let index = Some(v1::PublishedIndex { segment, grant: 1, offset: 0, sets: 16, seed: 1 });
    // A call would be answered: that there is none is seen by its not being counted. The breaker outlasts the test.
    let config = Config { lookup_timeout_ms: 1_000, breaker_ms: 600_000, ..Config::default() };
    let (request, deadline) = ("test".parse().unwrap(), Deadline::after(Duration::from_secs(60)));
    for by_reading in [true, false] {
        let liar = Liar { index: index.clone(), tiers: vec![0; 4], ..Liar::default() };
        let questions = liar.questions.clone();
        let world = world_with(liar, config.clone()).await;
        let hashes: Vec<_> = blocks().into_iter().map(|(hash, _)| hash).collect();
        let look = async || {
            if by_reading {
                let report = world.client.read(&request, &blocks(), BLOCK, deadline).await;
                (report.blocks, report.error)
            } else {
                world.client.exists(&hashes, BLOCK, deadline).await
            }
        };
        let (found, error) = look().await;
        assert_eq!(
            (found, error.is_none(), questions.load(Ordering::Relaxed)),
            (0, true, 1),
            "asked, and told of an index"
        );
        let (found, error) = look().await;
        assert!(found == 0 && matches!(error, Some(Error::Away { .. })), "{error:?}");
        assert_eq!(questions.load(Ordering::Relaxed), 1, "not waited for a second time");
    }
}
