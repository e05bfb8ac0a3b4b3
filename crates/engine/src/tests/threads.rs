//! The engine on its thread: handles, sinks that use handles, shutdown, a full channel.

use std::{
    sync::mpsc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kvasir_model::{Logits, SeqInput};
use kvasir_types::{BlockHash, BlockId};

use super::rig::*;
use crate::{
    Command, Config, Error, Event, Handle, LayerDone, LayerSink, Mode, PrefillTimes, Runner, RunnerSpec, Script,
    ScriptedRunner, SeqId, spawn,
};

const SOON: Duration = Duration::from_secs(20);

fn start(blocks: usize, config: Config) -> (Handle, JoinHandle<()>, Script) {
    let runner = runner();
    let script = runner.script();
    let (handle, thread) = spawn(config, layout(), blocks, Box::new(runner));
    (handle, thread, script)
}

fn ask(handle: &Handle, name: u32, max_tokens: u32) -> (SeqId, mpsc::Receiver<Event>) {
    let (tell, hear) = mpsc::channel();
    let sink = Box::new(move |event| drop(tell.send(event)));
    (handle.admit(request(&prompt(name, 9), greedy(max_tokens), Mode::Generate), sink).unwrap(), hear)
}

/// Whether it comes, before the sink is gone or the patience is.
fn hears(hear: &mpsc::Receiver<Event>, wanted: impl Fn(&Event) -> bool) -> bool {
    std::iter::from_fn(|| hear.recv_timeout(SOON).ok()).any(|event| wanted(&event))
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let limit = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < limit, "waited too long until {what}");
        std::thread::yield_now();
    }
}

fn join(thread: JoinHandle<()>) {
    until("the thread ends", || thread.is_finished());
    thread.join().unwrap();
}

#[test]
fn many_callers_get_their_own_answers() {
    let (handle, thread, script) = start(24, Config { max_waiting: 64, ..config() });
    let callers: Vec<_> = (0..16u32)
        .map(|name| {
            let (handle, script) = (handle.clone(), script.clone());
            std::thread::spawn(move || {
                let (seq, hear) = ask(&handle, name % 5, 12);
                assert!(matches!(hear.recv_timeout(SOON), Ok(Event::Admitted(_))));
                handle.compute(seq, None);
                let expected = script.answer(&prompt(name % 5, 9), &greedy(1), 12);
                for token in expected {
                    assert!(
                        matches!(hear.recv_timeout(SOON), Ok(Event::Token { sampled, .. }) if sampled.token == token)
                    );
                }
                assert!(matches!(hear.recv_timeout(SOON), Ok(Event::Finished { .. })));
            })
        })
        .collect();
    callers.into_iter().for_each(|caller| caller.join().unwrap());
    until("all is given back", || handle.stats().finished == 16 && handle.stats().blocks.in_use == 0);
    assert_eq!(handle.stats().waiting, 0);
    drop(handle);
    join(thread);
}

#[test]
fn the_thread_bears_its_name_and_ends_with_its_last_handle() {
    let (handle, thread, _) = start(8, config());
    assert_eq!(thread.thread().name(), Some("engine"));
    let (_, hear) = ask(&handle, 1, 3);
    assert!(matches!(hear.recv_timeout(SOON), Ok(Event::Admitted(_))));
    drop(handle.clone());
    drop(handle);
    assert!(matches!(hear.recv_timeout(SOON), Ok(Event::Failed(Error::Closed))));
    join(thread);
}

#[test]
fn after_a_shutdown_everybody_is_told_and_nobody_is_taken() {
    let (handle, thread, _) = start(8, config());
    let (_, held) = ask(&handle, 1, 3);
    handle.shutdown();
    assert!(hears(&held, |event| matches!(event, Event::Failed(Error::Closed))));
    let refused = handle.admit(request(&prompt(1, 4), greedy(1), Mode::Generate), Client::default().sink());
    assert!(matches!(refused.unwrap_err().error, Error::Closed));
    join(thread);
    handle.abort(SeqId(0));
    handle.shutdown();
    assert_eq!(handle.stats().blocks.in_use, 0);
}

