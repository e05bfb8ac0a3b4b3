//! Who gets in, whose blocks are whose, and whose turn it is.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Semaphore,
};
use tokio_rustls::{TlsConnector, rustls};

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

/// Makes a certificate for localhost and its key; what trusts it alone.
fn certificate(dir: &std::path::Path) -> TlsConnector {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(dir.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    std::fs::write(dir.join("cert.pem"), made.cert.pem()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut client = client.with_root_certificates(roots).with_no_client_auth();
    client.resumption = rustls::client::Resumption::disabled(); // so that it looks at the certificate each time
    Arc::new(client).into()
}

/// What a client that trusts so much hears on a fresh connection.
async fn healthy(trust: &TlsConnector, address: &str) -> std::io::Result<String> {
    let stream = TcpStream::connect(address).await?;
    let mut stream = trust.connect("localhost".try_into().unwrap(), stream).await?;
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn https_with_a_certificate_that_may_be_exchanged() {
    let dir = tempfile::tempdir().unwrap();
    let first = certificate(dir.path());
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let cluster = Cluster::start(|config| (config.tls.cert, config.tls.key) = (Some(cert), Some(key))).await;
    let address = cluster.base.trim_start_matches("http://").to_owned();
    assert!(healthy(&first, &address).await.unwrap().starts_with("HTTP/1.1 200"));
    // Whoever speaks plain HTTP is hung up on.
    assert!(cluster.client.get(format!("{}/health", cluster.base)).send().await.is_err());
    // One who begins a handshake and says no more keeps nobody else out.
    let mut mute = TcpStream::connect(&address).await.unwrap();
    mute.write_all(b"\x16\x03").await.unwrap();
    let second = certificate(dir.path());
    eventually("the new certificate is shown", async || healthy(&second, &address).await.is_ok()).await;
    assert!(healthy(&first, &address).await.is_err());
}

#[test]
fn a_certificate_without_its_key_is_told() {
    let dir = tempfile::tempdir().unwrap();
    certificate(dir.path());
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let told = |config: crate::TlsConfig| kvasir_runtime::chain(&super::super::acceptor(&config).err().unwrap());
    let half = crate::TlsConfig { cert: Some(cert.clone()), key: None };
    assert_eq!(told(half), "tls: `cert` and `key` belong together, and only one is set");
    let none = crate::TlsConfig { cert: Some(key.clone()), key: Some(key.clone()) };
    assert!(told(none).ends_with("holds no certificate"));
    let other = tempfile::tempdir().unwrap();
    certificate(other.path());
    let mixed = crate::TlsConfig { cert: Some(cert), key: Some(other.path().join("key.pem")) };
    assert!(told(mixed).starts_with("tls: the key is not the certificate's"));
}
