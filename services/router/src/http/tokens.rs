//! The tokens of a request's answers, from one worker after another.
//!
//! ```text
//!            ┌─ flow: a worker's stream, with all choices ─┐
//! Call ─────▶│                                              │──▶ Token / Finished, each once
//!            └─ its worker fails ─▶ one flow a choice: prompt + what was said ─▶ another worker ─┘
//! ```
//!
//! A token is a function of the request, its seed and its position, whoever computes it, so what comes after a move is what
//! would have come without. What the lost worker wrote and nobody received is written again; what was received is not asked
//! for again. Answers that were complete but for the word that says so are ended here.

use std::{collections::VecDeque, future::poll_fn, sync::Arc, task::Poll, time::Instant};

use kvasir_runtime::chain;
use kvasir_types::{FinishReason, TokenId, Usage};
use tracing::{Instrument, Span, info, warn};

use super::{
    error::Error,
    placing::{Call, Placed},
};
use crate::{
    fleet::Worker,
    upstream::{self, Event},
};

/// The answers under way.
pub(crate) struct Tokens {
    call: Call,
    /// The request's.
    span: Span,
    /// Tokens that end an answer.
    ends: Vec<TokenId>,
    choices: Vec<Choice>,
    flows: Vec<Flow>,
    /// Which flow is looked at first: they take turns.
    turn: usize,
    /// Ends that no worker told.
    ended: VecDeque<Event>,
    moves_left: u32,
    /// Of the first flow that told.
    cached: Option<u32>,
    /// What was written before the last move: since when somebody waits.
    waiting_since: Option<Instant>,
}

/// One of the answers.
#[derive(Default)]
struct Choice {
    said: Vec<TokenId>,
    over: bool,
}

/// A worker's stream and which of our choices its choices are.
struct Flow {
    placed: Placed,
    choices: Vec<usize>,
}

impl Tokens {
    /// Those of a call that was placed; `ends`: the tokens that end an answer.
    pub(crate) fn new(call: Call, placed: Placed, ends: Vec<TokenId>) -> Self {
        let choices = call.choices as usize;
        Self {
            ends,
            span: Span::current(),
            moves_left: call.app.now().retry.moves,
            call,
            choices: (0..choices).map(|_| Choice::default()).collect(),
            flows: vec![Flow { placed, choices: (0..choices).collect() }],
            turn: 0,
            ended: VecDeque::new(),
            cached: None,
            waiting_since: None,
        }
    }

    /// Nobody wants more of this answer.
    pub(crate) fn drop_choice(&mut self, choice: usize) {
        self.choices[choice].over = true;
    }

    /// The next token or end of one of the answers. After the last end there is none: don't ask. Not to be dropped before it
    /// is done, unless no more is wanted.
    pub(crate) async fn next(&mut self) -> Result<Event, Error> {
        loop {
            if let Some(event) = self.ended.pop_front() {
                return Ok(event);
            }
            let (at, event) = poll_fn(|cx| {
                let flows = self.flows.len();
                for at in (0..flows).map(|at| (at + self.turn) % flows) {
                    if let Poll::Ready(event) = self.flows[at].placed.events.poll(cx) {
                        return Poll::Ready((at, event));
                    }
                }
                Poll::Pending
            })
            .await;
            self.turn = at + 1;
            match event {
                Ok(event) => {
                    if let Some(event) = self.take(at, event)? {
                        return Ok(event);
                    }
                }
                Err(error) => {
                    let flow = self.flows.swap_remove(at);
                    let span = self.span.clone();
                    self.go_on(flow, error).instrument(span).await?;
                }
            }
        }
    }

