use serde_json::{Value, json};

use super::harness::*;
use crate::{
    ModelConfig,
    config::{ReasoningParser, ToolParser},
};

const CHAT: &str = "/v1/chat/completions";

/// A router for a model that thinks and calls as Qwen does, and a worker that says this.
async fn cluster(text: &str) -> (Cluster, Mock) {
    let steps = [say(text), vec![Step::Token(2), stop()]].concat();
    let cluster = Cluster::start(|config| {
        let demo = config.models.remove(0);
        let (tool_parser, reasoning_parser) = (ToolParser::Hermes, ReasoningParser::Think);
        config.models.push(ModelConfig { tool_parser, reasoning_parser, ..demo });
    })
    .await;
    let mock = cluster.worker(move |_| steps.clone()).await;
    (cluster, mock)
}

fn with_tools(fields: Value) -> Value {
    let mut body = Cluster::chat(fields);
    body["tools"] = json!([
        {"type": "function", "function": {"name": "f", "description": "F", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "g"}},
    ]);
    body
}

/// Takes out the names of calls, which are new each time.
fn nameless(answer: &Value) -> String {
    let mut answer = answer.clone();
    stable(&mut answer);
    for choice in answer["choices"].as_array_mut().unwrap() {
        for message in ["message", "delta"] {
            for call in
                choice.get_mut(message).and_then(|m| m.get_mut("tool_calls")?.as_array_mut()).into_iter().flatten()
            {
                if let Some(id) = call.get_mut("id") {
                    assert!(id.as_str().unwrap().starts_with("call_"), "{id}");
                    *id = json!("call");
                }
            }
        }
    }
    answer["choices"].to_string()
}

const CALLS: &str = "<think>\nBoth.\n</think>\n\nLook:\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";

