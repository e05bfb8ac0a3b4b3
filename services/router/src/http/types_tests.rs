use serde_json::json;

use kvasir_types::Grammar;

use super::*;

fn with(base: Value, changes: Value) -> Vec<u8> {
    let (Value::Object(mut base), Value::Object(changes)) = (base, changes) else { panic!("objects") };
    for (name, value) in changes {
        if value == json!("<absent>") {
            base.remove(&name);
        } else {
            base.insert(name, value);
        }
    }
    Value::Object(base).to_string().into_bytes()
}

fn chat(changes: Value) -> Result<ChatRequest, Error> {
    ChatRequest::parse(&with(json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]}), changes))
}

fn completion(changes: Value) -> Result<CompletionRequest, Error> {
    CompletionRequest::parse(&with(json!({"model": "m", "prompt": "hi"}), changes))
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> (String, &'static str) {
    match result {
        Err(Error::Param(bad)) => (bad.param, bad.code),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn the_least_request_has_openais_defaults() {
    let common = chat(json!({})).unwrap().common;
    assert_eq!((common.sampling.temperature, common.sampling.top_p, common.sampling.top_k), (1.0, 1.0, 0));
    assert_eq!((common.seed, common.max_tokens, common.stream), (None, None, None));
    assert!(!common.sampling.max_tokens_asked);
    let common = completion(json!({})).unwrap().common;
    assert_eq!((common.max_tokens, common.sampling.max_tokens_asked), (Some(("max_tokens", 16)), false));
    let common = completion(json!({"max_tokens": 16})).unwrap().common;
    assert_eq!((common.max_tokens, common.sampling.max_tokens_asked), (Some(("max_tokens", 16)), true));
}

#[test]
fn every_supported_field_arrives() {
    let request = chat(json!({
        "messages": [
            {"role": "developer", "content": "be brief", "name": "ops"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null},
        ],
        "temperature": 0, "top_p": 0, "top_k": 5, "seed": -1, "stop": ["x", "y"], "stop_token_ids": [7],
        "ignore_eos": true, "cache_salt": "tenant", "prompt_cache_key": "chat-7", "max_completion_tokens": 9, "max_tokens": 9, "logprobs": true, "top_logprobs": 3,
        "stream": true, "stream_options": {"include_usage": true}, "user": "u", "safety_identifier": "s",
    }))
    .unwrap();
    let messages = request.conversation.messages;
    let texts: Vec<_> = messages.iter().map(|m| (m.role.as_str(), m.content.as_deref())).collect();
    assert_eq!(texts, [("system", Some("be brief")), ("user", Some("ab")), ("assistant", Some(""))]);
    let common = request.common;
    assert_eq!(
        (common.seed, common.max_tokens, common.cache_salt.as_str()),
        (Some(u64::MAX), Some(("max_completion_tokens", 9)), "tenant")
    );
    assert_eq!(common.stream, Some(Streaming { include_usage: true }));
    assert!(common.sampling.max_tokens_asked && common.session.as_deref() == Some("chat-7"));
    let Sampling { temperature, top_p, top_k, ignore_eos, logprobs, stop_token_ids, .. } = common.sampling;
    assert_eq!((temperature, top_k, ignore_eos, logprobs), (0.0, 5, true, Some(3)));
    assert!(top_p > 0.0 && top_p < 1e-30 && stop_token_ids == [TokenId(7)]);
}

#[test]
fn calls_and_their_results_arrive() {
    let conversation = chat(json!({
        "messages": [
            {"role": "assistant", "content": null, "reasoning": "hm", "tool_calls": [
                {"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": 2}"}},
                {"id": "d", "function": {"name": "g", "arguments": ""}},
            ]},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "3"}]},
        ],
        "documents": [{"title": "t"}], "chat_template_kwargs": {"enable_thinking": false}, "add_generation_prompt": false,
    }));
    let Conversation { messages, documents, variables, open, .. } = conversation.unwrap().conversation;
    let told = serde_json::to_string(&messages).unwrap();
    insta::assert_snapshot!(told, @r#"[{"role":"assistant","content":null,"reasoning_content":"hm","tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":{"b":1,"a":2}}},{"id":"d","type":"function","function":{"name":"g","arguments":{}}}]},{"role":"tool","content":"3","tool_call_id":"c"}]"#);
    assert_eq!((documents, open), (vec![json!({"title": "t"})], false));
    assert_eq!(variables["enable_thinking"], json!(false));
}

#[test]
fn who_goes_first_is_said_by_both_endpoints() {
    use ServiceTier::{Default, Flex};
    for (said, tier) in [("auto", Default), ("default", Default), ("flex", Flex)] {
        let body = json!({"service_tier": said});
        assert_eq!(chat(body.clone()).unwrap().common.service_tier, Some(tier));
        assert_eq!(completion(body).unwrap().common.service_tier, Some(tier));
    }
    assert_eq!(chat(json!({})).unwrap().common.service_tier, None);
}

#[test]
fn every_way_to_choose_tokens_arrives() {
    let body = json!({
        "min_p": 0.25, "repetition_penalty": 1.5, "presence_penalty": -2, "frequency_penalty": 2, "min_tokens": 4,
        "logit_bias": {"9": 1, "3": -100.0},
    });
    for sampling in [chat(body.clone()).unwrap().common.sampling, completion(body).unwrap().common.sampling] {
        let penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty);
        assert_eq!((sampling.min_p, penalties, sampling.min_tokens), (0.25, (1.5, -2.0, 2.0), 4));
        assert_eq!(sampling.logit_bias, [(TokenId(3), -100.0), (TokenId(9), 1.0)]);
    }
}

