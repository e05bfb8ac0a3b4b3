//! What is asked of a model's workers, and how fast they are: from what each of them tells, twice a second.

use std::{collections::HashMap, hash::Hash};

use super::{
    forecast::{Demand, Fleet},
    speeds::{Learned, Prompt, Speeds, Step, Totals},
};

/// What was asked so long ago counts half, in seconds.
const HALF_LIFE: f64 = 10.0;

/// A worker, as it tells. `W` names one life of one worker.
#[derive(Clone, Debug)]
pub struct Told<W> {
    /// Which.
    pub worker: W,
    /// What it has done since it started.
    pub totals: Totals,
    /// It reads prompts (else it writes answers).
    pub reads: bool,
    /// Prompt tokens that wait there.
    pub waiting_tokens: u64,
    /// Tokens that it has blocks for.
    pub room_tokens: u64,
    /// Requests there.
    pub requests: u32,
}

impl<W> Told<W> {
    /// What it has to do, as a plan weighs it.
    pub fn work(&self) -> f64 {
        if self.reads { self.waiting_tokens as f64 } else { f64::from(self.requests) }
    }
}

/// Of one model's workers.
#[derive(Debug)]
pub struct Meter<W> {
    all: Learned,
    workers: HashMap<W, Known>,
    /// Seconds, and what was done in them; what is long ago counts less.
    seconds: f64,
    prompt_tokens: f64,
    prompts: f64,
    answer_tokens: f64,
    answers: f64,
    context: f64,
}

#[derive(Debug)]
struct Known {
    totals: Totals,
    learned: Learned,
}

impl<W> Default for Meter<W> {
    fn default() -> Self {
        Self {
            all: Learned::default(),
            workers: HashMap::new(),
            seconds: 0.0,
            prompt_tokens: 0.0,
            prompts: 0.0,
            answer_tokens: 0.0,
            answers: 0.0,
            context: 0.0,
        }
    }
}

impl<W: Clone + Eq + Hash> Meter<W> {
    /// What all workers tell now, `seconds` after the last time.
    pub fn observe(&mut self, seconds: f64, told: &[Told<W>]) {
        let fade = (-seconds / HALF_LIFE).exp2();
        for sum in [
            &mut self.seconds,
            &mut self.prompt_tokens,
            &mut self.prompts,
            &mut self.answer_tokens,
            &mut self.answers,
            &mut self.context,
        ] {
            *sum *= fade;
        }
        self.seconds += seconds;
        let before = std::mem::take(&mut self.workers);
        for worker in told {
            let known = before.get(&worker.worker);
            let mut learned = known.map_or_else(Learned::default, |known| known.learned);
            // Of one that is new, what it did before is not known to have been now.
            let done = known.and_then(|known| worker.totals.since(&known.totals));
            if let Some(done) = done {
                learned.add(&done);
                self.all.add(&done);
                self.prompt_tokens += done.prefilled_tokens as f64;
                self.prompts += done.prefilled_prompts as f64;
                self.answer_tokens += done.sampled_tokens as f64;
                self.answers += done.plain_answers as f64;
                self.context += done.plain_context as f64;
            }
            self.workers.insert(worker.worker.clone(), Known { totals: worker.totals, learned });
        }
    }

    /// What is asked; `crowd` is how many times more would be, if all that wait were let in.
    pub fn demand(&self, told: &[Told<W>], crowd: f64) -> Demand {
        let per = |amount: f64, each: f64| if each > 0.0 { amount / each } else { 0.0 };
        Demand {
            prompt_tokens_per_second: per(self.prompt_tokens, self.seconds) * crowd,
            prompt_tokens: per(self.prompt_tokens, self.prompts),
            answer_tokens_per_second: per(self.answer_tokens, self.seconds) * crowd,
            context_tokens: per(self.context, self.answers),
            backlog_tokens: told.iter().filter(|worker| worker.reads).map(|worker| worker.waiting_tokens as f64).sum(),
        }
    }

