//! A router in this process, mock decode workers on runtimes of their own (so that one can be killed), a client.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{Stream, StreamExt, stream};
use kvasir_cluster::{Member, MemoryHub, ModelInfo, Registry};
use kvasir_proto::v1::{
    self,
    decode_server::{Decode, DecodeServer},
    generate_event,
};
use kvasir_runtime::{Context, Kind};
use kvasir_types::{Incarnation, KvDtype, KvLayout, ModelFingerprint, PROTOCOL_VERSION, Role};
use serde_json::Value;
use tokio::sync::Semaphore;
use tonic::{Code, Request, Response, Status};

use crate::{
    Config, ModelConfig,
    text::{demo, demo_folder},
};

/// Longest wait for anything that should happen at once.
const SOON: Duration = Duration::from_secs(20);
/// Context length of the mock workers.
pub(super) const CONTEXT: u32 = 256;
/// Tokens that the answer of a worker has in [`answer_of`].
pub(super) const ANSWER: usize = 12;

/// What a mock worker does next.
#[derive(Clone)]
pub(super) enum Step {
    /// Sends a token.
    Token(u32),
    /// Sends a token with its log-probability and alternatives.
    Logged(u32, f32, Vec<(u32, f32)>),
    /// Waits for a permit.
    Wait(Arc<Semaphore>),
    /// Says nothing any more.
    Hang,
    /// Sends a token again and again.
    Flood(u32),
    /// Ends well.
    Finish(v1::finished::Reason),
    /// Ends with a status.
    Fail(Code),
    /// Finds a field unacceptable.
    Refuse(&'static str),
    /// Sends a message that means nothing.
    Nonsense,
    /// What follows is of this choice.
    Choice(u32),
    /// Says that it gives signs of life; only before everything else.
    Beats,
    /// A sign of life.
    Alive,
}

/// The tokens of a text.
pub(super) fn say(text: &str) -> Vec<Step> {
    demo().encode(text, false).unwrap().into_iter().map(|token| Step::Token(token.0)).collect()
}

/// The answer that every honest worker gives, from where it goes on: which token is next follows from seed and position.
pub(super) fn answer_of(request: &v1::GenerateRequest) -> Vec<Step> {
    let sampling = request.sampling.as_ref().unwrap();
    let mut steps = Vec::new();
    for choice in 0..request.choices.max(1) {
        let seed = kvasir_types::choice_seed(sampling.seed, choice);
        steps.push(Step::Choice(choice));
        steps.extend((sampling.continued as usize..ANSWER).map(|at| Step::Token(token_at(seed, at))));
        steps.push(stop());
    }
    steps
}

/// A word of the demo model's vocabulary.
pub(super) fn token_at(seed: u64, at: usize) -> u32 {
    400 + (kvasir_types::mix(seed.wrapping_add(at as u64)) % 400) as u32
}

/// The end of an answer.
pub(super) fn stop() -> Step {
    Step::Finish(v1::finished::Reason::Stop)
}

type Script = Arc<dyn Fn(&v1::GenerateRequest) -> Vec<Step> + Send + Sync>;

/// A scripted decode worker.
pub(super) struct Mock {
    seen: Arc<Seen>,
    runtime: Option<tokio::runtime::Runtime>,
    _registry: Arc<dyn Registry>,
}

#[derive(Default)]
struct Seen {
    requests: Mutex<Vec<v1::GenerateRequest>>,
    cancelled: Mutex<usize>,
}

impl Mock {
    /// The requests it got.
    pub(super) fn requests(&self) -> Vec<v1::GenerateRequest> {
        self.seen.requests.lock().unwrap().clone()
    }

    /// How many of them were given up by the router before their script ended.
    pub(super) fn cancelled(&self) -> usize {
        *self.seen.cancelled.lock().unwrap()
    }

    /// Dies as a killed process does: its sockets close, nobody says goodbye. On return it is dead.
    pub(super) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // On a thread of its own: waiting for a runtime's end is not allowed inside another one.
            std::thread::spawn(move || runtime.shutdown_timeout(SOON)).join().unwrap();
        }
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.kill();
    }
}

struct MockDecode {
    script: Script,
    seen: Arc<Seen>,
}

/// Counts a request as cancelled unless its script came to its end.
struct Run {
    steps: std::vec::IntoIter<Step>,
    seen: Arc<Seen>,
    choice: u32,
    /// Tokens of each choice.
    sent: BTreeMap<u32, u32>,
    prompt: u32,
    ended: bool,
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.ended {
            *self.seen.cancelled.lock().unwrap() += 1;
        }
    }
}

