use kvasir_proto::v1::Priority;
use serde_json::{Value, json};

use super::harness::*;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn a_chat_is_answered_whole() {
    let (cluster, mock) = Cluster::with_worker([say("A prefix 🦀"), vec![Step::Token(2), stop()]].concat()).await;
    let request = cluster.client.post(format!("{}{CHAT}", cluster.base)).header("x-request-id", "mine-1");
    let response =
        request.json(&Cluster::chat(json!({"temperature": 0, "seed": 5, "cache_salt": "s"}))).send().await.unwrap();
    assert_eq!((response.status().as_u16(), &response.headers()["x-request-id"]), (200, &"mine-1".parse().unwrap()));

    let mut answer: Value = response.json().await.unwrap();
    assert_eq!(answer["id"], "chatcmpl-mine-1");
    assert_eq!(answer["model"], "demo");
    assert_eq!(answer["system_fingerprint"], format!("fp_{}", "07".repeat(16)));
    stable(&mut answer);
    insta::assert_snapshot!(answer, @r#"{"object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"A prefix 🦀","refusal":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":14,"completion_tokens":8,"total_tokens":22,"prompt_tokens_details":{"cached_tokens":16}}}"#);

    let seen = mock.requests().remove(0);
    assert_eq!(seen.prompt, [1, 301, 201, 323, 265, 282, 973, 883, 33, 2, 201, 1, 300, 201]); // as in golden.jsonl
    assert_eq!((seen.request_id.as_str(), seen.cache_salt.as_str()), ("mine-1", "s"));
    let sampling = seen.sampling.unwrap();
    assert_eq!((sampling.temperature, sampling.seed, sampling.max_tokens), (0.0, 5, CONTEXT - 14));
    assert!(seen.deadline_ms > 500_000 && seen.prefill.is_empty());
    assert_eq!(mock.cancelled(), 0);
}

#[tokio::test]
async fn a_chat_is_streamed_token_by_token() {
    let (cluster, _mock) = Cluster::with_worker([say("KV 🦀"), vec![Step::Token(2), stop()]].concat()).await;
    let body = Cluster::chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let response = cluster.post(CHAT, body).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    insta::assert_snapshot!(events(&response.text().await.unwrap()).join("\n"), @r#"
    {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}
    {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"KV"},"logprobs":null,"finish_reason":null}],"usage":null}
    {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" "},"logprobs":null,"finish_reason":null}],"usage":null}
    {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"🦀"},"logprobs":null,"finish_reason":null}],"usage":null}
    {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}
    {"object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":14,"completion_tokens":7,"total_tokens":21,"prompt_tokens_details":{"cached_tokens":16}}}
    [DONE]
    "#);
}