/// Starts and aborts from inside: the sink of each sequence commands the engine that calls it.
#[test]
fn a_sink_may_command_the_engine_that_calls_it() {
    let (handle, thread, script) = start(24, config());
    let (tell, hear) = mpsc::channel();
    let (inner, mut seq) = (handle.clone(), None);
    let (tell_seq, hear_seq) = mpsc::channel();
    let sink = Box::new(move |event: Event| {
        let seq = *seq.get_or_insert_with(|| hear_seq.recv().unwrap());
        match &event {
            // Far more than the channel holds.
            Event::Admitted(_) => (0..10_000).for_each(|_| inner.landed(seq, 0)),
            Event::Token { .. } => inner.abort(SeqId(u64::MAX)),
            _ => {}
        }
        if matches!(event, Event::Admitted(_)) {
            inner.compute(seq, None);
        }
        drop(tell.send(event));
    });
    let seq = handle.admit(request(&prompt(1, 9), greedy(4), Mode::Generate), sink).unwrap();
    tell_seq.send(seq).unwrap();
    drop(handle);
    let events: Vec<_> = std::iter::from_fn(|| hear.recv_timeout(SOON).ok()).collect();
    let told = events.iter().filter_map(|event| match event {
        Event::Token { sampled, .. } => Some(sampled.token),
        _ => None,
    });
    assert_eq!(told.collect::<Vec<_>>(), script.answer(&prompt(1, 9), &greedy(1), 4));
    join(thread);
}

/// Stays in its first step until told to go on.
struct Stuck(ScriptedRunner, mpsc::Receiver<()>);

impl Runner for Stuck {
    fn spec(&self) -> &RunnerSpec {
        self.0.spec()
    }

    fn run(&mut self, batch: &[SeqInput<'_>], layer: &mut dyn FnMut(usize)) -> Result<Logits, kvasir_model::Error> {
        let _ = self.1.recv();
        self.0.run(batch, layer)
    }

    fn copy_blocks(&mut self, _: &[(BlockId, BlockId)]) -> Result<(), kvasir_model::Error> {
        unreachable!("nothing is forked here")
    }
}

#[test]
fn a_full_channel_refuses_requests_and_delays_the_rest() {
    let (go, stuck) = mpsc::channel();
    let config = Config { max_running: 1, max_waiting: 1, max_waiting_offline: 1, ..config() };
    let (handle, thread) = spawn(config, layout(), 24, Box::new(Stuck(runner(), stuck)));
    let (seq, hear) = ask(&handle, 1, 2);
    handle.compute(seq, None);
    assert!(matches!(hear.recv_timeout(SOON), Ok(Event::Admitted(_))));
    let flood = {
        let handle = handle.clone();
        std::thread::spawn(move || (0..1000).for_each(|_| handle.abort(SeqId(u64::MAX))))
    };
    until("the channel is full", || handle.channel_is_full());
    let refused = handle.admit(request(&prompt(1, 4), greedy(1), Mode::Generate), Client::default().sink());
    assert!(matches!(refused.unwrap_err().error, Error::QueueFull { .. }));
    assert_eq!(handle.stats().waiting, 0, "a refused request keeps no place");
    drop(go);
    flood.join().unwrap();
    until("the answer is there", || handle.stats().finished == 1);
    drop((handle, hear));
    join(thread);
}

/// Notes which blocks landed; its device is lost.
struct Lost(ScriptedRunner, mpsc::Sender<Vec<BlockId>>);

impl Runner for Lost {
    fn spec(&self) -> &RunnerSpec {
        self.0.spec()
    }

