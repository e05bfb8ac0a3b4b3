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
    sse::{self, Shape},
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
        Prompt::Tokens(tokens) => in_vocabulary(tokens, &model)?,
        Prompt::Text(text) => {
            let work = {
                let model = Arc::clone(&model);
                move || model.encode(&text, true)
            };
            app.text_work(body.len(), admitted.deadline, work).await?.map_err(Error::Internal)?
        }
    };
    let (stream, logprobs) = (common.stream.take(), common.sampling.logprobs.is_some());
    let live = Live::start(&app, admitted, common, Prepared { id, model, prompt, param: "prompt" }).await?;
    let head = Head::of(&live, "cmpl", unix_now());
    match stream {
        Some(stream) => Ok(sse::respond(live, head, Completion { logprobs }, stream.include_usage)),
        None => whole(live, &head, logprobs).await,
    }
}

fn in_vocabulary(tokens: Vec<TokenId>, model: &Model) -> Result<Vec<TokenId>, BadParam> {
    let size = model.vocab_size();
    match tokens.iter().find(|token| token.0 as usize >= size) {
        None => Ok(tokens),
        Some(token) => {
            let message =
                format!("'prompt' holds token id {}, the model's are 0 to {}", token.0, size.saturating_sub(1));
            Err(BadParam::new("prompt", "invalid_value", message))
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
    type Choice<'a> = Choice<'a>;

    fn opening(&self, _: usize) -> Option<Choice<'_>> {
        None
    }

    fn text<'a>(&'a self, live: &'a Live, delta: &'a Delta) -> Choice<'a> {
        let logprobs = self.logprobs.then(|| CompletionLogprobs::of(live.model.vocab(), &delta.logged));
        Choice { text: &delta.text, index: delta.choice, logprobs, finish_reason: None }
    }

    fn end(&self, index: usize, reason: &'static str) -> Choice<'_> {
        Choice { text: "", index, logprobs: None, finish_reason: Some(reason) }
    }
}
