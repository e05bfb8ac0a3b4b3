//! What may be changed of a process while it runs, whatever service it is: what it logs, how much it traces, how long it
//! takes to leave. Cheap to clone; clones are the same.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::{
    LogConfig, ShutdownConfig, TraceConfig,
    config::{Running, section},
};

/// Its handles; of a service that has no process of its own they lead nowhere.
#[derive(Clone, Default)]
pub struct Process(Arc<Inner>);

#[derive(Default)]
struct Inner {
    filter: Option<reload::Handle<EnvFilter, Registry>>,
    share: Share,
    grace_ms: AtomicU64,
}

/// Of requests that nobody has decided on yet, the share that is traced.
#[derive(Clone, Debug)]
pub(crate) struct Share(Arc<AtomicU64>);

impl Default for Share {
    fn default() -> Self {
        Self::new(1.0)
    }
}

impl Share {
    pub(crate) fn new(share: f64) -> Self {
        Self(Arc::new(AtomicU64::new(share.to_bits())))
    }

    pub(crate) fn get(&self) -> f64 {
        f64::from_bits(self.0.load(Relaxed))
    }
}

impl Process {
    pub(crate) fn new(filter: reload::Handle<EnvFilter, Registry>, share: Share) -> Self {
        Self(Arc::new(Inner { filter: Some(filter), share, grace_ms: AtomicU64::default() }))
    }

    /// Does as the sections say that every service has: `log.filter`, `trace.sample`, `shutdown.grace_ms`.
    pub fn follow<C: crate::Config>(&self, running: &Running<C>) {
        let tree = running.tree();
        if let Some(filter) = &self.0.filter
            && let Ok(wanted) = EnvFilter::try_new(section::<LogConfig>(tree, "log").filter)
        {
            // Fails only if logging is gone.
            let _ = filter.reload(wanted);
        }
        self.0.share.0.store(section::<TraceConfig>(tree, "trace").sample.to_bits(), Relaxed);
        self.set_grace(Duration::from_millis(section::<ShutdownConfig>(tree, "shutdown").grace_ms));
    }

    /// How long requests under way may go on after a signal to leave.
    pub(crate) fn grace(&self) -> Duration {
        Duration::from_millis(self.0.grace_ms.load(Relaxed))
    }

    pub(crate) fn set_grace(&self, grace: Duration) {
        self.0.grace_ms.store(u64::try_from(grace.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn shows(&self) -> (String, f64, Duration) {
        let filter = self.0.filter.as_ref().and_then(|filter| filter.with_current(ToString::to_string).ok());
        (filter.unwrap_or_default(), self.0.share.get(), self.grace())
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process").field("grace", &self.grace()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::{
        Config,
        config::{Base, Over, Set},
    };

    #[derive(Debug, Default, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Example {
        log: LogConfig,
        trace: TraceConfig,
        shutdown: ShutdownConfig,
    }

    impl Config for Example {
        const LIVE: &'static [(&'static str, &'static str)] =
            &[("log.filter", ""), ("trace.sample", ""), ("shutdown", "")];
    }

    #[test]
    fn what_every_service_has_is_changed_in_the_process() {
        let (_filter, handle) = reload::Layer::<EnvFilter, Registry>::new(EnvFilter::new("info"));
        let share = Share::new(1.0);
        let process = Process::new(handle, share.clone());
        let set: Set = serde_json::from_value(serde_json::json!({
            "log.filter": "warn,kvasir_worker=debug", "trace.sample": 0.25, "shutdown.grace_ms": 7,
        }))
        .unwrap();
        let layers = [Over { name: "test", origin: "cluster", set: &set }];
        process.follow(&Base::of(&Example::default()).over::<Example>(&layers).unwrap());
        let (filter, sample, grace) = process.shows();
        assert!(filter.contains("kvasir_worker=debug") && filter.contains("warn"), "{filter}");
        assert_eq!((sample, share.get(), grace), (0.25, 0.25, Duration::from_millis(7)));
    }
}
