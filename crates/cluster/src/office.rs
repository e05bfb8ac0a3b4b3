//! Offices: what one member of the cluster does for all, and another one once it is gone.

use kvasir_types::{MemberId, Role};
use serde::{Deserialize, Serialize};

/// Who holds an office, as of the moment it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Office {
    /// The member that holds it.
    pub holder: MemberId,
    /// Its term: greater than any before it, for as long as the metadata's store lives. Whoever acts for the cluster says it
    /// along, so that those who have heard from a later one can refuse: a process may be stopped for long between being
    /// told that it holds an office and acting upon it.
    pub term: u64,
    /// It is the member that asked.
    pub ours: bool,
}

/// The record of an office.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) role: Role,
    pub(crate) id: MemberId,
    pub(crate) incarnation: kvasir_types::Incarnation,
}
