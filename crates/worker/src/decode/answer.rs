//! The answer as it goes back to the router: of every choice each token once, then its end.

use std::{sync::Arc, time::Instant};

use kvasir_proto::v1::{Finished, GenerateEvent, finished::Reason, generate_event::Event};
use kvasir_runtime::{metrics::TraceId, story::Story};
use kvasir_types::{FinishReason, Sampled, TokenId};

use crate::{caller::Caller, error::Error, host::Host, metrics::Outcome};

/// What the client has been sent so far.
pub(super) struct Answer {
    caller: Caller<GenerateEvent>,
    host: Arc<Host>,
    story: Arc<Story>,
    started: Instant,
    trace: Option<TraceId>,
    choices: Vec<Choice>,
    /// The first choice's first token, once sent. A prefill that is repeated must not send another.
    first: Option<TokenId>,
}

/// What has been sent of one choice.
#[derive(Clone, Default)]
struct Choice {
    tokens: u32,
    last: Option<Instant>,
}

impl Answer {
    /// In the request's span.
    pub(super) fn new(caller: Caller<GenerateEvent>, host: Arc<Host>, choices: u32, story: Arc<Story>) -> Self {
        let choices = vec![Choice::default(); choices as usize];
        Self { caller, host, story, started: Instant::now(), trace: TraceId::current(), choices, first: None }
    }

    /// Who waits for it.
    pub(super) fn caller(&self) -> &Caller<GenerateEvent> {
        &self.caller
    }

    /// Sends the first choice's first token, unless an earlier attempt has sent it; an attempt that chose another one is refused, as
    /// its KV would belong to another answer.
    pub(super) fn first(&mut self, sampled: &Sampled) -> Result<(), Error> {
        match self.first {
            None => self.token(0, sampled),
            Some(first) if first == sampled.token => Ok(()),
            Some(first) => Err(Error::Diverged { first, second: sampled.token }),
        }
    }

    /// Whether the first token is with the client already.
    pub(super) fn has_first(&self) -> bool {
        self.first.is_some()
    }

    /// Tokens sent, of all choices.
    pub(super) fn sent_tokens(&self) -> u32 {
        self.choices.iter().map(|choice| choice.tokens).sum()
    }

    /// Sends a token of a choice.
    pub(super) fn token(&mut self, choice: u32, sampled: &Sampled) -> Result<(), Error> {
        self.caller.send(GenerateEvent { event: Some(Event::Token(sampled.into())), choice })?;
        if choice == 0 {
            self.first.get_or_insert(sampled.token);
        }
        let (now, is_first) = (Instant::now(), self.sent_tokens() == 0);
        let choice = &mut self.choices[choice as usize];
        match choice.last.replace(now) {
            Some(last) => self.host.metrics.inter_token.observe((now - last).as_secs_f64(), self.trace),
            None if is_first => {
                self.host.metrics.ttft.observe((now - self.started).as_secs_f64(), self.trace);
                self.story.tell("first token", []);
            }
            None => {}
        }
        choice.tokens += 1;
        Ok(())
    }

    /// Sends the end of a choice.
    pub(super) fn finished(
        &self,
        choice: u32,
        reason: FinishReason,
        prompt_tokens: usize,
        cached_tokens: usize,
        prefill_member: &str,
    ) -> Result<(), Error> {
        let finished = Finished {
            reason: Reason::from(reason).into(),
            prompt_tokens: prompt_tokens as u32,
            cached_tokens: cached_tokens as u32,
            output_tokens: self.choices[choice as usize].tokens,
            prefill_member: prefill_member.to_owned(),
        };
        self.caller.send(GenerateEvent { event: Some(Event::Finished(finished)), choice })
    }

    /// All choices have ended.
    pub(super) fn complete(self) {
        self.host.metrics.outcome(Outcome::Finished);
    }

    /// Ends it with an error.
    pub(super) fn fail(self, error: &Error) {
        self.caller.fail(error);
        self.host.metrics.outcome(Outcome::of(error));
    }
}