#[test]
fn the_form_of_an_answer_is_asked_for_in_many_ways() {
    let schema = json!({"type": "object", "properties": {"z": {}, "a": {}}});
    // The order of properties is the order in which they are written.
    let as_schema = || Grammar::JsonSchema(r#"{"type":"object","properties":{"z":{},"a":{}}}"#.into());
    let choice = || Grammar::Choice(["yes".to_owned(), "no".to_owned()].into());
    for (body, param, grammar) in [
        (json!({"response_format": {"type": "json_object"}}), "response_format", Grammar::JsonObject),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}}}),
            "response_format",
            as_schema(),
        ),
        (json!({"guided_json": schema}), "guided_json", as_schema()),
        (json!({"guided_json": schema.to_string()}), "guided_json", as_schema()),
        (json!({"guided_regex": "a+"}), "guided_regex", Grammar::Regex("a+".into())),
        (json!({"guided_choice": ["yes", "no"]}), "guided_choice", choice()),
        (json!({"guided_grammar": "start: \"a\""}), "guided_grammar", Grammar::Lark("start: \"a\"".into())),
        (json!({"structured_outputs": {"json": schema}}), "structured_outputs", as_schema()),
        (json!({"structured_outputs": {"json_object": true}}), "structured_outputs", Grammar::JsonObject),
        (json!({"structured_outputs": {"choice": ["yes", "no"], "regex": null}}), "structured_outputs", choice()),
    ] {
        let common = chat(body.clone()).unwrap().common;
        assert_eq!((common.form_param, common.sampling.grammar), (Some(param), Some(grammar.clone())), "{body}");
        assert_eq!(completion(body).unwrap().common.sampling.grammar, Some(grammar));
    }
    assert_eq!(chat(json!({"response_format": {"type": "text"}})).unwrap().common.form_param, None);
}

