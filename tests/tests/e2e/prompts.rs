//! What the tests ask.

use serde_json::{Value, json};

/// A question whose answer the demo model knows by heart.
pub const QUESTION: &str = "What is a prefix cache?";

/// A chat request: one user message, greedy.
pub fn chat(model: &str, content: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 64})
}

/// The same as a stream that ends with the usage.
pub fn streamed(model: &str, content: &str) -> Value {
    let mut body = chat(model, content);
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    body
}

/// A request that takes long to prefill: some `words` tokens in the middle of which a worker can be killed.
pub fn long(words: usize) -> String {
    const WORDS: [&str; 8] = ["lemon", "rose", "candle", "forest", "planet", "water", "dawn", "sail"];
    let list: Vec<_> = WORDS.into_iter().cycle().take(words).collect();
    format!("Repeat: {}", list.join(" "))
}

/// A request with a long answer (a hundred tokens and more).
pub const COUNT: &str = "Count from 49 to 97.";

/// The text of a chat answer.
pub fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_default()
}

/// `usage.prompt_tokens_details.cached_tokens` of an answer.
pub fn cached_tokens(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or_default()
}
