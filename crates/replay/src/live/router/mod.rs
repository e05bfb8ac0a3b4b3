//! A trace against a router, and so against a whole cluster.
//!
//! A block of the trace becomes so many tokens that follow from its number, so equal ids are equal tokens and prompts that
//! share a beginning in the trace share one here. Behind them comes one token more: what is computed of a prompt is its last
//! token at least, so that all blocks before it can have been kept. Answers are streamed, have as many tokens as the
//! trace's (cut to a limit) whatever the model would say, and tell at the end how much of the prompt was cached.
//!
//! Prompts that the model's context has no room for lose their end.

mod events;
mod lane;
mod report;

use std::{sync::Arc, time::Duration};

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tokio::sync::mpsc;

pub use report::{Report, Times, Tokens};

use self::{lane::RouterLane, report::Counts};
use super::{
    Names, Plan, Row,
    bound::Bound,
    drive::{Course, drive},
    pass::Pass,
};
use crate::trace::Trace;

/// How long a router may take to accept a connection, and to say which models it has.
const CONNECT: Duration = Duration::from_secs(10);

/// Whom to replay against, and with what.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Without `/v1`.
    pub url: String,
    /// The model's name; `None`: the router's first.
    pub model: Option<String>,
    /// Tokens for each block of the trace.
    pub block_tokens: u32,
    /// Most tokens of an answer.
    pub max_output_tokens: u32,
    /// Token ids are below this.
    pub vocabulary: u32,
    /// How long a whole answer may take.
    pub timeout: Duration,
}

/// The model asked.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Model {
    name: String,
    /// Most tokens of prompt and answer together, if the router says.
    context: Option<u64>,
}

/// What all lanes of a pass share.
struct Ground {
    http: reqwest::Client,
    settings: Settings,
    model: Model,
    names: Names,
}

pub(super) async fn replay(
    settings: Settings,
    plan: &Plan,
    traces: &[(String, Arc<Trace>)],
    stops: &mut mpsc::Receiver<()>,
) -> anyhow::Result<Vec<Row>> {
    let http = reqwest::Client::builder().connect_timeout(CONNECT).build().context("no HTTP client")?;
    let model = model(&http, &settings).await?;
    eprintln!("model {}, namespace {}: the same again finds what this run leaves", model.name, plan.namespace);
    let mut rows = Vec::new();
    for (name, trace) in traces {
        let names = Names::new(&plan.namespace, name, settings.block_tokens.into());
        let ground = Ground { http: http.clone(), settings: settings.clone(), model: model.clone(), names };
        let (ground, mut bound) = (Arc::new(ground), Bound::new(trace));
        for pass in 1..=plan.repeat {
            let lanes = (0..plan.lanes).map(|_| RouterLane::new(ground.clone())).collect();
            let course = Course { name: name.clone(), trace: trace.clone(), limit: plan.limit, pace: plan.pace };
            let (counts, ended) = drive(course, lanes, Counts::default(), stops).await;
            let about = Pass { name, trace, pass, plan, ended };
            let report = counts.report(&about, &settings, &ground.model.name, &mut bound);
            print!("{}", report.table());
            rows.push(Row::Router(report));
            if ended.stopped {
                return Ok(rows);
            }
        }
    }
    Ok(rows)
}

/// The model to ask, as the router knows it.
async fn model(http: &reqwest::Client, settings: &Settings) -> anyhow::Result<Model> {
    let url = format!("{}/v1/models", settings.url);
    let failed = || format!("{url} does not say which models there are");
    let answer = http.get(&url).timeout(CONNECT).send().await.with_context(failed)?;
    let answer: Value = answer.error_for_status().with_context(failed)?.json().await.with_context(failed)?;
    pick(&answer, settings.model.as_deref())
}

fn pick(answer: &Value, wanted: Option<&str>) -> anyhow::Result<Model> {
    let models: Vec<&Value> = answer["data"].as_array().into_iter().flatten().collect();
    ensure!(!models.is_empty(), "the router has no models");
    let is_wanted = |model: &&Value| wanted.is_none_or(|name| model["id"] == name);
    let Some(model) = models.iter().copied().find(is_wanted) else {
        let names: Vec<_> = models.iter().filter_map(|model| model["id"].as_str()).collect();
        bail!("the router has no model {:?}; it has {}", wanted.unwrap_or_default(), names.join(", "));
    };
    let name = model["id"].as_str().context("the router's model has no name")?.to_owned();
    Ok(Model { name, context: model["max_model_len"].as_u64() })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_model_is_asked_unless_another_is_named() {
        let answer = json!({"data": [{"id": "a", "max_model_len": 100}, {"id": "b", "max_model_len": null}]});
        assert_eq!(pick(&answer, None).unwrap(), Model { name: "a".to_owned(), context: Some(100) });
        assert_eq!(pick(&answer, Some("b")).unwrap(), Model { name: "b".to_owned(), context: None });
        let error = pick(&answer, Some("c")).unwrap_err().to_string();
        assert_eq!(error, "the router has no model \"c\"; it has a, b");
        assert!(pick(&json!({"error": 1}), None).is_err());
    }
}