    /// An event of a flow, as one of ours; `None` if nobody wants it.
    fn take(&mut self, at: usize, event: Event) -> Result<Option<Event>, Error> {
        let flow = &mut self.flows[at];
        match event {
            Event::Token(theirs, sampled) => {
                let ours = flow.choices[theirs];
                let choice = &mut self.choices[ours];
                if choice.over {
                    return Ok(None);
                }
                choice.said.push(sampled.token);
                if let Some(since) = self.waiting_since.take() {
                    self.call.app.metrics.moved(since.elapsed());
                }
                Ok(Some(Event::Token(ours, sampled)))
            }
            Event::Finished(theirs, reason, usage) => {
                let ours = flow.choices[theirs];
                let prompt = self.call.prompt.len() as u32;
                // Where an answer went on, what was written of it counts as prompt there.
                let cached = if usage.prompt > prompt { usage.cached.min(prompt) } else { usage.cached };
                self.cached.get_or_insert(cached);
                let choice = &mut self.choices[ours];
                let wanted = !std::mem::replace(&mut choice.over, true);
                let usage = Usage { prompt, cached, output: choice.said.len() as u32 };
                if flow.choices.iter().all(|&choice| self.choices[choice].over) {
                    self.flows.swap_remove(at);
                }
                Ok(wanted.then_some(Event::Finished(ours, reason, usage)))
            }
        }
    }

    /// The worker of a flow failed: the answers that are not complete go on elsewhere.
    async fn go_on(&mut self, flow: Flow, error: upstream::Error) -> Result<(), Error> {
        let Flow { placed: Placed { worker: lost, lease, events }, choices } = flow;
        drop((lease, events));
        let app = Arc::clone(&self.call.app);
        app.metrics.upstream_error(error.kind());
        app.failed(&lost, &error);
        let mut rest = Vec::new();
        for ours in choices {
            if self.choices[ours].over {
                continue;
            }
            match self.complete(ours, &lost) {
                Some(reason) => {
                    self.choices[ours].over = true;
                    let (prompt, output) = (self.call.prompt.len() as u32, self.choices[ours].said.len() as u32);
                    let usage = Usage { prompt, cached: self.cached.unwrap_or(0), output };
                    self.ended.push_back(Event::Finished(ours, reason, usage));
                }
                None => rest.push(ours),
            }
        }
        if rest.is_empty() {
            return Ok(());
        }
        let able = rest.iter().all(|&ours| self.call.may_go_on(&lost, self.choices[ours].said.len()));
        let go_on = able && self.moves_left > 0 && app.may_go_elsewhere(&error);
        if go_on && error.is_leave() {
            info!(worker = %lost.member.id, "an answer's worker is leaving");
        } else {
            warn!(worker = %lost.member.id, error = chain(&error), go_on, "an answer broke off");
        }
        if !go_on {
            return Err(error.into());
        }
        self.moves_left -= 1;
        let told =
            [("worker", lost.member.id.as_str().into()), ("why", error.kind().into()), ("answers", rest.len().into())];
        self.call.entry.story.tell("moves", told);
        self.waiting_since.get_or_insert_with(Instant::now);
        let moves = rest.iter().map(|&ours| self.call.go_on(ours as u32, &self.choices[ours].said, &lost));
        let placed = futures_util::future::try_join_all(moves).await?;
        for (ours, placed) in rest.into_iter().zip(placed) {
            info!(worker = %placed.worker.member.id, choice = ours, tokens = self.choices[ours].said.len(), "an answer goes on");
            self.flows.push(Flow { placed, choices: vec![ours] });
        }
        Ok(())
    }

    /// Why an answer has ended, if its tokens say so already: its worker failed before it could.
    fn complete(&self, ours: usize, worker: &Worker) -> Option<FinishReason> {
        let said = &self.choices[ours].said;
        let sampling = &self.call.sampling;
        let enough = said.len() > sampling.min_tokens as usize;
        if enough && said.last().is_some_and(|last| self.ends.contains(last)) {
            return Some(FinishReason::Stop);
        }
        let most = self.call.max_tokens.min(self.call.room(worker)) as usize;
        (said.len() >= most).then_some(FinishReason::Length)
    }
}
