//! The signal to leave: given once, seen by everybody, never taken back.

use tokio_util::sync::CancellationToken;

/// Tells when to stop accepting work. Clones are the same signal.
#[derive(Clone, Debug, Default)]
pub struct Shutdown(CancellationToken);

impl Shutdown {
    /// A signal of its own, not yet given.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives the signal. Giving it again does nothing.
    pub fn trigger(&self) {
        self.0.cancel();
    }

    /// Returns once the signal has been given, at once if it has been.
    pub async fn wait(&self) {
        self.0.cancelled().await;
    }

    /// Whether the signal has been given.
    pub fn is_triggered(&self) -> bool {
        self.0.is_cancelled()
    }

    /// A signal that is given with this one, or alone.
    #[must_use]
    pub fn child(&self) -> Self {
        Self(self.0.child_token())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_childs_end_is_not_its_parents_but_the_parents_is_the_childs() {
        let parent = Shutdown::new();
        let (one, two) = (parent.child(), parent.child());
        one.trigger();
        assert!(one.is_triggered() && !two.is_triggered() && !parent.is_triggered());
        parent.clone().trigger();
        two.wait().await;
    }
}
