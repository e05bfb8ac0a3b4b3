//! Reading a JSON object field by field, so that every mistake is told by the field's name.
//!
//! Each field is taken out as it is read. What remains at the end is either known and not supported (accepted with its
//! neutral value, else refused) or unknown (refused). Nothing is silently ignored.

use serde_json::{Map, Value};

use super::error::{BadParam, Error};

/// A known field that is not supported, and the values with which it means nothing.
pub(crate) type Unsupported = (&'static str, &'static [&'static str]);

/// The fields not read yet.
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// Path of the object, with its dot: `stream_options.`; empty for the body itself.
    prefix: String,
}

impl Fields {
    /// The body of a request.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Error> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self { map, prefix: String::new() }),
            Ok(other) => Err(Error::Malformed(format!("expected an object, got {}", name_of(&other)))),
            Err(error) => Err(Error::Malformed(error.to_string())),
        }
    }

    /// An object inside the body, at `path`.
    pub(crate) fn of(path: &str, value: Value) -> Result<Self, BadParam> {
        match value {
            Value::Object(map) => Ok(Self { map, prefix: format!("{path}.") }),
            other => Err(wrong_type(path, "an object", &other)),
        }
    }

    /// The path of a field of this object.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Notes that a field of the body is known, for the test that compares the OpenAPI document.
    fn note(&self, name: &str) {
        #[cfg(test)]
        if self.prefix.is_empty() {
            asked().insert(name.to_owned());
        }
        let _ = name;
    }

    /// A field that stays to be read.
    pub(crate) fn peek(&self, name: &str) -> Option<&Value> {
        self.note(name);
        self.map.get(name)
    }

    /// A field's value; `null` is as good as absent.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.note(name);
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// A field that must be there.
    pub(crate) fn require(&mut self, name: &str) -> Result<Value, BadParam> {
        self.take(name).ok_or_else(|| {
            let path = self.path(name);
            let message = format!("missing required parameter: '{path}'");
            BadParam::new(path, "missing_required_parameter", message)
        })
    }

    /// A text.
    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, BadParam> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(&self.path(name), "a string", &other)),
        }
    }

    /// A text that must be there.
    pub(crate) fn require_string(&mut self, name: &str) -> Result<String, BadParam> {
        match self.require(name)? {
            Value::String(text) => Ok(text),
            other => Err(wrong_type(&self.path(name), "a string", &other)),
        }
    }

    /// An object, taken as it is.
    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, BadParam> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(wrong_type(&self.path(name), "an object", &other)),
        }
    }

    /// True or false.
    pub(crate) fn bool(&mut self, name: &str) -> Result<Option<bool>, BadParam> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong_type(&self.path(name), "a boolean", &other)),
        }
    }

    /// A number from `min` to `max`.
    pub(crate) fn number(&mut self, name: &str, min: f64, max: f64) -> Result<Option<f64>, BadParam> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let path = self.path(name);
        let number = value.as_f64().ok_or_else(|| wrong_type(&path, "a number", &value))?;
        if (min..=max).contains(&number) {
            Ok(Some(number))
        } else {
            Err(out_of_range(&path, number < min, &format!("{min} to {max}"), &value))
        }
    }

    /// A whole number from `min` to `max`.
    pub(crate) fn integer(&mut self, name: &str, min: u64, max: u64) -> Result<Option<u64>, BadParam> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let path = self.path(name);
        if !value.is_i64() && !value.is_u64() {
            return Err(wrong_type(&path, "an integer", &value));
        }
        match value.as_u64() {
            Some(number) if (min..=max).contains(&number) => Ok(Some(number)),
            number => Err(out_of_range(&path, number.is_none_or(|n| n < min), &format!("{min} to {max}"), &value)),
        }
    }

    /// Checks that nothing of meaning is left. `unsupported` lists the known fields that have not been read.
    pub(crate) fn finish(self, unsupported: &[Unsupported]) -> Result<(), BadParam> {
        for (name, value) in &self.map {
            let path = self.path(name);
            let Some((_, neutral)) = unsupported.iter().find(|(known, _)| known == name) else {
                let message = format!("unknown parameter: '{path}'");
                return Err(BadParam::new(path, "unknown_parameter", message));
            };
            let text = value.to_string();
            if value.is_null()
                || is_empty(value)
                || neutral.contains(&text.as_str())
                || is_neutral_number(value, neutral)
            {
                continue;
            }
            let allowed = match neutral {
                [] => "leave it out".to_owned(),
                values => format!("leave it out or send {}", values.join(" or ")),
            };
            let message = format!("'{path}' is not supported by this server: {allowed}");
            return Err(BadParam::new(path, "unsupported_parameter", message));
        }
        Ok(())
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// `0.0` means what `0` means.
fn is_neutral_number(value: &Value, neutral: &[&str]) -> bool {
    let number = value.as_f64();
    number.is_some() && neutral.iter().any(|text| text.parse().ok() == number)
}

/// The names of all fields of bodies that this thread has looked for.
#[cfg(test)]
pub(crate) fn asked() -> std::cell::RefMut<'static, std::collections::BTreeSet<String>> {
    use std::{cell::RefCell, collections::BTreeSet};
    thread_local! {
        static ASKED: &'static RefCell<BTreeSet<String>> = Box::leak(Box::default());
    }
    ASKED.with(|asked| asked.borrow_mut())
}

/// "Expected this, got that".
pub(crate) fn wrong_type(path: &str, expected: &str, got: &Value) -> BadParam {
    let message = format!("invalid type for '{path}': expected {expected}, got {}", name_of(got));
    BadParam::new(path, "invalid_type", message)
}

fn out_of_range(path: &str, below: bool, allowed: &str, got: &Value) -> BadParam {
    let code = if below { "below_min_value" } else { "above_max_value" };
    BadParam::new(path, code, format!("invalid value for '{path}': expected {allowed}, got {got}"))
}

fn name_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
