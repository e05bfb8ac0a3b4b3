//! What blocks of each class are worth at each age, from a sample of blocks that is watched whether they are in the cache
//! or not: so what is learned does not depend on what was evicted.
//!
//! Counted, by class and step of age: sampled blocks that reached the step without being asked for, and those that were
//! asked for in it. Their quotient is the chance of a hit in that step ([`Learner::chances`]). Few blocks of a class have
//! been seen at first, and blocks of one prompt share its fate; so a class starts from what is known of coarser ones:
//!
//! 1. all blocks give the shape over ages;
//! 2. a root (uses, has a child) scales that and, as it is seen more, bends it;
//! 3. each value of the branch (share found, length of the rest) has a factor, fitted over all roots at once, as in the
//!    analysis of rates by iterative proportional fitting;
//! 4. a class scales and bends the product.
//!
//! What other nodes have counted is counted in: see [`Learned`].
//!
//! A block's worth at an age is the best ratio, over all ages it might be kept until, of the hits to expect by then to the
//! time its place is taken by then (the Gittins index of keeping it): a place is free again at the first hit, as the block
//! is a new one then.

use std::collections::{HashMap, VecDeque};

use crate::Ask;

use super::{
    class::{AGES, BRANCH_VALUES, BRANCHES, CLASSES, Class, ROOTS, age_step, branch, step_start},
    learned::Learned,
};

/// Most blocks watched.
const MOST_WATCHED: usize = 1 << 17;
/// How many blocks pass by a cache before the oldest watched is dropped, in multiples of the cache's own blocks. Ages
/// beyond that count as never: few blocks that nobody asked for while eight times the cache went by would be kept so long.
const HORIZON: usize = 8;
/// After so many more samples the older ones count half.
const HALF_LIFE: u32 = 1 << 17;
/// A new order of the cells after so many samples, then after ever more: a part of all seen.
const FIRST_LESSON: u32 = 1 << 10;
const LESSON_PART: u32 = 16;
/// Less than that from others is no reason for a new order.
const LEAST_HEARD: f32 = 100.0;
/// How many expected hits a scale, and how many blocks a step of age, must have seen to count as much as what was known
/// before: a few prompts (see [`weight`]).
const SCALE_PRIOR: f32 = 40.0;
const SHAPE_PRIOR: f32 = 50.0;
/// The factors of the branch's values have settled after that many rounds.
const ROUNDS: usize = 4;

/// A number for each cell, in the order of [`cell`](super::class::cell).
type Table = Vec<f32>;
type Curve = [f32; AGES];

#[derive(Clone, Copy, Debug)]
struct Sample {
    name: u32,
    class: Class,
    step: u8,
    /// Which entry of the queues is the valid one.
    stamp: u32,
    last: u32,
    weight: f32,
}

#[derive(Debug)]
pub(super) struct Learner {
    samples: Vec<Sample>,
    /// Where the block of a name is in `samples`.
    watched: HashMap<u32, u32>,
    /// Samples by the step of age they are in, oldest first; an entry whose stamp is not the sample's is no more valid.
    queues: Vec<VecDeque<(u32, u32)>>,
    stamp: u32,
    /// One name in so many is watched.
    one_in: u32,
    own: Learned,
    /// What all other nodes have counted.
    others: Option<Learned>,
    /// How much of others' was known at the last lesson.
    heard: f32,
    seen: u32,
    next_lesson: u32,
}

impl Learner {
    pub(super) fn new(capacity: usize) -> Self {
        let mut learner = Self {
            samples: Vec::new(),
            watched: HashMap::new(),
            queues: vec![VecDeque::new(); AGES],
            stamp: 0,
            one_in: 1,
            own: Learned::default(),
            others: None,
            heard: 0.0,
            seen: 0,
            next_lesson: FIRST_LESSON,
        };
        learner.grow(capacity);
        learner
    }

    /// There is room for that many blocks.
    pub(super) fn grow(&mut self, capacity: usize) {
        self.one_in = (capacity * HORIZON).div_ceil(MOST_WATCHED).max(1) as u32;
    }

