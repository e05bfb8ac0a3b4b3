//! The answer as it goes back to the router: every token once, then one end.

use std::{sync::Arc, time::Instant};

use kvasir_proto::v1::{Finished, GenerateEvent, finished::Reason, generate_event::Event};
use kvasir_types::{FinishReason, Sampled, TokenId};

use crate::{caller::Caller, error::Error, host::Host, metrics::Outcome};

/// What the client has been sent so far.
pub(super) struct Answer {
    caller: Caller<GenerateEvent>,
    host: Arc<Host>,
    started: Instant,
    last: Instant,
    sent_tokens: u32,
    /// The first token, once sent. A prefill that is repeated must not send another.
    first: Option<TokenId>,
}

impl Answer {
    pub(super) fn new(caller: Caller<GenerateEvent>, host: Arc<Host>) -> Self {
        let now = Instant::now();
        Self { caller, host, started: now, last: now, sent_tokens: 0, first: None }
    }

    /// Who waits for it.
    pub(super) fn caller(&self) -> &Caller<GenerateEvent> {
        &self.caller
    }

    /// Sends the first token, unless an earlier attempt has sent it; an attempt that chose another one is refused, as
    /// its KV would belong to another answer.
    pub(super) fn first(&mut self, sampled: &Sampled) -> Result<(), Error> {
        match self.first {
            None => self.token(sampled),
            Some(first) if first == sampled.token => Ok(()),
            Some(first) => Err(Error::Diverged { first, second: sampled.token }),
        }
    }

    /// Whether the first token is with the client already.
    pub(super) fn has_first(&self) -> bool {
        self.first.is_some()
    }

    /// Sends a token.
    pub(super) fn token(&mut self, sampled: &Sampled) -> Result<(), Error> {
        self.caller.send(GenerateEvent { event: Some(Event::Token(sampled.into())) })?;
        let now = Instant::now();
        if self.sent_tokens == 0 {
            self.first = Some(sampled.token);
            self.host.metrics.ttft.observe((now - self.started).as_secs_f64());
        } else {
            self.host.metrics.inter_token.observe((now - self.last).as_secs_f64());
        }
        self.last = now;
        self.sent_tokens += 1;
        Ok(())
    }

    /// Ends it.
    pub(super) fn finish(
        self,
        reason: FinishReason,
        prompt_tokens: usize,
        cached_tokens: usize,
        prefill_member: String,
    ) {
        let finished = Finished {
            reason: Reason::from(reason).into(),
            prompt_tokens: prompt_tokens as u32,
            cached_tokens: cached_tokens as u32,
            output_tokens: self.sent_tokens,
            prefill_member,
        };
        // A caller that left in this very moment has its answer or does not want it: the outcome is the same.
        let _ = self.caller.send(GenerateEvent { event: Some(Event::Finished(finished)) });
        self.host.metrics.outcome(Outcome::Finished);
    }

    /// Ends it with an error.
    pub(super) fn fail(self, error: &Error) {
        self.caller.fail(error);
        self.host.metrics.outcome(Outcome::of(error));
    }
}
