//! One law a test, on the pure engine.

use std::sync::{Arc, Mutex};

use kvasir_model::{Logits, SeqInput};
use kvasir_types::{BlockHash, FinishReason, ModelFingerprint, Sampling, TokenId};

use super::rig::*;
use crate::{Command, Config, Engine, Error, Event, LayerDone, Mode, Progress, Request, Runner, RunnerSpec};

#[test]
fn answers_do_not_depend_on_who_else_is_in_the_batch() {
    let mut rig = Rig::new(64, config());
    let prompts: Vec<_> = (0..4).map(|name| prompt(name, 3 + 5 * name as usize)).collect();
    let clients: Vec<_> = prompts.iter().map(|prompt| rig.generate(prompt, 9).1).collect();
    rig.settle();
    for (prompt, client) in prompts.iter().zip(clients) {
        assert_eq!(client.tokens(), rig.answer(prompt, 9));
        assert_eq!(client.finished(), Some(FinishReason::Length));
    }
    rig.assert_no_leak();
}

#[test]
fn an_end_token_ends_the_answer_and_is_told() {
    let mut rig = Rig::new(64, config());
    // Some prompt meets the end token early; the script knows which.
    let (prompt, answer) = (0..)
        .map(|name| prompt(name, 6))
        .map(|prompt| (prompt.clone(), rig.answer(&prompt, 12)))
        .find(|(_, answer)| answer.contains(&EOS))
        .unwrap();
    let end = answer.iter().position(|&token| token == EOS).unwrap();
    let sampling = Sampling { max_tokens: 30, ..Sampling::default() };
    let (seq, client) = rig.admit(&prompt, sampling, Mode::Generate);
    rig.engine.apply(Command::Compute(seq, None));
    rig.settle();
    assert_eq!(client.tokens(), answer[..=end]);
    assert_eq!(client.finished(), Some(FinishReason::Stop));
    rig.assert_no_leak();
}

#[test]
fn stop_tokens_hold_even_where_end_tokens_are_ignored() {
    let mut rig = Rig::new(64, config());
    let prompt = prompt(1, 6);
    let answer = rig.answer(&prompt, 3);
    let sampling = Sampling { stop_token_ids: vec![answer[2]], ..greedy(20) };
    let (seq, client) = rig.admit(&prompt, sampling, Mode::Generate);
    rig.engine.apply(Command::Compute(seq, None));
    rig.settle();
    let end = answer.iter().position(|token| *token == answer[2]).unwrap();
    assert_eq!(client.tokens(), answer[..=end]);
    assert_eq!(client.finished(), Some(FinishReason::Stop));
}

#[test]
fn what_can_never_run_is_refused_at_once_and_comes_back() {
    let mut rig = Rig::new(4, config());
    let mut refuse = |prompt: &[TokenId], mode| {
        let rejected = rig.try_admit(request(prompt, greedy(1), mode)).err().unwrap();
        assert_eq!(*rejected.request.prompt, *prompt);
        rejected.error
    };
    assert!(matches!(refuse(&[], Mode::Generate), Error::EmptyPrompt));
    assert!(matches!(refuse(&prompt(0, MAX_LEN), Mode::Generate), Error::PromptTooLong { tokens: 48, max_len: 48 }));
    // 16 tokens fill the pool: a prefill fits, an answer does not.
    let whole_pool = prompt(0, 16);
    let error = refuse(&whole_pool, Mode::Generate);
    assert!(matches!(error, Error::PromptExceedsPool { tokens: 16, needed: 5, blocks: 4 }), "{error}");
    assert!(matches!(refuse(&[TokenId(61)], Mode::Generate), Error::UnknownToken { .. }));
    let (seq, _) = rig.admit(&whole_pool, greedy(1), Mode::PrefillOnly);
    rig.engine.apply(Command::Release(seq));
    rig.assert_no_leak();
}

