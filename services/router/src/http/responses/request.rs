//! A request of the Responses API, checked, as a conversation.

use serde_json::{Map, Value, json};

use super::super::{
    choosing,
    error::{BadParam, Error},
    fields::{Fields, Unsupported, wrong_type},
    messages::arguments,
    tools::{Form, Tools},
    types::{self, Common, Effort},
};
use crate::text::{Conversation, Function, Message, ToolCall};

/// Most pairs of metadata, and their lengths, as OpenAI has it.
const MAX_METADATA: (usize, usize, usize) = (16, 64, 512);

/// Fields that are known and not supported, with their neutral values.
pub(crate) const UNSUPPORTED: &[Unsupported] = &[
    ("access_programs", &[]),
    ("background", &["false"]),
    ("background_options", &[]),
    ("context_management", &[]),
    ("conversation", &[]),
    ("image", &[]),
    ("include", &[]),
    ("max_tool_calls", &[]),
    ("moderation", &[]),
    ("previous_response_id", &[]),
    ("prompt", &[]),
    ("prompt_cache_options", &[]),
    ("prompt_cache_retention", &["\"in_memory\"", "\"in-memory\""]),
    ("store", &["false"]),
    ("top_logprobs", &["0"]),
    ("truncation", &["\"disabled\""]),
];

/// A request, checked.
#[derive(Debug)]
pub(crate) struct ResponsesRequest {
    /// What all endpoints take.
    pub(crate) common: Common,
    /// The conversation.
    pub(crate) conversation: Conversation,
    /// How much to think, if the client says.
    pub(crate) effort: Option<Effort>,
    /// The tools, perhaps none.
    pub(crate) tools: Tools,
    /// What the answer repeats of the request.
    pub(crate) repeated: Map<String, Value>,
}

impl ResponsesRequest {
    /// Reads a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut fields = Fields::parse(body)?;
        // Chat's words for what this API says otherwise, or not at all.
        for name in ["n", "response_format"] {
            if fields.take(name).is_some() {
                return Err(BadParam::new(name, "unknown_parameter", format!("unknown parameter: '{name}'")).into());
            }
        }
        let mut repeated = Map::new();
        for name in ["temperature", "top_p", "user", "safety_identifier", "prompt_cache_key"] {
            repeated.insert(name.to_owned(), fields.peek(name).cloned().unwrap_or(Value::Null));
        }
        let mut common = types::common(&mut fields)?;
        for (name, default) in [("temperature", 1.0), ("top_p", 1.0)] {
            if repeated[name].is_null() {
                repeated.insert(name.to_owned(), json!(default));
            }
        }
        common.max_tokens = types::max_tokens(&mut fields, "max_output_tokens")?;
        common.sampling.max_tokens_asked = common.max_tokens.is_some();
        types::check_min_tokens(&common)?;

        let instructions = fields.string("instructions")?;
        let mut messages: Vec<Message> = instructions.iter().map(|text| said("system", text.clone())).collect();
        read_input(fields.require("input")?, &mut messages)?;
        let mut conversation = Conversation::of(messages);
        types::template_fields(&mut fields, &mut conversation)?;

        let format = text(&mut fields, &mut common)?;
        let effort = reasoning(&mut fields)?;
        let tools = Tools::parse(&mut fields, Form::Responses)?;
        conversation.tools = tools.told();
        types::with_tools(&mut common, &tools)?;
        let metadata = metadata(&mut fields)?;
        fields.finish(UNSUPPORTED)?;

        let effort_told = effort.map(Effort::word);
        let rest = json!({
            "background": false,
            "instructions": instructions,
            "max_output_tokens": common.max_tokens.map(|(_, tokens)| tokens),
            "metadata": metadata,
            "parallel_tool_calls": tools.parallel(),
            "previous_response_id": null,
            "reasoning": {"effort": effort_told, "summary": null},
            "store": false,
            "text": {"format": format},
            "tool_choice": tools.choice(),
            "tools": tools.described(),
            "truncation": "disabled",
        });
        if let Value::Object(rest) = rest {
            repeated.extend(rest);
        }
        Ok(Self { common, conversation, effort, tools, repeated })
    }
}

fn said(role: &str, text: String) -> Message {
    Message { role: role.to_owned(), content: Some(text), ..Message::default() }
}

