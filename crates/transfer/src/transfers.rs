//! Batches submitted together.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use crate::{
    batch::{Report, Transfer},
    error::Error,
};

/// Several batches submitted at once: a future of all their outcomes, in the order of the batches.
#[must_use = "local memory is in use until every transfer has resolved"]
#[derive(Debug)]
pub struct Transfers(Vec<Transfer>);

impl Transfers {
    pub(crate) fn new(transfers: Vec<Transfer>) -> Self {
        Self(transfers)
    }

    /// Each of them, to be polled by itself ([`Transfer::result`]).
    pub fn iter(&self) -> std::slice::Iter<'_, Transfer> {
        self.0.iter()
    }

    /// Each of them, to be awaited by itself.
    pub fn into_vec(self) -> Vec<Transfer> {
        self.0
    }

    /// Cancels all that have not completed.
    pub fn cancel(&self) {
        self.0.iter().for_each(Transfer::cancel);
    }

    /// Blocks until all have resolved: for threads without an executor.
    pub fn wait(self) -> Vec<Result<Report, Error>> {
        self.0.into_iter().map(Transfer::wait).collect()
    }
}

impl<'a> IntoIterator for &'a Transfers {
    type Item = &'a Transfer;
    type IntoIter = std::slice::Iter<'a, Transfer>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl Future for Transfers {
    type Output = Vec<Result<Report, Error>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // Every one is polled, so that each knows whom to wake.
        let mut pending = false;
        for transfer in &mut self.0 {
            pending |= Pin::new(transfer).poll(context).is_pending();
        }
        if pending {
            return Poll::Pending;
        }
        Poll::Ready(self.0.iter().filter_map(Transfer::result).collect())
    }
}
