//! Traces made up from a seed, each with another kind of reuse, so that a policy is not chosen by one trace alone.
//!
//! | name | what comes back | what a cache should notice |
//! | --- | --- | --- |
//! | chat | conversations, after exponential times | a few minutes decide |
//! | agents | long shared instructions, then a step every few seconds until the task is done | the working set is small |
//! | documents | popular documents before a question each (Zipf), questions never | uses count, age does not |
//! | batch | chat, and every ten minutes a job whose prompts share one block | a job's blocks are of no use |
//! | shift | chat, then documents, agents in between | what was learned may be wrong later |
//!
//! All take an hour. A block is one of 512 tokens, as in Mooncake's traces.

use crate::trace::{Request, Trace};

const HOUR: f64 = 3600.0;
const BLOCK_TOKENS: u32 = 512;

/// What [`generate`] can make.
pub const NAMES: [&str; 5] = ["chat", "agents", "documents", "batch", "shift"];

/// The trace of that name; `None` if there is none.
pub fn generate(name: &str, seed: u64) -> Option<Trace> {
    let mut trace = Writer { random: Random(seed), prompts: Vec::new(), next: 0 };
    match name {
        "chat" => trace.chat(0.0, HOUR, 1.5),
        "agents" => trace.agents(0.0, HOUR, 0.4),
        "documents" => trace.documents(0.0, HOUR, 3.0),
        "batch" => {
            trace.chat(0.0, HOUR, 1.0);
            trace.batch(0.0, HOUR);
        }
        "shift" => {
            trace.chat(0.0, HOUR / 2.0, 1.5);
            trace.documents(HOUR / 2.0, HOUR, 3.0);
            trace.agents(HOUR / 4.0, HOUR * 3.0 / 4.0, 0.2);
        }
        _ => return None,
    }
    Some(trace.finish())
}

/// SplitMix64 (Steele, Lea, Flood 2014): the same trace from the same seed, everywhere and for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn between(&mut self, least: u32, most: u32) -> u32 {
        least + (self.next() % u64::from(most - least + 1)) as u32
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }
}

/// Popularity by rank.
struct Zipf(Vec<f64>);

impl Zipf {
    fn new(ranks: u32, exponent: f64) -> Self {
        let mut sum = 0.0;
        Self((1..=ranks).map(|rank| (sum += f64::from(rank).powf(-exponent), sum).1).collect())
    }

    fn draw(&self, random: &mut Random) -> usize {
        let all = self.0.last().copied().unwrap_or_default();
        let at = random.unit() * all;
        self.0.partition_point(|&sum| sum < at).min(self.0.len() - 1)
    }
}

struct Writer {
    random: Random,
    /// When, and the blocks.
    prompts: Vec<(f64, Vec<u32>)>,
    next: u32,
}

impl Writer {
    /// Appends blocks that nobody has seen, as many as a draw says.
    fn extend(&mut self, prompt: &mut Vec<u32>, least: u32, most: u32) {
        let count = self.random.between(least, most);
        prompt.extend(self.next..self.next + count);
        self.next += count;
    }

    fn some(&mut self, least: u32, most: u32) -> Vec<u32> {
        let mut blocks = Vec::new();
        self.extend(&mut blocks, least, most);
        blocks
    }

    /// Conversations begin at a rate; after each answer 55 of 100 go on, ten seconds and a draw later.
    fn chat(&mut self, from: f64, to: f64, per_second: f64) {
        let system = self.some(2, 2);
        let mut start = from;
        loop {
            start += self.random.exponential(1.0 / per_second);
            if start > to {
                return;
            }
            let mut prompt = system.clone();
            self.extend(&mut prompt, 1, 12);
            let mut at = start;
            loop {
                self.prompts.push((at, prompt.clone()));
                if self.random.unit() < 0.45 {
                    break;
                }
                at += 10.0 + self.random.exponential(90.0);
                self.extend(&mut prompt, 1, 4);
            }
        }
    }

    /// Tasks of up to 25 steps, each with the instructions of one of 30 agents.
    fn agents(&mut self, from: f64, to: f64, per_second: f64) {
        let popular = Zipf::new(30, 1.0);
        let instructions: Vec<Vec<u32>> = (0..30).map(|_| self.some(4, 24)).collect();
        let mut start = from;
        loop {
            start += self.random.exponential(1.0 / per_second);
            if start > to {
                return;
            }
            let mut prompt = instructions[popular.draw(&mut self.random)].clone();
            self.extend(&mut prompt, 1, 3);
            let mut at = start;
            for _ in 0..self.random.between(1, 25) {
                self.prompts.push((at, prompt.clone()));
                at += 1.0 + self.random.exponential(12.0);
                self.extend(&mut prompt, 1, 5);
            }
        }
    }

    /// One question each about one of 4,000 documents.
    fn documents(&mut self, from: f64, to: f64, per_second: f64) {
        let popular = Zipf::new(4000, 0.9);
        let system = self.some(3, 3);
        let documents: Vec<Vec<u32>> = (0..4000).map(|_| self.some(4, 40)).collect();
        let mut at = from;
        loop {
            at += self.random.exponential(1.0 / per_second);
            if at > to {
                return;
            }
            let document = &documents[popular.draw(&mut self.random)];
            let mut prompt = [system.as_slice(), document].concat();
            self.extend(&mut prompt, 1, 2);
            self.prompts.push((at, prompt));
        }
    }

    /// Jobs of 600 prompts, three a second.
    fn batch(&mut self, from: f64, to: f64) {
        let mut start = from + 300.0;
        while start < to {
            let job = self.some(1, 1);
            for n in 0..600 {
                let mut prompt = job.clone();
                self.extend(&mut prompt, 4, 20);
                self.prompts.push((start + f64::from(n) * 0.3, prompt));
            }
            start += 700.0;
        }
    }

    fn finish(mut self) -> Trace {
        self.prompts.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let mut trace = Trace::default();
        let mut numbers = vec![None; self.next as usize];
        for (at, prompt) in self.prompts {
            trace.references += prompt.len();
            let blocks: Vec<u32> = prompt
                .into_iter()
                .map(|block| {
                    *numbers[block as usize].get_or_insert_with(|| {
                        trace.distinct += 1;
                        trace.distinct - 1
                    })
                })
                .collect();
            let prompt_tokens = blocks.len() as u32 * BLOCK_TOKENS;
            trace.requests.push(Request { at_ms: (at * 1000.0) as u64, prompt_tokens, answer_tokens: 256, blocks });
        }
        trace
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_makes_one_trace_and_another_another() {
        for name in NAMES {
            let trace = generate(name, 7).unwrap();
            assert!(trace == generate(name, 7).unwrap() && trace != generate(name, 8).unwrap(), "{name}");
            assert!(trace.requests.is_sorted_by_key(|request| request.at_ms), "{name}");
            assert_eq!(Trace::read(trace.to_text().as_bytes()).unwrap(), trace, "{name}");
        }
        assert!(generate("fashion", 7).is_none());
    }

    #[test]
    fn equal_blocks_follow_equal_blocks() {
        for name in NAMES {
            let trace = generate(name, 1).unwrap();
            let mut before = vec![None; trace.distinct as usize];
            for request in &trace.requests {
                for (at, &block) in request.blocks.iter().enumerate() {
                    let above = at.checked_sub(1).map(|above| request.blocks[above]);
                    assert_eq!(*before[block as usize].get_or_insert(above), above, "{name}");
                }
            }
        }
    }
}