impl Run {
    async fn next(&mut self) -> Option<Result<v1::GenerateEvent, Status>> {
        loop {
            let event = match self.steps.next() {
                None => {
                    self.ended = true;
                    return None;
                }
                Some(Step::Hang) => std::future::pending().await,
                Some(Step::Wait(gate)) => {
                    gate.acquire().await.unwrap().forget();
                    continue;
                }
                Some(Step::Flood(token)) => {
                    self.steps = vec![Step::Token(token), Step::Flood(token)].into_iter();
                    continue;
                }
                Some(Step::Fail(code)) => {
                    self.ended = true;
                    return Some(Err(Status::new(code, "the script says so")));
                }
                Some(Step::Refuse(field)) => {
                    self.ended = true;
                    let mut status = Status::invalid_argument("at most 7");
                    status.metadata_mut().insert(kvasir_proto::FIELD_METADATA, field.parse().unwrap());
                    return Some(Err(status));
                }
                Some(Step::Nonsense) => None,
                Some(Step::Choice(choice)) => {
                    self.choice = choice;
                    continue;
                }
                Some(Step::Beats) => continue,
                Some(Step::Alive) => Some(generate_event::Event::Alive(v1::Alive {})),
                Some(Step::Token(id)) => {
                    *self.sent.entry(self.choice).or_default() += 1;
                    Some(generate_event::Event::Token(v1::Token { id, logprob: None, top: Vec::new() }))
                }
                Some(Step::Logged(id, logprob, top)) => {
                    *self.sent.entry(self.choice).or_default() += 1;
                    let top = top.into_iter().map(|(token, logprob)| v1::TopLogprob { token, logprob }).collect();
                    Some(generate_event::Event::Token(v1::Token { id, logprob: Some(logprob), top }))
                }
                Some(Step::Finish(reason)) => Some(generate_event::Event::Finished(v1::Finished {
                    reason: reason.into(),
                    prompt_tokens: self.prompt,
                    cached_tokens: 16,
                    output_tokens: self.sent.get(&self.choice).copied().unwrap_or(0),
                    prefill_member: String::new(),
                })),
            };
            return Some(Ok(v1::GenerateEvent { event, choice: self.choice }));
        }
    }
}

#[tonic::async_trait]
impl Decode for MockDecode {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateEvent, Status>> + Send>>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        let steps = (self.script)(&request);
        let beats = matches!(steps.first(), Some(Step::Beats));
        let steps = steps.into_iter();
        let prompt = request.prompt.len() as u32;
        let run = Run { steps, seen: Arc::clone(&self.seen), choice: 0, sent: BTreeMap::new(), prompt, ended: false };
        self.seen.requests.lock().unwrap().push(request);
        let stream = stream::unfold(run, |mut run| async move { Some((run.next().await?, run)) });
        let mut response: Response<Self::GenerateStream> = Response::new(Box::pin(stream));
        if beats {
            response.metadata_mut().insert(kvasir_proto::HEARTBEAT_METADATA, "1".parse().unwrap());
        }
        Ok(response)
    }
}

/// A router, its cluster and a client.
pub(super) struct Cluster {
    pub(super) hub: MemoryHub,
    pub(super) context: Context,
    pub(super) base: String,
    pub(super) client: reqwest::Client,
    next: Mutex<u64>,
}

impl Cluster {
    /// A router that serves the demo model under the name `demo`.
    pub(super) async fn start(adjust: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config {
            listen: ([127, 0, 0, 1], 0).into(),
            models: vec![ModelConfig::new("demo", demo_folder())],
            public_metrics: true,
            ..Config::default()
        };
        adjust(&mut config);
        let (hub, context) = (MemoryHub::new(), Context::detached("router"));
        let run = crate::run(config, context.clone(), hub.registry());
        context.tasks.spawn(Kind::Critical, "router", run);
        let mut view = hub.registry().view();
        let routers =
            |view: &Arc<kvasir_cluster::View>| view.role(Role::Router).next().map(|member| member.http.clone());
        let view = tokio::time::timeout(SOON, view.wait_for(|view| routers(view).is_some())).await.unwrap().unwrap();
        let base = format!("http://{}", routers(&view).unwrap());
        drop(view);
        Self { hub, context, base, client: reqwest::Client::new(), next: Mutex::new(0) }
    }

    /// A router with one worker that does the same for every request.
    pub(super) async fn with_worker(steps: Vec<Step>) -> (Self, Mock) {
        let cluster = Self::start(|_| {}).await;
        let mock = cluster.worker(move |_| steps.clone()).await;
        (cluster, mock)
    }

