//! An answer as the Responses API has it: items that open, grow and close, each step an event.
//!
//! ```text
//! created, in_progress ─▶ for every item: output_item.added ─▶ … delta … ─▶ … done ─▶ output_item.done ─▶ completed
//! ```
//!
//! A whole answer is the last event's response.

use kvasir_types::FinishReason;
use serde_json::{Map, Value, json};

use super::super::{error::Error, live::Cost, tools::call_id};
use crate::text::parse::{Dialect, Part};

/// Builds one answer.
pub(crate) struct Build {
    /// What is the same in all of the response's states.
    fixed: Map<String, Value>,
    /// The request's name, of which those of the items are made.
    id: String,
    dialect: Dialect,
    /// The items that are done.
    output: Vec<Value>,
    open: Option<Item>,
    events: u64,
}

struct Item {
    kind: Kind,
    id: String,
    text: String,
}

enum Kind {
    Message,
    Reasoning,
    Call { call_id: String, name: String },
}

impl Item {
    fn value(&self, status: &str) -> Value {
        let Self { kind, id, text } = self;
        match kind {
            Kind::Message => {
                json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": [self.part()]})
            }
            Kind::Reasoning => {
                json!({"id": id, "type": "reasoning", "status": status, "summary": [], "content": [self.part()]})
            }
            Kind::Call { call_id, name } => json!({
                "id": id, "type": "function_call", "status": status, "call_id": call_id, "name": name, "arguments": text,
            }),
        }
    }

    fn part(&self) -> Value {
        match self.kind {
            Kind::Reasoning => json!({"type": "reasoning_text", "text": self.text}),
            _ => json!({"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}),
        }
    }

    /// The beginning of the names of the events about its text.
    fn event(&self) -> &'static str {
        match self.kind {
            Kind::Message => "response.output_text",
            Kind::Reasoning => "response.reasoning_text",
            Kind::Call { .. } => "response.function_call_arguments",
        }
    }
}

impl Build {
    /// One for a new answer. `fixed` holds what the response repeats of the request.
    pub(crate) fn new(id: &str, created: u64, model: &str, dialect: Dialect, mut fixed: Map<String, Value>) -> Self {
        let head = json!({"id": format!("resp_{id}"), "object": "response", "created_at": created, "model": model});
        if let Value::Object(head) = head {
            fixed.extend(head);
        }
        Self { fixed, id: id.to_owned(), dialect, output: Vec::new(), open: None, events: 0 }
    }

    /// The two events before all others.
    pub(crate) fn begin(&mut self, events: &mut Vec<Value>) {
        for name in ["response.created", "response.in_progress"] {
            let response = self.response("in_progress", None);
            self.emit(events, name, json!({"response": response}));
        }
    }

    /// More of the answer.
    pub(crate) fn part(&mut self, part: Part, events: &mut Vec<Value>) {
        let (kind, text) = match part {
            Part::Content(text) => (Kind::Message, text),
            Part::Reasoning(text) => (Kind::Reasoning, text),
            Part::Call { name, .. } => (Kind::Call { call_id: call_id(self.dialect), name }, String::new()),
            // Of the call that is open.
            Part::Arguments { text, .. } => return self.grow(&text, events),
        };
        let goes_on = self.open.as_ref().is_some_and(|open| {
            matches!((&open.kind, &kind), (Kind::Message, Kind::Message) | (Kind::Reasoning, Kind::Reasoning))
        });
        if !goes_on {
            self.close("completed", events);
            self.add(kind, events);
        }
        self.grow(&text, events);
    }

    /// The end: the last event, whose response is the whole answer.
    pub(crate) fn end(&mut self, reason: Option<FinishReason>, cost: Option<Cost>, events: &mut Vec<Value>) {
        let (status, details) = match reason {
            Some(FinishReason::Length) => ("incomplete", json!({"reason": "max_output_tokens"})),
            _ => ("completed", Value::Null),
        };
        self.close(status, events);
        let mut response = self.response(status, cost);
        response["incomplete_details"] = details;
        self.emit(events, &format!("response.{status}"), json!({"response": response}));
    }

