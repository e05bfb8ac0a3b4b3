//! What an operator does to a running cluster, and what is seen of it afterwards.

use std::{io::BufRead, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, future, stream};
use kvasir_proto::v1::{
    Lifecycle, SetDutyRequest, SetStageRequest, SetStageResponse, Stage, worker_client::WorkerClient,
};
use kvasir_tests::{
    Cluster, Node, Service,
    wait::{self, SOON},
    workspace,
};
use kvasir_types::PROTOCOL_VERSION;
use serde_json::{Value, json};

use crate::{
    ctl::ctl,
    load::Load,
    prompts::{chat, streamed},
};

const CHAT: &str = "/v1/chat/completions";
const STREAMS: usize = 16;

/// What `kvasirctl` prints and says, while the test goes on; whether it ended well.
pub(crate) async fn beside(cluster: &Cluster, arguments: &[&str]) -> Result<(bool, String, String)> {
    let mut command = Command::new(workspace::binary("kvasirctl")?);
    command.args(["--etcd", cluster.etcd_endpoint()]).args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.success(), text(&output.stdout), text(&output.stderr)))
}

pub(crate) async fn well(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    let (well, out, err) = beside(cluster, arguments).await?;
    ensure!(well, "kvasirctl {arguments:?}: {out}{err}");
    Ok(out)
}

pub(crate) async fn refused(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    let (well, out, err) = beside(cluster, arguments).await?;
    ensure!(!well, "kvasirctl {arguments:?} should be refused: {out}{err}");
    Ok(err)
}

async fn lifecycle(node: &Node) -> Result<Lifecycle> {
    node.status().await?.lifecycle.context("a lifecycle")
}

async fn at_stage(node: &Node, stage: Stage) -> Result<()> {
    let what = format!("{} is {}", node.id(), stage.as_str_name());
    wait::until(&what, SOON, async || (lifecycle(node).await.ok()?.stage() == stage).then_some(())).await
}

async fn set(node: &Node, stage: Stage, deadline_ms: Option<u64>) -> Result<SetStageResponse, tonic::Status> {
    let connected = WorkerClient::connect(format!("http://{}", node.grpc())).await;
    let mut client = connected.map_err(|error| tonic::Status::internal(error.to_string()))?;
    let request = SetStageRequest {
        protocol_version: PROTOCOL_VERSION,
        incarnation: 0,
        stage: stage.into(),
        deadline_ms,
        reason: "a test".into(),
    };
    Ok(client.set_stage(request).await?.into_inner())
}

/// Who writes answers now.
async fn writers(cluster: &Cluster, requests: usize) -> Result<Vec<String>> {
    let (client, model) = (cluster.client(), cluster.model());
    let mut writers = Vec::new();
    for number in 0..requests {
        let (_, route) = client.explained(CHAT, &chat(model, &format!("{number} times"))).await?;
        writers.extend(route["decode"].as_str().map(str::to_owned));
    }
    writers.sort();
    writers.dedup();
    Ok(writers)
}

