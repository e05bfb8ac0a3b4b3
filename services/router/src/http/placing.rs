//! Who answers a request: the worker that the policy chooses, or, once, another.
//!
//! What no worker could do is refused here, before any is asked.

use std::{sync::Arc, time::Instant};

use kvasir_proto::{convert, v1};
use kvasir_runtime::chain;
use kvasir_types::{Deadline, PROTOCOL_VERSION, Priority, RequestId, Retry, Sampling, TokenId};
use tracing::{info, warn};

use super::{
    app::App,
    deciding::{self, Chosen, Prompt},
    error::{BadParam, Error},
};
use crate::{
    fleet::{Crew, Lease, Worker},
    route::Ask,
    text::Model,
    upstream::{self, Events},
};

/// The workers whose context is long enough.
pub(crate) fn crew(
    crew: Option<&Crew>,
    model: &Model,
    prompt_tokens: usize,
    param: &'static str,
) -> Result<Crew, Error> {
    if prompt_tokens == 0 {
        return Err(BadParam::new(param, "invalid_value", format!("'{param}' holds no token")).into());
    }
    let no_worker = || Error::NoWorker(model.name().to_owned());
    let limit = crew.and_then(Crew::max_model_len).or_else(|| model.context_len());
    if let Some(limit) = limit
        && prompt_tokens >= limit as usize
    {
        let message = format!(
            "the model's context is {limit} tokens long, '{param}' takes {prompt_tokens} of it and leaves none for an answer"
        );
        return Err(BadParam::new(param, "context_length_exceeded", message).into());
    }
    let fitting = crew.ok_or_else(no_worker)?.longer_than(prompt_tokens);
    if fitting.is_empty() { Err(no_worker()) } else { Ok(fitting) }
}

pub(crate) fn max_tokens(asked: Option<(&'static str, u32)>, limit: u32) -> Result<u32, Error> {
    match asked {
        Some((param, asked)) if asked > limit => {
            let message = format!("'{param}' is {asked}, this server writes at most {limit} tokens");
            Err(BadParam::new(param, "above_max_value", message).into())
        }
        Some((_, asked)) => Ok(asked),
        None => Ok(limit),
    }
}

pub(crate) fn few_choices(asked: u32, limit: u32) -> Result<(), BadParam> {
    if asked <= limit {
        return Ok(());
    }
    let message = format!("'n' is {asked}, this server gives at most {limit} choices");
    Err(BadParam::new("n", "above_max_value", message))
}

pub(crate) fn biases_in_vocabulary(sampling: &Sampling, model: &Model) -> Result<(), BadParam> {
    let size = model.vocab_size();
    match sampling.logit_bias.iter().find(|(token, _)| token.0 as usize >= size) {
        None => Ok(()),
        Some((token, _)) => {
            let message =
                format!("'logit_bias' holds token id {}, the model's are 0 to {}", token.0, size.saturating_sub(1));
            Err(BadParam::new("logit_bias", "invalid_value", message))
        }
    }
}

/// One request on its way to a worker.
pub(crate) struct Call<'a> {
    pub(crate) app: &'a App,
    pub(crate) id: &'a RequestId,
    pub(crate) prompt: &'a [TokenId],
    pub(crate) sampling: &'a Sampling,
    pub(crate) salt: &'a str,
    pub(crate) priority: Priority,
    pub(crate) choices: u32,
    pub(crate) max_tokens: u32,
    pub(crate) deadline: Deadline,
}

impl Call<'_> {
    /// Finds a worker that begins the answer: the one the policy chooses, or, once, another.
    pub(crate) async fn place(&self, model: &Model, mut crew: Crew) -> Result<(Arc<Worker>, Lease, Events), Error> {
        let ask = self.app.ask(self.prompt.len());
        let mut first: Option<upstream::Error> = None;
        loop {
            let Some(Chosen { worker, prefill, cached, left }) = self.choose(ask, &crew.rested(Instant::now())) else {
                // Nobody else is there: the first worker's word is the answer.
                return Err(first.map_or_else(|| Error::NoWorker(model.name().to_owned()), Error::from));
            };
            let lease = worker.lease(self.prompt.len(), if prefill.is_empty() { left } else { 0 });
            // Only the first prefill worker is likely to be used; it is busy with this until the first token.
            let prefill_lease = prefill.first().map(|first| first.lease(self.prompt.len(), left));
            let request = self.request(&worker, &prefill);
            let opened = Events::open(&worker, request, self.app.limits.idle_timeout(), self.deadline).await;
            drop(prefill_lease);
            match opened {
                Ok(events) => {
                    self.app.metrics.predicted(cached);
                    return Ok((worker, lease, events));
                }
                Err(error) => {
                    let again = first.is_none() && error.retry() == Retry::Elsewhere;
                    self.app.metrics.upstream_error(error.kind());
                    match &error {
                        // The client's mistake, and the client is told: nobody has to look.
                        upstream::Error::Refused { .. } => {
                            info!(worker = %worker.member.id, error = chain(&error), "a worker refused a request");
                        }
                        _ => warn!(
                            worker = %worker.member.id, error = chain(&error), again, "a worker did not begin an answer"
                        ),
                    }
                    worker.rest_after(&error, self.app.limits.worker_rest());
                    if !again {
                        return Err(error.into());
                    }
                    first = Some(error);
                    crew = crew.filter(|other| !std::ptr::eq(other, &*worker));
                }
            }
        }
    }

    fn choose(&self, ask: Ask, crew: &Crew) -> Option<Chosen> {
        deciding::decide(self.app, ask, &Prompt { tokens: self.prompt, salt: self.salt }, crew)
    }

    fn request(&self, worker: &Worker, prefill: &[Arc<Worker>]) -> v1::GenerateRequest {
        let info = worker.member.model.as_ref();
        // `crew` keeps only workers whose context is longer than the prompt.
        let room = info.map_or(1, |info| info.max_model_len.saturating_sub(self.prompt.len() as u32)).max(1);
        let sampling = v1::Sampling { max_tokens: self.max_tokens.min(room), ..v1::Sampling::from(self.sampling) };
        let candidate = |worker: &Arc<Worker>| v1::PrefillCandidate {
            member: worker.member.id.to_string(),
            address: worker.member.grpc.clone(),
        };
        v1::GenerateRequest {
            protocol_version: PROTOCOL_VERSION,
            request_id: self.id.to_string(),
            fingerprint: info.map_or_else(Default::default, |info| info.fingerprint.0.to_vec().into()),
            prompt: convert::token_ids(self.prompt),
            sampling: Some(sampling),
            cache_salt: self.salt.to_owned(),
            prefill: prefill.iter().map(candidate).collect(),
            deadline_ms: self.deadline.to_wire(),
            priority: v1::Priority::from(self.priority).into(),
            choices: self.choices,
        }
    }
}
