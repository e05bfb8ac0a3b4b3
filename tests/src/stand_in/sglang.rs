//! Stands in for an SGLang server: `/generate` with token ids, prefill and decode meeting in a bootstrap room.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::{Path, State as Shared},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    Role,
    rule::{self, State},
    serve::{Choosing, Form, Server, Step, Writing, events, misbehave, refuse},
};

/// How long one server waits for the other.
const MEETING: Duration = Duration::from_secs(10);

pub(super) fn routes() -> Router<Arc<Server>> {
    Router::new().route("/generate", post(generate)).route("/abort_request", post(abort))
}

/// Of the port where decode servers meet a prefill server.
pub(super) fn bootstrap_routes() -> Router<Arc<Server>> {
    Router::new().route("/room/{room}", get(room))
}

/// What it takes, as `GenerateReqInput` of SGLang has it; anything else is a mistake of ours.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    rid: String,
    input_ids: Vec<u32>,
    sampling_params: Params,
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    return_logprob: bool,
    #[serde(default)]
    logprob_start_len: Option<i64>,
    #[serde(default)]
    top_logprobs_num: Option<usize>,
    #[serde(default, rename = "extra_key")]
    _extra_key: Option<String>,
    #[serde(default)]
    bootstrap_host: Option<String>,
    #[serde(default)]
    bootstrap_port: Option<u16>,
    #[serde(default)]
    bootstrap_room: Option<u64>,
}

/// `SamplingParams` of SGLang.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    max_new_tokens: usize,
    min_new_tokens: usize,
    temperature: f32,
    top_p: f32,
    top_k: i64,
    min_p: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    repetition_penalty: f32,
    #[serde(default)]
    stop_token_ids: Vec<u32>,
    #[serde(default)]
    ignore_eos: bool,
    #[serde(default, rename = "logit_bias")]
    _logit_bias: Map<String, Value>,
    #[serde(default)]
    sampling_seed: Option<i64>,
    #[serde(default)]
    json_schema: Option<String>,
    #[serde(default)]
    regex: Option<String>,
}

impl Request {
    fn check(&self) -> Result<(), String> {
        let params = &self.sampling_params;
        let fine = [
            ("input_ids", !self.input_ids.is_empty()),
            ("rid", !self.rid.is_empty()),
            ("temperature", params.temperature >= 0.0),
            ("top_p", params.top_p > 0.0 && params.top_p <= 1.0),
            ("top_k", params.top_k == -1 || params.top_k > 0),
            ("min_p", (0.0..=1.0).contains(&params.min_p)),
            ("frequency_penalty", (-2.0..=2.0).contains(&params.frequency_penalty)),
            ("presence_penalty", (-2.0..=2.0).contains(&params.presence_penalty)),
            ("repetition_penalty", params.repetition_penalty > 0.0 && params.repetition_penalty <= 2.0),
            ("min_new_tokens", params.min_new_tokens <= params.max_new_tokens),
            ("json_schema", params.json_schema.is_none() || params.regex.is_none()),
            ("logprob_start_len", self.logprob_start_len.is_none_or(|start| start == -1)),
        ];
        match fine.into_iter().find(|(_, fine)| !fine) {
            Some((name, _)) => Err(format!("{name} is not acceptable")),
            None => Ok(()),
        }
    }

    /// The three that say where the servers meet, or that there is no such place.
    fn meeting(&self) -> Result<Option<(&str, u16, u64)>, String> {
        match (&self.bootstrap_host, self.bootstrap_port, self.bootstrap_room) {
            (None, None, None) => Ok(None),
            (Some(host), Some(port), Some(room)) if room < 1 << 63 => Ok(Some((host, port, room))),
            _ => Err("bootstrap_host, bootstrap_port and bootstrap_room go together".to_owned()),
        }
    }
}

/// A prompt's KV, and the token that was drawn with it.
#[derive(Serialize, Deserialize)]
struct Handed {
    state: State,
}

async fn generate(Shared(server): Shared<Arc<Server>>, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    let rid = body["rid"].as_str().unwrap_or_default().to_owned();
    server.asked(&headers, &rid, &body);
    let request: Request = match serde_json::from_value(body) {
        Ok(request) => request,
        Err(error) => return refuse(400, error),
    };
    if let Err(why) = request.check() {
        return refuse(400, why);
    }
    let knobs = server.knobs();
    if knobs.after == 0
        && let Some(fault) = server.strikes(0)
    {
        return misbehave(&fault).await;
    }
    let meeting = match request.meeting() {
        Ok(meeting) => meeting.map(|(host, port, room)| (host.to_owned(), port, room)),
        Err(why) => return refuse(400, why),
    };
    match (server.role, meeting) {
        (Role::Both, None) => decode(&server, request, None),
        (Role::Prefill, Some((_, _, room))) => prefill(&server, &request, room).await,
        (Role::Decode, Some(meeting)) => decode(&server, request, Some(meeting)),
        (Role::Both, Some(_)) => refuse(400, "prefill and decode are not apart here"),
        (_, None) => refuse(400, "Disaggregated request received without bootstrap room id"),
    }
}

