//! Supervised tasks: whoever starts one says what its end means.
//!
//! | kind | it ends well | it fails | it panics |
//! | --- | --- | --- | --- |
//! | [`Critical`](Kind::Critical) | the process leaves | the process leaves, exit 1 | the process leaves, exit 1 |
//! | [`Background`](Kind::Background) | debug | WARN | ERROR |
//! | [`Request`](Kind::Request) | debug | debug | ERROR |
//!
//! (After shutdown has begun, a critical task may end well: that is how it leaves.) Request tasks hold the **gate**:
//! [`Tasks::finish_requests`] waits for them and names those that hold it too long. A panic is logged once, by the panic
//! hook, with its place.

use std::{
    any::Any,
    collections::BTreeMap,
    fmt,
    future::Future,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{sync::watch, time::Instant};
use tracing::{Instrument, Span};

use crate::{Shutdown, chain};

/// Most holders that are named when the grace is over: a log line each.
const MAX_NAMED: usize = 20;

/// What the end of a task means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The process can't do without it.
    Critical,
    /// Useful but not vital; its failure is logged.
    Background,
    /// Works for one request, whose caller is told of failures; holds the gate at shutdown.
    Request,
}

/// Starts tasks and knows those that hold the gate. Cheap to clone; clones are the same.
#[derive(Clone)]
pub struct Tasks(Arc<Inner>);

struct Inner {
    service: String,
    shutdown: Shutdown,
    /// Why the process has to leave: the first critical task that ended. Shared with the parent, if there is one.
    fatal: watch::Sender<Option<String>>,
    gate: Gate,
}

/// The requests under way. Written by their tasks at start and end; read by the one who drains.
struct Gate {
    holders: Mutex<Holders>,
    count: watch::Sender<usize>,
}

#[derive(Default)]
struct Holders {
    next: u64,
    by_number: BTreeMap<u64, Holder>,
}

#[derive(Clone)]
struct Holder {
    task: &'static str,
    since: Instant,
    span: Span,
}

impl Tasks {
    pub(crate) fn new(service: &str, shutdown: Shutdown) -> Self {
        Self::with(service, shutdown, watch::Sender::new(None))
    }

    pub(crate) fn child(&self, service: &str, shutdown: Shutdown) -> Self {
        Self::with(service, shutdown, self.0.fatal.clone())
    }

    fn with(service: &str, shutdown: Shutdown, fatal: watch::Sender<Option<String>>) -> Self {
        let gate = Gate { holders: Mutex::default(), count: watch::Sender::new(0) };
        Self(Arc::new(Inner { service: service.to_owned(), shutdown, fatal, gate }))
    }

    /// Starts a task in the current span.
    pub fn spawn(
        &self,
        kind: Kind,
        name: &'static str,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        self.spawn_in(kind, name, Span::current(), task);
    }

    /// Starts a task in a span. A request that holds the gate too long is reported inside that span, so by its request id.
    pub fn spawn_in(
        &self,
        kind: Kind,
        name: &'static str,
        span: Span,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let held = (kind == Kind::Request).then(|| self.hold(name, span.clone()));
        let tasks = self.clone();
        let supervised = async move {
            // Nothing of a task that panicked is looked at afterwards.
            let end = AssertUnwindSafe(task).catch_unwind().await;
            tasks.ended(kind, name, end);
            drop(held);
        };
        #[expect(clippy::disallowed_methods, reason = "the one place where tasks are made")]
        tokio::spawn(supervised.instrument(span));
    }

    /// Request tasks under way.
    pub fn requests(&self) -> usize {
        *self.0.gate.count.borrow()
    }

    /// Waits until no request task is left, for at most `grace`, and returns how many are: each is named in the log.
    /// They go on; the process's end is theirs.
    pub async fn finish_requests(&self, grace: Duration) -> usize {
        let mut count = self.0.gate.count.subscribe();
        let done = tokio::time::timeout(grace, count.wait_for(|&count| count == 0)).await;
        if done.is_ok() {
            return 0;
        }
        let holders: Vec<Holder> = self.0.gate.holders().by_number.values().cloned().collect();
        for holder in holders.iter().take(MAX_NAMED) {
            let age_ms = holder.since.elapsed().as_millis() as u64;
            let (task, service) = (holder.task, &self.0.service);
            holder.span.in_scope(|| tracing::warn!(service, task, age_ms, "still running after the grace"));
        }
        if holders.len() > MAX_NAMED {
            tracing::warn!(service = self.0.service, unnamed = holders.len() - MAX_NAMED, "more after the grace");
        }
        holders.len()
    }

    /// Returns why the process must leave, once a critical task has ended.
    pub(crate) async fn fatal(&self) -> String {
        let mut fatal = self.0.fatal.subscribe();
        match fatal.wait_for(Option::is_some).await.map(|why| why.clone()) {
            Ok(Some(why)) => why,
            _ => std::future::pending().await, // `self` holds the sender: it can't be closed
        }
    }

