//! What the client is asked for.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use kvasir_cluster::Registry;
use kvasir_proto::{MAX_MESSAGE_BYTES, v1, v1::store_client::StoreClient as Raw};
use kvasir_store_client::{Origin, StoreClient};
use kvasir_transfer::TransferEngine;
use kvasir_types::{BlockHash, Deadline, PROTOCOL_VERSION, RequestId, Role, TokenId};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::Failure;

/// No call takes so long.
const SOON: Duration = Duration::from_secs(30);
/// By then leases of what was read have ended, unless something is wrong: several times the nodes' setting.
const LEASES_END: Duration = Duration::from_secs(30);

pub struct Load {
    client: StoreClient,
    engine: TransferEngine,
    registry: Arc<dyn Registry>,
    request: RequestId,
}

/// Which values: number `0..values` of a seed, each of `block` bytes, at their place in the arena.
struct Values {
    blocks: Vec<(BlockHash, u64)>,
    bytes: u64,
    seed: u64,
}

impl Load {
    pub fn new(client: StoreClient, engine: TransferEngine, registry: Arc<dyn Registry>) -> Self {
        Self { client, engine, registry, request: "store-load".parse().expect("a valid id") }
    }

    pub async fn answer(self: Arc<Self>, ask: &Value) -> Result<Value, Failure> {
        match ask["do"].as_str().unwrap_or_default() {
            "hello" => Ok(json!({})),
            "fill" => self.fill(&values(ask)?),
            "check" => self.check(&values(ask)?),
            op @ ("put" | "get") => self.timed(op, ask).await,
            "lookup" => self.lookup(ask).await,
            "clear" => self.clear().await,
            other => Err(format!("there is nothing called '{other}'").into()),
        }
    }

    fn fill(&self, values: &Values) -> Result<Value, Failure> {
        for (number, &(_, offset)) in (0..).zip(&values.blocks) {
            self.engine.write_bytes(offset, &values.content(number))?;
        }
        Ok(json!({}))
    }

    fn check(&self, values: &Values) -> Result<Value, Failure> {
        let mut found = vec![0; values.bytes as usize];
        let mut right = true;
        for (number, &(_, offset)) in (0..).zip(&values.blocks) {
            self.engine.read_bytes(offset, &mut found)?;
            right &= found == values.content(number);
        }
        Ok(json!({ "right": right }))
    }

    /// Puts or gets every batch of the values, one after the other.
    async fn timed(&self, op: &str, ask: &Value) -> Result<Value, Failure> {
        let values = values(ask)?;
        let batch = number(ask, "batch")? as usize;
        let mut latencies = Vec::with_capacity(values.blocks.len().div_ceil(batch));
        let started = Instant::now();
        for blocks in values.blocks.chunks(batch) {
            let (begun, deadline) = (Instant::now(), Deadline::after(SOON));
            let (done, error) = if op == "put" {
                let report = self.client.write(&self.request, &Origin::default(), blocks, values.bytes, deadline).await;
                (report.written, report.error)
            } else {
                let report = self.client.read(&self.request, blocks, values.bytes, deadline).await;
                (report.blocks, report.error)
            };
            latencies.push(begun.elapsed());
            if done != blocks.len() {
                let why = error.map_or_else(String::new, |error| format!(": {error:?}"));
                return Err(format!("{op} of {} values did {done}{why}", blocks.len()).into());
            }
        }
        let bytes = values.blocks.len() as u64 * values.bytes;
        Ok(figures(latencies, started.elapsed(), bytes))
    }

    /// Has all nodes give all blocks up. Those that were read moments ago are leased still: they are asked for again, as
    /// otherwise they stayed, and the next values that are put would go instead.
    async fn clear(&self) -> Result<Value, Failure> {
        let nodes: Vec<_> =
            self.registry.view().borrow().role(Role::KvStore).map(|member| member.grpc.clone()).collect();
        for grpc in nodes {
            let mut raw = Raw::connect(format!("http://{grpc}")).await?.max_decoding_message_size(MAX_MESSAGE_BYTES);
            let until = Instant::now() + LEASES_END;
            loop {
                let all = v1::EvictRequest { protocol_version: PROTOCOL_VERSION, all: true, ..Default::default() };
                let left = raw.evict(all).await?.into_inner().in_use;
                if left == 0 {
                    break;
                }
                if Instant::now() > until {
                    return Err(
                        format!("{left} blocks are in use {} s after the last read", LEASES_END.as_secs()).into()
                    );
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(json!({}))
    }

    /// Lookups of prompts of so many blocks, by so many callers for so long.
    async fn lookup(self: Arc<Self>, ask: &Value) -> Result<Value, Failure> {
        let values = values(ask)?;
        let keys = number(ask, "keys")? as usize;
        let callers = number(ask, "callers")?;
        let seconds = ask["seconds"].as_f64().ok_or("seconds is missing")?;
        let prompts: Arc<Vec<Vec<BlockHash>>> = Arc::new(
            values.blocks.chunks_exact(keys).map(|prompt| prompt.iter().map(|&(hash, _)| hash).collect()).collect(),
        );
        let started = Instant::now();
        let until = started + Duration::from_secs_f64(seconds);
        let next = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        for _ in 0..callers {
            let (client, prompts, next) = (self.client.clone(), prompts.clone(), next.clone());
            let (block_bytes, mut latencies) = (values.bytes, Vec::new());
            tasks.spawn(async move {
                while Instant::now() < until {
                    let prompt = &prompts[next.fetch_add(1, Ordering::Relaxed) as usize % prompts.len()];
                    let begun = Instant::now();
                    let (found, error) = client.exists(prompt, block_bytes, Deadline::after(SOON)).await;
                    latencies.push(begun.elapsed());
                    if found != keys {
                        return Err(Failure::from(format!("found {found} of {keys}: {error:?}")));
                    }
                }
                Ok(latencies)
            });
        }
        let mut latencies = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            latencies.extend(ended??);
        }
        Ok(figures(latencies, started.elapsed(), 0))
    }
}

impl Values {
    fn content(&self, number: u64) -> Vec<u8> {
        let word = [self.seed.to_le_bytes(), number.to_le_bytes()].concat();
        word.repeat(self.bytes as usize / word.len())
    }
}

fn values(ask: &Value) -> Result<Values, Failure> {
    let (seed, bytes, values) = (number(ask, "seed")?, number(ask, "block")?, number(ask, "values")?);
    let mut root = [0; 16];
    root[..8].copy_from_slice(&seed.to_le_bytes());
    let root = BlockHash(root);
    let blocks = (0..values).map(|number| (root.extend(&[TokenId(number as u32)]), number * bytes)).collect();
    Ok(Values { blocks, bytes, seed })
}

fn number(ask: &Value, name: &str) -> Result<u64, Failure> {
    ask[name].as_u64().ok_or_else(|| format!("{name} is missing").into())
}

fn figures(mut latencies: Vec<Duration>, elapsed: Duration, bytes: u64) -> Value {
    latencies.sort_unstable();
    let at = |share: f64| {
        let index = ((latencies.len() as f64 * share) as usize).min(latencies.len() - 1);
        latencies[index].as_secs_f64() * 1e6
    };
    json!({
        "calls": latencies.len(),
        "bytes": bytes,
        "seconds": elapsed.as_secs_f64(),
        "p50_us": at(0.5),
        "p99_us": at(0.99),
    })
}
