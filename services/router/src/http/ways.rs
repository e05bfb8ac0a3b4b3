//! The ways of requests, for the console: which ones this router had last, and what became of one of them here and on the
//! workers that had a part in it.
//!
//! | call | |
//! | --- | --- |
//! | `GET /console/requests` | the latest, at most 100, the last one first: `{"requests": [...]}` |
//! | `GET /console/request?id=ID` | `{"id", "stories": [{"member", "part", "began_unix_us", "over", "steps": [{"at_us", "step", "facts"}]}], "not_reached": [...]}` |
//!
//! Workers are found by name: the router's own story tells which it chose, and theirs whom they asked. What they answer is
//! bounded and cleaned here; the page shows it as text and nothing else. `kvasirctl trace` asks everybody instead.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Query, State},
    routing::get,
};
use futures_util::future::join_all;
use http::StatusCode;
use kvasir_proto::v1::{TraceRequest, TraceStory, trace_fact, worker_client::WorkerClient};
use kvasir_runtime::{Kind, chain};
use kvasir_types::{PROTOCOL_VERSION, RequestId};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::{
    app::App,
    routing::{Operators, Refusal},
};
use crate::fleet::Worker;

/// Requests in the list.
const MAX_LISTED: usize = 100;
/// Workers that are asked about one request. It had a few; one that moves on and on may have had many.
const MAX_ASKED: usize = 16;
/// Looks that may be under way at the same time.
pub(super) const MAX_LOOKS: usize = 8;
/// For a worker to tell.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most stories, steps of one, facts of one, and characters of a text, that are taken from a worker.
const MAX_STORIES: usize = 16;
const MAX_STEPS: usize = 128;
const MAX_FACTS: usize = 16;
const MAX_TEXT: usize = 300;

pub(super) fn routes() -> Router<Operators> {
    Router::new().route("/console/requests", get(latest)).route("/console/request", get(way))
}

