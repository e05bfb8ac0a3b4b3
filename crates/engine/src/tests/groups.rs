//! Models whose layers look back differently: sliding windows beside full attention.

use kvasir_types::{BlockId, GroupKind, KvGroups};

use super::rig::*;
use crate::{Command, Config, Error, Mode};

const WINDOW: GroupKind = GroupKind::Sliding { window: 9 };

fn sliding() -> KvGroups {
    KvGroups::of_layers(&[WINDOW; LAYERS])
}

fn mixed() -> KvGroups {
    KvGroups::of_layers(&[GroupKind::Full, WINDOW, WINDOW])
}

#[test]
fn a_prompt_longer_than_the_pool_runs_if_its_window_fits() {
    // 40 tokens are 10 blocks; a window of 9 and a chunk of 8 are 5.
    let long = prompt(1, 40);
    let mut rig = Rig::with_groups(5, config(), sliding());
    let (_, client) = rig.generate(&long, 8);
    rig.settle();
    assert_eq!(client.tokens(), rig.answer(&long, 8));
    rig.assert_no_leak();
    let mut full = Rig::new(5, config());
    let refused = full.try_admit(request(&long, greedy(8), Mode::Generate)).err().unwrap();
    assert!(matches!(refused.error, Error::PromptExceedsPool { needed: 11, blocks: 5, .. }));
    let mut short = Rig::with_groups(4, config(), sliding());
    let refused = short.try_admit(request(&long, greedy(8), Mode::Generate)).err().unwrap();
    assert!(matches!(refused.error, Error::PromptExceedsPool { needed: 5, blocks: 4, .. }));
}

#[test]
fn blocks_leave_with_the_window_as_the_answer_grows() {
    let mut rig = Rig::with_groups(20, Config { prefix_cache: false, ..config() }, sliding());
    let (_, client) = rig.generate(&prompt(1, 6), 30);
    while client.finished().is_none() {
        rig.step();
        // The window and its neighbour, and a chunk's blocks before the first token.
        let limit = if client.tokens().is_empty() { 5 } else { 4 };
        assert!(rig.stats().blocks.in_use <= limit, "{:?} after {}", rig.stats().blocks, client.tokens().len());
    }
    assert_eq!(client.tokens(), rig.answer(&prompt(1, 6), 30));
    rig.assert_no_leak();
}

#[test]
fn a_prefix_is_found_if_every_group_has_what_it_needs() {
    for (groups, pool) in [(sliding(), 40), (mixed(), 60)] {
        let mut rig = Rig::with_groups(pool, config(), groups);
        let long = prompt(3, 30);
        rig.generate(&long, 1);
        rig.settle();
        let computed = rig.stats().prefilled_tokens;
        let mut other = long[..26].to_vec();
        other.extend(prompt(9, 4));
        let (seq, client) = rig.admit(&other, greedy(6), Mode::Generate);
        assert_eq!(client.admission().unwrap().cached_tokens, 24);
        rig.engine.apply(Command::Compute(seq, None));
        rig.settle();
        assert_eq!(rig.stats().prefilled_tokens - computed, 6);
        assert_eq!(client.tokens(), rig.answer(&other, 6));
        rig.assert_no_leak();
    }
}

#[test]
fn only_what_the_window_sees_has_to_land() {
    for groups in [sliding(), mixed()] {
        let mut rig = Rig::with_groups(40, config(), groups.clone());
        let prompt = prompt(4, 27);
        let (seq, client) = rig.admit(&prompt, greedy(7), Mode::Generate);
        let tables = client.admission().unwrap().tables;
        assert_eq!(tables.len(), groups.len());
        for (group, table) in groups.iter().zip(&tables) {
            // The last prompt token, at 26, sees 18..=26.
            let gone = if group.kind == GroupKind::Full { 0 } else { 18 / BLOCK };
            assert_eq!(table.len(), 7);
            assert!(table[..gone].iter().all(|&block| block == BlockId::GONE));
            assert!(table[gone..].iter().all(|&block| block != BlockId::GONE));
        }
        rig.script.land(&tables, &prompt, 0..27);
        rig.engine.apply(Command::Landed(seq, 27));
        rig.engine.apply(Command::Resume(seq, rig.answer(&prompt, 1)[0]));
        rig.settle();
        assert_eq!(client.tokens(), rig.answer(&prompt, 7)[1..]);
        assert_eq!(rig.stats().prefilled_tokens, 0);
        rig.assert_no_leak();
    }
}

#[test]
fn a_landing_that_leaves_out_the_window_is_computed_instead() {
    let mut rig = Rig::with_groups(40, config(), mixed());
    let prompt = prompt(4, 27);
    let (seq, client) = rig.admit(&prompt, greedy(7), Mode::Generate);
    rig.script.land(&client.admission().unwrap().tables, &prompt, 0..16);
    rig.engine.apply(Command::Landed(seq, 16));
    assert_eq!(rig.stats().landed_tokens, 0);
    rig.engine.apply(Command::Compute(seq, None));
    rig.settle();
    assert_eq!(client.tokens(), rig.answer(&prompt, 7));
    assert_eq!(rig.stats().prefilled_tokens, 27);
    rig.assert_no_leak();
}

#[test]
fn sinks_hear_of_each_layer_with_the_blocks_of_its_group() {
    struct Sees(std::sync::mpsc::Sender<(usize, usize, usize, Vec<BlockId>)>);
    impl crate::LayerSink for Sees {
        fn layer_done(&mut self, done: crate::LayerDone<'_>) {
            self.0.send((done.layer, done.group, done.place, done.blocks.to_vec())).unwrap();
        }
    }
    let mut rig = Rig::with_groups(40, config(), mixed());
    let (seq, client) = rig.admit(&prompt(1, 6), greedy(1), Mode::PrefillOnly);
    let (tell, hear) = std::sync::mpsc::channel();
    rig.engine.apply(Command::Compute(seq, Some(Box::new(Sees(tell)))));
    rig.settle();
    let heard: Vec<_> = hear.try_iter().collect();
    assert_eq!(heard.len(), LAYERS);
    let table = client.admission().unwrap().tables[0].clone();
    assert_eq!(heard[0], (0, 0, 0, table));
    for (layer, group, place, blocks) in &heard[1..] {
        assert_eq!((*group, *place), mixed().place(*layer));
        assert_eq!(blocks.len(), 2);
        assert!(*group > 0 && !blocks.contains(&BlockId::GONE));
    }
}
