//! `Decode.Generate`: checks a request and starts its task.

use std::{sync::Arc, time::Duration};

use kvasir_engine::Mode;
use kvasir_proto::{check_protocol, convert, v1};
use kvasir_rpc::trace;
use kvasir_runtime::{Kind, story::Story};
use kvasir_types::{Deadline, Priority, RequestId, Sampling, TokenId};
use tonic::{Request, Response, Status, metadata::MetadataMap};

use super::{answer::Answer, request};
use crate::{
    caller::{Caller, Events},
    error::Error,
    host::Host,
    peers::Peers,
    pulse::Beating,
    sequence::{Prompt, Sequence},
};

/// Most prefill candidates looked at in one request.
const MAX_CANDIDATES: usize = 16;

/// A request that has been checked.
pub(super) struct Checked {
    pub(super) id: RequestId,
    pub(super) prompt: Arc<[TokenId]>,
    pub(super) salt: String,
    pub(super) tenant: Arc<str>,
    pub(super) sampling: Sampling,
    pub(super) priority: Priority,
    /// Answers to write; the engine bounds it.
    pub(super) choices: u32,
    pub(super) candidates: Vec<v1::PrefillCandidate>,
    pub(super) deadline: Deadline,
    /// What becomes of it.
    pub(super) story: Arc<Story>,
}

/// The gRPC service of a decode worker.
pub(crate) struct DecodeService {
    host: Arc<Host>,
    peers: Arc<Peers>,
}

impl DecodeService {
    pub(crate) fn new(host: Arc<Host>) -> Self {
        let timeout = Duration::from_millis(host.config.decode.peer_timeout_ms);
        let rest = Duration::from_millis(host.config.decode.peer_rest_ms);
        let peers = Arc::new(Peers::new(host.rpc.clone(), timeout, rest));
        Self { host, peers }
    }

    fn check(&self, wire: v1::GenerateRequest) -> Result<Checked, Error> {
        check_protocol(wire.protocol_version)?;
        let id: RequestId = wire.request_id.parse().map_err(kvasir_proto::Error::from)?;
        self.host.check_model(&wire.fingerprint)?;
        let prompt = self.host.check_prompt(&wire.prompt)?;
        let salt = convert::salt(&wire.cache_salt)?.to_owned();
        let tenant = convert::tenant(&wire.tenant)?.into();
        let sampling = wire.sampling.as_ref().ok_or(kvasir_proto::Error::Missing("sampling"))?.try_into()?;
        let mut candidates = wire.prefill;
        candidates.truncate(MAX_CANDIDATES);
        let limit = Duration::from_millis(self.host.now().decode.max_request_ms);
        let priority = convert::priority(wire.priority);
        let deadline = Deadline::from_wire(wire.deadline_ms, limit);
        let choices = wire.choices.max(1); // an older router says nothing
        let story = self.host.stories.begin(id.as_str(), "decode");
        story.tell("received", [("prompt_tokens", prompt.len().into()), ("choices", choices.into())]);
        Ok(Checked { id, prompt, salt, tenant, sampling, priority, choices, candidates, deadline, story })
    }

    async fn start(
        &self,
        wire: v1::GenerateRequest,
        metadata: &MetadataMap,
    ) -> Result<Events<v1::GenerateEvent>, Error> {
        if self.host.draining() {
            return Err(Error::Draining);
        }
        let checked = self.check(wire)?;
        let prompt = Prompt {
            id: checked.id.clone(),
            tokens: checked.prompt.clone(),
            root: self.host.root(&checked.salt),
            sampling: checked.sampling.clone(),
            priority: checked.priority,
            choices: checked.choices,
        };
        let admitted = Sequence::admit(&self.host, prompt, Mode::Generate).await;
        let sequence =
            admitted.inspect_err(|error| checked.story.end("refused", [("why", error.to_string().into())]))?;
        if self.host.draining() {
            checked.story.end("refused", [("why", "draining".into())]);
            return Err(Error::Draining); // by now
        }
        let most_tokens = (checked.sampling.max_tokens as usize).min(self.host.max_len());
        let capacity = checked.choices as usize * (most_tokens + 1) + 4;
        let (caller, events) = Caller::new(capacity, checked.deadline, self.host.stages.give_up());
        let span = tracing::info_span!(
            "decode",
            request_id = %checked.id,
            worker = %self.host.id,
            tokens = checked.prompt.len()
        );
        trace::adopt(&span, metadata);
        let answer = span.in_scope(|| Answer::new(caller, self.host.clone(), checked.choices, checked.story.clone()));
        let work = request::run(self.host.clone(), self.peers.clone(), checked, sequence, answer);
        self.host.tasks.spawn_in(Kind::Request, "decode", span, async move {
            work.await;
            Ok(())
        });
        Ok(events)
    }
}

#[tonic::async_trait]
impl v1::decode_server::Decode for DecodeService {
    type GenerateStream = Beating<v1::GenerateEvent>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let every_ms = request.heartbeat_ms;
        let events = self.start(request, &metadata).await.map_err(|error| self.host.refuse(&error))?;
        Ok(self.host.pulse.answer(events, every_ms))
    }
}
