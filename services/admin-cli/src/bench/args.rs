//! Arguments of `kvasirctl bench`.

use std::{path::PathBuf, str::FromStr, time::Duration};

use clap::{ArgGroup, Args, ValueEnum};

use super::arrivals::Spread;

/// Which load, against whom.
#[derive(Clone, Debug, Args)]
#[command(group(ArgGroup::new("loop").args(["rate", "concurrency"])))]
#[command(group(ArgGroup::new("source").args(["dataset", "trace"])))]
pub(crate) struct BenchArgs {
    /// A router, or any server that speaks OpenAI's HTTP, as http://HOST:PORT [default: the context's router, else one of the
    /// cluster's]
    #[arg(value_name = "URL")]
    pub(super) url: Option<String>,
    /// The model's name [default: the server's first]
    #[arg(long, value_name = "NAME")]
    pub(super) model: Option<String>,
    /// Which API is asked
    #[arg(long, value_enum, default_value_t = Api::Chat)]
    pub(super) api: Api,
    /// Ask for whole answers instead of streams: then only whole latencies are known
    #[arg(long)]
    pub(super) no_stream: bool,
    /// A file with the API key, where the server asks for one [default: $KVASIR_API_KEY]
    #[arg(long, value_name = "FILE")]
    pub(super) api_key_file: Option<PathBuf>,

    /// Open loop: so many requests a second, whether or not answers come; latencies count from when a request was due
    #[arg(long, value_name = "PER SECOND", value_parser = rate, help_heading = "How often")]
    pub(super) rate: Option<f64>,
    /// How an open loop's requests are spread
    #[arg(long, value_enum, default_value_t = Spread::Poisson, help_heading = "How often")]
    pub(super) arrivals: Spread,
    /// Closed loop: so many at a time, each followed by the next [default: 16, unless --rate or --trace]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=100_000), help_heading = "How often")]
    pub(super) concurrency: Option<u32>,
    /// For how long requests are sent: 500ms, 90s, 15m, 2h [default: 30s, unless --requests or --trace]
    #[arg(long, value_name = "TIME", value_parser = time, help_heading = "How often")]
    pub(super) duration: Option<Duration>,
    /// How many requests are sent and counted
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..), help_heading = "How often")]
    pub(super) requests: Option<u64>,
    /// What is sent in this time, from the start, is not counted
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = time, help_heading = "How often")]
    pub(super) warmup: Duration,
    /// Most requests under way at a time: an open loop sends later what comes on top, and counts that as latency
    #[arg(long, value_name = "NUMBER", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000), help_heading = "How often")]
    pub(super) most_open: u32,
    /// How long one answer may take
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = time, help_heading = "How often")]
    pub(super) patience: Duration,

    /// Length of made-up prompts, in words (about a token each) or, with --ids, in tokens: 512, or 100-2000
    #[arg(long, value_name = "LENGTH", default_value = "512", help_heading = "What is asked")]
    pub(super) prompt_tokens: Span,
    /// So much of each made-up prompt is the same in all of them
    #[arg(long, value_name = "LENGTH", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000), help_heading = "What is asked")]
    pub(super) shared_prefix: u32,
    /// Made-up prompts are token ids below this instead of words (completions only)
    #[arg(long, value_name = "BELOW", value_parser = clap::value_parser!(u32).range(512..), help_heading = "What is asked")]
    pub(super) ids: Option<u32>,
    /// Tokens of answers: 128, or 10-500. A trace, and a line of a dataset, may say otherwise
    #[arg(long, value_name = "LENGTH", default_value = "128", help_heading = "What is asked")]
    pub(super) output_tokens: Span,
    /// Let the model end its answers: without, made-up prompts and traces ask for `ignore_eos`, which vLLM and SGLang know, too
    #[arg(long, help_heading = "What is asked")]
    pub(super) may_stop: bool,
    /// Prompts from a file, a line each: text, or JSON with `prompt`, `messages` or ShareGPT's `conversations`, and with
    /// `max_tokens` if it is to be another length; from the start again when it ends
    #[arg(long, value_name = "FILE", help_heading = "What is asked")]
    pub(super) dataset: Option<PathBuf>,
    /// Requests from a trace in Mooncake's format (JSON lines with `timestamp`, `input_length`, `output_length`, `hash_ids`) at
    /// its own times, unless --rate or --concurrency is given; equal ids become equal words
    #[arg(long, value_name = "FILE", help_heading = "What is asked")]
    pub(super) trace: Option<PathBuf>,
    /// How much faster than recorded a trace goes
    #[arg(long, value_name = "TIMES", default_value = "1", value_parser = rate, requires = "trace", help_heading = "What is asked")]
    pub(super) speed: f64,
    /// Words for each id of a trace
    #[arg(long, value_name = "LENGTH", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536), requires = "trace", help_heading = "What is asked")]
    pub(super) block_tokens: u32,
    /// A trace's prompts lose what is over this
    #[arg(long, value_name = "LENGTH", requires = "trace", help_heading = "What is asked")]
    pub(super) cut_prompt: Option<u32>,
    /// A trace's answers are no longer than this
    #[arg(long, value_name = "LENGTH", requires = "trace", help_heading = "What is asked")]
    pub(super) cut_output: Option<u32>,
    /// Another seed, other prompts and other times
    #[arg(long, value_name = "NUMBER", default_value_t = 1, help_heading = "What is asked")]
    pub(super) seed: u64,

    /// Most milliseconds to the first token, for goodput
    #[arg(long, value_name = "MS", value_parser = rate, help_heading = "What is good")]
    pub(super) slo_ttft: Option<f64>,
    /// Most milliseconds for each further token, on average over an answer, for goodput
    #[arg(long, value_name = "MS", value_parser = rate, help_heading = "What is good")]
    pub(super) slo_tpot: Option<f64>,
}

