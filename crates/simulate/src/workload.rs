//! What is sent, and when: a trace, made faster, repeated by others, or robbed of what its prompts share.
//!
//! Requests of a trace name the blocks that their prompts begin with; here each copy of the trace, and with `unique` each
//! request, has names of its own. What a single cache without limit would find of all that, requests taken in the order in
//! which they come, is the bound that policies are measured by.

use std::collections::HashMap;

use kvasir_replay::trace::{Request, Trace};
use kvasir_types::mix;

/// Most requests of a run.
pub const MAX_REQUESTS: usize = 10_000_000;
/// Fastest and slowest.
const SPEEDS: std::ops::RangeInclusive<f64> = 1e-3..=1e6;
/// Copies of a trace do not begin at the same moment, but within so many milliseconds of it (before it is made faster).
const STAGGER_MS: u64 = 60_000;
/// Longest trace: a year.
const MAX_MS: u64 = 366 * 24 * 3600 * 1000;

/// Nanoseconds from the beginning of a run.
pub type Ns = u64;

/// A moment or a time in seconds.
pub fn seconds(ns: Ns) -> f64 {
    ns as f64 / 1e9
}

/// So many seconds; nothing is sooner than at once.
pub fn nanos(seconds: f64) -> Ns {
    (seconds * 1e9).round() as Ns
}

/// How a trace is used.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Shape {
    /// So many times as fast as it was recorded.
    pub speed: f64,
    /// Only so many of its first requests.
    pub limit: Option<usize>,
    /// So many populations of users do the same, each with prompts of its own.
    pub copies: u32,
    /// No prompt shares anything with another one.
    pub unique: bool,
    /// Requests come up to so many milliseconds late (before it is made faster), by chance.
    pub spread_ms: u64,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// For all chance.
    pub seed: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self { speed: 1.0, limit: None, copies: 1, unique: false, spread_ms: 0, block_tokens: 512, seed: 1 }
    }
}

/// A workload that can't be simulated.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum Error {
    /// The trace has no requests.
    #[error("the trace has no requests")]
    Empty,
    /// Too fast or too slow, or no number.
    #[error("speed {0}: must be between 0.001 and 1000000")]
    Speed(f64),
    /// Nobody, or too many.
    #[error("{copies} copies of {requests} requests: there must be one, and at most {MAX_REQUESTS} requests in all")]
    Copies {
        /// Copies asked for.
        copies: u32,
        /// Requests of one.
        requests: usize,
    },
    /// More names than numbers.
    #[error("{0} distinct blocks: at most 4294967295 can be told apart")]
    Blocks(u64),
    /// Blocks without tokens.
    #[error("a block has one token at least")]
    BlockTokens,
    /// A request's time can't be.
    #[error("request {request} of the trace comes after {at_ms} ms: more than a year")]
    Time {
        /// From 1 on.
        request: usize,
        /// When.
        at_ms: u64,
    },
}

/// The blocks of a prompt: a view.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    ids: &'a [u32],
    base: u32,
    unique: bool,
    size: u32,
    tokens: u32,
}

impl<'a> Blocks<'a> {
    /// Of a prompt of so many tokens; names that its tokens do not reach are left out.
    pub fn new(ids: &'a [u32], base: u32, unique: bool, size: u32, tokens: u32) -> Self {
        let reached = tokens.div_ceil(size) as usize;
        Self { ids: &ids[..ids.len().min(reached)], base, unique, size, tokens }
    }

    /// How many.
    pub fn len(self) -> u32 {
        self.ids.len() as u32
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.ids.is_empty()
    }

    /// The name of this one.
    pub fn get(self, at: u32) -> u32 {
        self.base + if self.unique { at } else { self.ids[at as usize] }
    }

    /// Tokens of the prompt.
    pub fn tokens(self) -> u64 {
        self.tokens.into()
    }

    /// Tokens of its first blocks.
    pub fn tokens_of(self, blocks: u32) -> u64 {
        (u64::from(blocks) * u64::from(self.size)).min(self.tokens())
    }

    /// Names and tokens.
    pub fn iter(self) -> impl Iterator<Item = (u32, u32)> + 'a {
        (0..self.len()).map(move |at| (self.get(at), self.size.min(self.tokens - at * self.size)))
    }
}

#[derive(Clone, Copy, Debug)]
struct Arrival {
    at: Ns,
    /// In the trace.
    request: u32,
    base: u32,
    session: u32,
}

