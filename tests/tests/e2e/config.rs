//! Settings that change while services run: set by an operator, checked by a member, acted on by all; and what becomes of them
//! when etcd, a service or whoever writes there misbehaves.

use anyhow::{Context, Result, ensure};
use kvasir_cluster::{Document, EtcdConfig, Scope};
use kvasir_tests::{
    Client, Cluster, Service,
    wait::{self, SOON},
};
use kvasir_types::Role;
use serde_json::{Value, json};

use crate::{
    operate::{beside, refused, sha256, well},
    prompts::{QUESTION, chat, long},
};

/// What is put into etcd past the door: another version's form, and keys that this one would not run with.
fn unusable() -> [(Document, &'static str); 2] {
    let set = [("limits.max_output_tokens".to_owned(), json!("many")), ("colour".to_owned(), json!("red"))].into();
    [
        (Document { form: 2, ..Document::default() }, "written by another version"),
        (Document { set, ..Document::default() }, "colour: unknown field"),
    ]
}

/// Writes a document over whatever is there, as somebody with access to etcd may.
async fn put(cluster: &Cluster, scope: Scope, document: Document) -> Result<()> {
    let etcd = EtcdConfig { endpoints: vec![cluster.etcd_endpoint().to_owned()], ..EtcdConfig::default() };
    let (registry, _) = kvasir_cluster::connect_etcd(etcd).await?;
    let revision = registry.settings_of(&scope).await?.map_or(0, |found| found.revision());
    registry.set(&scope, &Document { revision, ..document }, &[]).await?;
    Ok(())
}

async fn json_of(cluster: &Cluster, arguments: &[&str]) -> Result<Value> {
    Ok(serde_json::from_str(&well(cluster, &[arguments, &["--output", "json"]].concat()).await?)?)
}

/// A key as a member runs with it: its value, and where from.
async fn key_of(cluster: &Cluster, member: &str, key: &str) -> Result<(Value, String)> {
    let running = json_of(cluster, &["config", "get", member, key]).await?;
    let entry = &running["keys"][0];
    ensure!(entry["key"] == key, "{running}");
    Ok((entry["value"].clone(), entry["from"].as_str().unwrap_or_default().to_owned()))
}

/// The status of a chat that may have so many tokens.
async fn status_of(cluster: &Cluster, router: usize, max_tokens: u32) -> Result<u16> {
    let mut body = chat(cluster.model(), QUESTION);
    body["max_tokens"] = max_tokens.into();
    let client = Client::new(cluster.node(Service::Router, router).http());
    Ok(client.post("/v1/chat/completions", &body).await?.status)
}

async fn says(cluster: &Cluster, router: usize, refused: f64) -> Result<()> {
    let node = cluster.node(Service::Router, router);
    wait::until("it says whether it uses what is set", SOON, async || {
        (node.metrics().await.ok()?.sum("kvasir_config_refused") == refused).then_some(())
    })
    .await
}

/// Has all keys that may be changed set to what they are, or another number: what is live can be set.
async fn every_live_key_can_be_set(cluster: &Cluster, service: Service) -> Result<()> {
    let node = cluster.node(service, 0);
    let (_, page) = node.admin_page("/config").await?;
    let page: Value = serde_json::from_str(&page)?;
    let entries = page["keys"].as_array().context("keys")?.iter().filter(|entry| entry["live"] == true);
    let (http, url) = (reqwest::Client::new(), format!("http://{}/config/check", node.admin()));
    let mut checked = 0;
    for entry in entries {
        let key = entry["key"].as_str().context("a key")?;
        let value = entry["value"].as_u64().map_or_else(|| entry["value"].clone(), |number| (number.max(1)).into());
        let reply = http.post(&url).json(&json!({ "set": { key: value } })).send().await?;
        let (status, text) = (reply.status().as_u16(), reply.text().await?);
        ensure!(status == 200, "{key}: HTTP {status} {text}");
        checked += 1;
    }
    ensure!(checked > 4, "{service:?} has {checked} live keys: {page}");
    Ok(())
}

#[tokio::test]
async fn what_an_operator_sets_counts_everywhere_and_what_nobody_checked_counts_nowhere() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = dir.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let token = file("alice", "alices-token\n")?;
    let tokens = file("tokens", &format!("alice {}\n", sha256("alices-token")?))?;
    let mut builder = Cluster::builder().routers(2);
    for service in [Service::Router, Service::Prefill, Service::Decode, Service::KvStore] {
        builder = builder.set(service, "operator.tokens_file", json!(tokens));
    }
    builder
        .run(async |cluster| {
            for warning in ["etcd", "registration not renewed", "can't be used", "watch", "lease"] {
                cluster.expect_warning(warning);
            }
            let signed = |words: &[&'static str]| -> Vec<String> {
                let mut words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
                words.extend(["--token-file".to_owned(), token.clone()]);
                words
            };
            let set = async |cluster: &Cluster, words: &[&'static str]| -> Result<String> {
                well(cluster, &signed(words).iter().map(String::as_str).collect::<Vec<_>>()).await
            };
            let not = async |cluster: &Cluster, words: &[&'static str], why: &str| -> Result<()> {
                let told = refused(cluster, &signed(words).iter().map(String::as_str).collect::<Vec<_>>()).await?;
                ensure!(told.contains(why), "{words:?}: {told}");
                Ok(())
            };
            checked_at_the_door(cluster, &not).await?;
            acted_on(cluster, &set).await?;
            two_at_once(cluster, &token).await?;
            kept_when_unusable(cluster, &set, &not).await?;
            shown_of_those_who_are_gone(cluster).await?;

            // etcd goes: nothing can be set, and all that was set counts.
            let admin = cluster.node(Service::Router, 0).admin().to_owned();
            cluster.etcd().kill();
            let lost = reqwest::Client::new()
                .post(format!("http://{admin}/config"))
                .bearer_auth("alices-token")
                .json(&json!({"set": {"limits.max_output_tokens": 9}}))
                .send()
                .await?;
            ensure!(lost.status().as_u16() == 503 && lost.text().await?.contains("etcd"), "not without etcd");
            for router in 0..2 {
                ensure!(status_of(cluster, router, 81).await? == 400 && status_of(cluster, router, 80).await? == 200);
            }
            cluster.etcd().restart().await?;
            let back = async || set(cluster, &["config", "set", "router", "limits.max_output_tokens=82"]).await.ok();
            wait::until("it can be set again", SOON, back).await?;
            for router in 0..2 {
                let acts = async || (status_of(cluster, router, 82).await.ok()? == 200).then_some(());
                wait::until("a router acts on it", SOON, acts).await?;
                ensure!(status_of(cluster, router, 83).await? == 400);
            }
            Ok(())
        })
        .await
}