#[tokio::test]
async fn calls_and_thoughts_are_taken_out_of_a_whole_answer() {
    let (cluster, mock) = cluster(CALLS).await;
    let (status, answer) = cluster.ask(CHAT, with_tools(json!({}))).await;
    assert_eq!(status, 200, "{answer}");
    insta::assert_snapshot!(nameless(&answer), @r#"[{"index":0,"message":{"role":"assistant","content":"Look:","refusal":null,"reasoning_content":"Both.","tool_calls":[{"id":"call","type":"function","function":{"name":"f","arguments":"{\"a\": 1}"}},{"id":"call","type":"function","function":{"name":"g","arguments":"{}"}}]},"logprobs":null,"finish_reason":"tool_calls"}]"#);
    assert!(mock.requests()[0].sampling.as_ref().unwrap().grammar.is_none());

    let (_, answer) =
        cluster.ask(CHAT, with_tools(json!({"parallel_tool_calls": false, "include_reasoning": false}))).await;
    insta::assert_snapshot!(nameless(&answer), @r#"[{"index":0,"message":{"role":"assistant","content":"Look:","refusal":null,"tool_calls":[{"id":"call","type":"function","function":{"name":"f","arguments":"{\"a\": 1}"}}]},"logprobs":null,"finish_reason":"tool_calls"}]"#);
    // Nobody asked for calls, so there are none.
    for body in [Cluster::chat(json!({})), with_tools(json!({"tool_choice": "none"}))] {
        let (_, answer) = cluster.ask(CHAT, body).await;
        let message = &answer["choices"][0]["message"];
        assert!(
            message["content"].as_str().unwrap().starts_with("Look:\n<tool_call>") && message["tool_calls"].is_null()
        );
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
}

#[tokio::test]
async fn calls_and_thoughts_are_taken_out_of_a_stream() {
    let (cluster, _mock) = cluster(CALLS).await;
    let response = cluster.post(CHAT, with_tools(json!({"stream": true}))).await.text().await.unwrap();
    let (mut thought, mut said, mut calls, mut reasons) =
        (String::new(), String::new(), Vec::<[String; 2]>::new(), Vec::new());
    let events = events(&response);
    for event in &events[..events.len() - 1] {
        let choice = serde_json::from_str::<Value>(event).unwrap()["choices"][0].take();
        let delta = &choice["delta"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        thought += &text(&delta["reasoning_content"]);
        said += &text(&delta["content"]);
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let (index, function) = (call["index"].as_u64().unwrap() as usize, &call["function"]);
            if let Some(name) = function["name"].as_str() {
                assert_eq!((index, call["type"].as_str()), (calls.len(), Some("function")));
                assert!(call["id"].is_string());
                calls.push([name.to_owned(), String::new()]);
            }
            calls[index][1] += function["arguments"].as_str().unwrap();
        }
        reasons.extend(choice["finish_reason"].as_str().map(str::to_owned));
    }
    assert_eq!((thought.as_str(), said.as_str()), ("Both.", "Look:"));
    assert_eq!(calls, [["f", "{\"a\": 1}"], ["g", "{}"]]);
    assert_eq!(reasons, ["tool_calls"]);
    // The arguments come while they are written.
    assert!(events.iter().filter(|event| event.contains("arguments")).count() > 5, "{events:?}");
}

#[tokio::test]
async fn required_and_named_calls_are_constrained() {
    let (cluster, mock) = cluster(r#"[{"name": "g", "parameters": {}}]"#).await;
    let (_, answer) = cluster.ask(CHAT, with_tools(json!({"tool_choice": "required"}))).await;
    insta::assert_snapshot!(nameless(&answer), @r#"[{"index":0,"message":{"role":"assistant","content":null,"refusal":null,"tool_calls":[{"id":"call","type":"function","function":{"name":"g","arguments":"{}"}}]},"logprobs":null,"finish_reason":"tool_calls"}]"#);
    let named = json!({"tool_choice": {"type": "function", "function": {"name": "f"}}});
    cluster.ask(CHAT, with_tools(named)).await;
    let schemas: Vec<_> =
        mock.requests().into_iter().map(|seen| format!("{:?}", seen.sampling.unwrap().grammar)).collect();
    insta::assert_snapshot!(schemas.join("\n"), @r#"
    Some(Grammar { form: Some(JsonSchema("{\"type\":\"array\",\"minItems\":1,\"items\":{\"anyOf\":[{\"type\":\"object\",\"properties\":{\"name\":{\"const\":\"f\"},\"parameters\":{\"type\":\"object\"}},\"required\":[\"name\",\"parameters\"],\"additionalProperties\":false},{\"type\":\"object\",\"properties\":{\"name\":{\"const\":\"g\"},\"parameters\":{\"type\":\"object\",\"properties\":{},\"additionalProperties\":false}},\"required\":[\"name\",\"parameters\"],\"additionalProperties\":false}]}}")) })
    Some(Grammar { form: Some(JsonSchema("{\"type\":\"object\"}")) })
    "#);
}

#[tokio::test]
async fn logprobs_go_with_the_chunks_of_their_tokens() {
    let mut steps: Vec<Step> = say("<think>a</think>b");
    for step in &mut steps {
        if let Step::Token(token) = *step {
            *step = Step::Logged(token, -0.5, Vec::new());
        }
    }
    let tokens = steps.len();
    let cluster = Cluster::start(|config| config.models[0].reasoning_parser = ReasoningParser::Think).await;
    let _mock = cluster.worker(move |_| [steps.clone(), vec![Step::Token(2), stop()]].concat()).await;
    let body = Cluster::chat(json!({"stream": true, "logprobs": true}));
    let response = cluster.post(CHAT, body).await.text().await.unwrap();
    let events = events(&response);
    let logged: usize = events[..events.len() - 1]
        .iter()
        .map(|event| {
            serde_json::from_str::<Value>(event).unwrap()["choices"][0]["logprobs"]["content"]
                .as_array()
                .map_or(0, Vec::len)
        })
        .sum();
    assert_eq!(logged, tokens);
}