#[tokio::test]
async fn drains_under_load_lose_no_answer_and_end_in_drained() -> Result<()> {
    Cluster::builder()
        .prefill(2)
        .decode(2)
        .kv_store(1)
        .set(Service::Decode, "decode.local_prefill_tokens", 16)
        .run(async |cluster| {
            let load = Load::new(cluster, STREAMS)?;
            let cluster = &*cluster;
            let more = async || load.more("the load goes on", 2 * STREAMS).await;
            load.run(async {
                more().await?;
                for worker in ["decode-1", "prefill-0"] {
                    let (ended, _, progress) = {
                        let (drained, more) =
                            future::join(beside(cluster, &["workers", "drain", worker]), more()).await;
                        more?;
                        drained?
                    };
                    ensure!(ended && progress.contains("drained, safe to delete"), "{progress}");
                    more().await?;
                    let shown = well(cluster, &["workers", "show", worker]).await?;
                    ensure!(shown.contains("drained, safe to delete"), "{shown}");
                    well(cluster, &["workers", "undrain", worker]).await?;
                    more().await?;
                }
                Ok(())
            })
            .await?;
            for (service, index) in [(Service::Decode, 1), (Service::Prefill, 0)] {
                let now = lifecycle(cluster.node(service, index)).await?;
                ensure!(now.stage() == Stage::Serving && now.blocks_lost == 0, "{now:?}");
            }
            let router = cluster.node(Service::Router, 0).metrics().await?;
            let errors = router.sum("kvasir_router_upstream_errors_total");
            let leaves = router.sum_where("kvasir_router_upstream_errors_total", &[("kind", "leaving")]);
            ensure!(errors == leaves, "{errors} errors, {leaves} of them leaves in good order");
            // The usual policy may well prefer one of two that are idle.
            well(cluster, &["route", "policy", "round-robin"]).await?;
            ensure!(writers(cluster, 12).await?.len() == 2, "it is used again");
            Ok(())
        })
        .await
}

/// A long answer.
fn long_answer(model: &str, number: usize) -> Value {
    let mut body = streamed(model, &format!("{number}?"));
    body["max_tokens"] = 300.into();
    body["ignore_eos"] = true.into();
    body["temperature"] = 1.0.into();
    body["seed"] = number.into();
    body
}

