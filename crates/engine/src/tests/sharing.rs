//! What several sequences begin with is computed once: prompts that arrive together, and choices.

use std::sync::{Arc, Mutex};

use kvasir_types::{Sampling, TokenId};

use super::rig::*;
use crate::{Command, Config, Error, Event, Mode, Request, SeqId, choice_seed};

/// Two prompts of 22 and 23 tokens with the first 18 in common.
fn alike() -> [Vec<TokenId>; 2] {
    let common = prompt(3, 18);
    [[&common[..], &prompt(1, 4)].concat(), [&common[..], &prompt(2, 5)].concat()]
}

#[test]
fn prompts_that_arrive_together_compute_their_common_beginning_once() {
    let mut rig = Rig::new(64, config());
    let prompts = alike();
    let clients: Vec<_> = prompts.iter().map(|prompt| rig.generate(prompt, 4).1).collect();
    rig.settle();
    // Four whole blocks are common.
    assert_eq!((rig.stats().prefilled_tokens, rig.stats().shared_tokens), (22 + 23 - 16, 16));
    for (prompt, client) in prompts.iter().zip(clients) {
        assert_eq!(client.tokens(), rig.answer(prompt, 4));
    }
    rig.assert_no_leak();
}

#[test]
fn what_is_shared_takes_blocks_once() {
    // Each alone needs 6 or 7 of 11 blocks.
    let mut rig = Rig::new(11, config());
    let prompts = alike();
    let clients: Vec<_> = prompts.iter().map(|prompt| rig.generate(prompt, 2).1).collect();
    rig.settle();
    for (prompt, client) in prompts.iter().zip(clients) {
        assert_eq!(client.tokens(), rig.answer(prompt, 2));
    }
    rig.assert_no_leak();
}

#[test]
fn a_prompt_that_comes_while_another_is_computed_joins_it() {
    let mut rig = Rig::new(64, config());
    let [first, second] = alike();
    rig.generate(&first, 1);
    rig.step(); // 8 of 22 tokens
    let (_, client) = rig.generate(&second, 3);
    rig.settle();
    assert_eq!(client.admission().unwrap().cached_tokens, 8);
    assert_eq!(rig.stats().prefilled_tokens, 22 + 23 - 16);
    assert_eq!(client.tokens(), rig.answer(&second, 3));
}

#[test]
fn whoever_waits_goes_on_alone_if_the_other_ends() {
    for steps in 0..4 {
        let mut rig = Rig::new(64, config());
        let [first, second] = alike();
        let (seq, _) = rig.generate(&first, 5);
        let (_, client) = rig.generate(&second, 3);
        for _ in 0..steps {
            rig.step();
        }
        rig.engine.apply(Command::Abort(seq));
        rig.settle();
        assert_eq!(client.tokens(), rig.answer(&second, 3));
        rig.assert_no_leak();
    }
}

#[test]
fn a_watched_prompt_keeps_its_blocks_and_hears_of_all_of_them() {
    let mut rig = Rig::new(64, config());
    let [first, second] = alike();
    let (_, other) = rig.generate(&first, 3);
    let (seq, client) = rig.try_admit(request(&second, greedy(1), Mode::PrefillOnly)).unwrap();
    let watch = Watch::default();
    rig.engine.apply(Command::Compute(seq, Some(Box::new(watch.clone()))));
    rig.settle();
    assert_eq!(rig.stats().shared_tokens, 16);
    let table = &client.admission().unwrap().tables[0];
    let chunks = watch.chunks.lock().unwrap();
    let mut next = 0;
    for (tokens, first_block, blocks) in chunks.iter() {
        assert_eq!((tokens.start, *first_block), (next, next / BLOCK));
        assert_eq!(blocks[..], table[next / BLOCK..tokens.end.div_ceil(BLOCK)]);
        next = tokens.end;
    }
    assert_eq!(next, 23);
    // What it was told of is what is there.
    let read = Rig::new(64, config());
    for (index, &block) in table.iter().enumerate() {
        read.script.copy_block(&rig.script, block, kvasir_types::BlockId(index as u32));
    }
    assert_eq!(client.tokens(), rig.answer(&second, 1));
    assert_eq!(other.tokens(), rig.answer(&first, 3));
    rig.engine.apply(Command::Release(seq));
    rig.assert_no_leak();
}

