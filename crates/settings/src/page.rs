//! Settings on the admin port.
//!
//! | call | |
//! | --- | --- |
//! | `GET /config` | the configuration that the member runs with, and where each value comes from |
//! | `POST /config/check` | whether a change could be made, and what it would change; makes none |
//! | `POST /config` | makes a change, for all members of this one's role or for this one. Needs an operator's token where one is set |
//!
//! A change: `{"scope": "router", "set": {"limits.max_inflight": "100"}, "unset": ["policy"]}`; values are YAML, as with `--set`.
//! With `if_revision`, only if nobody has changed anything since; with `replace`, also over what can't be used.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use axum::{
    Json, Router,
    body::Bytes,
    extract::{ConnectInfo, DefaultBodyLimit, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use kvasir_cluster::{Change, Document, Error, Event, EventKind, Found, Scope, changed};
use kvasir_rpc::operator::{Denied, Desk, Operator};
use kvasir_runtime::{Config, chain, config::redacted};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Settings;

/// Bytes of a body.
const MAX_BODY_BYTES: usize = 64 << 10;
/// Keys of a change.
const MAX_KEYS: usize = 64;
/// For this member to see what it has written itself.
const SEEN: Duration = Duration::from_secs(2);

/// A change that is asked for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ask {
    /// For whom: a [`Scope`], as text; nothing: all of the role of the member that is asked.
    pub scope: Option<String>,
    /// What is to be set to what. Texts are YAML, as with `--set`.
    pub set: BTreeMap<String, Value>,
    /// What is not to be set any more.
    pub unset: Vec<String>,
    /// Only if what is set has this revision; 0: nothing is set yet.
    pub if_revision: Option<u64>,
    /// Also if what is set can't be used: it is lost then.
    pub replace: bool,
}

/// What was changed, or would be.
#[derive(Debug, Serialize)]
pub struct Changed {
    /// For whom.
    pub scope: String,
    /// The revision of what is set now.
    pub revision: u64,
    /// What is set otherwise; nothing: all was so already.
    pub changes: Vec<Change>,
    /// Members that have something else set for themselves, of these keys.
    pub exceptions: Vec<String>,
}

/// What can't be done, and why.
#[derive(Debug)]
pub struct Refusal(pub StatusCode, pub String);

impl Refusal {
    fn bad(why: impl std::fmt::Display) -> Self {
        Self(StatusCode::BAD_REQUEST, why.to_string())
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Changed { .. } => StatusCode::CONFLICT,
            // etcd is away, or does not let this member write: not the caller's fault.
            Error::Unreachable { .. } | Error::Refused { .. } => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_REQUEST,
        };
        Self(status, chain(&error))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

/// Where settings are asked about and changed. The port is open before the service is: until then it says so.
#[derive(Clone, Default)]
pub struct Page(Arc<OnceLock<(Arc<dyn Answers>, Desk)>>);

impl Page {
    /// Its routes.
    pub fn routes(&self) -> Router {
        Router::new()
            .route("/config", get(show).post(change))
            .route("/config/check", post(check))
            .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
            .with_state(self.clone())
    }

    pub(crate) fn open<C: Config>(&self, settings: Settings<C>, desk: Desk) {
        let _only_once = self.0.set((Arc::new(settings), desk));
    }

    fn opened(&self) -> Result<&(Arc<dyn Answers>, Desk), Refusal> {
        let starting = || Refusal(StatusCode::SERVICE_UNAVAILABLE, "the service is starting".to_owned());
        self.0.get().ok_or_else(starting)
    }

