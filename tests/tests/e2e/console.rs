//! The console of a router's admin port: a page by itself, and what it is told.

use anyhow::{Context, Result, ensure};
use kvasir_tests::{
    Cluster, Service,
    wait::{self, SOON},
    workspace,
};
use serde_json::Value;

use crate::prompts::{chat, long};

async fn state(cluster: &Cluster) -> Result<Value> {
    let (status, text) = cluster.node(Service::Router, 0).admin_page("/console/state").await?;
    ensure!(status == 200, "HTTP {status}: {text}");
    Ok(serde_json::from_str(&text)?)
}

#[tokio::test]
async fn the_console_is_one_page_and_shows_the_cluster() -> Result<()> {
    Cluster::builder()
        .prefill(2)
        .decode(2)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .run(async |cluster| {
            let router = cluster.node(Service::Router, 0);
            let (status, page) = router.admin_page("/console").await?;
            ensure!(status == 200 && page.contains("<title>Kvasir</title>"), "HTTP {status}");
            for elsewhere in ["https://", "//cdn", "src=", "@import"] {
                ensure!(!page.contains(elsewhere), "the page fetches something: {elsewhere}");
            }
            let headers = reqwest::get(format!("http://{}/console", router.admin())).await?.headers().clone();
            let policy = headers.get("content-security-policy").context("a policy")?.to_str()?;
            ensure!(policy.contains("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");

            cluster.client().chat(&chat(cluster.model(), &long(100))).await?;
            let told = wait::until("all workers have told, and what was done is in it", SOON, async || {
                let state = state(cluster).await.ok()?;
                let all = state["workers"].as_array()?;
                let told = |worker: &Value, what: &str| worker["told"][what].as_u64().unwrap_or_default();
                let sum = |what: &str| all.iter().map(|worker| told(worker, what)).sum::<u64>();
                let known = all.iter().all(|worker| told(worker, "total_blocks") > 0);
                (known && sum("sampled_tokens") > 0 && sum("prefilled_tokens") > 0).then_some(state)
            })
            .await?;
            let ids = |of: &str| -> Vec<String> {
                told[of]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|one| one["id"].as_str().unwrap_or_default().to_owned())
                    .collect()
            };
            ensure!(ids("workers") == ["decode-0", "decode-1", "prefill-0", "prefill-1"], "{told:#}");
            for id in ["router-0", "kv-store-0", "decode-1", "prefill-1"] {
                ensure!(ids("members").iter().any(|member| member == id), "{id}: {told:#}");
            }
            ensure!(told["router"] == "router-0" && told["policy"] == "kv-aware", "{told:#}");
            ensure!(told["wrong"] == Value::Array(Vec::new()), "{told:#}");
            the_way_of_a_request_is_shown(cluster).await
        })
        .await
}

/// As the page asks for it: which requests there were, then the way of one through router, decode and prefill worker.
async fn the_way_of_a_request_is_shown(cluster: &Cluster) -> Result<()> {
    let router = cluster.node(Service::Router, 0);
    // Not what somebody has read already.
    let body = chat(cluster.model(), &format!("From the end to the beginning. {}", long(120)));
    cluster.client().post_as("console-1", "/v1/chat/completions", &body).await?;
    let ask = async |page: &str| -> Result<Value> {
        let (status, text) = router.admin_page(page).await?;
        ensure!(status == 200, "{page}: HTTP {status}: {text}");
        Ok(serde_json::from_str(&text)?)
    };
    let listed = ask("/console/requests").await?;
    let latest = &listed["requests"][0];
    ensure!(latest["id"] == "console-1" && latest["over"] == true && latest["step"] == "answered", "{listed:#}");
    ensure!(latest["output_tokens"].as_f64() > Some(0.0) && latest["took_us"].as_u64() > Some(0), "{latest:#}");

    let told = wait::until("all three have told of its end", SOON, async || {
        let told = ask("/console/request?id=console-1").await.ok()?;
        let stories = told["stories"].as_array()?;
        (stories.len() == 3 && stories.iter().all(|story| story["over"] == true)).then_some(told)
    })
    .await?;
    ensure!(told["not_reached"] == Value::Array(Vec::new()), "{told:#}");
    let story = |part: &str| {
        let stories = told["stories"].as_array().into_iter().flatten();
        stories.into_iter().find(|story| story["part"] == part).with_context(|| format!("{part}: {told:#}"))
    };
    let (route, decode, prefill) = (story("router")?, story("decode")?, story("prefill")?);
    ensure!(route["member"] == "router-0", "{route:#}");
    ensure!((&decode["member"], &prefill["member"]) == (&latest["worker"], &latest["prefill"]), "{told:#}, {latest:#}");
    for (story, step) in [(route, "placed"), (decode, "prefill landed"), (prefill, "written")] {
        let steps = story["steps"].as_array().context("steps")?;
        ensure!(steps.iter().any(|told| told["step"] == step), "no {step:?}: {story:#}");
        let times: Vec<_> = steps.iter().map(|step| step["at_us"].as_u64()).collect();
        ensure!(times.is_sorted() && times.iter().all(Option::is_some), "{times:?}");
    }

    // Nobody of that name, no name, and one that would be more than a name.
    let nobody = ask("/console/request?id=nobody").await?;
    ensure!(nobody["stories"] == Value::Array(Vec::new()), "{nobody:#}");
    for odd in ["", "?id=", "?id=%3Cimg%20src=x%3E", "?id=a&more=1"] {
        let (status, text) = router.admin_page(&format!("/console/request{odd}")).await?;
        ensure!(status == 400, "{odd}: HTTP {status}: {text}");
    }
    Ok(())
}

#[test]
fn the_page_shows_what_it_is_told_as_text() -> Result<()> {
    let page = std::fs::read_to_string(workspace::root().join("services/router/src/http/console.html"))?;
    let makes_markup = [
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "createContextualFragment",
        "DOMParser",
        "setHTML",
        "eval(",
        "Function(",
        "srcdoc",
        "javascript:",
        ".href",
        "setAttribute(\"on",
    ];
    for way in makes_markup {
        ensure!(!page.contains(way), "the page makes markup, links or code of a text: {way}");
    }
    Ok(())
}

#[tokio::test]
async fn the_console_says_what_is_wrong() -> Result<()> {
    Cluster::builder()
        .decode(1)
        .run(async |cluster| {
            crate::moves::announce(cluster);
            cluster.node_mut(Service::Decode, 0).process.kill();
            wait::until("the console misses the decode worker", SOON, async || {
                let state = state(cluster).await.ok()?;
                let wrong = state["wrong"].as_array()?;
                wrong
                    .iter()
                    .any(|what| what.as_str().is_some_and(|what| what.contains("no decode worker")))
                    .then_some(())
            })
            .await?;
            cluster.restart(Service::Decode, 0).await
        })
        .await
}
