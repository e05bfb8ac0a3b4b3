//! A transfer that lets go of local memory even when its future is dropped.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use kvasir_transfer::{Error, Report, Transfer};

/// A submitted batch. Dropped before it resolved, it is cancelled and waited for: whoever drops the future of a read is
/// about to hand the blocks to somebody else, and the bytes of this read must not land on them. The wait blocks the thread,
/// which is bad manners on an async one, but it is short (the engine's fence grace at worst), rare, and the only thing
/// that keeps memory right.
pub(crate) struct InFlight(Option<Transfer>);

impl InFlight {
    pub(crate) fn new(transfer: Transfer) -> Self {
        Self(Some(transfer))
    }
}

impl Future for InFlight {
    type Output = Result<Report, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let transfer = self.0.as_mut().expect("not polled after it resolved");
        let result = std::task::ready!(Pin::new(transfer).poll(context));
        self.0 = None;
        Poll::Ready(result)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(transfer) = self.0.take() {
            transfer.cancel();
            // The result is of no interest, that there is one is.
            let _ = transfer.wait();
        }
    }
}
