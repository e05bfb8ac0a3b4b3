//! Steps that decode, as graphs: a step's launches are some hundred calls of the driver, a graph's are one.
//!
//! A graph is captured from the very launches that a step without one makes, so what is computed is the same. What launches take
//! by value (addresses, grids) is the graph's; what lies behind the addresses is read when it runs. So one graph serves all steps
//! of a [`Shape`], as long as nothing that it names has moved.
//!
//! A shape is captured the second time it comes: most that come once do not come again soon. The shapes that were not seen for
//! longest go first.

use std::{ptr, sync::Arc};

use cudarc::driver::sys::{self, CUstreamCaptureMode};

use super::{
    driver::{Context, Stream},
    step::Shape,
};
use crate::Error;

/// Shapes that are remembered, each with a graph at most.
const SHAPES: usize = 48;

/// What graphs have done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GraphCounts {
    /// Steps whose launches became one.
    pub captured: u64,
    /// Steps that were one.
    pub replayed: u64,
}

/// Launches that run as one.
struct Graph {
    raw: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: a graph may be launched from any thread whose current context is its own, one at a time: it has one owner.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `launch` puts into the stream, and into others that wait for it and are waited for in the end. None of it
    /// runs.
    fn capture(stream: &Stream, launch: impl FnOnce() -> Result<(), Error>) -> Result<Self, Error> {
        let context = &stream.context;
        // Other threads may do what they like meanwhile: other devices' backends, and tests.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream of ours, which is not captured yet.
        context.check(unsafe { sys::cuStreamBeginCapture_v2(stream.raw, mode) }, "cuStreamBeginCapture")?;
        let launched = launch();
        let mut graph = ptr::null_mut();
        // Whatever came of it, the capture ends here.
        // SAFETY: writes one handle; begun above, by this thread.
        let ended = context.check(unsafe { sys::cuStreamEndCapture(stream.raw, &raw mut graph) }, "cuStreamEndCapture");
        let whole = launched.and(ended);
        let mut raw = ptr::null_mut();
        let made = whole.and_then(|()| {
            // SAFETY: writes one handle; the graph was just captured.
            let made = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut raw, graph, 0) };
            context.check(made, "cuGraphInstantiate")
        });
        if !graph.is_null() {
            // SAFETY: ours; what was made of it does not need it.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
        made.map(|()| Self { raw, context: Arc::clone(context) })
    }

    fn launch(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: both are ours; whoever launches it sees to it that what it names is still there.
        self.context.check(unsafe { sys::cuGraphLaunch(self.raw, stream.raw) }, "cuGraphLaunch")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: ours; steps are waited for before anything goes.
        let _ = unsafe { sys::cuGraphExecDestroy(self.raw) };
    }
}

/// What becomes of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Plain,
    Capture,
    Replay,
}

/// What was made for shapes, those seen last at the end.
struct Recent<T>(Vec<(Shape, Option<T>)>);

impl<T> Recent<T> {
    /// Takes note of a shape.
    fn next(&mut self, shape: &Shape) -> Next {
        let Some(at) = self.0.iter().position(|(known, _)| known == shape) else {
            if self.0.len() == SHAPES {
                self.0.remove(0);
            }
            self.0.push((shape.clone(), None));
            return Next::Plain;
        };
        let entry = self.0.remove(at);
        let next = if entry.1.is_some() { Next::Replay } else { Next::Capture };
        self.0.push(entry);
        next
    }

    /// What belongs to the shape noted last.
    fn last(&mut self) -> Option<&mut Option<T>> {
        self.0.last_mut().map(|(_, made)| made)
    }
}

/// The graphs of a backend.
pub(super) struct Graphs {
    recent: Recent<Graph>,
    /// Which state of the memory they name.
    generation: u64,
    wanted: bool,
    pub(super) counts: GraphCounts,
}

impl Graphs {
    pub(super) fn new(wanted: bool) -> Self {
        Self { recent: Recent(Vec::new()), generation: 0, wanted, counts: GraphCounts::default() }
    }

    /// Whether steps are to have shapes.
    pub(super) fn are_wanted(&self) -> bool {
        self.wanted
    }

    /// Runs what `launch` launches, as a graph where there is one or is to be one. `generation` is another one whenever something
    /// has moved that launches name.
    pub(super) fn run(
        &mut self,
        stream: &Stream,
        shape: Option<&Shape>,
        generation: u64,
        launch: impl Fn() -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.generation != generation {
            // Steps are waited for before anything moves: no graph is under way.
            self.recent.0.clear();
            self.generation = generation;
        }
        let Some(shape) = shape.filter(|_| self.wanted) else {
            return launch();
        };
        let next = self.recent.next(shape);
        let Some(made) = self.recent.last() else {
            return launch();
        };
        match next {
            Next::Plain => return launch(),
            Next::Capture => match Graph::capture(stream, &launch) {
                Ok(graph) => {
                    *made = Some(graph);
                    self.counts.captured += 1;
                }
                Err(error) => {
                    // If it is the device that fails, the launches say so.
                    tracing::warn!(%error, "steps can't be captured as graphs: every launch is a call of its own from now on");
                    self.wanted = false;
                    self.recent.0.clear();
                    return launch();
                }
            },
            Next::Replay => self.counts.replayed += 1,
        }
        made.as_ref().map_or_else(&launch, |graph| graph.launch(stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_were_not_seen_for_longest_are_forgotten() {
        let shape = |rows| Shape::of_rows(rows);
        let mut recent = Recent(Vec::new());
        for rows in 0..SHAPES {
            assert_eq!(recent.next(&shape(rows)), Next::Plain);
        }
        for rows in 0..SHAPES {
            assert_eq!(recent.next(&shape(rows)), Next::Capture);
            *recent.last().unwrap() = Some(rows);
        }
        assert_eq!(recent.next(&shape(0)), Next::Replay);
        assert_eq!(*recent.last().unwrap(), Some(0));
        assert_eq!(recent.next(&shape(SHAPES)), Next::Plain);
        assert_eq!(recent.0.len(), SHAPES);
        // The second one made room, not the first.
        assert_eq!(recent.next(&shape(0)), Next::Replay);
        assert_eq!(recent.next(&shape(1)), Next::Plain);
    }
}
