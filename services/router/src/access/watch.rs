//! Reading the file of keys again when it changes.

use std::{path::Path, sync::Arc, time::Duration};

use kvasir_runtime::chain;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{AccessConfig, Keyring};

/// Between two looks at the file. Kubernetes takes longer to change a mounted secret.
const LOOK: Duration = Duration::from_secs(1);

/// Keeps the keys what the file says. The future never ends.
pub(crate) async fn watch(config: AccessConfig, keys: watch::Sender<Arc<Keyring>>) {
    let Some(path) = config.keys_file.clone() else { return std::future::pending().await };
    let mut seen = stamp(&path);
    loop {
        tokio::time::sleep(LOOK).await;
        let now = stamp(&path);
        if now == seen {
            continue;
        }
        seen = now;
        let config = config.clone();
        let read = tokio::task::spawn_blocking(move || config.keyring()).await;
        match read {
            Ok(Ok(new)) => {
                info!(keys = new.keys().unwrap_or(0), file = %path.display(), "keys read again");
                let new = Arc::new(new.after(&keys.borrow()));
                keys.send_replace(new);
            }
            Ok(Err(error)) => warn!(error = chain(&error), "the keys stay as they were"),
            Err(error) => warn!(%error, "the keys stay as they were"),
        }
    }
}

/// What of a file tells that it is another one: mounted secrets are exchanged by a link.
fn stamp(path: &Path) -> Option<(std::time::SystemTime, u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
}
