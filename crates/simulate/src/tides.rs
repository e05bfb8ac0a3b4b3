//! A made-up trace whose mix changes: hours of reading and hours of writing, made short.
//!
//! | from minute | prompts | answers |
//! | --- | --- | --- |
//! | 0 to 20, 40 to 60 | 8,000 to 24,000 tokens, 4 a second | 20 to 100 tokens |
//! | 20 to 40 | 200 to 1,000 tokens, 24 a second | 800 to 2,000 tokens |
//!
//! Nothing is shared. No split of workers is right for both parts.

use kvasir_replay::trace::{Request, Trace};
use kvasir_types::mix;

/// Its name.
pub const NAME: &str = "tides";
const BLOCK_TOKENS: u32 = 512;

struct Part {
    from_ms: u64,
    to_ms: u64,
    per_second: f64,
    prompt: (u32, u32),
    answer: (u32, u32),
}

const MINUTE: u64 = 60_000;
const READING: Part =
    Part { from_ms: 0, to_ms: 20 * MINUTE, per_second: 4.0, prompt: (8000, 24_000), answer: (20, 100) };
const WRITING: Part =
    Part { from_ms: 20 * MINUTE, to_ms: 40 * MINUTE, per_second: 24.0, prompt: (200, 1000), answer: (800, 2000) };
const AGAIN: Part = Part { from_ms: 40 * MINUTE, to_ms: 60 * MINUTE, ..READING };

/// The trace of this seed.
pub fn tides(seed: u64) -> Trace {
    let mut state = mix(seed);
    let mut random = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(state)
    };
    let mut trace = Trace::default();
    for part in [READING, WRITING, AGAIN] {
        let mut at = part.from_ms as f64;
        loop {
            let unit = (random() >> 11) as f64 / (1u64 << 53) as f64;
            at += -(1.0 - unit).ln() * 1000.0 / part.per_second;
            if at >= part.to_ms as f64 {
                break;
            }
            let mut between = |(least, most): (u32, u32)| least + (random() % u64::from(most - least + 1)) as u32;
            let (prompt_tokens, answer_tokens) = (between(part.prompt), between(part.answer));
            let blocks = prompt_tokens.div_ceil(BLOCK_TOKENS);
            let request = Request {
                at_ms: at as u64,
                prompt_tokens,
                answer_tokens,
                blocks: (trace.distinct..trace.distinct + blocks).collect(),
            };
            trace.distinct += blocks;
            trace.references += blocks as usize;
            trace.requests.push(request);
        }
    }
    trace
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_an_hour_and_its_mix_changes() {
        let trace = tides(1);
        assert_eq!(trace, tides(1));
        assert_ne!(trace, tides(2));
        let of = |from: u64, to: u64, pick: fn(&Request) -> u32| {
            let part = trace.requests.iter().filter(|one| (from * MINUTE..to * MINUTE).contains(&one.at_ms));
            part.map(|one| f64::from(pick(one))).sum::<f64>()
        };
        let (prompts, answers) = (|one: &Request| one.prompt_tokens, |one: &Request| one.answer_tokens);
        assert!(of(0, 20, prompts) > 4.0 * of(20, 40, prompts) && of(40, 60, prompts) > 4.0 * of(20, 40, prompts));
        assert!(of(20, 40, answers) > 20.0 * of(0, 20, answers));
        assert!(trace.requests.iter().all(|one| one.at_ms < 60 * MINUTE));
    }
}
