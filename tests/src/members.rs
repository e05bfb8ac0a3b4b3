//! Workers that are registered and answer for themselves, and compute nothing: as many as a test of tools for large clusters
//! needs. Each has ports of its own; they end when this is dropped, and their leases then run out.

use anyhow::{Context, Result};
use kvasir_cluster::{EtcdConfig, Member, ModelInfo, connect_etcd};
use kvasir_proto::v1::{
    self,
    worker_server::{Worker, WorkerServer},
};
use kvasir_types::{Incarnation, KvDtype, KvLayout, ModelFingerprint, PROTOCOL_VERSION, Role};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

/// What such a worker says of its blocks.
pub const BLOCKS: u64 = 512;

/// The workers, until it is dropped.
pub struct Members {
    /// Servers, and what keeps the leases alive.
    tasks: JoinSet<()>,
}

impl Members {
    /// Starts so many, a quarter of them for prefill, and registers them in the etcd at that address.
    pub async fn start(etcd: &str, count: usize) -> Result<Self> {
        let config = EtcdConfig { endpoints: vec![etcd.to_owned()], lease_ttl_s: 60, ..EtcdConfig::default() };
        let (registry, keeping) = connect_etcd(config).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(keeping);
        for at in 0..count {
            let grpc = TcpListener::bind(("127.0.0.1", 0)).await?;
            let admin = TcpListener::bind(("127.0.0.1", 0)).await?;
            let member = member(at, &grpc.local_addr()?.to_string(), &admin.local_addr()?.to_string())?;
            let incoming = TcpIncoming::from(grpc).with_nodelay(Some(true));
            let server = kvasir_rpc::server().add_service(WorkerServer::new(Idle));
            tasks.spawn(async move { drop(server.serve_with_incoming(incoming).await) });
            tasks.spawn(pages(admin));
            registry.register(member).await?;
        }
        Ok(Self { tasks })
    }

    /// Waits for as long as they live, which is until somebody drops them.
    pub async fn serve(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

fn member(at: usize, grpc: &str, admin: &str) -> Result<Member> {
    let role = if at.is_multiple_of(4) { Role::Prefill } else { Role::Decode };
    Ok(Member {
        id: format!("{role}-{at:03}").parse().ok().context("a name")?,
        incarnation: Incarnation(at as u64 + 1),
        role,
        grpc: grpc.to_owned(),
        admin: admin.to_owned(),
        http: String::new(),
        protocol: PROTOCOL_VERSION,
        version: "0.1.0".to_owned(),
        model: Some(ModelInfo {
            name: "demo".to_owned(),
            fingerprint: ModelFingerprint([7; 16]),
            layout: KvLayout { block_size: 16, layers: 4, kv_heads: 2, k_dim: 32, v_dim: 32, dtype: KvDtype::F16 },
            max_model_len: 2048,
            tokenizer: String::new(),
        }),
        segment: None,
        store: None,
        engine: None,
        draining: false,
        duty: kvasir_cluster::Duty::default(),
    })
}

struct Idle;

#[tonic::async_trait]
impl Worker for Idle {
    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let blocks = v1::BlockCounts { total: BLOCKS, free: BLOCKS - 12, cached: 8, in_use: 4 };
        Ok(Response::new(v1::StatusResponse { blocks: Some(blocks), running: 1, ..Default::default() }))
    }

    async fn set_duty(&self, _: Request<v1::SetDutyRequest>) -> Result<Response<v1::SetDutyResponse>, Status> {
        Err(Status::unimplemented("it is what it is"))
    }

    async fn set_stage(&self, _: Request<v1::SetStageRequest>) -> Result<Response<v1::SetStageResponse>, Status> {
        Err(Status::unimplemented("it is what it is"))
    }

    async fn trace(&self, _: Request<v1::TraceRequest>) -> Result<Response<v1::TraceResponse>, Status> {
        Err(Status::unimplemented("it is what it is"))
    }

    type WatchStream = futures_util::stream::Empty<Result<v1::WatchEvent, Status>>;

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("nothing happens here"))
    }
}

/// An admin page: every path says that it is ready.
async fn pages(listener: TcpListener) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(async move { drop(page(stream).await) });
        while connections.try_join_next().is_some() {}
    }
}

async fn page(stream: TcpStream) -> std::io::Result<()> {
    let (mut stream, mut line) = (BufReader::new(stream), String::new());
    while stream.read_line(&mut line).await? > 2 {
        line.clear();
    }
    let body = r#"{"ready":true}"#;
    let length = body.len();
    let answer = format!("HTTP/1.0 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
    stream.write_all(answer.as_bytes()).await
}
