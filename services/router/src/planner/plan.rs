//! When which workers are moved.
//!
//! A pure state machine: what is known goes in with the time, what to do and why comes out. It looks for the split whose worse
//! target is strained least, and goes there only if that is worth it:
//!
//! - while targets are met with ease ([`Settings::strained`]) nothing is moved, however uneven the loads are;
//! - the better split must be better by [`Settings::gain`], that often in a row ([`Settings::votes`]);
//! - after a move there is a pause ([`Settings::pause`]), for what was moved to show;
//! - pinned workers stay, and one of each kind is always left;
//! - no more than an eighth of the workers are moved at a time: prompts to those that have least to write, and the other way
//!   round.

use super::forecast::{Demand, Fleet, Forecast, Split, Targets, forecast};

/// What it takes to move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Below this strain nothing is moved.
    pub strained: f64,
    /// By what part of the strain another split must be better.
    pub gain: f64,
    /// How often in a row.
    pub votes: u32,
    /// Seconds after a move.
    pub pause: f64,
    /// Least prefill workers.
    pub min_prefill: usize,
    /// Least decode workers.
    pub min_decode: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { strained: 0.8, gain: 0.15, votes: 3, pause: 20.0, min_prefill: 1, min_decode: 1 }
    }
}

/// A worker, as far as a plan goes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Candidate {
    /// It writes answers (else it reads prompts).
    pub decodes: bool,
    /// It may be moved.
    pub movable: bool,
    /// What it has to do: answers under way where it writes, tokens to compute where it reads.
    pub work: f64,
}

/// All that a plan is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Situation {
    /// What is asked for.
    pub demand: Demand,
    /// How fast workers are; `None`: not known yet.
    pub fleet: Option<Fleet>,
    /// What clients should see.
    pub targets: Targets,
    /// The workers.
    pub workers: Vec<Candidate>,
}

/// What to do, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// How it is.
    pub now: Split,
    /// What is expected of that; `None`: not known.
    pub forecast: Option<Forecast>,
    /// How it should be, if that is otherwise.
    pub better: Option<(Split, Forecast)>,
    /// Who is to be moved, as indexes into [`Situation::workers`]: to prefill if they decode, else to decode.
    pub moves: Vec<usize>,
    /// In words.
    pub why: String,
}

/// What it remembers from one look to the next.
#[derive(Clone, Debug, Default)]
pub struct Planner {
    settings: Settings,
    /// Which way it wanted to go, and how often in a row; positive: more decode workers.
    votes: i64,
    moved: Option<f64>,
}

impl Planner {
    /// That has not looked yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    /// Other settings from the next look on.
    pub fn set(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// Somebody else moved workers at `now`, in seconds.
    pub fn disturbed(&mut self, now: f64) {
        (self.votes, self.moved) = (0, Some(now));
    }

    /// Looks, at `now` in seconds, which never goes back.
    pub fn look(&mut self, now: f64, situation: &Situation) -> Verdict {
        let Situation { demand, fleet, targets, workers } = situation;
        let decode = workers.iter().filter(|worker| worker.decodes).count();
        let split = Split { prefill: workers.len() - decode, decode };
        let mut verdict = Verdict { now: split, forecast: None, better: None, moves: Vec::new(), why: String::new() };
        let Some(fleet) = fleet else {
            return self.stay(verdict, "how fast workers are is not known yet");
        };
        let expected = forecast(split, demand, fleet);
        let strain = expected.strain(targets);
        verdict.forecast = Some(expected);
        if split.prefill == 0 || split.decode == 0 {
            return self.stay(verdict, "there are not both kinds of workers");
        }
        let best = self.best(situation, fleet, split);
        let Some((best, then)) = best else { return self.stay(verdict, "nobody can be moved") };
        let gained = 1.0 - then.strain(targets) / strain.max(f64::MIN_POSITIVE);
        if best != split && gained > 0.0 {
            verdict.better = Some((best, then));
        }
        if strain < self.settings.strained {
            return self.stay(verdict, "targets are met with ease");
        }
        if best == split || gained < self.settings.gain {
            return self.stay(verdict, "no other split is better by enough");
        }
        let step = if best.decode > split.decode { 1 } else { -1 };
        self.votes = if self.votes.signum() == step { self.votes + step } else { step };
        if self.votes.unsigned_abs() < u64::from(self.settings.votes) {
            verdict.why =
                format!("waiting whether it stays so ({} of {} looks)", self.votes.abs(), self.settings.votes);
            return verdict;
        }
        if let Some(moved) = self.moved
            && now - moved < self.settings.pause
        {
            verdict.why =
                format!("waiting for the last move to show ({:.0} s left)", self.settings.pause - (now - moved));
            return verdict;
        }
        verdict.moves = who(workers, step > 0, best.decode.abs_diff(split.decode).min((workers.len() / 8).max(1)));
        verdict.why = reason(&expected, &then, targets, split, best);
        (self.votes, self.moved) = (0, Some(now));
        verdict
    }

    fn stay(&mut self, mut verdict: Verdict, why: &str) -> Verdict {
        self.votes = 0;
        why.clone_into(&mut verdict.why);
        verdict
    }

    /// The least strained split that pins and minima allow; of equals the nearest.
    fn best(&self, situation: &Situation, fleet: &Fleet, now: Split) -> Option<(Split, Forecast)> {
        let movable = |decodes| situation.workers.iter().filter(|one| one.movable && one.decodes == decodes).count();
        let to_prefill = movable(true).min(now.decode.saturating_sub(self.settings.min_decode.max(1)));
        let to_decode = movable(false).min(now.prefill.saturating_sub(self.settings.min_prefill.max(1)));
        if to_prefill + to_decode == 0 {
            return None;
        }
        let all = now.prefill + now.decode;
        let splits = now.decode - to_prefill..=now.decode + to_decode;
        let splits = splits.map(|decode| Split { prefill: all - decode, decode });
        let judged = splits.map(|split| (split, forecast(split, &situation.demand, fleet)));
        judged.min_by(|(a, then_a), (b, then_b)| {
            let (strain_a, strain_b) = (then_a.strain(&situation.targets), then_b.strain(&situation.targets));
            strain_a.total_cmp(&strain_b).then(a.decode.abs_diff(now.decode).cmp(&b.decode.abs_diff(now.decode)))
        })
    }
}

/// The `count` workers with the least to do of those that may be moved.
fn who(workers: &[Candidate], to_decode: bool, count: usize) -> Vec<usize> {
    let mut can: Vec<usize> =
        (0..workers.len()).filter(|&at| workers[at].movable && workers[at].decodes != to_decode).collect();
    can.sort_by(|&a, &b| workers[a].work.total_cmp(&workers[b].work));
    can.truncate(count);
    can
}

fn reason(now: &Forecast, then: &Forecast, targets: &Targets, split: Split, best: Split) -> String {
    let ms = |seconds: f64| (seconds * 1e3).round();
    format!(
        "with {} prefill and {} decode workers TTFT would be {} ms (target {}) and TPOT {:.1} ms (target {}), \
         loads {:.0} % and {:.0} %; with {} and {}: {} ms and {:.1} ms",
        split.prefill,
        split.decode,
        ms(now.ttft),
        ms(targets.ttft),
        now.tpot * 1e3,
        ms(targets.tpot),
        now.prefill_load * 100.0,
        now.decode_load * 100.0,
        best.prefill,
        best.decode,
        ms(then.ttft),
        then.tpot * 1e3,
    )
}