fn text(fields: &mut Fields, common: &mut Common) -> Result<Value, BadParam> {
    let Some(text) = fields.take("text") else { return Ok(json!({"type": "text"})) };
    let mut text = Fields::of("text", text)?;
    let format = text.take("format").unwrap_or_else(|| json!({"type": "text"}));
    if let Some(grammar) = choosing::text_format("text.format", format.clone())? {
        if let Some(other) = common.form_param {
            let message = format!("an answer has one form, but '{other}' and 'text.format' both ask for one");
            return Err(BadParam::new("text.format", "invalid_value", message));
        }
        choosing::few_bytes("text.format", &grammar)?;
        (common.form_param, common.sampling.grammar) = (Some("text.format"), Some(grammar));
    }
    text.finish(&[("verbosity", &["\"medium\""])])?;
    Ok(format)
}

fn reasoning(fields: &mut Fields) -> Result<Option<Effort>, BadParam> {
    let Some(reasoning) = fields.take("reasoning") else { return Ok(None) };
    let mut reasoning = Fields::of("reasoning", reasoning)?;
    let effort = reasoning.string("effort")?;
    reasoning.finish(&[("summary", &[]), ("generate_summary", &[]), ("context", &[]), ("mode", &[])])?;
    effort.map(|word| Effort::parse("reasoning.effort", &word)).transpose()
}

fn metadata(fields: &mut Fields) -> Result<Map<String, Value>, BadParam> {
    let metadata = fields.object("metadata")?.unwrap_or_default();
    let (pairs, key_len, value_len) = MAX_METADATA;
    let fits = |(key, value): (&String, &Value)| {
        key.len() <= key_len && value.as_str().is_some_and(|value| value.len() <= value_len)
    };
    if metadata.len() > pairs || !metadata.iter().all(fits) {
        let message = format!(
            "'metadata' must be at most {pairs} pairs of text, keys up to {key_len} bytes, values up to {value_len}"
        );
        return Err(BadParam::new("metadata", "invalid_value", message));
    }
    Ok(metadata)
}

