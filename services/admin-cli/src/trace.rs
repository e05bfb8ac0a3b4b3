//! `kvasirctl trace ID`: the way of one request through the services, from what each of them remembers.
//!
//! ```text
//!   routers: POST /requests/show ─┐
//!                                 ├─▶ stories, by when they began ─▶ a tree: router ─▶ decode worker ─▶ prefill worker
//!   workers: Worker.Trace ────────┘
//! ```
//!
//! Times within a story are of one clock. Where a story begins beside the others is by the clocks of their machines, which may
//! differ by some milliseconds.

use std::fmt::Write as _;

use anyhow::ensure;
use clap::Args;
use futures_util::{StreamExt, stream};
use kvasir_cluster::Member;
use kvasir_proto::v1::{TraceRequest, trace_fact::Value as Known};
use kvasir_types::{PROTOCOL_VERSION, RequestId, Role};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{
    events::utc,
    output::Answer,
    probe::{self, Way, printable},
    requests,
    session::Session,
};

/// Workers asked at the same time.
const AT_ONCE: usize = 64;
/// Most stories, and steps of one, that are taken from one member.
const MAX_STORIES: usize = 64;
const MAX_STEPS: usize = 256;

/// Which request.
#[derive(Clone, Debug, Args)]
pub(crate) struct TraceArgs {
    /// The request's name: `x-request-id` of its answer
    #[arg(value_name = "ID")]
    id: RequestId,
}

/// A request's way through one member.
#[derive(Debug, PartialEq, Serialize)]
struct Story {
    member: String,
    part: String,
    began_unix_us: u64,
    over: bool,
    steps: Vec<Step>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Step {
    /// Since the story began.
    at_us: u64,
    step: String,
    facts: Map<String, Value>,
}

/// Puts the stories together.
pub(crate) async fn run(args: TraceArgs, session: &Session) -> anyhow::Result<Answer> {
    let (view, way) = (session.view().await?, session.way()?);
    let body = json!({ "id": args.id.as_str() });
    let (mut stories, mut silent) = (Vec::new(), Vec::new());
    for (router, told) in requests::ask(&view, &way, "/requests/show", Some(&body)).await {
        match told {
            Ok(page) => stories.extend(of_router(router, &page)),
            Err(why) => silent.push(format!("{}: {why}", router.id)),
        }
    }
    let workers = view
        .members
        .iter()
        .filter(|member| matches!(member.role, Role::Prefill | Role::Decode) && member.engine.is_none());
    let asked = stream::iter(workers).map(async |worker| (worker, of_worker(worker, &args.id, &way).await));
    for (worker, told) in asked.buffered(AT_ONCE).collect::<Vec<_>>().await {
        match told {
            Ok(told) => stories.extend(told),
            Err(why) => silent.push(format!("{}: {why}", worker.id)),
        }
    }
    ensure!(
        !stories.is_empty(),
        "nobody remembers request {}: it never came, or too many came after it{}",
        args.id,
        if silent.is_empty() { String::new() } else { format!(" ({})", silent.join("; ")) }
    );
    stories.sort_by_key(|story| (story.began_unix_us, depth(&story.part)));
    let shown = json!({ "id": args.id.as_str(), "stories": stories, "not_reached": silent });
    Ok(session.output().show(&shown, || tree(args.id.as_str(), &stories, &silent)).into())
}

/// What a router's page says; what makes no sense is skipped.
fn of_router(router: &Member, page: &Value) -> Vec<Story> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let step = |step: Value| {
        let facts = step["facts"].as_object().into_iter().flatten();
        let facts = facts.filter_map(|(name, value)| {
            let value = match value {
                Value::String(text) => Value::String(printable(text)),
                Value::Number(_) => value.clone(),
                _ => return None,
            };
            Some((printable(name), value))
        });
        Some(Step { at_us: step["at_us"].as_u64()?, step: printable(step["step"].as_str()?), facts: facts.collect() })
    };
    let story = |story: Value| {
        let steps = list(&story["steps"]).into_iter().take(MAX_STEPS).filter_map(step).collect();
        Some(Story {
            member: router.id.to_string(),
            part: printable(story["part"].as_str()?),
            began_unix_us: story["began_unix_us"].as_u64()?,
            over: story["over"] == true,
            steps,
        })
    };
    list(&page["stories"]).into_iter().take(MAX_STORIES).filter_map(story).collect()
}

