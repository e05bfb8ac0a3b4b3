//! How many drafts a sequence gets: as many as its own past says are worth computing.
//!
//! With a share `rate` of drafts accepted, the n-th draft of a run is of use with probability `rate`^n. Drafts are asked
//! for as long as that is at least [`WORTH`]; where not even one is, only one is tried now and then, in case the text has
//! changed. It looks at the sequence alone, so what the others do to a step's length does not matter.

/// Least probability that makes a draft worth its computing. A row more costs a small part of a step where the weights
/// must be read anyway, and nearly a whole share of it in a large batch; a quarter is between.
const WORTH: f32 = 0.25;
/// How much one draft counts against those before it.
const WEIGHT: f32 = 0.08;
/// Steps between two tries of a sequence whose drafts are worth nothing.
const PAUSE: u32 = 32;

/// What is known of a sequence's drafts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    rate: f32,
    paused: u32,
}

impl Default for Pace {
    fn default() -> Self {
        // Hopeful: the first run is of three or four drafts.
        Self { rate: 0.7, paused: 0 }
    }
}

impl Pace {
    /// How many drafts to ask for now, of at most `most`.
    pub fn limit(&mut self, most: usize) -> usize {
        let worth = (WORTH.ln() / self.rate.clamp(0.01, 0.99).ln()) as usize;
        if worth > 0 {
            return worth.min(most);
        }
        self.paused += 1;
        if self.paused < PAUSE {
            return 0;
        }
        self.paused = 0;
        1
    }

    /// Of `drafted` tokens, the first `accepted` were right.
    pub fn learn(&mut self, drafted: usize, accepted: usize) {
        for _ in 0..accepted {
            self.rate += (1.0 - self.rate) * WEIGHT;
        }
        if accepted < drafted {
            self.rate -= self.rate * WEIGHT;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps and drafts until `tokens` tokens are written, if each draft is right with probability `right`.
    fn run(right: f64, most: usize, tokens: usize) -> (usize, usize) {
        let (mut pace, mut written, mut steps, mut drafts, mut state) = (Pace::default(), 0, 0, 0, 1u64);
        while written < tokens {
            let drafted = pace.limit(most);
            let mut accepted = 0;
            while accepted < drafted {
                state = crate::sampler::mix(state.wrapping_add(0x9e37_79b9_7f4a_7c15));
                if (state >> 11) as f64 / (1u64 << 53) as f64 >= right {
                    break;
                }
                accepted += 1;
            }
            if drafted > 0 {
                pace.learn(drafted, accepted);
            }
            (written, steps, drafts) = (written + accepted + 1, steps + 1, drafts + drafted);
        }
        (steps, drafts)
    }

    #[test]
    fn where_drafts_are_right_there_are_many_and_where_they_are_wrong_there_are_none() {
        let (steps, _) = run(0.95, 6, 10_000);
        assert!(steps < 2_800, "{steps} steps for 10,000 tokens");
        let (steps, drafts) = run(0.0, 6, 10_000);
        assert!(steps == 10_000 && drafts < 400, "{drafts} drafts for nothing");
        let (steps, drafts) = run(0.5, 6, 10_000);
        assert!(steps < 6_700 && drafts < 13_000, "{steps} steps, {drafts} drafts");
    }

    #[test]
    fn a_text_that_becomes_easy_is_noticed() {
        let mut pace = Pace::default();
        for _ in 0..100 {
            pace.learn(1, 0);
        }
        let mut steps = 0;
        while pace.limit(4) < 4 {
            steps += 1;
            assert!(steps < 32 * 40, "never noticed");
            pace.learn(1, 1);
        }
    }
}
