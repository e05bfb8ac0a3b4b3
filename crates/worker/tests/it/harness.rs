//! Workers in this process, and a client for them.

use std::time::Duration;

use kvasir_cluster::{Member, MemoryHub};
use kvasir_proto::{convert, v1};
use kvasir_runtime::{Context, Kind};
use kvasir_transfer::LocalNet;
use kvasir_types::{BlockHash, Deadline, PROTOCOL_VERSION, Role, Sampling};
use kvasir_worker::Config;
use tonic::Status;

/// Longer than anything here takes, shorter than a person's patience.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo");

/// A decode worker, and prefill workers as they are added.
pub(crate) struct Cluster {
    pub(crate) context: Context,
    pub(crate) local: LocalNet,
    hub: MemoryHub,
    decode: Member,
}

impl Cluster {
    pub(crate) async fn with_decode() -> Self {
        Self::with_decode_of(config()).await
    }

    pub(crate) async fn with_decode_of(config: Config) -> Self {
        let (context, hub, local) = (Context::detached("test"), MemoryHub::new(), LocalNet::new());
        let decode = start(&context, &hub, local.clone(), Role::Decode, config).await;
        Self { context, local, hub, decode }
    }

    /// Adds a prefill worker; `local` says whether it shares the process's memory network or must use sockets.
    pub(crate) async fn add_prefill(&self, config: Config, local: bool) -> v1::PrefillCandidate {
        let net = if local { self.local.clone() } else { LocalNet::new() };
        let member = start(&self.context, &self.hub, net, Role::Prefill, config).await;
        v1::PrefillCandidate { member: member.id.to_string(), address: member.grpc }
    }

    /// A client for what any worker tells, of the decode worker.
    pub(crate) async fn decode_client(&self) -> v1::worker_client::WorkerClient<tonic::transport::Channel> {
        Self::client_of(&self.decode.grpc).await
    }

    /// The same, of any worker.
    pub(crate) async fn client_of(address: &str) -> v1::worker_client::WorkerClient<tonic::transport::Channel> {
        v1::worker_client::WorkerClient::connect(format!("http://{address}")).await.unwrap()
    }

    /// Where chains of block hashes begin on the decode worker, and the tokens of a block.
    pub(crate) fn root(&self, salt: &str) -> (BlockHash, usize) {
        let model = self.decode.model.as_ref().unwrap();
        (BlockHash::root(model.fingerprint, &model.layout, salt), model.layout.block_size as usize)
    }

    /// A greedy request for the reference's answer.
    pub(crate) fn request(&self, golden: &Golden, prefill: Vec<v1::PrefillCandidate>) -> v1::GenerateRequest {
        v1::GenerateRequest {
            protocol_version: PROTOCOL_VERSION,
            request_id: "test-1".into(),
            fingerprint: convert::bytes16(&self.decode.model.as_ref().unwrap().fingerprint.0),
            prompt: golden.prompt_ids.clone(),
            sampling: Some((&Sampling { max_tokens: 200, ..Sampling::default() }).into()),
            cache_salt: String::new(),
            prefill,
            deadline_ms: 20_000,
            priority: v1::Priority::Unspecified.into(),
            choices: 0,
            heartbeat_ms: 0,
            tenant: String::new(),
        }
    }

    pub(crate) async fn generate(
        &self,
        request: v1::GenerateRequest,
    ) -> Result<tonic::Streaming<v1::GenerateEvent>, Status> {
        let address = format!("http://{}", self.decode.grpc);
        let mut client = v1::decode_client::DecodeClient::connect(address).await.unwrap();
        Ok(client.generate(request).await?.into_inner())
    }

    /// The answer's tokens and end.
    pub(crate) async fn answer(&self, request: v1::GenerateRequest) -> Result<(Vec<u32>, v1::Finished), Status> {
        let mut stream = self.generate(request).await?;
        let mut tokens = Vec::new();
        while let Some(event) = tokio::time::timeout(LIMIT, stream.message()).await.expect("no answer hangs")? {
            match event.event.unwrap() {
                v1::generate_event::Event::Token(token) => tokens.push(token.id),
                v1::generate_event::Event::Alive(_) => {}
                v1::generate_event::Event::Finished(finished) => return Ok((tokens, finished)),
            }
        }
        panic!("the stream ended without an end");
    }

