//! What one of many calls does harms no other call of the connection: each of these ends the connection, and all calls with
//! it, where h2's guards are what they are by default.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::join_all, stream};
use kvasir_proto::v1::{self, decode_client::DecodeClient, decode_server};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming, transport::Channel};

type Events = std::pin::Pin<Box<dyn futures_util::Stream<Item = Result<v1::GenerateEvent, Status>> + Send>>;

/// How a call's answer goes on is what its name says.
const SILENT: &str = "silent";
const ENDLESS: &str = "endless";
const LONG: &str = "long";
const STUCK: &str = "stuck";
/// Events of a [`LONG`] answer.
const LENGTH: usize = 400;

/// One who answers, on a thread of its own.
#[derive(Default)]
struct Seen {
    calls: AtomicUsize,
    /// Events that went out.
    events: AtomicUsize,
}

struct Answerer {
    seen: Arc<Seen>,
    /// What holds up a [`STUCK`] call, and with it the whole server.
    unstick: std::sync::Mutex<mpsc::Receiver<()>>,
}

fn each(count: usize, pause: Duration) -> impl futures_util::Stream<Item = usize> {
    stream::iter(0..count).then(move |at| tokio::time::sleep(pause).map(move |()| at))
}

#[tonic::async_trait]
impl decode_server::Decode for Answerer {
    type GenerateStream = Events;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Events>, Status> {
        self.seen.calls.fetch_add(1, SeqCst);
        let seen = Arc::clone(&self.seen);
        let event = move |_| {
            seen.events.fetch_add(1, SeqCst);
            Ok(v1::GenerateEvent::default())
        };
        let events: Events = match request.into_inner().request_id.as_str() {
            ENDLESS => Box::pin(each(usize::MAX, Duration::from_millis(10)).map(event)),
            // Each for itself: tokens that are ready together travel together.
            LONG => Box::pin(each(LENGTH, Duration::from_millis(2)).map(event)),
            STUCK => {
                self.unstick.lock().unwrap().recv().unwrap();
                Box::pin(stream::empty())
            }
            _ => Box::pin(stream::pending()),
        };
        Ok(Response::new(events))
    }
}

struct World {
    client: DecodeClient<Channel>,
    seen: Arc<Seen>,
    unstick: mpsc::Sender<()>,
    server: Option<tokio::runtime::Runtime>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.server.take().into_iter().for_each(tokio::runtime::Runtime::shutdown_background);
    }
}

impl World {
    async fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (unstick, stuck) = mpsc::channel();
        let seen = Arc::new(Seen::default());
        let answerer = Answerer { seen: Arc::clone(&seen), unstick: stuck.into() };
        runtime.spawn(async move {
            let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
            let service = decode_server::DecodeServer::new(answerer);
            kvasir_rpc::server().add_service(service).serve_with_incoming(incoming).await
        });
        let client = DecodeClient::new(kvasir_rpc::endpoint(&address).unwrap().connect().await.unwrap());
        Self { client, seen, unstick, server: Some(runtime) }
    }

    async fn call(&self, how: &str) -> Result<Streaming<v1::GenerateEvent>, Status> {
        let request = v1::GenerateRequest { request_id: how.to_owned(), ..v1::GenerateRequest::default() };
        Ok(self.client.clone().generate(request).await?.into_inner())
    }

    /// So many at once, all of which have begun to be answered.
    async fn calls(&self, how: &str, count: usize) -> Vec<Streaming<v1::GenerateEvent>> {
        join_all((0..count).map(|_| self.call(how))).await.into_iter().collect::<Result<_, _>>().unwrap()
    }

    /// Waits without doing any of this side's work until so many events have gone out on the other.
    fn until_sent(&self, events: usize) {
        while self.seen.events.load(SeqCst) < events {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Lets all that can be written on this thread be written.
async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

async fn goes_on(undisturbed: &mut Streaming<v1::GenerateEvent>) {
    for _ in 0..10 {
        undisturbed.message().await.expect("the connection lives").expect("the answer goes on");
    }
}

#[tokio::test]
async fn calls_that_are_given_up_before_they_were_accepted_harm_no_other() {
    let world = World::new().await;
    let mut undisturbed = world.call(ENDLESS).await.unwrap();
    goes_on(&mut undisturbed).await;
    // The server stands still, and while it does a crowd comes and leaves.
    let mut stuck = Box::pin(world.call(STUCK));
    let before = world.seen.calls.load(SeqCst);
    while world.seen.calls.load(SeqCst) == before {
        assert!((&mut stuck).now_or_never().is_none());
        settle().await;
    }
    let mut crowd: Vec<_> = (0..3000).map(|_| Box::pin(world.call(SILENT))).collect();
    for _ in 0..3 {
        crowd.iter_mut().for_each(|call| assert!(call.now_or_never().is_none()));
        settle().await;
    }
    drop(crowd);
    settle().await;
    world.unstick.send(()).unwrap();
    goes_on(&mut undisturbed).await;
    stuck.await.unwrap();
    world.call(SILENT).await.unwrap();
}

#[tokio::test]
async fn answers_that_are_given_up_with_tokens_under_way_harm_no_other() {
    let world = World::new().await;
    let mut undisturbed = world.call(ENDLESS).await.unwrap();
    for _ in 0..3 {
        let crowd = world.calls(ENDLESS, 500).await;
        let sent = world.seen.events.load(SeqCst);
        world.until_sent(sent + 2500);
        drop(crowd);
        goes_on(&mut undisturbed).await;
    }
}

#[tokio::test]
async fn tokens_that_nobody_reads_for_a_while_harm_no_other_and_are_all_there_later() {
    let world = World::new().await;
    let mut undisturbed = world.call(ENDLESS).await.unwrap();
    let crowd = world.calls(LONG, 100).await;
    while world.seen.events.load(SeqCst) < 100 * LENGTH {
        goes_on(&mut undisturbed).await;
    }
    goes_on(&mut undisturbed).await;
    for slow in crowd {
        let read: Vec<_> = slow.collect().await;
        assert_eq!(read.len(), LENGTH);
        assert!(read.iter().all(Result::is_ok), "{:?}", read.last());
    }
}