    /// What was counted here.
    pub(super) fn own(&self) -> &Learned {
        &self.own
    }

    /// What was counted elsewhere.
    pub(super) fn hear(&mut self, others: Learned) {
        self.others = Some(others);
    }

    /// A block was asked for, or written, by a request for so many blocks, and is of that class now.
    pub(super) fn seen(&mut self, name: u32, class: Class, now: u32, ask: Ask) {
        if !name.wrapping_mul(0xc2b2_ae35).rotate_left(15).is_multiple_of(self.one_in) {
            return;
        }
        self.stamp = self.stamp.wrapping_add(1);
        let sample = Sample { name, class, step: 0, stamp: self.stamp, last: now, weight: weight(ask.blocks) };
        let at = match self.watched.get(&name) {
            Some(&at) => {
                let before = std::mem::replace(&mut self.samples[at as usize], sample);
                let step = age_step(now.wrapping_sub(before.last));
                self.count_reached(before, step);
                self.own.hit[before.class.index() * AGES + step] += before.weight;
                at
            }
            None => {
                let at = match self.samples.len() < MOST_WATCHED {
                    true => {
                        self.samples.push(sample);
                        self.samples.len() as u32 - 1
                    }
                    false => {
                        let at = self.drop_oldest();
                        self.samples[at as usize] = sample;
                        at
                    }
                };
                self.watched.insert(name, at);
                at
            }
        };
        self.own.reached[class.index() * AGES] += sample.weight;
        self.queues[0].push_back((at, self.stamp));
        self.seen += 1;
    }

    /// A watched block is of another class since it was last seen.
    pub(super) fn reclass(&mut self, name: u32, class: Class) {
        if let Some(&at) = self.watched.get(&name) {
            self.samples[at as usize].class = class;
        }
    }

    /// Counts what is older now than before.
    pub(super) fn advance(&mut self, now: u32) {
        for step in 0..AGES - 1 {
            while let Some(&(at, stamp)) = self.queues[step].front() {
                let sample = self.samples[at as usize];
                if sample.stamp == stamp {
                    let due = age_step(now.wrapping_sub(sample.last));
                    if due <= step {
                        break;
                    }
                    self.count_reached(sample, due);
                    self.samples[at as usize].step = due as u8;
                    self.queues[due].push_back((at, stamp));
                }
                self.queues[step].pop_front();
            }
        }
    }

    fn count_reached(&mut self, sample: Sample, step: usize) {
        let first = sample.class.index() * AGES;
        for reached in
            &mut self.own.reached[first..][usize::from(sample.step) + 1..(step + 1).max(usize::from(sample.step) + 1)]
        {
            *reached += sample.weight;
        }
    }

    /// Stops watching the block that was asked for longest ago: its place.
    fn drop_oldest(&mut self) -> u32 {
        for queue in self.queues.iter_mut().rev() {
            while let Some((at, stamp)) = queue.pop_front() {
                let sample = self.samples[at as usize];
                if sample.stamp == stamp {
                    self.watched.remove(&sample.name);
                    return at;
                }
            }
        }
        unreachable!("every sample is in a queue")
    }

    /// What each cell is worth, whenever enough more has been seen.
    pub(super) fn learn(&mut self) -> Option<Table> {
        let heard = self.others.as_ref().map_or(0.0, Learned::samples);
        let much_more = (heard - self.heard).abs() > self.heard / LESSON_PART as f32 + LEAST_HEARD;
        if self.seen < self.next_lesson && !much_more {
            return None;
        }
        self.heard = heard;
        let mut density: Table = self.chances().iter().flat_map(worth).collect();
        parents_last(&mut density);
        if self.seen >= HALF_LIFE {
            self.seen /= 2;
            self.own.halve();
        }
        self.next_lesson = self.seen + (self.seen / LESSON_PART).max(FIRST_LESSON);
        Some(density)
    }

