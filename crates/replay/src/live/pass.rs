//! What every report of a pass over a trace begins with.

use serde::Serialize;

use super::{Pace, Plan, drive::Ended};
use crate::trace::Trace;

/// A pass, as a report names it.
#[derive(Clone, Debug, Serialize)]
pub struct Header {
    /// The trace's name.
    pub trace: String,
    /// Which pass over it, from 1 on.
    pub pass: u32,
    /// What its blocks or prompts follow from.
    pub namespace: String,
    /// When requests went out.
    pub pace: Pace,
    /// Most of them at a time.
    pub concurrency: usize,
    /// How long it took.
    pub seconds: f64,
    /// Whether it was told to stop before the end.
    pub stopped: bool,
}

/// What a report is about.
pub(super) struct Pass<'a> {
    pub(super) name: &'a str,
    pub(super) trace: &'a Trace,
    /// Which one, from 1 on.
    pub(super) pass: u32,
    pub(super) plan: &'a Plan,
    pub(super) ended: Ended,
}

impl Pass<'_> {
    pub(super) fn header(&self) -> Header {
        let &Self { name, pass, plan, ended, .. } = self;
        Header {
            trace: name.to_owned(),
            pass,
            namespace: plan.namespace.clone(),
            pace: plan.pace,
            concurrency: plan.lanes,
            seconds: ended.seconds,
            stopped: ended.stopped,
        }
    }
}

impl Header {
    /// The beginning of a table's first line, before what it counts, and its end.
    pub(super) fn line(&self, counted: &str) -> String {
        let Self { trace, pass, seconds, .. } = self;
        let stopped = if self.stopped { ", stopped" } else { "" };
        format!("{trace}, pass {pass}: {counted} in {seconds:.1} s{stopped}\n")
    }
}
