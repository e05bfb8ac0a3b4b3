//! Whether the engine goes on, and telling so to those who wait.
//!
//! A worker whose engine hangs (a device that does not come back, a bug) still answers pings and accepts calls: its threads
//! that carry bytes are others. So callers that ask for it hear from us at regular times, but only while the engine makes
//! steps or has none to make.
//!
//! ```text
//! engine ──steps──▶ Pulse::watch (each second) ─▶ works? ─▶ health, log
//!                                                    └────▶ Beating: `alive` on streams with nothing else to say
//! ```

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use kvasir_engine::{Handle, Stats};
use kvasir_proto::{
    HEARTBEAT_METADATA,
    v1::{Alive, GenerateEvent, PrefillEvent, generate_event, prefill_event},
};
use kvasir_runtime::Health;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_stream::Stream;
use tonic::{Response, Status, metadata::MetadataValue};

use crate::caller::Events;

/// Between two looks at the engine.
const LOOK: Duration = Duration::from_secs(1);
/// A caller that wants to hear more often than this hears this often.
const SHORTEST_BEAT: Duration = Duration::from_millis(10);

/// Whether the engine goes on. Written by the one task that watches, read by every stream.
#[derive(Clone)]
pub(crate) struct Pulse(Arc<AtomicBool>);

impl Pulse {
    /// Of an engine that goes on.
    pub(crate) fn new() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }

    /// Watches the engine: after `limit` without a step that it should have made, the worker is not ready, until the next.
    /// Returns when its device has failed.
    pub(crate) async fn watch(self, engine: Handle, health: Health, limit: Duration, draining: impl Fn() -> bool) {
        let mut watched = Watched::new(Instant::now());
        loop {
            tokio::time::sleep(LOOK).await;
            let stats = engine.stats();
            if stats.broken {
                self.0.store(false, Relaxed);
                return health.set_not_ready("the device failed");
            }
            let works = watched.look(&stats, Instant::now(), limit);
            if self.0.swap(works, Relaxed) == works || draining() {
                continue;
            }
            if works {
                tracing::info!("the engine goes on");
                health.set_ready();
            } else {
                tracing::error!(limit_ms = limit.as_millis() as u64, "the engine has work and makes no step");
                health.set_not_ready("the engine has work and makes no step");
            }
        }
    }

    /// The answer to a call that asks for signs of life `every` so many milliseconds.
    pub(crate) fn answer<T: Beat>(&self, events: Events<T>, every_ms: u32) -> Response<Beating<T>> {
        let mut response = Response::new(self.beating(events, Duration::from_millis(every_ms.into())));
        if every_ms > 0 {
            response.metadata_mut().insert(HEARTBEAT_METADATA, MetadataValue::from(every_ms));
        }
        response
    }

    /// A stream on which something is said at least `every` so often while the engine goes on; zero: when there is something.
    fn beating<T: Beat>(&self, events: Events<T>, every: Duration) -> Beating<T> {
        let every = (!every.is_zero()).then(|| every.max(SHORTEST_BEAT));
        let clock = every.map(|every| (every, Box::pin(sleep_until(Instant::now() + every))));
        Beating { events, pulse: self.clone(), clock, said: Instant::now() }
    }
}

/// The engine as it was when it last did something.
struct Watched {
    steps: u64,
    since: Instant,
}

impl Watched {
    fn new(now: Instant) -> Self {
        Self { steps: 0, since: now }
    }

    fn look(&mut self, stats: &Stats, now: Instant, limit: Duration) -> bool {
        // Those that wait may wait for blocks that others hold who wait for their peers.
        let may_step = stats.running > 0 || (stats.waiting > 0 && stats.held == 0 && stats.parked == 0);
        if stats.steps != self.steps || !may_step {
            *self = Self { steps: stats.steps, since: now };
        }
        now.saturating_duration_since(self.since) < limit
    }
}

/// An event that can say no more than that we live.
pub(crate) trait Beat: Unpin {
    /// It.
    fn alive() -> Self;
}

impl Beat for GenerateEvent {
    fn alive() -> Self {
        Self { event: Some(generate_event::Event::Alive(Alive {})), choice: 0 }
    }
}

impl Beat for PrefillEvent {
    fn alive() -> Self {
        Self { event: Some(prefill_event::Event::Alive(Alive {})) }
    }
}

/// A stream with signs of life in it.
pub(crate) struct Beating<T> {
    events: Events<T>,
    pulse: Pulse,
    clock: Option<(Duration, Pin<Box<Sleep>>)>,
    said: Instant,
}

impl<T: Beat> Stream for Beating<T> {
    type Item = Result<T, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Poll::Ready(event) = Pin::new(&mut this.events).poll_next(cx) {
            if this.clock.is_some() {
                this.said = Instant::now();
            }
            return Poll::Ready(event);
        }
        let Some((every, clock)) = &mut this.clock else { return Poll::Pending };
        while clock.as_mut().poll(cx).is_ready() {
            // Set anew when it rings, not with every token.
            let (now, due) = (Instant::now(), this.said + *every);
            if now < due {
                clock.as_mut().reset(due);
                continue;
            }
            this.said = now;
            clock.as_mut().reset(now + *every);
            if this.pulse.0.load(Relaxed) {
                return Poll::Ready(Some(Ok(T::alive())));
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use kvasir_types::Deadline;
    use tokio_stream::StreamExt;

    use super::*;
    use crate::caller::Caller;

    #[test]
    fn an_engine_with_work_that_makes_no_step_is_noticed_and_one_that_waits_for_others_is_not() {
        let start = Instant::now();
        let limit = Duration::from_secs(60);
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut watched = Watched::new(start);
        let busy = |steps| Stats { running: 1, steps, ..Stats::default() };
        assert!(watched.look(&busy(1), at(10), limit));
        assert!(watched.look(&busy(1), at(69), limit));
        assert!(!watched.look(&busy(1), at(70), limit));
        assert!(watched.look(&busy(2), at(80), limit), "it goes on");
        let idle = Stats { steps: 2, ..Stats::default() };
        assert!(watched.look(&idle, at(500), limit));
        let held = Stats { held: 1, waiting: 3, ..idle };
        assert!(watched.look(&held, at(1_000), limit));
        let never_began = Stats { waiting: 1, ..idle };
        assert!(watched.look(&never_began, at(1_059), limit));
        assert!(!watched.look(&never_began, at(1_060), limit));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_broken_at_regular_times_only_while_the_engine_goes_on() {
        let pulse = Pulse::new();
        let (caller, events) =
            Caller::new(8, Deadline::after(Duration::from_secs(600)), kvasir_runtime::Shutdown::new());
        let mut beating = pulse.beating(events, Duration::from_millis(100));
        let is_alive = |event: Option<Result<GenerateEvent, Status>>| {
            matches!(event.unwrap().unwrap().event, Some(generate_event::Event::Alive(_)))
        };
        let start = Instant::now();
        for beat in 1..=3u64 {
            assert!(is_alive(beating.next().await));
            assert_eq!(start.elapsed().as_millis() as u64, beat * 100);
        }
        // An event puts the next sign off.
        tokio::time::advance(Duration::from_millis(50)).await;
        caller.send(GenerateEvent::default()).unwrap();
        assert!(beating.next().await.unwrap().unwrap().event.is_none());
        assert!(is_alive(beating.next().await));
        assert_eq!(start.elapsed().as_millis(), 450);
        pulse.0.store(false, Relaxed);
        assert!(tokio::time::timeout(Duration::from_secs(60), beating.next()).await.is_err());
        drop(caller);
        assert!(beating.next().await.is_none());
    }
}
