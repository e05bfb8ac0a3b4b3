//! A prompt that one prefill worker has computed, asked of another: through the whole cluster, on the shape of
//! qwen3-0.6b with random weights.
//!
//! The decode worker keeps nothing, and which prefill worker is asked is said in the request, so the blocks can come from
//! nowhere but the store. What is timed is the first token as the router would see it. Both requests end with a few tokens
//! of their own, which are computed in any case.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kvasir_model::{Folder, cpu::Compute};
use kvasir_proto::{
    convert,
    v1::{GenerateRequest, PrefillCandidate, decode_client::DecodeClient, generate_event::Event},
};
use kvasir_tests::{Cluster, Service, wait, workspace};
use kvasir_types::{ModelFingerprint, PROTOCOL_VERSION, Sampling, TokenId};

use crate::{
    Options,
    report::{Report, Row},
};

/// The model that is measured, and the one that only shows that everything works.
const SHAPE: &str = "qwen3-0.6b";
const SMOKE_SHAPE: &str = "qwen3-tiny";
/// Tokens that both requests begin with, and how many they have of their own.
const SHARED: usize = 2000;
const OWN: usize = 24;
const BLOCK: usize = 16;
/// Tokens of the prompts before the first that counts.
const WARM_UP: usize = 256;
/// Both shapes know more tokens than these.
const TOKENS: std::ops::Range<u32> = 16..500;
/// Pairs of requests: computing a prompt takes ten seconds.
const REPETITIONS: usize = 5;
/// For the first prompt's blocks to get to the store.
const LIMIT: Duration = Duration::from_secs(30);

/// The row alone.
pub async fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("shared-prompt");
    add(options, &mut report).await?;
    Ok(report)
}

/// Measures, and adds the row to a report.
pub async fn add(options: &Options, report: &mut Report) -> Result<()> {
    let folder = shape(if options.smoke { SMOKE_SHAPE } else { SHAPE })?;
    let cluster = Cluster::builder()
        .model(&folder)
        .routers(0)
        .prefill(2)
        .worker("engine.threads", 0)
        .worker("engine.compute", "fast")
        .worker("kv.memory_bytes", 640 << 20)
        .worker("store.lookup_timeout_ms", 50)
        .set(Service::Decode, "engine.prefix_cache", false)
        .set(Service::Decode, "decode.local_prefill_tokens", 0)
        .set(Service::KvStore, "capacity_bytes", 2_u64 << 30)
        .start()
        .await?;
    let asker = Asker { cluster, fingerprint: Folder::open(&folder)?.fingerprint_of(Compute::Fast) };
    // Connections, page tables, code.
    for prefill in 0..2 {
        asker.ask(prefill, &tokens(prefill as u64, WARM_UP)).await?;
    }
    // Blocks that are in the store when all that was computed has been written.
    let mut blocks = 2 * WARM_UP / BLOCK;
    let (mut computed, mut read) = (Vec::new(), Vec::new());
    for repetition in 0..options.repetitions.min(REPETITIONS) {
        let number = 10 * (repetition as u64 + 1);
        let shared = tokens(number, SHARED);
        let prompt = |own: u64| [shared.clone(), tokens(number + own, OWN)].concat();
        let (first, other) = (repetition % 2, 1 - repetition % 2);
        computed.push(asker.ask(first, &prompt(1)).await?);
        blocks += (SHARED + OWN) / BLOCK;
        wait::until("the prompt's blocks are in the store", LIMIT, async || {
            (asker.committed().await.ok()? >= blocks as u64).then_some(())
        })
        .await?;
        read.push(asker.ask(other, &prompt(2)).await?);
        blocks += (SHARED + OWN) / BLOCK - SHARED / BLOCK;
        let metrics = asker.cluster.node(Service::Prefill, other).metrics().await?;
        let from_store = metrics.sum_where("kvasir_worker_prompt_tokens_total", &[("source", "Store")]);
        let expected = (SHARED * (repetition / 2 + 1)) as f64;
        ensure!(from_store >= expected, "{from_store} of {expected} tokens came from the store");
        println!("        computed {:.0} ms, read {:.0} ms", computed[repetition], read[repetition]);
    }
    let what = format!("TTFT, {SHARED} shared tokens, another prefill worker than the first");
    report.push(Row::repeated(what, "ms", &read, "computed", &computed).at_most(0.35));
    Ok(())
}

/// The folder of a shape; written when it is first asked for.
fn shape(name: &str) -> Result<PathBuf> {
    let output = Command::new(workspace::binary("kvasir-engine-bench")?).args(["shape", name]).output()?;
    ensure!(output.status.success(), "no shape {name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(Path::new(String::from_utf8(output.stdout)?.trim()).to_owned())
}

/// Whoever asks the decode worker, as a router does.
struct Asker {
    cluster: Cluster,
    fingerprint: ModelFingerprint,
}

impl Asker {
    /// Milliseconds from the request to its first token, of which the prompt is computed by that prefill worker.
    async fn ask(&self, prefill: usize, prompt: &[TokenId]) -> Result<f64> {
        let prefill = self.cluster.node(Service::Prefill, prefill);
        let address = format!("http://{}", self.cluster.node(Service::Decode, 0).grpc());
        let mut client = DecodeClient::connect(address).await?;
        let request = GenerateRequest {
            protocol_version: PROTOCOL_VERSION,
            request_id: "bench".into(),
            fingerprint: convert::bytes16(&self.fingerprint.0),
            prompt: convert::token_ids(prompt),
            sampling: Some((&Sampling { max_tokens: 1, ignore_eos: true, ..Sampling::default() }).into()),
            prefill: vec![PrefillCandidate { member: prefill.id().to_owned(), address: prefill.grpc().to_owned() }],
            deadline_ms: 300_000,
            choices: 1,
            ..GenerateRequest::default()
        };
        let started = Instant::now();
        let mut stream = client.generate(request).await?.into_inner();
        let mut first = None;
        while let Some(message) = stream.message().await? {
            match message.event {
                Some(Event::Token(_)) => first = first.or_else(|| Some(started.elapsed())),
                Some(Event::Finished(finished)) => {
                    ensure!(finished.prefill_member == prefill.id(), "computed by {:?}", finished.prefill_member);
                }
                Some(Event::Alive(_)) | None => {}
            }
        }
        Ok(first.context("no token came")?.as_secs_f64() * 1e3)
    }

    async fn committed(&self) -> Result<u64> {
        Ok(self.cluster.node(Service::KvStore, 0).store_status().await?.committed_blocks_total)
    }
}

/// Tokens that no other number gives.
fn tokens(number: u64, count: usize) -> Vec<TokenId> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        // xorshift64*: good enough to draw tokens, the same on every machine.
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as u32
    };
    (0..count).map(|_| TokenId(TOKENS.start + next() % (TOKENS.end - TOKENS.start))).collect()
}
