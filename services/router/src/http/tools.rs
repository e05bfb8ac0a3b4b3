//! The tools of a chat request: what the template is told of them, how calls are looked for, and what a required call is
//! constrained to.
//!
//! | field | what it does here |
//! | --- | --- |
//! | `tools` | up to 128 of type `function`: `name`, `description`, `parameters` (a JSON schema), `strict` |
//! | `tool_choice` | `none`, `auto` (default), `required`, or `{"type": "function", "function": {"name": …}}` |
//! | `parallel_tool_calls` | default true; with false only the first call is told |
//!
//! With `required` or a named function the answer is constrained: it is a list of calls, or the named function's
//! arguments, that follow the schemas. With `auto` the model is free, so `strict: true` is refused then, and calls are
//! looked for in the model's own notation; a model without a known one takes only required and named calls. With `none`
//! the template hears of no tools.

use std::sync::Arc;

use kvasir_proto::convert::MAX_GRAMMAR_BYTES;
use kvasir_runtime::random_u64;
use kvasir_types::Grammar;
use serde_json::{Map, Value, json};

use super::{
    error::BadParam,
    fields::{Fields, wrong_type},
    messages::function_type,
};
use crate::text::parse::{CallNotation, Calls, Dialect, Notation};

/// Most tools, as OpenAI has it.
const MAX_TOOLS: usize = 128;
/// Longest name, as OpenAI has it.
const MAX_NAME: usize = 64;

/// The tools of a request; perhaps none.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tools {
    list: Vec<Tool>,
    choice: Choice,
    parallel: bool,
}

#[derive(Clone, Debug, PartialEq)]
struct Tool {
    name: String,
    /// Where it was described, for messages.
    path: String,
    description: Option<String>,
    parameters: Option<Value>,
    strict: bool,
}

/// Who decides about calls.
#[derive(Clone, Debug, Default, PartialEq)]
enum Choice {
    /// There are to be none.
    #[default]
    None,
    /// The model.
    Auto,
    /// The client: at least one.
    Required,
    /// The client: this one.
    Named(usize),
}

/// Where the two APIs that have tools write a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// In a field `function` of the tool.
    Chat,
    /// In the tool itself.
    Responses,
}

impl Tools {
    /// Reads the three fields.
    pub(crate) fn parse(fields: &mut Fields, form: Form) -> Result<Self, BadParam> {
        let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
        let list = match fields.take("tools") {
            None => Vec::new(),
            Some(Value::Array(tools)) if tools.len() > MAX_TOOLS => {
                let message = format!("'tools' must hold at most {MAX_TOOLS} tools, got {}", tools.len());
                return Err(BadParam::new("tools", "invalid_value", message));
            }
            Some(Value::Array(tools)) => {
                let tool = |(at, value)| tool(&format!("tools[{at}]"), value, form);
                tools.into_iter().enumerate().map(tool).collect::<Result<Vec<_>, _>>()?
            }
            Some(other) => return Err(wrong_type("tools", "an array of tools", &other)),
        };
        for (at, tool) in list.iter().enumerate() {
            if list[..at].iter().any(|other| other.name == tool.name) {
                let message = format!("'{}': another tool is named {:?}, too", tool.path, tool.name);
                return Err(BadParam::new(&tool.path, "invalid_value", message));
            }
        }
        let choice = choice(fields, &list, form)?;
        if choice == Choice::Auto
            && let Some(tool) = list.iter().find(|tool| tool.strict)
        {
            let path = format!("{}.strict", tool.path);
            let message = format!(
                "'{path}' can only be kept where a call is required or named: 'tool_choice' is \"auto\", the model is free"
            );
            return Err(BadParam::new(path, "unsupported_value", message));
        }
        Ok(Self { list, choice, parallel })
    }

    /// As the template has them: nothing where none is to be called.
    pub(crate) fn told(&self) -> Vec<Value> {
        if self.choice == Choice::None { Vec::new() } else { self.list.iter().map(Tool::told).collect() }
    }