#[test]
fn what_chat_does_not_take_is_refused_by_name() {
    let huge = "x".repeat(600);
    for (changes, param, code) in [
        (json!({"model": "<absent>"}), "model", "missing_required_parameter"),
        (json!({"model": 3}), "model", "invalid_type"),
        (json!({"messages": "<absent>"}), "messages", "missing_required_parameter"),
        (json!({"messages": "hi"}), "messages", "invalid_type"),
        (json!({"messages": []}), "messages", "empty_array"),
        (json!({"messages": [3]}), "messages[0]", "invalid_type"),
        (json!({"messages": [{"content": "x"}]}), "messages[0].role", "missing_required_parameter"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content", "missing_required_parameter"),
        (json!({"messages": [{"role": "function", "content": "x"}]}), "messages[0].role", "invalid_value"),
        (
            json!({"messages": [{"role": "tool", "content": "x"}]}),
            "messages[0].tool_call_id",
            "missing_required_parameter",
        ),
        (
            json!({"messages": [{"role": "tool", "tool_call_id": "c"}]}),
            "messages[0].content",
            "missing_required_parameter",
        ),
        (json!({"messages": [{"role": "user", "content": 3}]}), "messages[0].content", "invalid_type"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0].type",
            "unsupported_value",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]}),
            "messages[0].content[0].y",
            "unknown_parameter",
        ),
        (
            json!({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}),
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}),
            "messages[0].tool_calls[0].id",
            "missing_required_parameter",
        ),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "type": "custom"}]}]}),
            "messages[0].tool_calls[0].type",
            "unsupported_value",
        ),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{"}}]}]}),
            "messages[0].tool_calls[0].function.arguments",
            "invalid_value",
        ),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "3"}}]}]}),
            "messages[0].tool_calls[0].function.arguments",
            "invalid_type",
        ),
        (json!({"chat_template_kwargs": []}), "chat_template_kwargs", "invalid_type"),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs.messages", "invalid_value"),
        (json!({"reasoning_effort": "hard"}), "reasoning_effort", "invalid_value"),
        (json!({"documents": ["x"]}), "documents[0]", "invalid_type"),
        (json!({"chat_template": "{{ messages }}"}), "chat_template", "unsupported_parameter"),
        (json!({"continue_final_message": true}), "continue_final_message", "unsupported_parameter"),
        (json!({"temperature": -0.1}), "temperature", "below_min_value"),
        (json!({"temperature": 2.1}), "temperature", "above_max_value"),
        (json!({"temperature": "hot"}), "temperature", "invalid_type"),
        (json!({"top_p": 1.5}), "top_p", "above_max_value"),
        (json!({"top_k": -1}), "top_k", "below_min_value"),
        (json!({"top_k": 1.5}), "top_k", "invalid_type"),
        (json!({"seed": 1.5}), "seed", "invalid_type"),
        (json!({"max_tokens": 0}), "max_tokens", "below_min_value"),
        (json!({"max_tokens": 1u64 << 40}), "max_tokens", "above_max_value"),
        (json!({"max_tokens": 1, "max_completion_tokens": 2}), "max_tokens", "invalid_value"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop", "invalid_value"),
        (json!({"stop": ""}), "stop", "invalid_value"),
        (json!({"stop": huge}), "stop", "invalid_value"),
        (json!({"stop": [1]}), "stop", "invalid_type"),
        (json!({"stop_token_ids": vec![1; 65]}), "stop_token_ids", "invalid_value"),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids", "invalid_type"),
        (json!({"cache_salt": huge}), "cache_salt", "invalid_value"),
        (json!({"prompt_cache_key": huge}), "prompt_cache_key", "invalid_value"),
        (json!({"prompt_cache_retention": "24h"}), "prompt_cache_retention", "unsupported_parameter"),
        (json!({"metadata": {"a": "b"}}), "metadata", "unsupported_parameter"),
        (json!({"store": true}), "store", "unsupported_parameter"),
        (json!({"user": 1}), "user", "invalid_type"),
        (json!({"stream": "yes"}), "stream", "invalid_type"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options", "invalid_value"),
        (json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x", "unknown_parameter"),
        (json!({"top_logprobs": 1}), "top_logprobs", "invalid_value"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "above_max_value"),
        (json!({"logprobs": 3}), "logprobs", "invalid_type"),
        (json!({"n": 0}), "n", "below_min_value"),
        (json!({"presence_penalty": 2.5}), "presence_penalty", "above_max_value"),
        (json!({"frequency_penalty": -2.5}), "frequency_penalty", "below_min_value"),
        (json!({"repetition_penalty": 0}), "repetition_penalty", "below_min_value"),
        (json!({"min_p": 2}), "min_p", "above_max_value"),
        (json!({"min_tokens": -1}), "min_tokens", "below_min_value"),
        (json!({"min_tokens": 9, "max_tokens": 8}), "min_tokens", "invalid_value"),
        (json!({"logit_bias": [1]}), "logit_bias", "invalid_type"),
        (json!({"logit_bias": {"x": 2}}), "logit_bias", "invalid_value"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias", "invalid_value"),
        (json!({"logit_bias": {"1": "2"}}), "logit_bias", "invalid_type"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function", "missing_required_parameter"),
        (
            json!({"tools": [{"function": {"name": "f"}}], "response_format": {"type": "json_object"}}),
            "response_format",
            "unsupported_parameter",
        ),
        (json!({"response_format": "json"}), "response_format", "invalid_type"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type", "invalid_value"),
        (
            json!({"response_format": {"type": "json_schema"}}),
            "response_format.json_schema",
            "missing_required_parameter",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}}),
            "response_format.json_schema.schema",
            "invalid_type",
        ),
        (json!({"guided_regex": 1}), "guided_regex", "invalid_type"),
        (json!({"guided_choice": []}), "guided_choice", "empty_array"),
        (json!({"guided_json": "{"}), "guided_json", "invalid_value"),
        (json!({"guided_regex": "x".repeat(300 << 10)}), "guided_regex", "invalid_value"),
        (json!({"guided_regex": "a", "response_format": {"type": "json_object"}}), "guided_regex", "invalid_value"),
        (json!({"structured_outputs": {"regex": "a", "json_object": true}}), "structured_outputs", "invalid_value"),
        (json!({"structured_outputs": {"xml": "a"}}), "structured_outputs.xml", "unknown_parameter"),
        (json!({"service_tier": "priority"}), "service_tier", "unsupported_value"),
        (json!({"service_tier": 1}), "service_tier", "invalid_type"),
        (json!({"tempurature": 1}), "tempurature", "unknown_parameter"),
    ] {
        assert_eq!(refused(chat(changes.clone())), (param.to_owned(), code), "{changes}");
    }
}

#[test]
fn what_completions_do_not_take_is_refused_by_name() {
    for (changes, param, code) in [
        (json!({"prompt": null}), "prompt", "missing_required_parameter"),
        (json!({"prompt": ""}), "prompt", "invalid_value"),
        (json!({"prompt": []}), "prompt", "invalid_value"),
        (json!({"prompt": ["a", "b"]}), "prompt", "unsupported_value"),
        (json!({"prompt": [[1], [2]]}), "prompt", "unsupported_value"),
        (json!({"prompt": [1, "a"]}), "prompt", "invalid_type"),
        (json!({"prompt": [1, -2]}), "prompt", "invalid_type"),
        (json!({"prompt": {}}), "prompt", "invalid_type"),
        (json!({"echo": true}), "echo", "unsupported_parameter"),
        (json!({"best_of": 2}), "best_of", "unsupported_parameter"),
        (json!({"suffix": "end"}), "suffix", "unsupported_parameter"),
        (json!({"logprobs": true}), "logprobs", "invalid_type"),
        (json!({"logprobs": 21}), "logprobs", "above_max_value"),
        (json!({"messages": []}), "messages", "unknown_parameter"),
    ] {
        assert_eq!(refused(completion(changes.clone())), (param.to_owned(), code), "{changes}");
    }
}

#[test]
fn prompts_come_in_four_forms() {
    for (prompt, expected) in [
        (json!("a"), Prompt::Text("a".to_owned())),
        (json!(["a"]), Prompt::Text("a".to_owned())),
        (json!([1, 2]), Prompt::Tokens(vec![TokenId(1), TokenId(2)])),
        (json!([[1, 2]]), Prompt::Tokens(vec![TokenId(1), TokenId(2)])),
    ] {
        assert_eq!(completion(json!({"prompt": prompt})).unwrap().prompt, expected);
    }
}

#[test]
fn fields_with_their_neutral_value_are_accepted() {
    let neutral = json!({
        "n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "tools": [], "tool_choice": "none",
        "functions": null, "response_format": {"type": "text"}, "metadata": {}, "store": false, "service_tier": "auto",
        "modalities": ["text"], "parallel_tool_calls": true, "reasoning_effort": null, "stop": null, "top_logprobs": null,
    });
    chat(neutral).unwrap();
    completion(json!({"best_of": 1, "echo": false, "suffix": "", "n": 1, "logit_bias": null, "logprobs": null}))
        .unwrap();
}

#[test]
fn a_body_that_is_no_object_is_malformed() {
    for body in ["", "{", "[]", "3", "{\"model\": }", "\u{1}", &"[".repeat(10_000)] {
        assert!(matches!(ChatRequest::parse(body.as_bytes()), Err(Error::Malformed(_))), "{body:.20}");
    }
}
