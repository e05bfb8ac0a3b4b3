//! The stream from a decode worker: the only gRPC call this service makes.
//!
//! One connection per worker and incarnation, made when first used, watched by HTTP/2 pings, so that a machine that is
//! gone is noticed even while nobody says anything. Dropping an [`Events`] resets its stream, and the worker cancels the
//! request everywhere.
//!
//! A worker that can gives signs of life while it has no token to send, so that one whose engine hangs is told from one
//! with much to do.
//!
//! | what happens | error | elsewhere? |
//! | --- | --- | --- |
//! | it says RESOURCE_EXHAUSTED | `Busy` | yes |
//! | it says UNAVAILABLE and `kvasir-leaving` (its process ends, or it is drained) | `Leaving` | yes, and that costs no second try |
//! | it says UNAVAILABLE, or can't be reached | `Unavailable` | yes |
//! | the connection breaks | `Broken` | yes |
//! | it says FAILED_PRECONDITION (another model by now) | `Unavailable` | yes |
//! | it says INVALID_ARGUMENT | `Refused` | where another's memory may be larger |
//! | any other status | `Failed` | yes |
//! | a message that means nothing, or an end without `finished` | `Protocol` | yes |
//! | silence: no answer to the call, no sign of life, or none and no token | `Stalled` | yes |
//! | the request's deadline | `Deadline` | no |

use std::{
    error::Error as _,
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::StreamExt;
use kvasir_cluster::Member;
use kvasir_proto::{
    FIELD_METADATA, GRAMMAR_FIELD, HEARTBEAT_METADATA, LEAVING_METADATA, MAX_MESSAGE_BYTES, MAX_TOKENS_FIELD,
    PROMPT_FIELD,
    v1::{self, decode_client::DecodeClient, generate_event},
};
use kvasir_rpc::{Rpc, trace};
use kvasir_types::{Deadline, FinishReason, MemberId, Retry, Sampled, Usage};
use tokio::time::{Instant, Sleep};
use tonic::{Code, IntoRequest, Status, Streaming, transport::Channel};

use crate::fleet::Worker;

/// Longest wait for a connection: workers are near, so a second try elsewhere beats patience.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A silent connection is asked this often whether it lives …
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// … and is given up if it does not answer within this: a stopped worker's answers go on elsewhere after that.
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// What of an answer waits here for a client that reads slowly; the worker keeps the rest, which it has counted (a window of
/// HTTP/2). Some 600 tokens, so that all answers of a router together stay far below what their connection bears.
const UNREAD_BYTES: u32 = 16 << 10;
/// Signs of life are asked for so many times within the silence that is borne.
const BEATS: u32 = 4;

/// What of a request a worker can't do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    /// Give the answer its form.
    Form,
    /// Hold an answer so long.
    MaxTokens,
    /// Hold the prompt.
    Prompt,
    /// This field of the request, in whatever API.
    Named(&'static str),
}

impl Field {
    fn of(name: &str) -> Option<Self> {
        match name {
            GRAMMAR_FIELD => Some(Self::Form),
            MAX_TOKENS_FIELD => Some(Self::MaxTokens),
            PROMPT_FIELD => Some(Self::Prompt),
            _ => None,
        }
    }
}

/// Why a worker gave no (further) answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// It has no room.
    #[error("worker {worker} is busy: {message}")]
    Busy { worker: MemberId, message: String },
    /// It takes no requests (now), or can't be reached.
    #[error("worker {worker} is unavailable: {message}")]
    Unavailable { worker: MemberId, message: String },
    /// It is on its way out, in good order.
    #[error("worker {worker} is leaving: {message}")]
    Leaving { worker: MemberId, message: String },
    /// The connection broke.
    #[error("the connection to worker {worker} broke")]
    Broken {
        worker: MemberId,
        #[source]
        status: Box<Status>,
    },
    /// It finds the request unacceptable.
    #[error("worker {worker} refuses the request: {message}")]
    Refused {
        worker: MemberId,
        message: String,
        /// What it can't do, if that is the client's to know.
        field: Option<Field>,
    },
    /// It failed.
    #[error("worker {worker} failed with {code:?}: {message}")]
    Failed { worker: MemberId, code: Code, message: String },
    /// It said something that means nothing.
    #[error("worker {worker} broke the protocol: {what}")]
    Protocol { worker: MemberId, what: String },
    /// It said nothing for too long.
    #[error("worker {worker} said nothing for {} ms", idle.as_millis())]
    Stalled { worker: MemberId, idle: Duration },
    /// The request's time is over.
    #[error("worker {worker} was not done at the request's deadline")]
    Deadline { worker: MemberId },
}

