//! What routers are told: it must be what the worker holds.

use std::collections::HashSet;

use kvasir_proto::{
    convert,
    v1::{self, watch_event::Event},
};
use kvasir_types::{BlockHash, PROTOCOL_VERSION, chain};

use crate::harness::{Cluster, LIMIT, config, goldens};

/// A router's picture of a cache.
struct Watcher {
    stream: tonic::Streaming<v1::WatchEvent>,
    known: HashSet<BlockHash>,
    next: u64,
    load: Option<v1::WorkerLoad>,
}

impl Watcher {
    async fn of(cluster: &Cluster) -> Self {
        let request = v1::WatchRequest { protocol_version: PROTOCOL_VERSION };
        let mut client = cluster.decode_client().await;
        let stream = client.watch(request).await.unwrap().into_inner();
        let mut watcher = Self { stream, known: HashSet::new(), next: 0, load: None };
        while watcher.load.is_none() {
            watcher.hear().await;
        }
        watcher
    }

    async fn hear(&mut self) {
        let heard = tokio::time::timeout(LIMIT, self.stream.message()).await.expect("it tells its load every second");
        let hashes = |bytes: &[u8]| convert::block_hashes(bytes, 4096).unwrap();
        match heard.unwrap().unwrap().event.unwrap() {
            Event::Part(part) => {
                if part.first {
                    self.known.clear();
                }
                self.known.extend(hashes(&part.hashes));
                self.next = part.next;
            }
            Event::Changes(changes) => {
                assert_eq!(changes.first, self.next);
                self.next += u64::from(changes.count);
                self.known.extend(hashes(&changes.stored));
                for hash in hashes(&changes.removed) {
                    self.known.remove(&hash);
                }
            }
            Event::Load(load) => self.load = Some(load),
        }
    }

    async fn until(&mut self, what: impl Fn(&Self) -> bool) {
        let waiting = async {
            while !what(self) {
                self.hear().await;
            }
        };
        tokio::time::timeout(LIMIT, waiting).await.expect("it is told in time");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_know_what_the_cache_holds_whenever_they_came() {
    let mut config = config();
    // Room for few prompts: the first ones are evicted by the last.
    config.kv.memory_bytes = 2 << 20;
    let cluster = Cluster::with_decode_of(config).await;
    let mut early = Watcher::of(&cluster).await;
    assert!(early.known.is_empty());
    let (root, block_size) = cluster.root("");
    let goldens: Vec<_> = goldens().into_iter().filter(|golden| golden.prompt_ids.len() > 32).collect();
    for golden in &goldens {
        cluster.answer(cluster.request(golden, vec![])).await.unwrap();
    }
    // A router's own hashes of the last prompt are the names it hears.
    let prompt = convert::tokens(&goldens.last().unwrap().prompt_ids);
    let hashes = chain(root, &prompt, block_size);
    assert!(hashes.len() > 1);
    early.until(|early| hashes.iter().all(|hash| early.known.contains(hash))).await;
    let cached = |watcher: &Watcher| watcher.load.is_some_and(|load| load.cached_blocks == watcher.known.len() as u64);
    early.until(|early| cached(early) && early.load.is_some_and(|load| load.running == 0)).await;
    let mut late = Watcher::of(&cluster).await;
    late.until(cached).await;
    assert_eq!(late.known, early.known);
    let load = early.load.unwrap();
    assert!(load.prefill_tokens_per_second > 0.0 && load.step_seconds > 0.0 && load.waiting_tokens == 0, "{load:?}");
    cluster.assert_no_leak().await;
    drop((early, late));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_worker_tells_how_fast_it_hands_over() {
    let cluster = Cluster::with_decode().await;
    let prefill = cluster.add_prefill(config(), false).await;
    for golden in goldens().iter().filter(|golden| golden.prompt_ids.len() > 32).take(4) {
        cluster.answer(cluster.request(golden, vec![prefill.clone()])).await.unwrap();
    }
    let mut client = Cluster::client_of(&prefill.address).await;
    let request = v1::WatchRequest { protocol_version: PROTOCOL_VERSION };
    let stream = client.watch(request).await.unwrap().into_inner();
    let mut watcher = Watcher { stream, known: HashSet::new(), next: 0, load: None };
    watcher.until(|watcher| watcher.load.is_some_and(|load| load.handoff_bytes_per_second > 0.0)).await;
    assert!(watcher.known.len() > 4, "it has the prompts' blocks");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_of_another_version_is_refused() {
    let cluster = Cluster::with_decode().await;
    let mut client = cluster.decode_client().await;
    let refused = client.watch(v1::WatchRequest { protocol_version: PROTOCOL_VERSION + 1 }).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    cluster.stop().await;
}
