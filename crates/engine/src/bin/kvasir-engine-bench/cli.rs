//! What the program understands, and what `--help` teaches.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kvasir_model::{Device, cpu::Compute, quantize::Scheme};
use kvasir_types::KvDtype;

/// Measures the Kvasir engine in this process: no network, no tokenizer, no cluster.
///
/// The model is a Hugging Face folder, or random weights of a published model's dimensions, written once:
///
///     kvasir-engine-bench decode --shape qwen3-0.6b --batch 1,16
///     kvasir-engine-bench prefill --model path/to/Qwen3-0.6B --tokens 512,2048
///     kvasir-engine-bench throughput --shape qwen3-0.6b --requests 32 --concurrency 8 --prompt 512 --output 64
///
/// How to read it. Decoding one sequence reads all weights for one token: what counts is the share of the memory's read
/// bandwidth (`of reads`). Prefill, and decoding many sequences, multiply: what counts is the share of the processor's
/// peak (`of peak`). Both limits are measured after each run on the same threads. TTFT is the time from a request to its
/// first token, TPOT the mean time per token after that, a gap the time between two tokens of one sequence.
///
/// Prompts are token ids made from the seed; tokens are chosen greedily, past end tokens. Figures go to standard output (as
/// a table, or `--json`: one object per line), progress to standard error.
#[derive(Parser)]
#[command(version, verbatim_doc_comment)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// So many requests, so many at a time: tokens per second, TTFT, TPOT
    Throughput(Throughput),
    /// One prompt at a time: prompt tokens per second, share of the processor's peak
    Prefill(Prefill),
    /// So many sequences that write at once: tokens per second, share of the memory's bandwidth
    Decode(Decode),
    /// A long prompt arrives while others write: how long these wait for their next token, chunked and in one piece
    Mixed(Mixed),
    /// Two requests that begin alike: what the second one's first token costs
    Prefix(Prefix),
    /// What rounding weights, keys and values costs: divergence, top-1 agreement, perplexity
    Accuracy(Accuracy),
    /// What this machine can do at most
    Limits(Limits),
    /// Write a model folder of a named shape with random weights, and print where it is
    Shape(Shape),
}

/// Which model.
#[derive(Args, Clone)]
pub struct Source {
    /// A Hugging Face model folder
    #[arg(long, value_name = "DIR", conflicts_with = "shape", required_unless_present = "shape")]
    pub model: Option<PathBuf>,
    /// Random weights of a published model's dimensions: qwen3-tiny, qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen2.5-0.5b,
    /// llama-3.2-1b, llama-3.1-8b, gemma-3-1b, mixtral-tiny, deepseek-tiny
    #[arg(long, value_name = "NAME")]
    pub shape: Option<String>,
    /// Where folders of shapes are kept [default: bench/shapes beside this program's build, else the temporary directory]
    #[arg(long, value_name = "DIR")]
    pub shapes_dir: Option<PathBuf>,
}

/// How it is computed: alike for all scenarios.
#[derive(Args, Clone)]
pub struct Setup {
    #[command(flatten)]
    pub source: Source,
    /// Round the weights to this first, into a folder beside the shapes; again only for other weights
    #[arg(long, value_enum)]
    pub weights: Option<Rounding>,
    /// What computes: auto, cpu or cuda:N (the limits that shares are of stay the processor's: see kvasir-gpu-check)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: Device,
    /// Ranks that share the work: devices from DEVICE on, or groups of the processor's threads
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub tensor_parallel: u32,
    /// Threads that compute [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Element type of cached keys and values
    #[arg(long, value_enum, default_value_t = Kv::F16)]
    pub kv: Kv,
    /// How activations are multiplied with bf16 and 8-bit weights
    #[arg(long, value_enum, default_value_t = Products::Exact)]
    pub compute: Products,
    /// Tokens in a block
    #[arg(long, value_name = "TOKENS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub block_size: u32,
    /// Most tokens of one prompt computed in one step [default: the engine's]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub chunk: Option<u32>,
    /// Blocks in the pool [default: as many as the scenario needs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub blocks: Option<u32>,
    /// Makes prompts, and the weights of a shape
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Do not measure what the machine can do at most: a second less, and no shares
    #[arg(long)]
    pub no_limits: bool,
    /// Print one JSON object per measurement instead of a table
    #[arg(long)]
    pub json: bool,
}

impl Setup {
    /// The chunk asked for.
    pub fn chunk_tokens(&self) -> Option<usize> {
        self.chunk.map(|tokens| tokens as usize)
    }
}

/// `throughput`.
#[derive(Args)]
pub struct Throughput {
    #[command(flatten)]
    pub setup: Setup,
    /// Requests altogether
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub requests: u32,
    /// Requests at a time: the next one comes when one ends
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub concurrency: u32,
    /// Tokens of a prompt: a number, or a range that is drawn from
    #[arg(long, value_name = "N[..M]", default_value = "512", value_parser = range)]
    pub prompt: Range,
    /// Tokens of an answer: a number, or a range that is drawn from
    #[arg(long, value_name = "N[..M]", default_value = "64", value_parser = range)]
    pub output: Range,
    /// Tokens that all prompts have in common at their beginning
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub shared: u32,
    /// Guess how answers go on from what they repeat, and check several tokens in one step
    #[arg(long)]
    pub ngram: bool,
}

/// `prefill`.
#[derive(Args)]
pub struct Prefill {
    #[command(flatten)]
    pub setup: Setup,
    /// Tokens of the prompt; several lengths, parted by commas, are measured one after the other
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "2048", value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: Vec<u32>,
    /// How often; the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeat: u32,
}