    fn hold(&self, task: &'static str, span: Span) -> Held {
        let mut holders = self.0.gate.holders();
        let number = holders.next;
        holders.next += 1;
        holders.by_number.insert(number, Holder { task, since: Instant::now(), span });
        self.0.gate.count.send_replace(holders.by_number.len());
        drop(holders);
        Held { tasks: self.clone(), number }
    }

    fn ended(&self, kind: Kind, name: &'static str, end: Result<anyhow::Result<()>, Box<dyn Any + Send>>) {
        let service = &self.0.service;
        let leaving = self.0.shutdown.is_triggered();
        let failure = match end {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(chain(error.as_ref())),
            Err(_) => Some("panicked".to_owned()),
        };
        match (kind, failure) {
            (Kind::Critical, None) if leaving => tracing::debug!(service, task = name, "ended"),
            (Kind::Critical, failure) => {
                let why = format!("{name}: {}", failure.unwrap_or_else(|| "ended though it never should".to_owned()));
                tracing::debug!(service, task = name, why, "critical task ended");
                // The first one wins: later ones usually are its consequences.
                self.0.fatal.send_if_modified(|fatal| {
                    let first = fatal.is_none();
                    fatal.get_or_insert(why);
                    first
                });
                self.0.shutdown.trigger();
            }
            (Kind::Background, Some(error)) => tracing::warn!(service, task = name, error, "background task failed"),
            (Kind::Request, Some(error)) => tracing::debug!(service, task = name, error, "request task failed"),
            (_, None) => tracing::debug!(service, task = name, "ended"),
        }
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tasks").field("service", &self.0.service).field("requests", &self.requests()).finish()
    }
}

impl Gate {
    fn holders(&self) -> std::sync::MutexGuard<'_, Holders> {
        self.holders.lock().expect("no code panics while it holds this lock")
    }
}

/// Given back when dropped, so also by a task that is aborted.
struct Held {
    tasks: Tasks,
    number: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        let gate = &self.tasks.0.gate;
        let mut holders = gate.holders();
        let holder = holders.by_number.remove(&self.number);
        gate.count.send_replace(holders.by_number.len());
        drop(holders);
        drop(holder); // outside the lock: closing a span runs the subscriber
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::Context;

    const GRACE: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn the_gate_opens_when_the_last_request_ends() {
        let context = Context::detached("test");
        for seconds in 1..4 {
            context.tasks.spawn(Kind::Request, "request", async move {
                tokio::time::sleep(Duration::from_secs(seconds)).await;
                if seconds == 2 { Err(anyhow!("no")) } else { Ok(()) }
            });
        }
        assert_eq!(context.tasks.requests(), 3);
        let before = Instant::now();
        assert_eq!(context.tasks.finish_requests(GRACE).await, 0);
        assert_eq!(before.elapsed().as_secs(), 3);
        assert!(!context.shutdown.is_triggered());
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_hangs_is_left_behind_after_the_grace() {
        let context = Context::detached("test");
        context.tasks.spawn(Kind::Request, "hangs", std::future::pending());
        context.tasks.spawn(Kind::Background, "not counted", std::future::pending());
        let before = Instant::now();
        assert_eq!(context.tasks.finish_requests(GRACE).await, 1);
        assert_eq!(before.elapsed(), GRACE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_panics_gives_the_gate_back() {
        let context = Context::detached("test");
        context.tasks.spawn(Kind::Request, "panics", async { panic!("on purpose") });
        assert_eq!(context.tasks.finish_requests(GRACE).await, 0);
        assert!(!context.shutdown.is_triggered());
    }

    #[tokio::test(start_paused = true)]
    async fn a_critical_task_takes_the_process_with_it_however_it_ends() {
        type End = fn() -> anyhow::Result<()>;
        let ends: [(End, &str); 3] = [
            (|| Ok(()), "it: ended though it never should"),
            (|| Err(anyhow!("port").context("listen")), "it: listen: port"),
            (|| panic!("on purpose"), "it: panicked"),
        ];
        for (end, why) in ends {
            let parent = Context::detached("parent");
            let child = parent.child("child");
            child.tasks.spawn(Kind::Critical, "it", async move { end() });
            assert_eq!(parent.tasks.fatal().await, why);
            child.shutdown.wait().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_critical_task_may_leave_when_everybody_does() {
        let context = Context::detached("test");
        let shutdown = context.shutdown.clone();
        context.tasks.spawn(Kind::Critical, "server", async move {
            shutdown.wait().await;
            Ok(())
        });
        context.shutdown.trigger();
        assert!(tokio::time::timeout(GRACE, context.tasks.fatal()).await.is_err());
    }
}