fn read_input(input: Value, messages: &mut Vec<Message>) -> Result<(), BadParam> {
    let items = match input {
        Value::String(text) => {
            messages.push(said("user", text));
            return Ok(());
        }
        Value::Array(items) if items.is_empty() => {
            return Err(BadParam::new("input", "empty_array", "'input' must hold at least one item"));
        }
        Value::Array(items) => items,
        other => return Err(wrong_type("input", "a string or an array of items", &other)),
    };
    // What was thought goes with the assistant's next words.
    let mut thought = None;
    for (at, item) in items.into_iter().enumerate() {
        let mut fields = Fields::of(&format!("input[{at}]"), item)?;
        let kind = fields.string("type")?;
        // Items of an earlier answer come with their names and states, which say nothing to a template.
        fields.string("id")?;
        fields.string("status")?;
        match kind.as_deref() {
            None | Some("message") => {
                let message = message(&mut fields, &mut thought)?;
                messages.push(message);
            }
            Some("function_call") => {
                let id = fields.require_string("call_id")?;
                let name = fields.require_string("name")?;
                let arguments = arguments(&fields.path("arguments"), &fields.require_string("arguments")?)?;
                let call = ToolCall { id, r#type: "function", function: Function { name, arguments } };
                let thought = thought.take();
                match messages.last_mut().filter(|last| last.role == "assistant" && thought.is_none()) {
                    Some(last) => last.tool_calls.push(call),
                    None => messages.push(Message {
                        role: "assistant".to_owned(),
                        reasoning_content: thought,
                        tool_calls: vec![call],
                        ..Message::default()
                    }),
                }
            }
            Some("function_call_output") => {
                let call = fields.require_string("call_id")?;
                let output = content(&fields.path("output"), fields.require("output")?, "input_text")?;
                messages.push(Message { tool_call_id: Some(call), ..said("tool", output) });
            }
            Some("reasoning") => {
                let path = fields.path("content");
                thought = fields.take("content").map(|text| content(&path, text, "reasoning_text")).transpose()?;
                fields.take("summary");
                fields.take("encrypted_content");
            }
            Some(other) => {
                let got: String = other.chars().take(40).collect();
                let path = fields.path("type");
                let message = format!(
                    "'{path}' must be message, function_call, function_call_output or reasoning on this server, got {got:?}"
                );
                return Err(BadParam::new(path, "unsupported_value", message));
            }
        }
        fields.finish(&[])?;
    }
    if messages.is_empty() {
        return Err(BadParam::new("input", "invalid_value", "'input' holds no message"));
    }
    Ok(())
}

fn message(fields: &mut Fields, thought: &mut Option<String>) -> Result<Message, BadParam> {
    let role = fields.require_string("role")?;
    let (role, part) = match role.as_str() {
        "system" | "developer" => ("system", "input_text"),
        "user" => ("user", "input_text"),
        "assistant" => ("assistant", "output_text"),
        _ => {
            let path = fields.path("role");
            let got: String = role.chars().take(40).collect();
            let message = format!("'{path}' must be system, developer, user or assistant, got {got:?}");
            return Err(BadParam::new(path, "invalid_value", message));
        }
    };
    let text = content(&fields.path("content"), fields.require("content")?, part)?;
    let reasoning_content = if role == "assistant" { thought.take() } else { None };
    Ok(Message { reasoning_content, ..said(role, text) })
}

/// A text, or parts of this kind.
fn content(path: &str, value: Value, kind: &str) -> Result<String, BadParam> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong_type(path, "a string or an array of text parts", &other)),
    };
    let mut text = String::new();
    for (at, part) in parts.into_iter().enumerate() {
        let mut fields = Fields::of(&format!("{path}[{at}]"), part)?;
        let given = fields.require_string("type")?;
        let part = match given.as_str() {
            given if given == kind => fields.require_string("text")?,
            "refusal" if kind == "output_text" => fields.require_string("refusal")?,
            _ => {
                let path = fields.path("type");
                let message = format!("'{path}' must be {kind:?} here: this server takes text only");
                return Err(BadParam::new(path, "unsupported_value", message));
            }
        };
        text.push_str(&part);
        fields.finish(&[("annotations", &[]), ("logprobs", &[])])?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(changes: Value) -> Result<ResponsesRequest, Error> {
        let mut body = json!({"model": "m", "input": "hi"});
        body.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ResponsesRequest::parse(body.to_string().as_bytes())
    }

    #[test]
    fn items_become_a_conversation() {
        let request = parse(json!({"instructions": "Be brief.", "input": [
            {"role": "user", "content": "One?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "text": "Look", "annotations": [], "logprobs": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{\"a\": 1}"},
            {"type": "function_call", "call_id": "d", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "2"},
            {"type": "function_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "3"}]},
        ]}));
        let messages = serde_json::to_string(&request.unwrap().conversation.messages).unwrap();
        insta::assert_snapshot!(messages, @r#"[{"role":"system","content":"Be brief."},{"role":"user","content":"One?"},{"role":"assistant","content":"Look","reasoning_content":"Hm.","tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":{"a":1}}},{"id":"d","type":"function","function":{"name":"g","arguments":{}}}]},{"role":"tool","content":"2","tool_call_id":"c"},{"role":"tool","content":"3","tool_call_id":"d"}]"#);
    }

    #[test]
    fn what_is_not_taken_is_refused_by_name() {
        for (changes, param, code) in [
            (json!({"input": null}), "input", "missing_required_parameter"),
            (json!({"input": []}), "input", "empty_array"),
            (json!({"input": [3]}), "input[0]", "invalid_type"),
            (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input[0].type", "unsupported_value"),
            (
                json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
                "input[0].content[0].type",
                "unsupported_value",
            ),
            (json!({"input": [{"role": "tool", "content": "x"}]}), "input[0].role", "invalid_value"),
            (json!({"previous_response_id": "resp_1"}), "previous_response_id", "unsupported_parameter"),
            (json!({"conversation": "c"}), "conversation", "unsupported_parameter"),
            (json!({"background": true}), "background", "unsupported_parameter"),
            (json!({"store": true}), "store", "unsupported_parameter"),
            (json!({"n": 2}), "n", "unknown_parameter"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type", "unsupported_value"),
            (json!({"text": {"format": {"type": "xml"}}}), "text.format.type", "invalid_value"),
            (json!({"text": {"verbosity": "low"}}), "text.verbosity", "unsupported_parameter"),
            (json!({"reasoning": {"effort": "hard"}}), "reasoning.effort", "invalid_value"),
            (json!({"reasoning": {"summary": "auto"}}), "reasoning.summary", "unsupported_parameter"),
            (json!({"max_output_tokens": 0}), "max_output_tokens", "below_min_value"),
            (json!({"metadata": {"a": 1}}), "metadata", "invalid_value"),
            (json!({"messages": []}), "messages", "unknown_parameter"),
        ] {
            match parse(changes.clone()) {
                Err(Error::Param(bad)) => assert_eq!((bad.param.as_str(), bad.code), (param, code), "{changes}"),
                other => panic!("{changes}: {other:?}"),
            }
        }
    }
}
