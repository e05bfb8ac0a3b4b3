//! Real servers and dead ones, asked as the command does.

use std::time::{Duration, Instant};

use kvasir_proto::v1;
use kvasir_runtime::{AdminConfig, Context};
use kvasir_types::{Incarnation, PROTOCOL_VERSION};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use super::*;
use crate::report::{Blocks, WorkerNumbers};

const LIMIT: Duration = Duration::from_millis(700);

struct Worker {
    draining: bool,
}

#[tonic::async_trait]
impl v1::worker_server::Worker for Worker {
    async fn set_duty(&self, _: Request<v1::SetDutyRequest>) -> Result<Response<v1::SetDutyResponse>, Status> {
        Err(Status::unimplemented("a stand-in is what it is"))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        Ok(Response::new(v1::StatusResponse {
            blocks: Some(v1::BlockCounts { total: 8, free: 5, cached: 2, in_use: 1 }),
            running: 1,
            waiting: 3,
            requests_total: u64::MAX,
            uptime_ms: 10,
            draining: self.draining,
            ..Default::default()
        }))
    }

    async fn trace(&self, _: Request<v1::TraceRequest>) -> Result<Response<v1::TraceResponse>, Status> {
        Err(Status::unimplemented("a stand-in is what it is"))
    }

    async fn set_stage(&self, _: Request<v1::SetStageRequest>) -> Result<Response<v1::SetStageResponse>, Status> {
        Err(Status::unimplemented("a stand-in is what it is"))
    }

    type WatchStream = tokio_stream::Empty<Result<v1::WatchEvent, Status>>;

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("an older worker"))
    }
}

/// Servers of this test; they end with it.
#[derive(Default)]
struct Servers(JoinSet<()>);

impl Servers {
    async fn worker(&mut self, worker: Worker) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server::builder().add_service(v1::worker_server::WorkerServer::new(worker));
        self.0.spawn(async move { server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap() });
        address
    }
}

fn within(limit: Duration) -> Way {
    Way { rpc: kvasir_rpc::Rpc::default(), limit, token: None }
}

async fn admin(context: &Context) -> String {
    kvasir_runtime::admin::start(&AdminConfig::default(), context).await.unwrap().to_string()
}

pub(crate) fn decode(id: &str, grpc: &str, admin: &str) -> Member {
    Member {
        id: id.parse().unwrap(),
        incarnation: Incarnation(1),
        role: Role::Decode,
        grpc: grpc.to_owned(),
        admin: admin.to_owned(),
        http: String::new(),
        protocol: PROTOCOL_VERSION,
        version: "0.1.0".to_owned(),
        model: None,
        segment: None,
        store: None,
        engine: None,
        draining: false,
        duty: kvasir_cluster::Duty::default(),
    }
}

#[tokio::test]
async fn every_member_is_shown_in_the_state_it_is_in() {
    let mut servers = Servers::default();
    let (ready, starting) = (Context::detached("ready"), Context::detached("starting"));
    ready.health.set_ready();
    let (ready, starting) = (admin(&ready).await, admin(&starting).await);
    let (works, drains) =
        (servers.worker(Worker { draining: false }).await, servers.worker(Worker { draining: true }).await);
    let view = View {
        revision: 1,
        epoch: kvasir_types::Epoch(1),
        members: vec![
            decode("works", &works, &ready),
            decode("starts", &works, &starting),
            decode("drains", &drains, &ready),
            decode("no-admin", &works, "127.0.0.1:1"),
            decode("not-an-address", "no such host", &ready),
            Member { role: Role::KvStore, ..decode("not-a-store", &works, &ready) },
            Member { role: Role::Router, ..decode("router", "", &ready) },
        ],
    };
    let report = ask_all(&view, &within(LIMIT * 10)).await;
    let states: Vec<_> = report.members.iter().map(|member| (member.id.as_str(), member.state)).collect();
    assert_eq!(
        states,
        [
            ("works", State::Ready),
            ("starts", State::NotReady),
            ("drains", State::Draining),
            ("no-admin", State::Unreachable),
            ("not-an-address", State::Unreachable),
            ("not-a-store", State::Unreachable),
            ("router", State::Ready),
        ]
    );
    assert_eq!(report.members[1].reason, "starting");
    assert!(report.members[4].reason.ends_with("not an address"), "{}", report.members[4].reason);
    let blocks = Blocks { total: 8, free: 5, cached: 2, in_use: 1 };
    let numbers =
        WorkerNumbers { blocks, running: 1, waiting: 3, requests_total: u64::MAX, uptime_ms: 10, peers: vec![] };
    assert_eq!(report.members[0].live, Some(Live::Worker(numbers)));
}

#[tokio::test]
async fn a_hundred_silent_members_cost_two_limits_not_a_hundred() {
    // Accepts connections (the kernel does) and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let members = (0..100).map(|number| decode(&format!("d-{number}"), &address, &address)).collect();
    let before = Instant::now();
    let report = ask_all(&View { revision: 1, epoch: kvasir_types::Epoch(1), members }, &within(LIMIT)).await;
    assert!(before.elapsed() < LIMIT * 5, "{:?}", before.elapsed());
    assert_eq!(report.members.len(), 100);
    for member in report.members {
        assert_eq!(member.state, State::Unreachable);
        assert!(member.reason.ends_with("no answer within 700 ms"), "{}", member.reason);
    }
}
