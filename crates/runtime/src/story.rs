//! What became of requests, step by step, for those who ask afterwards: a bounded memory of the latest ones.
//!
//! ```text
//!   request ─▶ Story: received, admitted, placed on …, first token, …, ended      Stories: the last so many, by name
//! ```
//!
//! A story has a dozen steps, none of them for a token: telling one takes a short lock that nobody else holds but a reader,
//! and remembers some fifty bytes. What the request says is in none of them.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Most steps of a story; what comes then is counted only. A request that moves on and on has a long one.
const MAX_STEPS: usize = 64;
/// Longest text of a fact, in bytes.
const MAX_TEXT: usize = 256;

/// Something that is known of a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Fact {
    /// A name, a reason.
    Text(String),
    /// A number, with its unit in the fact's name.
    Number(f64),
}

impl From<&str> for Fact {
    fn from(text: &str) -> Self {
        let mut end = text.len().min(MAX_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self::Text(text[..end].to_owned())
    }
}

impl From<String> for Fact {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

macro_rules! numbers {
    ($($kind:ty),*) => {$(
        impl From<$kind> for Fact {
            fn from(number: $kind) -> Self {
                Self::Number(number as f64)
            }
        }
    )*};
}
numbers!(u32, u64, usize, f64);

impl From<Duration> for Fact {
    /// In milliseconds.
    fn from(time: Duration) -> Self {
        Self::Number((time.as_secs_f64() * 1e6).round() / 1e3)
    }
}

/// A step of a request's way.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Since the story began.
    pub at: Duration,
    /// What happened.
    pub name: &'static str,
    /// What is known of it.
    pub facts: Vec<(&'static str, Fact)>,
}

/// One request's way through this process.
#[derive(Debug)]
pub struct Story {
    /// The request's name. Clients may give one name to several requests.
    pub id: String,
    /// Which part of the way: `router`, `decode`, `prefill`.
    pub part: &'static str,
    /// When it began.
    pub began: Instant,
    /// The same by the clock on the wall, in microseconds since 1970.
    pub began_unix_us: u64,
    steps: Mutex<Steps>,
}

#[derive(Debug, Default)]
struct Steps {
    told: Vec<Step>,
    untold: u64,
    over: bool,
}

impl Story {
    fn new(id: String, part: &'static str) -> Self {
        let began_unix_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
        Self { id, part, began: Instant::now(), began_unix_us, steps: Mutex::default() }
    }

    fn steps(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A step, just now.
    pub fn tell<const N: usize>(&self, name: &'static str, facts: [(&'static str, Fact); N]) {
        let at = self.began.elapsed();
        let mut steps = self.steps();
        if steps.over || steps.told.len() >= MAX_STEPS {
            steps.untold += 1;
            return;
        }
        steps.told.push(Step { at, name, facts: facts.into() });
    }

    /// The last step; what comes after it is none.
    pub fn end<const N: usize>(&self, name: &'static str, facts: [(&'static str, Fact); N]) {
        let at = self.began.elapsed();
        let mut steps = self.steps();
        if !std::mem::replace(&mut steps.over, true) {
            steps.told.push(Step { at, name, facts: facts.into() });
        }
    }

    /// The steps so far, and whether there will be more.
    pub fn read(&self) -> (Vec<Step>, bool) {
        let steps = self.steps();
        (steps.told.clone(), steps.over)
    }
}

/// The latest stories. Cheap to clone; clones are the same.
#[derive(Clone, Debug)]
pub struct Stories(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Oldest first. Written where a request begins, searched by whoever asks for one.
    latest: Mutex<VecDeque<Arc<Story>>>,
    limit: usize,
}

impl Stories {
    /// Remembers the last so many.
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Inner { latest: Mutex::default(), limit: limit.max(1) }))
    }

    fn latest(&self) -> MutexGuard<'_, VecDeque<Arc<Story>>> {
        self.0.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request's story begins; the oldest one may be forgotten for it.
    pub fn begin(&self, id: impl Into<String>, part: &'static str) -> Arc<Story> {
        let story = Arc::new(Story::new(id.into(), part));
        let mut latest = self.latest();
        if latest.len() >= self.0.limit {
            latest.pop_front();
        }
        latest.push_back(Arc::clone(&story));
        story
    }

    /// The last so many, the latest one first.
    pub fn last(&self, limit: usize) -> Vec<Arc<Story>> {
        self.latest().iter().rev().take(limit).cloned().collect()
    }

    /// Those of a request, the earliest first, so many of the latest at most.
    pub fn find(&self, id: &str, limit: usize) -> Vec<Arc<Story>> {
        let mut found: Vec<_> =
            self.latest().iter().rev().filter(|story| story.id == id).take(limit).cloned().collect();
        found.reverse();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_latest_are_remembered_and_several_may_have_one_name() {
        let stories = Stories::new(3);
        for (at, id) in ["a", "b", "a", "c"].into_iter().enumerate() {
            stories.begin(id, "router").tell("received", [("at", at.into())]);
        }
        let at = |id: &str, limit| -> Vec<Fact> {
            stories.find(id, limit).iter().map(|story| story.read().0[0].facts[0].1.clone()).collect()
        };
        assert_eq!(at("a", 9), [Fact::Number(2.0)], "the first one is forgotten");
        assert_eq!((at("b", 9).len(), at("nobody", 9).len()), (1, 0));
        stories.begin("a", "router").tell("received", [("at", 9usize.into())]);
        assert_eq!(at("a", 9), [Fact::Number(2.0), Fact::Number(9.0)]);
        assert_eq!(at("a", 1), [Fact::Number(9.0)], "the latest");
        let last: Vec<String> = stories.last(2).iter().map(|story| story.id.clone()).collect();
        assert_eq!(last, ["a", "c"]);
    }

    #[test]
    fn a_story_is_bounded_and_over_when_it_has_ended() {
        let story = Stories::new(1).begin("a", "decode");
        for _ in 0..200 {
            story.tell("moved", [("why", "ü".repeat(200).into())]);
        }
        let (steps, over) = story.read();
        assert!(steps.len() == MAX_STEPS && !over);
        assert!(matches!(&steps[0].facts[0].1, Fact::Text(text) if text.len() == MAX_TEXT));
        story.end("finished", [("ms", Duration::from_micros(1_234).into())]);
        story.tell("late", []);
        story.end("again", []);
        let (steps, over) = story.read();
        assert!(over && steps.len() == MAX_STEPS + 1, "the end is always told, and told once");
        assert_eq!(steps.last().unwrap().facts, [("ms", Fact::Number(1.234))]);
        assert!(steps.windows(2).all(|pair| pair[0].at <= pair[1].at));
    }
}
