use serde_json::{Value, json};

use super::harness::*;
use crate::{
    ModelConfig,
    config::{ReasoningParser, ToolParser},
};

const RESPONSES: &str = "/v1/responses";

async fn cluster(steps: Vec<Step>) -> (Cluster, Mock) {
    let cluster = Cluster::start(|config| {
        let demo = config.models.remove(0);
        let (tool_parser, reasoning_parser) = (ToolParser::Hermes, ReasoningParser::Think);
        config.models.push(ModelConfig { tool_parser, reasoning_parser, ..demo });
    })
    .await;
    let mock = cluster.worker(move |_| steps.clone()).await;
    (cluster, mock)
}

fn ask(fields: Value) -> Value {
    let mut body = json!({"model": "demo", "input": "What is a prefix cache?",
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}]});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

const TEXT: &str = "<think>Hm.</think>Look:\n<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>";

/// The types of the items with their texts.
fn items(response: &Value) -> Vec<(String, String)> {
    let text =
        |item: &Value| item["content"][0]["text"].as_str().or_else(|| item["arguments"].as_str()).unwrap().to_owned();
    let items = response["output"].as_array().unwrap().iter();
    items.map(|item| (item["type"].as_str().unwrap().to_owned(), text(item))).collect()
}

fn expected() -> Vec<(String, String)> {
    [("reasoning", "Hm."), ("message", "Look:"), ("function_call", "{\"a\": 1}")]
        .map(|(kind, text)| (kind.to_owned(), text.to_owned()))
        .into()
}

#[tokio::test]
async fn a_whole_response_has_items() {
    let (cluster, mock) = cluster([say(TEXT), vec![Step::Token(2), stop()]].concat()).await;
    let (status, response) = cluster.ask(RESPONSES, ask(json!({"metadata": {"a": "b"}, "temperature": 0.5}))).await;
    assert_eq!((status, &response["status"], &response["object"]), (200, &json!("completed"), &json!("response")));
    assert_eq!(items(&response), expected());
    assert_eq!((&response["metadata"]["a"], &response["temperature"]), (&json!("b"), &json!(0.5)));
    assert_eq!((&response["usage"]["input_tokens"], &response["store"]), (&json!(14), &json!(false)));
    assert_eq!(mock.requests()[0].prompt.len(), 14); // as the same question asked in a chat
}

#[tokio::test]
async fn a_streamed_response_says_each_thing_in_order_and_once() {
    let (cluster, _mock) = cluster([say(TEXT), vec![Step::Token(2), stop()]].concat()).await;
    let body = cluster.post(RESPONSES, ask(json!({"stream": true}))).await.text().await.unwrap();
    let events: Vec<Value> = body
        .split_terminator("\n\n")
        .map(|event| {
            let (name, data) = event.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
            let data: Value = serde_json::from_str(data).unwrap();
            assert_eq!(data["type"], name);
            data
        })
        .collect();
    let numbers: Vec<u64> = events.iter().map(|event| event["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let mut kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    insta::assert_snapshot!(kinds.join("\n"), @r#"
    response.created
    response.in_progress
    response.output_item.added
    response.content_part.added
    response.reasoning_text.delta
    response.reasoning_text.done
    response.content_part.done
    response.output_item.done
    response.output_item.added
    response.content_part.added
    response.output_text.delta
    response.output_text.done
    response.content_part.done
    response.output_item.done
    response.output_item.added
    response.function_call_arguments.delta
    response.function_call_arguments.done
    response.output_item.done
    response.completed
    "#);
    assert_eq!(items(&events.last().unwrap()["response"]), expected());
    // The deltas of each item are its text.
    for (index, (_, text)) in expected().iter().enumerate() {
        let deltas = events.iter().filter(|event| event["output_index"] == json!(index));
        let said: String = deltas.filter_map(|event| event["delta"].as_str()).collect();
        assert_eq!(said, *text);
    }
}

#[tokio::test]
async fn a_response_that_is_cut_or_breaks_says_so() {
    let length = kvasir_proto::v1::finished::Reason::Length;
    let (cut, _mock) = cluster([say("One"), vec![Step::Finish(length)]].concat()).await;
    let (_, response) = cut.ask(RESPONSES, ask(json!({}))).await;
    assert_eq!(response["status"], "incomplete");
    assert_eq!(response["incomplete_details"]["reason"], "max_output_tokens");

    let (broken, _mock) = cluster([say("One"), vec![Step::Refuse("prompt")]].concat()).await;
    let body = broken.post(RESPONSES, ask(json!({"stream": true}))).await.text().await.unwrap();
    let last = body.trim_end().rsplit("\n\n").next().unwrap();
    let last: Value = serde_json::from_str(last.split_once("\ndata: ").unwrap().1).unwrap();
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    assert!(last["response"]["error"]["message"].is_string());
}

#[tokio::test]
async fn texts_become_tokens_and_text_again() {
    let (cluster, _mock) = cluster(vec![stop()]).await;
    let (status, answer) = cluster.ask("/tokenize", json!({"prompt": "KV 🦀", "return_token_strs": true})).await;
    assert_eq!((status, &answer["max_model_len"]), (200, &json!(CONTEXT)));
    assert_eq!(answer["count"].as_u64().unwrap() as usize, answer["tokens"].as_array().unwrap().len());
    assert_eq!(answer["count"].as_u64().unwrap() as usize, answer["token_strs"].as_array().unwrap().len());
    let back = cluster.ask("/detokenize", json!({"model": "demo", "tokens": answer["tokens"]})).await;
    assert_eq!(back, (200, json!({"prompt": "KV 🦀"})));

    let chat = json!({"messages": [{"role": "user", "content": "What is a prefix cache?"}]});
    let (_, chat) = cluster.ask("/tokenize", chat).await;
    assert_eq!(chat["tokens"], json!([1, 301, 201, 323, 265, 282, 973, 883, 33, 2, 201, 1, 300, 201])); // golden.jsonl
    let (_, text) = cluster.ask("/detokenize", json!({"tokens": chat["tokens"]})).await;
    assert!(text["prompt"].as_str().unwrap().starts_with("<|im_start|>user\n"));

    for (path, body, param) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "messages": []}), "prompt"),
        ("/tokenize", json!({"prompt": ["a"]}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "x": 1}), "x"),
        ("/tokenize", json!({"prompt": "a", "model": "other"}), "model"),
        ("/detokenize", json!({"tokens": [1532]}), "tokens"),
        ("/detokenize", json!({"tokens": ["a"]}), "tokens"),
    ] {
        let (status, answer) = cluster.ask(path, body.clone()).await;
        assert!((400..=404).contains(&status) && answer["error"]["param"] == param, "{path} {body}: {answer}");
    }
}

#[tokio::test]
async fn probes_have_all_names() {
    let (cluster, _mock) = cluster(vec![stop()]).await;
    for path in kvasir_runtime::admin::HEALTH.into_iter().chain(kvasir_runtime::admin::READY) {
        assert_eq!(cluster.get(path).await.0, 200, "{path}");
    }
}