/// Requests in the order in which they come.
#[derive(Debug)]
pub struct Workload {
    trace: Trace,
    arrivals: Vec<Arrival>,
    shape: Shape,
    /// Tokens that a single cache without limit would find.
    pub bound_tokens: u64,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens of all answers.
    pub answer_tokens: u64,
    /// Blocks that differ.
    pub distinct: u64,
}

impl Workload {
    /// The trace in this shape.
    ///
    /// # Errors
    /// If it has no requests, or too many.
    pub fn new(mut trace: Trace, shape: Shape) -> Result<Self, Error> {
        if let Some(limit) = shape.limit {
            trace.requests.truncate(limit);
        }
        if trace.requests.is_empty() {
            return Err(Error::Empty);
        }
        if !SPEEDS.contains(&shape.speed) {
            return Err(Error::Speed(shape.speed));
        }
        if shape.block_tokens == 0 {
            return Err(Error::BlockTokens);
        }
        let requests = trace.requests.len();
        if shape.copies == 0 || requests.saturating_mul(shape.copies as usize) > MAX_REQUESTS {
            return Err(Error::Copies { copies: shape.copies, requests });
        }
        if let Some((at, late)) = trace.requests.iter().enumerate().find(|(_, request)| request.at_ms > MAX_MS) {
            return Err(Error::Time { request: at + 1, at_ms: late.at_ms });
        }
        let mut workload = Self {
            trace,
            arrivals: Vec::with_capacity(requests * shape.copies as usize),
            shape,
            bound_tokens: 0,
            prompt_tokens: 0,
            answer_tokens: 0,
            distinct: 0,
        };
        workload.arrive()?;
        workload.bind();
        Ok(workload)
    }

    fn arrive(&mut self) -> Result<(), Error> {
        let Shape { speed, copies, unique, spread_ms, seed, .. } = self.shape;
        let (sessions, count) = sessions(&self.trace.requests);
        let mut next = 0u64;
        for copy in 0..copies {
            let late_ms = if copies > 1 { mix(seed ^ u64::from(copy) << 32) % STAGGER_MS } else { 0 };
            for (at, request) in self.trace.requests.iter().enumerate() {
                let chance = mix(mix(seed).wrapping_add((at as u64) << 24 | u64::from(copy)));
                let spread = if spread_ms > 0 { chance % spread_ms } else { 0 };
                let ms = request.at_ms + late_ms + spread;
                self.arrivals.push(Arrival {
                    at: nanos(ms as f64 / 1e3 / speed),
                    request: at as u32,
                    base: next as u32,
                    session: copy.wrapping_mul(count).wrapping_add(sessions[at]),
                });
                if unique {
                    next += request.blocks.len() as u64;
                }
            }
            if !unique {
                next += u64::from(self.trace.distinct);
            }
            if next > u64::from(u32::MAX) {
                return Err(Error::Blocks(next));
            }
        }
        self.distinct = next;
        self.arrivals.sort_by_key(|arrival| arrival.at);
        let first = self.arrivals[0].at;
        self.arrivals.iter_mut().for_each(|arrival| arrival.at -= first);
        Ok(())
    }

    fn bind(&mut self) {
        let mut seen = vec![0u64; self.distinct as usize / 64 + 1];
        for at in 0..self.len() {
            let blocks = self.blocks(at);
            let has = |block: u32| seen[block as usize / 64] >> (block % 64) & 1 == 1;
            let found = blocks.iter().take_while(|(block, _)| has(*block)).count() as u32;
            for (block, _) in blocks.iter() {
                seen[block as usize / 64] |= 1 << (block % 64);
            }
            // The last token of a prompt is always computed.
            let found = blocks.tokens_of(found).min(blocks.tokens().saturating_sub(1));
            let tokens = (blocks.tokens(), u64::from(self.answer(at)));
            self.bound_tokens += found;
            self.prompt_tokens += tokens.0;
            self.answer_tokens += tokens.1;
        }
    }

    /// How many requests there are.
    pub fn len(&self) -> usize {
        self.arrivals.len()
    }

    /// Whether there are none; never.
    pub fn is_empty(&self) -> bool {
        self.arrivals.is_empty()
    }

    /// How it was made.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// When this request comes.
    pub fn at(&self, request: usize) -> Ns {
        self.arrivals[request].at
    }

    /// The last one's.
    pub fn last(&self) -> Ns {
        self.arrivals.last().map_or(0, |arrival| arrival.at)
    }

    /// Tokens of its prompt, one at least.
    pub fn prompt(&self, request: usize) -> u32 {
        self.request(request).prompt_tokens.max(1)
    }

    /// Tokens of its answer, one at least.
    pub fn answer(&self, request: usize) -> u32 {
        self.request(request).answer_tokens.max(1)
    }

