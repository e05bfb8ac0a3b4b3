//! What an operator may ask about routing, and change, on the admin port.
//!
//! | call | |
//! | --- | --- |
//! | `GET /route/policy` | `{"policy": "kv-aware", "policies": [...]}` |
//! | `POST /route/policy` | `{"policy": "least-loaded"}`: from the next request on, until the router ends |
//! | `GET /console` | a page that shows the cluster live ([`console`]) |
//! | `GET /planner` | who plans, what is expected of every model's workers and of others, and what was done |
//! | `POST /route/explain` | where a request would go now and why, without sending it: `{"model", "salt", "session"}` and one of `tokens` (ids), `text`, `chat` (a chat request's body) |

use std::sync::{Arc, OnceLock};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use kvasir_types::TokenId;
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
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(operators)
}

/// What can't be done, and why.
pub(super) struct Refusal(StatusCode, String);

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
    Json(json!({ "policy": app.policies.name().as_str(), "policies": names() }))
}

async fn policy(State(operators): State<Operators>) -> Result<Json<Value>, Refusal> {
    Ok(shown(operators.app()?))
}

async fn planner(State(operators): State<Operators>) -> Result<Json<Content>, Refusal> {
    Ok(Json(operators.app()?.board.read()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetPolicy {
    policy: String,
}

async fn set_policy(State(operators): State<Operators>, body: Bytes) -> Result<Json<Value>, Refusal> {
    let app = operators.app()?;
    let wanted: SetPolicy = serde_json::from_slice(&body).map_err(Refusal::bad)?;
    let Some(name) = PolicyName::named(&wanted.policy) else {
        let called: String = wanted.policy.chars().take(60).collect();
        return Err(Refusal::bad(format!("no policy is called {called:?}, there are: {}", names().join(", "))));
    };
    let before = app.policies.name();
    app.policies.set(name);
    info!(policy = name.as_str(), before = before.as_str(), "another policy");
    Ok(shown(app))
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
