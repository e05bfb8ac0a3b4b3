//! Whether trying again may help: every error knows, the edges decide.

use std::time::Duration;

/// What the one who got an error should do with the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The same request fails again, here and elsewhere: tell the caller.
    Never,
    /// Another worker may succeed, now.
    Elsewhere,
    /// This worker may succeed after the wait.
    After(Duration),
}
