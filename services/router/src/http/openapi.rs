//! `GET /openapi.json`: the API as a document, kept by hand in `openapi.json`. Tests hold it to what is served.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde_json::{Value, json};

use super::app::App;

/// The document.
const DOCUMENT: &str = include_str!("../../openapi.json");

/// Tells it, with the names of the models that anybody may use.
pub(crate) async fn document(State(app): State<Arc<App>>) -> Json<Value> {
    // Everybody may read the document; whose names need a key are not told here.
    let anybody = app.keys.borrow().caller(None).ok();
    let open = |name: &&str| anybody.as_ref().is_some_and(|caller| caller.may_use(name));
    let names: Vec<&str> = app.models.iter().map(|model| model.name()).filter(open).collect();
    let mut document: Value = serde_json::from_str(DOCUMENT).expect("a test reads it, too");
    if !app.public_metrics {
        document["paths"].as_object_mut().and_then(|paths| paths.remove("/metrics"));
    }
    for schema in document["components"]["schemas"].as_object_mut().into_iter().flatten().map(|(_, schema)| schema) {
        if let Some(model) = schema.pointer_mut("/properties/model").filter(|_| !names.is_empty()) {
            *model = json!({"enum": names});
        }
    }
    Json(document)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::http::{
        fields::{Unsupported, asked},
        responses::{RESPONSES_UNSUPPORTED, ResponsesRequest},
        table,
        types::{CHAT_UNSUPPORTED, COMPLETION_UNSUPPORTED, ChatRequest, CompletionRequest},
    };

    fn told() -> Value {
        serde_json::from_str(DOCUMENT).unwrap()
    }

    #[test]
    fn the_document_has_the_paths_that_are_served() {
        let told: BTreeSet<String> = told()["paths"].as_object().unwrap().keys().cloned().collect();
        let served: BTreeSet<String> = table().into_iter().map(|(path, _)| path.replace("{*name}", "{name}")).collect();
        assert_eq!(told, served);
    }

    /// The fields that a reader of bodies knows: those it looks for, and those it knows as unsupported.
    fn known(read: impl FnOnce(), unsupported: &[Unsupported]) -> BTreeSet<String> {
        asked().clear();
        read();
        let mut known = std::mem::take(&mut *asked());
        known.extend(unsupported.iter().map(|(name, _)| (*name).to_owned()));
        known
    }

    #[test]
    fn the_document_has_the_fields_that_are_read() {
        let body = |fields: Value| fields.to_string().into_bytes();
        let chat = body(json!({"model": "m", "messages": [{"role": "user", "content": "x"}]}));
        let completion = body(json!({"model": "m", "prompt": "x"}));
        let input = body(json!({"model": "m", "input": "x"}));
        let mut not_responses = known(|| drop(ResponsesRequest::parse(&input).unwrap()), RESPONSES_UNSUPPORTED);
        // Looked for only to be refused as unknown.
        not_responses.retain(|name| !["n", "response_format"].contains(&name.as_str()));
        for (schema, known) in [
            ("ChatRequest", known(|| drop(ChatRequest::parse(&chat).unwrap()), CHAT_UNSUPPORTED)),
            (
                "CompletionRequest",
                known(|| drop(CompletionRequest::parse(&completion).unwrap()), COMPLETION_UNSUPPORTED),
            ),
            ("ResponsesRequest", not_responses),
        ] {
            let told = &told()["components"]["schemas"][schema]["properties"];
            let told: BTreeSet<String> = told.as_object().unwrap().keys().cloned().collect();
            assert_eq!(told, known, "{schema}");
        }
    }

    #[test]
    fn references_lead_somewhere() {
        fn check(value: &Value, document: &Value) {
            match value {
                Value::Object(fields) => {
                    if let Some(Value::String(to)) = fields.get("$ref") {
                        assert!(document.pointer(to.trim_start_matches('#')).is_some(), "{to}");
                    }
                    fields.values().for_each(|value| check(value, document));
                }
                Value::Array(items) => items.iter().for_each(|item| check(item, document)),
                _ => {}
            }
        }
        check(&told(), &told());
    }
}
