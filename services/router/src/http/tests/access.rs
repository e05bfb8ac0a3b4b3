//! Who gets in, whose blocks are whose, and whose turn it is.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::harness::*;
use crate::{KeyConfig, TenantConfig};

const CHAT: &str = "/v1/chat/completions";

/// The key `sk-NAME`, by its hash.
fn key(name: &str) -> KeyConfig {
    let digest = ring::digest::digest(&ring::digest::SHA256, format!("sk-{name}").as_bytes());
    let sha256 = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    KeyConfig { name: name.into(), sha256, ..KeyConfig::default() }
}

async fn ask_as(cluster: &Cluster, name: &str, fields: Value) -> reqwest::Response {
    let request = cluster.client.post(format!("{}{CHAT}", cluster.base)).bearer_auth(format!("sk-{name}"));
    request.json(&Cluster::chat(fields)).send().await.unwrap()
}

#[tokio::test]
async fn only_keys_that_are_known_open_the_door_and_probes_need_none() {
    let cluster = Cluster::start(|config| {
        config.access.keys = vec![key("good"), KeyConfig { models: vec!["other".into()], ..key("elsewhere") }];
    })
    .await;
    let _mock = cluster.worker(answer_of).await;
    let missing = cluster.post(CHAT, Cluster::chat(json!({}))).await;
    assert_eq!((missing.status().as_u16(), &missing.headers()["www-authenticate"]), (401, &"Bearer".parse().unwrap()));
    assert_eq!(missing.json::<Value>().await.unwrap()["error"]["code"], Value::Null);
    let bad = ask_as(&cluster, "bad", json!({})).await;
    assert_eq!(bad.status().as_u16(), 401);
    assert_eq!(bad.json::<Value>().await.unwrap()["error"]["code"], "invalid_api_key");
    assert_eq!(ask_as(&cluster, "good", json!({})).await.status().as_u16(), 200);
    // A model that one may not use is as good as none.
    let other = ask_as(&cluster, "elsewhere", json!({})).await;
    assert_eq!(other.status().as_u16(), 404);
    assert_eq!(other.json::<Value>().await.unwrap()["error"]["code"], "model_not_found");
    for (path, status) in [("/health", 200), ("/ready", 200), ("/v1/models", 401), ("/nothing", 401)] {
        assert_eq!(cluster.get(path).await.0, status, "{path}");
    }
    let listed = cluster.client.get(format!("{}/v1/models", cluster.base)).bearer_auth("sk-elsewhere");
    let listed: Value = listed.send().await.unwrap().json().await.unwrap();
    assert_eq!(listed["data"], json!([]));
    cluster.until("kvasir_router_turned_away_total{why=\"bad_key\"} 1").await;
}

#[tokio::test]
async fn keys_are_read_again_when_their_file_changes_and_a_mistake_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys.yaml");
    let write = |keys: &[KeyConfig]| {
        let new = dir.path().join("new");
        std::fs::write(&new, json!({"keys": keys}).to_string()).unwrap();
        std::fs::rename(new, &path).unwrap();
    };
    write(&[key("old")]);
    let file = path.clone();
    let cluster = Cluster::start(move |config| config.access.keys_file = Some(file)).await;
    let _mock = cluster.worker(answer_of).await;
    let status = async |name| ask_as(&cluster, name, json!({})).await.status().as_u16();
    assert_eq!((status("old").await, status("new").await), (200, 401));
    std::fs::write(&path, "keys: [{name: new, sha256: nonsense}]").unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(1_200)).await;
    assert_eq!(status("old").await, 200);
    write(&[key("new")]);
    eventually("the new key is known", async || status("new").await == 200).await;
    assert_eq!(status("old").await, 401);
}

#[tokio::test]
async fn limits_a_minute_are_told_and_kept() {
    let cluster = Cluster::start(|config| {
        let requests = KeyConfig { requests_per_minute: Some(2), ..key("requests") };
        let tokens = KeyConfig { tokens_per_minute: Some(20), ..key("tokens") };
        config.access.keys = vec![requests, tokens];
    })
    .await;
    let mock = cluster.worker(answer_of).await;
    for left in ["1", "0"] {
        let answer = ask_as(&cluster, "requests", json!({})).await;
        assert_eq!(answer.status().as_u16(), 200);
        assert_eq!(answer.headers()["x-ratelimit-remaining-requests"], left);
    }
    let refused = ask_as(&cluster, "requests", json!({})).await;
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (429, &"30".parse().unwrap()));
    let error = refused.json::<Value>().await.unwrap();
    assert_eq!((&error["error"]["type"], &error["error"]["code"]), (&json!("requests"), &json!("rate_limit_exceeded")));
    assert_eq!(mock.requests().len(), 2);

    // 14 tokens of prompt, 12 of answer: the next one waits for what was overdrawn.
    assert_eq!(ask_as(&cluster, "tokens", json!({})).await.status().as_u16(), 200);
    let refused = ask_as(&cluster, "tokens", json!({})).await;
    assert_eq!(refused.status().as_u16(), 429);
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["type"], "tokens");
    cluster.until("kvasir_router_not_let_in_total{why=\"rate\"} 2").await;
}