#[test]
fn the_queue_is_bounded_and_a_place_comes_back() {
    let mut rig = Rig::new(16, Config { max_running: 1, ..config() });
    let (held, _) = rig.admit(&prompt(0, 4), greedy(1), Mode::Generate);
    let waiting: Vec<_> = (0..4).map(|_| rig.admit(&prompt(0, 4), greedy(1), Mode::Generate).0).collect();
    let refused = rig.try_admit(request(&prompt(0, 4), greedy(1), Mode::Generate)).err().unwrap();
    assert!(matches!(refused.error, Error::QueueFull { limit: 4 }));
    rig.engine.apply(Command::Abort(waiting[2]));
    assert!(rig.try_admit(*refused.request).is_ok());
    for seq in std::iter::once(held).chain(waiting) {
        rig.engine.apply(Command::Abort(seq));
    }
    rig.settle();
    let last = rig.stats();
    assert_eq!((last.held, last.waiting), (1, 0));
}

#[test]
fn requests_are_admitted_in_order_even_if_a_later_one_would_fit() {
    let mut rig = Rig::new(8, config());
    let (first, _) = rig.admit(&prompt(0, 20), greedy(1), Mode::Generate); // 6 of 8 blocks
    let (_, large) = rig.admit(&prompt(1, 12), greedy(1), Mode::Generate); // 4
    let (_, small) = rig.admit(&prompt(2, 2), greedy(1), Mode::Generate); // 1
    assert!(large.admission().is_none() && small.admission().is_none());
    rig.engine.apply(Command::Abort(first));
    rig.settle();
    assert!(large.admission().is_some() && small.admission().is_some());
}

#[test]
fn a_cached_prefix_is_shared_and_only_the_rest_is_computed() {
    let mut rig = Rig::new(64, config());
    let long = prompt(3, 18);
    rig.generate(&long, 1);
    rig.settle();
    let computed = rig.stats().prefilled_tokens;
    let mut other = long[..14].to_vec();
    other.extend(prompt(9, 3));
    let (seq, client) = rig.admit(&other, greedy(2), Mode::Generate);
    assert_eq!(client.admission().unwrap().cached_tokens, 12);
    rig.engine.apply(Command::Compute(seq, None));
    rig.settle();
    assert_eq!(rig.stats().prefilled_tokens - computed, 5);
    assert_eq!(client.tokens(), rig.answer(&other, 2));
    rig.assert_no_leak();
}

#[test]
fn a_wholly_cached_prompt_computes_its_last_block_again() {
    let mut rig = Rig::new(64, config());
    let prompt = prompt(3, 16);
    for expected in [16, 4] {
        let before = rig.stats().prefilled_tokens;
        let (_, client) = rig.generate(&prompt, 3);
        rig.settle();
        assert_eq!(rig.stats().prefilled_tokens - before, expected);
        assert_eq!(client.tokens(), rig.answer(&prompt, 3));
    }
    rig.assert_no_leak();
}

#[test]
fn generated_blocks_are_found_by_the_next_turn() {
    let mut rig = Rig::new(64, config());
    let first = prompt(5, 6);
    let (_, client) = rig.generate(&first, 11);
    rig.settle();
    let mut second = [first, client.tokens()].concat();
    second.extend(prompt(6, 3));
    let (_, client) = rig.admit(&second, greedy(1), Mode::Generate);
    // 17 tokens were written, KV of 16 of them computed.
    assert_eq!(client.admission().unwrap().cached_tokens, 16);
}

#[test]
fn another_root_sees_nothing_of_the_cache() {
    let mut rig = Rig::new(64, config());
    let prompt = prompt(5, 12);
    rig.generate(&prompt, 1);
    rig.settle();
    let root = BlockHash::root(ModelFingerprint([1; 16]), &layout(), "other tenant");
    let (_, client) = rig.try_admit(Request { root, ..request(&prompt, greedy(1), Mode::Generate) }).unwrap();
    rig.step();
    assert_eq!(client.admission().unwrap().cached_tokens, 0);
}

