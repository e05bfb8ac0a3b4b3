//! From what a client asks for to what llguidance compiles.

use kvasir_engine::BadGrammar;
use kvasir_types::Grammar;
use llguidance::api::TopLevelGrammar;
use serde_json::{Map, Value, json};

/// What may stand between two tokens of JSON, once: a blank, or a line break and the indentation of eight levels. All that
/// people and programs write; a small model that is asked for JSON, which it never saw, filled forty characters of anything
/// with line breaks wherever it could.
pub const WHITE_SPACE: &str = r"\x20|\x0A[\x20\x09]{0,32}";

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
        // One expression, not a lexeme for each text: a lexer that must try a hundred lexemes at every byte takes a hundred
        // times as long.
        Grammar::Choice(texts) => {
            let texts: Vec<String> = texts.iter().map(|text| literally(text)).collect();
            TopLevelGrammar::from_regex(&texts.join("|"))
        }
        Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.to_string()),
    })
}

/// A regular expression that matches this text only.
fn literally(text: &str) -> String {
    let mut expression = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() && !c.is_ascii_alphanumeric() {
            expression += &format!(r"\x{:02X}", u32::from(c));
        } else {
            expression.push(c);
        }
    }
    expression
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