#[test]
fn without_a_prefix_cache_everybody_computes_at_once() {
    let mut rig = Rig::new(64, Config { prefix_cache: false, ..config() });
    let prompts = alike();
    let clients: Vec<_> = prompts.iter().map(|prompt| rig.generate(prompt, 4).1).collect();
    rig.settle();
    assert_eq!((rig.stats().prefilled_tokens, rig.stats().shared_tokens), (22 + 23, 0));
    for (prompt, client) in prompts.iter().zip(clients) {
        assert_eq!(client.tokens(), rig.answer(prompt, 4));
    }
}

fn warm(max_tokens: u32) -> Sampling {
    Sampling { temperature: 1.3, top_p: 0.9, seed: 5, frequency_penalty: 0.4, ..greedy(max_tokens) }
}

fn ask(rig: &mut Rig, prompt: &[TokenId], sampling: &Sampling, choices: u32) -> (SeqId, Client) {
    rig.try_admit(Request { choices, ..request(prompt, sampling.clone(), Mode::Generate) }).unwrap()
}

fn check_choices(rig: &Rig, client: &Client, prompt: &[TokenId], sampling: &Sampling, choices: u32) {
    for choice in 0..choices {
        let own = Sampling { seed: choice_seed(sampling.seed, choice), ..sampling.clone() };
        let answer = rig.script.answer(prompt, &own, sampling.max_tokens as usize);
        assert_eq!(client.choice(choice), answer, "choice {choice}");
    }
    let left = |event| match event {
        Event::Finished { left, .. } => Some(left),
        _ => None,
    };
    let left: Vec<_> = client.events().into_iter().filter_map(left).collect();
    assert_eq!(left, (0..choices).rev().collect::<Vec<_>>());
}

#[test]
fn choices_are_answered_as_if_each_had_been_asked_alone() {
    for blocks in [64, 30, 13, 11, 9] {
        for len in [16, 13, 18] {
            for prefix_cache in [true, false] {
                let mut rig = Rig::new(blocks, Config { max_running: 4, prefix_cache, ..config() });
                let (seq, client) = ask(&mut rig, &prompt(1, len), &warm(14), 4);
                rig.engine.apply(Command::Compute(seq, None));
                rig.settle();
                check_choices(&rig, &client, &prompt(1, len), &warm(14), 4);
                rig.assert_no_leak();
            }
        }
    }
}

#[test]
fn choices_share_the_prompts_blocks_and_its_computation() {
    for prefix_cache in [true, false] {
        let mut rig = Rig::new(64, Config { prefix_cache, ..config() });
        let (seq, client) = ask(&mut rig, &prompt(1, 18), &warm(6), 4);
        rig.engine.apply(Command::Compute(seq, None));
        while rig.stats().forks == 0 {
            rig.step();
        }
        // Four whole blocks together, and the begun one of each.
        let stats = rig.stats();
        assert_eq!((stats.forks, stats.running, stats.prefilled_tokens), (3, 4, 18));
        assert_eq!((stats.blocks.in_use, stats.blocks.shared), (4 + 4, 4));
        rig.settle();
        assert_eq!(rig.stats().prefilled_tokens, 18);
        check_choices(&rig, &client, &prompt(1, 18), &warm(6), 4);
        rig.assert_no_leak();
    }
}

