//! A real decode worker against prefill workers that fail in every way we can think of. The prefill workers here are
//! mocks (they exist to misbehave); the well-behaved pair is tested end to end in `tests/`.
//!
//! The laws: the answer is the reference's whatever the prefill worker does, nothing it writes late is let in, and
//! afterwards every block is free or cached.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use kvasir_proto::{convert, v1};
use kvasir_runtime::Context;
use kvasir_transfer::{Batch, Op, Range, TransferEngine};
use kvasir_types::{Deadline, SegmentDescriptor};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status, transport::Server};

use crate::harness::{Cluster, LIMIT, config, golden};

type PrefillEvents = mpsc::Sender<Result<v1::PrefillEvent, Status>>;

/// How a mock prefill worker treats a request.
type Behaviour = Arc<dyn Fn(v1::PrefillRequest, PrefillEvents) + Send + Sync>;

struct MockPrefill {
    behaviour: Behaviour,
    calls: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl v1::prefill_server::Prefill for MockPrefill {
    type PrefillStream = ReceiverStream<Result<v1::PrefillEvent, Status>>;

    async fn prefill(&self, request: Request<v1::PrefillRequest>) -> Result<Response<Self::PrefillStream>, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let (events, stream) = mpsc::channel(8);
        let request = request.into_inner();
        let heartbeat_ms = request.heartbeat_ms;
        (self.behaviour)(request, events);
        let mut response = Response::new(ReceiverStream::new(stream));
        response.metadata_mut().insert(kvasir_proto::HEARTBEAT_METADATA, heartbeat_ms.into());
        Ok(response)
    }
}

/// Starts a mock prefill worker; its candidate entry and the count of calls it got.
async fn mock(
    tasks: &Context,
    behaviour: impl Fn(v1::PrefillRequest, PrefillEvents) + Send + Sync + 'static,
) -> (v1::PrefillCandidate, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let calls = Arc::new(AtomicUsize::new(0));
    let service = MockPrefill { behaviour: Arc::new(behaviour), calls: calls.clone() };
    let server = Server::builder()
        .add_service(v1::prefill_server::PrefillServer::new(service))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tasks.tasks.spawn(kvasir_runtime::Kind::Background, "mock", async move { Ok(server.await?) });
    (v1::PrefillCandidate { member: "mock".into(), address }, calls)
}

