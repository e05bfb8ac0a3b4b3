//! The other end of a streaming call: where events go, and the reasons to stop working for it.

use std::future::Future;

use kvasir_runtime::Shutdown;
use kvasir_types::Deadline;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::error::Error;

/// The stream a gRPC handler returns.
pub(crate) type Events<T> = ReceiverStream<Result<T, Status>>;

/// Whoever waits for the events of one request.
pub(crate) struct Caller<T> {
    events: mpsc::Sender<Result<T, Status>>,
    deadline: Deadline,
    /// Given when this worker is to have nothing to do any more: the request goes on elsewhere.
    give_up: Shutdown,
}

impl<T> Caller<T> {
    /// A caller and the stream to hand to it. `capacity` must cover all events of the request, so that sending never
    /// waits: a slow reader costs memory that was counted when the request was admitted, not the engine's time.
    pub(crate) fn new(capacity: usize, deadline: Deadline, give_up: Shutdown) -> (Self, Events<T>) {
        let (events, receiver) = mpsc::channel(capacity);
        (Self { events, deadline, give_up }, ReceiverStream::new(receiver))
    }

    /// The moment after which nobody waits.
    pub(crate) fn deadline(&self) -> Deadline {
        self.deadline
    }

    /// Sends an event.
    pub(crate) fn send(&self, event: T) -> Result<(), Error> {
        self.events.try_send(Ok(event)).map_err(|_| Error::CallerGone)
    }

    /// Ends the stream with an error; a caller that is gone does not mind.
    pub(crate) fn fail(&self, error: &Error) {
        let _ = self.events.try_send(Err(error.to_status()));
    }

    /// Runs `work` until it ends, the caller goes away, the deadline passes or this worker gives up what it does. `work` is dropped in the latter cases, so
    /// it must be something whose cancellation loses nothing (a receive, a gRPC stream).
    pub(crate) async fn while_waiting<F: Future>(&self, work: F) -> Result<F::Output, Error> {
        tokio::select! {
            biased;
            output = work => Ok(output),
            () = self.events.closed() => Err(Error::CallerGone),
            () = tokio::time::sleep_until(self.deadline.instant().into()) => Err(Error::Deadline),
            () = self.give_up.wait() => Err(Error::Draining),
        }
    }
}
