//! `POST /v1/chat/completions`.

use std::{collections::HashSet, sync::Arc};

use axum::{
    Extension, Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use http::Request;
use kvasir_types::{FinishReason, RequestId, TokenId};
use serde::Serialize;
use tracing::Span;

use super::{
    app::{App, unix_now},
    error::{BadParam, Error},
    live::{Delta, Live, Prepared, Whole},
    sse::{self, Chunks, Shape},
    tools::{Tools, call_id},
    types::{ChatRequest, Common},
    wire::{ChatLogprobs, Head, Usage, finish_reason},
};
use crate::text::{
    self, Conversation, Model,
    parse::{Dialect, Parser, Part, Reasoning},
};

/// Answers a conversation.
pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: Request<Body>,
) -> Result<Response, Error> {
    let admitted = app.admit(&request)?;
    let body = app.body(request).await?;
    let ChatRequest { mut common, mut conversation, effort, include_reasoning, tools } = ChatRequest::parse(&body)?;
    let model = Arc::clone(app.model(&common.model)?);
    Span::current().record("model", model.name());
    if let Some(effort) = effort {
        effort.tell(&model, &mut conversation, "reasoning_effort")?;
    }

    let salt = admitted.caller.cache_salt("");
    let work = prompt_work(&model, conversation, &common, &tools, salt)?;
    let (prompt, parser) =
        app.text_work(body.len(), admitted.deadline, work).await?.map_err(|e| told(e, "messages"))?;
    let (stream, logprobs) = (common.stream.take(), common.sampling.logprobs.is_some());
    let taking = Taking { parser, dialect: model.dialect(), include_reasoning };
    let prepared = Prepared { id, markers: taking.markers(&model), model, prompt, param: "messages" };
    let live = Live::start(&app, admitted, common, prepared).await?;
    let head = Head::of(&live, "chatcmpl", unix_now());
    match stream {
        Some(stream) => {
            let chat = Chat { logprobs, taken: (0..live.choices()).map(|_| taking.taken()).collect() };
            Ok(sse::respond(live, head, chat, stream.include_usage))
        }
        None => whole(live, &head, logprobs, &taking).await,
    }
}

/// A prompt, and how its answers are taken apart.
pub(crate) type Asked = Result<(Vec<TokenId>, Parser), text::Error>;

/// The text work of a conversation; what is kept of it is for those of the same salt.
pub(crate) fn prompt_work(
    model: &Arc<Model>,
    conversation: Conversation,
    common: &Common,
    tools: &Tools,
    salt: String,
) -> Result<impl FnOnce() -> Asked + Send + 'static, BadParam> {
    let (model, calls) = (Arc::clone(model), tools.calls(model.dialect())?);
    // An answer whose form is given can't hold thoughts, even where the template has opened their tag.
    let thinks = model.dialect().thinks && common.sampling.grammar.is_none();
    Ok(move || {
        let prompt = model.render(&conversation, unix_now())?;
        let reasoning = thinks.then(|| Reasoning::after(&prompt));
        Ok((model.encode_prompt(&prompt, &salt)?, Parser::new(reasoning, calls)))
    })
}

/// The client's mistake where the template says so, else ours.
pub(crate) fn told(error: text::Error, param: &'static str) -> Error {
    match error {
        text::Error::NoTemplate | text::Error::Refused(_) | text::Error::TooManySteps | text::Error::Render(_) => {
            BadParam::new(param, "invalid_value", kvasir_runtime::chain(&error)).into()
        }
        other => Error::Internal(other),
    }
}

/// How the answers of a request are taken apart.
pub(crate) struct Taking {
    /// A fresh one for each.
    pub(crate) parser: Parser,
    /// The model's.
    pub(crate) dialect: Dialect,
    /// Whether to tell what was thought.
    pub(crate) include_reasoning: bool,
}

/// One answer, taken apart as it comes.
pub(crate) struct Taken {
    parser: Parser,
    include_reasoning: bool,
    called: bool,
}

impl Taking {
    /// The special tokens to be shown to the parser.
    pub(crate) fn markers(&self, model: &Model) -> Arc<HashSet<TokenId>> {
        if self.parser.is_idle() { Arc::default() } else { Arc::clone(model.markers()) }
    }

    /// For a new answer.
    pub(crate) fn taken(&self) -> Taken {
        Taken { parser: self.parser.clone(), include_reasoning: self.include_reasoning, called: false }
    }
}

impl Taken {
    /// What more text, perhaps the last, adds.
    pub(crate) fn take(&mut self, text: &str, last: bool) -> Vec<Part> {
        let mut parts = Vec::new();
        if !text.is_empty() {
            self.parser.push(text, &mut parts);
        }
        if last {
            self.parser.finish(&mut parts);
        }
        self.called |= parts.iter().any(|part| matches!(part, Part::Call { .. }));
        if !self.include_reasoning {
            parts.retain(|part| !matches!(part, Part::Reasoning(_)));
        }
        parts
    }