#[tokio::test]
async fn a_completion_is_streamed() {
    let (cluster, _mock) =
        Cluster::with_worker([say("KV"), vec![Step::Finish(kvasir_proto::v1::finished::Reason::Length)]].concat())
            .await;
    let response = cluster.post(COMPLETIONS, json!({"model": "demo", "prompt": "hi", "stream": true})).await;
    insta::assert_snapshot!(events(&response.text().await.unwrap()).join("\n"), @r#"
    {"object":"text_completion","choices":[{"text":"KV","index":0,"logprobs":null,"finish_reason":null}]}
    {"object":"text_completion","choices":[{"text":"","index":0,"logprobs":null,"finish_reason":"length"}]}
    [DONE]
    "#);
}

/// Two choices whose tokens come in turns; the second one ends first.
fn two() -> Vec<Step> {
    let turn = |choice, token| vec![Step::Choice(choice), Step::Token(token)];
    let end = |choice, reason| vec![Step::Choice(choice), Step::Finish(reason)];
    let length = kvasir_proto::v1::finished::Reason::Length;
    let stop = kvasir_proto::v1::finished::Reason::Stop;
    [turn(0, 973), turn(1, 883), turn(1, 973), end(1, length), turn(0, 883), turn(0, 883), end(0, stop)].concat()
}

#[tokio::test]
async fn choices_are_answered_whole_and_all_of_them_counted() {
    let (cluster, mock) = Cluster::with_worker(two()).await;
    let (status, mut answer) = cluster.ask(CHAT, Cluster::chat(json!({"n": 2}))).await;
    stable(&mut answer);
    assert_eq!(status, 200);
    insta::assert_snapshot!(answer, @r#"{"object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":" prefix cache cache","refusal":null},"logprobs":null,"finish_reason":"stop"},{"index":1,"message":{"role":"assistant","content":" cache prefix","refusal":null},"logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":14,"completion_tokens":5,"total_tokens":19,"prompt_tokens_details":{"cached_tokens":16}}}"#);
    let (_, mut answer) = cluster.ask(COMPLETIONS, json!({"model": "demo", "prompt": "hi", "n": 2})).await;
    stable(&mut answer);
    insta::assert_snapshot!(answer, @r#"{"object":"text_completion","choices":[{"text":" prefix cache cache","index":0,"logprobs":null,"finish_reason":"stop"},{"text":" cache prefix","index":1,"logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":1,"completion_tokens":5,"total_tokens":6,"prompt_tokens_details":{"cached_tokens":16}}}"#);
    assert!(mock.requests().iter().all(|seen| seen.choices == 2));
    assert_eq!(mock.cancelled(), 0);
}

#[tokio::test]
async fn choices_are_streamed_by_their_index() {
    let (cluster, _mock) = Cluster::with_worker(two()).await;
    let body = Cluster::chat(json!({"n": 2, "stream": true, "stream_options": {"include_usage": true}}));
    let streamed = cluster.post(CHAT, body).await.text().await.unwrap();
    insta::assert_snapshot!(events(&streamed).join("\n"), @r#"
    {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}
    {"object":"chat.completion.chunk","choices":[{"index":1,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}
    {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" prefix"},"logprobs":null,"finish_reason":null}],"usage":null}
    {"object":"chat.completion.chunk","choices":[{"index":1,"delta":{"content":" cache"},"logprobs":null,"finish_reason":null}],"usage":null}
    {"object":"chat.completion.chunk","choices":[{"index":1,"delta":{"content":" prefix"},"logprobs":null,"finish_reason":null}],"usage":null}
    {"object":"chat.completion.chunk","choices":[{"index":1,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null}
    {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" cache"},"logprobs":null,"finish_reason":null}],"usage":null}
    {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" cache"},"logprobs":null,"finish_reason":null}],"usage":null}
    {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}
    {"object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":14,"completion_tokens":5,"total_tokens":19,"prompt_tokens_details":{"cached_tokens":16}}}
    [DONE]
    "#);
}

#[tokio::test]
async fn a_stop_string_ends_its_choice_only_and_the_last_one_the_work() {
    let steps = [
        vec![Step::Choice(0)],
        say("one END two"),
        vec![Step::Choice(1)],
        say("three"),
        vec![Step::Choice(0), stop(), Step::Choice(1)],
        say(" four END"),
        vec![Step::Hang],
    ];
    let (cluster, mock) = Cluster::with_worker(steps.concat()).await;
    let (status, answer) = cluster.ask(CHAT, Cluster::chat(json!({"n": 2, "stop": ["END"]}))).await;
    assert_eq!(status, 200);
    for (index, text) in [(0, "one "), (1, "three four ")] {
        let choice = &answer["choices"][index];
        assert_eq!(choice["message"]["content"], text);
        assert_eq!((&choice["finish_reason"], &choice["index"]), (&json!("stop"), &json!(index)));
    }
    eventually("the worker is told", async || mock.cancelled() == 1).await;
}

#[tokio::test]
async fn a_choice_that_nobody_asked_for_is_the_workers_mistake() {
    let (cluster, _mock) = Cluster::with_worker(vec![Step::Token(973), Step::Choice(1), Step::Token(883)]).await;
    let (status, answer) = cluster.ask(CHAT, Cluster::chat(json!({}))).await;
    assert_eq!((status, &answer["error"]["type"]), (502, &json!("server_error")), "{answer}");
}