    /// The conversation that it belongs to.
    pub fn session(&self, request: usize) -> u64 {
        mix(self.arrivals[request].session.into())
    }

    /// Its prompt's blocks.
    pub fn blocks(&self, request: usize) -> Blocks<'_> {
        let Arrival { base, .. } = self.arrivals[request];
        let Shape { unique, block_tokens, .. } = self.shape;
        Blocks::new(&self.request(request).blocks, base, unique, block_tokens, self.prompt(request))
    }

    fn request(&self, request: usize) -> &Request {
        &self.trace.requests[self.arrivals[request].request as usize]
    }
}

/// A trace does not say which requests belong to one conversation. One that goes on where an earlier prompt ended does: it
/// begins with all of that one's blocks but the last, which an answer has filled up since.
fn sessions(requests: &[Request]) -> (Vec<u32>, u32) {
    // The last request with this block: its session, and its blocks.
    let mut owners: HashMap<u32, (u32, usize)> = HashMap::new();
    let mut next = 0;
    let sessions = requests.iter().map(|request| {
        let known = request.blocks.iter().take_while(|block| owners.contains_key(block)).count();
        let owner = known.checked_sub(1).map(|last| owners[&request.blocks[last]]);
        let session = match owner {
            Some((session, blocks)) if known + 1 >= blocks => session,
            _ => {
                next += 1;
                next - 1
            }
        };
        for &block in &request.blocks {
            owners.insert(block, (session, request.blocks.len()));
        }
        session
    });
    (sessions.collect(), next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(text: &str) -> Trace {
        Trace::read(text.as_bytes()).unwrap()
    }

    const SHARED: &str = "0 1200 10 0-2\n1000 2000 10 0-1 3-4\n2000 1200 10 0-2\n";

    #[test]
    fn the_bound_is_what_came_before_and_never_a_whole_prompt() {
        let workload = Workload::new(trace(SHARED), Shape::default()).unwrap();
        assert_eq!(workload.bound_tokens, 1024 + 1199);
        let unique = Workload::new(trace(SHARED), Shape { unique: true, copies: 3, ..Shape::default() }).unwrap();
        assert_eq!((unique.bound_tokens, unique.len(), unique.distinct), (0, 9, 30));
        let copies = Workload::new(trace(SHARED), Shape { copies: 3, ..Shape::default() }).unwrap();
        assert_eq!((copies.bound_tokens, copies.distinct), (3 * workload.bound_tokens, 15));
    }

    #[test]
    fn time_goes_faster_and_begins_at_nothing() {
        let late = "5000 10 1 0\n7000 10 1 1\n";
        let workload = Workload::new(trace(late), Shape { speed: 4.0, ..Shape::default() }).unwrap();
        assert_eq!((workload.at(0), workload.at(1)), (0, 500_000_000));
    }

    #[test]
    fn who_goes_on_where_another_ended_belongs_to_the_same_conversation() {
        // The second goes on, the third shares a system prompt only, the fourth goes on with the third.
        let text = "0 2000 9 0-3\n1 2900 9 0-2 4-6\n2 2000 9 0 7-9\n3 2600 9 0 7-8 10-12\n";
        let (sessions, count) = sessions(&trace(text).requests);
        assert_eq!((sessions, count), (vec![0, 0, 1, 1], 2));
    }

    #[test]
    fn what_is_too_much_is_refused_before_it_is_made() {
        let error = |shape| Workload::new(trace(SHARED), shape).unwrap_err().to_string();
        assert!(error(Shape { speed: f64::NAN, ..Shape::default() }).contains("speed NaN"));
        assert!(error(Shape { copies: u32::MAX, ..Shape::default() }).contains("copies of 3 requests"));
        assert!(error(Shape { copies: 0, ..Shape::default() }).contains("0 copies"));
        assert!(error(Shape { limit: Some(0), ..Shape::default() }).contains("no requests"));
        assert!(error(Shape { block_tokens: 0, ..Shape::default() }).contains("one token"));
        let late = Workload::new(trace("18446744073709551615 1 1 0"), Shape::default());
        assert!(matches!(late, Err(Error::Time { request: 1, .. })));
    }

    #[test]
    fn names_that_a_prompt_does_not_reach_are_left_out() {
        let blocks = Blocks::new(&[5, 6, 7], 100, false, 512, 600);
        assert_eq!(blocks.iter().collect::<Vec<_>>(), [(105, 512), (106, 88)]);
        assert_eq!(Blocks::new(&[5, 6, 7], 100, true, 512, 600).get(1), 101);
    }
}
