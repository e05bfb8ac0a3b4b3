//! What a chat template is given: messages, tools, documents, and what the client wants it told besides.

use minijinja::{Value, value::Serde};
use serde::Serialize;

/// A conversation, checked, and how to render it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Conversation {
    /// The messages; not empty.
    pub(crate) messages: Vec<Message>,
    /// The tools that the model may call, as the client described them: `{"type": "function", "function": {…}}`.
    pub(crate) tools: Vec<serde_json::Value>,
    /// Texts to answer from, for templates that know how to present them.
    pub(crate) documents: Vec<serde_json::Value>,
    /// Other variables of the template, e.g. `enable_thinking`.
    pub(crate) variables: serde_json::Map<String, serde_json::Value>,
    /// Whether the prompt ends where the assistant is to speak.
    pub(crate) open: bool,
}

/// One message of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Message {
    /// Who speaks, e.g. `user`.
    pub(crate) role: String,
    /// What is said: text parts are joined. Templates tell `null` (there are only tool calls) from an empty text.
    pub(crate) content: Option<String>,
    /// The participant's name; templates rarely look at it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// What the assistant thought before it spoke.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    /// The tools that the assistant called.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ToolCall>,
    /// Which call this is the result of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tool_call_id: Option<String>,
}

/// A tool that the assistant called.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct ToolCall {
    /// The call's name; its result bears it, too.
    pub(crate) id: String,
    /// `function`: there is no other kind.
    pub(crate) r#type: &'static str,
    /// Which, and with what.
    pub(crate) function: Function,
}

/// A function called.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Function {
    /// Its name.
    pub(crate) name: String,
    /// Its arguments: an object, not its text, as `transformers` has it.
    pub(crate) arguments: serde_json::Value,
}

impl Conversation {
    /// The messages alone, for the assistant to go on.
    pub(crate) fn of(messages: Vec<Message>) -> Self {
        Self { messages, tools: Vec::new(), documents: Vec::new(), variables: serde_json::Map::new(), open: true }
    }

    /// The template's variables, those of the client last.
    pub(super) fn context(&self) -> Vec<(&str, Value)> {
        // `none`, not an empty list: `tools is none` is how templates ask.
        let list = |items: &[serde_json::Value]| {
            if items.is_empty() { Value::from(()) } else { Value::from(Serde(items)) }
        };
        let mut context = vec![
            ("messages", Value::from(Serde(&self.messages))),
            ("add_generation_prompt", Value::from(self.open)),
            ("tools", list(&self.tools)),
            ("documents", list(&self.documents)),
        ];
        context.extend(self.variables.iter().map(|(name, value)| (name.as_str(), Value::from(Serde(value)))));
        context
    }
}

#[cfg(test)]
impl Message {
    /// What somebody says.
    pub(crate) fn said(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: Some(content.to_owned()), ..Self::default() }
    }
}