impl Error {
    /// Whether another worker could do better.
    pub(crate) fn retry(&self) -> Retry {
        match self {
            Self::Busy { .. }
            | Self::Unavailable { .. }
            | Self::Leaving { .. }
            | Self::Broken { .. }
            | Self::Failed { .. }
            | Self::Protocol { .. }
            | Self::Stalled { .. }
            | Self::Refused { field: Some(Field::MaxTokens | Field::Prompt), .. } => Retry::Elsewhere,
            Self::Refused { .. } | Self::Deadline { .. } => Retry::Never,
        }
    }

    /// Whether it is a leave in good order: nothing failed, and what goes elsewhere comes no second time.
    pub(crate) fn is_leave(&self) -> bool {
        matches!(self, Self::Leaving { .. })
    }

    /// Which worker it is about.
    pub(crate) fn worker(&self) -> &MemberId {
        match self {
            Self::Busy { worker, .. }
            | Self::Unavailable { worker, .. }
            | Self::Leaving { worker, .. }
            | Self::Broken { worker, .. }
            | Self::Refused { worker, .. }
            | Self::Failed { worker, .. }
            | Self::Protocol { worker, .. }
            | Self::Stalled { worker, .. }
            | Self::Deadline { worker } => worker,
        }
    }

    /// Its name in metrics.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Busy { .. } => "busy",
            Self::Unavailable { .. } => "unavailable",
            Self::Leaving { .. } => "leaving",
            Self::Broken { .. } => "broken",
            Self::Refused { .. } => "refused",
            Self::Failed { .. } => "failed",
            Self::Protocol { .. } => "protocol",
            Self::Stalled { .. } => "stalled",
            Self::Deadline { .. } => "deadline",
        }
    }

    fn of(worker: &MemberId, status: Status) -> Self {
        let worker = worker.clone();
        let message = status.message().to_owned();
        match status.code() {
            Code::Unavailable if status.metadata().contains_key(LEAVING_METADATA) => Self::Leaving { worker, message },
            // Can't be reached, or answers no ping, or says so itself.
            Code::Unavailable => Self::Unavailable { worker, message },
            // A status with a source was not sent by the worker: tonic made it of an error of the connection, and gave it a
            // code that a worker might give (RESOURCE_EXHAUSTED where HTTP/2 says ENHANCE_YOUR_CALM).
            _ if status.source().is_some() => Self::Broken { worker, status: Box::new(status) },
            Code::ResourceExhausted => Self::Busy { worker, message },
            Code::FailedPrecondition => Self::Unavailable { worker, message },
            Code::InvalidArgument => {
                let field = status.metadata().get(FIELD_METADATA).and_then(|field| Field::of(field.to_str().ok()?));
                Self::Refused { worker, message, field }
            }
            Code::DeadlineExceeded => Self::Deadline { worker },
            code => Self::Failed { worker, code, message },
        }
    }
}

/// The connection to a worker; nothing is sent before the first call.
pub(crate) fn connect(rpc: &Rpc, member: &Member) -> Result<Channel, Error> {
    let endpoint = kvasir_rpc::endpoint(&member.grpc).map_err(|error| Error::Unavailable {
        worker: member.id.clone(),
        message: format!("its address {:?} is none: {error}", member.grpc),
    })?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(UNREAD_BYTES)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(rpc.lazy(&endpoint))
}

