//! The front door among clients and workers that do not behave.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::future::{join_all, try_join_all};
use kvasir_cluster::{EtcdConfig, Member, Registry};
use kvasir_tests::{
    Client, Cluster, Service,
    wait::{self, SOON},
};
use kvasir_types::{Incarnation, PROTOCOL_VERSION, Role};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
};

use crate::prompts::{COUNT, QUESTION, chat, streamed, text};

/// What a decode worker's record could say if somebody else wrote it.
struct Impostors {
    registry: std::sync::Arc<dyn Registry>,
    honest: Member,
    tasks: JoinSet<()>,
    count: u64,
}

impl Impostors {
    async fn new(cluster: &mut Cluster) -> Result<Self> {
        let etcd = EtcdConfig { endpoints: vec![cluster.etcd().endpoint().to_owned()], ..EtcdConfig::default() };
        let (registry, watching) = kvasir_cluster::connect_etcd(etcd).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(watching);
        let honest = registry.view().borrow().role(Role::Decode).next().cloned().context("a decode worker")?;
        Ok(Self { registry, honest, tasks, count: 0 })
    }

    async fn register(&mut self, grpc: String, protocol: u32) -> Result<()> {
        self.count += 1;
        let id = format!("impostor-{}", self.count).parse()?;
        let incarnation = Incarnation(self.count);
        let member = Member { id, incarnation, grpc, protocol, ..self.honest.clone() };
        Ok(self.registry.register(member).await?)
    }

