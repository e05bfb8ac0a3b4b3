//! Answers whose worker fails go on elsewhere, and the client sees what it would have seen anyway.

use std::sync::Arc;

use kvasir_types::{Role, choice_seed};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tonic::Code;

use super::harness::*;

const CHAT: &str = "/v1/chat/completions";
const SEED: u64 = 7;

/// What the answer must be.
fn text(choice: u32) -> String {
    let seed = choice_seed(SEED, choice);
    let tokens: Vec<_> = (0..ANSWER).map(|at| token_at(seed, at)).collect();
    crate::text::demo().decode(&tokens)
}

fn texts(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().unwrap();
    choices.iter().map(|choice| choice["message"]["content"].as_str().unwrap().to_owned()).collect()
}

fn ask(fields: Value) -> Value {
    let mut fields = fields;
    fields["seed"] = json!(SEED);
    Cluster::chat(fields)
}

/// Writes so much of each choice's answer, then does this.
fn breaks_off(tokens: usize, then: Step) -> impl Fn(&kvasir_proto::v1::GenerateRequest) -> Vec<Step> {
    move |request| {
        let whole = answer_of(request);
        let part = |choice: &[Step]| choice.iter().take(tokens + 1).cloned().collect::<Vec<_>>();
        let choices = whole.split_inclusive(|step| matches!(step, Step::Finish(_)));
        let mut steps: Vec<Step> = choices.flat_map(part).collect();
        steps.push(then.clone());
        steps
    }
}

#[tokio::test]
async fn every_way_to_fail_within_an_answer_leads_to_another_worker() {
    let ways = [
        Step::Fail(Code::Internal),
        Step::Fail(Code::Unavailable),
        Step::Fail(Code::ResourceExhausted),
        Step::Nonsense,
        Step::Token(u32::MAX),
        Step::Choice(0), // nothing more: the stream ends without a word
        Step::Hang,
    ];
    for way in ways {
        let cluster = Cluster::start(|config| config.limits.idle_timeout_ms = 100).await;
        let bad = cluster.worker(breaks_off(5, way)).await;
        let good = cluster.worker(answer_of).await;
        let (status, answer) = cluster.ask(CHAT, ask(json!({}))).await;
        assert_eq!((status, texts(&answer)), (200, vec![text(0)]));
        assert_eq!(answer["usage"]["completion_tokens"], ANSWER);
        let (first, second) = (&bad.requests()[0], &good.requests()[0]);
        assert_eq!(second.prompt.len(), first.prompt.len() + 5);
        assert_eq!(second.prompt[..first.prompt.len()], first.prompt);
        let (one, other) = (first.sampling.clone().unwrap(), second.sampling.clone().unwrap());
        assert_eq!((other.continued, other.seed, other.max_tokens), (5, one.seed, one.max_tokens));
        cluster.until("kvasir_router_move_seconds_count 1").await;
        cluster.until("kvasir_router_inflight 0").await;
    }
}

#[tokio::test]
async fn a_stream_goes_on_without_a_token_twice_or_skipped() {
    let cluster = Cluster::start(|_| {}).await;
    let gate = Arc::new(Semaphore::new(0));
    let mut dying = cluster.worker(breaks_off(3, Step::Wait(gate))).await;
    let good = cluster.worker(answer_of).await;
    let mut stream = cluster.post(CHAT, ask(json!({"stream": true}))).await.bytes_stream();
    let first = crate::text::demo().decode(&[token_at(SEED, 2)]);
    let mut seen = read_until(&mut stream, &serde_json::to_string(&first).unwrap()).await;
    dying.kill();
    seen += &read_until(&mut stream, "data: [DONE]\n\n").await;
    let said = |event: &String| -> Option<String> {
        let event: Value = serde_json::from_str(event).ok()?;
        Some(event["choices"][0]["delta"]["content"].as_str()?.to_owned())
    };
    assert_eq!(events(&seen).iter().filter_map(said).collect::<String>(), text(0));
    assert!(!seen.contains("error"), "{seen}");
    assert_eq!(good.requests().len(), 1);
}