#[tokio::test]
async fn flex_is_offline_and_said_again() {
    let (cluster, mock) = Cluster::with_worker([say("KV"), vec![stop()]].concat()).await;
    for (tier, said, priority) in [
        (json!("flex"), json!("flex"), Priority::Offline),
        (json!("auto"), json!("default"), Priority::Online),
        (json!("default"), json!("default"), Priority::Online),
        (Value::Null, Value::Null, Priority::Online),
    ] {
        let (status, answer) = cluster.ask(CHAT, Cluster::chat(json!({"service_tier": tier}))).await;
        assert_eq!((status, &answer["service_tier"]), (200, &said));
        assert_eq!(answer.get("service_tier").is_some(), !said.is_null(), "only where it was asked for: {answer}");
        let body = json!({"model": "demo", "prompt": "hi", "stream": true, "service_tier": tier});
        let chunks = cluster.post(COMPLETIONS, body).await.text().await.unwrap();
        for chunk in events(&chunks).iter().filter(|event| *event != "[DONE]") {
            assert_eq!(serde_json::from_str::<Value>(chunk).unwrap()["service_tier"], said);
        }
        let seen = mock.requests().split_off(mock.requests().len() - 2);
        assert!(seen.iter().all(|request| request.priority() == priority), "{tier}");
    }
}

#[tokio::test]
async fn each_token_is_sent_when_it_comes() {
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    let steps = vec![Step::Token(973), Step::Wait(gate.clone()), Step::Token(883), Step::Wait(gate.clone()), stop()];
    let (cluster, _mock) = Cluster::with_worker(steps).await;
    let mut stream = cluster.post(CHAT, Cluster::chat(json!({"stream": true}))).await.bytes_stream();
    read_until(&mut stream, " prefix").await;
    gate.add_permits(1);
    read_until(&mut stream, " cache").await;
    gate.add_permits(1);
    read_until(&mut stream, "data: [DONE]\n\n").await;
}

#[tokio::test]
async fn token_prompts_go_to_the_worker_as_they_are() {
    let (cluster, mock) = Cluster::with_worker(vec![Step::Token(973), stop()]).await;
    for prompt in [json!([5, 6, 7]), json!([[5, 6, 7]])] {
        let (status, answer) = cluster.ask(COMPLETIONS, json!({"model": "demo", "prompt": prompt})).await;
        assert_eq!((status, answer["choices"][0]["text"].as_str()), (200, Some(" prefix")));
    }
    for seen in mock.requests() {
        assert_eq!((seen.prompt, seen.sampling.unwrap().max_tokens), (vec![5, 6, 7], 16));
    }
}