    /// The chance of a hit in each step of age, given that the step is reached, for every class.
    fn chances(&self) -> Vec<Curve> {
        let all = match &self.others {
            Some(others) => &others.with(&self.own),
            None => &self.own,
        };
        let counts = |class: usize| (&all.hit[class * AGES..][..AGES], &all.reached[class * AGES..][..AGES]);
        let sum = |classes: &mut dyn Iterator<Item = usize>| {
            let (mut hit, mut reached) = ([0.0; AGES], [0.0; AGES]);
            for class in classes {
                let (hits, all) = counts(class);
                hit.iter_mut().zip(hits).for_each(|(sum, n)| *sum += n);
                reached.iter_mut().zip(all).for_each(|(sum, n)| *sum += n);
            }
            (hit, reached)
        };
        let (hit, reached) = sum(&mut (0..CLASSES));
        let all: Curve = std::array::from_fn(|step| hit[step] / (reached[step] + 1.0));
        let roots: Vec<Curve> = (0..ROOTS)
            .map(|root| {
                let (hit, reached) = sum(&mut (root * BRANCHES..(root + 1) * BRANCHES));
                refine(&hit, &reached, &all)
            })
            .collect();
        // What each class had, and what its root alone lets expect.
        let hits: Vec<(f32, f32)> = (0..CLASSES)
            .map(|class| {
                let (hit, reached) = counts(class);
                (hit.iter().sum(), expected(reached, &roots[class / BRANCHES]))
            })
            .collect();
        let factors = factors(&hits);
        (0..CLASSES)
            .map(|class| {
                let (hit, reached) = counts(class);
                let factor: f32 = branch(class).iter().zip(&factors).map(|(&value, of)| of[value]).product();
                refine(hit, reached, &roots[class / BRANCHES].map(|chance| (chance * factor).min(1.0)))
            })
            .collect()
    }
}

/// Makes a block worth no less than one that was asked for less often, or has none hanging on it, all else being equal. Within
/// a prompt all else is: whoever asks for a block asks for all before it, so those go after it. Where the counts say
/// otherwise, it is by chance; and where blocks of a prompt are on other nodes, nothing else keeps that order.
fn parents_last(density: &mut [f32]) {
    let branches = BRANCHES * AGES;
    for root in 1..ROOTS {
        let (lower, from) = density.split_at_mut(root * branches);
        let below = [(root % 2 == 1).then_some(root - 1), root.checked_sub(2)];
        for below in below.into_iter().flatten() {
            for (worth, below) in from[..branches].iter_mut().zip(&lower[below * branches..]) {
                *worth = worth.max(*below);
            }
        }
    }
}

/// How much a block counts of a prompt of that many: they share its fate, so that ten of one prompt say less than one each
/// of ten; but they are ten.
fn weight(blocks: u32) -> f32 {
    1.0 / (blocks.max(1) as f32).sqrt()
}

fn expected(reached: &[f32], chances: &Curve) -> f32 {
    reached.iter().zip(chances).map(|(reached, chance)| reached * chance).sum()
}

/// What was known before, scaled and bent by what was counted.
fn refine(hit: &[f32], reached: &[f32], known: &Curve) -> Curve {
    let scale = (hit.iter().sum::<f32>() + SCALE_PRIOR) / (expected(reached, known) + SCALE_PRIOR);
    std::array::from_fn(|step| {
        let known = (known[step] * scale).min(1.0);
        ((hit[step] + SHAPE_PRIOR * known) / (reached[step] + SHAPE_PRIOR)).min(1.0)
    })
}

/// For each of a branch's two parts and each of its values: by how much hits exceed what the root and the other part's
/// value let expect.
fn factors(hits: &[(f32, f32)]) -> [Vec<f32>; 2] {
    let mut factors = BRANCH_VALUES.map(|values| vec![1.0; values]);
    for _ in 0..ROUNDS {
        for part in 0..factors.len() {
            let mut sums = vec![(0.0, 0.0); BRANCH_VALUES[part]];
            for (class, (hit, expected)) in hits.iter().enumerate() {
                let values = branch(class);
                let other = 1 - part;
                let (hits, expect) = &mut sums[values[part]];
                *hits += hit;
                *expect += expected * factors[other][values[other]];
            }
            factors[part] = sums.iter().map(|(hit, expect)| (hit + SCALE_PRIOR) / (expect + SCALE_PRIOR)).collect();
        }
    }
    factors
}