    /// The record of a mock worker at `grpc`.
    pub(super) fn member(&self, role: Role, grpc: String) -> Member {
        let mut next = self.next.lock().unwrap();
        *next += 1;
        Member {
            id: format!("{role}-{next}").parse().unwrap(),
            incarnation: Incarnation(*next),
            role,
            grpc,
            admin: String::new(),
            http: String::new(),
            protocol: PROTOCOL_VERSION,
            version: String::new(),
            model: Some(ModelInfo {
                name: "demo".into(),
                fingerprint: ModelFingerprint([7; 16]),
                layout: KvLayout { block_size: 16, layers: 5, kv_heads: 2, k_dim: 32, v_dim: 32, dtype: KvDtype::Bf16 },
                max_model_len: CONTEXT,
                tokenizer: demo().tokenizer_id().into(),
            }),
            segment: None,
            store: None,
            engine: None,
            draining: false,
            duty: kvasir_cluster::Duty::default(),
        }
    }

    /// Starts a mock decode worker and waits until the router knows it.
    pub(super) async fn worker(
        &self,
        script: impl Fn(&v1::GenerateRequest) -> Vec<Step> + Send + Sync + 'static,
    ) -> Mock {
        self.worker_as(|_| {}, script).await
    }

    /// The same with a record that differs.
    pub(super) async fn worker_as(
        &self,
        adjust: impl FnOnce(&mut Member),
        script: impl Fn(&v1::GenerateRequest) -> Vec<Step> + Send + Sync + 'static,
    ) -> Mock {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let grpc = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Seen::default());
        let decode = MockDecode { script: Arc::new(script), seen: Arc::clone(&seen) };
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            let server = kvasir_rpc::server().add_service(DecodeServer::new(decode));
            server.serve_with_incoming(incoming).await
        });
        let registry = self.hub.registry();
        let mut member = self.member(Role::Decode, grpc);
        adjust(&mut member);
        registry.register(member).await.unwrap();
        let known = registry.view().borrow().role(Role::Decode).count();
        self.until(&format!("kvasir_router_decode_workers {known}")).await;
        Mock { seen, runtime: Some(runtime), _registry: registry }
    }

    /// Sends a body and returns the answer's head.
    pub(super) async fn post(&self, path: &str, body: Value) -> reqwest::Response {
        self.client.post(format!("{}{path}", self.base)).json(&body).send().await.unwrap()
    }

    /// Sends a body and returns status and JSON.
    pub(super) async fn ask(&self, path: &str, body: Value) -> (u16, Value) {
        let response = self.post(path, body).await;
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// A chat with one user message and these fields besides.
    pub(super) fn chat(fields: Value) -> Value {
        let mut body =
            serde_json::json!({"model": "demo", "messages": [{"role": "user", "content": "What is a prefix cache?"}]});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    }

    /// Gets a page.
    pub(super) async fn get(&self, path: &str) -> (u16, String) {
        let response = self.client.get(format!("{}{path}", self.base)).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// Waits until the metrics page has this line.
    pub(super) async fn until(&self, line: &str) {
        eventually(line, async || self.get("/metrics").await.1.lines().any(|found| found == line)).await;
    }
}

/// Waits until something is so.
pub(super) async fn eventually(what: &str, mut so: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// The `data:` lines of a stream, JSON where they are, without the fields that differ from run to run.
pub(super) fn events(body: &str) -> Vec<String> {
    let data = body.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").expect("only data"));
    data.map(|data| match serde_json::from_str::<Value>(data) {
        Ok(mut json) => {
            stable(&mut json);
            json.to_string()
        }
        Err(_) => data.to_owned(),
    })
    .collect()
}

/// Takes out what differs from run to run, and what never does.
pub(super) fn stable(answer: &mut Value) {
    if let Some(fields) = answer.as_object_mut() {
        for name in ["id", "created", "model", "system_fingerprint"] {
            fields.shift_remove(name);
        }
    }
}

/// Reads a stream until it has said `text`.
pub(super) async fn read_until(
    stream: &mut (impl Stream<Item = reqwest::Result<bytes::Bytes>> + Unpin),
    text: &str,
) -> String {
    let mut read = String::new();
    while !read.contains(text) {
        let part = tokio::time::timeout(SOON, stream.next()).await.expect("something comes");
        read.push_str(std::str::from_utf8(&part.expect("the stream goes on").unwrap()).unwrap());
    }
    read
}
