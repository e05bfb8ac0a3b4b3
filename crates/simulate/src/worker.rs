//! One modelled worker: prompts and answers are computed in steps, one after the other.
//!
//! ```text
//!   prompts ──in turn, up to chunk_tokens a step──▶ ┌──────┐ ──▶ prompt done
//!                                                   │ step │
//!   answers ──all of them, one token each─────────▶ └──────┘ ──▶ answer done
//! ```
//!
//! One model for both roles: a prefill worker is one that nobody gives answers to. Where a step would be followed by others
//! just like it (answers only, and none of them ends), many are taken as one; who comes in between
//! ([`Worker::interrupt`]) has to wait for the end of the step that is under way then, as if they had been taken one by one.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
};

use crate::{
    profile::Profile,
    room::{Hold, Room},
    workload::{Ns, Workload, nanos, seconds},
};

/// Busy seconds after which what was measured before counts half, as workers measure it.
const HALF_LIFE_SECONDS: f64 = 2.0;
/// Steps with fewer tokens of prompts tell nothing of how fast prompts are computed.
const TELLING_TOKENS: u64 = 64;

/// A prompt that is being computed.
#[derive(Clone, Copy, Debug)]
pub struct Prompt {
    /// Whose.
    pub request: u32,
    /// Tokens that need not be computed (any more).
    pub done: u32,
    /// All of them.
    pub tokens: u32,
    /// Where it began.
    pub from: u32,
    /// Memory for it.
    pub hold: Hold,
    /// Whether its first step has begun.
    pub begun: bool,
}

/// What came of a step.
#[derive(Clone, Copy, Debug)]
pub enum Done {
    /// Tokens of a prompt, from the step's begin to its end.
    Chunk {
        /// The prompt, as it is now.
        prompt: Prompt,
        /// How many.
        tokens: u32,
        /// Since when.
        began: Ns,
    },
    /// The last token of an answer.
    Answer {
        /// Whose.
        request: u32,
    },
}

/// So much in so much time, where what was measured lately counts more.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    amount: f64,
    seconds: f64,
}

impl Rate {
    fn add(&mut self, amount: f64, took: f64) {
        let fade = (-took / HALF_LIFE_SECONDS).exp2();
        self.amount = self.amount * fade + amount;
        self.seconds = self.seconds * fade + took;
    }
}

/// A step, or several that are alike, under way.
#[derive(Debug)]
struct Step {
    began: Ns,
    ends: Ns,
    steps: u64,
    /// Tokens of prompts, by place in the queue.
    chunk: Vec<(u32, u32)>,
    /// Seconds of the first of these steps, and how much longer each one takes than the one before it.
    first: f64,
    slope: f64,
    /// Tokens before those of the chunk, summed.
    before: f64,
}

impl Step {
    /// When so many of its steps are over.
    fn end_of(&self, steps: u64) -> Ns {
        let count = steps as f64;
        self.began + nanos(count * self.first + self.slope * count * (count - 1.0) / 2.0).max(1)
    }
}

/// What a worker has done since the beginning.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Time that it computed.
    pub busy: Ns,
    /// Tokens of prompts that it computed.
    pub prompt_tokens: u64,
    /// Tokens of answers.
    pub answer_tokens: u64,
    /// Prompts whose last token was computed.
    pub prompts: u64,
    /// Of steps that are long enough to tell: tokens of prompts, the tokens before each of them, and their share of the time.
    pub timed_tokens: u64,
    /// See `timed_tokens`.
    pub timed_positions: f64,
    /// See `timed_tokens`.
    pub timed_seconds: f64,
    /// Steps with answers only: how many, their time, the answers in them, the tokens before those.
    pub plain_steps: u64,
    /// See `plain_steps`.
    pub plain_seconds: f64,
    /// See `plain_steps`.
    pub plain_answers: u64,
    /// See `plain_steps`.
    pub plain_context: f64,
}

impl Totals {
    /// So many more steps with so many answers, which had `context` tokens before them at first.
    fn plain(&mut self, steps: u64, answers: u64, context: u64, seconds: f64) {
        let count = steps as f64;
        self.plain_steps += steps;
        self.plain_seconds += seconds;
        self.plain_answers += answers * steps;
        self.plain_context += count * context as f64 + answers as f64 * count * (count - 1.0) / 2.0;
    }
}

