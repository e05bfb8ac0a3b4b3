//! Whether a service is ready for work, and if not, why.

use std::sync::{Arc, Mutex, MutexGuard};

/// Readiness of a service. Clones are the same state; a new one is not ready because it is `starting`.
#[derive(Clone, Debug)]
pub struct Health(Arc<Mutex<State>>);

/// Written by the service (a few times in its life), read by the admin server.
#[derive(Debug)]
struct State {
    /// `None`: ready.
    not_ready: Option<String>,
    /// Services of the same process that must be ready too, by name.
    children: Vec<(String, Health)>,
}

impl Health {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(State { not_ready: Some("starting".to_owned()), children: Vec::new() })))
    }

    /// From now on the service takes work.
    pub fn set_ready(&self) {
        self.lock().not_ready = None;
    }

    /// From now on the service takes no work.
    pub fn set_not_ready(&self, why: impl Into<String>) {
        self.lock().not_ready = Some(why.into());
    }

    /// `Ok` if the service and all its children take work, else why not.
    pub fn ready(&self) -> Result<(), String> {
        let children = {
            let state = self.lock();
            if let Some(why) = &state.not_ready {
                return Err(why.clone());
            }
            state.children.clone()
        };
        children.iter().try_for_each(|(name, child)| child.ready().map_err(|why| format!("{name}: {why}")))
    }

    pub(crate) fn child(&self, name: &str) -> Self {
        let child = Self::new();
        self.lock().children.push((name.to_owned(), child.clone()));
        child
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no code panics while it holds this lock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_ready_when_all_its_services_are() {
        let health = Health::new();
        assert_eq!(health.ready(), Err("starting".to_owned()));
        let child = health.child("router");
        health.set_ready();
        assert_eq!(health.ready(), Err("router: starting".to_owned()));
        child.set_ready();
        assert_eq!(health.ready(), Ok(()));
        child.set_not_ready("draining");
        assert_eq!(health.ready(), Err("router: draining".to_owned()));
    }
}