    /// How fast this worker is; what it has not shown yet, it does like the others.
    pub fn speeds(&self, worker: &W) -> Speeds {
        let known = self.workers.get(worker);
        known.map_or_else(|| self.all.speeds(None), |known| known.learned.speeds(Some(&self.all)))
    }

    /// How fast all of them are, on average; `None` as long as nobody has shown it.
    pub fn fleet(&self, told: &[Told<W>]) -> Option<Fleet> {
        let speeds: Vec<Speeds> = told.iter().map(|worker| self.speeds(&worker.worker)).collect();
        let steps: Vec<Step> = speeds.iter().filter_map(|speeds| speeds.step).collect();
        let prompts: Vec<Prompt> = speeds.iter().filter_map(|speeds| speeds.prompt).collect();
        if steps.is_empty() || prompts.is_empty() {
            return None;
        }
        let step = |pick: fn(&Step) -> f64| steps.iter().map(pick).sum::<f64>() / steps.len() as f64;
        let prompt = |pick: fn(&Prompt) -> f64| prompts.iter().map(pick).sum::<f64>() / prompts.len() as f64;
        let room = told.iter().map(|worker| worker.room_tokens as f64).sum::<f64>();
        Some(Fleet {
            step: Step {
                base: step(|step| step.base),
                per_answer: step(|step| step.per_answer),
                per_context_token: step(|step| step.per_context_token),
            },
            prompt: Prompt {
                per_token: prompt(|prompt| prompt.per_token),
                per_place: prompt(|prompt| prompt.per_place),
            },
            room_tokens: room / told.len() as f64,
        })
    }

    /// Tokens that an answer looks back at.
    pub fn context(&self) -> f64 {
        if self.answers > 0.0 { self.context / self.answers } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(worker: &str, totals: Totals) -> Told<String> {
        Told {
            worker: worker.to_owned(),
            totals,
            reads: worker.starts_with('p'),
            waiting_tokens: 100,
            room_tokens: 5000,
            requests: 0,
        }
    }

    #[test]
    fn what_is_asked_is_what_was_done_lately_and_a_worker_that_is_new_brings_nothing_along() {
        let mut meter = Meter::<String>::default();
        let long_ago = Totals { prefilled_tokens: 1 << 40, sampled_tokens: 1 << 40, ..Totals::default() };
        assert_eq!(meter.fleet(&[]), None);
        let (mut reader, mut writer) = (long_ago, Totals::default());
        for _ in 0..200 {
            reader.prefilled_tokens += 1000;
            reader.prefilled_prompts += 2;
            reader.timed_tokens += 1000;
            reader.timed_positions += 250_000;
            reader.timed_seconds += 0.1;
            writer.sampled_tokens += 50;
            writer.plain_steps += 10;
            writer.plain_answers += 50;
            writer.plain_context += 50 * 700;
            writer.plain_seconds += 0.2;
            meter.observe(0.5, &[told("p", reader), told("d", writer)]);
        }
        let all = [told("p", reader), told("d", writer)];
        let demand = meter.demand(&all, 1.0);
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 0.01;
        assert!(near(demand.prompt_tokens_per_second, 2000.0) && near(demand.answer_tokens_per_second, 100.0));
        assert!(near(demand.prompt_tokens, 500.0) && near(demand.context_tokens, 700.0), "{demand:?}");
        assert_eq!(demand.backlog_tokens, 100.0, "of those that read");
        let fleet = meter.fleet(&all).unwrap();
        assert!(
            near(fleet.step.seconds(5.0, 700.0), 0.02) && near(fleet.prompt.seconds(500.0, 0.0), 0.05),
            "{fleet:?}"
        );
        assert_eq!(fleet.room_tokens, 5000.0);
        // Nobody asks any more.
        (0..200).for_each(|_| meter.observe(0.5, &all));
        assert!(meter.demand(&all, 1.0).prompt_tokens_per_second < 5.0);
        // Another life begins at nothing, and is as fast as was known of the others.
        let reborn = told("d, again", Totals::default());
        meter.observe(0.5, std::slice::from_ref(&reborn));
        assert!(meter.speeds(&reborn.worker).step.is_some());
    }
}
