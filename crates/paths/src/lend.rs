//! The end that lends: scratch memory for as long as the call lasts.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, Stream};
use kvasir_proto::{check_protocol, v1};
use kvasir_transfer::{Access, GrantRange};
use tokio::time::{Sleep, sleep};
use tonic::Status;

use crate::{Inner, SCRATCH, Scratch, steps::MAX_TIME};

/// Says where the memory is, and then nothing, until its time is over. Dropped, the memory is taken back.
pub struct Lending {
    first: Option<v1::Lent>,
    over: Pin<Box<Sleep>>,
    scratch: Option<Scratch>,
}

pub(crate) async fn begin(own: &Inner, asked: v1::LendRequest) -> Result<Lending, Status> {
    check_protocol(asked.protocol_version).map_err(|error| Status::failed_precondition(error.to_string()))?;
    if asked.bytes == 0 || asked.bytes > SCRATCH {
        return Err(Status::invalid_argument(format!("{} bytes: expected 1 to {SCRATCH}", asked.bytes)));
    }
    let mut scratch = own.scratch(asked.bytes)?;
    let offset = scratch.base();
    let range = |access| GrantRange { offset, len: asked.bytes, access };
    let grant = own.engine.grant(vec![range(Access::Read), range(Access::Write)]);
    let grant = grant.map_err(|error| Status::internal(kvasir_runtime::chain(&error)))?;
    let lent = v1::Lent { segment: Some((&own.engine.descriptor()).into()), grant: grant.key().0, offset };
    scratch.grant = Some(grant);
    let time = Duration::from_millis(asked.time_ms).min(MAX_TIME);
    Ok(Lending { first: Some(lent), over: Box::pin(sleep(time)), scratch: Some(scratch) })
}

impl Stream for Lending {
    type Item = Result<v1::Lent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(lent) = self.first.take() {
            return Poll::Ready(Some(Ok(lent)));
        }
        if self.scratch.is_none() {
            return Poll::Ready(None);
        }
        self.over.poll_unpin(cx).map(|()| {
            self.scratch = None;
            Some(Err(Status::deadline_exceeded("the time for which the memory was lent is over")))
        })
    }
}
