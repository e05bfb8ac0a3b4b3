//! Stands in for a vLLM server with NixlConnector: `/v1/completions` with token ids, `kv_transfer_params` both ways.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, Query, State as Shared},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    Role,
    rule::{self, State},
    serve::{Choosing, Form, Server, Step, Writing, events, misbehave, refuse},
};

pub(super) fn routes() -> Router<Arc<Server>> {
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/metrics", get(metrics))
        .route("/side_channel/{engine}/{request}", get(side_channel))
}

/// What it takes, as `CompletionRequest` of vLLM has it; anything else is a mistake of ours.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    model: String,
    prompt: Vec<u32>,
    max_tokens: usize,
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    stream_options: Option<Value>,
    temperature: f32,
    top_p: f32,
    top_k: i64,
    min_p: f32,
    repetition_penalty: f32,
    #[serde(rename = "presence_penalty")]
    _presence_penalty: f32,
    #[serde(rename = "frequency_penalty")]
    _frequency_penalty: f32,
    #[serde(default)]
    seed: Option<i64>,
    #[serde(default)]
    ignore_eos: bool,
    #[serde(default)]
    min_tokens: usize,
    #[serde(default)]
    stop_token_ids: Vec<u32>,
    #[serde(default, rename = "logit_bias")]
    _logit_bias: Map<String, Value>,
    #[serde(default)]
    logprobs: Option<usize>,
    #[serde(default)]
    return_token_ids: bool,
    #[serde(default)]
    return_tokens_as_token_ids: bool,
    #[serde(default)]
    structured_outputs: Option<Value>,
    #[serde(default)]
    cache_salt: Option<String>,
    #[serde(default)]
    kv_transfer_params: Option<Value>,
}

impl Request {
    fn check(&self, served: &str) -> Result<(), String> {
        let fine = [
            ("prompt", !self.prompt.is_empty()),
            ("max_tokens", self.max_tokens > 0),
            ("min_tokens", self.min_tokens <= self.max_tokens),
            ("temperature", (0.0..=2.0).contains(&self.temperature)),
            ("top_p", self.top_p > 0.0 && self.top_p <= 1.0),
            ("top_k", self.top_k == -1 || self.top_k > 0),
            ("min_p", (0.0..=1.0).contains(&self.min_p)),
            ("repetition_penalty", self.repetition_penalty > 0.0),
            ("stream_options", self.stream || self.stream_options.is_none()),
            ("cache_salt", self.cache_salt.as_ref().is_none_or(|salt| !salt.is_empty())),
            ("seed", self.seed.is_none_or(|seed| seed >= 0)),
        ];
        if self.model != served {
            return Err(format!("The model `{}` does not exist.", self.model));
        }
        match fine.into_iter().find(|(_, fine)| !fine) {
            Some((name, _)) => Err(format!("{name} is not acceptable")),
            None => Ok(()),
        }
    }
}

async fn completions(Shared(server): Shared<Arc<Server>>, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    let id = headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
    server.asked(&headers, &id, &body);
    let request: Request = match serde_json::from_value(body) {
        Ok(request) => request,
        Err(error) => return refuse(400, error),
    };
    if let Err(why) = request.check(&server.served) {
        return refuse(if request.model == server.served { 400 } else { 404 }, why);
    }
    let knobs = server.knobs();
    if knobs.after == 0
        && let Some(fault) = server.strikes(0)
    {
        return misbehave(&fault).await;
    }
    let params = request.kv_transfer_params.clone().unwrap_or_default();
    match (server.role, params["do_remote_decode"] == true) {
        (Role::Prefill, true) => prefill(&server, &request, &params, &id),
        (Role::Prefill, false) => refuse(500, "a prefill server that nobody tells for whom"),
        (_, true) => refuse(500, "a decode server that is asked to compute for another"),
        (_, false) => decode(&server, request, &params),
    }
}

/// Computes a prompt and says where its blocks are.
fn prefill(server: &Arc<Server>, request: &Request, params: &Value, id: &str) -> Response {
    let proxies_say = json!({
        "do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null, "remote_block_ids": null,
        "remote_host": null, "remote_port": null,
    });
    if *params != proxies_say || request.max_tokens != 1 || request.stream || id.is_empty() {
        return refuse(
            400,
            "a prefill request is one token, whole, with the parameters of the proxies, and has a name",
        );
    }
    // A request that did not reach its length hands over nothing.
    let token = State::of(&request.prompt).next(None);
    if !request.ignore_eos || request.stop_token_ids.contains(&token) {
        return refuse(400, "the one token may end the request before its length does");
    }
    let blocks = server.keep(id, &request.prompt);
    let answer = json!({
        "id": format!("cmpl-{id}"), "object": "text_completion", "created": 0, "model": server.served,
        "choices": [{"index": 0, "text": "?", "logprobs": null, "finish_reason": "length", "stop_reason": null}],
        "usage": {"prompt_tokens": request.prompt.len(), "completion_tokens": 1, "total_tokens": request.prompt.len() + 1,
                  "prompt_tokens_details": {"cached_tokens": 3}},
        "kv_transfer_params": {
            "do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [blocks],
            "remote_engine_id": server.engine_id, "remote_request_id": id, "remote_host": server.http.ip().to_string(),
            "remote_port": server.http.port(), "tp_size": 1,
        },
    });
    Json(answer).into_response()
}