#[test]
fn without_a_prefix_cache_nothing_is_kept() {
    let mut rig = Rig::new(64, Config { prefix_cache: false, ..config() });
    for _ in 0..2 {
        let (_, client) = rig.generate(&prompt(5, 12), 6);
        rig.settle();
        assert_eq!(client.admission().unwrap().cached_tokens, 0);
        assert_eq!(client.tokens(), rig.answer(&prompt(5, 12), 6));
    }
    assert_eq!(rig.stats().blocks.free, 64);
}

#[test]
fn an_answer_ends_where_the_context_ends() {
    let mut rig = Rig::new(64, config());
    let prompt = prompt(2, MAX_LEN - 5);
    let (_, client) = rig.generate(&prompt, 1000);
    rig.settle();
    assert_eq!(client.tokens(), rig.answer(&prompt, 5));
    assert_eq!(client.finished(), Some(FinishReason::Length));
}

#[test]
fn an_answer_that_outgrows_the_whole_pool_ends_with_length() {
    let mut rig = Rig::new(4, config());
    let prompt = prompt(2, 5);
    let (_, client) = rig.generate(&prompt, 40);
    rig.settle();
    // 16 slots; the 17th token needs none until something follows it.
    assert_eq!(client.tokens(), rig.answer(&prompt, 12));
    assert_eq!(client.finished(), Some(FinishReason::Length));
    rig.assert_no_leak();
}

#[test]
fn a_preempted_sequence_goes_on_where_it_was() {
    let mut rig = Rig::new(9, config());
    let prompts = [prompt(1, 6), prompt(2, 6), prompt(3, 6)];
    let clients: Vec<_> = prompts.iter().map(|prompt| rig.generate(prompt, 20).1).collect();
    rig.settle();
    assert!(rig.stats().preemptions > 0);
    for (prompt, client) in prompts.iter().zip(clients) {
        assert_eq!(client.tokens(), rig.answer(prompt, 20));
        let admissions = client.events().iter().filter(|event| matches!(event, Event::Admitted(_))).count();
        assert_eq!(admissions, 1);
    }
    rig.assert_no_leak();
}

#[test]
fn the_youngest_steps_back_and_the_eldest_is_never_interrupted() {
    let mut rig = Rig::new(9, config());
    let clients: Vec<_> = (1..4).map(|name| rig.generate(&prompt(name, 6), 20).1).collect();
    for tokens in 1..=20 {
        rig.step();
        assert_eq!(clients[0].tokens().len(), tokens);
        assert!(clients[1].tokens().len() >= clients[2].tokens().len());
    }
    assert!(rig.stats().preemptions > 0);
    rig.settle();
    rig.assert_no_leak();
}

#[test]
fn the_blocks_of_a_held_sequence_are_never_taken_away() {
    let mut rig = Rig::new(8, config());
    let (elder_prompt, held_prompt) = (prompt(1, 6), prompt(2, 14));
    let (_, elder) = rig.generate(&elder_prompt, 30);
    rig.step();
    let (held, landing) = rig.admit(&held_prompt, greedy(4), Mode::Generate); // 4 of 8 blocks, younger
    let tables = landing.admission().unwrap().tables;
    let blocks = &tables[0];
    rig.settle();
    // The elder one has stopped for want of blocks rather than touch those.
    assert!(elder.finished().is_none());
    assert_eq!(rig.stats().preempted, 1);
    blocks.iter().for_each(|&block| rig.script.scribble(block));
    rig.script.land(&tables, &held_prompt, 0..14);
    rig.engine.apply(Command::Landed(held, 14));
    rig.engine.apply(Command::Resume(held, rig.answer(&held_prompt, 1)[0]));
    rig.settle();
    assert_eq!(landing.tokens(), rig.answer(&held_prompt, 4)[1..]);
    assert_eq!(elder.tokens(), rig.answer(&elder_prompt, 27)); // 8 blocks, the whole pool, and one
    rig.assert_no_leak();
}