/// Nothing that a service would not run with gets past it.
async fn checked_at_the_door(
    cluster: &Cluster,
    not: &impl AsyncFn(&Cluster, &[&'static str], &str) -> Result<()>,
) -> Result<()> {
    let none = refused(cluster, &["config", "set", "router", "limits.max_output_tokens=8"]).await?;
    ensure!(none.contains("KVASIR_TOKEN"), "{none}");
    for (pair, why) in [
        ("listen=127.0.0.1:1", "listen: is read at start only; set it in the file"),
        ("limits.max_output_token=8", "did you mean `limits.max_output_tokens`?"),
        ("max_output_tokens=8", "did you mean `limits.max_output_tokens`?"),
        ("limits.max_output_tokens=many", "limits.max_output_tokens: invalid type"),
        ("limits.max_output_tokens=0", "limits.max_output_tokens: must be at least 1"),
        ("limits={max_output_tokens: 8}", "one key at a time is set: "),
    ] {
        not(cluster, &["config", "set", "router", pair], why).await?;
    }
    not(cluster, &["config", "set", "nobody", "policy=random"], "nor a member's name").await?;
    ensure!(well(cluster, &["config", "get"]).await? == "nothing is set\n");
    for service in [Service::Router, Service::Decode, Service::Prefill, Service::KvStore] {
        every_live_key_can_be_set(cluster, service).await?;
    }
    ensure!(well(cluster, &["config", "history"]).await? == "nothing was changed\n", "checking changes nothing");
    Ok(())
}

/// What is set is acted on, by each kind of service.
async fn acted_on(cluster: &Cluster, set: &impl AsyncFn(&Cluster, &[&'static str]) -> Result<String>) -> Result<()> {
    let would = set(cluster, &["config", "set", "router", "limits.max_output_tokens=80", "--dry-run"]).await?;
    ensure!(would.contains("would be set to 80"), "{would}");
    ensure!(status_of(cluster, 0, 100).await? == 200, "it is not");
    let told = set(cluster, &["config", "set", "router", "limits.max_output_tokens=80", "planner.mode=off"]).await?;
    ensure!(told.contains("acting on it: router-0, router-1"), "{told}");
    for router in 0..2 {
        ensure!(status_of(cluster, router, 81).await? == 400 && status_of(cluster, router, 80).await? == 200);
        let (_, plans) = cluster.node(Service::Router, router).admin_page("/planner").await?;
        ensure!(plans.contains(r#""mode":"off""#), "{plans}");
    }
    let (value, from) = key_of(cluster, "router-1", "limits.max_output_tokens").await?;
    ensure!((value, from.as_str()) == (json!(80), "cluster"));
    ensure!(key_of(cluster, "router-1", "id").await? == (json!("router-1"), "file".to_owned()));
    ensure!(key_of(cluster, "decode-0", "operator.tokens_file").await?.1 == "file", "where a secret is, is none");

    // Policies are one thing, by whichever verb they are set.
    let policy = async |router: &str| Ok::<_, anyhow::Error>(key_of(cluster, router, "policy").await?);
    set(cluster, &["route", "policy", "random", "--router", "router-1"]).await?;
    ensure!(policy("router-1").await? == (json!("random"), "member".to_owned()));
    ensure!(policy("router-0").await?.1 == "default");
    set(cluster, &["route", "policy", "round-robin"]).await?;
    for router in ["router-0", "router-1"] {
        ensure!(policy(router).await? == (json!("round-robin"), "cluster".to_owned()), "{router}");
    }
    let shown = well(cluster, &["route", "policy"]).await?;
    ensure!(shown.matches("round-robin").count() >= 2, "{shown}");

    // A decode worker reads prompts itself that it had read before.
    let read = async || Ok::<_, anyhow::Error>(cluster.node(Service::Prefill, 0).status().await?.requests_total);
    let ask = async |words: usize| cluster.client().chat(&chat(cluster.model(), &long(words))).await;
    ask(100).await?;
    let before = read().await?;
    ensure!(before > 0, "a prefill worker is asked");
    set(cluster, &["config", "set", "decode-worker", "decode.local_prefill_tokens=100000"]).await?;
    ask(120).await?;
    ensure!(read().await? == before, "and not any more");
    set(cluster, &["config", "unset", "decode", "decode.local_prefill_tokens"]).await?;
    ask(140).await?;
    ensure!(read().await? > before, "and again");

    // What is logged: of one member only.
    set(cluster, &["config", "set", "decode-0", "log.filter=debug"]).await?;
    ask(40).await?;
    let debugs = |service| cluster.node(service, 0).process.log().contains(r#""level":"DEBUG""#);
    ensure!(debugs(Service::Decode) && !debugs(Service::Prefill));
    set(cluster, &["config", "set", "kv-store", "max_pinned_percent=0"]).await?;
    let (value, _) = key_of(cluster, "kv-store-0", "max_pinned_percent").await?;
    ensure!(value == 0);

    let diff = well(cluster, &["config", "diff", "decode-0"]).await?;
    ensure!(diff.contains("log.filter") && diff.contains("debug") && diff.contains("member"), "{diff}");
    let diff = json_of(cluster, &["config", "diff", "router-0", "router-1"]).await?;
    let keys: Vec<&str> = diff.as_array().into_iter().flatten().filter_map(|one| one["key"].as_str()).collect();
    ensure!(keys.contains(&"id") && !keys.contains(&"policy"), "{keys:?}");
    let history = json_of(cluster, &["config", "history"]).await?;
    let told = |key: &str, to: Value| {
        let mut all = history.as_array().into_iter().flatten();
        all.any(|change| {
            change["key"] == key
                && change["to"] == to
                && change["who"].as_str().is_some_and(|who| who.starts_with("alice from 127.0.0.1:"))
        })
    };
    ensure!(
        told("limits.max_output_tokens", json!(80)) && told("decode.local_prefill_tokens", Value::Null),
        "{history}"
    );
    let events = well(cluster, &["events", "--kind", "config,audit,policy"]).await?;
    ensure!(
        events.contains("limits.max_output_tokens is set to 80") && events.contains("set policy=round-robin"),
        "{events}"
    );
    ensure!(events.contains("chooses workers by round-robin") && events.contains("nobody known"), "{events}");
    Ok(())
}

/// What is set for a member stays when it goes, and is shown.
async fn shown_of_those_who_are_gone(cluster: &Cluster) -> Result<()> {
    let gone = Scope::one(Role::Router, "router-9".parse()?);
    let set = [("policy".to_owned(), json!("random"))].into();
    put(cluster, gone, Document { who: "bob".to_owned(), set, ..Document::default() }).await?;
    let shown = well(cluster, &["config", "get"]).await?;
    let line = shown.lines().find(|line| line.contains("router-9")).with_context(|| shown.clone())?;
    ensure!(line.starts_with("router/router-9 (gone)") && line.contains("random") && line.contains("bob"), "{shown}");
    ensure!(!shown.lines().any(|line| line.starts_with("router (gone)")), "a role is never gone: {shown}");
    let all = json_of(cluster, &["config", "get"]).await?;
    let gone: Vec<_> = all.as_array().into_iter().flatten().filter(|one| one["gone"] == true).collect();
    ensure!(gone.len() == 1 && gone[0]["scope"] == "router/router-9", "{all}");
    Ok(())
}

/// Of two operators who have seen the same, one is told.
async fn two_at_once(cluster: &Cluster, token: &str) -> Result<()> {
    let revision = json_of(cluster, &["config", "get", "router"]).await?["revision"].to_string();
    let try_to = async |pair: &str| {
        let words = ["config", "set", "router", pair, "--if-revision", &revision, "--token-file", token];
        beside(cluster, &words).await
    };
    let both = futures_util::future::join(try_to("retry.moves=5"), try_to("retry.moves=6")).await;
    let both = [both.0?, both.1?];
    ensure!(both.iter().filter(|done| done.0).count() == 1, "{both:?}");
    let late = both.iter().find(|done| !done.0).context("one of them")?;
    ensure!(late.2.contains("changed in the meantime by alice"), "{late:?}");
    Ok(())
}

/// What was put into etcd by hand is used by nobody; what was set last is, and by those who start, too.
async fn kept_when_unusable(
    cluster: &mut Cluster,
    set: &impl AsyncFn(&Cluster, &[&'static str]) -> Result<String>,
    not: &impl AsyncFn(&Cluster, &[&'static str], &str) -> Result<()>,
) -> Result<()> {
    for (document, why) in unusable() {
        let foreign = document.form != 1;
        put(cluster, Scope::all(Role::Router), document).await?;
        for router in 0..2 {
            says(cluster, router, 1.0).await?;
            ensure!(status_of(cluster, router, 81).await? == 400 && status_of(cluster, router, 80).await? == 200);
        }
        let shown = well(cluster, &["config", "get", "router-0"]).await?;
        ensure!(shown.contains("can't be used") && shown.contains(why), "{shown}");
        let noted = async || {
            let events = well(cluster, &["events", "--kind", "config"]).await.ok()?;
            (events.contains("keeps its last good configuration") && events.contains(why)).then_some(())
        };
        wait::until("it is in the cluster's history", SOON, noted).await?;
        // One that starts now has its own layers.
        cluster.node_mut(Service::Router, 1).process.kill();
        cluster.restart(Service::Router, 1).await?;
        says(cluster, 1, 1.0).await?;
        ensure!(status_of(cluster, 1, 81).await? == 200, "its own");
        if foreign {
            not(cluster, &["config", "set", "router", "limits.max_output_tokens=80"], "--replace").await?;
            set(cluster, &["config", "set", "router", "limits.max_output_tokens=80", "--replace"]).await?;
        } else {
            not(cluster, &["config", "set", "router", "limits.max_output_tokens=80"], "colour").await?;
            let mend = ["config", "set", "router", "limits.max_output_tokens=80"];
            let unset = ["config", "unset", "router", "colour", "limits.max_output_tokens"];
            set(cluster, &unset).await?;
            set(cluster, &mend).await?;
        }
        for router in 0..2 {
            says(cluster, router, 0.0).await?;
            ensure!(status_of(cluster, router, 81).await? == 400, "as it is set");
        }
    }
    // And one that starts when all is well begins with it.
    cluster.node_mut(Service::Router, 1).process.kill();
    cluster.restart(Service::Router, 1).await?;
    ensure!(status_of(cluster, 1, 81).await? == 400 && status_of(cluster, 1, 80).await? == 200);
    Ok(())
}