#[tokio::test]
async fn of_several_choices_each_goes_on_with_its_own_seed_and_what_is_complete_is_not_asked_for_again() {
    let cluster = Cluster::start(|_| {}).await;
    // The first choice is complete, the second begun, the third not.
    let bad = cluster
        .worker(|request| {
            let whole = answer_of(request);
            let ends: Vec<_> = (0..whole.len()).filter(|&at| matches!(whole[at], Step::Finish(_))).collect();
            let mut steps = whole[..ends[0] + 5].to_vec();
            steps.push(Step::Fail(Code::Unavailable));
            steps
        })
        .await;
    let good = cluster.worker(answer_of).await;
    let (status, answer) = cluster.ask(CHAT, ask(json!({"n": 3}))).await;
    assert_eq!((status, texts(&answer)), (200, vec![text(0), text(1), text(2)]));
    assert_eq!(answer["usage"]["completion_tokens"], 3 * ANSWER);
    let mut asked: Vec<_> = good.requests().iter().map(|r| (r.choices, r.sampling.clone().unwrap())).collect();
    asked.sort_by_key(|(_, sampling)| std::cmp::Reverse(sampling.continued));
    let asked: Vec<_> = asked.into_iter().map(|(choices, s)| (choices, s.continued, s.seed)).collect();
    assert_eq!(asked, [(1, 3, choice_seed(SEED, 1)), (1, 0, choice_seed(SEED, 2))]);
    assert_eq!(bad.requests().len(), 1);
}

#[tokio::test]
async fn an_answer_that_was_complete_but_for_the_word_is_ended_without_asking_anybody() {
    let cluster = Cluster::start(|_| {}).await;
    let _bad = cluster.worker(breaks_off(5, Step::Fail(Code::Unavailable))).await;
    let good = cluster.worker(answer_of).await;
    let (status, answer) = cluster.ask(CHAT, ask(json!({"max_tokens": 5}))).await;
    assert_eq!((status, &answer["choices"][0]["finish_reason"]), (200, &json!("length")));
    let end = crate::text::demo().end_tokens().iter().next().unwrap().0;
    let bad = cluster.worker(move |_| vec![Step::Token(973), Step::Token(end), Step::Fail(Code::Unavailable)]).await;
    while bad.requests().is_empty() {
        let (status, answer) = cluster.ask(CHAT, ask(json!({}))).await;
        assert_eq!((status, &answer["choices"][0]["finish_reason"]), (200, &json!("stop")));
    }
    assert!(good.requests().iter().all(|request| request.sampling.as_ref().unwrap().continued == 0));
}

#[tokio::test]
async fn an_answer_waits_for_a_worker_if_there_is_none() {
    let cluster = Cluster::start(|_| {}).await;
    let gate = Arc::new(Semaphore::new(0));
    let mut dying = cluster.worker(breaks_off(4, Step::Wait(gate))).await;
    let answering = cluster.ask(CHAT, ask(json!({})));
    let replacing = async {
        eventually("the worker has it", async || !dying.requests().is_empty()).await;
        dying.kill();
        cluster.until("kvasir_router_upstream_errors_total{kind=\"broken\"} 1").await;
        cluster.worker(answer_of).await
    };
    let ((status, answer), good) = tokio::join!(answering, replacing);
    assert_eq!((status, texts(&answer), good.requests().len()), (200, vec![text(0)], 1));
}

