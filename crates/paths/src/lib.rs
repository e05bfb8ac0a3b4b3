//! How fast the way between two memories is, measured when an operator asks: the gRPC service `Paths` of workers and store
//! nodes.
//!
//! ```text
//!   kvasirctl ──Measure──▶ A ──Lend──▶ B      both with the operator's token
//!            ◀─ numbers ──   ◀─ where ──      B lends scratch memory for as long as the call lasts
//!                          A ◀═ bytes ═▶ B    by the transfer engine, as KV blocks go
//! ```
//!
//! **Nobody's blocks are touched.** Both ends take memory of their own for it, of a bounded size, and give it back when the
//! call is over: because the measurement is, or because whoever asked is gone, or has died. A call that is silent is one that
//! is over, by HTTP/2's pings. One measurement at a time for each process, whichever end it is.
#![forbid(unsafe_code)]

mod lend;
mod measure;
mod steps;

use std::sync::Arc;

use kvasir_cluster::View;
use kvasir_proto::v1;
use kvasir_rpc::{Rpc, operator::Desk};
use kvasir_runtime::Tasks;
use kvasir_transfer::{Allocation, Grant, Memory, Region, TransferEngine};
use kvasir_types::MemberId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::{Request, Response, Status};

pub use lend::Lending;
pub use measure::Measuring;

/// Scratch memory of one measurement, at each end; four transfers of the largest size.
pub(crate) const SCRATCH: u64 = 4 * steps::MAX_SIZE;

/// One end of ways, of a process with a transfer engine.
#[derive(Clone)]
pub struct Paths(Arc<Inner>);

struct Inner {
    id: MemberId,
    engine: TransferEngine,
    rpc: Rpc,
    members: watch::Receiver<Arc<View>>,
    desk: Desk,
    tasks: Tasks,
    /// One measurement at a time.
    busy: Arc<Semaphore>,
}

impl Paths {
    /// Of the member of that name, whose peers are found in `members`.
    pub fn new(
        id: MemberId,
        engine: TransferEngine,
        rpc: Rpc,
        members: watch::Receiver<Arc<View>>,
        desk: Desk,
        tasks: Tasks,
    ) -> Self {
        Self(Arc::new(Inner { id, engine, rpc, members, desk, tasks, busy: Arc::new(Semaphore::new(1)) }))
    }
}

#[tonic::async_trait]
impl v1::paths_server::Paths for Paths {
    type MeasureStream = Measuring;
    type LendStream = Lending;

    async fn measure(&self, request: Request<v1::MeasureRequest>) -> Result<Response<Measuring>, Status> {
        let token = request.metadata().get("authorization").cloned();
        let what = |asked: &v1::MeasureRequest| format!("measure the way to {}", short(&asked.peer));
        let act = |asked, _| measure::begin(&self.0, asked, token);
        self.0.desk.call(request, self.0.id.as_str(), what, act).await
    }

    async fn lend(&self, request: Request<v1::LendRequest>) -> Result<Response<Lending>, Status> {
        let what = |asked: &v1::LendRequest| format!("lend {} bytes for a measurement", asked.bytes);
        let act = |asked, _| lend::begin(&self.0, asked);
        self.0.desk.call(request, self.0.id.as_str(), what, act).await
    }
}

/// A name from outside, for people.
fn short(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(64).collect()
}

/// Scratch memory, and the place of its measurement. Both are given back once nobody touches the memory any more, which is
/// waited for by a task of its own: whoever holds this may be dropped anywhere.
struct Scratch {
    held: Option<(Region, OwnedSemaphorePermit)>,
    grant: Option<Grant>,
    tasks: Tasks,
}

impl Inner {
    /// Refuses while another measurement goes on here.
    fn scratch(&self, bytes: u64) -> Result<Scratch, Status> {
        let place = Arc::clone(&self.busy).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(
                "another measurement goes on there: one at a time, it is over in a minute at most",
            )
        })?;
        let allocation = Allocation::new(bytes as usize);
        let region = self.engine.register(Memory::Allocate(allocation)).map_err(|error| {
            Status::resource_exhausted(format!("no memory to measure with: {}", kvasir_runtime::chain(&error)))
        })?;
        Ok(Scratch { held: Some((region, place)), grant: None, tasks: self.tasks.clone() })
    }
}

impl Scratch {
    fn base(&self) -> u64 {
        self.held.as_ref().map_or(0, |(region, _)| region.base())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let (grant, Some((region, place))) = (self.grant.take(), self.held.take()) else { return };
        self.tasks.spawn(kvasir_runtime::Kind::Background, "scratch memory", async move {
            if let Some(grant) = grant {
                grant.revoke().await;
            }
            region.unregister().await;
            drop(place);
            Ok(())
        });
    }
}