    fn run(&mut self, _: &[SeqInput<'_>], _: &mut dyn FnMut(usize)) -> Result<Logits, kvasir_model::Error> {
        Err(kvasir_model::Error::Device { device: "cuda:0".into(), call: "cuLaunchKernel", reason: "lost".into() })
    }

    fn copy_blocks(&mut self, _: &[(BlockId, BlockId)]) -> Result<(), kvasir_model::Error> {
        unreachable!("nothing is forked here")
    }

    fn landed(&mut self, blocks: &[BlockId]) -> Result<(), kvasir_model::Error> {
        self.1.send(blocks.to_vec()).unwrap();
        Ok(())
    }
}

#[test]
fn a_runner_hears_what_landed_before_it_runs_and_nobody_is_let_in_once_its_device_is_lost() {
    let (tell, landed) = mpsc::channel();
    let (handle, thread) = spawn(config(), layout(), 24, Box::new(Lost(runner(), tell)));
    let (seq, hear) = ask(&handle, 1, 2);
    let Ok(Event::Admitted(admission)) = hear.recv_timeout(SOON) else { panic!("it is admitted") };
    handle.landed(seq, 2 * BLOCK);
    handle.compute(seq, None);
    assert!(hears(&hear, |event| matches!(event, Event::Failed(Error::Runner(error)) if error.is_fatal())));
    assert_eq!(landed.recv_timeout(SOON).unwrap(), admission.tables[0][..2]);
    until("it says so", || handle.stats().broken);
    let refused = handle.admit(request(&prompt(1, 4), greedy(1), Mode::Generate), Client::default().sink());
    assert!(matches!(refused.unwrap_err().error, Error::Closed));
    drop(handle);
    join(thread);
}

#[test]
fn a_broken_step_does_not_end_the_thread() {
    struct Broken;
    impl LayerSink for Broken {
        fn layer_done(&mut self, _: LayerDone<'_>) {
            panic!("a sink's bug");
        }
    }
    let (handle, thread, script) = start(24, config());
    script.panic_in_next_run();
    let (seq, hear) = ask(&handle, 1, 2);
    handle.compute(seq, None);
    assert!(hears(&hear, |event| matches!(event, Event::Failed(Error::RunnerBroken { .. }))));
    let (seq, hear) = ask(&handle, 1, 2);
    handle.compute(seq, Some(Box::new(Broken)));
    assert!(hears(&hear, |event| matches!(event, Event::Failed(Error::SinkPanicked))));
    let (seq, hear) = ask(&handle, 1, 2);
    handle.compute(seq, None);
    assert!(hears(&hear, |event| matches!(event, Event::Finished { .. })));
    drop(handle);
    join(thread);
}

#[test]
fn commands_may_cross_threads() {
    fn sendable<T: Send>() {}
    sendable::<Command>();
    sendable::<crate::Engine>();
}

#[test]
fn pinned_blocks_stay_as_they_are_until_nobody_reads_them() {
    let (handle, thread, _script) = start(6, config());
    let asked = |name: u32| {
        let root = request(&prompt(name, 9), greedy(1), Mode::Generate).root;
        let first = root.extend(&prompt(name, 9)[..BLOCK]);
        vec![first, first.extend(&prompt(name, 9)[BLOCK..2 * BLOCK])]
    };
    let pin = |hashes: Vec<BlockHash>| {
        let (tell, hear) = mpsc::channel();
        handle.pin(hashes, move |pinned| drop(tell.send(pinned)));
        hear.recv_timeout(SOON).unwrap()
    };
    let run = |name: u32| {
        let (seq, hear) = ask(&handle, name, 1);
        handle.compute(seq, None);
        assert!(hears(&hear, |event| matches!(event, Event::Finished { .. })));
    };
    run(1);
    let pinned = pin([asked(1), asked(2)].concat());
    let [Some(first), Some(second), None, None] = pinned.blocks()[..] else { panic!("{:?}", pinned.blocks()) };
    assert_ne!(first, second);
    // Others need all there is: four blocks are left for them, three at a time.
    (2..6).for_each(run);
    assert_eq!(pin(asked(1)).blocks(), [Some(first), Some(second)], "they were taken while they were pinned");
    assert_eq!(handle.stats().blocks.in_use, 2);
    drop(pinned);
    (6..9).for_each(run);
    assert_eq!(pin(asked(1)).blocks(), [None, None], "nobody held them");
    until("all blocks are free or cached", || {
        handle.pin(Vec::new(), drop); // a step, so that the statistics are of now
        handle.stats().blocks.in_use == 0
    });
    handle.shutdown();
    join(thread);
}

#[test]
fn prompts_and_answers_are_timed_apart() {
    let (handle, thread, _script) = start(24, config());
    let (seq, hear) = ask(&handle, 1, 6);
    assert_eq!(handle.stats().prefill, PrefillTimes::default());
    handle.compute(seq, None);
    assert!(hears(&hear, |event| matches!(event, Event::Finished { .. })));
    until("the last step is over", || handle.stats().sampled_tokens == 6);
    let prefill = handle.stats().prefill;
    // A chunk of eight tokens; the ninth was alone, like those of the answer.
    assert_eq!((prefill.tokens, prefill.positions), (8, (0..8).sum::<u64>()));
    assert!(prefill.time > Duration::ZERO);
    // The first token came with the prompt's last.
    let decode = handle.stats().decode;
    assert!(decode.steps == 5 && decode.time > Duration::ZERO, "{decode:?}");
    // The prompt's nine tokens and the first one, then one more each time.
    let plain = decode.plain;
    assert_eq!((plain.steps, plain.answers, plain.context), (5, 5, (10..15).sum::<u64>()));
    assert!(plain.time == decode.time && handle.stats().prefilled_prompts == 1);
    handle.shutdown();
    join(thread);
}
