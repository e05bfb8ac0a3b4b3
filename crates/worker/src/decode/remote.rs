//! One attempt to have a prompt computed by a prefill worker.
//!
//! The prefill worker may write into the landing blocks from the moment it has the grant's key, and the only thing that
//! ends this is the grant's end. So however the attempt ends, it revokes the grant and waits for that: afterwards no byte
//! of this attempt can land any more, and the blocks may be used (it succeeded), offered to the next candidate, computed
//! here, or given back.

use std::time::Duration;

use kvasir_proto::{
    HEARTBEAT_METADATA,
    v1::{self, prefill_event::Event},
};
use kvasir_rpc::trace;
use kvasir_transfer::Revoke;
use kvasir_types::{GrantKey, PROTOCOL_VERSION, Sampled, TokenId};
use tokio::time::timeout;
use tonic::{Request, Status};
use tracing::{Instrument, debug_span};

use super::{answer::Answer, service::Checked};
use crate::{error::Error, handoff::Landing, host::Host, peers::Peers};

/// A writer that takes part in no fence (stopped in the middle of a copy into memory that both map) is waited for no longer:
/// the request fails, and its blocks stay out of use until the writer goes on or dies.
const FENCE_LIMIT: Duration = Duration::from_secs(5);

/// Signs of life are asked for so many times within the silence that is borne.
const BEATS: u64 = 4;

/// Who is asked for what.
pub(super) struct Attempt<'a> {
    pub(super) host: &'a Host,
    pub(super) peers: &'a Peers,
    pub(super) request: &'a Checked,
    pub(super) landing: &'a Landing,
    pub(super) candidate: &'a v1::PrefillCandidate,
    /// Where a fence goes that does not close in time: the blocks must not be used before it has.
    pub(super) open_fences: &'a mut Vec<Revoke>,
}

/// The whole prompt is in this worker's memory.
pub(super) struct Landed {
    pub(super) first: TokenId,
    pub(super) done: v1::PrefillDone,
}

/// Runs the attempt to its end; the landing blocks are this worker's alone again when it returns.
pub(super) async fn attempt(attempt: Attempt<'_>, answer: &mut Answer) -> Result<Landed, Error> {
    let grant = attempt.host.transfer.grant(attempt.landing.ranges.clone())?;
    let span = debug_span!("handoff", prefill = %attempt.candidate.member, blocks = attempt.landing.ranges.len());
    let result = attempt.exchange(grant.key(), answer).instrument(span).await;
    let mut fence = grant.revoke();
    match timeout(FENCE_LIMIT, &mut fence).await {
        Ok(()) => result,
        Err(_) => {
            attempt.open_fences.push(fence);
            Err(Error::Unfenced { member: attempt.candidate.member.clone() })
        }
    }
}

impl Attempt<'_> {
    /// The conversation with the prefill worker. Leaving it early drops the gRPC stream, which cancels the work there.
    async fn exchange(&self, grant: GrantKey, answer: &mut Answer) -> Result<Landed, Error> {
        let mut client =
            self.peers.prefill(&self.candidate.address).map_err(|e| self.failed(Status::from_error(e.into())))?;
        let call = client.prefill(trace::carry(Request::new(self.message(grant))));
        let silence = Duration::from_millis(self.host.now().decode.prefill_silence_ms);
        let response =
            answer.caller().while_waiting(timeout(silence, call)).await?.map_err(|_| self.silent(silence))?;
        let response = response.map_err(|status| self.failed(status))?;
        // Older ones give no signs of life: a long prompt takes its time there.
        let silence = if response.metadata().contains_key(HEARTBEAT_METADATA) { silence } else { Duration::MAX };
        let mut stream = response.into_inner();
        let mut first = None;
        loop {
            let message = timeout(silence, stream.message());
            let message = answer.caller().while_waiting(message).await?.map_err(|_| self.silent(silence))?;
            match message.map_err(|status| self.failed(status))?.map(|message| message.event) {
                Some(Some(Event::FirstToken(token))) => {
                    let sampled = Sampled::try_from(&token)?;
                    if sampled.token.0 as usize >= self.host.vocab() {
                        return Err(self.broke_protocol("its first token is outside the vocabulary"));
                    }
                    answer.first(&sampled)?;
                    first = Some(sampled.token);
                }
                Some(Some(Event::Done(done))) => {
                    let first = first.ok_or_else(|| self.broke_protocol("done before the first token"))?;
                    return Ok(Landed { first, done });
                }
                Some(Some(Event::Alive(_)) | None) => {} // or an event that a later version added
                None => return Err(self.broke_protocol("its stream ended before done")),
            }
        }
    }

    fn message(&self, grant: GrantKey) -> v1::PrefillRequest {
        let Checked { id, prompt, salt, tenant, sampling, priority, deadline, .. } = self.request;
        v1::PrefillRequest {
            protocol_version: PROTOCOL_VERSION,
            request_id: id.to_string(),
            fingerprint: kvasir_proto::convert::bytes16(&self.host.model.fingerprint.0),
            layout: Some(self.host.model.layout.into()),
            prompt: kvasir_proto::convert::token_ids(prompt),
            cache_salt: salt.clone(),
            sampling: Some(sampling.into()),
            deadline_ms: deadline.to_wire(),
            destination: Some((&self.host.transfer.descriptor()).into()),
            grant: grant.0,
            blocks: self.landing.targets.clone(),
            priority: v1::Priority::from(*priority).into(),
            tenant: tenant.to_string(),
            heartbeat_ms: (self.host.now().decode.prefill_silence_ms / BEATS).try_into().unwrap_or(u32::MAX),
        }
    }

    fn silent(&self, silence: Duration) -> Error {
        self.failed(Status::unavailable(format!("said nothing for {} ms", silence.as_millis())))
    }

    fn failed(&self, status: Status) -> Error {
        Error::Prefill { member: self.candidate.member.clone(), status: Box::new(status) }
    }

    fn broke_protocol(&self, what: &'static str) -> Error {
        Error::Protocol { member: self.candidate.member.clone(), what }
    }
}
