//! The stream from a decode worker: the only gRPC call this service makes.
//!
//! One connection per worker and incarnation, made when first used, watched by HTTP/2 pings, so that a machine that is
//! gone is noticed even while nobody says anything. Dropping an [`Events`] resets its stream, and the worker cancels the
//! request everywhere.
//!
//! | what happens | error | elsewhere? (before the first token only) |
//! | --- | --- | --- |
//! | it says RESOURCE_EXHAUSTED | `Busy` | yes |
//! | it says UNAVAILABLE (draining), or can't be reached | `Unavailable` | yes |
//! | the connection breaks | `Broken` | yes |
//! | it says FAILED_PRECONDITION (another model by now) | `Unavailable` | yes |
//! | it says INVALID_ARGUMENT | `Refused` | where another's memory may be larger |
//! | any other status | `Failed` | no |
//! | a message that means nothing, or an end without `finished` | `Protocol` | no |
//! | silence between two tokens | `Stalled` | no |
//! | the request's deadline | `Deadline` | no |

use std::{error::Error as _, time::Duration};

use kvasir_cluster::Member;
use kvasir_proto::{
    FIELD_METADATA, GRAMMAR_FIELD, MAX_MESSAGE_BYTES, MAX_TOKENS_FIELD, PROMPT_FIELD,
    v1::{self, decode_client::DecodeClient, generate_event},
};
use kvasir_types::{Deadline, FinishReason, MemberId, Retry, Sampled, Usage};
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::fleet::Worker;

/// Longest wait for a connection: workers are near, so a second try elsewhere beats patience.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A silent connection is asked this often whether it lives …
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// … and is given up if it does not answer within this.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// What of a request a worker can't do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    /// Give the answer its form.
    Form,
    /// Hold an answer so long.
    MaxTokens,
    /// Hold the prompt.
    Prompt,
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
            Self::Busy { .. } | Self::Unavailable { .. } | Self::Broken { .. } => Retry::Elsewhere,
            Self::Refused { field: Some(Field::MaxTokens | Field::Prompt), .. } => Retry::Elsewhere,
            Self::Refused { .. }
            | Self::Failed { .. }
            | Self::Protocol { .. }
            | Self::Stalled { .. }
            | Self::Deadline { .. } => Retry::Never,
        }
    }

    /// Its name in metrics.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Busy { .. } => "busy",
            Self::Unavailable { .. } => "unavailable",
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
            Code::ResourceExhausted => Self::Busy { worker, message },
            Code::Unavailable | Code::FailedPrecondition => Self::Unavailable { worker, message },
            // A status with a source was not sent by the worker: tonic made it of an error of the connection.
            _ if status.source().is_some() => Self::Broken { worker, status: Box::new(status) },
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
pub(crate) fn connect(member: &Member) -> Result<Channel, Error> {
    let endpoint = Endpoint::from_shared(format!("http://{}", member.grpc)).map_err(|error| Error::Unavailable {
        worker: member.id.clone(),
        message: format!("its address {:?} is none: {error}", member.grpc),
    })?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(endpoint.connect_lazy())
}

/// What a worker tells.
#[derive(Debug, PartialEq)]
pub(crate) enum Event {
    /// The next token of a choice.
    Token(usize, Sampled),
    /// The end of a choice.
    Finished(usize, FinishReason, Usage),
}

/// One request's stream. Dropping it cancels the request.
pub(crate) struct Events {
    stream: Streaming<v1::GenerateEvent>,
    /// Already here: the first event decides whether the worker took the request.
    first: Option<Event>,
    worker: MemberId,
    /// How many answers were asked for.
    choices: u32,
    idle: Duration,
    deadline: Deadline,
}

impl Events {
    /// Sends the request and waits for the first event (until the deadline: a long prompt takes its time). `idle`
    /// bounds the silence between any two later events.
    pub(crate) async fn open(
        worker: &Worker,
        request: v1::GenerateRequest,
        idle: Duration,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let id = worker.member.id.clone();
        let mut client = DecodeClient::new(worker.channel()?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let choices = request.choices.max(1);
        let answer = tokio::time::timeout_at(deadline.instant().into(), async {
            let stream = client.generate(request).await.map_err(|status| Error::of(&id, status))?.into_inner();
            let mut events = Self { stream, first: None, worker: id.clone(), choices, idle, deadline };
            events.first = Some(events.receive().await?);
            Ok(events)
        });
        answer.await.map_err(|_| Error::Deadline { worker: id.clone() })?
    }

    /// The next event. After the `Finished` of the last choice or an error there is none: don't ask.
    pub(crate) async fn next(&mut self) -> Result<Event, Error> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        let wait = self.idle.min(self.deadline.remaining());
        match tokio::time::timeout(wait, self.receive()).await {
            Ok(event) => event,
            Err(_) if self.deadline.passed() => Err(Error::Deadline { worker: self.worker.clone() }),
            Err(_) => Err(Error::Stalled { worker: self.worker.clone(), idle: self.idle }),
        }
    }

    async fn receive(&mut self) -> Result<Event, Error> {
        let message = self.stream.message().await.map_err(|status| Error::of(&self.worker, status))?;
        let broken = |what: &dyn ToString| Error::Protocol { worker: self.worker.clone(), what: what.to_string() };
        match message {
            None => Err(broken(&"the stream ended without `finished`")),
            Some(message) if message.choice >= self.choices => {
                Err(broken(&format!("choice {} of {}", message.choice, self.choices)))
            }
            Some(message) => event(message).map_err(|error| broken(&error)),
        }
    }
}

fn event(message: v1::GenerateEvent) -> Result<Event, kvasir_proto::Error> {
    let choice = message.choice as usize;
    match message.event {
        Some(generate_event::Event::Token(token)) => Ok(Event::Token(choice, Sampled::try_from(&token)?)),
        Some(generate_event::Event::Finished(finished)) => {
            let reason = FinishReason::try_from(finished.reason())?;
            let v1::Finished { prompt_tokens: prompt, cached_tokens: cached, output_tokens: output, .. } = finished;
            Ok(Event::Finished(choice, reason, Usage { prompt, cached, output }))
        }
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
            (Code::Internal, "failed", Retry::Never),
            (Code::Cancelled, "failed", Retry::Never),
        ] {
            let error = Error::of(&worker, Status::new(code, "why"));
            assert_eq!((error.kind(), error.retry()), (kind, retry), "{code:?}");
        }
        let cut = Status::from_error(Box::new(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
        assert_eq!(Error::of(&worker, cut).kind(), "broken");
    }

    #[test]
    fn messages_that_mean_nothing_are_errors() {
        assert!(event(v1::GenerateEvent { event: None, choice: 0 }).is_err());
        let no_reason = generate_event::Event::Finished(v1::Finished::default());
        assert!(event(v1::GenerateEvent { event: Some(no_reason), choice: 0 }).is_err());
    }
}