    /// As the Responses API repeats them.
    pub(crate) fn described(&self) -> Vec<Value> {
        let tool = |tool: &Tool| {
            json!({"type": "function", "name": tool.name, "description": tool.description,
                "parameters": tool.parameters, "strict": tool.strict})
        };
        self.list.iter().map(tool).collect()
    }

    /// Who decides, as the Responses API repeats it.
    pub(crate) fn choice(&self) -> Value {
        match &self.choice {
            Choice::None => json!("none"),
            Choice::Auto => json!("auto"),
            Choice::Required => json!("required"),
            Choice::Named(at) => json!({"type": "function", "name": self.list[*at].name}),
        }
    }

    /// Whether there may be more than one call.
    pub(crate) fn parallel(&self) -> bool {
        self.parallel
    }

    /// How calls are looked for in the answer of a model that writes like this.
    pub(crate) fn calls(&self, dialect: Dialect) -> Result<Option<Calls>, BadParam> {
        let notation = match (&self.choice, dialect.calls) {
            (Choice::None, _) => return Ok(None),
            (Choice::Required, _) => Notation::List,
            (Choice::Named(at), _) => Notation::Named(self.list[*at].name.clone()),
            (Choice::Auto, Some(CallNotation::Hermes)) => Notation::Hermes,
            (Choice::Auto, Some(CallNotation::Mistral)) => Notation::Mistral,
            (Choice::Auto, Some(CallNotation::Llama3)) => {
                Notation::Llama3(self.list.iter().map(|tool| tool.name.clone()).collect())
            }
            (Choice::Auto, None) => {
                let message = "this model has no notation of tool calls that is known here: \
                    send 'tool_choice' \"required\", \"none\", or a function";
                return Err(BadParam::new("tools", "unsupported_parameter", message));
            }
        };
        Ok(Some(Calls::new(notation, self.parallel)))
    }

    /// The form of an answer that must call: the field that asks for it, and what it is.
    pub(crate) fn grammar(&self) -> Result<Option<(&'static str, Grammar)>, BadParam> {
        let schema = match &self.choice {
            Choice::None | Choice::Auto => return Ok(None),
            Choice::Named(at) => self.list[*at].schema(),
            Choice::Required => self.list_schema(),
        };
        let schema = schema.to_string();
        if schema.len() > MAX_GRAMMAR_BYTES {
            let message =
                format!("'tools': the schemas must be at most {MAX_GRAMMAR_BYTES} bytes, got {}", schema.len());
            return Err(BadParam::new("tools", "invalid_value", message));
        }
        Ok(Some(("tools", Grammar::JsonSchema(Arc::from(schema)))))
    }

    /// A list of calls. A tool's schema may refer to its own parts (`#/$defs/…`), which lie elsewhere here.
    fn list_schema(&self) -> Value {
        let mut definitions = Map::new();
        let call = |(at, tool): (usize, &Tool)| {
            let mut parameters = tool.schema();
            if move_references(&mut parameters, &format!("#/$defs/{at}")) {
                definitions.insert(at.to_string(), parameters);
                parameters = json!({"$ref": format!("#/$defs/{at}")});
            }
            json!({
                "type": "object",
                "properties": {"name": {"const": tool.name}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": false,
            })
        };
        let calls: Vec<Value> = self.list.iter().enumerate().map(call).collect();
        let mut schema = json!({"type": "array", "minItems": 1, "items": {"anyOf": calls}});
        if !self.parallel {
            schema["maxItems"] = json!(1);
        }
        if !definitions.is_empty() {
            schema["$defs"] = Value::Object(definitions);
        }
        schema
    }
}

impl Tool {
    fn told(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".to_owned(), json!(self.name));
        if let Some(description) = &self.description {
            function.insert("description".to_owned(), json!(description));
        }
        if let Some(parameters) = &self.parameters {
            function.insert("parameters".to_owned(), parameters.clone());
        }
        json!({"type": "function", "function": function})
    }

