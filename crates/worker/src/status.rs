//! What any worker tells about itself: `Worker.Status` for operators and tests, `Worker.Watch` for routers.

use std::sync::Arc;

use kvasir_proto::{check_protocol, convert, v1};
use kvasir_rpc::operator::Desk;
use kvasir_runtime::{
    Kind,
    story::{Fact, Step, Story},
};
use kvasir_types::{Incarnation, PROTOCOL_VERSION};
use tonic::{Request, Response, Status};

use crate::{
    duty::Duties,
    error::Error,
    host::Host,
    watch::{self, Hub, Watching},
};

/// Stories in one answer.
const MAX_STORIES: usize = 64;

/// The gRPC service of every worker.
pub(crate) struct StatusService {
    pub(crate) host: Arc<Host>,
    pub(crate) incarnation: Incarnation,
    pub(crate) hub: Arc<Hub>,
    pub(crate) duties: Arc<Duties>,
    pub(crate) desk: Desk,
}

#[tonic::async_trait]
impl v1::worker_server::Worker for StatusService {
    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let host = &self.host;
        let stats = host.engine.stats();
        Ok(Response::new(v1::StatusResponse {
            member: host.id.to_string(),
            role: host.role.to_string(),
            incarnation: self.incarnation.0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol_version: PROTOCOL_VERSION,
            model: host.model.name.clone(),
            fingerprint: convert::bytes16(&host.model.fingerprint.0),
            layout: Some(host.model.layout.into()),
            blocks: Some(v1::BlockCounts {
                total: stats.blocks.total as u64,
                free: stats.blocks.free as u64,
                cached: stats.blocks.cached as u64,
                in_use: stats.blocks.in_use as u64,
            }),
            running: stats.running as u32,
            waiting: stats.waiting as u32,
            uptime_ms: host.started.elapsed().as_millis() as u64,
            requests_total: host.metrics.requests_total(),
            draining: host.draining(),
            peers: host.transfer.peers().iter().map(|peer| (&peer.traffic()).into()).collect(),
            works_as: host.duty.role().to_string(),
            pinned: host.duty.pinned(),
            lifecycle: Some(host.lifecycle()),
        }))
    }

    async fn set_duty(&self, request: Request<v1::SetDutyRequest>) -> Result<Response<v1::SetDutyResponse>, Status> {
        let what = |asked: &v1::SetDutyRequest| {
            let as_planner =
                if asked.term > 0 { format!(" (a planner of term {})", asked.term) } else { String::new() };
            let role = if asked.role.is_empty() { String::new() } else { format!(" role {}", asked.role) };
            let pin = match asked.pin() {
                v1::Pin::Set => " pin",
                v1::Pin::Clear => " unpin",
                v1::Pin::Unspecified => "",
            };
            format!("set duty:{role}{pin}{as_planner}")
        };
        let act = |asked, who| self.duties.set(asked, who);
        self.desk.call(request, self.host.id.as_str(), what, act).await
    }

    async fn set_stage(&self, request: Request<v1::SetStageRequest>) -> Result<Response<v1::SetStageResponse>, Status> {
        let what = |asked: &v1::SetStageRequest| match asked.stage() {
            v1::Stage::Serving => "serve again".to_owned(),
            v1::Stage::Cordoned => "cordon".to_owned(),
            v1::Stage::Drained => "drain".to_owned(),
            other => format!("stage {}", other.as_str_name()),
        };
        let act = |asked, who| self.duties.set_stage(asked, who);
        self.desk.call(request, self.host.id.as_str(), what, act).await
    }

    async fn trace(&self, request: Request<v1::TraceRequest>) -> Result<Response<v1::TraceResponse>, Status> {
        let request = request.into_inner();
        check_protocol(request.protocol_version).map_err(|error| Error::from(error).to_status())?;
        let stories = self.host.stories.find(&request.request_id, MAX_STORIES);
        Ok(Response::new(v1::TraceResponse { stories: stories.iter().map(|story| told(story)).collect() }))
    }

    type WatchStream = Watching;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Watching>, Status> {
        check_protocol(request.into_inner().protocol_version).map_err(|error| Error::from(error).to_status())?;
        let place = self.hub.admit()?;
        let (to, watching) = watch::channel();
        let hub = Arc::clone(&self.hub);
        self.host.tasks.spawn(Kind::Background, "watch", async move {
            hub.tell(to, place).await;
            Ok(())
        });
        Ok(Response::new(watching))
    }
}

fn told(story: &Story) -> v1::TraceStory {
    let (steps, over) = story.read();
    let fact = |(name, fact): (&str, Fact)| {
        let value = match fact {
            Fact::Text(text) => v1::trace_fact::Value::Text(text),
            Fact::Number(number) => v1::trace_fact::Value::Number(number),
        };
        v1::TraceFact { name: name.to_owned(), value: Some(value) }
    };
    let step = |step: Step| v1::TraceStep {
        at_us: step.at.as_micros() as u64,
        step: step.name.to_owned(),
        facts: step.facts.into_iter().map(fact).collect(),
    };
    v1::TraceStory {
        part: story.part.to_owned(),
        began_unix_us: story.began_unix_us,
        over,
        steps: steps.into_iter().map(step).collect(),
    }
}
