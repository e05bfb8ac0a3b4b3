//! The messages of a chat request.
//!
//! | role | what it may hold |
//! | --- | --- |
//! | `system`, `developer` (becomes `system`), `user` | `content`, `name` |
//! | `assistant` | `content` or `tool_calls` or both, `reasoning_content` (or `reasoning`), `name` |
//! | `tool` | `content`, `tool_call_id`, `name` |
//!
//! `content` is a string or an array of parts of type `text` (of an assistant's also `refusal`), which are joined. The
//! `arguments` of a tool call are the text of a JSON object, as the answer had it; the template gets the object.

use serde_json::Value;

use super::{
    error::BadParam,
    fields::{Fields, wrong_type},
};
use crate::text::{Function, Message, ToolCall};

/// Most calls in one message.
const MAX_CALLS: usize = 128;

/// Reads all of them.
pub(crate) fn messages(value: Value) -> Result<Vec<Message>, BadParam> {
    let Value::Array(items) = value else { return Err(wrong_type("messages", "an array of messages", &value)) };
    if items.is_empty() {
        return Err(BadParam::new("messages", "empty_array", "'messages' must hold at least one message"));
    }
    items.into_iter().enumerate().map(|(at, item)| message(&format!("messages[{at}]"), item)).collect()
}

fn message(path: &str, value: Value) -> Result<Message, BadParam> {
    let mut fields = Fields::of(path, value)?;
    let role = fields.require_string("role")?;
    let role = match role.as_str() {
        "system" | "user" | "assistant" | "tool" => role,
        // Templates know no developer; it is the newer name of the one who sets the rules.
        "developer" => "system".to_owned(),
        _ => {
            let path = fields.path("role");
            let got: String = role.chars().take(40).collect();
            let message = format!("'{path}' must be system, developer, user, assistant or tool, got {got:?}");
            return Err(BadParam::new(path, "invalid_value", message));
        }
    };
    let mut message = Message { name: fields.string("name")?, ..Message::default() };
    let path = fields.path("content");
    match role.as_str() {
        "assistant" => {
            message.tool_calls = tool_calls(&mut fields)?;
            message.reasoning_content = match (fields.string("reasoning_content")?, fields.string("reasoning")?) {
                (Some(text), _) | (None, Some(text)) => Some(text),
                (None, None) => None,
            };
            message.content = fields.take("content").map(|content| content_text(&path, content, true)).transpose()?;
            if message.content.is_none() && message.tool_calls.is_empty() {
                message.content = Some(String::new());
            }
        }
        role => {
            message.content = Some(content_text(&path, fields.require("content")?, false)?);
            if role == "tool" {
                message.tool_call_id = Some(fields.require_string("tool_call_id")?);
            }
        }
    }
    fields.finish(&[
        ("audio", &[]),
        ("function_call", &[]),
        ("refusal", &[]),
        ("tool_call_id", &[]),
        ("tool_calls", &[]),
    ])?;
    Ok(Message { role, ..message })
}

fn content_text(path: &str, value: Value, refusals: bool) -> Result<String, BadParam> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong_type(path, "a string or an array of text parts", &other)),
    };
    let mut text = String::new();
    for (at, part) in parts.into_iter().enumerate() {
        let mut fields = Fields::of(&format!("{path}[{at}]"), part)?;
        let kind = fields.string("type")?;
        let part = match kind.as_deref() {
            Some("text") => fields.require_string("text")?,
            Some("refusal") if refusals => fields.require_string("refusal")?,
            _ => {
                let path = fields.path("type");
                let message = format!("'{path}' must be \"text\": this server takes text only");
                return Err(BadParam::new(path, "unsupported_value", message));
            }
        };
        text.push_str(&part);
        fields.finish(&[])?;
    }
    Ok(text)
}

fn tool_calls(fields: &mut Fields) -> Result<Vec<ToolCall>, BadParam> {
    let path = fields.path("tool_calls");
    let calls = match fields.take("tool_calls") {
        None => return Ok(Vec::new()),
        Some(Value::Array(calls)) => calls,
        Some(other) => return Err(wrong_type(&path, "an array of tool calls", &other)),
    };
    if calls.len() > MAX_CALLS {
        let message = format!("'{path}' must hold at most {MAX_CALLS} calls, got {}", calls.len());
        return Err(BadParam::new(path, "invalid_value", message));
    }
    calls.into_iter().enumerate().map(|(at, call)| tool_call(&format!("{path}[{at}]"), call)).collect()
}

fn tool_call(path: &str, value: Value) -> Result<ToolCall, BadParam> {
    let mut fields = Fields::of(path, value)?;
    let id = fields.require_string("id")?;
    function_type(&mut fields)?;
    let mut function = Fields::of(&fields.path("function"), fields.require("function")?)?;
    let name = function.require_string("name")?;
    let arguments = arguments(&function.path("arguments"), &function.require_string("arguments")?)?;
    function.finish(&[])?;
    fields.integer("index", 0, u32::MAX.into())?; // clients that put a stream's pieces together leave it in
    fields.finish(&[])?;
    Ok(ToolCall { id, r#type: "function", function: Function { name, arguments } })
}

/// `type`, which must be `function`; absent is as good.
pub(crate) fn function_type(fields: &mut Fields) -> Result<(), BadParam> {
    let path = fields.path("type");
    match fields.string("type")?.as_deref() {
        None | Some("function") => Ok(()),
        Some(other) => {
            let got: String = other.chars().take(40).collect();
            let message = format!("'{path}' must be \"function\" on this server, got {got:?}");
            Err(BadParam::new(path, "unsupported_value", message))
        }
    }
}

/// The object that a call's arguments are; no text at all is the empty one.
pub(crate) fn arguments(path: &str, text: &str) -> Result<Value, BadParam> {
    if text.trim().is_empty() {
        return Ok(Value::Object(serde_json::Map::new()));
    }
    match serde_json::from_str(text) {
        Ok(object @ Value::Object(_)) => Ok(object),
        Ok(other) => Err(wrong_type(path, "the text of a JSON object", &other)),
        Err(error) => Err(BadParam::new(path, "invalid_value", format!("'{path}' is not JSON: {error}"))),
    }
}
