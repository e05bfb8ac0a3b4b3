//! What both stand-ins have in common: knobs, what was seen, how an answer goes on from token to token.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::State as Shared,
    http::{HeaderMap, HeaderValue, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
    serve::ListenerExt,
};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
};

use super::{
    Kind, Knobs, Ports, Role, Seen,
    rule::{self, State},
    sglang, vllm,
};

/// One stand-in.
pub(super) struct Server {
    pub(super) role: Role,
    pub(super) served: String,
    pub(super) http: SocketAddr,
    /// Another one for each life, as an engine's is.
    pub(super) engine_id: String,
    pub(super) client: reqwest::Client,
    inner: Mutex<Inner>,
    /// Something was put into `waiting`, or taken out.
    pub(super) changed: Notify,
}

#[derive(Default)]
struct Inner {
    knobs: Knobs,
    seen: Seen,
    /// Prompts that were computed for others, by request or room.
    waiting: HashMap<String, Waiting>,
    next_block: u32,
    dice: u64,
}

/// A prompt that was computed for others.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub(super) state: State,
    pub(super) blocks: Vec<u32>,
}

/// Runs a stand-in: `KIND ROLE SERVED_NAME PORT_FILE [HTTP BOOTSTRAP_PORT]`.
pub async fn run(arguments: &[String]) -> Result<()> {
    let (kind, role, served, file, at) = match arguments {
        [kind, role, served, file] => (kind, role, served, file, None),
        [kind, role, served, file, http, bootstrap] => (kind, role, served, file, Some((http, bootstrap))),
        _ => bail!("usage: stand-in vllm|sglang prefill|decode|both SERVED_NAME PORT_FILE [HTTP BOOTSTRAP_PORT]"),
    };
    let kind: Kind = serde_json::from_value(kind.as_str().into())?;
    let role: Role = serde_json::from_value(role.as_str().into())?;
    let (http, port) = match at {
        Some((http, port)) => (http.parse()?, port.parse()?),
        None => (SocketAddr::from(([127, 0, 0, 1], 0)), 0u16),
    };
    let listener = TcpListener::bind(http).await.with_context(|| http.to_string())?;
    let bootstrap = TcpListener::bind(("127.0.0.1", port)).await?;
    let ports = Ports { http: listener.local_addr()?.to_string(), bootstrap: bootstrap.local_addr()?.port() };
    let server = Arc::new(Server {
        role,
        served: served.clone(),
        http: listener.local_addr()?,
        engine_id: format!("engine-{}-{}", std::process::id(), ports.bootstrap),
        client: reqwest::Client::new(),
        inner: Mutex::default(),
        changed: Notify::new(),
    });
    let common = Router::new()
        .route("/health", get(health))
        .route("/v1/models", get(models))
        .route("/stand_in", get(seen).post(turn));
    let routes = match kind {
        Kind::Vllm => common.merge(vllm::routes()),
        Kind::Sglang => common.merge(sglang::routes()),
    };
    let meeting = sglang::bootstrap_routes().with_state(Arc::clone(&server));
    write_whole(Path::new(file), &serde_json::to_string(&ports)?)?;
    // As uvicorn does.
    let prompt = |stream: &mut TcpStream| stream.set_nodelay(true).unwrap_or_default();
    let serving = axum::serve(listener.tap_io(prompt), routes.with_state(server));
    let meeting = axum::serve(bootstrap.tap_io(prompt), meeting);
    tokio::select! {
        ended = serving => ended?,
        ended = meeting => ended?,
    }
    Ok(())
}

/// Whoever reads it reads all of it.
fn write_whole(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(&new, path)?;
    Ok(())
}

