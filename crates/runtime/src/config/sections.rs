//! The sections that every service has.

use std::net::SocketAddr;

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::telemetry;

/// Logging.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// `human` or `json`. Default human.
    pub format: LogFormat,
    /// What is logged: a level (`info`), or levels by module (`info,kvasir_worker=debug`). Default info.
    #[serde(deserialize_with = "filter")]
    pub filter: String,
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// Where spans go: the way of each request through this process, for OpenTelemetry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TraceConfig {
    /// `http://host:port` of a collector that takes OTLP over gRPC. Default none: spans are not sent.
    pub otlp: Option<String>,
    /// Of requests whose client has not decided (by W3C's `traceparent`), this share is traced, 0 to 1. Default 1.
    #[serde(deserialize_with = "share")]
    pub sample: f64,
}

/// Health, readiness and metrics over HTTP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdminConfig {
    /// Where it listens; port 0 takes a free one. Default 127.0.0.1:0.
    pub listen: SocketAddr,
}

/// Leaving.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShutdownConfig {
    /// How long requests under way may go on after a signal to leave, in milliseconds. Default 30000.
    pub grace_ms: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Human, filter: "info".to_owned() }
    }
}

impl Default for TraceConfig {
    fn default() -> Self {
        Self { otlp: None, sample: 1.0 }
    }
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 0)) }
    }
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        Self { grace_ms: 30_000 }
    }
}

fn share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let share = f64::deserialize(deserializer)?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err(de::Error::custom(format!("{share}, allowed is 0 to 1"))) }
}

fn filter<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let filter = String::deserialize(deserializer)?;
    telemetry::check_filter(&filter).map_err(|error| {
        de::Error::custom(format!("{filter:?}: {error}; expected levels like `info` or `info,kvasir_worker=debug`"))
    })?;
    Ok(filter)
}