#[test]
fn blocks_that_peers_may_be_reading_are_not_taken_away_either() {
    let mut rig = Rig::new(8, config());
    let (_, elder) = rig.generate(&prompt(1, 6), 16);
    rig.step();
    let (watched, younger) = rig.admit(&prompt(2, 14), greedy(40), Mode::Generate);
    rig.engine.apply(Command::Compute(watched, Some(Box::new(Watch::default()))));
    while rig.stats().preempted == 0 && younger.failed().is_none() {
        assert_eq!(rig.step(), Progress::Busy);
    }
    // The elder one steps back. The younger one ends where nothing is left to take; its answer so far is right.
    assert!(elder.finished().is_none() && younger.failed().is_none());
    rig.settle();
    assert_eq!(elder.tokens(), rig.answer(&prompt(1, 6), 16));
    assert_eq!(younger.tokens(), rig.answer(&prompt(2, 14), 40)[..younger.tokens().len()]);
    rig.assert_no_leak();
}

#[test]
fn a_sequence_without_a_block_or_a_victim_fails_instead_of_waiting_for_ever() {
    let mut rig = Rig::new(8, config());
    let (held, _) = rig.admit(&prompt(1, 14), greedy(1), Mode::Generate);
    let (watched, client) = rig.admit(&prompt(2, 6), greedy(40), Mode::Generate);
    rig.engine.apply(Command::Compute(watched, Some(Box::new(Watch::default()))));
    rig.settle();
    assert!(matches!(client.failed(), Some(Error::OutOfBlocks { tokens: 17 })));
    assert_eq!(client.tokens(), rig.answer(&prompt(2, 6), 11));
    rig.engine.apply(Command::Abort(held));
    rig.assert_no_leak();
}

#[test]
fn the_tail_of_a_prompt_is_forgotten_before_its_head() {
    let mut rig = Rig::new(6, config());
    let cached = prompt(1, 17);
    rig.generate(&cached, 1);
    rig.settle();
    let (other, _) = rig.admit(&prompt(2, 12), greedy(1), Mode::PrefillOnly); // 2 free blocks and one cached
    rig.engine.apply(Command::Abort(other));
    let (_, again) = rig.admit(&cached, greedy(1), Mode::Generate);
    assert_eq!(again.admission().unwrap().cached_tokens, 12);
}

#[test]
fn what_landed_is_not_computed_again() {
    let mut rig = Rig::new(32, config());
    let prompt = prompt(4, 18);
    let (seq, client) = rig.admit(&prompt, greedy(5), Mode::Generate);
    let tables = client.admission().unwrap().tables;
    rig.script.land(&tables, &prompt, 0..12);
    rig.engine.apply(Command::Landed(seq, 14)); // not a whole block more than 12
    rig.engine.apply(Command::Compute(seq, None));
    rig.settle();
    assert_eq!((rig.stats().landed_tokens, rig.stats().prefilled_tokens), (12, 6));
    assert_eq!(client.tokens(), rig.answer(&prompt, 5));
    rig.assert_no_leak();
}

#[test]
fn a_landed_prompt_resumes_after_the_first_token_and_is_cached() {
    for len in [14, 16] {
        let mut rig = Rig::new(32, config());
        let prompt = prompt(4, len);
        let (seq, client) = rig.admit(&prompt, greedy(5), Mode::Generate);
        let tables = client.admission().unwrap().tables;
        rig.script.land(&tables, &prompt, 0..len);
        rig.engine.apply(Command::Landed(seq, len));
        let answer = rig.answer(&prompt, 5);
        rig.engine.apply(Command::Resume(seq, answer[0]));
        rig.settle();
        assert_eq!(client.tokens(), answer[1..]);
        assert_eq!(rig.stats().prefilled_tokens, 0);
        let (_, again) = rig.admit(&[&prompt[..], &answer[..1]].concat(), greedy(5), Mode::Generate);
        assert_eq!(again.admission().unwrap().cached_tokens, len / BLOCK * BLOCK);
    }
}

