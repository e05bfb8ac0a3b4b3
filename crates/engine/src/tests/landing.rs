//! A prompt's beginning is computed while peers write what comes behind it.

use kvasir_types::Sampling;

use super::rig::*;
use crate::{Command, Error, Mode, Progress};

const PROMPT: usize = 23;

/// A watched prompt of five blocks and a rest, held.
fn held(rig: &mut Rig, mode: Mode) -> (crate::SeqId, Client, Watch) {
    let (seq, client) = rig.admit(&prompt(1, PROMPT), Sampling { max_tokens: 3, ..greedy(3) }, mode);
    (seq, client, Watch::default())
}

/// Bytes of those blocks arrive.
fn land(rig: &Rig, client: &Client, blocks: std::ops::Range<usize>) {
    let tables = client.admission().unwrap().tables;
    rig.script.land(&tables, &prompt(1, PROMPT), blocks.start * BLOCK..blocks.end * BLOCK);
}

#[test]
fn what_landed_behind_the_beginning_is_not_computed() {
    for early in [false, true] {
        for landed in 3..=5 {
            let mut rig = Rig::new(64, config());
            let (seq, client, watch) = held(&mut rig, Mode::Generate);
            rig.engine.apply(Command::ComputeUntil(seq, Some(Box::new(watch.clone())), 3 * BLOCK));
            if early {
                rig.step(); // 8 of the first 12 tokens: what landed is told before computing has come to it
            } else {
                rig.settle();
                assert_eq!(rig.stats().prefilled_tokens, 12, "computing stops where a peer may be writing");
            }
            land(&rig, &client, 3..landed);
            rig.engine.apply(Command::Landed(seq, landed * BLOCK));
            assert_eq!(rig.step() == Progress::Idle, !early, "nobody said that nobody writes any more");
            rig.engine.apply(Command::Compute(seq, None));
            rig.settle();
            assert_eq!(rig.stats().prefilled_tokens as usize, PROMPT - (landed - 3) * BLOCK);
            assert_eq!(client.tokens(), rig.answer(&prompt(1, PROMPT), 3));
            let seen: Vec<_> = watch.chunks.lock().unwrap().iter().map(|(tokens, ..)| tokens.clone()).collect();
            assert_eq!((seen[0].clone(), seen[1].clone(), seen[2].start), (0..8, 8..12, landed * BLOCK));
            assert_eq!(rig.script.bad_reads(), 0);
            rig.assert_no_leak();
        }
    }
}

#[test]
fn what_did_not_land_is_computed() {
    let mut rig = Rig::new(64, config());
    let (seq, client, watch) = held(&mut rig, Mode::PrefillOnly);
    rig.engine.apply(Command::ComputeUntil(seq, Some(Box::new(watch)), 2 * BLOCK));
    rig.step();
    land(&rig, &client, 3..4); // without what comes before it, of no use
    rig.engine.apply(Command::Compute(seq, None));
    rig.settle();
    assert_eq!(rig.stats().prefilled_tokens as usize, PROMPT);
    assert_eq!(client.tokens(), rig.answer(&prompt(1, PROMPT), 1));
    rig.engine.apply(Command::Release(seq));
    rig.assert_no_leak();
}

#[test]
fn others_go_on_and_nobody_takes_the_blocks() {
    // Room for two, and the other one needs more than is left when its answer grows.
    let mut rig = Rig::new(12, config());
    let (seq, client, _) = held(&mut rig, Mode::Generate);
    rig.engine.apply(Command::ComputeUntil(seq, None, BLOCK));
    let (_, other) = rig.generate(&prompt(2, 9), 14);
    rig.settle();
    assert_eq!(other.tokens(), rig.answer(&prompt(2, 9), 14));
    assert_eq!((rig.stats().preemptions, rig.stats().running), (0, 1));
    land(&rig, &client, 1..5);
    rig.engine.apply(Command::Landed(seq, 5 * BLOCK));
    rig.engine.apply(Command::Compute(seq, None));
    rig.settle();
    assert_eq!(client.tokens(), rig.answer(&prompt(1, PROMPT), 3));
    assert_eq!(rig.script.bad_reads(), 0);
    rig.assert_no_leak();
}

#[test]
fn one_that_fails_keeps_its_blocks_until_its_caller_lets_go() {
    let mut rig = Rig::new(64, config());
    let (seq, client, watch) = held(&mut rig, Mode::PrefillOnly);
    rig.engine.apply(Command::ComputeUntil(seq, Some(Box::new(watch)), 2 * BLOCK));
    rig.script.fail_next_run();
    rig.settle();
    assert!(matches!(client.failed(), Some(Error::Runner(_))));
    assert_eq!(rig.stats().blocks.in_use, 6, "a peer may be writing into them");
    rig.engine.apply(Command::Abort(seq));
    rig.settle();
    rig.assert_no_leak();
}

#[test]
fn a_beginning_that_is_there_already_is_no_reason_to_compute() {
    let mut rig = Rig::new(64, config());
    let (_, first) = rig.generate(&prompt(1, PROMPT), 1);
    rig.settle();
    let (seq, client, watch) = held(&mut rig, Mode::Generate);
    rig.engine.apply(Command::ComputeUntil(seq, Some(Box::new(watch)), 3 * BLOCK));
    rig.settle();
    assert_eq!((rig.stats().held, client.admission().unwrap().cached_tokens), (1, 5 * BLOCK));
    rig.engine.apply(Command::Compute(seq, None));
    rig.settle();
    assert_eq!(client.tokens()[..1], first.tokens());
    rig.assert_no_leak();
}
