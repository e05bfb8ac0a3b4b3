//! etcd fails in every way it can; requests must not notice, members must come back by themselves.

use std::time::{Duration, Instant};

use kvasir_cluster::{Document, Error, EtcdConfig, EtcdTls, Event, EventKind, Found, Scope, changed};
use rustix::process::Signal;

use crate::{
    etcd::Etcd,
    given::{Process, member, until},
};

const A: &str = "/kvasir/v1/members/decode/a";

async fn join(etcd: &Etcd, id: &str, incarnation: u64) -> Process {
    let process = Process::with_etcd(etcd.config()).await.unwrap();
    process.registry.register(member(id, incarnation)).await.unwrap();
    process
}

#[tokio::test]
async fn an_unreachable_etcd_is_told_within_the_limit_with_its_address() {
    let config = EtcdConfig { connect_timeout_ms: 600, ..closed_port() };
    let before = Instant::now();
    let error = Process::with_etcd(config.clone()).await.map(|_| ()).unwrap_err();
    assert!(before.elapsed() < Duration::from_secs(3), "{:?}", before.elapsed());
    assert!(matches!(&error, Error::Unreachable { .. }) && error.to_string().contains(&config.endpoints[0]), "{error}");
}

#[tokio::test]
async fn a_silent_etcd_is_told_within_the_limit() {
    // Accepts connections (the kernel does) and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoints = vec![silent.local_addr().unwrap().to_string()];
    let config = EtcdConfig { connect_timeout_ms: 500, endpoints, ..EtcdConfig::default() };
    let before = Instant::now();
    assert!(matches!(Process::with_etcd(config).await, Err(Error::Unreachable { .. })));
    assert!(before.elapsed() < Duration::from_secs(3), "{:?}", before.elapsed());
}

#[tokio::test]
async fn settings_that_cannot_be_used_are_named_by_their_key() {
    let fine = EtcdConfig::default();
    for (config, key) in [
        (EtcdConfig { endpoints: vec![], ..fine.clone() }, "registry.etcd.endpoints"),
        (EtcdConfig { endpoints: vec!["no such host".into()], ..fine.clone() }, "registry.etcd.endpoints"),
        (EtcdConfig { endpoints: vec!["https://a:1".into()], ..fine.clone() }, "registry.etcd.endpoints"),
        (EtcdConfig { tls: tls("/none"), ..fine.clone() }, "registry.etcd.tls.authority"),
        (EtcdConfig { username: Some("a".into()), ..fine.clone() }, "registry.etcd.username"),
        (EtcdConfig { prefix: "kvasir".into(), ..fine.clone() }, "registry.etcd.prefix"),
        (EtcdConfig { lease_ttl_s: 0, ..fine.clone() }, "registry.etcd.lease_ttl_s"),
        (EtcdConfig { max_events: 100_001, ..fine.clone() }, "registry.etcd.max_events"),
        (EtcdConfig { events_ttl_s: 59, ..fine.clone() }, "registry.etcd.events_ttl_s"),
        (EtcdConfig { request_timeout_ms: 0, ..fine }, "request_timeout_ms"),
    ] {
        let error = Process::with_etcd(config).await.map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Config { .. }) && error.to_string().contains(key), "{error}");
    }
}

#[tokio::test]
async fn the_history_keeps_the_newest_events_and_counts_those_that_etcd_was_not_there_for() {
    let mut etcd = Etcd::start().await;
    let process = Process::with_etcd(EtcdConfig { max_events: 10, ..etcd.config() }).await.unwrap();
    let me = "a".parse().unwrap();
    let note = |number: u64| {
        let event = Event::now(EventKind::Member, &me, "b", format!("{number}"));
        process.registry.note(Event { at_ms: number, ..event });
    };
    (0..100).for_each(note);
    let mut seen = Vec::new();
    until("all are written", async || {
        seen = process.registry.events("").await.unwrap();
        seen.last().is_some_and(|last| last.event.what == "99")
    })
    .await;
    assert!((10..=10 + 32).contains(&seen.len()), "{} events", seen.len());
    assert_eq!(seen.first().unwrap().event.at_ms, 100 - seen.len() as u64, "the oldest went");

    etcd.kill();
    note(100);
    until("it is given up", async || process.registry.events_lost() == 1).await;
    assert!(etcd.restart().await);
    note(101);
    until("and the next one is there", async || {
        let events = process.registry.events("").await;
        events.is_ok_and(|events| events.last().is_some_and(|last| last.event.what == "101"))
    })
    .await;

    (0..1_000).for_each(note);
    assert!(process.registry.events_lost() > 500, "more than a queue holds is dropped, not waited for");
}