#[test]
fn a_landed_prompt_without_a_first_token_can_still_be_computed() {
    for len in [13, 16] {
        let mut rig = Rig::new(32, config());
        let prompt = prompt(4, len);
        let (seq, client) = rig.admit(&prompt, greedy(5), Mode::Generate);
        rig.script.land(&client.admission().unwrap().tables, &prompt, 0..len);
        rig.engine.apply(Command::Landed(seq, len));
        // The last block will be written to once more, so nobody else may have found it.
        let (other, longer) = rig.admit(&[&prompt[..], &[EOS]].concat(), greedy(1), Mode::Generate);
        assert_eq!(longer.admission().unwrap().cached_tokens, 12);
        rig.engine.apply(Command::Abort(other));
        rig.engine.apply(Command::Compute(seq, None));
        rig.settle();
        assert_eq!(rig.stats().prefilled_tokens, 1);
        assert_eq!(client.tokens(), rig.answer(&prompt, 5));
        rig.assert_no_leak();
    }
}

#[test]
fn a_first_token_before_the_whole_prompt_landed_costs_only_computing() {
    let mut rig = Rig::new(32, config());
    let prompt = prompt(4, 14);
    let (seq, client) = rig.admit(&prompt, greedy(5), Mode::Generate);
    rig.script.land(&client.admission().unwrap().tables, &prompt, 0..8);
    rig.engine.apply(Command::Landed(seq, 8));
    let answer = rig.answer(&prompt, 5);
    rig.engine.apply(Command::Resume(seq, answer[0]));
    rig.settle();
    assert_eq!(client.tokens(), answer[1..]);
    rig.assert_no_leak();
}

#[test]
fn a_first_token_that_ends_the_answer_finishes_at_once() {
    let cases = [
        (EOS, Sampling { max_tokens: 9, ..Sampling::default() }, FinishReason::Stop),
        (TokenId(7), greedy(1), FinishReason::Length),
    ];
    for (first, sampling, reason) in cases {
        let mut rig = Rig::new(32, config());
        let (seq, client) = rig.admit(&prompt(4, 8), sampling, Mode::Generate);
        rig.script.land(&client.admission().unwrap().tables, &prompt(4, 8), 0..8);
        rig.engine.apply(Command::Landed(seq, 8));
        rig.engine.apply(Command::Resume(seq, first));
        assert_eq!(client.finished(), Some(reason));
        assert!(client.tokens().is_empty());
        rig.assert_no_leak();
    }
}

#[test]
fn a_first_token_from_outside_the_vocabulary_fails_its_sequence_only() {
    let mut rig = Rig::new(32, config());
    let (seq, client) = rig.admit(&prompt(4, 8), greedy(5), Mode::Generate);
    rig.engine.apply(Command::Resume(seq, TokenId(61)));
    assert!(matches!(client.failed(), Some(Error::UnknownToken { .. })));
    rig.assert_no_leak();
}

#[test]
fn a_prefill_gives_one_token_and_keeps_its_blocks_until_released() {
    let mut rig = Rig::new(32, config());
    let prompt = prompt(4, 10);
    let (seq, client) = rig.admit(&prompt, greedy(1), Mode::PrefillOnly);
    rig.engine.apply(Command::Compute(seq, None));
    rig.settle();
    assert_eq!(client.tokens(), rig.answer(&prompt, 1));
    assert!(client.finished().is_none());
    assert_eq!((rig.stats().parked, rig.stats().blocks.in_use), (1, 3));
    rig.engine.apply(Command::Release(seq));
    assert_eq!(rig.stats().blocks.cached, 2);
    rig.assert_no_leak();
}