    /// Makes a change that somebody asks for with these headers; it is put on record, made or not.
    ///
    /// # Errors
    /// It is no operator who asks, or the change can't be made.
    pub async fn change(&self, ask: Ask, headers: &HeaderMap, peer: SocketAddr) -> Result<Changed, Refusal> {
        let (answers, desk) = self.opened()?;
        let shown = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
        let operator = desk.check(shown, Some(peer));
        let (what, scope) = (told(&ask), answers.scope(&ask).unwrap_or_default());
        let done = match &operator {
            Ok(operator) => answers.change(ask, Some(operator)).await,
            Err(Denied::NoToken) => Err(Refusal(StatusCode::UNAUTHORIZED, Denied::NoToken.to_string())),
            Err(Denied::BadToken) => Err(Refusal(StatusCode::FORBIDDEN, Denied::BadToken.to_string())),
        };
        let result = done.as_ref().map(|_| ()).map_err(|Refusal(_, why)| why.as_str());
        desk.tell(operator.as_ref().ok(), Some(peer), &scope, &what, result);
        done
    }
}

/// What was asked, for people.
fn told(ask: &Ask) -> String {
    let shown = |(key, value): (&String, &Value)| {
        let value = redacted(json!({ key.as_str(): value }))[key.as_str()].clone();
        format!("{key}={}", value.as_str().map_or_else(|| value.to_string(), str::to_owned))
    };
    let set: Vec<String> = ask.set.iter().map(shown).collect();
    let mut words = Vec::new();
    if !set.is_empty() {
        words.push(format!("set {}", set.join(" ")));
    }
    if !ask.unset.is_empty() {
        words.push(format!("unset {}", ask.unset.join(" ")));
    }
    words.join(", ")
}

async fn show(State(page): State<Page>) -> Result<Json<Value>, Refusal> {
    Ok(Json(page.opened()?.0.show()))
}

async fn check(State(page): State<Page>, body: Bytes) -> Result<Json<Changed>, Refusal> {
    let ask = serde_json::from_slice(&body).map_err(Refusal::bad)?;
    Ok(Json(page.opened()?.0.change(ask, None).await?))
}

async fn change(
    State(page): State<Page>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Changed>, Refusal> {
    page.opened()?;
    let ask = serde_json::from_slice(&body).map_err(Refusal::bad)?;
    Ok(Json(page.change(ask, &headers, peer).await?))
}

/// Settings of whatever type.
#[async_trait]
trait Answers: Send + Sync {
    fn show(&self) -> Value;
    fn scope(&self, ask: &Ask) -> Option<String>;
    /// With nobody who wants it, nothing is written.
    async fn change(&self, ask: Ask, operator: Option<&Operator>) -> Result<Changed, Refusal>;
}

#[async_trait]
impl<C: Config> Answers for Settings<C> {
    fn show(&self) -> Value {
        let (running, documents, refused) = {
            let state = self.state();
            (state.running.clone(), state.documents, state.refused.clone())
        };
        json!({
            "member": self.0.id.as_str(),
            "role": self.0.role.to_string(),
            "revision": documents[0],
            "member_revision": documents[1],
            "refused": refused,
            "keys": running.entries(),
        })
    }

    fn scope(&self, ask: &Ask) -> Option<String> {
        let given = ask.scope.as_ref().map(|scope| scope.chars().take(100).collect());
        Some(given.unwrap_or_else(|| Scope::all(self.0.role).to_string()))
    }

    async fn change(&self, ask: Ask, operator: Option<&Operator>) -> Result<Changed, Refusal> {
        let scopes = self.scopes();
        let scope = match &ask.scope {
            None => scopes[0].clone(),
            Some(text) => text.parse::<Scope>().map_err(|error| Refusal::bad(format!("scope: {error}")))?,
        };
        let Some(place) = scopes.iter().position(|ours| *ours == scope) else {
            return Err(Refusal::bad(format!(
                "scope: this is {}: it changes what is set for {}, or for itself ({})",
                scopes[1], scopes[0], scopes[1]
            )));
        };
        if ask.set.len() + ask.unset.len() > MAX_KEYS || ask.set.is_empty() && ask.unset.is_empty() {
            return Err(Refusal::bad(format!("set, unset: 1 to {MAX_KEYS} keys are changed at a time")));
        }
        let registry = self.0.registry.upgrade();
        let leaving = || Refusal(StatusCode::SERVICE_UNAVAILABLE, "the service is leaving".to_owned());
        let registry = registry.ok_or_else(leaving)?;
        let mut there = [registry.settings_of(&scopes[0]).await?, registry.settings_of(&scopes[1]).await?];
        let before = match &there[place] {
            None => Document::default(),
            Some(Found::Document(document)) => document.clone(),
            Some(Found::Unusable { revision, .. }) if ask.replace => {
                Document { revision: *revision, ..Document::default() }
            }
            Some(Found::Unusable { reason, .. }) => {
                return Err(Refusal(
                    StatusCode::CONFLICT,
                    format!(
                        "what is set for {scope} can't be used ({reason}): `kvasirctl config set --replace` writes over it"
                    ),
                ));
            }
        };
        if ask.if_revision.is_some_and(|revision| revision != before.revision) {
            return Err(Error::Changed { scope, by: before.who }.into());
        }

        let name = "config set";
        let mut wanted = Vec::new();
        for (key, value) in &ask.set {
            let value = match value {
                Value::String(text) => self.0.base.read::<C>(key, text, name),
                value => self.0.base.read::<C>(key, &value.to_string(), name),
            };
            wanted.push((key.clone(), Some(value.map_err(Refusal::bad)?)));
        }
        for key in &ask.unset {
            // One that this version does not know may have been set by another one.
            if !before.set.contains_key(key) {
                self.0.base.is_live::<C>(key, "config unset").map_err(Refusal::bad)?;
            }
            wanted.push((key.clone(), None));
        }
        let who = operator.map_or_else(String::new, ToString::to_string);
        let (document, changes) = changed(&before, &scope, &who, wanted);
        there[place] = Some(Found::Document(document.clone()));
        self.lay(&[there[0].as_ref(), there[1].as_ref()]).map_err(Refusal::bad)?;
        let exceptions = if place == 0 { self.exceptions(&registry, &changes) } else { Vec::new() };
        let mut done = Changed { scope: scope.to_string(), revision: before.revision, changes, exceptions };
        // Rubbish is written over even if nothing else changes.
        let news = !done.changes.is_empty() || ask.replace && before.set.is_empty() && before.revision > 0;
        if operator.is_some() && news {
            done.revision = registry.set(&scope, &document, &done.changes).await?;
            for change in &done.changes {
                let event = Event::now(EventKind::Config, &self.0.id, done.scope.as_str(), in_words(change));
                registry.note(event.by(who.as_str()));
            }
            self.sees(place, done.revision).await;
        }
        Ok(done)
    }
}

impl<C: Config> Settings<C> {
    /// Members of the role that have one of these keys set for themselves.
    fn exceptions(&self, registry: &Arc<dyn kvasir_cluster::Registry>, changes: &[Change]) -> Vec<String> {
        let settings = registry.settings().borrow().clone().unwrap_or_default();
        let of_role = settings.documents.iter().filter(|(scope, _)| scope.role == self.0.role);
        let mut names = Vec::new();
        for (scope, found) in of_role {
            if let (Some(member), Found::Document(document)) = (&scope.member, found)
                && changes.iter().any(|change| document.set.contains_key(&change.key))
            {
                names.push(member.to_string());
            }
        }
        names
    }

    /// Waits, for a moment, until this member acts on what it has written.
    async fn sees(&self, place: usize, revision: u64) {
        let mut now = self.live();
        let seen = async {
            while self.state().documents[place] < revision {
                if now.changed().await.is_err() {
                    return;
                }
            }
        };
        // If it takes longer, it is told later: it is written, at any rate.
        let _ = tokio::time::timeout(SEEN, seen).await;
    }
}

/// A change, for people.
fn in_words(change: &Change) -> String {
    let shown = |value: &Option<Value>| {
        let value = redacted(json!({ change.key.as_str(): value }))[change.key.as_str()].clone();
        if value.is_null() { "nothing".to_owned() } else { value.to_string() }
    };
    format!("{} is set to {} (before: {})", change.key, shown(&change.to), shown(&change.from))
}