impl Server {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing panics while it holds this lock")
    }

    pub(super) fn knobs(&self) -> Knobs {
        self.inner().knobs.clone()
    }

    pub(super) fn saw(&self, see: impl FnOnce(&mut Seen)) {
        see(&mut self.inner().seen);
    }

    /// A number that differs each time: draws without a seed.
    pub(super) fn dice(&self) -> u64 {
        let mut inner = self.inner();
        inner.dice += 1;
        kvasir_types::mix(inner.dice)
    }

    /// Computes a prompt for somebody, under this name: its blocks.
    pub(super) fn keep(&self, name: &str, prompt: &[u32]) -> Vec<u32> {
        let mut inner = self.inner();
        let first = inner.next_block;
        let count = prompt.len().div_ceil(16) as u32;
        inner.next_block += count;
        let blocks: Vec<u32> = (first..first + count).collect();
        inner.waiting.insert(name.to_owned(), Waiting { state: State::of(prompt), blocks: blocks.clone() });
        inner.seen.computed += 1;
        drop(inner);
        self.changed.notify_waiters();
        blocks
    }

    /// What was kept under a name, if `fits`: it is handed over once.
    pub(super) fn hand_over(&self, name: &str, fits: impl FnOnce(&Waiting) -> bool) -> Option<Waiting> {
        let mut inner = self.inner();
        if !fits(inner.waiting.get(name)?) {
            return None;
        }
        let handed = inner.waiting.remove(name);
        drop(inner);
        self.changed.notify_waiters();
        handed
    }

    /// Whether anything is kept under a name.
    pub(super) fn keeps(&self, name: &str) -> bool {
        self.inner().waiting.contains_key(name)
    }

    /// Takes note of a request.
    pub(super) fn asked(&self, headers: &HeaderMap, id: &str, body: &Value) {
        let authorization = headers.get("authorization").and_then(|value| Some(value.to_str().ok()?.to_owned()));
        self.saw(|seen| {
            seen.requests.push(body.clone());
            seen.ids.push(id.to_owned());
            seen.authorization = authorization;
        });
    }

    /// Whether the fault that was asked for strikes now, after so many tokens.
    pub(super) fn strikes(&self, tokens: usize) -> Option<String> {
        let mut inner = self.inner();
        let knobs = &mut inner.knobs;
        if knobs.fault.is_empty() || knobs.times == 0 || knobs.after != tokens {
            return None;
        }
        knobs.times -= 1;
        Some(knobs.fault.clone())
    }
}

/// An error object as both engines make it.
pub(super) fn refuse(status: u16, why: impl std::fmt::Display) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body =
        json!({"error": {"message": why.to_string(), "type": status.as_str(), "param": null, "code": status.as_u16()}});
    (status, Json(body)).into_response()
}

/// What a fault does to an answer that has not begun.
pub(super) async fn misbehave(fault: &str) -> Response {
    match fault.strip_prefix("status:") {
        Some(status) => refuse(status.parse().unwrap_or(500), "the test wants this"),
        None if fault == "hang" => std::future::pending().await,
        None if fault == "garbage" => Response::new(Body::from("<html>not what you expect</html>")),
        None => Response::new(Body::from_stream(stream::iter([
            Ok(Bytes::from_static(b"{")),
            Err(std::io::Error::other("the test wants this")),
        ]))),
    }
}

async fn health(Shared(server): Shared<Arc<Server>>) -> StatusCode {
    if server.knobs().sick { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}

async fn models(Shared(server): Shared<Arc<Server>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [{"id": server.served, "object": "model", "max_model_len": 8192}]}))
}

async fn seen(Shared(server): Shared<Arc<Server>>) -> Json<Seen> {
    Json(server.inner().seen.clone())
}

async fn turn(Shared(server): Shared<Arc<Server>>, Json(knobs): Json<Knobs>) {
    server.inner().knobs = knobs;
}

/// How an answer is chosen.
pub(super) struct Choosing {
    pub(super) seed: Option<u64>,
    pub(super) max_tokens: usize,
    pub(super) min_tokens: usize,
    pub(super) stop_token_ids: Vec<u32>,
    pub(super) ignore_eos: bool,
}

/// An answer under way; counted as given up unless it comes to its end.
pub(super) struct Writing {
    server: Arc<Server>,
    state: State,
    choosing: Choosing,
    script: Option<VecDeque<u32>>,
    /// Tokens so far.
    pub(super) said: Vec<u32>,
    ended: bool,
}

