//! How far a worker is on its way out of service.

use std::fmt;

use serde::{Deserialize, Serialize};

/// `serving → cordoned → draining → drained`, and from each of them back to serving.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Is given requests.
    #[default]
    Serving,
    /// Is given no new ones; what it has goes on.
    Cordoned,
    /// What it has is brought to an end, here or elsewhere.
    Draining,
    /// Has nothing: its process may be ended.
    Drained,
}

impl Stage {
    /// Whether it is given requests.
    pub fn serves(&self) -> bool {
        *self == Self::Serving
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Cordoned => "cordoned",
            Self::Draining => "draining",
            Self::Drained => "drained",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
