//! How fast a modelled worker is, and how much it holds.
//!
//! A profile is a YAML file, or one of those that come with the program (`profiles/*.yaml`, each with the source of its
//! numbers). A step of a worker computes some tokens of prompts, or the next token of each answer, or both:
//!
//! ```text
//!   prompts:  step_seconds + token_seconds × tokens + context_seconds × Σ tokens before each of them
//!   answers:  step_seconds + sequence_seconds × answers + context_seconds × Σ tokens before each of them
//!   both:     the sum, the greater of both step_seconds once
//! ```

use serde::{Deserialize, Serialize};

/// Those that come with the program, by name.
pub const NAMED: [(&str, &str); 3] = [
    ("h100-llama-8b", include_str!("../profiles/h100-llama-8b.yaml")),
    ("a800x8-llama-70b", include_str!("../profiles/a800x8-llama-70b.yaml")),
    ("h200x8-deepseek-v3", include_str!("../profiles/h200x8-deepseek-v3.yaml")),
];

/// The profile that is taken if none is named.
pub const DEFAULT: &str = "a800x8-llama-70b";

/// One worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Where the numbers come from.
    pub source: String,
    /// Computing prompts.
    pub prefill: Prefill,
    /// Computing answers.
    pub decode: Decode,
    /// Memory for keys and values.
    pub kv: Kv,
    /// From prefill to decode workers.
    pub handover: Handover,
    /// Reading from the KV store, if there is one.
    pub store: Store,
    /// A message between two processes, in seconds.
    pub hop_seconds: f64,
}

/// How long prompts take.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefill {
    /// Any step.
    pub step_seconds: f64,
    /// Each token.
    pub token_seconds: f64,
    /// Each token, for each one before it.
    pub context_seconds: f64,
    /// Most tokens of prompts in a step.
    pub chunk_tokens: u32,
}

/// How long answers take.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decode {
    /// Any step.
    pub step_seconds: f64,
    /// Each answer.
    pub sequence_seconds: f64,
    /// Each token that any of them has before its next one.
    pub context_seconds: f64,
    /// Most requests that hold memory at a time.
    pub max_running: u32,
    /// Most tokens of prompts in a step with answers.
    pub chunk_tokens: u32,
    /// A decode worker computes up to so many tokens of a prompt itself.
    pub local_tokens: u32,
}

/// Memory for keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kv {
    /// Bytes of a token's keys and values.
    pub token_bytes: u32,
    /// Tokens that a worker has room for.
    pub room_tokens: u64,
}

/// From prefill to decode workers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Handover {
    /// What a prefill worker writes in a second, and what is read from a decode worker.
    pub bytes_per_second: f64,
    /// A layer is written while the next one is computed.
    pub layers: u32,
}

/// Reading from the KV store.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Store {
    /// What a worker reads in a second.
    pub bytes_per_second: f64,
    /// To find out what is there.
    pub lookup_seconds: f64,
}

/// A profile that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is no YAML, or a field is missing, unknown or of another kind.
    #[error("{field}: {source}")]
    Field {
        /// Which one.
        field: String,
        /// What is wrong with it.
        source: serde_yaml_ng::Error,
    },
    /// A number is not in its range.
    #[error("{field} is {value}: must be between {least} and {most}")]
    Range {
        /// Which one.
        field: &'static str,
        /// What it is.
        value: f64,
        /// The least that it may be.
        least: f64,
        /// The most.
        most: f64,
    },
    /// A setting that is not FIELD=VALUE.
    #[error("{0:?} is not FIELD=VALUE, like decode.max_running=128")]
    Setting(String),
    /// A setting of what is not there.
    #[error("a profile has no {0}")]
    Unknown(String),
}