/// What a worker tells.
#[derive(Debug, PartialEq)]
pub(crate) enum Event {
    /// The next token of a choice.
    Token(usize, Sampled),
    /// The end of a choice.
    Finished(usize, FinishReason, Usage),
}

/// How long a worker may say nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// To the call, and between two signs of life of a worker that gives them.
    pub(crate) silence: Duration,
    /// Between two tokens of one that doesn't.
    pub(crate) idle: Duration,
    /// In all.
    pub(crate) deadline: Deadline,
}

impl Patience {
    /// How often a worker is asked to give a sign of life, in milliseconds.
    pub(crate) fn heartbeat_ms(&self) -> u32 {
        u32::try_from((self.silence / BEATS).as_millis()).unwrap_or(u32::MAX).max(1)
    }
}

/// One request's stream. Dropping it cancels the request.
pub(crate) struct Events {
    stream: Streaming<v1::GenerateEvent>,
    /// Already here: the first event decides whether the worker took the request.
    first: Option<Event>,
    worker: MemberId,
    /// How many answers were asked for.
    choices: u32,
    /// How many tokens there are.
    vocab: usize,
    /// Longest silence from now on; `None`: until the deadline (a long prompt takes its time).
    silence: Option<Duration>,
    deadline: Deadline,
    heard: Instant,
    /// Never later than it must ring; reset when it does, not with every token.
    clock: Pin<Box<Sleep>>,
}

impl Events {
    /// Sends the request and waits for the first event.
    pub(crate) async fn open(
        worker: &Worker,
        request: v1::GenerateRequest,
        vocab: usize,
        patience: Patience,
    ) -> Result<Self, Error> {
        let id = worker.member.id.clone();
        let mut client = DecodeClient::new(worker.channel()?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let choices = request.choices.max(1);
        let Patience { silence, idle, deadline } = patience;
        let limit = silence.min(deadline.remaining());
        let response = match tokio::time::timeout(limit, client.generate(trace::carry(request.into_request()))).await {
            Ok(response) => response.map_err(|status| Error::of(&id, status))?,
            Err(_) if deadline.passed() => return Err(Error::Deadline { worker: id }),
            Err(_) => return Err(Error::Stalled { worker: id, idle: silence }),
        };
        let beats = response.metadata().contains_key(HEARTBEAT_METADATA);
        let (heard, silence) = (Instant::now(), beats.then_some(silence));
        let left = deadline.remaining();
        let ring = heard + silence.map_or(left, |silence| silence.min(left));
        let mut events = Self {
            stream: response.into_inner(),
            first: None,
            worker: id,
            choices,
            vocab,
            silence,
            deadline,
            heard,
            clock: Box::pin(tokio::time::sleep_until(ring)),
        };
        events.first = Some(poll_fn(|cx| events.poll(cx)).await?);
        if events.silence.is_none() {
            events.silence = Some(idle);
            events.clock.as_mut().reset(Instant::now() + idle.min(deadline.remaining()));
        }
        Ok(events)
    }

    /// The next event. After the `Finished` of the last choice or an error there is none: don't ask.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, Error>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Ok(first));
        }
        loop {
            // Before the clock: what has come, has come in time, however late it is looked at.
            match self.stream.poll_next_unpin(cx) {
                Poll::Ready(message) => {
                    self.heard = Instant::now();
                    match self.received(message) {
                        Ok(None) => {} // a sign of life
                        Ok(Some(event)) => return Poll::Ready(Ok(event)),
                        Err(error) => return Poll::Ready(Err(error)),
                    }
                }
                Poll::Pending => {
                    ready!(self.clock.as_mut().poll(cx));
                    self.bear_with()?;
                }
            }
        }
    }

    /// The clock rang: sets it anew unless the worker has said nothing for too long.
    fn bear_with(&mut self) -> Result<(), Error> {
        if self.deadline.passed() {
            return Err(Error::Deadline { worker: self.worker.clone() });
        }
        let (now, end) = (Instant::now(), Instant::now() + self.deadline.remaining());
        let until = self.silence.map_or(end, |silence| self.heard + silence);
        match self.silence {
            Some(idle) if until <= now => Err(Error::Stalled { worker: self.worker.clone(), idle }),
            _ => {
                self.clock.as_mut().reset(until.min(end));
                Ok(())
            }
        }
    }

    fn received(&self, message: Option<Result<v1::GenerateEvent, Status>>) -> Result<Option<Event>, Error> {
        let broken = |what: String| Error::Protocol { worker: self.worker.clone(), what };
        let message = match message {
            None => return Err(broken("the stream ended without `finished`".to_owned())),
            Some(message) => message.map_err(|status| Error::of(&self.worker, status))?,
        };
        if message.choice >= self.choices {
            return Err(broken(format!("choice {} of {}", message.choice, self.choices)));
        }
        match event(message).map_err(|error| broken(error.to_string()))? {
            Some(Event::Token(_, sampled)) if sampled.token.0 as usize >= self.vocab => {
                Err(broken(format!("token {} of {}", sampled.token.0, self.vocab)))
            }
            event => Ok(event),
        }
    }
}

