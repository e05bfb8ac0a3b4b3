//! Arguments of `kvasirctl kv`.

use std::{path::PathBuf, time::Duration};

use clap::{ArgGroup, Args, Subcommand, ValueEnum};

/// What is asked of the KV store.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum KvCommand {
    /// What each node holds, how full it is, and how often it had what was asked for
    Stats,
    /// Which blocks of a prompt are where, and in which tier
    Lookup {
        #[command(flatten)]
        prompt: PromptArgs,
    },
    /// Keep a prompt's blocks that are there: for a while, and on the nodes that have them
    Pin {
        #[command(flatten)]
        prompt: PromptArgs,
        /// How strongly: soft pins go last, hard ones not at all (only in memory, only so much of it: `max_pinned_percent`)
        #[arg(long, value_enum, default_value_t = Strength::Soft)]
        keep: Strength,
        /// For how long, at most a week: 90s, 15m, 12h, 2d
        #[arg(long = "for", value_name = "TIME", default_value = "1h", value_parser = time)]
        ttl: Duration,
    },
    /// Keep a prompt's blocks no longer
    Unpin {
        #[command(flatten)]
        prompt: PromptArgs,
    },
    /// Give blocks up, in memory and on disk: those of a prompt and of all prompts that begin with it, of a model, of a tenant,
    /// or all. What is being read or written stays. Asks first, unless --yes is given
    Evict(EvictArgs),
    /// Have a node hand over what it has in memory, and wait until it may be stopped; others find its blocks elsewhere then
    Drain {
        /// The node, as `kv stats` names it
        node: String,
        /// How long to wait: 90s, 15m
        #[arg(long = "for", value_name = "TIME", default_value = "10m", value_parser = time)]
        patience: Duration,
        /// Begin, and don't wait for the end
        #[arg(long)]
        no_wait: bool,
    },
}

/// Which blocks to give up.
#[derive(Clone, Debug, Args)]
pub(crate) struct EvictArgs {
    /// The prompt's text in a file ("-": standard input); needs --tokenizer
    #[arg(long, value_name = "FILE", requires = "tokenizer", conflicts_with_all = ["tokens", "all"])]
    pub(crate) text: Option<PathBuf>,
    /// The prompt's token ids in a file ("-": standard input): numbers with anything between them
    #[arg(long, value_name = "FILE", conflicts_with = "all")]
    pub(crate) tokens: Option<PathBuf>,
    /// The model's tokenizer.json
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// The request's `cache_salt`, for a prompt
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) salt: String,
    /// The tenant's cache salt, for a prompt: its name, unless its router's configuration says another
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) tenant_salt: String,
    /// The model's name, or its fingerprint if no worker serves it any more. With a prompt: whose prompt it is
    #[arg(long, value_name = "NAME", conflicts_with = "all")]
    pub(crate) model: Option<String>,
    /// The tenant, as `kv stats` names it
    #[arg(long, value_name = "NAME", conflicts_with_all = ["all", "text", "tokens"])]
    pub(crate) tenant: Option<String>,
    /// Everything
    #[arg(long)]
    pub(crate) all: bool,
}

/// A prompt, or the beginning of one.
#[derive(Clone, Debug, Args)]
#[command(group(ArgGroup::new("prompt").required(true).args(["text", "tokens"])))]
pub(crate) struct PromptArgs {
    /// The prompt's text in a file ("-": standard input), as it is after the chat template; needs --tokenizer
    #[arg(long, value_name = "FILE", requires = "tokenizer")]
    pub(crate) text: Option<PathBuf>,
    /// The prompt's token ids in a file ("-": standard input): numbers with anything between them
    #[arg(long, value_name = "FILE")]
    pub(crate) tokens: Option<PathBuf>,
    /// The model's tokenizer.json
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// The model's name; needed where workers serve several
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// The request's `cache_salt`
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) salt: String,
    /// The tenant's cache salt, where routers ask for keys: its name, unless their configuration says another
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) tenant_salt: String,
}

/// How strongly blocks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Strength {
    /// Given up last.
    Soft,
    /// Not given up.
    Hard,
}

/// A number and a unit.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time, expected a number and s, m, h or d");
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let most = 7 * 86_400;
    let total = number.checked_mul(seconds).filter(|total| (1..=most).contains(total));
    total.map(Duration::from_secs).ok_or_else(|| format!("{text}: allowed is 1s to 7d"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_numbers_with_units_up_to_a_week() {
        assert_eq!(time("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(time("7d"), Ok(Duration::from_secs(604_800)));
        for bad in ["", "s", "5", "0s", "8d", "1w", "-1s", "ü", "99999999999999999999d"] {
            assert!(time(bad).is_err(), "{bad:?}");
        }
    }
}
