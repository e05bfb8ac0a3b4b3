//! What a running service is handed besides its configuration.

use std::sync::Arc;

use crate::{Health, Metrics, Process, Shutdown, Tasks, config::Base};

/// The parts of the process that a service uses. Cheap to clone; clones are the same.
#[derive(Clone, Debug)]
pub struct Context {
    /// Starts tasks.
    pub tasks: Tasks,
    /// Tells when to leave.
    pub shutdown: Shutdown,
    /// What `/metrics` shows.
    pub metrics: Metrics,
    /// What `/ready` says.
    pub health: Health,
    /// What the process was started with; `None`: it is not this service's own process.
    pub base: Option<Arc<Base>>,
    /// What may be changed of the process while it runs.
    pub process: Process,
}

impl Context {
    /// A context that no process stands behind: no signal reaches it, nobody serves its pages. A critical task that ends
    /// triggers its shutdown. For tests.
    pub fn detached(name: &str) -> Self {
        let shutdown = Shutdown::new();
        Self {
            tasks: Tasks::new(name, shutdown.clone()),
            shutdown,
            metrics: Metrics::new(),
            health: Health::new(),
            base: None,
            process: Process::default(),
        }
    }

    /// The context of a service that lives in this one's process: leaves when this one leaves, and this one is ready only
    /// once the child is. It has metrics of its own (the same names appear once on a page) and a gate of its own; the end
    /// of a critical task of the child ends the process as if it were the parent's.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        let shutdown = self.shutdown.child();
        Self {
            tasks: self.tasks.child(name, shutdown.clone()),
            shutdown,
            metrics: Metrics::new(),
            health: self.health.child(name),
            base: None,
            process: Process::default(),
        }
    }
}
