//! Expiry: ends what readers and writers who died, stalled or forgot have left open.
//!
//! Each end of a reservation is a task of its own: fencing off a writer that stalls in the middle of a block takes as long
//! as the transfer engine's grace, and the others must not wait for it.

use std::{sync::Arc, time::Instant};

use kvasir_runtime::{Kind, Shutdown, Tasks};

use crate::node::Node;

/// Runs until shutdown.
pub(crate) async fn run(node: Arc<Node>, tasks: Tasks, shutdown: Shutdown) {
    while !shutdown.is_triggered() {
        // Waiting loses nothing: what is due is asked for anew each time round.
        tokio::select! {
            () = sleep_until(node.next_end()) => {}
            () = node.opened() => {}
            () = shutdown.wait() => {}
        }
        let (leases, reservations) = node.expire(Instant::now());
        if leases + reservations.len() > 0 {
            tracing::debug!(leases, reservations = reservations.len(), "expired");
        }
        for closed in reservations {
            let node = node.clone();
            tasks.spawn(Kind::Background, "expire-reservation", async move {
                node.undo(closed).await;
                Ok(())
            });
        }
    }
}

/// Until then; for ever if there is no such time.
pub(crate) async fn sleep_until(end: Option<Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end.into()).await,
        None => std::future::pending().await,
    }
}