#[tokio::test]
async fn workers_hear_whose_a_request_is_and_tenants_salts_differ() {
    let cluster = Cluster::start(|config| {
        let second = KeyConfig { tenant: Some("one".into()), ..key("second") };
        config.access.keys = vec![key("one"), key("two"), second];
    })
    .await;
    let mock = cluster.worker(answer_of).await;
    for name in ["one", "two", "second"] {
        ask_as(&cluster, name, json!({})).await;
    }
    let seen: Vec<_> = mock.requests().into_iter().map(|request| (request.tenant, request.cache_salt)).collect();
    assert_eq!(seen.iter().map(|(tenant, _)| tenant.as_str()).collect::<Vec<_>>(), ["one", "two", "one"]);
    assert!(seen[0].1 == seen[2].1 && seen[0].1 != seen[1].1 && !seen[0].1.is_empty());
}

#[tokio::test]
async fn a_tenant_with_many_requests_does_not_keep_another_waiting() {
    let cluster = Cluster::start(|config| {
        config.access.keys = vec![key("many"), key("few")];
        let heavy = TenantConfig {
            name: "few".into(),
            weight: 1,
            requests_per_minute: None,
            tokens_per_minute: None,
            cache_salt: None,
        };
        config.access.tenants = vec![heavy];
        config.admission.per_worker = 1;
    })
    .await;
    let gate = Arc::new(Semaphore::new(0));
    let script = gate.clone();
    let mock = cluster.worker(move |request| [vec![Step::Wait(script.clone())], answer_of(request)].concat()).await;
    let cluster = Arc::new(cluster);
    let ask = |name: &'static str| {
        let cluster = Arc::clone(&cluster);
        tokio::task::spawn_local(async move { ask_as(&cluster, name, json!({})).await.status().as_u16() })
    };
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async {
            let mut all = vec![ask("many")];
            eventually("the worker has it", async || mock.requests().len() == 1).await;
            all.extend((0..5).map(|_| ask("many")));
            cluster.until("kvasir_router_waiting{model=\"demo\"} 5").await;
            all.push(ask("few"));
            cluster.until("kvasir_router_waiting{model=\"demo\"} 6").await;
            gate.add_permits(7);
            for answer in all {
                assert_eq!(answer.await.unwrap(), 200);
            }
        })
        .await;
    let order: Vec<_> = mock.requests().into_iter().map(|request| request.tenant).collect();
    assert_eq!(order[0], "many");
    assert!(order[1..3].contains(&"few".to_owned()), "{order:?}");
}

#[tokio::test]
async fn what_would_wait_too_long_is_refused_with_a_time_to_come_back() {
    let cluster = Cluster::start(|config| {
        config.admission.per_worker = 1;
        config.admission.max_waiting = 1;
        config.admission.max_wait_ms = 300;
    })
    .await;
    let mock = cluster.worker(|_| vec![Step::Token(973), Step::Hang]).await;
    let mut inside = cluster.post(CHAT, Cluster::chat(json!({"stream": true}))).await.bytes_stream();
    read_until(&mut inside, " prefix").await;
    let late = cluster.post(CHAT, Cluster::chat(json!({}))).await;
    assert_eq!(late.status().as_u16(), 503);
    assert!(late.headers().contains_key("retry-after"));
    assert_eq!(late.json::<Value>().await.unwrap()["error"]["code"], "overloaded");
    let (waiting, full) = tokio::join!(cluster.ask(CHAT, Cluster::chat(json!({}))), async {
        cluster.until("kvasir_router_waiting{model=\"demo\"} 1").await;
        cluster.ask(CHAT, Cluster::chat(json!({}))).await
    });
    assert_eq!((waiting.0, full.0), (503, 429));
    assert_eq!(mock.requests().len(), 1);
    drop(inside);
    cluster.until("kvasir_router_placed{model=\"demo\"} 0").await;
}