    /// Accepts, and says this once something was said to it; nothing: silence.
    async fn says(&mut self, what: &'static [u8]) -> Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        self.tasks.spawn(async move {
            let mut held = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                held.spawn(async move {
                    let mut heard = [0; 4096];
                    while stream.read(&mut heard).await.is_ok_and(|read| read > 0) {
                        if stream.write_all(what).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        self.register(address, PROTOCOL_VERSION).await
    }
}

#[tokio::test]
async fn workers_that_are_silent_or_talk_nonsense_or_are_of_another_version_cost_no_answer() -> Result<()> {
    Cluster::builder()
        .kv_store(0)
        .set(Service::Router, "limits.worker_silence_ms", 500)
        .run(async |cluster| {
            for warning in ["a worker is not used", "a worker did not begin an answer", "impostor"] {
                cluster.expect_warning(warning);
            }
            let (client, body) = (cluster.client(), chat(cluster.model(), QUESTION));
            let expected = client.chat(&body).await?;
            let mut impostors = Impostors::new(cluster).await?;
            impostors.says(b"").await?;
            impostors.says(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await?;
            // What looks like HTTP/2: empty settings, then a frame of a kind and stream that there isn't.
            impostors.says(b"\0\0\0\x04\0\0\0\0\0\0\0\x04\xee\xff\x7f\xff\xff\xffabcd").await?;
            impostors.register("127.0.0.1:1".to_owned(), PROTOCOL_VERSION).await?;
            impostors.register(cluster.node(Service::Decode, 0).grpc().to_owned(), PROTOCOL_VERSION + 1).await?;
            let router = cluster.node(Service::Router, 0);
            let known = async || {
                let workers = router.metrics().await.ok()?.sum("kvasir_router_decode_workers");
                (workers >= 5.0).then_some(())
            };
            wait::until("the router knows them", SOON, known).await?;
            for _ in 0..6 {
                let answers = try_join_all((0..8).map(|_| client.chat(&body))).await?;
                ensure!(answers.iter().all(|answer| text(answer) == text(&expected)), "{answers:?}");
            }
            Ok(())
        })
        .await
}

#[tokio::test]
async fn when_a_router_is_killed_clients_of_the_other_notice_nothing() -> Result<()> {
    Cluster::builder()
        .kv_store(0)
        .routers(2)
        .run(async |cluster| {
            let body = streamed(cluster.model(), COUNT);
            let other = Client::new(cluster.node(Service::Router, 1).http());
            let (dying, living) = (cluster.client(), other.clone());
            let mut doomed = dying.stream("/v1/chat/completions", &body).await?;
            doomed.chunk().await?;
            let answers = async {
                for _ in 0..5 {
                    let one = async || living.stream("/v1/chat/completions", &body).await?.chunks().await;
                    try_join_all((0..8).map(|_| one())).await?;
                }
                anyhow::Ok(())
            };
            let kill = async {
                cluster.node_mut(Service::Router, 0).process.kill();
            };
            let (answers, ()) = futures_util::future::join(answers, kill).await;
            answers?;
            while let Ok(Some(_)) = doomed.next().await {}
            // What the dead router had begun is given up by the workers, too.
            cluster.assert_no_leak().await
        })
        .await
}

/// Says so much of a request for a stream over a socket that takes little at a time.
async fn raw(router: &str, body: &str, say: usize) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(2048)?;
    let mut stream = socket.connect(router.parse()?).await?;
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let request = head + body;
    stream.write_all(&request.as_bytes()[..say.min(request.len())]).await?;
    Ok(stream)
}

#[tokio::test]
async fn clients_that_are_slow_or_stop_half_way_or_leave_keep_nobody_else_waiting() -> Result<()> {
    Cluster::builder()
        .kv_store(0)
        .set(Service::Router, "limits.body_timeout_ms", 500)
        .set(Service::Router, "limits.header_timeout_ms", 1_000)
        .run(async |cluster| {
            let (client, body) = (cluster.client(), chat(cluster.model(), QUESTION));
            let router = cluster.node(Service::Router, 0).http().to_owned();
            let stream = streamed(cluster.model(), COUNT).to_string();
            client.chat(&body).await?;

            // Readers of a byte now and then.
            let mut slow = try_join_all((0..20).map(|_| raw(&router, &stream, usize::MAX))).await?;
            for _ in 0..10 {
                for reader in &mut slow {
                    reader.read_u8().await?;
                }
                client.chat(&body).await?;
            }
            // One of them goes on to the end, at its pace, and misses nothing.
            let mut last = slow.pop().context("a reader")?;
            drop(slow);
            let mut read = Vec::new();
            let mut piece = [0; 512];
            while !read.ends_with(b"data: [DONE]\n\n\r\n0\r\n\r\n") {
                let got = tokio::time::timeout(SOON, last.read(&mut piece)).await??;
                ensure!(got > 0, "the stream ended early: {}", String::from_utf8_lossy(&read));
                read.extend_from_slice(&piece[..got]);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }

            // Half a head, half a body: told, or hung up on, in time.
            for say in [30, 150] {
                let mut halves = try_join_all((0..20).map(|_| raw(&router, &stream, say))).await?;
                client.chat(&body).await?;
                for half in &mut halves {
                    let mut answer = Vec::new();
                    tokio::time::timeout(SOON, half.read_to_end(&mut answer)).await??;
                    let answer = String::from_utf8_lossy(&answer);
                    ensure!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer}");
                }
            }

            // A thousand that connect and leave.
            for say in [0, 10, 120, usize::MAX] {
                let left = join_all((0..250).map(|_| raw(&router, &stream, say))).await;
                ensure!(left.iter().all(Result::is_ok), "all may connect");
            }
            client.chat(&body).await?;
            let router = cluster.node(Service::Router, 0);
            let quiet = async || (router.metrics().await.ok()?.sum("kvasir_router_inflight") == 0.0).then_some(());
            wait::until("the router has given them up", SOON, quiet).await
        })
        .await
}

#[tokio::test]
async fn after_a_long_idleness_a_request_just_works() -> Result<()> {
    let mut builder = Cluster::builder().set(Service::Router, "limits.header_timeout_ms", 300);
    for service in [Service::Router, Service::Prefill, Service::Decode, Service::KvStore] {
        builder = builder.set(service, "registry.etcd.lease_ttl_s", 1);
    }
    builder
        .run(async |cluster| {
            let (client, body) = (cluster.client(), chat(cluster.model(), QUESTION));
            let first = client.chat(&body).await?;
            for _ in 0..2 {
                // Longer than any time after which something is closed or forgotten: connections, leases, pings.
                tokio::time::sleep(Duration::from_secs(6)).await;
                let again = client.chat(&body).await?;
                ensure!(text(&again) == text(&first), "{again}");
            }
            Ok(())
        })
        .await
}