#[tokio::test]
async fn logprobs_come_in_both_forms() {
    let steps = vec![
        Step::Logged(973, -0.25, vec![(973, -0.25), (883, -1.5)]),
        Step::Logged(883, -2.0, vec![(973, -0.5), (3, -1.0)]),
        Step::Logged(2, -0.1, vec![(2, -0.1)]),
        stop(),
    ];
    let (cluster, mock) = Cluster::with_worker(steps).await;
    let (_, chat) = cluster.ask(CHAT, Cluster::chat(json!({"logprobs": true, "top_logprobs": 2}))).await;
    insta::assert_snapshot!(chat["choices"][0]["logprobs"], @r#"{"content":[{"token":" prefix","logprob":-0.25,"bytes":[32,112,114,101,102,105,120],"top_logprobs":[{"token":" prefix","logprob":-0.25,"bytes":[32,112,114,101,102,105,120]},{"token":" cache","logprob":-1.5,"bytes":[32,99,97,99,104,101]}]},{"token":" cache","logprob":-2.0,"bytes":[32,99,97,99,104,101],"top_logprobs":[{"token":" prefix","logprob":-0.5,"bytes":[32,112,114,101,102,105,120]},{"token":"!","logprob":-1.0,"bytes":[33]}]}],"refusal":null}"#);
    let (_, completion) = cluster.ask(COMPLETIONS, json!({"model": "demo", "prompt": "a", "logprobs": 2})).await;
    insta::assert_snapshot!(completion["choices"][0]["logprobs"], @r#"{"tokens":[" prefix"," cache"],"token_logprobs":[-0.25,-2.0],"top_logprobs":[{" prefix":-0.25," cache":-1.5},{" prefix":-0.5,"!":-1.0," cache":-2.0}],"text_offset":[0,7]}"#);
    assert!(mock.requests().iter().all(|seen| seen.sampling.as_ref().unwrap().logprobs == Some(2)));
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_the_workers_work() {
    let (cluster, mock) = Cluster::with_worker([say("one END two"), vec![Step::Hang]].concat()).await;
    let (status, answer) = cluster.ask(CHAT, Cluster::chat(json!({"stop": ["END"]}))).await;
    assert_eq!(status, 200);
    assert_eq!(answer["choices"][0]["message"]["content"], "one ");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["prompt_tokens_details"], Value::Null);
    eventually("the worker is told", async || mock.cancelled() == 1).await;
}

#[tokio::test]
async fn a_stop_token_is_not_shown_and_an_end_token_is_not_either() {
    let (cluster, mock) = Cluster::with_worker(vec![Step::Token(973), Step::Token(883), stop()]).await;
    let (_, answer) = cluster.ask(CHAT, Cluster::chat(json!({"stop_token_ids": [883]}))).await;
    assert_eq!(answer["choices"][0]["message"]["content"], " prefix");
    assert_eq!(mock.requests()[0].sampling.as_ref().unwrap().stop_token_ids, [883]);
}

#[tokio::test]
async fn prompts_that_are_long_are_tokenized_elsewhere_to_the_same_tokens() {
    let cluster = Cluster::start(|_| {}).await;
    let mock = cluster.worker(|_| vec![stop()]).await;
    // Too long for the workers, so that the answer tells how many tokens it is.
    let text = "prefix cache ".repeat(1000);
    let (status, answer) =
        cluster.ask(CHAT, Cluster::chat(json!({"messages": [{"role": "user", "content": text}]}))).await;
    let tokens = crate::text::demo().encode(&text, false).unwrap().len();
    assert_eq!((status, answer["error"]["code"].as_str()), (400, Some("context_length_exceeded")));
    let told = answer["error"]["message"].as_str().unwrap().to_owned();
    let taken: usize = told.split(' ').filter_map(|word| word.parse().ok()).max().unwrap();
    assert!(taken >= tokens && taken < tokens + 20, "{told}");
    assert!(mock.requests().is_empty());
}

#[tokio::test]
async fn prefill_workers_that_fit_are_proposed() {
    let (cluster, mock) = Cluster::with_worker(vec![stop()]).await;
    let registry = cluster.hub.registry();
    let fits = cluster.member(kvasir_types::Role::Prefill, "127.0.0.1:1".into());
    let mut other = cluster.member(kvasir_types::Role::Prefill, "127.0.0.1:2".into());
    other.model.as_mut().unwrap().layout.block_size = 32;
    let mut draining = cluster.member(kvasir_types::Role::Prefill, "127.0.0.1:3".into());
    draining.draining = true;
    for member in [fits.clone(), other, draining] {
        registry.register(member).await.unwrap();
    }
    eventually("the prefill worker is proposed", async || {
        cluster.ask(CHAT, Cluster::chat(json!({}))).await;
        mock.requests().last().is_some_and(|seen| !seen.prefill.is_empty())
    })
    .await;
    let proposed = mock.requests().last().unwrap().prefill.clone();
    assert_eq!(proposed.len(), 1);
    assert_eq!((proposed[0].member.as_str(), proposed[0].address.as_str()), (fits.id.as_str(), "127.0.0.1:1"));
}

#[tokio::test]
async fn models_and_pages() {
    let (cluster, _mock) = Cluster::with_worker(vec![stop()]).await;
    let (status, list) = cluster.get("/v1/models").await;
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!(
        (status, &list["data"][0]["id"], &list["data"][0]["max_model_len"]),
        (200, &json!("demo"), &json!(CONTEXT))
    );
    assert_eq!(cluster.get("/v1/models/demo").await.0, 200);
    assert_eq!(cluster.get("/v1/models/org/none").await.0, 404);
    assert_eq!(cluster.get("/health").await, (200, r#"{"status":"ok"}"#.to_owned()));
    assert_eq!(cluster.get("/ready").await, (200, r#"{"ready":true}"#.to_owned()));

    cluster.ask(CHAT, Cluster::chat(json!({}))).await;
    for line in [
        "kvasir_router_requests_total{endpoint=\"chat\",status=\"2xx\"} 1",
        "kvasir_router_answers_total{outcome=\"complete\"} 1",
        "kvasir_router_inflight 0",
        "kvasir_router_prompt_tokens_total 14",
        "kvasir_router_cached_tokens_total 16",
    ] {
        cluster.until(line).await;
    }
}