/// `decode`.
#[derive(Args)]
pub struct Decode {
    #[command(flatten)]
    pub setup: Setup,
    /// Sequences that write at once; several numbers, parted by commas, are measured one after the other
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: Vec<u32>,
    /// Tokens of each prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub context: u32,
    /// Steps to measure, after four that are not
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub steps: u32,
    /// Also print the first sequence's tokens, to compare them with another program's
    #[arg(long)]
    pub show_tokens: bool,
}

/// `mixed`.
#[derive(Args)]
pub struct Mixed {
    #[command(flatten)]
    pub setup: Setup,
    /// Sequences that write
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub running: u32,
    /// Tokens of each of their prompts
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub context: u32,
    /// Tokens of the prompt that arrives
    #[arg(long, value_name = "TOKENS", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt: u32,
}

/// `prefix`.
#[derive(Args)]
pub struct Prefix {
    #[command(flatten)]
    pub setup: Setup,
    /// Tokens that both prompts begin with
    #[arg(long, value_name = "TOKENS", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    pub shared: u32,
    /// Tokens of each prompt's own after that
    #[arg(long, value_name = "TOKENS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub own: u32,
}

/// `accuracy`.
#[derive(Args)]
pub struct Accuracy {
    /// The reference: its weights as they are, keys and values in f32
    #[command(flatten)]
    pub source: Source,
    /// A folder with the same model's weights in another type, to compare as well; may be given several times
    #[arg(long, value_name = "DIR")]
    pub against: Vec<PathBuf>,
    /// Compare the model with its weights rounded to these as well, parted by commas; folders are kept beside the shapes
    #[arg(long, value_enum, value_delimiter = ',')]
    pub weights: Vec<Rounding>,
    /// Element types of cached keys and values to compare, parted by commas
    #[arg(long, value_enum, value_delimiter = ',', default_value = "f32,f16,bf16,fp8")]
    pub kv: Vec<Kv>,
    /// How products are computed, parted by commas; the reference computes exactly
    #[arg(long, value_enum, value_delimiter = ',', default_value = "exact")]
    pub compute: Vec<Products>,
    /// Sequences to read: JSON lines with `prompt_ids` and `output_ids` [default: golden.jsonl of the model's folder, else
    /// sequences drawn from the reference]
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Sequences at most
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,
    /// Tokens of a sequence that is drawn
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    pub tokens: u32,
    /// What computes: auto, cpu or cuda:N (the limits that shares are of stay the processor's: see kvasir-gpu-check)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: Device,
    /// Threads that compute [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Draws sequences, and makes the weights of a shape
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print one JSON object per comparison instead of a table
    #[arg(long)]
    pub json: bool,
}

/// `limits`.
#[derive(Args)]
pub struct Limits {
    /// What computes: auto, cpu or cuda:N (the limits that shares are of stay the processor's: see kvasir-gpu-check)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: Device,
    /// Threads that compute [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Print a JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// `shape`.
#[derive(Args)]
pub struct Shape {
    /// Its name; without one, those there are
    pub name: Option<String>,
    /// Where folders of shapes are kept [default: bench/shapes beside this program's build, else the temporary directory]
    #[arg(long, value_name = "DIR")]
    pub shapes_dir: Option<PathBuf>,
    /// Makes the weights
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Element type of cached keys and values.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kv {
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
    /// IEEE single precision
    F32,
    /// 8-bit float (e4m3)
    Fp8,
}

impl Kv {
    pub fn dtype(self) -> KvDtype {
        match self {
            Self::Bf16 => KvDtype::Bf16,
            Self::F16 => KvDtype::F16,
            Self::F32 => KvDtype::F32,
            Self::Fp8 => KvDtype::Fp8,
        }
    }
}

/// What weights are rounded to.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rounding {
    /// Bytes, with a scale per row
    Int8,
    /// 8-bit floats (e4m3), with a scale per row
    Fp8,
    /// 8-bit floats (e4m3), with a scale per block of 128 x 128
    Fp8Block,
}

impl Rounding {
    pub fn scheme(self) -> Scheme {
        match self {
            Self::Int8 => Scheme::Int8,
            Self::Fp8 => Scheme::Fp8,
            Self::Fp8Block => Scheme::Fp8Block,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
            Self::Fp8Block => "fp8-block",
        }
    }
}

/// The backend's choices of arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Products {
    /// Activations stay f32
    Exact,
    /// Activations are rounded to bf16, as PyTorch and llama.cpp do
    Fast,
}

impl Products {
    pub fn compute(self) -> Compute {
        match self {
            Self::Exact => Compute::Exact,
            Self::Fast => Compute::Fast,
        }
    }
}

/// From the first to the second number, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range(pub usize, pub usize);

/// `512`, `64..512`.
fn range(text: &str) -> Result<Range, String> {
    let (low, high) = text.split_once("..").unwrap_or((text, text));
    match (low.parse(), high.parse()) {
        (Ok(low @ 1..), Ok(high)) if low <= high => Ok(Range(low, high)),
        _ => Err("wants a number of tokens above 0, or a range such as 64..512".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use kvasir_model::shapes::SHAPES;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed_and_names_every_shape() {
        Cli::command().debug_assert();
        let mut command = Cli::command();
        let help = command.find_subcommand_mut("decode").unwrap().render_long_help().to_string();
        assert!(SHAPES.iter().all(|shape| help.contains(shape.name)), "{help}");
    }

    #[test]
    fn ranges_are_read() {
        assert_eq!((range("7"), range("7..9")), (Ok(Range(7, 7)), Ok(Range(7, 9))));
        for text in ["", "0", "9..7", "..", "1..", "-1", "1.5"] {
            assert!(range(text).is_err(), "{text}");
        }
    }
}
