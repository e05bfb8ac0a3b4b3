use std::{net::SocketAddr, sync::Mutex as StdMutex};

use axum::http::{HeaderMap, StatusCode};
use kvasir_cluster::MemoryHub;
use kvasir_rpc::operator::{Asked, Operators};
use kvasir_runtime::{LogConfig, ShutdownConfig};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::*;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Example {
    listen: String,
    size: u32,
    log: LogConfig,
    shutdown: ShutdownConfig,
}

impl Config for Example {
    const LIVE: &'static [(&'static str, &'static str)] = &[("size", "at once"), ("log.filter", "at once")];

    fn verify(&self) -> Result<(), String> {
        if self.size > 100 { Err("size: at most 100".to_owned()) } else { Ok(()) }
    }
}

type Record = Arc<StdMutex<Vec<String>>>;

struct Member {
    settings: Settings<Example>,
    page: Page,
    context: Context,
    record: Record,
    _running: JoinSet<()>,
}

async fn member(registry: &Arc<dyn Registry>, name: &str) -> Member {
    let context = Context::detached(name);
    let config = Example { size: 1, ..Example::default() };
    let settings = Settings::begin(config, Role::Router, &name.parse().unwrap(), registry, &context).await;
    let (page, record) = (Page::default(), Record::default());
    let told = record.clone();
    let desk = Desk::new(Operators::default(), move |asked: &Asked<'_>| {
        told.lock().unwrap().push(format!("{} {} {:?}", asked.on, asked.what, asked.result.is_ok()));
    });
    settings.open(&page, desk);
    let mut running = JoinSet::new();
    running.spawn(settings.clone().run());
    Member { settings, page, context, record, _running: running }
}

impl Member {
    async fn ask(&self, ask: Value) -> Result<Changed, Refusal> {
        let ask = serde_json::from_value(ask).unwrap();
        self.page.change(ask, &HeaderMap::new(), SocketAddr::from(([127, 0, 0, 1], 9))).await
    }

    async fn refused(&self, ask: Value) -> (u16, String) {
        let Refusal(status, why) = self.ask(ask).await.unwrap_err();
        (status.as_u16(), why)
    }

    async fn has(&self, size: u32) {
        let mut live = self.settings.live();
        let there = live.wait_for(|now| now.size == size);
        tokio::time::timeout(Duration::from_secs(20), there).await.expect("seen").unwrap();
    }

    fn says(&self, line: &str) -> bool {
        self.context.metrics.encode().contains(line)
    }
}

#[tokio::test]
async fn what_is_set_counts_for_all_of_a_role_and_what_is_set_for_one_counts_there() {
    let hub = MemoryHub::new();
    let registry = hub.registry();
    let (one, two) = (member(&registry, "r-1").await, member(&registry, "r-2").await);
    let done = one.ask(json!({"set": {"size": "7"}})).await.unwrap();
    assert_eq!((done.scope.as_str(), done.revision, done.changes.len()), ("router", 1, 1));
    assert_eq!(one.settings.now().size, 7, "whoever wrote it acts on it already");
    two.has(7).await;
    let only = json!({"scope": "router/r-2", "set": {"size": 9, "log.filter": "debug"}});
    assert_eq!(one.refused(only.clone()).await.0, 400, "that is for the other one to check");
    two.ask(only).await.unwrap();
    two.has(9).await;
    let again = one.ask(json!({"set": {"size": 8}})).await.unwrap();
    assert_eq!(again.exceptions, ["r-2"]);
    one.has(8).await;
    two.ask(json!({"scope": "router/r-2", "unset": ["size"]})).await.unwrap();
    two.has(8).await;
    assert_eq!(two.settings.now().log.filter, "debug");
    assert!(one.says("kvasir_config_refused 0") && !one.says("kvasir_config_revision 0"));

    // Who comes later, or again, begins with it.
    assert_eq!(member(&registry, "r-3").await.settings.now().size, 8);
    let nothing = one.ask(json!({"set": {"size": 8}})).await.unwrap();
    assert!(nothing.changes.is_empty() && nothing.revision == again.revision, "nothing is written for nothing");
    let events = registry.events("").await.unwrap();
    let told = |what: &str, on: &str| events.iter().any(|noted| noted.event.what == what && noted.event.on == on);
    assert!(told("size is set to 8 (before: 7)", "router") && told("size is set to nothing (before: 9)", "router/r-2"));
    assert_eq!(one.record.lock().unwrap()[0], "router set size=7 true");
    assert_eq!(registry.changes().await.unwrap().len(), 5);
}

