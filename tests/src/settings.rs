//! Configuration files of the services under test. JSON is YAML, so they are written as JSON.

use serde_json::{Map, Value};

/// Sets `path` (dotted, like the services' `--set`) in a configuration, making the sections on the way.
pub fn set(config: &mut Value, path: &str, value: impl Into<Value>) {
    let mut at = config;
    for key in path.split('.') {
        if !at.is_object() {
            *at = Value::Object(Map::new());
        }
        at = at.as_object_mut().expect("made an object above").entry(key).or_insert(Value::Null);
    }
    *at = value.into();
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sections_are_made_on_the_way_and_neighbours_stay() {
        let mut config = json!({"admin": {"listen": "a"}});
        set(&mut config, "admin.other", 1);
        set(&mut config, "kv.memory_bytes", 64);
        set(&mut config, "id", "x");
        assert_eq!(config, json!({"admin": {"listen": "a", "other": 1}, "kv": {"memory_bytes": 64}, "id": "x"}));
    }
}