    /// The tokens and the end of each of so many answers.
    pub(crate) async fn choices(&self, request: v1::GenerateRequest) -> Vec<(Vec<u32>, v1::Finished)> {
        let mut choices = vec![(Vec::new(), None); request.choices as usize];
        let mut stream = self.generate(request).await.unwrap();
        while choices.iter().any(|(_, finished)| finished.is_none()) {
            let event = tokio::time::timeout(LIMIT, stream.message()).await.expect("no answer hangs").unwrap();
            let event = event.expect("all end before the stream does");
            let (tokens, end) = &mut choices[event.choice as usize];
            assert!(end.is_none(), "nothing comes after a choice's end");
            match event.event.unwrap() {
                v1::generate_event::Event::Token(token) => tokens.push(token.id),
                v1::generate_event::Event::Alive(_) => {}
                v1::generate_event::Event::Finished(finished) => *end = Some(finished),
            }
        }
        assert!(stream.message().await.unwrap().is_none(), "nothing comes after the last end");
        choices.into_iter().map(|(tokens, end)| (tokens, end.unwrap())).collect()
    }

    /// Law: with no request running, free + cached = total, on every worker.
    pub(crate) async fn assert_no_leak(&self) {
        let view = self.hub.registry().view().borrow().clone();
        let until = Deadline::after(LIMIT);
        for member in &view.members {
            let mut client = v1::worker_client::WorkerClient::connect(format!("http://{}", member.grpc)).await.unwrap();
            loop {
                let blocks = client.status(v1::StatusRequest {}).await.unwrap().into_inner().blocks.unwrap();
                if blocks.in_use == 0 {
                    assert_eq!(blocks.free + blocks.cached, blocks.total);
                    break;
                }
                assert!(!until.passed(), "{} still holds blocks: {blocks:?}", member.id);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    pub(crate) async fn stop(self) {
        self.context.shutdown.trigger();
        assert_eq!(self.context.tasks.finish_requests(LIMIT).await, 0);
    }
}

/// A small worker for the demo model.
pub(crate) fn config() -> Config {
    let mut config = Config::default();
    config.model.path = MODEL.into();
    config.kv.memory_bytes = 16 << 20;
    config.engine.threads = 1;
    config.decode.peer_timeout_ms = 1_000;
    config.decode.peer_rest_ms = 600_000; // for ever, as far as a test is concerned
    config.decode.local_prefill_tokens = 0;
    config
}

async fn start(context: &Context, hub: &MemoryHub, local: LocalNet, role: Role, mut config: Config) -> Member {
    let id = format!("{role}-{}", hub.registry().view().borrow().members.len());
    config.id = Some(id.clone());
    let worker = kvasir_worker::run(role, config, context.clone(), hub.registry(), local);
    context.tasks.spawn(Kind::Background, "worker", worker);
    let mut view = hub.registry().view();
    let id = id.parse().unwrap();
    let ready = view.wait_for(|view| view.get(role, &id).is_some());
    let view = tokio::time::timeout(LIMIT, ready).await.expect("the worker is ready in time").unwrap().clone();
    view.get(role, &id).unwrap().clone()
}

/// A prompt and the reference's answer.
#[derive(Clone, serde::Deserialize)]
pub(crate) struct Golden {
    pub(crate) prompt_ids: Vec<u32>,
    pub(crate) output_ids: Vec<u32>,
    margin: f32,
}

/// All references that leave no choice to rounding.
pub(crate) fn goldens() -> Vec<Golden> {
    let lines = std::fs::read_to_string(format!("{MODEL}/golden.jsonl")).unwrap();
    let all = lines.lines().map(|line| serde_json::from_str::<Golden>(line).unwrap());
    all.filter(|golden| golden.margin >= 0.05).collect()
}

/// A reference answer to a prompt of several blocks.
pub(crate) fn golden() -> Golden {
    goldens().into_iter().find(|golden| golden.prompt_ids.len() > 60).unwrap()
}