#[test]
fn more_choices_than_places_take_turns() {
    let mut rig = Rig::new(64, Config { max_running: 2, ..config() });
    let (seq, client) = ask(&mut rig, &prompt(1, 10), &warm(8), 5);
    rig.engine.apply(Command::Compute(seq, None));
    rig.settle();
    check_choices(&rig, &client, &prompt(1, 10), &warm(8), 5);
    assert_eq!((rig.stats().forks, rig.stats().finished), (1, 1));
    rig.assert_no_leak();
}

#[test]
fn choices_of_a_landed_prompt_compute_its_last_token_again() {
    for len in [14, 16, 17] {
        let mut rig = Rig::new(32, config());
        let prompt = prompt(4, len);
        let (seq, client) = ask(&mut rig, &prompt, &warm(5), 3);
        rig.step();
        rig.script.land(&client.admission().unwrap().tables, &prompt, 0..len);
        rig.engine.apply(Command::Landed(seq, len));
        let first = rig.script.answer(&prompt, &warm(5), 1)[0];
        rig.engine.apply(Command::Resume(seq, first));
        rig.settle();
        assert_eq!(rig.stats().prefilled_tokens, 2);
        // The first choice's first token was told by somebody else.
        assert_eq!([&[first], &client.choice(0)[..]].concat(), rig.script.answer(&prompt, &warm(5), 5));
        for choice in 1..3 {
            let own = Sampling { seed: choice_seed(5, choice), ..warm(5) };
            assert_eq!(client.choice(choice), rig.script.answer(&prompt, &own, 5), "choice {choice}");
        }
        assert!(matches!(client.events().last(), Some(Event::Finished { left: 0, .. })));
        rig.assert_no_leak();
    }
}

#[test]
fn an_abort_drops_every_choice_and_a_failure_is_told_once() {
    for steps in 0..9 {
        let mut rig = Rig::new(32, Config { max_running: 2, ..config() });
        let (seq, client) = ask(&mut rig, &prompt(1, 10), &warm(4), 3);
        rig.engine.apply(Command::Compute(seq, None));
        for _ in 0..steps {
            rig.step();
        }
        if steps % 2 == 0 {
            rig.engine.apply(Command::Abort(seq));
            rig.assert_no_leak();
        } else {
            rig.script.fail_next_run();
            rig.settle();
            assert!(matches!(client.failed(), Some(Error::Runner(_))));
            assert_eq!(client.events().iter().filter(|event| matches!(event, Event::Failed(_))).count(), 1);
            rig.assert_no_leak();
        }
    }
}

#[test]
fn no_choice_or_too_many_are_refused() {
    let mut rig = Rig::new(32, config());
    for choices in [0, crate::MAX_CHOICES + 1] {
        let rejected = rig.try_admit(Request { choices, ..request(&prompt(1, 5), greedy(1), Mode::Generate) });
        assert!(matches!(rejected.err().unwrap().error, Error::BadChoices { .. }));
    }
}

#[test]
fn a_sink_that_panics_at_what_was_taken_over_loses_its_own_sequence_only() {
    struct Panics(Arc<Mutex<usize>>);
    impl crate::LayerSink for Panics {
        fn layer_done(&mut self, _: crate::LayerDone<'_>) {
            *self.0.lock().unwrap() += 1;
            panic!("a layer sink's bug");
        }
    }
    let mut rig = Rig::new(64, config());
    let [first, second] = alike();
    let (_, other) = rig.generate(&first, 3);
    let (seq, client) = rig.try_admit(request(&second, greedy(1), Mode::PrefillOnly)).unwrap();
    let calls = Arc::default();
    rig.engine.apply(Command::Compute(seq, Some(Box::new(Panics(Arc::clone(&calls))))));
    rig.settle();
    assert!(matches!(client.failed(), Some(Error::SinkPanicked)));
    assert_eq!((*calls.lock().unwrap(), rig.stats().shared_tokens), (1, 8));
    assert_eq!(other.tokens(), rig.answer(&first, 3));
    rig.assert_no_leak();
}