    /// OpenAI's word for why it ended.
    fn reason(&self, end: FinishReason) -> &'static str {
        match end {
            FinishReason::Stop if self.called => "tool_calls",
            end => finish_reason(end),
        }
    }
}

async fn whole(mut live: Live, head: &Head, logprobs: bool, taking: &Taking) -> Result<Response, Error> {
    let (wholes, cost) = live.whole().await?;
    let choices = wholes.iter().enumerate().map(|(index, whole)| {
        let (message, finish_reason) = Message::of(whole, taking);
        let logprobs = logprobs.then_some(ChatLogprobs { vocab: live.model.vocab(), logged: &whole.logged });
        Choice { index, message, logprobs, finish_reason }
    });
    let choices: Vec<_> = choices.collect();
    Ok(Json(head.around("chat.completion", &choices, Some(cost.map(Usage::from)))).into_response())
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: Option<String>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call>,
}

#[derive(Serialize)]
struct Call {
    id: String,
    r#type: &'static str,
    function: Function,
}

#[derive(Serialize)]
struct Function {
    name: String,
    arguments: String,
}

impl Message {
    /// The message of a whole answer, and why that ended.
    fn of(whole: &Whole, taking: &Taking) -> (Self, Option<&'static str>) {
        let mut message =
            Self { role: "assistant", content: None, refusal: None, reasoning_content: None, tool_calls: Vec::new() };
        let mut taken = taking.taken();
        for part in taken.take(&whole.text, true) {
            match part {
                Part::Content(text) => message.content.get_or_insert_default().push_str(&text),
                Part::Reasoning(text) => message.reasoning_content.get_or_insert_default().push_str(&text),
                Part::Call { name, .. } => {
                    let function = Function { name, arguments: String::new() };
                    message.tool_calls.push(Call { id: call_id(taking.dialect), r#type: "function", function });
                }
                Part::Arguments { text, .. } => {
                    if let Some(call) = message.tool_calls.last_mut() {
                        call.function.arguments.push_str(&text);
                    }
                }
            }
        }
        // Null is what says that there are only calls.
        if message.tool_calls.is_empty() {
            message.content.get_or_insert_default();
        }
        (message, whole.end.map(|end| taken.reason(end)))
    }
}

/// Chat's chunks.
struct Chat {
    logprobs: bool,
    taken: Vec<Taken>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta<'a>; 1]>,
}

/// The first one of a call has all fields, those after it only more arguments.
#[derive(Serialize)]
struct CallDelta<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl<'a> DeltaMessage<'a> {
    fn of(part: &'a Part, dialect: Dialect) -> Self {
        match part {
            Part::Content(text) => Self { content: Some(text), ..Self::default() },
            Part::Reasoning(text) => Self { reasoning_content: Some(text), ..Self::default() },
            Part::Call { index, name } => {
                let function = FunctionDelta { name: Some(name), arguments: "" };
                let (id, r#type) = (Some(call_id(dialect)), Some("function"));
                Self { tool_calls: Some([CallDelta { index: *index, id, r#type, function }]), ..Self::default() }
            }
            Part::Arguments { index, text } => {
                let function = FunctionDelta { name: None, arguments: text };
                Self {
                    tool_calls: Some([CallDelta { index: *index, id: None, r#type: None, function }]),
                    ..Self::default()
                }
            }
        }
    }
}

impl Shape for Chat {
    const CHUNK: &'static str = "chat.completion.chunk";

    fn open(&mut self, index: usize, chunks: &mut Chunks<'_>) {
        let delta = DeltaMessage { role: Some("assistant"), content: Some(""), ..DeltaMessage::default() };
        chunks.add(&ChunkChoice { index, delta, logprobs: None, finish_reason: None });
    }

    fn delta(&mut self, live: &Live, delta: &Delta, chunks: &mut Chunks<'_>) {
        let (index, taken) = (delta.choice, &mut self.taken[delta.choice]);
        let logprobs = || self.logprobs.then(|| ChatLogprobs { vocab: live.model.vocab(), logged: &delta.logged });
        let parts = taken.take(&delta.text, delta.end.is_some());
        // The log-probabilities of a token go with the first chunk it brings, even if it brings nothing to see yet.
        let mut first = true;
        for part in &parts {
            let logprobs = if std::mem::take(&mut first) { logprobs() } else { None };
            let delta = DeltaMessage::of(part, live.model.dialect());
            chunks.add(&ChunkChoice { index, delta, logprobs, finish_reason: None });
        }
        if first && !delta.logged.is_empty() {
            let delta = DeltaMessage::default();
            chunks.add(&ChunkChoice { index, delta, logprobs: logprobs(), finish_reason: None });
        }
        if let Some(end) = delta.end {
            let finish_reason = Some(taken.reason(end));
            chunks.add(&ChunkChoice { index, delta: DeltaMessage::default(), logprobs: None, finish_reason });
        }
    }
}
