//! The requests under way, for operators: who has them, how far they are, and an end to one that should not go on.
//!
//! ```text
//!   App::admit ─▶ Tracked (received ─▶ queued ─▶ prefill ─▶ decoding) ─▶ dropped with the answer
//!                    └─ Story: what became of it, remembered for a while after its end
//! ```
//!
//! There are as many as `limits.max_inflight` lets in. What a request says is not here: its name, its owner, numbers. A token
//! costs one addition to a counter that nobody else writes.

use std::{
    collections::BTreeMap,
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
};

use kvasir_runtime::{
    Shutdown,
    story::{Fact, Stories, Story},
};
use kvasir_types::RequestId;
use serde::Serialize;
use serde_json::{Value, json};

/// Stories that are remembered.
const STORIES: usize = 2048;
/// Stories of one name that are told.
const OF_ONE_NAME: usize = 16;

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// It is being read.
    Received,
    /// It waits for its turn.
    Queued,
    /// A worker has it; there is no token yet.
    Prefill,
    /// Tokens come.
    Decoding,
}

const STATES: [State; 4] = [State::Received, State::Queued, State::Prefill, State::Decoding];

/// One request under way.
pub(crate) struct Entry {
    number: u64,
    tenant: String,
    /// What became of it so far.
    pub(crate) story: Arc<Story>,
    /// Given when an operator ends it.
    pub(crate) cancel: Shutdown,
    state: AtomicU8,
    /// Written by the task that has the request; read by whoever asks.
    tokens: AtomicU64,
    known: Mutex<Known>,
}

/// What is known of it by now. Written a few times in a request's life.
#[derive(Default)]
struct Known {
    model: String,
    prompt_tokens: usize,
    worker: String,
    prefill: String,
}

/// A request, as operators see it.
#[derive(Debug, Serialize)]
pub(crate) struct Shown {
    id: String,
    tenant: String,
    model: String,
    state: State,
    worker: String,
    prefill: String,
    prompt_tokens: usize,
    tokens: u64,
    age_ms: u64,
}

/// A request, also one that is over, as its story has it. Its field names are a public surface.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Recent {
    id: String,
    began_unix_us: u64,
    /// Until its last step; of one that is not over, until now.
    took_us: u64,
    over: bool,
    /// Its last step.
    step: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    why: String,
    tenant: String,
    model: String,
    /// Who had it last.
    worker: String,
    prefill: String,
    prompt_tokens: f64,
    output_tokens: f64,
    /// Times it went on elsewhere.
    moves: usize,
}

impl Recent {
    fn of(story: &Story) -> Self {
        let (steps, over) = story.read();
        let took = steps.last().filter(|_| over).map_or_else(|| story.began.elapsed(), |last| last.at);
        let mut recent = Self {
            id: story.id.clone(),
            began_unix_us: story.began_unix_us,
            took_us: took.as_micros() as u64,
            over,
            ..Self::default()
        };
        for step in steps {
            recent.step = step.name;
            recent.why.clear();
            recent.moves += usize::from(step.name == "moves");
            for (name, fact) in step.facts {
                match (step.name, name, fact) {
                    ("placed", "worker", Fact::Text(text)) => recent.worker = text,
                    ("placed", "prefill", Fact::Text(text)) => recent.prefill = text,
                    (_, "tenant", Fact::Text(text)) => recent.tenant = text,
                    (_, "model", Fact::Text(text)) => recent.model = text,
                    (_, "why", Fact::Text(text)) => recent.why = text,
                    (_, "prompt_tokens", Fact::Number(number)) => recent.prompt_tokens = number,
                    (_, "output_tokens", Fact::Number(number)) => recent.output_tokens = number,
                    _ => {}
                }
            }
        }
        recent
    }
}