#[test]
fn a_sink_sees_every_layer_of_every_chunk_and_chunks_end_at_blocks() {
    let mut rig = Rig::new(32, config());
    let prompt = prompt(4, 22);
    let (seq, client) = rig.admit(&prompt, greedy(1), Mode::PrefillOnly);
    let watch = Watch::default();
    rig.engine.apply(Command::Compute(seq, Some(Box::new(watch.clone()))));
    rig.settle();
    let blocks = client.admission().unwrap().tables[0].clone();
    let expected =
        [(0..8, 0, blocks[..2].to_vec()), (8..16, 2, blocks[2..4].to_vec()), (16..22, 4, blocks[4..].to_vec())];
    assert_eq!(*watch.chunks.lock().unwrap(), expected);
}

#[test]
fn decoding_goes_on_beside_a_long_prompt_and_a_step_keeps_its_budget() {
    let mut rig = Rig::new(64, Config { max_batch_tokens: 12, chunk_tokens: 8, ..config() });
    let (_, writer) = rig.generate(&prompt(1, 4), 20);
    rig.step();
    // 12 is no limit that 8-token chunks and one decoding token add up to: what is over goes to a second prompt, in blocks.
    let prompts = [(2, 30), (3, 30)].map(|(name, len)| {
        let (seq, _) = rig.try_admit(request(&prompt(name, len), greedy(1), Mode::PrefillOnly)).unwrap();
        let watch = Watch::default();
        rig.engine.apply(Command::Compute(seq, Some(Box::new(watch.clone()))));
        (len, watch)
    });
    for _ in 0..8 {
        let before = writer.tokens().len();
        rig.step();
        assert_eq!(writer.tokens().len(), before + 1);
    }
    for (len, watch) in prompts {
        let chunks = watch.chunks.lock().unwrap();
        assert!(chunks.len() > 2);
        assert!(chunks.iter().all(|(tokens, ..)| tokens.end % BLOCK == 0 || tokens.end == len), "{chunks:?}");
    }
    assert!(rig.script.runs().iter().all(|&tokens| tokens <= 12), "{:?}", rig.script.runs());
}

#[test]
fn an_abort_is_harmless_at_any_time_and_frees_everything() {
    for steps in 0..14 {
        for mode in [Mode::Generate, Mode::PrefillOnly] {
            let mut rig = Rig::new(32, config());
            let (seq, client) = rig.try_admit(request(&prompt(1, 20), greedy(6), mode)).unwrap();
            if steps > 1 {
                rig.engine.apply(Command::Compute(seq, Some(Box::new(Watch::default()))));
            }
            for _ in 0..steps {
                rig.step();
            }
            rig.engine.apply(Command::Abort(seq));
            rig.assert_no_leak();
            let told = client.events().len();
            for command in [
                Command::Abort(seq),
                Command::Landed(seq, 4),
                Command::Compute(seq, None),
                Command::Resume(seq, TokenId(1)),
                Command::Release(seq),
                Command::Abort(crate::SeqId(999)),
            ] {
                rig.engine.apply(command);
            }
            rig.settle();
            assert_eq!(client.events().len(), told, "told something after its end");
            rig.assert_no_leak();
        }
    }
}

#[test]
fn a_failed_step_fails_its_batch_and_nothing_else() {
    for panics in [false, true] {
        let mut rig = Rig::new(32, config());
        let (_, failing) = rig.generate(&prompt(1, 6), 6);
        let (held, bystander) = rig.admit(&prompt(2, 6), greedy(3), Mode::Generate);
        if panics {
            rig.script.panic_in_next_run()
        } else {
            rig.script.fail_next_run()
        }
        rig.settle();
        match failing.failed().unwrap() {
            Error::Runner(_) => assert!(!panics),
            Error::RunnerBroken { reason } => assert!(panics && reason.contains("the script says so")),
            other => panic!("{other}"),
        }
        rig.engine.apply(Command::Compute(held, None));
        rig.settle();
        assert_eq!(bystander.tokens(), rig.answer(&prompt(2, 6), 3));
        rig.assert_no_leak();
    }
}