async fn latest(State(operators): State<Operators>) -> Result<Json<Value>, Refusal> {
    Ok(Json(json!({ "requests": operators.opened()?.0.requests.latest(MAX_LISTED) })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    id: RequestId,
}

async fn way(State(operators): State<Operators>, Query(Named { id }): Query<Named>) -> Result<Json<Value>, Refusal> {
    let (app, around) = operators.opened()?;
    let busy = || Refusal(StatusCode::SERVICE_UNAVAILABLE, "too many look at requests: in a moment again".to_owned());
    let place = Arc::clone(&around.looks).try_acquire_owned().map_err(|_| busy())?;
    let (tell, told) = oneshot::channel();
    {
        // Connections to workers live where requests do, not on this page's thread.
        let _there = around.runtime.enter();
        let app = Arc::clone(app);
        around.tasks.spawn(Kind::Background, "console", async move {
            let _gone = tell.send(gather(&app, &id).await);
            drop(place);
            Ok(())
        });
    }
    let stopped = || Refusal(StatusCode::SERVICE_UNAVAILABLE, "the router is leaving".to_owned());
    told.await.map(Json).map_err(|_| stopped())
}

/// All that is known of a request.
async fn gather(app: &App, id: &RequestId) -> Value {
    let fleet = Arc::clone(&app.fleet.borrow());
    let mut stories = app.requests.stories(id.as_str());
    stories.iter_mut().for_each(|story| story["member"] = app.id.as_str().into());
    let (mut asked, mut silent) = (BTreeSet::new(), Vec::new());
    // The decode workers, then the prefill workers that those asked.
    for _ in 0..2 {
        let named = named(&stories);
        let mut round = Vec::new();
        for worker in fleet.workers().filter(|worker| worker.engine.is_none()) {
            let name = worker.member.id.as_str();
            if named.contains(name) && asked.len() < MAX_ASKED && asked.insert(name.to_owned()) {
                round.push(worker);
            }
        }
        for (worker, told) in join_all(round.into_iter().map(async |worker| (worker, ask(worker, id).await))).await {
            match told {
                Ok(told) => stories.extend(told),
                Err(why) => silent.push(format!("{}: {why}", worker.member.id)),
            }
        }
    }
    stories.sort_by_key(|story| story["began_unix_us"].as_u64());
    json!({ "id": id.as_str(), "stories": stories, "not_reached": silent })
}

/// Workers that steps name.
fn named(stories: &[Value]) -> BTreeSet<String> {
    let steps = stories.iter().filter_map(|story| story["steps"].as_array()).flatten();
    let names = steps.flat_map(|step| ["worker", "prefill"].map(|fact| step["facts"][fact].as_str()));
    names.flatten().filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

async fn ask(worker: &Worker, id: &RequestId) -> Result<Vec<Value>, String> {
    let channel = worker.channel().map_err(|error| text(&chain(&error).to_string()))?;
    let request = TraceRequest { protocol_version: PROTOCOL_VERSION, request_id: id.to_string() };
    let told = tokio::time::timeout(PATIENCE, WorkerClient::new(channel).trace(request)).await;
    let told = told.map_err(|_| format!("no answer within {} ms", PATIENCE.as_millis()))?;
    let told = told.map_err(|status| text(status.message()))?.into_inner();
    Ok(told.stories.into_iter().take(MAX_STORIES).map(|story| of_worker(worker.member.id.as_str(), story)).collect())
}

fn of_worker(member: &str, story: TraceStory) -> Value {
    let steps = story.steps.into_iter().take(MAX_STEPS).map(|step| {
        let facts = step.facts.into_iter().take(MAX_FACTS).filter_map(|fact| {
            let value = match fact.value? {
                trace_fact::Value::Text(words) => json!(text(&words)),
                trace_fact::Value::Number(number) => json!(number),
            };
            Some((text(&fact.name), value))
        });
        json!({ "at_us": step.at_us, "step": text(&step.step), "facts": facts.collect::<BTreeMap<_, _>>() })
    });
    let steps: Vec<Value> = steps.collect();
    let part = text(&story.part);
    json!({ "member": member, "part": part, "began_unix_us": story.began_unix_us, "over": story.over, "steps": steps })
}

/// What somebody else says, fit to be shown.
fn text(said: &str) -> String {
    said.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use kvasir_proto::v1::{TraceFact, TraceStep};

    use super::*;

    #[test]
    fn what_a_worker_says_is_cut_and_cleaned() {
        let fact = |name: String, value| TraceFact { name, value: Some(value) };
        let words = trace_fact::Value::Text(format!("<b>\u{1b}[31m{}", "x".repeat(1000)));
        let step = TraceStep {
            at_us: 7,
            step: "pla\u{0}ced".into(),
            facts: (0..40).map(|at| fact(format!("f{at:02}"), words.clone())).collect(),
        };
        let story =
            TraceStory { part: "decode".into(), began_unix_us: 1, over: true, steps: vec![step; MAX_STEPS + 9] };
        let told = of_worker("decode-0", story);
        let steps = told["steps"].as_array().unwrap();
        assert_eq!((steps.len(), steps[0]["step"].as_str()), (MAX_STEPS, Some("placed")));
        let facts = steps[0]["facts"].as_object().unwrap();
        let first = facts["f00"].as_str().unwrap();
        assert_eq!((facts.len(), first.len(), &first[..7]), (MAX_FACTS, MAX_TEXT, "<b>[31m"));
        let odd = TraceFact { name: "odd".into(), value: Some(trace_fact::Value::Number(f64::NAN)) };
        let step = TraceStep { at_us: 0, step: "s".into(), facts: vec![odd] };
        let told = of_worker("d", TraceStory { steps: vec![step], ..TraceStory::default() });
        assert_eq!(told["steps"][0]["facts"]["odd"], Value::Null, "no number is none in JSON, too");
    }

    #[test]
    fn workers_are_found_by_what_the_steps_name() {
        let story = json!({ "steps": [
            { "facts": { "worker": "decode-0", "prefill": "" } },
            { "facts": { "worker": 7, "why": "prefill-9" } },
            { "facts": { "prefill": "prefill-1" } },
        ] });
        let names: Vec<String> = named(&[story, json!({ "steps": "none" })]).into_iter().collect();
        assert_eq!(names, ["decode-0", "prefill-1"]);
    }
}
