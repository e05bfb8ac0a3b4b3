//! What of a configuration is shown to nobody.

use serde_json::Value;

/// Keys whose values are taken out.
const SECRET: [&str; 9] =
    ["token", "secret", "password", "passwd", "credential", "api_key", "apikey", "sha256", "private_key"];
/// Keys that have such a word in them and are no secrets: they count tokens, or say where a secret is.
const NO_SECRET: [&str; 6] =
    ["_tokens", "tokens_total", "tokenizer", "tokens_per_second", "tokens_per_minute", "_file"];
/// What stands in their place.
const TAKEN_OUT: &str = "(taken out)";

/// The same without what sounds like a secret.
pub fn redacted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let entry = |(key, value): (String, Value)| {
                let value = if is_secret(&key) && !value.is_null() { TAKEN_OUT.into() } else { redacted(value) };
                (key, value)
            };
            Value::Object(map.into_iter().map(entry).collect())
        }
        Value::Array(all) => Value::Array(all.into_iter().map(redacted).collect()),
        Value::String(text) => Value::String(without_user(text)),
        other => other,
    }
}

/// Whether a key's value is shown to nobody.
pub fn is_secret(key: &str) -> bool {
    let key = key.to_lowercase().replace('-', "_");
    SECRET.iter().any(|mark| key.contains(mark)) && !NO_SECRET.iter().any(|mark| key.contains(mark))
        || key == "key"
        || key == "salt"
        || key.ends_with("_salt")
}

/// `scheme://user:password@host` without user and password.
fn without_user(text: String) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    match authority.rsplit_once('@') {
        Some((user, _)) => format!("{scheme}://{TAKEN_OUT}{}", &rest[user.len()..]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_sounds_like_a_secret_is_taken_out_wherever_it_is() {
        let given = json!({
            "token": "x", "access": [{"name": "acme", "sha256": "ab", "cache_salt": "s"}], "prompt_tokens": 5,
            "tokenizer": "hash", "Api-Key": {"deep": 1}, "plain": {"password": "p", "port": 1}, "key": "k", "sha256": null,
            "tokens_file": "t", "url": "http://me:pass@host:1/a@b", "other": "http://host/a@b", "tokens_per_minute": 3,
        });
        let expected = json!({
            "token": "(taken out)", "access": [{"name": "acme", "sha256": "(taken out)", "cache_salt": "(taken out)"}],
            "prompt_tokens": 5, "tokenizer": "hash", "Api-Key": "(taken out)",
            "plain": {"password": "(taken out)", "port": 1}, "key": "(taken out)", "sha256": null,
            "tokens_file": "t", "url": "http://(taken out)@host:1/a@b", "other": "http://host/a@b", "tokens_per_minute": 3,
        });
        assert_eq!(redacted(given), expected);
    }
}