/// See the module's page.
#[derive(Debug)]
pub struct Worker {
    /// Its memory.
    pub room: Room,
    /// Those that wait for memory, in turn.
    pub waiting: VecDeque<u32>,
    /// Tokens of their prompts, as far as it will compute them.
    pub waiting_tokens: u64,
    /// Requests that hold memory.
    pub holding: u32,
    /// When all that was written into other workers' memory so far is there.
    pub link_free: Ns,
    /// So that an event for a step that was cut short is known by its number.
    pub generation: u32,
    /// What it has done.
    pub totals: Totals,
    prompts: VecDeque<Prompt>,
    /// Tokens that they lack.
    lacking: u64,
    joining: Vec<(u32, u32, u32)>,
    /// By the number of the step that ends them: the request, and its context then.
    answers: BinaryHeap<Reverse<(u64, u32, u64)>>,
    /// Tokens before the next one, of all answers.
    context: u64,
    steps: u64,
    step: Option<Step>,
    prefill: Rate,
    decode: Rate,
}

impl Worker {
    /// An idle one with room for so many tokens.
    pub fn new(room_tokens: u64) -> Self {
        Self {
            room: Room::new(room_tokens),
            waiting: VecDeque::new(),
            waiting_tokens: 0,
            holding: 0,
            link_free: 0,
            generation: 0,
            totals: Totals::default(),
            prompts: VecDeque::new(),
            lacking: 0,
            joining: Vec::new(),
            answers: BinaryHeap::new(),
            context: 0,
            steps: 0,
            step: None,
            prefill: Rate::default(),
            decode: Rate::default(),
        }
    }

    /// Prompt tokens that it is computing.
    pub fn prefilling_tokens(&self) -> u64 {
        self.lacking
    }

    /// Tokens of prompts in a second, as measured lately; 0: not yet.
    pub fn prefill_speed(&self) -> f64 {
        if self.prefill.seconds > 0.0 { self.prefill.amount / self.prefill.seconds } else { 0.0 }
    }

    /// From one token of an answer to its next, as measured lately; 0: not yet.
    pub fn step_seconds(&self) -> f64 {
        if self.decode.amount > 0.0 { self.decode.seconds / self.decode.amount } else { 0.0 }
    }

    /// One more prompt to compute.
    pub fn compute(&mut self, prompt: Prompt) {
        self.lacking += u64::from(prompt.tokens - prompt.done);
        self.prompts.push_back(prompt);
    }

    /// One more answer: its next token comes after `context` tokens, and `left` of them are to come.
    pub fn answer(&mut self, request: u32, context: u32, left: u32) {
        self.joining.push((request, context, left));
    }

    /// Somebody came: many steps that were taken as one end with the one that is under way now. When that is, if it changed.
    pub fn interrupt(&mut self, now: Ns) -> Option<Ns> {
        let step = self.step.as_mut().filter(|step| step.steps > 1)?;
        let mut steps = guess(step, now);
        // What was computed in other ways may be off by one.
        while steps > 1 && step.end_of(steps - 1) >= now {
            steps -= 1;
        }
        while steps < step.steps && step.end_of(steps) < now {
            steps += 1;
        }
        if steps >= step.steps {
            return None;
        }
        (step.steps, step.ends) = (steps, step.end_of(steps));
        self.generation += 1;
        Some(step.ends)
    }

    /// Begins a step, if none is under way and there is something to do. When it ends.
    pub fn begin(&mut self, now: Ns, profile: &Profile, workload: &Workload) -> Option<Ns> {
        if self.step.is_some() {
            return None;
        }
        for (request, context, left) in std::mem::take(&mut self.joining) {
            let ends = self.steps + u64::from(left);
            self.context += u64::from(context);
            self.answers.push(Reverse((ends, request, u64::from(context) + u64::from(left))));
        }
        let (chunk, tokens, before) = self.fill(profile, workload);
        let answers = self.answers.len() as u64;
        if tokens == 0 && answers == 0 {
            return None;
        }
        let first = profile.step(tokens, before, answers, self.context as f64);
        let (mut steps, mut slope) = (1, 0.0);
        if let (0, Some(Reverse((ends, ..)))) = (tokens, self.answers.peek()) {
            (steps, slope) = (ends - self.steps, profile.decode.context_seconds * answers as f64);
        }
        let mut step = Step { began: now, ends: 0, steps, chunk, first, slope, before };
        step.ends = step.end_of(steps);
        self.generation += 1;
        let ends = step.ends;
        self.step = Some(step);
        Some(ends)
    }