async fn of_worker(worker: &Member, id: &RequestId, way: &Way) -> Result<Vec<Story>, String> {
    let request = TraceRequest { protocol_version: PROTOCOL_VERSION, request_id: id.to_string() };
    let told = probe::ask_worker(&worker.grpc, way, async |mut client| client.trace(request).await).await?;
    let stories = told.stories.into_iter().take(MAX_STORIES).map(|story| {
        let steps = story.steps.into_iter().take(MAX_STEPS).map(|step| {
            let facts = step.facts.into_iter().filter_map(|fact| {
                let value = match fact.value? {
                    Known::Text(text) => json!(printable(&text)),
                    Known::Number(number) => json!(number),
                };
                Some((printable(&fact.name), value))
            });
            Step { at_us: step.at_us, step: printable(&step.step), facts: facts.collect() }
        });
        let steps = steps.collect();
        let (member, part) = (worker.id.to_string(), printable(&story.part));
        Story { member, part, began_unix_us: story.began_unix_us, over: story.over, steps }
    });
    Ok(stories.collect())
}

fn depth(part: &str) -> usize {
    match part {
        "router" => 0,
        "decode" => 1,
        _ => 2,
    }
}

fn tree(id: &str, stories: &[Story], silent: &[String]) -> String {
    let zero = stories.first().map_or(0, |story| story.began_unix_us);
    let mut text = format!("request {id}, {} UTC\n", utc(zero / 1_000));
    for story in stories {
        let pad = "  ".repeat(depth(&story.part));
        let goes_on = if story.over { "" } else { ", goes on" };
        let _ = writeln!(text, "{pad}{} {}{goes_on}", story.part, story.member);
        for step in &story.steps {
            let at_ms = (story.began_unix_us - zero + step.at_us) as f64 / 1e3;
            let mut facts: Vec<String> = step.facts.iter().map(|(name, value)| fact(name, value)).collect();
            facts.sort_unstable(); // a map has no order of its own
            let line = format!("{pad}  {at_ms:>10.1} ms  {:16} {}", step.step, facts.join(", "));
            let _ = writeln!(text, "{}", line.trim_end());
        }
    }
    for line in silent {
        let _ = writeln!(text, "not reached: {line}");
    }
    text
}

fn fact(name: &str, value: &Value) -> String {
    let name = name.replace('_', " ");
    match value {
        Value::String(text) if text.is_empty() => format!("{name} none"),
        Value::String(text) => format!("{name} {text}"),
        Value::Number(number) => match number.as_f64() {
            Some(whole) if whole.fract() == 0.0 => format!("{name} {whole:.0}"),
            _ => format!("{name} {number}"),
        },
        other => format!("{name} {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_every_step_at_its_time_since_the_first() {
        let router = crate::gather::tests::decode("router-0", "", "");
        let page = json!({ "stories": [{
            "part": "router", "began_unix_us": 1_000_000u64, "over": true, "later": 1,
            "steps": [
                { "at_us": 0, "step": "received", "facts": { "tenant": "acme" } },
                { "at_us": 1_500, "step": "pla\u{1b}ced", "facts": { "prefill": "", "cached_tokens": 16.0, "odd": [] } },
                { "step": "without a time" },
            ],
        }, { "part": 7 }] });
        let mut stories = of_router(&router, &page);
        assert_eq!((stories.len(), stories[0].steps.len()), (1, 2));
        stories.push(Story {
            member: "decode-1".into(),
            part: "decode".into(),
            began_unix_us: 1_002_000,
            over: false,
            steps: vec![Step {
                at_us: 250,
                step: "admitted".into(),
                facts: [("waited_ms".to_owned(), json!(0.25))].into_iter().collect(),
            }],
        });
        assert_eq!(
            tree("r-1", &stories, &["decode-2: silence".to_owned()]),
            "request r-1, 1970-01-01 00:00:01 UTC\n\
             router router-0\n         0.0 ms  received         tenant acme\n         \
             1.5 ms  placed           cached tokens 16, prefill none\n\
             \x20 decode decode-1, goes on\n           2.2 ms  admitted         waited ms 0.25\n\
             not reached: decode-2: silence\n"
        );
    }
}