#[test]
fn a_panicking_sink_loses_its_own_sequence_only() {
    let mut rig = Rig::new(32, config());
    let (seq, watched) = rig.admit(&prompt(1, 6), greedy(6), Mode::PrefillOnly);
    let sink = |_: LayerDone<'_>| panic!("a layer sink's bug");
    struct Panics<F>(F);
    impl<F: FnMut(LayerDone<'_>) + Send> crate::LayerSink for Panics<F> {
        fn layer_done(&mut self, done: LayerDone<'_>) {
            (self.0)(done);
        }
    }
    rig.engine.apply(Command::Compute(seq, Some(Box::new(Panics(sink)))));
    let deaf = Box::new(|event: Event| assert!(!matches!(event, Event::Token { .. }), "an event sink's bug"));
    let (deaf, command) = rig.engine.intake().admit(request(&prompt(3, 6), greedy(6), Mode::Generate), deaf).unwrap();
    rig.engine.apply(command);
    rig.engine.apply(Command::Compute(deaf, None));
    let (_, bystander) = rig.generate(&prompt(2, 6), 6);
    rig.settle();
    assert!(matches!(watched.failed(), Some(Error::SinkPanicked)));
    assert_eq!(bystander.tokens(), rig.answer(&prompt(2, 6), 6));
    rig.assert_no_leak();
}

/// Answers with whatever rows it was given, however wrong.
struct Rows(RunnerSpec, Arc<Mutex<Vec<f32>>>);

impl Runner for Rows {
    fn spec(&self) -> &RunnerSpec {
        &self.0
    }

    fn run(&mut self, _: &[SeqInput<'_>], _: &mut dyn FnMut(usize)) -> Result<Logits, kvasir_model::Error> {
        Ok(Logits { vocab: self.0.vocab, rows: self.1.lock().unwrap().clone() })
    }

    fn copy_blocks(&mut self, _: &[(kvasir_types::BlockId, kvasir_types::BlockId)]) -> Result<(), kvasir_model::Error> {
        unreachable!("nothing is forked here")
    }
}

#[test]
fn logits_that_make_no_sense_fail_the_sequence() {
    for rows in [vec![0.0, f32::NAN], vec![f32::NEG_INFINITY; 2], vec![0.0, f32::INFINITY], vec![], vec![0.0; 4]] {
        let spec = RunnerSpec { vocab: 2, max_len: 16, eos: vec![], groups: kvasir_types::KvGroups::full(1) };
        let length = rows.len();
        let runner = Rows(spec, Arc::new(Mutex::new(rows)));
        let mut engine = Engine::new(config(), layout(), 8, Box::new(runner));
        let client = Client::default();
        let (seq, command) =
            engine.intake().admit(request(&[TokenId(1)], greedy(2), Mode::Generate), client.sink()).unwrap();
        engine.apply(command);
        engine.apply(Command::Compute(seq, None));
        while engine.step() == Progress::Busy {}
        match client.failed().unwrap() {
            Error::BadLogits { position: 1 } => assert_eq!(length, 2),
            Error::RunnerBroken { .. } => assert_ne!(length, 2),
            other => panic!("{other}"),
        }
        assert_eq!(engine.stats().blocks.in_use, 0);
    }
}

#[test]
fn closing_tells_everybody_and_refuses_newcomers() {
    let mut rig = Rig::new(8, config());
    let (_, running) = rig.generate(&prompt(1, 6), 20);
    let (_, held) = rig.admit(&prompt(2, 6), greedy(3), Mode::Generate);
    let (_, waiting) = rig.admit(&prompt(3, 20), greedy(3), Mode::Generate);
    rig.engine.close();
    for client in [running, held, waiting] {
        assert!(matches!(client.failed(), Some(Error::Closed)));
    }
    let refused = rig.try_admit(request(&prompt(1, 4), greedy(1), Mode::Generate)).err().unwrap();
    assert!(matches!(refused.error, Error::Closed));
    rig.assert_no_leak();
}