#[tokio::test]
async fn what_can_not_be_set_is_refused_by_name_and_nothing_is_written() {
    let registry = MemoryHub::new().registry();
    let one = member(&registry, "r-1").await;
    for (ask, status, words) in [
        (json!({"set": {"listen": "x"}}), 400, "listen: is read at start only; set it in the file"),
        (json!({"set": {"siz": 3}}), 400, "did you mean `size`?"),
        (json!({"set": {"size": "large"}}), 400, "size: invalid type"),
        (json!({"set": {"size": 101}}), 400, "size: at most 100"),
        (json!({"set": {"log": {"filter": "debug"}}}), 400, "one key at a time is set: log.filter"),
        (json!({"unset": ["listen"]}), 400, "is read at start only"),
        (json!({"unset": ["sise"]}), 400, "did you mean `size`?"),
        (json!({}), 400, "1 to 64 keys"),
        (json!({"scope": "decode", "set": {"size": 1}}), 400, "this is router/r-1"),
        (json!({"scope": "nobody", "set": {"size": 1}}), 400, "scope: expected router"),
        (json!({"if_revision": 3, "set": {"size": 2}}), 409, "changed in the meantime"),
    ] {
        let refused = one.refused(ask.clone()).await;
        assert!(refused.0 == status && refused.1.contains(words), "{ask}: {refused:?}");
    }
    assert_eq!((one.settings.now().size, registry.changes().await.unwrap().len()), (1, 0));
    assert_eq!(one.record.lock().unwrap().len(), 11, "all of it is on record");
    // Two who have seen the same: the first is right.
    one.ask(json!({"if_revision": 0, "set": {"size": 2}})).await.unwrap();
    let late = one.refused(json!({"if_revision": 0, "set": {"size": 3}})).await;
    assert!(late.0 == 409 && late.1.contains("by somebody from 127.0.0.1:9"), "{late:?}");
    assert_eq!(one.settings.now().size, 2);
    let starting =
        Page::default().change(Ask::default(), &HeaderMap::new(), SocketAddr::from(([127, 0, 0, 1], 9))).await;
    assert_eq!(starting.unwrap_err().0, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_service_keeps_the_last_good_configuration_and_says_so_and_one_that_starts_has_its_own() {
    let registry = MemoryHub::new().registry();
    let one = member(&registry, "r-1").await;
    one.ask(json!({"set": {"size": 7}})).await.unwrap();
    // By another version, or by hand: past whoever would have checked it.
    let scope = Scope::all(Role::Router);
    let mut revision = registry.settings_of(&scope).await.unwrap().unwrap().revision();
    for (bad, words) in [(json!({"colour": "red"}), "colour: unknown field"), (json!({"size": 500}), "at most 100")] {
        let document = Document { revision, set: serde_json::from_value(bad).unwrap(), ..Document::default() };
        revision = registry.set(&scope, &document, &[]).await.unwrap();
        let mut events = Vec::new();
        for _ in 0..1000 {
            events = registry.events("").await.unwrap();
            if events.iter().any(|noted| noted.event.what.contains(words)) {
                break;
            }
            tokio::task::yield_now().await;
        }
        let told = events.iter().any(|noted| noted.event.kind == "config" && noted.event.what.contains(words));
        assert!(told, "{words}: {events:?}");
        assert_eq!(one.settings.now().size, 7, "the last good one");
        assert!(one.says("kvasir_config_refused 1"));
    }
    let late = member(&registry, "r-2").await;
    assert!(late.settings.now().size == 1 && late.says("kvasir_config_refused 1"), "its own");
    one.ask(json!({"set": {"size": 5}})).await.unwrap();
    one.has(5).await;
    late.has(5).await;
    assert!(one.says("kvasir_config_refused 0") && late.says("kvasir_config_refused 0"));
}