/// Some steps of age that are kept through together.
#[derive(Clone, Copy)]
struct Stretch {
    hits: f32,
    time: f32,
    /// The part that is not asked for before its end.
    left: f32,
    next: usize,
}

impl Stretch {
    /// One step, from a part of it on, that part being as long and as likely to have the hit.
    fn step(step: usize, chances: &Curve, part: f32) -> Self {
        let start = step_start(step);
        let end = if step + 1 < AGES { step_start(step + 1) } else { start * 2.0 };
        let left = (1.0 - chances[step]).max(0.0).powf(part);
        // Hits come in the middle of the step, on average.
        Self { hits: 1.0 - left, time: (end - start) * part * (1.0 + left) / 2.0, left, next: step + 1 }
    }

    /// Goes on through the stretches after it for as long as that is worth it.
    fn extend(mut self, rest: &[Self]) -> Self {
        while let Some(after) = rest.get(self.next).filter(|after| after.hits * self.time > self.hits * after.time) {
            self.hits += self.left * after.hits;
            self.time += self.left * after.time;
            self.left *= after.left;
            self.next = after.next;
        }
        self
    }
}

/// The best ratio of hits to time from the middle of each step on.
fn worth(chances: &Curve) -> Curve {
    let nothing = Stretch { hits: 0.0, time: 1.0, left: 1.0, next: AGES };
    let mut stretches = [nothing; AGES];
    let mut worth = [0.0; AGES];
    for step in (0..AGES).rev() {
        stretches[step] = Stretch::step(step, chances, 1.0).extend(&stretches);
        let best = Stretch::step(step, chances, 0.5).extend(&stretches);
        worth[step] = best.hits / best.time;
    }
    worth
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_without_hits_before_a_rich_one_is_worth_waiting_through() {
        let mut chances = [0.0; AGES];
        chances[10] = 0.5;
        let worth = worth(&chances);
        assert!(worth[..10].is_sorted(), "the nearer the hit, the more worth: {worth:?}");
        assert!(worth[9] > 0.0 && worth[11] == 0.0);
    }

    #[test]
    fn the_best_ratio_is_that_of_trying_every_end() {
        let chances: Curve = std::array::from_fn(|step| [0.02, 0.3, 0.0, 0.11, 0.05, 0.6, 0.01][step * 5 % 7]);
        for (step, found) in worth(&chances).into_iter().enumerate() {
            let mut sum = Stretch::step(step, &chances, 0.5);
            let mut best = sum.hits / sum.time;
            for next in step + 1..AGES {
                let after = Stretch::step(next, &chances, 1.0);
                sum.hits += sum.left * after.hits;
                sum.time += sum.left * after.time;
                sum.left *= after.left;
                best = best.max(sum.hits / sum.time);
            }
            assert!((found - best).abs() <= best * 1e-4, "step {step}: {found} is not {best}");
        }
    }

    #[test]
    fn steps_of_age_are_where_they_say() {
        for age in 1..100_000 {
            let step = age_step(age);
            assert!(step_start(step) <= age as f32 && (age as f32) < step_start(step + 1), "{age} in {step}");
        }
    }

    #[test]
    fn a_class_that_is_seen_to_return_is_worth_more_than_one_that_is_not() {
        let ask = Ask { found: 0, blocks: 8 };
        let (back, never) = (Class::of(1, true, ask), Class::of(0, false, ask));
        let mut learner = Learner::new(64);
        for round in 0..400u32 {
            learner.advance(round);
            (0..8).for_each(|name| learner.seen(name, back, round, ask));
            (0..8).for_each(|n| learner.seen(1000 + round * 8 + n, never, round, ask));
        }
        let density = learner.learn().expect("6,400 samples are enough");
        assert!(density[back.index() * AGES] > 5.0 * density[never.index() * AGES]);
    }
}
