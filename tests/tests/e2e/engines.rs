//! Engines of others behind the router: stand-ins that speak vLLM's and SGLang's protocols (`kvasir_tests::stand_in`), each a
//! process. They go on from what they were handed, so a wrong pairing says the wrong tokens or nothing.

mod discovery;
mod faults;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use kvasir_tests::{
    Builder, Client, Cluster, Service, StandIn,
    openai::text_of,
    stand_in::{Kind, Knobs, Role, Seen, rule},
    wait::{self, SOON},
};
use serde_json::{Value, json};

use crate::prompts::{chat, streamed};

/// The name under which engines serve their model.
const SERVED: &str = "org/big-model";
/// A prompt of three blocks.
const QUESTION: &str = "Tell me, in as many words as you like, what the difference between a prefill and a decode worker is, \
    and why anybody would want to have them apart from one another, on machines of their own.";

/// Stand-ins, in the directory where their logs are.
struct Engines {
    all: Vec<StandIn>,
    dir: tempfile::TempDir,
}

impl Engines {
    /// So many of each role: `p0`, `p1`, …, `d0`, …
    async fn start(kind: Kind, prefill: usize, decode: usize) -> Result<Self> {
        let mut engines = Self { all: Vec::new(), dir: tempfile::tempdir()? };
        for at in 0..prefill {
            engines.add(kind, Role::Prefill, &format!("p{at}")).await?;
        }
        for at in 0..decode {
            engines.add(kind, Role::Decode, &format!("d{at}")).await?;
        }
        Ok(engines)
    }

    async fn add(&mut self, kind: Kind, role: Role, id: &str) -> Result<()> {
        self.all.push(StandIn::start(kind, role, id, SERVED, self.dir.path()).await?);
        Ok(())
    }

    fn get(&self, id: &str) -> &StandIn {
        self.all.iter().find(|engine| engine.id() == id).unwrap_or_else(|| panic!("there is no {id}"))
    }

    fn get_mut(&mut self, id: &str) -> &mut StandIn {
        self.all.iter_mut().find(|engine| engine.id() == id).unwrap_or_else(|| panic!("there is no {id}"))
    }

    fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What the router's configuration says of them.
    fn config(&self, model: &str) -> Value {
        self.all.iter().map(|engine| engine.config(model)).collect()
    }

    /// Does the same to all of a role.
    async fn turn(&self, role: Role, knobs: Knobs) -> Result<()> {
        for engine in self.all.iter().filter(|engine| engine.role == role) {
            engine.turn(knobs.clone()).await?;
        }
        Ok(())
    }

    async fn seen(&self, id: &str) -> Result<Seen> {
        self.get(id).seen().await
    }

    /// A router and nothing else, which knows them by its configuration, and does not remember what it sent them: each prompt
    /// is handed over.
    fn cluster(&self) -> Builder {
        let settings = [
            ("external.engines", self.config("demo")),
            ("external.probe_ms", json!(200)),
            ("external.remember_blocks", json!(0)),
        ];
        let builder = Cluster::builder().prefill(0).decode(0).kv_store(0);
        settings.into_iter().fold(builder, |builder, (name, value)| builder.set(Service::Router, name, value))
    }
}

/// Waits until the router has so many decode workers.
async fn known(cluster: &Cluster, decode: usize) -> Result<()> {
    let router = cluster.node(Service::Router, 0);
    wait::until(&format!("{decode} decode workers are known"), SOON, async || {
        let metrics = router.metrics().await.ok()?;
        (metrics.sum("kvasir_router_decode_workers") == decode as f64).then_some(())
    })
    .await
}

/// The tokens of a conversation with one message.
async fn prompt(client: &Client, content: &str) -> Result<Vec<u32>> {
    let body = json!({"model": "demo", "messages": [{"role": "user", "content": content}]});
    let told = client.post("/tokenize", &body).await?.ok()?;
    Ok(serde_json::from_value(told["tokens"].clone())?)
}

/// What the rule answers to it, in so many tokens, as text.
async fn expected(client: &Client, content: &str, tokens: usize) -> Result<String> {
    let answer = rule::answer(&prompt(client, content).await?, tokens);
    let told = client.post("/detokenize", &json!({"model": "demo", "tokens": answer})).await?.ok()?;
    Ok(told["prompt"].as_str().context("prompt")?.to_owned())
}

fn content(choice: &Value) -> &str {
    choice["message"]["content"].as_str().unwrap_or_default()
}

