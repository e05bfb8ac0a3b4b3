//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use http::Request;
use kvasir_types::RequestId;
use serde::Serialize;
use tracing::Span;

use super::{
    app::{App, unix_now},
    error::{BadParam, Error},
    live::{Delta, Live, Prepared},
    sse::{self, Shape},
    types::ChatRequest,
    wire::{ChatLogprobs, Head, Usage, finish_reason},
};
use crate::text;

/// Answers a conversation.
pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: Request<Body>,
) -> Result<Response, Error> {
    let admitted = app.admit(&request)?;
    let body = app.body(request).await?;
    let ChatRequest { mut common, mut conversation, effort } = ChatRequest::parse(&body)?;
    let model = Arc::clone(app.model(&common.model)?);
    Span::current().record("model", model.name());

    if let Some(effort) = effort {
        effort.tell(&model, &mut conversation, "reasoning_effort")?;
    }
    let work = {
        let model = Arc::clone(&model);
        move || model.encode(&model.render(&conversation, unix_now())?, false)
    };
    let prompt = app.text_work(body.len(), admitted.deadline, work).await?.map_err(told)?;
    let (stream, logprobs) = (common.stream.take(), common.sampling.logprobs.is_some());
    let live = Live::start(&app, admitted, common, Prepared { id, model, prompt, param: "messages" }).await?;
    let head = Head::of(&live, "chatcmpl", unix_now());
    match stream {
        Some(stream) => Ok(sse::respond(live, head, Chat { logprobs }, stream.include_usage)),
        None => whole(live, &head, logprobs).await,
    }
}

/// The client's mistake where the template says so, else ours.
fn told(error: text::Error) -> Error {
    match error {
        text::Error::NoTemplate | text::Error::Refused(_) | text::Error::TooManySteps | text::Error::Render(_) => {
            BadParam::new("messages", "invalid_value", kvasir_runtime::chain(&error)).into()
        }
        other => Error::Internal(other),
    }
}

async fn whole(mut live: Live, head: &Head, logprobs: bool) -> Result<Response, Error> {
    let (wholes, cost) = live.whole().await?;
    let choices = wholes.iter().enumerate().map(|(index, whole)| Choice {
        index,
        message: Message { role: "assistant", content: &whole.text, refusal: None },
        logprobs: logprobs.then_some(ChatLogprobs { vocab: live.model.vocab(), logged: &whole.logged }),
        finish_reason: whole.end.map(finish_reason),
    });
    let choices: Vec<_> = choices.collect();
    Ok(Json(head.around("chat.completion", &choices, Some(cost.map(Usage::from)))).into_response())
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    message: Message<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

/// Chat's chunks.
struct Chat {
    logprobs: bool,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: DeltaMessage<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct DeltaMessage<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl Shape for Chat {
    const CHUNK: &'static str = "chat.completion.chunk";
    type Choice<'a> = ChunkChoice<'a>;

    fn opening(&self, index: usize) -> Option<ChunkChoice<'_>> {
        let delta = DeltaMessage { role: Some("assistant"), content: Some("") };
        Some(ChunkChoice { index, delta, logprobs: None, finish_reason: None })
    }

    fn text<'a>(&'a self, live: &'a Live, delta: &'a Delta) -> ChunkChoice<'a> {
        let logprobs = self.logprobs.then(|| ChatLogprobs { vocab: live.model.vocab(), logged: &delta.logged });
        let message = DeltaMessage { role: None, content: Some(&delta.text) };
        ChunkChoice { index: delta.choice, delta: message, logprobs, finish_reason: None }
    }

    fn end(&self, index: usize, reason: &'static str) -> ChunkChoice<'_> {
        ChunkChoice { index, delta: DeltaMessage::default(), logprobs: None, finish_reason: Some(reason) }
    }
}