impl Profile {
    /// The text of the profile of that name.
    pub fn named(name: &str) -> Option<&'static str> {
        NAMED.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
    }

    /// Reads one, with some of its values replaced (`decode.max_running=128`).
    ///
    /// # Errors
    /// What is missing, unknown or impossible.
    pub fn read(text: &str, settings: &[String]) -> Result<Self, Error> {
        let whole = |source| Error::Field { field: "the profile".to_owned(), source };
        let mut value: serde_yaml_ng::Value = serde_yaml_ng::from_str(text).map_err(whole)?;
        for setting in settings {
            set(&mut value, setting)?;
        }
        let profile: Self = serde_path_to_error::deserialize(value).map_err(|error| {
            let field = error.path().to_string();
            Error::Field {
                field: if field == "." { "the profile".to_owned() } else { field },
                source: error.into_inner(),
            }
        })?;
        profile.check()?;
        Ok(profile)
    }

    fn check(&self) -> Result<(), Error> {
        let Self { prefill, decode, kv, handover, store, .. } = self;
        let time = |field, value| (field, value, 0.0, 3600.0);
        let count = |field, value: u32, most| (field, f64::from(value), 1.0, most);
        let ranges = [
            time("hop_seconds", self.hop_seconds),
            time("prefill.step_seconds", prefill.step_seconds),
            // A step takes some time, or time would stand still.
            ("prefill.token_seconds", prefill.token_seconds, 1e-9, 3600.0),
            time("prefill.context_seconds", prefill.context_seconds),
            count("prefill.chunk_tokens", prefill.chunk_tokens, 1e9),
            ("decode.step_seconds", decode.step_seconds, 1e-9, 3600.0),
            time("decode.sequence_seconds", decode.sequence_seconds),
            time("decode.context_seconds", decode.context_seconds),
            count("decode.max_running", decode.max_running, 1e6),
            count("decode.chunk_tokens", decode.chunk_tokens, 1e9),
            ("decode.local_tokens", decode.local_tokens.into(), 0.0, 1e9),
            count("kv.token_bytes", kv.token_bytes, 1e9),
            ("kv.room_tokens", kv.room_tokens as f64, 1.0, 1e12),
            ("handover.bytes_per_second", handover.bytes_per_second, 1.0, 1e15),
            count("handover.layers", handover.layers, 1e4),
            ("store.bytes_per_second", store.bytes_per_second, 1.0, 1e15),
            time("store.lookup_seconds", store.lookup_seconds),
        ];
        for (field, value, least, most) in ranges {
            if !(least..=most).contains(&value) {
                return Err(Error::Range { field, value, least, most });
            }
        }
        Ok(())
    }

    /// To compute `tokens` of prompts, and the next token of `answers`, where `before` and `context` are how many tokens
    /// come before all of the one and of the other.
    pub fn step(&self, tokens: u64, before: f64, answers: u64, context: f64) -> f64 {
        let Self { prefill, decode, .. } = self;
        let mut least = 0.0f64;
        let mut seconds = 0.0;
        if tokens > 0 {
            least = least.max(prefill.step_seconds);
            seconds += prefill.token_seconds * tokens as f64 + prefill.context_seconds * before;
        }
        if answers > 0 {
            least = least.max(decode.step_seconds);
            seconds += decode.sequence_seconds * answers as f64 + decode.context_seconds * context;
        }
        least + seconds
    }
}

/// `a.b=value`; what is there decides which names there are.
fn set(profile: &mut serde_yaml_ng::Value, setting: &str) -> Result<(), Error> {
    let (path, value) = setting.split_once('=').ok_or_else(|| Error::Setting(setting.to_owned()))?;
    let mut place = profile;
    for part in path.split('.') {
        place = place.get_mut(part).ok_or_else(|| Error::Unknown(path.to_owned()))?;
    }
    let bad = |source| Error::Field { field: path.to_owned(), source };
    *place = serde_yaml_ng::from_str(value).map_err(bad)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_come_with_the_program_can_be_used_and_say_where_they_are_from() {
        for (name, text) in NAMED {
            let profile = Profile::read(text, &[]).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(profile.source.len() > 40, "{name}");
        }
        assert!(Profile::named(DEFAULT).is_some() && Profile::named("nothing").is_none());
    }

    #[test]
    fn a_wrong_field_is_named() {
        let text = Profile::named(DEFAULT).unwrap();
        let error = |settings: &[&str]| {
            let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
            Profile::read(text, &settings).unwrap_err().to_string()
        };
        assert!(error(&["decode.max_running=-1"]).starts_with("decode.max_running: "));
        assert_eq!(error(&["decode.step_seconds=0"]), "decode.step_seconds is 0: must be between 0.000000001 and 3600");
        assert!(error(&["prefill.token_seconds=.nan"]).starts_with("prefill.token_seconds is NaN"));
        assert_eq!(error(&["decode.speed=1"]), "a profile has no decode.speed");
        assert!(error(&["decode"]).contains("is not FIELD=VALUE"));
        assert!(Profile::read("prefill: 3", &[]).unwrap_err().to_string().contains("prefill"));
        assert!(Profile::read("[", &[]).unwrap_err().to_string().contains("the profile"));
        assert!(Profile::read(&format!("{text}\nmore: 1"), &[]).is_err());
    }

    #[test]
    fn a_step_costs_what_is_in_it() {
        let settings = ["prefill.step_seconds=1", "decode.step_seconds=2", "prefill.token_seconds=0.1"];
        let settings = settings.map(str::to_owned);
        let mut profile = Profile::read(Profile::named(DEFAULT).unwrap(), &settings).unwrap();
        (profile.prefill.context_seconds, profile.decode.context_seconds) = (0.01, 0.001);
        profile.decode.sequence_seconds = 0.2;
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
        near(profile.step(10, 100.0, 0, 0.0), 1.0 + 1.0 + 1.0);
        near(profile.step(0, 0.0, 5, 1000.0), 2.0 + 1.0 + 1.0);
        near(profile.step(10, 100.0, 5, 1000.0), 2.0 + 2.0 + 2.0);
    }
}
