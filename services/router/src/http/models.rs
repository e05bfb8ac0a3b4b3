//! `GET /v1/models` and `GET /v1/models/{id}`: what the caller may ask for.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Path, State},
};
use serde_json::{Value, json};

use super::{app::App, error::Error};
use crate::{access::Caller, fleet::Crew, text::Model};

/// All models that the caller may use.
pub(crate) async fn list(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>) -> Json<Value> {
    let models = app.models.iter().filter(|model| caller.may_use(model.name()));
    let models: Vec<Value> = models.map(|model| object(&app, model)).collect();
    Json(json!({"object": "list", "data": models}))
}

/// One model.
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<Value>, Error> {
    if !caller.may_use(&name) {
        return Err(Error::NoModel(name.chars().take(200).collect()));
    }
    app.model(&name).map(|model| Json(object(&app, model)))
}

/// The longest context that a worker, or else the model, has.
pub(crate) fn context_len(app: &App, model: &Model) -> Option<u32> {
    let fleet = Arc::clone(&app.fleet.borrow());
    fleet.crew(model.name()).and_then(Crew::max_model_len).or_else(|| model.context_len())
}

fn object(app: &App, model: &Model) -> Value {
    json!({
        "id": model.name(),
        "object": "model",
        "created": app.started,
        "owned_by": "kvasir",
        "max_model_len": context_len(app, model), // not OpenAI's; clients that size their prompts want it
    })
}
