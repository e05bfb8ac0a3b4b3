//! What the client is asked for.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use kvasir_cluster::Registry;
use kvasir_proto::{convert, v1, v1::store_client::StoreClient as Raw};
use kvasir_store_client::{Origin, StoreClient};
use kvasir_transfer::{Batch, Op, Priority, Range, TransferEngine};
use kvasir_types::{BlockHash, Deadline, PROTOCOL_VERSION, RequestId, Role, SegmentDescriptor, TokenId};
use serde_json::{Value, json};

use crate::Failure;

/// No call takes so long.
const SOON: Duration = Duration::from_secs(30);

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
            "parts" => self.parts(ask).await,
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
        let tasks: Vec<_> = (0..callers)
            .map(|_| {
                let (client, prompts, next) = (self.client.clone(), prompts.clone(), next.clone());
                let (block_bytes, mut latencies) = (values.bytes, Vec::new());
                tokio::spawn(async move {
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
                })
            })
            .collect();
        let mut latencies = Vec::new();
        for task in tasks {
            latencies.extend(task.await??);
        }
        Ok(figures(latencies, started.elapsed(), 0))
    }

    /// What one get is made of.
    async fn parts(self: Arc<Self>, ask: &Value) -> Result<Value, Failure> {
        let values = values(ask)?;
        let grpc = self.registry.view().borrow().role(Role::KvStore).next().ok_or("no node")?.grpc.clone();
        let channel =
            tonic::transport::Endpoint::from_shared(format!("http://{grpc}"))?.tcp_nodelay(true).connect().await?;
        let mut raw = Raw::new(channel);
        let mut parts = [const { Vec::new() }; 5];
        for &(hash, local) in &values.blocks {
            let begun = Instant::now();
            let answer = raw.lookup(lookup_message(&[hash], values.bytes)).await?.into_inner();
            parts[0].push(begun.elapsed());
            let begun = Instant::now();
            let target = SegmentDescriptor::try_from(answer.segment.as_ref().ok_or("no segment")?)?;
            let batch = Batch {
                op: Op::Read,
                target,
                grant: convert::grant_key(answer.grant),
                ranges: vec![Range { local, remote: answer.offsets[0], len: values.bytes }],
                deadline: Deadline::after(SOON),
                priority: Priority::Normal,
                notice: None,
            };
            self.engine.submit(batch).await?;
            parts[1].push(begun.elapsed());
            let begun = Instant::now();
            self.engine.checksum(local, values.bytes)?;
            parts[2].push(begun.elapsed());
            let begun = Instant::now();
            raw.release(v1::ReleaseRequest { lease: answer.lease }).await?;
            parts[3].push(begun.elapsed());
            let begun = Instant::now();
            raw.store_status(v1::StoreStatusRequest {}).await?;
            parts[4].push(begun.elapsed());
        }
        let middle = |mut part: Vec<Duration>| {
            part.sort_unstable();
            part[part.len() / 2].as_secs_f64() * 1e6
        };
        let [lookup, read, checksum, release, status] = parts.map(middle);
        Ok(json!({ "lookup": lookup, "read": read, "checksum": checksum, "release": release, "empty call": status }))
    }
}

fn lookup_message(hashes: &[BlockHash], block_bytes: u64) -> v1::LookupRequest {
    v1::LookupRequest {
        protocol_version: PROTOCOL_VERSION,
        request_id: "store-load".to_owned(),
        hashes: convert::pack16(hashes.iter().map(|hash| &hash.0)),
        block_bytes,
        ended: Vec::new(),
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