impl Entry {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, state: State) {
        self.state.store(state as u8, Relaxed);
    }

    /// It was read, and waits for its turn.
    pub(crate) fn queued(&self, model: &str, prompt_tokens: usize) {
        let mut known = self.known();
        (known.model, known.prompt_tokens) = (model.to_owned(), prompt_tokens);
        drop(known);
        self.enter(State::Queued);
        self.story.tell("tokenized", [("model", model.into()), ("prompt_tokens", prompt_tokens.into())]);
    }

    /// A worker is asked for it, or for what is left of it.
    pub(crate) fn placed(&self, worker: &str, prefill: &str, reason: &'static str, cached_tokens: u32) {
        let mut known = self.known();
        (known.worker, known.prefill) = (worker.to_owned(), prefill.to_owned());
        drop(known);
        if self.state.load(Relaxed) != State::Decoding as u8 {
            self.enter(State::Prefill);
        }
        let facts =
            [("worker", worker), ("prefill", prefill), ("reason", reason)].map(|(name, text)| (name, text.into()));
        let [worker, prefill, reason] = facts;
        self.story.tell("placed", [worker, prefill, reason, ("expected_cached_tokens", cached_tokens.into())]);
    }

    /// A token came.
    pub(crate) fn token(&self) {
        if self.tokens.fetch_add(1, Relaxed) == 0 {
            self.enter(State::Decoding);
            self.story.tell("first token", []);
        }
    }

    fn shown(&self) -> Shown {
        let known = self.known();
        Shown {
            id: self.story.id.clone(),
            tenant: self.tenant.clone(),
            model: known.model.clone(),
            state: STATES[usize::from(self.state.load(Relaxed)).min(STATES.len() - 1)],
            worker: known.worker.clone(),
            prefill: known.prefill.clone(),
            prompt_tokens: known.prompt_tokens,
            tokens: self.tokens.load(Relaxed),
            age_ms: self.story.began.elapsed().as_millis() as u64,
        }
    }
}

/// All requests under way, and the stories of those and of the last ones before them.
pub(crate) struct Requests {
    live: Arc<Mutex<Live>>,
    stories: Stories,
}

#[derive(Default)]
struct Live {
    next: u64,
    by_number: BTreeMap<u64, Arc<Entry>>,
}

fn lock(live: &Mutex<Live>) -> MutexGuard<'_, Live> {
    live.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Requests {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self { live: Arc::default(), stories: Stories::new(STORIES) }
    }

    /// One was let in. It is under way until the guard is dropped.
    pub(crate) fn begin(&self, id: &RequestId, tenant: &str, endpoint: &str) -> Tracked {
        let story = self.stories.begin(id.as_str(), "router");
        story.tell("received", [("endpoint", endpoint.into()), ("tenant", tenant.into())]);
        let mut live = lock(&self.live);
        let number = live.next;
        live.next += 1;
        let entry = Arc::new(Entry {
            number,
            tenant: tenant.to_owned(),
            story,
            cancel: Shutdown::new(),
            state: AtomicU8::new(State::Received as u8),
            tokens: AtomicU64::new(0),
            known: Mutex::default(),
        });
        live.by_number.insert(number, Arc::clone(&entry));
        Tracked { entry, live: Arc::clone(&self.live) }
    }

    /// The oldest ones, so many at most, and how many there are.
    pub(crate) fn list(&self, limit: usize) -> (Vec<Shown>, usize) {
        let (entries, count) = {
            let live = lock(&self.live);
            (live.by_number.values().take(limit).cloned().collect::<Vec<_>>(), live.by_number.len())
        };
        (entries.iter().map(|entry| entry.shown()).collect(), count)
    }

    /// Those of that name.
    pub(crate) fn find(&self, id: &str) -> Vec<Shown> {
        self.named(id).iter().map(|entry| entry.shown()).collect()
    }

    /// Ends those of that name; how many.
    pub(crate) fn cancel(&self, id: &str) -> usize {
        let named = self.named(id);
        named.iter().for_each(|entry| entry.cancel.trigger());
        named.len()
    }

    fn named(&self, id: &str) -> Vec<Arc<Entry>> {
        lock(&self.live).by_number.values().filter(|entry| entry.story.id == id).cloned().collect()
    }

    /// The last ones, whether they are over or not, the latest first.
    pub(crate) fn latest(&self, limit: usize) -> Vec<Recent> {
        self.stories.last(limit).iter().map(|story| Recent::of(story)).collect()
    }

    /// What became of those of that name.
    pub(crate) fn stories(&self, id: &str) -> Vec<Value> {
        let told = |story: Arc<Story>| {
            let (steps, over) = story.read();
            let steps: Vec<Value> = steps
                .into_iter()
                .map(|step| {
                    let fact = |fact: Fact| match fact {
                        Fact::Text(text) => json!(text),
                        Fact::Number(number) => json!(number),
                    };
                    let facts: BTreeMap<_, _> =
                        step.facts.into_iter().map(|(name, known)| (name, fact(known))).collect();
                    json!({ "at_us": step.at.as_micros() as u64, "step": step.name, "facts": facts })
                })
                .collect();
            json!({ "part": story.part, "began_unix_us": story.began_unix_us, "over": over, "steps": steps })
        };
        self.stories.find(id, OF_ONE_NAME).into_iter().map(told).collect()
    }
}

