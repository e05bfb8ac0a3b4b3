//! From what a client asks for to what llguidance compiles.

use kvasir_engine::BadGrammar;
use kvasir_types::Grammar;
use llguidance::api::TopLevelGrammar;
use serde_json::{Map, Value, json};

/// What may stand between two tokens of JSON, once: room for a line break and the indentation of eight levels.
pub const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,40}";

/// The grammar in llguidance's form.
pub(crate) fn grammar(grammar: &Grammar) -> Result<TopLevelGrammar, BadGrammar> {
    Ok(match grammar {
        Grammar::JsonObject => TopLevelGrammar::from_json_schema(schema(json!({"type": "object"}))?),
        Grammar::JsonSchema(text) => {
            let value = serde_json::from_str(text)
                .map_err(|error| BadGrammar::new(format!("the schema is not JSON: {error}")))?;
            TopLevelGrammar::from_json_schema(schema(value)?)
        }
        Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
        Grammar::Choice(texts) => {
            // Lark's strings have JSON's escapes.
            let texts: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
            TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | ")))
        }
        Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.to_string()),
    })
}

/// The schema with our options; the client's own are not obeyed, they could lift limits.
fn schema(value: Value) -> Result<Value, BadGrammar> {
    let mut map = match value {
        Value::Object(map) => map,
        Value::Bool(true) => Map::new(),
        _ => return Err(BadGrammar::new("the schema is not an object")),
    };
    map.insert("x-guidance".to_owned(), json!({"whitespace_pattern": WHITE_SPACE}));
    Ok(Value::Object(map))
}
