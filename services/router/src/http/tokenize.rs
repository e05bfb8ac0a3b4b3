//! `POST /tokenize` and `POST /detokenize`, in vLLM's forms: what a prompt is in tokens, and the way back.
//!
//! | field of `/tokenize` | what it does here |
//! | --- | --- |
//! | `model` | a name of `/v1/models`; may be left out where there is one only |
//! | `prompt` | a text; `add_special_tokens` (default true) as for a completion |
//! | `messages` | instead of `prompt`: a conversation, through the chat template, with `tools`, `documents`, `chat_template_kwargs`, `add_generation_prompt`; `add_special_tokens` (default false) |
//! | `return_token_strs` | default false; tells each token's text, too |
//!
//! `/detokenize` takes `model` and `tokens`; special tokens are shown.

use std::sync::Arc;

use axum::{Json, body::Body, extract::State};
use http::Request;
use kvasir_types::TokenId;
use serde_json::{Value, json};

use super::{
    app::{Admitted, App, unix_now},
    chat::told,
    choosing::token_ids,
    completions::in_vocabulary,
    error::{BadParam, Error},
    fields::{Fields, wrong_type},
    messages::messages,
    models::context_len,
    tools::{Form, Tools},
    types::template_fields,
};
use crate::text::{Conversation, Model};

/// What to tokenize.
enum Input {
    Text(String),
    Chat(Box<Conversation>),
}

/// Text or messages to tokens.
pub(crate) async fn tokenize(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Json<Value>, Error> {
    let admitted = app.admit(&request)?;
    let body = app.body(request).await?;
    let mut fields = Fields::parse(&body)?;
    let model = Arc::clone(model(&app, &admitted, &mut fields)?);
    let add_special = fields.bool("add_special_tokens")?;
    let with_texts = fields.bool("return_token_strs")?.unwrap_or(false);
    let (input, param) = match (fields.take("prompt"), fields.take("messages")) {
        (Some(Value::String(text)), None) => (Input::Text(text), "prompt"),
        (Some(other), None) => return Err(wrong_type("prompt", "a string", &other).into()),
        (None, Some(value)) => {
            let mut conversation = Conversation::of(messages(value)?);
            template_fields(&mut fields, &mut conversation)?;
            conversation.tools = Tools::parse(&mut fields, Form::Chat)?.told();
            (Input::Chat(Box::new(conversation)), "messages")
        }
        (Some(_), Some(_)) => {
            let message = "'prompt' and 'messages' are two ways to say the same; send one";
            return Err(BadParam::new("prompt", "invalid_value", message).into());
        }
        (None, None) => {
            let message = "missing required parameter: 'prompt' (or 'messages')";
            return Err(BadParam::new("prompt", "missing_required_parameter", message).into());
        }
    };
    fields.finish(&[("chat_template", &[]), ("continue_final_message", &["false"])])?;

    let work = {
        let model = Arc::clone(&model);
        move || match input {
            Input::Text(text) => model.encode(&text, add_special.unwrap_or(true)),
            Input::Chat(chat) => model.encode(&model.render(&chat, unix_now())?, add_special.unwrap_or(false)),
        }
    };
    let tokens = app.text_work(body.len(), admitted.deadline, work).await?.map_err(|error| told(error, param))?;
    let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
    let texts = with_texts.then(|| -> Vec<_> {
        tokens.iter().map(|&token| String::from_utf8_lossy(model.vocab().bytes(token)).into_owned()).collect()
    });
    let max_model_len = context_len(&app, &model);
    Ok(Json(json!({"count": ids.len(), "max_model_len": max_model_len, "tokens": ids, "token_strs": texts})))
}

/// Tokens to text.
pub(crate) async fn detokenize(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Json<Value>, Error> {
    let admitted = app.admit(&request)?;
    let body = app.body(request).await?;
    let mut fields = Fields::parse(&body)?;
    let model = Arc::clone(model(&app, &admitted, &mut fields)?);
    let tokens: Vec<TokenId> = match fields.require("tokens")? {
        Value::Array(ids) => in_vocabulary("tokens", token_ids("tokens", &ids)?, &model)?,
        other => return Err(wrong_type("tokens", "an array of token ids", &other).into()),
    };
    fields.finish(&[])?;
    let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
    let work = move || Ok(model.decode_all(&ids));
    let text = app.text_work(body.len(), admitted.deadline, work).await?.map_err(Error::Internal)?;
    Ok(Json(json!({"prompt": text})))
}

/// The model that is named, or the only one there is.
fn model<'a>(app: &'a App, admitted: &Admitted, fields: &mut Fields) -> Result<&'a Arc<Model>, Error> {
    let model = match (fields.string("model")?, app.models.as_slice()) {
        (Some(name), _) => app.model(&name)?,
        (None, [only]) => only,
        (None, _) => {
            let message = "missing required parameter: 'model' (there are several)";
            return Err(BadParam::new("model", "missing_required_parameter", message).into());
        }
    };
    if admitted.caller.may_use(model.name()) { Ok(model) } else { Err(Error::NoModel(model.name().to_owned())) }
}