/// Both protocols do the same for clients.
async fn each(check: impl AsyncFn(Kind) -> Result<()>) -> Result<()> {
    for kind in [Kind::Vllm, Kind::Sglang] {
        check(kind).await.with_context(|| format!("{kind:?}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn an_answer_goes_on_from_what_the_prefill_server_computed() -> Result<()> {
    each(async |kind| {
        let engines = Engines::start(kind, 1, 1).await?;
        engines
            .cluster()
            .run(async |cluster| {
                known(cluster, 1).await?;
                let client = cluster.client();
                let answer = client.chat(&chat("demo", QUESTION)).await?;
                let text = expected(&client, QUESTION, 64).await?;
                ensure!(content(&answer["choices"][0]) == text, "{answer}, not {text}");
                ensure!(answer["choices"][0]["finish_reason"] == "length", "{answer}");
                let prompt = prompt(&client, QUESTION).await?.len();
                let usage = &answer["usage"];
                ensure!(usage["prompt_tokens"] == prompt && usage["completion_tokens"] == 64, "{usage}");
                // The prefill server's word, not the decode server's, for which all was there.
                ensure!(usage["prompt_tokens_details"]["cached_tokens"] == 3, "{usage}");

                let chunks = client.stream("/v1/chat/completions", &streamed("demo", QUESTION)).await?.chunks().await?;
                ensure!(text_of(&chunks) == text, "{}", text_of(&chunks));
                engines.turn(Role::Decode, Knobs { incremental: true, ..Knobs::default() }).await?;
                let chunks = client.stream("/v1/chat/completions", &streamed("demo", QUESTION)).await?.chunks().await?;
                ensure!(text_of(&chunks) == text, "{}", text_of(&chunks));

                let (prefill, decode) = (engines.seen("p0").await?, engines.seen("d0").await?);
                ensure!((prefill.computed, decode.handed, decode.computed) == (3, 3, 0), "{prefill:?} {decode:?}");
                ensure!(prefill.ids == decode.ids, "both servers know a request by one name");
                ensure!(decode.running == 0 && decode.aborted == 0, "{decode:?}");
                Ok(())
            })
            .await
    })
    .await
}

#[tokio::test]
async fn choices_are_requests_of_their_own_with_seeds_of_their_own() -> Result<()> {
    each(async |kind| {
        let engines = Engines::start(kind, 1, 1).await?;
        engines
            .cluster()
            .run(async |cluster| {
                known(cluster, 1).await?;
                let mut body = streamed("demo", QUESTION);
                for (field, value) in [("n", json!(3)), ("temperature", json!(1.5))] {
                    body[field] = value;
                }
                if kind == Kind::Vllm {
                    body["seed"] = 7.into();
                }
                let told = async || -> Result<Vec<String>> {
                    let mut texts = vec![String::new(); 3];
                    for chunk in cluster.client().stream("/v1/chat/completions", &body).await?.chunks().await? {
                        for choice in chunk["choices"].as_array().into_iter().flatten() {
                            let text = &mut texts[choice["index"].as_u64().context("index")? as usize];
                            text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
                        }
                    }
                    Ok(texts)
                };
                let texts = told().await?;
                ensure!(texts[0] != texts[1] && texts[1] != texts[2] && !texts[2].is_empty(), "{texts:?}");
                // vLLM's server follows the seed; SGLang's was not started so that it would.
                ensure!((told().await? == texts) == (kind == Kind::Vllm), "{texts:?}");
                let (prefill, decode) = (engines.seen("p0").await?, engines.seen("d0").await?);
                ensure!((prefill.computed, decode.handed, decode.computed) == (6, 6, 0), "{prefill:?}");
                Ok(())
            })
            .await
    })
    .await
}

#[tokio::test]
async fn what_clients_ask_for_is_what_engines_are_asked_for() -> Result<()> {
    each(async |kind| {
        let engines = Engines::start(kind, 1, 1).await?;
        engines
            .cluster()
            .run(async |cluster| {
                known(cluster, 1).await?;
                let client = cluster.client();
                let tokens = rule::answer(&prompt(&client, QUESTION).await?, 12);
                // Log-probabilities.
                let mut body = chat("demo", QUESTION);
                body["max_tokens"] = 3.into();
                body["logprobs"] = true.into();
                body["top_logprobs"] = 2.into();
                let answer = client.chat(&body).await?;
                let logged = answer["choices"][0]["logprobs"]["content"].as_array().context("logprobs")?;
                ensure!(logged.len() == 3, "{answer}");
                for (told, &token) in logged.iter().zip(&tokens) {
                    ensure!(told["logprob"] == rule::logprob(token), "{told}");
                    let top = told["top_logprobs"].as_array().context("top")?;
                    ensure!(top.len() == 2 && top[0]["logprob"] == rule::logprob(token), "{told}");
                    ensure!(top[1]["logprob"] == rule::logprob(token) - 1.0, "{told}");
                }
                // A stop token ends it there, a stop string at the router: the engine is told that nobody listens.
                let at = (2..12).find(|&at| !tokens[..at].contains(&tokens[at])).context("a token that is new")?;
                let mut body = chat("demo", QUESTION);
                body["stop_token_ids"] = json!([tokens[at]]);
                let answer = client.chat(&body).await?;
                ensure!(answer["choices"][0]["finish_reason"] == "stop", "{answer}");
                ensure!(answer["usage"]["completion_tokens"] == at + 1, "{answer}");
                engines.turn(Role::Decode, Knobs { every_ms: 20, ..Knobs::default() }).await?;
                let text = expected(&client, QUESTION, 6).await?;
                let stop: String = text.chars().skip(8).take(6).collect();
                let mut body = chat("demo", QUESTION);
                body["stop"] = json!([stop]);
                let answer = client.chat(&body).await?;
                let before = &text[..text.find(&stop).context("the stop string")?];
                ensure!(content(&answer["choices"][0]) == before, "{answer}, not {before}");
                gone(&engines, 1).await?;
                engines.turn(Role::Decode, Knobs::default()).await?;
                // Fields, as they arrive.
                let mut body = chat("demo", QUESTION);
                for (field, value) in [
                    ("temperature", json!(0.5)),
                    ("top_p", json!(0.5)),
                    ("top_k", json!(7)),
                    ("min_p", json!(0.25)),
                    ("presence_penalty", json!(0.5)),
                    ("frequency_penalty", json!(-0.5)),
                    ("repetition_penalty", json!(1.5)),
                    ("min_tokens", json!(5)),
                    ("ignore_eos", json!(true)),
                    ("logit_bias", json!({"9": 2.0})),
                    ("guided_choice", json!(["a.b", "c"])),
                ] {
                    body[field] = value;
                }
                client.chat(&body).await?;
                let asked = engines.seen("d0").await?.requests.pop().context("a request")?;
                let params = if kind == Kind::Vllm { &asked } else { &asked["sampling_params"] };
                let min = if kind == Kind::Vllm { "min_tokens" } else { "min_new_tokens" };
                for (field, value) in [
                    ("temperature", json!(0.5)),
                    ("top_p", json!(0.5)),
                    ("top_k", json!(7)),
                    ("min_p", json!(0.25)),
                    ("presence_penalty", json!(0.5)),
                    ("frequency_penalty", json!(-0.5)),
                    ("repetition_penalty", json!(1.5)),
                    (min, json!(5)),
                    ("ignore_eos", json!(true)),
                    ("logit_bias", json!({"9": 2.0})),
                ] {
                    ensure!(params[field] == value, "{field}: {params}");
                }
                match kind {
                    Kind::Vllm => ensure!(params["structured_outputs"] == json!({"choice": ["a.b", "c"]}), "{params}"),
                    Kind::Sglang => ensure!(params["regex"] == r"(a\.b|c)", "{params}"),
                }
                Ok(())
            })
            .await
    })
    .await
}

/// Waits until so many answers were given up at the decode server.
async fn gone(engines: &Engines, count: usize) -> Result<()> {
    wait::until("the engine hears that nobody listens", SOON, async || {
        let seen = engines.seen("d0").await.ok()?;
        let told = seen.aborts.len() >= count || engines.get("d0").kind == Kind::Vllm;
        (seen.aborted == count && seen.running == 0 && told).then_some(())
    })
    .await
}

#[tokio::test]
async fn a_client_that_leaves_is_told_of() -> Result<()> {
    each(async |kind| {
        let engines = Engines::start(kind, 1, 1).await?;
        engines.turn(Role::Decode, Knobs { every_ms: 50, ..Knobs::default() }).await?;
        engines
            .cluster()
            .run(async |cluster| {
                known(cluster, 1).await?;
                let mut stream = cluster.client().stream("/v1/chat/completions", &streamed("demo", QUESTION)).await?;
                stream.chunk().await?;
                drop(stream);
                gone(&engines, 1).await?;
                let seen = engines.seen("d0").await?;
                ensure!(kind == Kind::Vllm || seen.aborts == seen.ids, "by the name that it was asked under: {seen:?}");
                Ok(())
            })
            .await
    })
    .await
}

#[tokio::test]
async fn calls_are_taken_out_of_what_an_engine_says() -> Result<()> {
    each(async |kind| {
        let engines = Engines::start(kind, 1, 1).await?;
        let models = json!([{"name": "demo", "path": kvasir_tests::workspace::demo_model(), "tool_parser": "hermes"}]);
        engines
            .cluster()
            .set(Service::Router, "models", models)
            .run(async |cluster| {
                known(cluster, 1).await?;
                let client = cluster.client();
                let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>";
                let body = json!({"model": "demo", "prompt": call, "add_special_tokens": false});
                let tokens = client.post("/tokenize", &body).await?.ok()?["tokens"].clone();
                let script = serde_json::from_value(tokens)?;
                engines.turn(Role::Decode, Knobs { script, ..Knobs::default() }).await?;
                let mut body = chat("demo", "How is the weather in Oslo?");
                body["tools"] =
                    json!([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]);
                let answer = client.chat(&body).await?;
                let choice = &answer["choices"][0];
                ensure!(choice["finish_reason"] == "tool_calls", "{answer}");
                let function = &choice["message"]["tool_calls"][0]["function"];
                ensure!(function["name"] == "weather" && function["arguments"] == "{\"city\": \"Oslo\"}", "{answer}");
                Ok(())
            })
            .await
    })
    .await
}

#[tokio::test]
async fn what_a_protocol_can_not_carry_is_refused_by_name() -> Result<()> {
    let engines = Engines::start(Kind::Sglang, 1, 1).await?;
    engines
        .cluster()
        .run(async |cluster| {
            known(cluster, 1).await?;
            for (field, value) in
                [("seed", json!(7)), ("guided_grammar", json!("start: \"a\"")), ("repetition_penalty", json!(2.5))]
            {
                let mut body = chat("demo", QUESTION);
                body[field] = value;
                let reply = cluster.client().post("/v1/chat/completions", &body).await?;
                ensure!(reply.status == 400 && reply.body["error"]["param"] == field, "{field}: {:?}", reply.body);
            }
            ensure!(engines.seen("d0").await?.requests.is_empty(), "no engine heard of it");
            Ok(())
        })
        .await
}

#[tokio::test]
async fn a_prompt_goes_where_it_was_before() -> Result<()> {
    each(async |kind| {
        let engines = Engines::start(kind, 2, 2).await?;
        engines
            .cluster()
            .set(Service::Router, "external.remember_blocks", 1_000)
            .run(async |cluster| {
                known(cluster, 2).await?;
                let (client, body) = (cluster.client(), chat("demo", QUESTION));
                let text = expected(&client, QUESTION, 64).await?;
                let (first, why) = client.explained("/v1/chat/completions", &body).await?;
                ensure!(why["reason"] == "load" && why["cached_tokens"] == 0, "{why}");
                let prompt = prompt(&client, QUESTION).await?.len();
                for _ in 0..3 {
                    let (again, then) = client.explained("/v1/chat/completions", &body).await?;
                    ensure!(then["reason"] == "cache" && then["cached_tokens"] == prompt / 16 * 16, "{then}");
                    ensure!(content(&again["choices"][0]) == text && content(&first["choices"][0]) == text, "{again}");
                    // A decode server of vLLM's has it, and computes the little that is left; SGLang's keeps nothing.
                    match kind {
                        Kind::Vllm => ensure!(then["decode"] == why["decode"], "{then}, {why}"),
                        Kind::Sglang => ensure!(then["prefill"][0] == why["prefill"][0], "{then}, {why}"),
                    }
                }
                Ok(())
            })
            .await
    })
    .await
}

#[tokio::test]
async fn engines_and_workers_serve_their_models_side_by_side() -> Result<()> {
    each(async |kind| {
        let mut engines = Engines::start(kind, 1, 1).await?;
        engines.add(kind, Role::Both, "alone").await?;
        let path = kvasir_tests::workspace::demo_model();
        let models = json!([{"name": "demo", "path": path}, {"name": "theirs", "path": path}]);
        let builder = Cluster::builder().kv_store(0).set(Service::Decode, "decode.local_prefill_tokens", 0);
        builder
            .set(Service::Router, "models", models)
            .set(Service::Router, "external.engines", engines.config("theirs"))
            .set(Service::Router, "policy", "round-robin")
            .set(Service::Router, "external.remember_blocks", 0)
            .run(async |cluster| {
                known(cluster, 3).await?;
                let client = cluster.client();
                let ours = client.chat(&chat("demo", QUESTION)).await?;
                let rule = expected(&client, QUESTION, 64).await?;
                ensure!(content(&ours["choices"][0]) != rule, "that was no worker of ours");
                for _ in 0..4 {
                    let theirs = client.chat(&chat("theirs", QUESTION)).await?;
                    ensure!(content(&theirs["choices"][0]) == rule, "{theirs}");
                }
                let (prefill, decode, alone) =
                    (engines.seen("p0").await?, engines.seen("d0").await?, engines.seen("alone").await?);
                // One that does both is given no partner, and its answers no prefill server's time.
                ensure!((prefill.computed, decode.handed, decode.computed) == (2, 2, 0), "{prefill:?} {decode:?}");
                ensure!((alone.computed, alone.handed) == (2, 0), "{alone:?}");
                Ok(())
            })
            .await
    })
    .await
}