fn first_token(id: u32) -> Result<v1::PrefillEvent, Status> {
    let token = v1::Token { id, logprob: None, top: Vec::new() };
    Ok(v1::PrefillEvent { event: Some(v1::prefill_event::Event::FirstToken(token)) })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prefill_workers_that_fail_are_passed_over_and_the_answer_is_the_references() {
    let (cluster, golden) = (Cluster::with_decode().await, golden());
    let (refusing, refused) = mock(&cluster.context, |_, events| {
        events.try_send(Err(Status::unavailable("overloaded"))).unwrap();
    })
    .await;
    let (silent, ended) = mock(&cluster.context, |_, _| {}).await;
    let nobody = v1::PrefillCandidate { member: "nobody".into(), address: "127.0.0.1:1".into() };

    for candidates in
        [vec![refusing.clone(), silent.clone()], vec![nobody.clone(), refusing], vec![silent, nobody], vec![]]
    {
        let mut request = cluster.request(&golden, candidates);
        request.cache_salt = format!("run {:?}", request.prefill); // so that no run finds another's blocks
        let (tokens, finished) = cluster.answer(request).await.unwrap();
        assert_eq!(tokens, golden.output_ids);
        assert_eq!((finished.prefill_member.as_str(), finished.cached_tokens), ("", 0));
    }
    assert_eq!((refused.load(Ordering::SeqCst), ended.load(Ordering::SeqCst)), (2, 2));
    cluster.assert_no_leak().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_token_sent_before_the_failure_is_not_sent_again() {
    let (cluster, golden) = (Cluster::with_decode().await, golden());
    let right = golden.output_ids[0];
    let (dying, _) = mock(&cluster.context, move |_, events| {
        events.try_send(first_token(right)).unwrap();
        events.try_send(Err(Status::internal("out of luck"))).unwrap();
    })
    .await;
    for choices in [1, 3] {
        let request = v1::GenerateRequest { choices, ..cluster.request(&golden, vec![dying.clone()]) };
        for (tokens, _) in cluster.choices(v1::GenerateRequest { cache_salt: format!("{choices}"), ..request }).await {
            assert_eq!(tokens, golden.output_ids);
        }
    }

    // One that lied about the token: what the client has can't be unsaid, and another answer can't be glued to it.
    let (lying, _) = mock(&cluster.context, move |_, events| {
        events.try_send(first_token(right + 1)).unwrap();
        events.try_send(Err(Status::internal("out of luck"))).unwrap();
    })
    .await;
    let mut request = cluster.request(&golden, vec![lying]);
    request.cache_salt = "another".into();
    assert_eq!(cluster.answer(request).await.unwrap_err().code(), Code::Internal);
    cluster.assert_no_leak().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_failed_prefill_worker_writes_late_is_refused() {
    let (cluster, golden) = (Cluster::with_decode().await, golden());
    let (leak, leaked) = oneshot::channel();
    let leak = std::sync::Mutex::new(Some(leak));
    let (evil, _) = mock(&cluster.context, move |request, events| {
        if let Some(leak) = leak.lock().unwrap().take() {
            leak.send(request).unwrap();
        }
        events.try_send(Err(Status::unavailable("but I kept the key"))).unwrap();
    })
    .await;
    let mut stream = cluster.generate(cluster.request(&golden, vec![evil])).await.unwrap();
    let handoff = leaked.await.unwrap();

    let mut tokens = Vec::new();
    let writer = TransferEngine::new(Default::default(), cluster.local.clone(), 1 << 20).unwrap();
    let target: SegmentDescriptor = handoff.destination.as_ref().unwrap().try_into().unwrap();
    while let Some(event) = stream.message().await.unwrap() {
        // All through the answer the failed worker keeps trying to overwrite the prompt's blocks.
        if let Some(v1::generate_event::Event::Token(token)) = event.event {
            tokens.push(token.id);
        }
        let ranges = handoff.blocks.iter().map(|block| Range { local: 0, remote: block.offset, len: 1024 }).collect();
        let deadline = Deadline::after(Duration::from_secs(5));
        let batch = Batch::new(Op::Write, target.clone(), convert::grant_key(handoff.grant), ranges, deadline);
        writer.submit(batch).await.expect_err("a revoked key opens nothing");
    }
    assert_eq!(tokens, golden.output_ids);
    cluster.assert_no_leak().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_during_the_handoff_cancels_it_and_frees_its_blocks() {
    let (cluster, golden) = (Cluster::with_decode().await, golden());
    let (told, seen) = mpsc::channel(1);
    let (endless, _) = mock(&cluster.context, move |_, events| told.try_send(events).unwrap()).await;
    let mut seen = seen;
    let stream = cluster.generate(cluster.request(&golden, vec![endless])).await.unwrap();
    let prefill = seen.recv().await.unwrap();
    drop(stream);
    tokio::time::timeout(LIMIT, prefill.closed()).await.expect("the prefill worker sees that it may stop");
    cluster.assert_no_leak().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_worker_that_never_answers_costs_the_deadline_and_no_more() {
    let (cluster, golden) = (Cluster::with_decode().await, golden());
    let kept = std::sync::Mutex::new(Vec::new());
    let (endless, _) = mock(&cluster.context, move |_, events| kept.lock().unwrap().push(events)).await;
    let mut request = cluster.request(&golden, vec![endless]);
    request.deadline_ms = 300;
    assert_eq!(cluster.answer(request).await.unwrap_err().code(), Code::DeadlineExceeded);
    cluster.assert_no_leak().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_cannot_be_served_are_refused_before_anything_is_reserved() {
    let (cluster, golden) = (Cluster::with_decode().await, golden());
    let good = cluster.request(&golden, vec![]);
    for (bad, code) in [
        (v1::GenerateRequest { protocol_version: 99, ..good.clone() }, Code::InvalidArgument),
        (v1::GenerateRequest { fingerprint: vec![0; 16].into(), ..good.clone() }, Code::FailedPrecondition),
        (v1::GenerateRequest { fingerprint: vec![0; 3].into(), ..good.clone() }, Code::InvalidArgument),
        (v1::GenerateRequest { prompt: vec![u32::MAX], ..good.clone() }, Code::InvalidArgument),
        (v1::GenerateRequest { prompt: vec![], ..good.clone() }, Code::InvalidArgument),
        (v1::GenerateRequest { prompt: vec![5; 100_000], ..good.clone() }, Code::InvalidArgument),
        (v1::GenerateRequest { sampling: None, ..good.clone() }, Code::InvalidArgument),
        (v1::GenerateRequest { choices: 129, ..good.clone() }, Code::InvalidArgument),
        (v1::GenerateRequest { choices: u32::MAX, ..good.clone() }, Code::InvalidArgument),
        (v1::GenerateRequest { request_id: "a b".into(), ..good.clone() }, Code::InvalidArgument),
        (v1::GenerateRequest { cache_salt: "x".repeat(1000), ..good.clone() }, Code::InvalidArgument),
    ] {
        let status = cluster.answer(bad).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
    }
    cluster.assert_no_leak().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_worker_that_failed_a_moment_ago_is_tried_last() {
    let (cluster, golden) = (Cluster::with_decode().await, golden());
    let fail = |_, events: PrefillEvents| events.try_send(Err(Status::unavailable("no"))).unwrap();
    let ((first, asked_first), (second, asked_second)) =
        (mock(&cluster.context, fail).await, mock(&cluster.context, fail).await);
    let counts = || (asked_first.load(Ordering::SeqCst), asked_second.load(Ordering::SeqCst));
    let ask = |candidates, salt: &str| {
        let request = cluster.request(&golden, candidates);
        cluster.answer(v1::GenerateRequest { cache_salt: salt.into(), ..request })
    };
    // Three are proposed, two attempts are made: the one that has failed already is left out.
    assert_eq!(ask(vec![first.clone()], "a").await.unwrap().0, golden.output_ids);
    assert_eq!(counts(), (1, 0));
    let good = cluster.add_prefill(config(), false).await;
    let (tokens, finished) = ask(vec![first, second, good], "b").await.unwrap();
    assert_eq!((tokens, finished.prefill_member.as_str()), (golden.output_ids.clone(), "prefill-1"));
    assert_eq!(counts(), (1, 1));
    cluster.assert_no_leak().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_gives_signs_of_life_is_waited_for_and_one_that_stops_giving_them_is_not() {
    let mut patient = config();
    patient.decode.prefill_silence_ms = 400;
    let (cluster, golden) = (Cluster::with_decode_of(patient).await, golden());
    let tasks = cluster.context.tasks.clone();
    let (hanging, calls) = mock(&cluster.context, move |request, events| {
        assert_eq!(request.heartbeat_ms, 100);
        tasks.spawn(kvasir_runtime::Kind::Background, "mock answer", async move {
            // Longer than the silence that is borne, in all.
            for _ in 0..8 {
                let alive = v1::PrefillEvent { event: Some(v1::prefill_event::Event::Alive(v1::Alive {})) };
                if events.send(Ok(alive)).await.is_err() {
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            events.closed().await; // and then nothing
            Ok(())
        });
    })
    .await;
    let started = std::time::Instant::now();
    let (tokens, _) = cluster.answer(cluster.request(&golden, vec![hanging])).await.unwrap();
    assert_eq!((tokens, calls.load(Ordering::SeqCst)), (golden.output_ids, 1));
    assert!(started.elapsed() >= Duration::from_millis(1_000), "it was given up while it lived");
    cluster.assert_no_leak().await;
}
