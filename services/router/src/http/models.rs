//! `GET /v1/models` and `GET /v1/models/{id}`: what may be asked for.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};
use serde_json::{Value, json};

use super::{app::App, error::Error};
use crate::{fleet::Crew, text::Model};

/// All models.
pub(crate) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let models: Vec<Value> = app.models.iter().map(|model| object(&app, model)).collect();
    Json(json!({"object": "list", "data": models}))
}

/// One model.
pub(crate) async fn get(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, Error> {
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