#[tokio::test]
async fn settings_stay_while_etcd_is_away_and_what_was_changed_by_then_is_seen_after_a_compaction() {
    let mut etcd = Etcd::start().await;
    let process = Process::with_etcd(etcd.config()).await.unwrap();
    let scope = Scope::all(kvasir_types::Role::Router);
    let mut seen = process.registry.settings();
    let set = async |value: u64| {
        let before = match process.registry.settings_of(&scope).await.unwrap() {
            Some(Found::Document(document)) => document,
            _ => Document::default(),
        };
        let (document, changes) = changed(&before, &scope, "alice", [("a".to_owned(), Some(value.into()))]);
        process.registry.set(&scope, &document, &changes).await.unwrap();
    };
    let mut sees = async |value: u64| {
        let there = seen.wait_for(|settings| {
            let found = settings.as_ref().and_then(|settings| settings.documents.get(&scope));
            matches!(found, Some(Found::Document(document)) if document.set["a"] == value)
        });
        tokio::time::timeout(crate::given::LIMIT, there).await.expect("seen").unwrap();
    };
    set(1).await;
    sees(1).await;
    etcd.kill();
    let (document, changes) = changed(&Document::default(), &scope, "bob", [("a".to_owned(), Some(9.into()))]);
    let refused = process.registry.set(&scope, &document, &changes).await.unwrap_err();
    assert!(matches!(refused, Error::Unreachable { .. }), "{refused}");
    assert!(matches!(process.registry.changes().await, Err(Error::Unreachable { .. })));
    sees(1).await;
    assert!(etcd.restart().await);
    // Changed and compacted before it can watch again: the history that it stood at is gone.
    let key = "/kvasir/v1/config/router";
    let mut raw = etcd.raw().await;
    let put = raw.put(key, r#"{"form": 1, "set": {"a": 2}}"#, None).await.unwrap();
    raw.compact(put.header().unwrap().revision(), None).await.unwrap();
    sees(2).await;
    // Rubbish stands where it stands, with its reason, and can be written over.
    raw.put(key, "{", None).await.unwrap();
    let mut settings = process.registry.settings();
    let unusable = settings.wait_for(|settings| {
        let found = settings.as_ref().and_then(|settings| settings.documents.get(&scope));
        matches!(found, Some(Found::Unusable { .. }))
    });
    tokio::time::timeout(crate::given::LIMIT, unusable).await.expect("seen").unwrap();
    let revision = process.registry.settings_of(&scope).await.unwrap().unwrap().revision();
    let document = Document { revision, ..document };
    process.registry.set(&scope, &document, &changes).await.unwrap();
    sees(9).await;
}

#[tokio::test]
async fn one_dead_endpoint_of_several_does_not_matter() {
    let etcd = Etcd::start().await;
    let mut config = etcd.config();
    config.endpoints.insert(0, closed_port().endpoints.remove(0));
    let process = Process::with_etcd(config).await.unwrap();
    process.registry.register(member("a", 1)).await.unwrap();
    process.sees(&["a"]).await;
}

#[tokio::test]
async fn while_etcd_is_away_the_view_stays_and_when_it_is_back_everybody_is_there() {
    let mut etcd = Etcd::start().await;
    let (mut one, two) = (join(&etcd, "a", 1).await, join(&etcd, "b", 2).await);
    one.sees(&["a", "b"]).await;
    etcd.kill();
    // Longer than any lease. (A sleep, because nothing must happen.)
    tokio::time::sleep(Duration::from_millis(3_500)).await;
    assert_eq!((one.ids(), two.ids()), (vec!["a".into(), "b".into()], vec!["a".into(), "b".into()]));
    assert!(one.runs());
    assert!(etcd.restart().await);
    let late = Process::with_etcd(etcd.config()).await.unwrap();
    late.sees(&["a", "b"]).await;
    let before = one.view().epoch;
    // And changes are seen again, in both directions.
    one.registry.deregister(&"a".parse().unwrap(), kvasir_types::Role::Decode).await.unwrap();
    two.sees(&["b"]).await;
    late.sees(&["b"]).await;
    assert!(two.view().epoch > before);
    until("all know the same", async || two.view().epoch == late.view().epoch).await;
}

#[tokio::test]
async fn an_etcd_that_comes_back_empty_gets_its_members_again_and_nobody_sees_them_missing() {
    let mut etcd = Etcd::start().await;
    // Time enough to come back on a busy machine.
    let config = EtcdConfig { lease_ttl_s: 8, ..etcd.config() };
    let one = Process::with_etcd(config.clone()).await.unwrap();
    let two = Process::with_etcd(config).await.unwrap();
    one.registry.register(member("a", 1)).await.unwrap();
    two.registry.register(member("b", 2)).await.unwrap();
    one.sees(&["a", "b"]).await;
    // Some history, so that the new etcd's revisions are smaller than the old one's.
    for _ in 0..20 {
        etcd.raw().await.put("/other", "x", None).await.unwrap();
    }
    // Another change of the members, so that the epoch is past what the new etcd begins with.
    let mut changed = member("a", 1);
    changed.draining = true;
    one.registry.update(changed.clone()).await.unwrap();
    let mut views = one.registry.view();
    tokio::time::timeout(crate::given::LIMIT, views.wait_for(|view| view.members[0].draining)).await.unwrap().unwrap();
    let epoch = one.view().epoch;
    views.mark_unchanged();
    etcd.kill();
    etcd.wipe();
    assert!(etcd.restart().await);
    let late = Process::with_etcd(etcd.config()).await.unwrap();
    late.sees(&["a", "b"]).await;
    assert_eq!(one.ids(), ["a", "b"]);
    assert!(!views.has_changed().unwrap(), "a member was missing for a while");
    assert!(late.view().epoch < epoch, "the new etcd's history is shorter: {} {epoch}", late.view().epoch);
    drop(two);
    one.sees(&["a"]).await;
    assert_eq!(one.view().epoch, epoch, "it does not go back");
}

#[tokio::test]
async fn a_process_whose_port_refuses_is_gone_and_its_name_is_free_at_once() {
    let etcd = Etcd::start().await;
    // Its lease lasts longer than this test may.
    let config = EtcdConfig { lease_ttl_s: 600, ..etcd.config() };
    let killed = Process::with_etcd(config).await.unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut record = member("a", 1);
    record.grpc = port.local_addr().unwrap().to_string();
    killed.registry.register(record).await.unwrap();
    drop((killed, port));
    let next = join(&etcd, "a", 2).await;
    // The view may show the old life for a moment more.
    let mut views = next.registry.view();
    let taken = views.wait_for(|view| view.members == [member("a", 2)]);
    tokio::time::timeout(crate::given::LIMIT, taken).await.expect("the name is free").unwrap();
}

#[tokio::test]
async fn a_stopped_etcd_blocks_no_reader_and_every_call_ends() {
    let etcd = Etcd::start().await;
    let (one, two) = (join(&etcd, "a", 1).await, join(&etcd, "b", 2).await);
    one.sees(&["a", "b"]).await;
    etcd.signal(Signal::STOP);
    let before = Instant::now();
    assert_eq!(one.ids(), ["a", "b"]);
    assert!(before.elapsed() < Duration::from_millis(100));
    let mut changed = member("a", 1);
    changed.draining = true;
    one.registry.update(changed).await.unwrap(); // published when etcd goes on
    assert!(matches!(one.registry.register(member("c", 3)).await, Err(Error::Unreachable { .. })));
    let gone = two.registry.deregister(&"b".parse().unwrap(), kvasir_types::Role::Decode).await;
    assert!(matches!(gone, Err(Error::Unreachable { .. })));
    assert!(before.elapsed() < Duration::from_secs(10), "{:?}", before.elapsed());
    assert_eq!(one.ids(), ["a", "b"]);
    etcd.signal(Signal::CONT);
    two.sees(&["a"]).await; // b's lease was not renewed any more
    let mut view = two.registry.view();
    let draining = view.wait_for(|view| view.members.iter().all(|member| member.draining));
    tokio::time::timeout(crate::given::LIMIT, draining).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_lease_or_a_key_that_an_operator_removed_is_there_again() {
    let etcd = Etcd::start().await;
    let one = join(&etcd, "a", 1).await;
    let mut raw = etcd.raw().await;
    one.sees(&["a"]).await;
    let lease = raw.get(A, None).await.unwrap().kvs()[0].lease();
    raw.lease_revoke(lease).await.unwrap();
    let mut seen = 0;
    until("registered under a new lease", async || {
        seen = raw.get(A, None).await.unwrap().kvs().first().map_or(0, etcd_client::KeyValue::lease);
        seen != 0 && seen != lease
    })
    .await;
    raw.delete(A, None).await.unwrap();
    until("registered again", async || raw.get(A, None).await.unwrap().count() == 1).await;
    one.sees(&["a"]).await;
}

#[tokio::test]
async fn a_compacted_history_is_read_anew() {
    let mut etcd = Etcd::start().await;
    let one = join(&etcd, "a", 1).await;
    // A registry whose future has not run yet stands at an old revision …
    let (late, run) = kvasir_cluster::connect_etcd(etcd.config()).await.unwrap();
    let mut raw = etcd.raw().await;
    let mut revision = 0;
    for _ in 0..10 {
        revision = raw.put("/other", "x", None).await.unwrap().header().unwrap().revision();
    }
    one.registry.register(member("b", 2)).await.unwrap();
    raw.compact(revision, None).await.unwrap();
    // … that is gone when it starts.
    let mut running = tokio::task::JoinSet::new();
    running.spawn(run);
    let mut view = late.view();
    let seen = view.wait_for(|view| view.members.len() == 2);
    tokio::time::timeout(crate::given::LIMIT, seen).await.unwrap().unwrap();
    etcd.kill();
}

#[tokio::test]
async fn records_that_are_none_are_skipped() {
    let etcd = Etcd::start().await;
    let one = join(&etcd, "a", 1).await;
    let mut raw = etcd.raw().await;
    let good = serde_json::to_string(&member("x", 9)).unwrap();
    for (key, record) in [
        ("decode/b", "{"),
        ("decode/c", &*"x".repeat(100_000)),
        ("decode/d", &*good), // x's record under d's key
        ("decode", "null"),
        ("decode/x/y", &*good),
        ("gpu-farm/e", r#"{"id":"e","incarnation":1,"role":"gpu-farm","protocol":7}"#),
    ] {
        raw.put(format!("/kvasir/v1/members/{key}"), record, None).await.unwrap();
    }
    raw.put("/kvasir/v1/members/decode/x", good, None).await.unwrap();
    one.sees(&["a", "x"]).await;
    Process::with_etcd(etcd.config()).await.unwrap().sees(&["a", "x"]).await;
}

#[tokio::test]
async fn a_name_that_was_lost_to_another_process_is_not_taken_back() {
    let etcd = Etcd::start().await;
    let one = join(&etcd, "a", 1).await;
    let mut raw = etcd.raw().await;
    let lease = raw.get(A, None).await.unwrap().kvs()[0].lease();
    // As it is for a process that was stopped for longer than its lease: gone, and the name is somebody else's.
    raw.put(A, serde_json::to_string(&member("a", 2)).unwrap(), None).await.unwrap();
    raw.lease_revoke(lease).await.unwrap();
    let mut view = one.registry.view();
    let seen = view.wait_for(|view| view.members == [member("a", 2)]);
    tokio::time::timeout(crate::given::LIMIT, seen).await.unwrap().unwrap();
    // Several rounds of keep-alive. (A sleep, because nothing must happen.)
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert_eq!(one.view().members, [member("a", 2)]);
    // And when the other one goes, the name is ours again.
    raw.delete(A, None).await.unwrap();
    let seen = view.wait_for(|view| view.members == [member("a", 1)]);
    tokio::time::timeout(crate::given::LIMIT, seen).await.unwrap().unwrap();
}

fn tls(authority: &str) -> Option<EtcdTls> {
    Some(EtcdTls { authority: authority.into(), certificate: None, key: None, server_name: None })
}

fn closed_port() -> EtcdConfig {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    EtcdConfig { endpoints: vec![format!("127.0.0.1:{port}")], ..EtcdConfig::default() }
}
