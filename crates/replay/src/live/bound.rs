//! What a cache without limit has: every block that any request before asked for.

use crate::trace::Trace;

/// Blocks that were asked for so far. It goes on from one pass over a trace to the next.
#[derive(Debug)]
pub(crate) struct Bound {
    seen: Vec<bool>,
}

impl Bound {
    pub(crate) fn new(trace: &Trace) -> Self {
        Self { seen: vec![false; trace.distinct as usize] }
    }

    /// How many of a request's blocks, from its first one on, had been asked for before.
    pub(crate) fn ask(&mut self, blocks: &[u32]) -> usize {
        let had = blocks.iter().take_while(|&&block| self.seen[block as usize]).count();
        blocks.iter().for_each(|&block| self.seen[block as usize] = true);
        had
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_a_whole_trace_it_is_the_traces_own_and_over_a_second_pass_everything() {
        let trace = crate::generate::generate("chat", 5).unwrap();
        let mut bound = Bound::new(&trace);
        let mut pass = || trace.requests.iter().map(|request| bound.ask(&request.blocks)).sum::<usize>();
        assert_eq!(pass(), trace.references - trace.distinct as usize);
        assert_eq!(pass(), trace.references);
    }
}
