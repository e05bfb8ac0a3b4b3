//! The engine's own threads: named, counted, joined at shutdown.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use crate::error::Error;

/// Every thread an engine has started. Threads add threads (a listener adds connections); shutdown joins them all.
#[derive(Debug, Default)]
pub(crate) struct Threads(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    closed: bool,
    handles: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Starts a thread, unless [`Threads::join_all`] has begun. `name` is at most 15 bytes, or Linux cuts it.
    pub(crate) fn spawn(&self, name: &'static str, body: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.closed {
            return Err(Error::Shutdown);
        }
        // Those that have ended need no join; without this a long-lived listener would collect handles for ever.
        inner.handles.retain(|handle| !handle.is_finished());
        let handle = thread::Builder::new()
            .name(name.into())
            .spawn(body)
            .map_err(|source: io::Error| Error::Thread { name, source: Arc::new(source) })?;
        inner.handles.push(handle);
        Ok(())
    }

    /// Waits for all threads to end; they have been told to. Called on one of them (the last handle may be dropped by a
    /// waker), that one is left to end by itself.
    pub(crate) fn join_all(&self) {
        let handles = {
            let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            inner.closed = true;
            std::mem::take(&mut inner.handles)
        };
        for handle in handles {
            if handle.thread().id() != thread::current().id() {
                // A panicked thread has said so on stderr; what it held was released by unwinding.
                let _ = handle.join();
            }
        }
    }
}
