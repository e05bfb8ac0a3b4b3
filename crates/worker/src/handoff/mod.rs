//! What the two sides of a handoff must agree on, as pure functions: which blocks move, where from and where to.

mod plan;

pub(crate) use plan::{Landing, plan};
