//! What an operator may ask about routing, and change, on the admin port.
//!
//! | call | |
//! | --- | --- |
//! | `GET /route/policy` | `{"policy": "kv-aware", "policies": [...]}` |
//! | `POST /route/policy` | `{"policy": "least-loaded"}`: from the next request on; it is set for this router (`POST /config`, `kvasir_settings`), and stays until it is unset |
//! | `GET /console` | a page that shows the cluster live ([`console`]) |
//! | `GET /planner` | who plans, what is expected of every model's workers and of others, and what was done |
//! | `GET /requests` | the requests under way, the oldest first, at most 2000: `{"requests": [...], "count"}` |
//! | `POST /requests/show` | `{"id"}`: those of that name that are under way, and what became of it step by step, also after its end |
//! | `POST /requests/cancel` | `{"id"}`: ends those of that name; their clients get an error |
//! | `POST /route/explain` | where a request would go now and why, without sending it: `{"model", "salt", "session"}` and one of `tokens` (ids), `text`, `chat` (a chat request's body) |

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{ConnectInfo, DefaultBodyLimit, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use kvasir_cluster::Scope;
use kvasir_rpc::operator::{Denied, Operator};
use kvasir_settings::Ask;
use kvasir_types::{RequestId, Role, TokenId};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::info;

use super::{
    app::{App, unix_now},
    console::{self, Surroundings},
    deciding::{self, Prompt},
    types::ChatRequest,
};
use crate::{
    fleet::{Crew, key_of},
    planner::Content,
    route::PolicyName,
};

/// Bytes of a body: a prompt of a million tokens.
const MAX_BODY_BYTES: usize = 16 << 20;

/// Where operators are served, once the router is built: the admin port is open before.
#[derive(Clone, Default)]
pub(crate) struct Operators(Arc<OnceLock<(Arc<App>, Surroundings)>>);

impl Operators {
    /// From here on.
    pub(crate) fn open(&self, app: Arc<App>, around: Surroundings) {
        let _only_once = self.0.set((app, around));
    }

    fn app(&self) -> Result<&Arc<App>, Refusal> {
        Ok(self.opened()?.0)
    }

    pub(super) fn opened(&self) -> Result<(&Arc<App>, &Surroundings), Refusal> {
        let starting = || Refusal(StatusCode::SERVICE_UNAVAILABLE, "the router is starting".to_owned());
        self.0.get().map(|(app, around)| (app, around)).ok_or_else(starting)
    }
}

/// Routes of the admin port.
pub(crate) fn admin(operators: Operators) -> Router {
    Router::new()
        .route("/route/policy", get(policy).post(set_policy))
        .route("/route/explain", post(explain))
        .route("/planner", get(planner))
        .merge(console::routes())
        .route("/requests", get(requests))
        .route("/requests/show", post(show_request))
        .route("/requests/cancel", post(cancel_request))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(operators)
}

/// What can't be done, and why.
pub(super) struct Refusal(pub(super) StatusCode, pub(super) String);

impl Refusal {
    fn bad(why: impl std::fmt::Display) -> Self {
        Self(StatusCode::BAD_REQUEST, why.to_string())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

fn names() -> Vec<&'static str> {
    PolicyName::ALL.iter().map(|name| name.as_str()).collect()
}

fn shown(app: &App) -> Json<Value> {
    // It may be a moment until what is set is followed; who asks hears of it as it is set.
    app.follow(&app.now());
    Json(json!({ "policy": app.policies.name().as_str(), "policies": names() }))
}

async fn policy(State(operators): State<Operators>) -> Result<Json<Value>, Refusal> {
    Ok(shown(operators.app()?))
}

async fn planner(State(operators): State<Operators>) -> Result<Json<Content>, Refusal> {
    let app = operators.app()?;
    app.follow(&app.now());
    Ok(Json(app.board.read()))
}

/// Requests listed in one answer.
const MAX_LISTED: usize = 2000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    id: RequestId,
}

async fn requests(State(operators): State<Operators>) -> Result<Json<Value>, Refusal> {
    let (requests, count) = operators.app()?.requests.list(MAX_LISTED);
    Ok(Json(json!({ "requests": requests, "count": count })))
}

async fn show_request(State(operators): State<Operators>, body: Bytes) -> Result<Json<Value>, Refusal> {
    let app = operators.app()?;
    let Named { id } = serde_json::from_slice(&body).map_err(Refusal::bad)?;
    let (live, stories) = (app.requests.find(id.as_str()), app.requests.stories(id.as_str()));
    Ok(Json(json!({ "router": app.id.as_str(), "requests": live, "stories": stories })))
}

async fn cancel_request(
    State(operators): State<Operators>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, Refusal> {
    let app = operators.app()?;
    let Named { id } = serde_json::from_slice(&body).map_err(Refusal::bad)?;
    changed(app, peer, &headers, id.as_str(), "cancel request", |who| {
        let cancelled = app.requests.cancel(id.as_str());
        info!(request_id = %id, cancelled, %who, "requests cancelled");
        Ok(Json(json!({ "cancelled": cancelled })))
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetPolicy {
    policy: String,
}

async fn set_policy(
    State(operators): State<Operators>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, Refusal> {
    let (app, around) = operators.opened()?;
    let wanted: SetPolicy = serde_json::from_slice(&body).map_err(Refusal::bad)?;
    let scope = Scope::one(Role::Router, app.id.clone()).to_string();
    let set = [("policy".to_owned(), Value::from(wanted.policy))].into();
    let ask = Ask { scope: Some(scope), set, ..Ask::default() };
    around.settings.change(ask, &headers, peer).await.map_err(|refusal| Refusal(refusal.0, refusal.1))?;
    Ok(shown(app))
}

/// Makes a change that an operator asks for; whoever else asks is told what is missing, and all of it is put on record.
fn changed<T>(
    app: &App,
    peer: SocketAddr,
    headers: &HeaderMap,
    on: &str,
    what: &str,
    change: impl FnOnce(&Operator) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    let shown = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let operator = app.desk.check(shown, Some(peer));
    let done = match &operator {
        Ok(operator) => change(operator),
        Err(Denied::NoToken) => Err(Refusal(StatusCode::UNAUTHORIZED, Denied::NoToken.to_string())),
        Err(Denied::BadToken) => Err(Refusal(StatusCode::FORBIDDEN, Denied::BadToken.to_string())),
    };
    let result = done.as_ref().map(|_| ()).map_err(|Refusal(_, why)| why.as_str());
    app.desk.tell(operator.as_ref().ok(), Some(peer), on, what, result);
    done
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Explain {
    model: String,
    #[serde(default)]
    salt: String,
    session: Option<String>,
    tokens: Option<Vec<u32>>,
    text: Option<String>,
    chat: Option<Value>,
}

async fn explain(State(operators): State<Operators>, body: Bytes) -> Result<Json<Value>, Refusal> {
    let app = operators.app()?;
    let asked: Explain = serde_json::from_slice(&body).map_err(Refusal::bad)?;
    let app = Arc::clone(app);
    // Long texts take a while to tokenize.
    let work = move || answer(&app, asked);
    let answered = tokio::task::spawn_blocking(work).await;
    answered.unwrap_or_else(|_| Err(Refusal(StatusCode::INTERNAL_SERVER_ERROR, "explaining failed".to_owned())))
}

fn answer(app: &App, asked: Explain) -> Result<Json<Value>, Refusal> {
    let model = app.models.iter().find(|model| model.name() == asked.model);
    let model = model.ok_or_else(|| {
        let known: Vec<&str> = app.models.iter().map(|model| model.name()).collect();
        Refusal::bad(format!("no such model, there are: {}", known.join(", ")))
    })?;
    let wrong = |error: &(dyn std::error::Error + 'static)| Refusal::bad(kvasir_runtime::chain(error));
    let tokens: Vec<TokenId> = match (asked.tokens, asked.text, asked.chat) {
        (Some(ids), None, None) => ids.into_iter().map(TokenId).collect(),
        (None, Some(text), None) => model.encode(&text, true).map_err(|error| wrong(&error))?,
        (None, None, Some(chat)) => {
            let request = ChatRequest::parse(chat.to_string().as_bytes()).map_err(|error| wrong(&error))?;
            let rendered = model.render(&request.conversation, unix_now());
            rendered.and_then(|text| model.encode(&text, false)).map_err(|error| wrong(&error))?
        }
        _ => return Err(Refusal::bad("one of tokens, text and chat is needed")),
    };
    if tokens.is_empty() {
        return Err(Refusal::bad("the prompt holds no token"));
    }
    let fleet = Arc::clone(&app.fleet.borrow());
    let crew = fleet.crew(model.name()).cloned().unwrap_or_else(Crew::default).longer_than(tokens.len());
    let ask = crate::route::Ask {
        session: asked.session.as_deref().map(key_of),
        ..app.ask_for_show(tokens.len()).within(model.slo())
    };
    let prompt = Prompt { tokens: &tokens, salt: &asked.salt };
    let explanation = deciding::explain(app, ask, &prompt, &crew.rested(std::time::Instant::now()));
    let nobody = || Refusal(StatusCode::SERVICE_UNAVAILABLE, "no worker can take this request".to_owned());
    Ok(Json(json!(explanation.ok_or_else(nobody)?)))
}