    /// Tokens of prompts for the next step, in turn.
    fn fill(&mut self, profile: &Profile, workload: &Workload) -> (Vec<(u32, u32)>, u64, f64) {
        let Profile { prefill, decode, .. } = profile;
        let mut left = if self.answers.is_empty() { prefill.chunk_tokens } else { decode.chunk_tokens };
        let (mut chunk, mut before) = (Vec::new(), 0.0);
        let whole = left;
        for (at, prompt) in self.prompts.iter_mut().enumerate() {
            if left == 0 {
                break;
            }
            if !prompt.begun {
                // What others have computed since it came: those who came together compute what they share once.
                prompt.begun = true;
                let blocks = workload.blocks(prompt.request as usize);
                self.room.extend(&mut prompt.hold, blocks);
                let found = blocks.tokens_of(prompt.hold.blocks).min(u64::from(prompt.tokens) - 1) as u32;
                self.lacking -= u64::from(found.saturating_sub(prompt.done));
                prompt.done = prompt.done.max(found);
                prompt.from = prompt.done;
            }
            let tokens = left.min(prompt.tokens - prompt.done);
            left -= tokens;
            before += f64::from(tokens) * (f64::from(prompt.done) + f64::from(tokens) / 2.0);
            chunk.push((at as u32, tokens));
        }
        (chunk, u64::from(whole - left), before)
    }

    /// The step that is under way is over.
    pub fn finish(&mut self, now: Ns, done: &mut Vec<Done>) {
        let Some(step) = self.step.take() else { return };
        let (took, answers) = (now - step.began, self.answers.len() as u64);
        if answers > 0 && step.chunk.is_empty() {
            self.totals.plain(step.steps, answers, self.context, seconds(took));
        }
        self.steps += step.steps;
        self.context += answers * step.steps;
        self.totals.busy += took;
        self.totals.answer_tokens += answers * step.steps;
        if answers > 0 {
            self.decode.add(step.steps as f64, seconds(took));
        }
        while let Some(&Reverse((ends, request, context))) = self.answers.peek()
            && ends <= self.steps
        {
            self.answers.pop();
            self.context -= context;
            done.push(Done::Answer { request });
        }
        let mut tokens = 0;
        for &(at, count) in &step.chunk {
            let prompt = &mut self.prompts[at as usize];
            prompt.done += count;
            tokens += u64::from(count);
            self.totals.prompts += u64::from(prompt.done == prompt.tokens);
            done.push(Done::Chunk { prompt: *prompt, tokens: count, began: step.began });
        }
        self.lacking -= tokens;
        self.totals.prompt_tokens += tokens;
        if tokens >= TELLING_TOKENS {
            // Divided between prompts and answers by their tokens, as workers do.
            let share = tokens as f64 / (tokens + answers) as f64;
            self.prefill.add(tokens as f64, seconds(took) * share);
            self.totals.timed_tokens += tokens;
            self.totals.timed_positions += step.before;
            self.totals.timed_seconds += seconds(took) * share;
        }
        if !step.chunk.is_empty() {
            self.prompts.retain(|prompt| prompt.done < prompt.tokens);
        }
    }

    /// What it has done until now, with those steps that are over of many that were taken as one.
    pub fn done(&self, now: Ns) -> Totals {
        let mut all = self.totals;
        if let Some(step) = self.step.as_ref().filter(|step| step.chunk.is_empty()) {
            let mut steps = guess(step, now);
            while steps > 0 && step.end_of(steps) > now {
                steps -= 1;
            }
            if steps > 0 {
                let answers = self.answers.len() as u64;
                all.plain(steps, answers, self.context, seconds(step.end_of(steps) - step.began));
                all.answer_tokens += answers * steps;
            }
        }
        all
    }
}

/// The number of the step that is under way at this moment, about: where `n first + slope n (n - 1) / 2` reaches it.
fn guess(step: &Step, now: Ns) -> u64 {
    let (elapsed, slope) = (seconds(now - step.began), step.slope);
    let linear = step.first - slope / 2.0;
    let count = match slope > 0.0 {
        true => ((linear * linear + 2.0 * slope * elapsed).sqrt() - linear) / slope,
        false => elapsed / step.first,
    };
    (count.ceil() as u64).clamp(1, step.steps)
}

#[cfg(test)]
mod tests {
    use kvasir_replay::trace::Trace;
    use proptest::prelude::*;

    use super::*;
    use crate::{profile, workload::Shape};

    fn profile() -> Profile {
        Profile::read(Profile::named(profile::DEFAULT).unwrap(), &[]).unwrap()
    }

    fn workload() -> Workload {
        let text = "0 3000 5 0-5\n0 9000 5 0-5 6-17\n";
        Workload::new(Trace::read(text.as_bytes()).unwrap(), Shape::default()).unwrap()
    }

    /// Lets it run for as long as it has something to do; when each answer ended, and when each prompt was done.
    fn run(worker: &mut Worker, mut now: Ns, until: Ns, profile: &Profile) -> Vec<(u32, Ns)> {
        let (mut ended, mut done) = (Vec::new(), Vec::new());
        while let Some(ends) =
            worker.step.as_ref().map(|step| step.ends).or_else(|| worker.begin(now, profile, &workload()))
        {
            if ends > until {
                break;
            }
            now = ends;
            worker.finish(now, &mut done);
            for done in done.drain(..) {
                match done {
                    Done::Answer { request } => ended.push((request, now)),
                    Done::Chunk { prompt, .. } if prompt.done == prompt.tokens => ended.push((prompt.request, now)),
                    Done::Chunk { .. } => {}
                }
            }
        }
        ended
    }

