//! `POST /v1/responses`: OpenAI's newer API, its stateless core.
//!
//! | field | what it does here |
//! | --- | --- |
//! | `input` | required; a text, or items: `message` (text parts), `function_call`, `function_call_output`, `reasoning` |
//! | `instructions` | the first system message |
//! | `max_output_tokens`, `temperature`, `top_p`, `stream`, `service_tier`, `prompt_cache_key` | as chat has them |
//! | `tools`, `tool_choice`, `parallel_tool_calls` | functions; see [`super::tools`] |
//! | `text.format` | `text`, `json_object`, `json_schema` |
//! | `reasoning.effort` | see [`super::types::Effort`] |
//! | `metadata` | up to 16 pairs, repeated in the answer |
//! | `store` | false: nothing is kept, so `previous_response_id`, `conversation` and `background` are refused |
//!
//! The extensions of chat that say how tokens are chosen (`seed`, `stop`, `top_k`, …) are taken, too.

mod build;
mod request;

use std::{convert::Infallible, sync::Arc};

use axum::{
    Extension, Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use bytes::{BufMut, Bytes, BytesMut};
use http::Request;
use kvasir_types::RequestId;
use serde_json::Value;
use tracing::Span;

use super::{
    app::{App, unix_now},
    chat::{Taken, Taking, prompt_work, told},
    error::Error,
    live::{Live, Prepared},
    sse,
};
use build::Build;
pub(crate) use request::ResponsesRequest;
#[cfg(test)]
pub(crate) use request::UNSUPPORTED as RESPONSES_UNSUPPORTED;

/// Answers an input.
pub(crate) async fn responses(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: Request<Body>,
) -> Result<Response, Error> {
    let admitted = app.admit(&request)?;
    let body = app.body(request).await?;
    let ResponsesRequest { mut common, mut conversation, effort, tools, mut repeated } =
        ResponsesRequest::parse(&body)?;
    let model = Arc::clone(app.model(&common.model)?);
    Span::current().record("model", model.name());
    if let Some(effort) = effort {
        effort.tell(&model, &mut conversation, "reasoning.effort")?;
    }

    let salt = admitted.caller.cache_salt("");
    let work = prompt_work(&model, conversation, &common, &tools, salt)?;
    let (prompt, parser) = app.text_work(body.len(), admitted.deadline, work).await?.map_err(|e| told(e, "input"))?;
    let stream = common.stream.take();
    let taking = Taking { parser, dialect: model.dialect(), include_reasoning: true };
    let prepared = Prepared { id, markers: taking.markers(&model), model, prompt, param: "input" };
    let live = Live::start(&app, admitted, common, prepared).await?;
    let tier = serde_json::to_value(live.service_tier).unwrap_or_default();
    repeated.insert("service_tier".to_owned(), tier);
    let build = Build::new(live.id.as_str(), unix_now(), live.model.name(), live.model.dialect(), repeated);
    let mut writer = Writer { live, build, taken: taking.taken(), begun: false };
    match stream {
        Some(_) => Ok(writer.respond()),
        None => writer.whole().await,
    }
}

struct Writer {
    live: Live,
    build: Build,
    taken: Taken,
    begun: bool,
}

impl Writer {
    async fn whole(&mut self) -> Result<Response, Error> {
        let mut events = Vec::new();
        while self.step(&mut events).await? {
            events.clear();
        }
        let response = events.pop().map(|mut last| last["response"].take());
        Ok(Json(response.unwrap_or_default()).into_response())
    }

    fn respond(self) -> Response {
        let stream = futures_util::stream::unfold(Some(self), |writer| async {
            let mut writer = writer?;
            let mut events = Vec::new();
            let more = match writer.step(&mut events).await {
                Ok(more) => more,
                Err(error) => {
                    writer.build.fail(&error, &mut events);
                    false
                }
            };
            Some((Ok::<_, Infallible>(written(&events)), more.then_some(writer)))
        });
        sse::response(stream)
    }

    /// The events of what comes next. False after the last one.
    async fn step(&mut self, events: &mut Vec<Value>) -> Result<bool, Error> {
        let Some(delta) = self.live.next().await? else { return Ok(false) };
        if !std::mem::replace(&mut self.begun, true) {
            self.build.begin(events);
        }
        for part in self.taken.take(&delta.text, delta.end.is_some()) {
            self.build.part(part, events);
        }
        if let Some(cost) = delta.cost {
            self.build.end(delta.end, Some(cost), events);
        }
        Ok(delta.cost.is_none())
    }
}

/// Events as they go out, in one piece.
fn written(events: &[Value]) -> Bytes {
    let mut out = BytesMut::with_capacity(512);
    for event in events {
        out.extend_from_slice(b"event: ");
        out.extend_from_slice(event["type"].as_str().unwrap_or_default().as_bytes());
        out.extend_from_slice(b"\ndata: ");
        serde_json::to_writer((&mut out).writer(), event).expect("a JSON value is written");
        out.extend_from_slice(b"\n\n");
    }
    out.freeze()
}
