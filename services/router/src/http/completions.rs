//! `POST /v1/completions`.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use http::Request;
use kvasir_types::{RequestId, TokenId};
use serde::Serialize;
use tracing::Span;

use super::{
    app::{App, unix_now},
    error::{BadParam, Error},
    live::{Delta, Live, Prepared},
    sse::{self, Chunks, Shape},
    types::{CompletionRequest, Prompt},
    wire::{CompletionLogprobs, Head, Usage, finish_reason},
};
use crate::text::Model;

/// Continues a text.
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: Request<Body>,
) -> Result<Response, Error> {
    let admitted = app.admit(&request)?;
    let body = app.body(request).await?;
    let CompletionRequest { mut common, prompt } = CompletionRequest::parse(&body)?;
    let model = Arc::clone(app.model(&common.model)?);
    Span::current().record("model", model.name());

    let prompt = match prompt {
        Prompt::Tokens(tokens) => in_vocabulary("prompt", tokens, &model)?,
        Prompt::Text(text) => {
            let work = {
                let model = Arc::clone(&model);
                move || model.encode(&text, true)
            };
            app.text_work(body.len(), admitted.deadline, work).await?.map_err(Error::Internal)?
        }
    };
    let (stream, logprobs) = (common.stream.take(), common.sampling.logprobs.is_some());
    let live =
        Live::start(&app, admitted, common, Prepared { id, model, prompt, param: "prompt", markers: Arc::default() })
            .await?;
    let head = Head::of(&live, "cmpl", unix_now());
    match stream {
        Some(stream) => Ok(sse::respond(live, head, Completion { logprobs }, stream.include_usage)),
        None => whole(live, &head, logprobs).await,
    }
}

/// Tokens that the model knows.
pub(crate) fn in_vocabulary(param: &str, tokens: Vec<TokenId>, model: &Model) -> Result<Vec<TokenId>, BadParam> {
    let size = model.vocab_size();
    match tokens.iter().find(|token| token.0 as usize >= size) {
        None => Ok(tokens),
        Some(token) => {
            let message =
                format!("'{param}' holds token id {}, the model's are 0 to {}", token.0, size.saturating_sub(1));
            Err(BadParam::new(param, "invalid_value", message))
        }
    }
}

async fn whole(mut live: Live, head: &Head, logprobs: bool) -> Result<Response, Error> {
    let (wholes, cost) = live.whole().await?;
    let choices = wholes.iter().enumerate().map(|(index, whole)| Choice {
        text: &whole.text,
        index,
        logprobs: logprobs.then(|| CompletionLogprobs::of(live.model.vocab(), &whole.logged)),
        finish_reason: whole.end.map(finish_reason),
    });
    let choices: Vec<_> = choices.collect();
    Ok(Json(head.around(Completion::CHUNK, &choices, Some(cost.map(Usage::from)))).into_response())
}

/// Completions have the same form whole and in chunks.
#[derive(Serialize)]
struct Choice<'a> {
    text: &'a str,
    index: usize,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
}

struct Completion {
    logprobs: bool,
}

impl Shape for Completion {
    const CHUNK: &'static str = "text_completion";

    fn open(&mut self, _: usize, _: &mut Chunks<'_>) {}

    fn delta(&mut self, live: &Live, delta: &Delta, chunks: &mut Chunks<'_>) {
        let index = delta.choice;
        if !delta.text.is_empty() || !delta.logged.is_empty() {
            let logprobs = self.logprobs.then(|| CompletionLogprobs::of(live.model.vocab(), &delta.logged));
            chunks.add(&Choice { text: &delta.text, index, logprobs, finish_reason: None });
        }
        if let Some(reason) = delta.end {
            chunks.add(&Choice { text: "", index, logprobs: None, finish_reason: Some(finish_reason(reason)) });
        }
    }
}