/// Computes a prompt, and answers when the decode server has it.
async fn prefill(server: &Arc<Server>, request: &Request, room: u64) -> Response {
    let name = room.to_string();
    server.keep(&name, &request.input_ids);
    let end = Instant::now() + MEETING;
    loop {
        let changed = server.changed.notified();
        if !server.keeps(&name) {
            break;
        }
        if tokio::time::timeout(end.saturating_duration_since(Instant::now()), changed).await.is_err() {
            return refuse(500, "no decode server came");
        }
    }
    let token = State::of(&request.input_ids).next(None);
    let meta = json!({
        "id": request.rid, "finish_reason": {"type": "length", "length": 0}, "prompt_tokens": request.input_ids.len(),
        "completion_tokens": 1, "cached_tokens": 3,
    });
    Json(json!({"text": "?", "output_ids": [token], "meta_info": meta})).into_response()
}

/// A decode server comes for the KV of a room.
async fn room(Shared(server): Shared<Arc<Server>>, Path(room): Path<String>) -> Response {
    let end = Instant::now() + MEETING;
    loop {
        let changed = server.changed.notified();
        if let Some(handed) = server.hand_over(&room, |_| true) {
            return Json(Handed { state: handed.state }).into_response();
        }
        if tokio::time::timeout(end.saturating_duration_since(Instant::now()), changed).await.is_err() {
            return refuse(404, "no prefill request for this room");
        }
    }
}

async fn fetch(server: &Server, host: &str, port: u16, room: u64, len: usize) -> Result<State, String> {
    let reply = server.client.get(format!("http://{host}:{port}/room/{room}")).send().await;
    let reply = reply.map_err(|error| error.to_string())?;
    if reply.status() != StatusCode::OK {
        return Err(format!("the prefill server says {}", reply.status()));
    }
    let handed: Handed = reply.json().await.map_err(|error| error.to_string())?;
    if handed.state.len != len {
        return Err(format!("{} tokens were handed over, the prompt has {len}", handed.state.len));
    }
    Ok(handed.state)
}

fn decode(server: &Arc<Server>, request: Request, meeting: Option<(String, u16, u64)>) -> Response {
    if !request.stream {
        return refuse(400, "the test wants streams");
    }
    let (params, prompt) = (&request.sampling_params, request.input_ids.len());
    let draws = params.temperature > 0.0;
    let choosing = Choosing {
        seed: draws.then(|| params.sampling_seed.map_or_else(|| server.dice(), |seed| seed as u64)),
        max_tokens: params.max_new_tokens,
        min_tokens: params.min_new_tokens,
        stop_token_ids: params.stop_token_ids.clone(),
        ignore_eos: params.ignore_eos,
    };
    let incremental = server.knobs().incremental;
    let (server, input) = (Arc::clone(server), request.input_ids.clone());
    let begins = async move {
        let state = match meeting {
            Some((host, port, room)) => {
                let state = fetch(&server, &host, port, room, input.len()).await?;
                server.saw(|seen| seen.handed += 1);
                state
            }
            None => {
                server.saw(|seen| seen.computed += 1);
                State::of(&input)
            }
        };
        Ok(Writing::new(&server, state, &input, choosing))
    };
    let alternatives = request.top_logprobs_num.unwrap_or(0);
    let event = move |writing: &Writing, (token, reason): Step| {
        let from = if incremental { writing.said.len() - 1 } else { 0 };
        let told = &writing.said[from..];
        let reason = reason.map(|reason| match reason {
            "length" => json!({"type": "length", "length": writing.said.len()}),
            _ => json!({"type": "stop", "matched": token}),
        });
        let mut meta = json!({
            "id": request.rid, "finish_reason": reason, "prompt_tokens": prompt, "cached_tokens": prompt,
            "completion_tokens": writing.said.len(),
        });
        if request.return_logprob {
            let logged = |(token, logprob): (u32, f32)| json!([logprob, token, null]);
            let chosen = |&token: &u32| logged((token, rule::logprob(token)));
            meta["output_token_logprobs"] = told.iter().map(chosen).collect();
            let top =
                |&token: &u32| -> Value { rule::likeliest(token, alternatives).into_iter().map(logged).collect() };
            meta["output_top_logprobs"] = told.iter().map(top).collect();
        }
        json!({"text": "x", "output_ids": told, "meta_info": meta})
    };
    let error = |why: &str| json!({"error": {"message": format!("KVTransferError: {why}")}});
    events(begins, Form { event: Box::new(event), error, last: None })
}

async fn abort(Shared(server): Shared<Arc<Server>>, Json(body): Json<Value>) {
    if let Some(rid) = body["rid"].as_str() {
        server.saw(|seen| seen.aborts.push(rid.to_owned()));
    }
}
