//! A hub over an engine that has nothing to do: what watchers hear is put in by hand.

use kvasir_engine::{CacheBatch, CacheEvent, RunnerSpec, ScriptedRunner};
use kvasir_types::{BlockHash, KvDtype, KvGroups, KvLayout, TokenId};

use super::*;

fn hub() -> Hub {
    let layout = KvLayout { block_size: 4, layers: 1, kv_heads: 1, k_dim: 2, v_dim: 2, dtype: KvDtype::Bf16 };
    let spec = RunnerSpec { vocab: 9, max_len: 48, eos: vec![TokenId(0)], groups: KvGroups::full(1) };
    let runner = Box::new(ScriptedRunner::new(spec, &layout));
    let (engine, _thread) = kvasir_engine::spawn(kvasir_engine::Config::default(), layout, 8, runner);
    Hub {
        engine,
        group: Group::of(&KvGroups::full(1)),
        changes: broadcast::Sender::new(CHANGES_KEPT),
        load: watch::Sender::new(v1::WorkerLoad::default()),
        watchers: Arc::new(Semaphore::new(MAX_WATCHERS)),
        arrived: Notify::new(),
        shutdown: Shutdown::new(),
    }
}

fn removed(first: u64) -> Arc<Changes> {
    let events = vec![CacheEvent::Removed(BlockHash([1; 16]))];
    Arc::new(Changes::of(CacheBatch { first, gap: false, events }).next().unwrap())
}

async fn next(from: &mut mpsc::Receiver<Result<v1::WatchEvent, Status>>) -> watch_event::Event {
    loop {
        match from.recv().await.unwrap().unwrap().event.unwrap() {
            watch_event::Event::Load(_) => {}
            event => return event,
        }
    }
}

#[tokio::test]
async fn whoever_does_not_read_begins_anew_and_nothing_piles_up() {
    let hub = Arc::new(hub());
    let (to, mut from) = mpsc::channel(IN_FLIGHT);
    let place = hub.admit().unwrap();
    let telling = {
        let hub = Arc::clone(&hub);
        async move { hub.tell(to, place).await }
    };
    let reading = async {
        let first = next(&mut from).await;
        assert!(matches!(first, watch_event::Event::Part(v1::CachePart { first: true, last: true, next: 0, .. })));
        // In order, while it keeps up.
        for number in 0..3 {
            hub.changes.send(removed(number)).unwrap();
            let watch_event::Event::Changes(changes) = next(&mut from).await else { panic!("a change was told") };
            assert_eq!((changes.first, changes.count, changes.removed.len()), (number, 1, 16));
        }
        // It reads nothing while many more happen than are kept.
        for number in 3..3 + 4 * CHANGES_KEPT as u64 {
            hub.changes.send(removed(number)).unwrap();
            tokio::task::yield_now().await;
        }
        assert!(from.len() <= IN_FLIGHT && hub.changes.len() <= CHANGES_KEPT);
        let mut changes = 0;
        while let watch_event::Event::Changes(_) = next(&mut from).await {
            changes += 1;
        }
        assert!(changes < 4 * CHANGES_KEPT, "the last one read was the first part of another snapshot");
        drop(from);
    };
    tokio::join!(telling, reading);
    assert_eq!(hub.watchers.available_permits(), MAX_WATCHERS, "its place is free again");
}

#[tokio::test]
async fn a_hole_in_the_numbers_is_another_snapshot() {
    let hub = Arc::new(hub());
    let (to, mut from) = mpsc::channel(IN_FLIGHT);
    let place = hub.admit().unwrap();
    let telling = {
        let hub = Arc::clone(&hub);
        async move { hub.tell(to, place).await }
    };
    let reading = async {
        assert!(matches!(next(&mut from).await, watch_event::Event::Part(_)));
        hub.changes.send(removed(5)).unwrap();
        assert!(matches!(next(&mut from).await, watch_event::Event::Part(v1::CachePart { first: true, .. })));
        hub.shutdown.trigger();
        while let Some(event) = from.recv().await {
            if let Err(status) = event {
                assert_eq!(status.code(), tonic::Code::Unavailable);
            }
        }
    };
    tokio::join!(telling, reading);
}

#[tokio::test]
async fn places_are_bounded() {
    let hub = hub();
    let places: Vec<_> = (0..MAX_WATCHERS).map(|_| hub.admit().unwrap()).collect();
    assert_eq!(hub.admit().unwrap_err().code(), tonic::Code::ResourceExhausted);
    drop(places);
    assert!(hub.admit().is_ok());
}