/// `None`: a sign of life.
fn event(message: v1::GenerateEvent) -> Result<Option<Event>, kvasir_proto::Error> {
    let choice = message.choice as usize;
    match message.event {
        Some(generate_event::Event::Token(token)) => Ok(Some(Event::Token(choice, Sampled::try_from(&token)?))),
        Some(generate_event::Event::Finished(finished)) => {
            let reason = FinishReason::try_from(finished.reason())?;
            let v1::Finished { prompt_tokens: prompt, cached_tokens: cached, output_tokens: output, .. } = finished;
            Ok(Some(Event::Finished(choice, reason, Usage { prompt, cached, output })))
        }
        Some(generate_event::Event::Alive(_)) => Ok(None),
        None => Err(kvasir_proto::Error::Missing("event")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_another_worker_may_do_better_is_tried_elsewhere() {
        let worker: MemberId = "decode-0".parse().unwrap();
        for (code, kind, retry) in [
            (Code::ResourceExhausted, "busy", Retry::Elsewhere),
            (Code::Unavailable, "unavailable", Retry::Elsewhere),
            (Code::FailedPrecondition, "unavailable", Retry::Elsewhere),
            (Code::InvalidArgument, "refused", Retry::Never),
            (Code::DeadlineExceeded, "deadline", Retry::Never),
            (Code::Internal, "failed", Retry::Elsewhere),
            (Code::Cancelled, "failed", Retry::Elsewhere),
        ] {
            let error = Error::of(&worker, Status::new(code, "why"));
            assert_eq!((error.kind(), error.retry()), (kind, retry), "{code:?}");
        }
        let cut = Status::from_error(Box::new(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
        assert_eq!(Error::of(&worker, cut).kind(), "broken");
        let mut leaves = Status::unavailable("draining");
        leaves.metadata_mut().insert(LEAVING_METADATA, tonic::metadata::MetadataValue::from_static("1"));
        let leaving = Error::of(&worker, leaves);
        assert_eq!((leaving.kind(), leaving.retry(), leaving.is_leave()), ("leaving", Retry::Elsewhere, true));
        // What tonic makes of a connection that HTTP/2 itself ended: the code is the connection's, not the worker's.
        for code in [Code::ResourceExhausted, Code::Internal, Code::InvalidArgument, Code::DeadlineExceeded] {
            let mut ended = Status::new(code, "h2 protocol error");
            ended.set_source(std::sync::Arc::new(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
            assert_eq!(Error::of(&worker, ended).kind(), "broken", "{code:?}");
        }
    }

    #[test]
    fn messages_that_mean_nothing_are_errors() {
        assert!(event(v1::GenerateEvent { event: None, choice: 0 }).is_err());
        let no_reason = generate_event::Event::Finished(v1::Finished::default());
        assert!(event(v1::GenerateEvent { event: Some(no_reason), choice: 0 }).is_err());
    }
}