/// A token, and why the answer ends with it if it does.
pub(super) type Step = (u32, Option<&'static str>);

impl Writing {
    /// From that state on; `prompt`: to find out how much of a script is said already.
    pub(super) fn new(server: &Arc<Server>, state: State, prompt: &[u32], choosing: Choosing) -> Self {
        let script = server.knobs().script;
        let script = (!script.is_empty()).then(|| {
            let said = (0..=script.len()).rev().find(|&said| prompt.ends_with(&script[..said])).unwrap_or(0);
            script.iter().skip(said).copied().collect::<VecDeque<u32>>()
        });
        server.saw(|seen| seen.running += 1);
        Self { server: Arc::clone(server), state, choosing, script, said: Vec::new(), ended: false }
    }

    /// The next token, at its time. `Err`: what goes wrong now.
    pub(super) async fn step(&mut self) -> Result<Option<Step>, String> {
        if self.ended {
            return Ok(None);
        }
        if let Some(fault) = self.server.strikes(self.said.len()) {
            return Err(fault);
        }
        let every = Duration::from_millis(self.server.knobs().every_ms);
        if !every.is_zero() {
            tokio::time::sleep(every).await;
        }
        let token = match &mut self.script {
            Some(script) => script.pop_front().unwrap_or(rule::END),
            None => self.state.next(self.choosing.seed),
        };
        self.state = self.state.and(token);
        self.said.push(token);
        let choosing = &self.choosing;
        let ends = token == rule::END && !choosing.ignore_eos || choosing.stop_token_ids.contains(&token);
        let reason = if ends && self.said.len() > choosing.min_tokens {
            Some("stop")
        } else {
            (self.said.len() >= choosing.max_tokens).then_some("length")
        };
        self.ended = reason.is_some();
        Ok(Some((token, reason)))
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let ended = self.ended;
        self.server.saw(|seen| {
            seen.running -= 1;
            seen.aborted += usize::from(!ended);
        });
    }
}

/// Makes an event of a token.
pub(super) type Event = Box<dyn Fn(&Writing, Step) -> Value + Send + Sync>;

/// How an engine's events look.
pub(super) struct Form {
    /// Of a token.
    pub(super) event: Event,
    /// When it has failed and says why.
    pub(super) error: fn(&str) -> Value,
    /// After the last token.
    pub(super) last: Option<Value>,
}

/// Where a stream is.
enum Stage {
    /// The prompt's state is awaited.
    Begins(Pin<Box<dyn Future<Output = Result<Writing, String>> + Send>>),
    Goes(Writing),
    Over,
}

/// A stream of server-sent events, one for each token. Its head comes before whatever `begins` waits for.
pub(super) fn events(begins: impl Future<Output = Result<Writing, String>> + Send + 'static, form: Form) -> Response {
    let form = Arc::new(form);
    let events = stream::unfold(Stage::Begins(Box::pin(begins)), move |stage| {
        let form = Arc::clone(&form);
        async move {
            let data = |value: &Value| format!("data: {value}\n\n");
            let done = "data: [DONE]\n\n";
            let mut writing = match stage {
                Stage::Over => return None,
                Stage::Goes(writing) => writing,
                Stage::Begins(begins) => match begins.await {
                    Ok(writing) => writing,
                    Err(why) => return Some((Ok(data(&(form.error)(&why)) + done), Stage::Over)),
                },
            };
            Some(match writing.step().await {
                Ok(Some(step)) => (Ok(data(&(form.event)(&writing, step))), Stage::Goes(writing)),
                Ok(None) => (Ok(form.last.as_ref().map(data).unwrap_or_default() + done), Stage::Over),
                Err(fault) => match fault.as_str() {
                    "hang" => std::future::pending().await,
                    "garbage" => (Ok("data: {\"choices\": 7, \n\n".to_owned()), Stage::Over),
                    "error" => (Ok(data(&(form.error)("the test wants this")) + done), Stage::Over),
                    _ => (Err(std::io::Error::other("the test wants this")), Stage::Over),
                },
            })
        }
    });
    let mut response = Response::new(Body::from_stream(events));
    response.headers_mut().insert("content-type", HeaderValue::from_static("text/event-stream"));
    response
}
