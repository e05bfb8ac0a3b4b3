//! Waiting for a condition, with a limit. The only place in the tests where time passes.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at: short against anything a person would notice, long against a poll's cost.
const INTERVAL: Duration = Duration::from_millis(10);

/// Long enough for anything that should happen at once, on a machine that is busy with other tests.
pub const SOON: Duration = Duration::from_secs(20);

/// Polls `probe` until it answers `Some`, at most for `limit`; `what` says in the error what did not happen.
pub async fn until<T>(what: &str, limit: Duration, mut probe: impl AsyncFnMut() -> Option<T>) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = probe().await {
            return Ok(value);
        }
        if Instant::now() > end {
            bail!("waited {limit:?} in vain until {what}");
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_condition_that_comes_true_is_answered() {
        let mut looks = 0;
        let found = until("the third look", SOON, async || {
            looks += 1;
            (looks == 3).then_some("there")
        });
        assert_eq!(found.await.unwrap(), "there");
    }

    #[tokio::test]
    async fn a_condition_that_never_comes_true_names_itself() {
        let never = until("pigs fly", Duration::from_millis(1), async || None::<()>).await;
        assert!(never.unwrap_err().to_string().ends_with("until pigs fly"));
    }
}