/// Where decode servers fetch a prompt's KV, as if by NIXL.
async fn side_channel(
    Shared(server): Shared<Arc<Server>>,
    Path((engine, request)): Path<(String, String)>,
    Query(query): Query<Map<String, Value>>,
) -> Response {
    let blocks: Option<Vec<u32>> =
        query.get("blocks").and_then(Value::as_str).and_then(|blocks| serde_json::from_str(blocks).ok());
    let fits = |kept: &super::serve::Waiting| blocks.as_ref() == Some(&kept.blocks);
    match (engine == server.engine_id).then(|| server.hand_over(&request, fits)).flatten() {
        Some(handed) => Json(handed.state).into_response(),
        None => refuse(404, "no such blocks"),
    }
}

async fn fetch(server: &Server, params: &Value, prompt: &[u32]) -> Result<State, String> {
    let text = |key: &str| params[key].as_str().map(str::to_owned).ok_or_else(|| format!("no {key}"));
    let (host, port) = (text("remote_host")?, params["remote_port"].as_u64().ok_or("no remote_port")?);
    let (engine, request) = (text("remote_engine_id")?, text("remote_request_id")?);
    if params["do_remote_decode"] != false || params["tp_size"] != 1 {
        return Err("not what a prefill server said".to_owned());
    }
    let blocks = params["remote_block_ids"][0].to_string();
    let url = format!("http://{host}:{port}/side_channel/{engine}/{request}?blocks={blocks}");
    let reply = server.client.get(url).send().await.map_err(|error| error.to_string())?;
    if reply.status() != StatusCode::OK {
        return Err(format!("the prefill server says {}", reply.status()));
    }
    let state: State = reply.json().await.map_err(|error| error.to_string())?;
    if state.len != prompt.len() {
        return Err(format!("{} tokens were handed over, the prompt has {}", state.len, prompt.len()));
    }
    Ok(state)
}

fn decode(server: &Arc<Server>, request: Request, params: &Value) -> Response {
    if !request.stream || !request.return_token_ids || request.stream_options.is_none() {
        return refuse(400, "the test wants streams of token ids that tell their usage");
    }
    let remote = params["do_remote_prefill"] == true;
    let draws = request.temperature > 0.0;
    let choosing = Choosing {
        seed: draws.then(|| request.seed.map_or_else(|| server.dice(), |seed| seed as u64)),
        max_tokens: request.max_tokens,
        min_tokens: request.min_tokens,
        stop_token_ids: request.stop_token_ids.clone(),
        ignore_eos: request.ignore_eos,
    };
    let (prompt_tokens, structured) = (request.prompt.len(), request.structured_outputs.is_some());
    let (server, params, prompt) = (Arc::clone(server), params.clone(), request.prompt.clone());
    // kv_load_failure_policy: fail
    let begins = async move {
        let state = if remote {
            let state = fetch(&server, &params, &prompt).await?;
            server.saw(|seen| seen.handed += 1);
            state
        } else {
            server.saw(|seen| seen.computed += 1);
            State::of(&prompt)
        };
        Ok(Writing::new(&server, state, &prompt, choosing))
    };
    let event = move |_: &Writing, (token, reason): Step| {
        let logprobs = request.logprobs.map(|count| logprobs(token, count, request.return_tokens_as_token_ids));
        let choice = json!({
            "index": 0, "text": if structured { "{}" } else { "x" }, "logprobs": logprobs, "finish_reason": reason,
            "stop_reason": null, "token_ids": [token],
        });
        json!({"id": "cmpl-x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})
    };
    let last = json!({
        "id": "cmpl-x", "object": "text_completion", "created": 0, "model": "m", "choices": [],
        // For a decode server all that it was handed is cached.
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 0, "total_tokens": 0,
                  "prompt_tokens_details": {"cached_tokens": if remote { prompt_tokens } else { 5 }}},
    });
    let error = |why: &str| json!({"error": {"message": why, "type": "Internal Server Error", "code": 500}});
    events(begins, Form { event: Box::new(event), error, last: Some(last) })
}

/// As `CompletionLogProbs` of vLLM: with the chosen token among the alternatives.
fn logprobs(token: u32, count: usize, ids: bool) -> Value {
    let name = |token: u32| if ids { format!("token_id:{token}") } else { format!("word{token}") };
    let top: Map<String, Value> = rule::likeliest(token, count.max(1))
        .into_iter()
        .map(|(token, logprob)| (name(token), json!(logprob)))
        .collect();
    json!({"text_offset": [0], "token_logprobs": [rule::logprob(token)], "tokens": [name(token)], "top_logprobs": [top]})
}

async fn metrics(Shared(server): Shared<Arc<Server>>) -> String {
    let mut running = 0;
    server.saw(|seen| running = seen.running);
    format!(
        "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{{model_name=\"{0}\"}} {running}.0\n\
         # TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{{model_name=\"{0}\"}} 0.0\n",
        server.served
    )
}