/// A request's place in the list, for as long as it is under way.
pub(crate) struct Tracked {
    entry: Arc<Entry>,
    live: Arc<Mutex<Live>>,
}

impl Tracked {
    /// For those who have something to tell of it.
    pub(crate) fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }
}

impl Deref for Tracked {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        lock(&self.live).by_number.remove(&self.entry.number);
        // Unless its end was told already.
        let tokens = self.entry.tokens.load(Relaxed);
        self.entry.story.end("left", [("output_tokens", tokens.into())]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_listed_while_it_is_under_way_and_its_story_is_told_afterwards() {
        let requests = Requests::new();
        let id: RequestId = "r-1".parse().unwrap();
        let one = requests.begin(&id, "acme", "chat");
        let other = requests.begin(&"r-2".parse().unwrap(), "", "chat");
        one.queued("demo", 7);
        one.placed("decode-0", "prefill-0", "cache", 4);
        let shown = |requests: &Requests| serde_json::to_value(requests.find("r-1")).unwrap()[0].clone();
        let now = shown(&requests);
        assert_eq!(
            (&now["state"], &now["worker"], &now["tenant"]),
            (&json!("prefill"), &json!("decode-0"), &json!("acme"))
        );
        (0..3).for_each(|_| one.token());
        let now = shown(&requests);
        assert_eq!((&now["state"], &now["tokens"], &now["prompt_tokens"]), (&json!("decoding"), &json!(3), &json!(7)));
        assert_eq!((requests.list(1).0.len(), requests.list(9).1), (1, 2));

        assert_eq!((requests.cancel("r-1"), requests.cancel("nobody")), (1, 0));
        assert!(one.cancel.is_triggered() && !other.cancel.is_triggered());
        drop(one);
        assert_eq!((requests.list(9).1, requests.cancel("r-1")), (1, 0));
        let story = &requests.stories("r-1")[0];
        let names: Vec<_> =
            story["steps"].as_array().unwrap().iter().map(|step| step["step"].as_str().unwrap()).collect();
        assert_eq!(names, ["received", "tokenized", "placed", "first token", "left"]);
        assert_eq!(story["steps"][2]["facts"]["reason"], "cache");
        assert_eq!(story["steps"][4]["facts"]["output_tokens"], 3.0);

        let latest = serde_json::to_value(requests.latest(9)).unwrap();
        assert_eq!(
            (&latest[0]["id"], &latest[0]["step"], &latest[0]["over"]),
            (&json!("r-2"), &json!("received"), &json!(false))
        );
        let ended = &latest[1];
        assert_eq!((&ended["id"], &ended["step"], &ended["over"]), (&json!("r-1"), &json!("left"), &json!(true)));
        assert_eq!((&ended["worker"], &ended["prefill"]), (&json!("decode-0"), &json!("prefill-0")));
        assert_eq!((&ended["prompt_tokens"], &ended["output_tokens"]), (&json!(7.0), &json!(3.0)));
        assert_eq!(requests.latest(1).len(), 1);
    }
}