    proptest! {
        #[test]
        fn many_steps_taken_as_one_take_as_long_as_one_by_one(
            first in (1u32..9000, 1u32..300), second in (1u32..9000, 1u32..300), at_ms in 1u64..8000,
        ) {
            let profile = profile();
            let mut worker = Worker::new(1 << 30);
            worker.answer(0, first.0, first.1);
            let at = at_ms * 1_000_000;
            let mut ended = run(&mut worker, 0, at, &profile);
            worker.interrupt(at);
            worker.answer(1, second.0, second.1);
            ended.extend(run(&mut worker, at, Ns::MAX, &profile));

            // Step by step.
            let (mut now, mut running, mut came, mut expected) = (0.0, vec![(0, first.0, first.1)], false, Vec::new());
            loop {
                if !came && (now >= at as f64 / 1e9 || running.is_empty()) {
                    came = true;
                    now = f64::max(now, at as f64 / 1e9);
                    running.push((1, second.0, second.1));
                }
                if running.is_empty() {
                    break;
                }
                let context: u32 = running.iter().map(|answer| answer.1).sum();
                now += profile.step(0, 0.0, running.len() as u64, f64::from(context));
                running.iter_mut().for_each(|answer| (answer.1, answer.2) = (answer.1 + 1, answer.2 - 1));
                running.retain(|answer| {
                    if answer.2 == 0 {
                        expected.push((answer.0, now));
                    }
                    answer.2 > 0
                });
            }
            prop_assert_eq!(ended.len(), 2);
            for ((request, at), (name, expected)) in ended.iter().zip(&expected) {
                prop_assert_eq!(request, name);
                // A nanosecond is lost where one run of steps ends and another begins.
                prop_assert!((seconds(*at) - expected).abs() < 1e-8, "{} is not {}", seconds(*at), expected);
            }
            prop_assert_eq!((worker.context, worker.answers.len()), (0, 0));
        }
    }

    #[test]
    fn prompts_take_turns_and_what_they_share_is_computed_once() {
        let (profile, workload) = (profile(), workload());
        let mut worker = Worker::new(1 << 20);
        for request in 0..2 {
            let blocks = workload.blocks(request);
            let hold = worker.room.hold(blocks, 0).unwrap();
            let tokens = blocks.tokens() as u32;
            worker.compute(Prompt { request: request as u32, done: 0, tokens, from: 0, hold, begun: false });
        }
        assert_eq!(worker.prefilling_tokens(), 12_000);
        let mut done = Vec::new();
        let ends = worker.begin(0, &profile, &workload).unwrap();
        worker.finish(ends, &mut done);
        // 8192 tokens: the first one whole, and the beginning of the second.
        let Done::Chunk { prompt, tokens, .. } = done[0] else { panic!("{done:?}") };
        assert_eq!((prompt.request, tokens), (0, 3000));
        let Done::Chunk { prompt, tokens, .. } = done[1] else { panic!("{done:?}") };
        assert_eq!((prompt.request, tokens, worker.prefilling_tokens()), (1, 5192, 9000 - 5192));
        assert!(worker.prefill_speed() > 1000.0);
        assert_eq!(run(&mut worker, ends, Ns::MAX, &profile).len(), 1);
        assert_eq!(worker.totals.prompt_tokens, 12_000);

        // One that comes when the first is there: five of its blocks and part of the sixth are found.
        let mut worker = Worker::new(1 << 20);
        let mut late = worker.room.hold(workload.blocks(1), 0).unwrap();
        let mut first = worker.room.hold(workload.blocks(0), 0).unwrap();
        worker.room.fill(&mut first, workload.blocks(0));
        worker.compute(Prompt { request: 1, done: 0, tokens: 9000, from: 0, hold: late, begun: false });
        worker.begin(0, &profile, &workload);
        assert_eq!(worker.prefilling_tokens(), 9000 - 6 * 512);
        late = worker.prompts[0].hold;
        assert_eq!(late.blocks, 6);
    }

    #[test]
    fn who_comes_waits_for_the_step_under_way_only() {
        let profile = profile();
        let mut worker = Worker::new(1 << 20);
        worker.answer(0, 1000, 1000);
        let whole = worker.begin(0, &profile, &workload()).unwrap();
        let end = worker.interrupt(1_000_000_000).unwrap();
        assert!((1_000_000_000..1_030_000_000).contains(&end) && whole > 15_000_000_000, "{end} of {whole}");
        assert_eq!(worker.interrupt(1_000_000_001), None, "it is cut already");
    }
}
