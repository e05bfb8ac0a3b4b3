//! What any worker tells about itself: `Worker.Status` for operators and tests, `Worker.Watch` for routers.

use std::sync::Arc;

use kvasir_proto::{check_protocol, convert, v1};
use kvasir_runtime::Kind;
use kvasir_types::{Incarnation, PROTOCOL_VERSION};
use tonic::{Request, Response, Status};

use crate::{
    duty::Duties,
    error::Error,
    host::Host,
    watch::{self, Hub, Watching},
};

/// The gRPC service of every worker.
pub(crate) struct StatusService {
    pub(crate) host: Arc<Host>,
    pub(crate) incarnation: Incarnation,
    pub(crate) hub: Arc<Hub>,
    pub(crate) duties: Arc<Duties>,
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
        }))
    }

    async fn set_duty(&self, request: Request<v1::SetDutyRequest>) -> Result<Response<v1::SetDutyResponse>, Status> {
        self.duties.set(request.into_inner()).await.map(Response::new)
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