    /// The answer broke off.
    pub(crate) fn fail(&mut self, error: &Error, events: &mut Vec<Value>) {
        self.close("incomplete", events);
        let told = error.object()["error"].take();
        let mut response = self.response("failed", None);
        response["error"] =
            json!({"code": told["code"].as_str().unwrap_or("server_error"), "message": told["message"]});
        self.emit(events, "response.failed", json!({"response": response}));
    }

    fn add(&mut self, kind: Kind, events: &mut Vec<Value>) {
        let prefix = match kind {
            Kind::Message => "msg",
            Kind::Reasoning => "rs",
            Kind::Call { .. } => "fc",
        };
        let index = self.output.len();
        let item = Item { kind, id: format!("{prefix}_{}_{index}", self.id), text: String::new() };
        let mut value = item.value("in_progress");
        if value.get("content").is_some() {
            value["content"] = json!([]);
        }
        self.emit(events, "response.output_item.added", json!({"output_index": index, "item": value}));
        if !matches!(item.kind, Kind::Call { .. }) {
            let told = json!({"item_id": item.id, "output_index": index, "content_index": 0, "part": item.part()});
            self.emit(events, "response.content_part.added", told);
        }
        self.open = Some(item);
    }

    fn grow(&mut self, text: &str, events: &mut Vec<Value>) {
        let (index, Some(open)) = (self.output.len(), &mut self.open) else { return };
        if text.is_empty() {
            return;
        }
        open.text.push_str(text);
        let mut told = json!({"item_id": open.id, "output_index": index, "delta": text});
        match open.kind {
            Kind::Message => (told["content_index"], told["logprobs"]) = (json!(0), json!([])),
            Kind::Reasoning => told["content_index"] = json!(0),
            Kind::Call { .. } => {}
        }
        let name = format!("{}.delta", open.event());
        self.emit(events, &name, told);
    }

    fn close(&mut self, status: &str, events: &mut Vec<Value>) {
        let (index, Some(item)) = (self.output.len(), self.open.take()) else { return };
        let mut told = json!({"item_id": item.id, "output_index": index});
        match &item.kind {
            Kind::Call { name, .. } => (told["arguments"], told["name"]) = (json!(item.text), json!(name)),
            kind => {
                (told["content_index"], told["text"]) = (json!(0), json!(item.text));
                if matches!(kind, Kind::Message) {
                    told["logprobs"] = json!([]);
                }
            }
        }
        self.emit(events, &format!("{}.done", item.event()), told);
        if !matches!(item.kind, Kind::Call { .. }) {
            let told = json!({"item_id": item.id, "output_index": index, "content_index": 0, "part": item.part()});
            self.emit(events, "response.content_part.done", told);
        }
        let value = item.value(status);
        self.emit(events, "response.output_item.done", json!({"output_index": index, "item": value}));
        self.output.push(value);
    }

    fn response(&self, status: &str, cost: Option<Cost>) -> Value {
        let mut response = self.fixed.clone();
        let usage = cost.map(|cost| {
            let kvasir_types::Usage { prompt, cached, output } = cost.usage;
            json!({
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": cached},
                "output_tokens": output,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt.saturating_add(output),
            })
        });
        let rest = json!({
            "status": status, "error": null, "incomplete_details": null, "output": self.output, "usage": usage,
        });
        if let Value::Object(rest) = rest {
            response.extend(rest);
        }
        Value::Object(response)
    }

    fn emit(&mut self, events: &mut Vec<Value>, name: &str, mut event: Value) {
        event["type"] = json!(name);
        event["sequence_number"] = json!(self.events);
        self.events += 1;
        events.push(event);
    }
}