/// Which API is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Api {
    /// /v1/chat/completions
    Chat,
    /// /v1/completions
    Completions,
}

/// A length, or any between two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) low: u32,
    pub(super) high: u32,
}

/// Longest length.
const MAX_LENGTH: u32 = 1_000_000;

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: expected a length, or two as in 100-2000, from 1 to {MAX_LENGTH}");
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        let number = |text: &str| text.parse::<u32>().ok().filter(|length| (1..=MAX_LENGTH).contains(length));
        let (low, high) = number(low).zip(number(high)).ok_or_else(wrong)?;
        if low <= high { Ok(Self { low, high }) } else { Err(wrong()) }
    }
}

impl std::fmt::Display for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.low == self.high { write!(f, "{}", self.low) } else { write!(f, "{}-{}", self.low, self.high) }
    }
}

fn rate(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|rate| (1e-6..=1e6).contains(rate));
    number.ok_or_else(|| format!("{text:?}: expected a number above 0, up to a million"))
}

fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time, expected a number and ms, s, m or h, up to a week");
    let end = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(end);
    let unit = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    let ms = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    ms.filter(|&ms| ms <= 7 * 86_400_000).map(Duration::from_millis).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_times_are_read_or_refused() {
        assert_eq!("512".parse(), Ok(Span { low: 512, high: 512 }));
        assert_eq!("100-2000".parse(), Ok(Span { low: 100, high: 2000 }));
        for bad in ["", "0", "5-4", "-5", "5-", "1-2-3", "x", "1000001"] {
            assert!(bad.parse::<Span>().is_err(), "{bad:?}");
        }
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("2h"), Ok(Duration::from_secs(7200)));
        for bad in ["", "5", "s", "-5s", "5d", "99999999999999999999s", "9999h"] {
            assert!(time(bad).is_err(), "{bad:?}");
        }
        assert!(rate("0").is_err() && rate("nan").is_err() && rate("inf").is_err() && rate("0.5") == Ok(0.5));
    }
}