#[tokio::test]
async fn at_the_deadline_answers_go_on_elsewhere_with_the_tokens_that_would_have_come() -> Result<()> {
    const ANSWERS: usize = 48;
    Cluster::builder()
        .decode(2)
        .kv_store(0)
        .worker("engine.threads", 1)
        .run(async |cluster| {
            let (cluster, client) = (&*cluster, cluster.client());
            let all = async || {
                let ask = async |number: usize| {
                    let body = long_answer(cluster.model(), number);
                    let chunks = client.stream(CHAT, &body).await?.chunks().await?;
                    anyhow::Ok(kvasir_tests::openai::text_of(&chunks))
                };
                stream::iter(0..ANSWERS).map(ask).buffered(ANSWERS).collect::<Vec<_>>().await
            };
            let undisturbed = all().await.into_iter().collect::<Result<Vec<_>>>()?;
            let drained = async {
                let busy = cluster.node(Service::Decode, 0);
                wait::until("it writes", SOON, async || (lifecycle(busy).await.ok()?.requests_left >= 8).then_some(()))
                    .await?;
                set(busy, Stage::Drained, Some(0)).await?;
                at_stage(busy, Stage::Drained).await
            };
            let (answers, drained) = future::join(all(), drained).await;
            drained?;
            let answers = answers.into_iter().collect::<Result<Vec<_>>>()?;
            ensure!(answers == undisturbed, "answers differ");
            let now = lifecycle(cluster.node(Service::Decode, 0)).await?;
            ensure!(now.moved > 0 && now.requests_left == 0, "were the answers too short? {now:?}");
            let moves = cluster.node(Service::Router, 0).metrics().await?.sum("kvasir_router_move_seconds_count");
            ensure!(moves > 0.0, "the router moved them");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn cordoned_workers_are_passed_by_and_the_last_one_needs_force() -> Result<()> {
    Cluster::builder()
        .decode(2)
        .kv_store(1)
        .run(async |cluster| {
            let cluster = &*cluster;
            let told = well(cluster, &["workers", "cordon", "decode-1"]).await?;
            ensure!(told.contains("decode-1: cordoned"), "{told}");
            let only = wait::until("one writes", SOON, async || {
                (writers(cluster, 6).await.ok()? == ["decode-0"]).then_some(())
            });
            only.await?;
            let table = well(cluster, &["status"]).await?;
            ensure!(table.contains("cordoned"), "{table}");

            for (what, why) in [
                (&["workers", "cordon", "decode-0"][..], "last decode worker of model demo: nobody would answer"),
                (&["workers", "drain", "prefill-0"], "last prefill worker"),
                (&["workers", "drain", "kv-store-0"], "kvasirctl kv drain kv-store-0"),
                (&["workers", "drain", "nobody"], "no worker is called"),
            ] {
                let error = refused(cluster, what).await?;
                ensure!(error.contains(why), "{what:?}: {error}");
            }
            // A planner may not move who is out of service.
            let mut client =
                WorkerClient::connect(format!("http://{}", cluster.node(Service::Decode, 1).grpc())).await?;
            let planned = SetDutyRequest {
                protocol_version: PROTOCOL_VERSION,
                role: "prefill".into(),
                term: 9,
                ..SetDutyRequest::default()
            };
            let error = client.set_duty(planned).await.unwrap_err();
            ensure!(error.message().contains("cordoned"), "{error}");

            well(cluster, &["workers", "cordon", "decode-0", "--force"]).await?;
            let (client, body) = (cluster.client(), chat(cluster.model(), "anybody?"));
            wait::until("nobody answers", SOON, async || client.chat(&body).await.is_err().then_some(())).await?;
            for worker in ["decode-0", "decode-1"] {
                well(cluster, &["workers", "uncordon", worker]).await?;
            }
            let both =
                wait::until("both write", SOON, async || (writers(cluster, 12).await.ok()?.len() == 2).then_some(()));
            both.await
        })
        .await
}

#[tokio::test]
async fn a_drain_goes_on_without_etcd_and_without_whoever_asked_and_ends_with_the_process() -> Result<()> {
    Cluster::builder()
        .decode(2)
        .kv_store(0)
        .set(Service::Decode, "registry.etcd.request_timeout_ms", 500)
        .run(async |cluster| {
            for warning in ["registration not renewed", "etcd"] {
                cluster.expect_warning(warning);
            }
            let told = ctl(cluster, &["workers", "drain", "decode-0", "--no-wait"])?;
            ensure!(told.contains("decode-0: cordoned, about to drain"), "{told}");
            at_stage(cluster.node(Service::Decode, 0), Stage::Drained).await?;
            // Again: it is so already.
            let told = ctl(cluster, &["workers", "drain", "decode-0", "--force"])?;
            ensure!(told.contains("drained, safe to delete"), "{told}");
            ctl(cluster, &["workers", "undrain", "decode-0"])?;
            let seen = &*cluster;
            wait::until("both write", SOON, async || (writers(seen, 12).await.ok()?.len() == 2).then_some(())).await?;

            cluster.etcd().kill();
            let node = cluster.node(Service::Decode, 1);
            set(node, Stage::Drained, None).await?;
            at_stage(node, Stage::Drained).await?;
            // Routers have not heard of it, and are told by the worker itself.
            let (client, model) = (cluster.client(), cluster.model().to_owned());
            for number in 0..6 {
                client.chat(&chat(&model, &format!("{number} meanwhile"))).await?;
            }
            cluster.etcd().restart().await?;
            let cluster_now = &*cluster;
            wait::until("the record says so", SOON, async || {
                let table = well(cluster_now, &["status"]).await.ok()?;
                table.contains("drained").then_some(())
            })
            .await?;

            cluster.node_mut(Service::Decode, 1).process.kill();
            cluster.restart(Service::Decode, 1).await?;
            ensure!(
                lifecycle(cluster.node(Service::Decode, 1)).await?.stage() == Stage::Serving,
                "a new process serves"
            );
            let cluster = &*cluster;
            wait::until("both write", SOON, async || (writers(cluster, 12).await.ok()?.len() == 2).then_some(())).await
        })
        .await
}

/// `sha256sum` of a text.
pub(crate) fn sha256(text: &str) -> Result<String> {
    use std::io::Write as _;
    let mut child =
        Command::new("sha256sum").stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn()?;
    child.stdin.take().context("stdin")?.write_all(text.as_bytes())?;
    let output = child.wait_with_output()?;
    Ok(String::from_utf8(output.stdout)?.split(' ').next().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn changes_need_an_operators_token_where_one_is_set_and_all_of_them_are_on_record() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = dir.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let (alice, mallory) = (file("alice", "alices-token\n")?, file("mallory", "mallorys-token\n")?);
    let tokens = file("tokens", &format!("alice {}\n", sha256("alices-token")?))?;
    let mut builder = Cluster::builder().decode(2).kv_store(1);
    for service in [Service::Router, Service::Prefill, Service::Decode, Service::KvStore] {
        builder = builder.set(service, "operator.tokens_file", json!(tokens));
    }
    builder
        .run(async |cluster| {
            let cluster = &*cluster;
            for what in [
                &["workers", "cordon", "decode-1"][..],
                &["workers", "drain", "decode-1"],
                &["worker", "role", "decode-1", "prefill"],
                &["route", "policy", "random"],
                &["kv", "evict", "--all", "--yes"],
            ] {
                let none = refused(cluster, what).await?;
                ensure!(none.contains("KVASIR_TOKEN"), "{what:?}: {none}");
                let wrong = refused(cluster, &[what, &["--token-file", &mallory]].concat()).await?;
                ensure!(wrong.contains("no operator's"), "{what:?}: {wrong}");
            }
            let allowed = ["--token-file", alice.as_str()];
            for what in [
                &["workers", "drain", "decode-1"][..],
                &["workers", "undrain", "decode-1"],
                &["workers", "role", "decode-1", "prefill"],
                &["route", "policy", "random"],
                &["kv", "evict", "--all", "--yes"],
            ] {
                well(cluster, &[what, &allowed].concat()).await?;
            }
            // Looking needs none.
            well(cluster, &["status"]).await?;

            let events = async |kind: &str| -> Result<Vec<Value>> {
                let text = well(cluster, &["events", "--kind", kind, "--output", "json"]).await?;
                Ok(serde_json::from_str(&text)?)
            };
            let mut seen = Vec::new();
            wait::until("all is on record", SOON, async || {
                seen = events("audit").await.ok()?;
                (seen.len() >= 15).then_some(())
            })
            .await?;
            let has = |who: &str, what: &str, on: &str, result: &str| {
                let is = |event: &Value, field: &str, start: &str| {
                    event[field].as_str().is_some_and(|text| text.starts_with(start))
                };
                let found = seen.iter().any(|event| {
                    is(event, "who", who)
                        && is(event, "what", what)
                        && is(event, "on", on)
                        && is(event, "result", result)
                });
                if found { Ok(()) } else { Err(anyhow::anyhow!("{who} {what} {on} {result}: {seen:?}")) }
            };
            has("alice from 127.0.0.1:", "drain", "decode-1", "done")?;
            has("alice", "serve again", "decode-1", "done")?;
            has("alice", "set duty: role prefill", "decode-1", "done")?;
            has("alice", "policy random", "router-0", "done")?;
            has("alice", "evict all blocks", "kv-store-0", "done")?;
            has("nobody known from 127.0.0.1:", "drain", "decode-1", "this changes the cluster")?;
            has("nobody known", "policy random", "router-0", "the token is no operator's")?;
            let stages = events("stage").await?;
            let of =
                |what: &str| stages.iter().any(|event| event["what"].as_str().is_some_and(|it| it.starts_with(what)));
            ensure!(of("is to be drained") && of("draining") && of("drained") && of("serving"), "{stages:?}");
            let roles = events("role").await?;
            ensure!(roles.iter().any(|event| event["what"].as_str().is_some_and(|it| it.contains("works as prefill"))));
            let table = well(cluster, &["events"]).await?;
            ensure!(table.contains("alice") && table.contains("came"), "{table}");
            let log = cluster.node(Service::Decode, 1).process.log();
            ensure!(log.contains("audit"), "the log has it, too");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn events_are_followed_as_they_happen_and_outlive_who_saw_them() -> Result<()> {
    Cluster::builder()
        .decode(2)
        .kv_store(0)
        .run(async |cluster| {
            crate::moves::announce(cluster);
            for warning in ["registration not renewed", "etcd"] {
                cluster.expect_warning(warning);
            }
            let endpoint = cluster.etcd().endpoint().to_owned();
            let mut follower = Command::new(workspace::binary("kvasirctl")?)
                .args(["--etcd", &endpoint, "events", "-f", "--kind", "member", "--output", "json"])
                .stdout(std::process::Stdio::piped())
                .spawn()?;
            let out = std::io::BufReader::new(follower.stdout.take().context("stdout")?);
            let (told, mut lines) = tokio::sync::mpsc::channel(64);
            // Ends with the follower.
            std::thread::spawn(move || {
                out.lines().map_while(std::io::Result::ok).try_for_each(|line| told.blocking_send(line))
            });
            cluster.node_mut(Service::Decode, 1).process.kill();
            let mut next = async |on: &str, what: &str| -> Result<()> {
                loop {
                    let line = tokio::time::timeout(Duration::from_secs(30), lines.recv()).await?;
                    let event: Value = serde_json::from_str(&line.context("the follower goes on")?)?;
                    if event["on"] == on && event["what"].as_str().is_some_and(|it| it.contains(what)) {
                        return Ok(());
                    }
                }
            };
            next("decode-1", "went").await?;
            cluster.restart(Service::Decode, 1).await?;
            next("decode-1", "came").await?;
            follower.kill()?;
            follower.wait()?;
            // Whoever wrote it is gone, and so is etcd for a moment: it is still there.
            cluster.node_mut(Service::Router, 0).process.kill();
            cluster.etcd().kill();
            cluster.etcd().restart().await?;
            let seen = ctl(cluster, &["events", "--since", "10m"])?;
            ensure!(seen.contains("decode went"), "{seen}");
            cluster.restart(Service::Router, 0).await
        })
        .await
}

/// A request that writes for long, with that name.
async fn begin_long(cluster: &Cluster, id: &str) -> Result<reqwest::Response> {
    let mut body = long_answer(cluster.model(), 7);
    body["max_tokens"] = 400.into();
    let url = format!("http://{}{CHAT}", cluster.node(Service::Router, 0).http());
    let response = reqwest::Client::new().post(url).header("x-request-id", id).json(&body).send().await?;
    ensure!(response.status().is_success(), "{}", response.status());
    Ok(response)
}

#[tokio::test]
async fn a_request_is_listed_and_cancelled_and_its_client_gets_one_error() -> Result<()> {
    Cluster::builder()
        .kv_store(0)
        .worker("engine.threads", 1)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .run(async |cluster| {
            let cluster = &*cluster;
            // Many at a time, so that each takes its time.
            let others = (0..16).map(|number| begin_long_boxed(cluster, format!("other-{number}")));
            let _others = future::try_join_all(others).await?;
            let response = begin_long(cluster, "to-be-cancelled").await?;
            let mut shown = Value::Null;
            wait::until("it decodes", SOON, async || {
                let arguments = ["requests", "list", "--state", "decoding", "--output", "json"];
                let all: Value = serde_json::from_str(&well(cluster, &arguments).await.ok()?).ok()?;
                shown = all["requests"].as_array()?.iter().find(|one| one["id"] == "to-be-cancelled")?.clone();
                Some(())
            })
            .await?;
            ensure!(shown["worker"] == "decode-0" && shown["prefill"] == "prefill-0", "{shown}");
            ensure!(shown["model"] == "demo" && shown["router"] == "router-0", "{shown}");
            ensure!(!shown.to_string().contains('?'), "nothing of the prompt: {shown}");

            let none = refused(cluster, &["requests", "cancel", "nobodys"]).await?;
            ensure!(none.contains("nothing was done"), "{none}");
            let told = well(cluster, &["requests", "cancel", "to-be-cancelled"]).await?;
            ensure!(told == "to-be-cancelled cancelled\n", "{told}");
            let text = tokio::time::timeout(SOON, response.text()).await??;
            let errors = text.lines().filter(|line| line.contains("\"error\"")).count();
            ensure!(errors == 1 && text.contains("an operator has ended this request"), "{text}");
            ensure!(text.contains("cancelled_by_operator"), "{text}");
            let gone = refused(cluster, &["requests", "show", "to-be-cancelled"]).await?;
            ensure!(gone.contains("kvasirctl trace"), "{gone}");
            // Its blocks are free: the cluster's end sees to it that all are. The worker knows that it was given up.
            wait::until("the worker has let go of it", SOON, async || {
                let trace = well(cluster, &["trace", "to-be-cancelled"]).await.ok()?;
                (trace.contains("cancelled_by_operator") && trace.contains("cancelled  ")).then_some(())
            })
            .await
        })
        .await
}

async fn begin_long_boxed(cluster: &Cluster, id: String) -> Result<reqwest::Response> {
    begin_long(cluster, &id).await
}

#[tokio::test]
async fn a_trace_is_the_way_of_a_request_through_router_decode_and_prefill_worker() -> Result<()> {
    Cluster::builder()
        .kv_store(1)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .run(async |cluster| {
            let cluster = &*cluster;
            let url = format!("http://{}{CHAT}", cluster.node(Service::Router, 0).http());
            let body = chat(cluster.model(), &crate::prompts::long(60));
            let answer = reqwest::Client::new().post(url).header("x-request-id", "traced").json(&body).send().await?;
            ensure!(answer.status().is_success(), "{}", answer.status());
            let answer: Value = answer.json().await?;

            let json: Value = serde_json::from_str(&well(cluster, &["trace", "traced", "--output", "json"]).await?)?;
            let stories = json["stories"].as_array().context("stories")?;
            let parts: Vec<_> =
                stories.iter().map(|story| (story["member"].as_str(), story["part"].as_str())).collect();
            let expected = [("router-0", "router"), ("decode-0", "decode"), ("prefill-0", "prefill")]
                .map(|(m, p)| (Some(m), Some(p)));
            ensure!(parts == expected, "{parts:?}");
            ensure!(stories.iter().all(|story| story["over"] == true), "{json}");
            let fact = |story: usize, step: &str, fact: &str| -> Result<Value> {
                let steps = stories[story]["steps"].as_array().context("steps")?;
                let step = steps.iter().find(|told| told["step"] == step).with_context(|| format!("{step}: {json}"))?;
                Ok(step["facts"][fact].clone())
            };
            let prompt = answer["usage"]["prompt_tokens"].as_f64();
            ensure!(fact(0, "tokenized", "prompt_tokens")?.as_f64() == prompt, "{json}");
            ensure!(
                fact(0, "placed", "worker")? == "decode-0" && fact(0, "placed", "prefill")? == "prefill-0",
                "{json}"
            );
            ensure!(fact(0, "placed", "reason")?.as_str().is_some_and(|reason| !reason.is_empty()), "{json}");
            ensure!(
                fact(0, "answered", "output_tokens")?.as_f64() == answer["usage"]["completion_tokens"].as_f64(),
                "{json}"
            );
            ensure!(fact(1, "prefill landed", "computed_tokens")?.as_f64() == prompt, "{json}");
            let bytes = fact(1, "prefill landed", "bytes")?;
            ensure!(bytes.as_f64() > Some(0.0) && fact(2, "written", "bytes")? == bytes, "{json}");
            fact(2, "first token", "")?;
            fact(1, "finished", "")?;

            let tree = well(cluster, &["trace", "traced"]).await?;
            let order = ["router router-0", "  decode decode-0", "    prefill prefill-0"].map(|line| tree.find(line));
            ensure!(order.is_sorted() && order[0].is_some(), "{tree}");
            ensure!(!tree.contains("lemon"), "nothing of the prompt: {tree}");
            let unknown = refused(cluster, &["trace", "nobodys"]).await?;
            ensure!(unknown.contains("nobody remembers"), "{unknown}");
            Ok(())
        })
        .await
}