    /// The schema of its arguments, an object in any case.
    fn schema(&self) -> Value {
        match &self.parameters {
            None => json!({"type": "object", "properties": {}, "additionalProperties": false}),
            Some(Value::Object(schema)) if !schema.contains_key("type") => {
                let mut schema = schema.clone();
                schema.insert("type".to_owned(), json!("object"));
                Value::Object(schema)
            }
            Some(schema) => schema.clone(),
        }
    }
}

/// A new name for a call: OpenAI's form, but nine letters and digits where the model's template wants those.
pub(crate) fn call_id(dialect: Dialect) -> String {
    match dialect.calls {
        Some(CallNotation::Mistral) => format!("{:09x}", random_u64() & 0xF_FFFF_FFFF),
        _ => format!("call_{:016x}{:08x}", random_u64(), random_u64() as u32),
    }
}

/// Puts `base` before all references to the schema itself. True if there are any.
fn move_references(schema: &mut Value, base: &str) -> bool {
    match schema {
        Value::Array(items) => items.iter_mut().fold(false, |any, item| move_references(item, base) | any),
        Value::Object(fields) => fields.iter_mut().fold(false, |any, (name, field)| {
            let moved = match field {
                Value::String(to) if name == "$ref" && to.starts_with('#') => {
                    *to = format!("{base}{}", &to[1..]);
                    true
                }
                field => move_references(field, base),
            };
            moved | any
        }),
        _ => false,
    }
}

fn tool(path: &str, value: Value, form: Form) -> Result<Tool, BadParam> {
    let mut fields = Fields::of(path, value)?;
    function_type(&mut fields)?;
    match form {
        Form::Responses => function(path, fields),
        Form::Chat => {
            let path = fields.path("function");
            let inner = Fields::of(&path, fields.require("function")?)?;
            fields.finish(&[])?;
            function(&path, inner)
        }
    }
}

fn function(path: &str, mut fields: Fields) -> Result<Tool, BadParam> {
    let name = fields.require_string("name")?;
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_-.:/".contains(c);
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(is_name) {
        let path = fields.path("name");
        let message = format!("'{path}' must be 1 to {MAX_NAME} letters, digits or any of _ - . : /");
        return Err(BadParam::new(path, "invalid_value", message));
    }
    let tool = Tool {
        name,
        path: path.to_owned(),
        description: fields.string("description")?,
        parameters: fields.object("parameters")?.map(Value::Object),
        strict: fields.bool("strict")?.unwrap_or(false),
    };
    fields.finish(&[])?;
    Ok(tool)
}

fn choice(fields: &mut Fields, list: &[Tool], form: Form) -> Result<Choice, BadParam> {
    let free = if list.is_empty() { Choice::None } else { Choice::Auto };
    let choice = match fields.take("tool_choice") {
        None => return Ok(free),
        Some(Value::String(word)) => match word.as_str() {
            "none" => return Ok(Choice::None),
            "auto" => return Ok(free),
            "required" => Choice::Required,
            _ => {
                let got: String = word.chars().take(40).collect();
                let message = format!("'tool_choice' must be none, auto, required or a function, got {got:?}");
                return Err(BadParam::new("tool_choice", "invalid_value", message));
            }
        },
        Some(value) => {
            let mut fields = Fields::of("tool_choice", value)?;
            function_type(&mut fields)?;
            let name = match form {
                Form::Responses => fields.require_string("name")?,
                Form::Chat => {
                    let mut function = Fields::of("tool_choice.function", fields.require("function")?)?;
                    let name = function.require_string("name")?;
                    function.finish(&[])?;
                    name
                }
            };
            fields.finish(&[])?;
            let Some(at) = list.iter().position(|tool| tool.name == name) else {
                let got: String = name.chars().take(MAX_NAME).collect();
                let message = format!("'tool_choice' names {got:?}, which is not among 'tools'");
                return Err(BadParam::new("tool_choice", "invalid_value", message));
            };
            Choice::Named(at)
        }
    };
    if list.is_empty() {
        let message = "'tool_choice' is only allowed when there are 'tools'";
        return Err(BadParam::new("tool_choice", "invalid_value", message));
    }
    Ok(choice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: Value) -> Result<Tools, BadParam> {
        let mut fields = Fields::parse(body.to_string().as_bytes()).unwrap();
        Tools::parse(&mut fields, Form::Chat)
    }

    fn with(choice: Value) -> Value {
        json!({"tool_choice": choice, "tools": [
            {"type": "function", "function": {"name": "f", "description": "F", "parameters": {"$defs": {"x": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/x"}}}}},
            {"type": "function", "function": {"name": "g"}},
        ]})
    }

    #[test]
    fn who_decides_says_what_is_told_looked_for_and_constrained() {
        let hermes = Dialect { calls: Some(CallNotation::Hermes), thinks: false };
        for (choice, told, looked_for, constrained) in [
            (json!(null), 2, true, false),
            (json!("auto"), 2, true, false),
            (json!("none"), 0, false, false),
            (json!("required"), 2, true, true),
            (json!({"type": "function", "function": {"name": "g"}}), 2, true, true),
        ] {
            let tools = parse(with(choice.clone())).unwrap();
            assert_eq!(tools.told().len(), told, "{choice}");
            assert_eq!(tools.calls(hermes).unwrap().is_some(), looked_for, "{choice}");
            assert_eq!(tools.grammar().unwrap().is_some(), constrained, "{choice}");
        }
        let tools = parse(json!({})).unwrap();
        assert_eq!((tools.told(), tools.calls(hermes).unwrap().is_none()), (Vec::new(), true));
        assert!(parse(with(json!("auto"))).unwrap().calls(Dialect::default()).is_err());
        assert!(parse(with(json!("required"))).unwrap().calls(Dialect::default()).is_ok());
    }

    #[test]
    fn a_required_call_is_constrained_to_a_list_of_calls() {
        let mut body = with(json!("required"));
        body["parallel_tool_calls"] = json!(false);
        let Some((_, Grammar::JsonSchema(schema))) = parse(body).unwrap().grammar().unwrap() else { panic!() };
        insta::assert_snapshot!(schema, @r##"{"type":"array","minItems":1,"items":{"anyOf":[{"type":"object","properties":{"name":{"const":"f"},"parameters":{"$ref":"#/$defs/0"}},"required":["name","parameters"],"additionalProperties":false},{"type":"object","properties":{"name":{"const":"g"},"parameters":{"type":"object","properties":{},"additionalProperties":false}},"required":["name","parameters"],"additionalProperties":false}]},"maxItems":1,"$defs":{"0":{"$defs":{"x":{"type":"integer"}},"properties":{"a":{"$ref":"#/$defs/0/$defs/x"}},"type":"object"}}}"##);
    }

    #[test]
    fn mistakes_are_told_by_name() {
        let tool = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
        for (body, param, code) in [
            (json!({"tools": {}}), "tools", "invalid_type"),
            (json!({"tools": vec![json!({}); 129]}), "tools", "invalid_value"),
            (json!({"tools": [{"type": "custom"}]}), "tools[0].type", "unsupported_value"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function", "missing_required_parameter"),
            (tool(json!({"name": "a b"})), "tools[0].function.name", "invalid_value"),
            (tool(json!({"name": "a", "parameters": []})), "tools[0].function.parameters", "invalid_type"),
            (tool(json!({"name": "a", "strict": true})), "tools[0].function.strict", "unsupported_value"),
            (tool(json!({"name": "a", "x": 1})), "tools[0].function.x", "unknown_parameter"),
            (
                json!({"tools": [{"function": {"name": "a"}}, {"function": {"name": "a"}}]}),
                "tools[1].function",
                "invalid_value",
            ),
            (json!({"tool_choice": "required"}), "tool_choice", "invalid_value"),
            (with(json!("perhaps")), "tool_choice", "invalid_value"),
            (with(json!({"type": "function", "function": {"name": "h"}})), "tool_choice", "invalid_value"),
            (with(json!({"type": "allowed_tools"})), "tool_choice.type", "unsupported_value"),
        ] {
            let bad = parse(body.clone()).unwrap_err();
            assert_eq!((bad.param.as_str(), bad.code), (param, code), "{body}");
        }
    }
}