#[tokio::test]
async fn other_weights_do_not_go_on_with_an_answer() {
    let cluster = Cluster::start(|config| config.retry.move_wait_ms = 200).await;
    let bad = cluster.worker(breaks_off(1, Step::Fail(Code::Unavailable))).await;
    let other = cluster.worker_as(|member| member.model.as_mut().unwrap().fingerprint.0[0] ^= 1, answer_of).await;
    let mut statuses = Vec::new();
    while bad.requests().is_empty() {
        statuses.push(cluster.ask(CHAT, ask(json!({}))).await.0);
    }
    assert_eq!(statuses.pop(), Some(503));
    assert!(statuses.iter().all(|status| *status == 200));
    assert!(other.requests().iter().all(|request| request.sampling.as_ref().unwrap().continued == 0));
}

#[tokio::test]
async fn moves_end_where_their_number_or_the_purse_does() {
    type Adjust = fn(&mut crate::Config);
    let adjusts: [(Adjust, usize); 3] = [
        (|config| config.retry.moves = 2, 3),
        (|config| config.retry.moves = 0, 1),
        (
            |config| {
                config.retry.burst = 1;
                config.retry.per_second = 0.0;
                config.retry.per_request = 0.0;
            },
            2,
        ),
    ];
    for (adjust, asked) in adjusts {
        let cluster = Cluster::start(adjust).await;
        let mocks = [
            cluster.worker(breaks_off(1, Step::Fail(Code::Internal))).await,
            cluster.worker(breaks_off(1, Step::Fail(Code::Internal))).await,
        ];
        let (status, answer) = cluster.ask(CHAT, ask(json!({}))).await;
        assert_eq!((status, &answer["error"]["code"]), (502, &json!("worker_failed")));
        assert_eq!(mocks.iter().map(|mock| mock.requests().len()).sum::<usize>(), asked);
    }
}

#[tokio::test]
async fn a_worker_that_accepts_and_never_answers_is_passed_over() {
    let cluster = Cluster::start(|config| config.limits.worker_silence_ms = 100).await;
    // Nobody accepts what comes in here, but the kernel does.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let registry = cluster.hub.registry();
    registry.register(cluster.member(Role::Decode, silent.local_addr().unwrap().to_string())).await.unwrap();
    cluster.until("kvasir_router_decode_workers 1").await;
    let good = cluster.worker(answer_of).await;
    for _ in 0..4 {
        let (status, answer) = cluster.ask(CHAT, ask(json!({}))).await;
        assert_eq!((status, texts(&answer)), (200, vec![text(0)]));
    }
    assert_eq!(good.requests().len(), 4);
}

#[tokio::test]
async fn one_that_gives_signs_of_life_is_waited_for_and_one_that_stops_giving_them_is_not() {
    let cluster = Cluster::start(|config| {
        config.limits.worker_silence_ms = 400;
        config.limits.idle_timeout_ms = 10;
    })
    .await;
    let gate = Arc::new(Semaphore::new(0));
    let script = gate.clone();
    let slow = cluster
        .worker(move |request| {
            // Both before the first token and after it.
            let mut steps = vec![Step::Beats];
            for step in answer_of(request) {
                steps.extend([Step::Wait(script.clone()), Step::Alive, step]);
            }
            steps
        })
        .await;
    let feeding = async {
        for _ in 0..ANSWER + 2 {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            gate.add_permits(1);
        }
    };
    let ((status, answer), ()) = tokio::join!(cluster.ask(CHAT, ask(json!({}))), feeding);
    assert_eq!((status, texts(&answer), slow.requests().len()), (200, vec![text(0)], 1));
    assert_eq!(slow.requests()[0].heartbeat_ms, 100);
    drop(slow);
    eventually("it has left", async || cluster.hub.registry().view().borrow().role(Role::Decode).count() == 0).await;

    let dumb = cluster.worker(|_| vec![Step::Beats, Step::Alive, Step::Hang]).await;
    let good = cluster.worker(answer_of).await;
    for _ in 0..2 {
        assert_eq!(cluster.ask(CHAT, ask(json!({}))).await.0, 200);
    }
    assert_eq!((dumb.requests().len(), good.requests().len()), (1, 2));
}
