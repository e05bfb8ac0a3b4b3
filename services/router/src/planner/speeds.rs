//! What a worker does in a second, learned from what it has done: predictors of steps and prompts.
//!
//! ```text
//!   a step that computes next tokens only = base + per answer · answers + per token · tokens they look back at
//!   a prompt's tokens                     = per token · tokens + per place · the sum of their places
//! ```
//!
//! The first is what weights and activations and the KV cache's bytes cost, the second what the layers and attention do.
//! Workers tell totals ([`Totals`]); the differences between two moments are the measurements.

use super::fit::Fit;

/// A difference over less time than this tells nothing, in seconds.
const LEAST: f64 = 1e-4;

/// What a worker has done since it started, as it tells.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    /// Prompt tokens computed.
    pub prefilled_tokens: u64,
    /// Prompts of which the last token was computed.
    pub prefilled_prompts: u64,
    /// Tokens of prompts whose steps were timed.
    pub timed_tokens: u64,
    /// The sum of their places in their prompts.
    pub timed_positions: u64,
    /// How long they took, in seconds.
    pub timed_seconds: f64,
    /// Tokens of answers.
    pub sampled_tokens: u64,
    /// Steps that computed next tokens only.
    pub plain_steps: u64,
    /// How long they took, in seconds.
    pub plain_seconds: f64,
    /// The answers in them, summed over the steps.
    pub plain_answers: u64,
    /// The tokens that those look back at, summed over the steps.
    pub plain_context: u64,
}

impl From<&kvasir_proto::v1::WorkerTotals> for Totals {
    fn from(told: &kvasir_proto::v1::WorkerTotals) -> Self {
        Self {
            prefilled_tokens: told.prefilled_tokens,
            prefilled_prompts: told.prefilled_prompts,
            timed_tokens: told.timed_tokens,
            timed_positions: told.timed_positions,
            timed_seconds: told.timed_seconds,
            sampled_tokens: told.sampled_tokens,
            plain_steps: told.plain_steps,
            plain_seconds: told.plain_seconds,
            plain_answers: told.plain_answers,
            plain_context: told.plain_context,
        }
    }
}

impl Totals {
    /// What was done between then and now; `None` if now is another life.
    pub fn since(&self, then: &Self) -> Option<Self> {
        let seconds = |now: f64, then: f64| (now.is_finite() && now >= then).then_some(now - then);
        Some(Self {
            prefilled_tokens: self.prefilled_tokens.checked_sub(then.prefilled_tokens)?,
            prefilled_prompts: self.prefilled_prompts.checked_sub(then.prefilled_prompts)?,
            timed_tokens: self.timed_tokens.checked_sub(then.timed_tokens)?,
            timed_positions: self.timed_positions.checked_sub(then.timed_positions)?,
            timed_seconds: seconds(self.timed_seconds, then.timed_seconds)?,
            sampled_tokens: self.sampled_tokens.checked_sub(then.sampled_tokens)?,
            plain_steps: self.plain_steps.checked_sub(then.plain_steps)?,
            plain_seconds: seconds(self.plain_seconds, then.plain_seconds)?,
            plain_answers: self.plain_answers.checked_sub(then.plain_answers)?,
            plain_context: self.plain_context.checked_sub(then.plain_context)?,
        })
    }
}

/// What is known of how fast a worker, or all of a model's, is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Learned {
    step: Fit<3>,
    prompt: Fit<2>,
}

impl Learned {
    /// What was done since the last time.
    pub fn add(&mut self, done: &Totals) {
        if done.plain_steps > 0 && done.plain_seconds >= LEAST {
            let steps = done.plain_steps as f64;
            let x = [1.0, done.plain_answers as f64 / steps, done.plain_context as f64 / steps];
            self.step.add(x, done.plain_seconds / steps);
        }
        if done.timed_tokens > 0 && done.timed_seconds >= LEAST {
            let tokens = done.timed_tokens as f64;
            self.prompt.add([1.0, done.timed_positions as f64 / tokens], done.timed_seconds / tokens);
        }
    }

    /// The predictors; those of `all` where it knows little itself.
    pub fn speeds(&self, all: Option<&Self>) -> Speeds {
        let step = self.step.solve(all.and_then(|all| all.step.solve(None)));
        let prompt = self.prompt.solve(all.and_then(|all| all.prompt.solve(None)));
        Speeds {
            step: step.map(|[base, per_answer, per_context_token]| Step { base, per_answer, per_context_token }),
            prompt: prompt.map(|[per_token, per_place]| Prompt { per_token, per_place }),
        }
    }
}

/// The predictors of a worker; `None` where nothing was measured yet.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Speeds {
    /// Of a step.
    pub step: Option<Step>,
    /// Of a prompt.
    pub prompt: Option<Prompt>,
}

/// What a step costs, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Step {
    /// However many are answered.
    pub base: f64,
    /// For each answer.
    pub per_answer: f64,
    /// For each token that an answer looks back at.
    pub per_context_token: f64,
}

impl Step {
    /// Of a step with so many answers, each looking back at so many tokens.
    pub fn seconds(&self, answers: f64, context: f64) -> f64 {
        self.base + answers * self.each(context)
    }

    /// What one answer more costs.
    pub fn each(&self, context: f64) -> f64 {
        self.per_answer + self.per_context_token * context
    }
}

/// What a prompt costs, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prompt {
    /// For each token.
    pub per_token: f64,
    /// For each token, times its place in the prompt.
    pub per_place: f64,
}

impl Prompt {
    /// Of the last `tokens` tokens of a prompt of which `before` are there already.
    pub fn seconds(&self, tokens: f64, before: f64) -> f64 {
        self.per_token * tokens + self.per_place * tokens * (before + tokens / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_prompts_are_predicted_from_totals() {
        let (step, prompt) = (
            Step { base: 0.008, per_answer: 0.0004, per_context_token: 2e-7 },
            Prompt { per_token: 4e-5, per_place: 3e-9 },
        );
        let (mut totals, mut learned) = (Totals::default(), Learned::default());
        for at in 1..200u64 {
            let before = totals;
            let (answers, context) = (at % 13 + 1, 100 + at * 37 % 4000);
            totals.plain_steps += 10;
            totals.plain_answers += 10 * answers;
            totals.plain_context += 10 * answers * context;
            totals.plain_seconds += 10.0 * step.seconds(answers as f64, context as f64);
            let length = 64 + at * 53 % 3000;
            totals.timed_tokens += length;
            totals.timed_positions += length * (length - 1) / 2;
            totals.timed_seconds += prompt.seconds(length as f64, 0.0);
            learned.add(&totals.since(&before).unwrap());
        }
        let speeds = learned.speeds(None);
        let off = |found: f64, truth: f64| (found / truth - 1.0).abs();
        assert!(off(speeds.step.unwrap().seconds(32.0, 2000.0), step.seconds(32.0, 2000.0)) < 0.02, "{speeds:?}");
        assert!(off(speeds.prompt.unwrap().seconds(8000.0, 0.0), prompt.seconds(8000.0, 0.0)) < 0.02, "{speeds:?}");
        // One that was measured little is thought to be like the others.
        assert_eq!(Learned::default().speeds(Some(&learned)), speeds);
        assert_eq!(Learned::default().speeds(None), Speeds::default());
    }

    #[test]
    fn another_life_is_no_measurement() {
        let old = Totals { plain_steps: 5, ..Totals::default() };
        assert_eq!(Totals::default().since(&old), None);
        let senseless = Totals { plain_seconds: f64::NAN, ..old };
        assert_eq!(senseless.since(&old), None);
    }
}
