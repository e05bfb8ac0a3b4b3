//! What a pass over a trace came to, for people and for programs.

use serde::Serialize;

use super::{Settings, lane::Outcome};
use crate::live::{
    Header,
    bound::Bound,
    drive::Tally,
    pass::Pass,
    stats::{self, Errors, Latencies, Summary, share},
};

/// What one pass over a trace came to.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Which pass.
    #[serde(flatten)]
    pub header: Header,
    /// The model asked.
    pub model: String,
    /// Tokens for each block of the trace.
    pub block_tokens: u32,
    /// Most tokens of an answer.
    pub max_output_tokens: u32,
    /// Requests that ended, well or not.
    pub requests: usize,
    /// Those that were answered to the end.
    pub answered: usize,
    /// Prompts that lost their end, because the model's context has no room for it.
    pub cut: usize,
    /// Tokens of those that were answered.
    pub tokens: Tokens,
    /// Tokens of prompts that nobody had to compute, of all.
    pub hit_rate: f64,
    /// The same if everything that was asked for before were kept, and these requests came one after the other.
    pub bound: f64,
    /// Tokens of answers per second.
    pub output_tokens_per_s: f64,
    /// How long things took.
    pub latency_us: Times,
    /// What went wrong, by kind.
    pub errors: Errors,
}

/// Tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tokens {
    /// Of prompts.
    pub prompt: u64,
    /// Of those, tokens that nobody had to compute.
    pub cached: u64,
    /// Of answers.
    pub output: u64,
}

/// How long things took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Times {
    /// To the first token, from when the request was due.
    pub ttft: Summary,
    /// From one token to the next, each answer's mean.
    pub tpot: Summary,
    /// To the end, from when the request was due; also of requests that failed.
    pub request: Summary,
}

/// A report while it is being counted.
#[derive(Default)]
pub(super) struct Counts {
    /// Numbers of the requests that were answered, and with how many blocks.
    answered: Vec<(usize, usize)>,
    requests: usize,
    tokens: Tokens,
    ttft: Latencies,
    tpot: Latencies,
    request: Latencies,
    errors: Errors,
}

impl Tally<Outcome> for Counts {
    fn add(&mut self, number: usize, outcome: Outcome) {
        let Outcome { result, blocks, whole } = outcome;
        self.requests += 1;
        self.request.add(whole);
        match result {
            Ok(answer) => {
                self.answered.push((number, blocks));
                self.tokens.prompt += answer.prompt_tokens;
                self.tokens.cached += answer.cached_tokens;
                self.tokens.output += answer.output_tokens;
                self.ttft.add(answer.ttft);
                answer.tpot.into_iter().for_each(|tpot| self.tpot.add(tpot));
            }
            Err(kind) => self.errors.add(kind),
        }
    }

    fn line(&self) -> String {
        let Tokens { prompt, cached, output } = self.tokens;
        let errors = self.errors.count();
        format!(
            "cached {:.4} of {prompt} prompt tokens, {output} tokens written, {errors} errors",
            share(cached, prompt)
        )
    }
}

impl Counts {
    /// The report of a pass. The bound counts the requests that were answered, in the trace's order.
    pub(super) fn report(mut self, pass: &Pass<'_>, settings: &Settings, model: &str, bound: &mut Bound) -> Report {
        self.answered.sort_unstable();
        let (mut had, mut cut) = (0, 0);
        for &(number, blocks) in &self.answered {
            let all = &pass.trace.requests[number].blocks;
            had += bound.ask(&all[..blocks]) as u64;
            cut += usize::from(blocks < all.len());
        }
        let Tokens { prompt, cached, output } = self.tokens;
        Report {
            header: pass.header(),
            model: model.to_owned(),
            block_tokens: settings.block_tokens,
            max_output_tokens: settings.max_output_tokens,
            requests: self.requests,
            answered: self.answered.len(),
            cut,
            tokens: self.tokens,
            hit_rate: share(cached, prompt),
            bound: share(had * u64::from(settings.block_tokens), prompt),
            output_tokens_per_s: output as f64 / pass.ended.seconds.max(f64::MIN_POSITIVE),
            latency_us: Times { ttft: self.ttft.summary(), tpot: self.tpot.summary(), request: self.request.summary() },
            errors: self.errors,
        }
    }
}

impl Report {
    /// For people.
    pub(super) fn table(&self) -> String {
        let Self { requests, answered, cut, hit_rate, bound, output_tokens_per_s, .. } = self;
        let Tokens { prompt, cached, output } = self.tokens;
        let Times { ttft, tpot, request } = self.latency_us;
        format!(
            "{}  \
             cached     {hit_rate:.4} of {prompt} prompt tokens ({cached}), bound {bound:.4}; {cut} prompts cut\n  \
             written    {output} tokens, {output_tokens_per_s:.1} a second\n{}  \
             errors     {}\n",
            self.header.line(&format!("{answered} of {requests} requests answered")),
            stats::table(&[("ttft", ttft), ("tpot", tpot), ("request", request)]),
            self.errors.line(),
        )
    }
}
