//! Speculation changes how many steps an answer takes and nothing else.

use std::sync::{Arc, Mutex};

use kvasir_types::{FinishReason, KvGroups, Sampling, TokenId};
use proptest::prelude::*;

use super::rig::{BLOCK, Client, EOS, LAYERS, MAX_LEN, Rig, config, greedy, layout, prompt, request, runner};
use crate::{
    Ask, Command, Config, DraftModel, Engine, Error, Guess, History, Mode, NGrams, Parts, Proposer, Runner, RunnerSpec,
    Sampler, Script, ScriptedRunner, SeqId, sampler::mix,
};

/// Knows the right answer and tells it with mistakes.
struct Oracle {
    script: Script,
    /// One draft in so many is wrong.
    wrong: u64,
    calls: u64,
}

impl Proposer for Oracle {
    fn propose(&mut self, guesses: &[Guess<'_>]) -> Result<Vec<Vec<TokenId>>, Error> {
        self.calls += 1;
        let guess = |guess: &Guess<'_>| {
            let (mut tokens, mut history) = (guess.tokens.to_vec(), guess.history.clone());
            for _ in 0..guess.limit {
                let (sampling, position) = (guess.sampling, tokens.len());
                let ask = Ask { sampling, position, history: &history, eos: &[EOS], mask: None };
                let mut token = Sampler::default().sample(&mut self.script.logits(&tokens), ask).unwrap().token;
                if mix(self.calls ^ (position as u64) << 20).is_multiple_of(self.wrong) {
                    token = TokenId(token.0 % 60 + 1);
                }
                tokens.push(token);
                history.push(token);
            }
            tokens.split_off(guess.tokens.len())
        };
        Ok(guesses.iter().map(guess).collect())
    }
}

fn rig_with(blocks: usize, config: Config, proposer: impl FnOnce(Script) -> Box<dyn Proposer>) -> Rig {
    let runner = runner();
    let script = runner.script();
    let proposer = Some(proposer(script.clone()));
    let parts = Parts { runner: Box::new(runner), constraints: None, proposer, spill: None, on_evict: None };
    Rig { engine: Engine::new(config, layout(), blocks, parts), script, groups: KvGroups::full(LAYERS) }
}

pub fn oracle(wrong: u64) -> impl FnOnce(Script) -> Box<dyn Proposer> {
    move |script| Box::new(Oracle { script, wrong, calls: 0 })
}

/// A draft model that is the model itself, with a pool of its own.
fn twin(blocks: usize) -> impl FnOnce(Script) -> Box<dyn Proposer> {
    move |_| Box::new(DraftModel::new(Box::new(runner()), &layout(), blocks, 8))
}

fn write(rig: &mut Rig, prompt: &[TokenId], sampling: &Sampling) -> (Vec<TokenId>, Option<FinishReason>) {
    let (seq, client) = rig.try_admit(request(prompt, sampling.clone(), Mode::Generate)).unwrap();
    rig.engine.apply(Command::Compute(seq, None));
    rig.settle();
    (client.tokens(), client.finished())
}

fn samplings() -> Vec<Sampling> {
    let hot = Sampling { temperature: 1.3, seed: 11, ..greedy(30) };
    vec![
        greedy(30),
        hot.clone(),
        Sampling { frequency_penalty: 0.7, repetition_penalty: 1.3, presence_penalty: 0.2, ..hot.clone() },
        Sampling { ignore_eos: false, min_tokens: 8, stop_token_ids: vec![TokenId(17), TokenId(18)], ..hot.clone() },
        Sampling { top_k: 9, top_p: 0.9, logit_bias: vec![(TokenId(5), 3.0)], ..hot },
    ]
}

#[test]
fn answers_are_those_without_speculation_whoever_guesses() {
    for sampling in samplings() {
        for name in 0..4 {
            let prompt = prompt(name, 6 + name as usize);
            let plain = write(&mut Rig::new(64, config()), &prompt, &sampling);
            let rigs = [
                rig_with(64, config(), oracle(u64::MAX)),
                rig_with(64, config(), oracle(3)),
                rig_with(64, config(), oracle(1)),
                rig_with(64, config(), twin(64)),
                rig_with(64, config(), |_| Box::new(NGrams { least: 1, ..NGrams::default() })),
            ];
            for (which, mut rig) in rigs.into_iter().enumerate() {
                assert_eq!(write(&mut rig, &prompt, &sampling), plain, "proposer {which}, {sampling:?}");
                rig.assert_no_leak();
            }
        }
    }
}

#[test]
fn right_guesses_save_steps_and_the_count_says_so() {
    let prompt = prompt(2, 9);
    for sampling in [greedy(30), Sampling { temperature: 1.0, seed: 4, ..greedy(30) }] {
        let mut plain = Rig::new(64, config());
        write(&mut plain, &prompt, &sampling);
        for proposer in [true, false] {
            let mut rig =
                if proposer { rig_with(64, config(), oracle(u64::MAX)) } else { rig_with(64, config(), twin(64)) };
            write(&mut rig, &prompt, &sampling);
            let (stats, before) = (rig.stats(), plain.stats());
            assert_eq!((stats.sampled_tokens, before.sampled_tokens), (30, 30));
            assert_eq!(stats.accepted_tokens, stats.drafted_tokens, "the oracle is right: {stats:?}");
            assert_eq!(stats.steps + stats.accepted_tokens, before.steps);
            assert!(stats.accepted_tokens >= 20, "{stats:?}");
        }
    }
}

#[test]
fn wrong_guesses_are_soon_given_up() {
    let mut rig = rig_with(64, Config { max_batch_tokens: 64, ..config() }, oracle(1));
    write(&mut rig, &prompt(1, 5), &greedy(40));
    let stats = rig.stats();
    assert!(stats.accepted_tokens <= 2 && stats.drafted_tokens < 30, "{stats:?}");
}

#[test]
fn drafts_keep_to_the_budget_the_context_and_the_pool() {
    // Four sequences and a budget of six tokens: two drafts in a step.
    let tight = Config { max_batch_tokens: 8, max_running: 4, chunk_tokens: 4, ..config() };
    let mut rig = rig_with(64, tight, oracle(u64::MAX));
    let clients: Vec<_> = (0..4).map(|name| rig.generate(&prompt(name, 6), 60).1).collect();
    rig.settle();
    assert!(rig.script.runs().iter().all(|&tokens| tokens <= 8), "{:?}", rig.script.runs());
    for (name, client) in clients.into_iter().enumerate() {
        let expected = rig.answer(&prompt(name as u32, 6), MAX_LEN - 6);
        assert_eq!((client.tokens(), client.finished()), (expected, Some(FinishReason::Length)));
    }
    rig.assert_no_leak();
    // A pool with room for the answer and no block more.
    let mut rig = rig_with(3, config(), oracle(u64::MAX));
    let (tokens, reason) = write(&mut rig, &prompt(1, 5), &greedy(30));
    assert_eq!((tokens.len(), reason), (3 * BLOCK - 5 + 1, Some(FinishReason::Length)));
    assert_eq!(rig.stats().preemptions, 0);
    rig.assert_no_leak();
}

#[test]
fn what_was_not_accepted_is_never_found_in_the_cache() {
    let mut rig = rig_with(64, config(), oracle(3));
    for name in 0..3 {
        let first = prompt(name, 7);
        let (tokens, _) = write(&mut rig, &first, &greedy(25));
        // The next turn of the conversation finds the blocks of this one, and they are right.
        let turn = [&first, &tokens[..], &[TokenId(9), TokenId(8)]].concat();
        let cached = rig.stats().cached_tokens;
        let next = write(&mut rig, &turn, &greedy(8)).0;
        assert!(rig.stats().cached_tokens >= cached + 24);
        assert_eq!(next, rig.answer(&turn, 8));
    }
}

#[test]
fn a_proposer_that_fails_or_panics_costs_nobody_an_answer() {
    struct Broken(bool);
    impl Proposer for Broken {
        fn propose(&mut self, _: &[Guess<'_>]) -> Result<Vec<Vec<TokenId>>, Error> {
            assert!(!self.0, "the script says so");
            Err(Error::Closed)
        }
    }
    for panics in [false, true] {
        let mut rig = rig_with(64, config(), |_| Box::new(Broken(panics)));
        let prompt = prompt(3, 8);
        let expected = rig.answer(&prompt, 12);
        assert_eq!(write(&mut rig, &prompt, &greedy(12)).0, expected);
        assert_eq!(rig.stats().proposer_failures, 1);
    }
}

#[test]
fn nonsense_from_a_proposer_is_harmless() {
    struct Nonsense;
    impl Proposer for Nonsense {
        fn propose(&mut self, guesses: &[Guess<'_>]) -> Result<Vec<Vec<TokenId>>, Error> {
            let many = |guess: &Guess<'_>| (0..100).map(|i| TokenId(guess.tokens.len() as u32 + i * 40)).collect();
            Ok(guesses.iter().skip(1).map(many).collect())
        }
    }
    let mut rig = rig_with(64, config(), |_| Box::new(Nonsense));
    let clients: Vec<_> = (0..3).map(|name| rig.generate(&prompt(name, 6), 20).1).collect();
    rig.settle();
    for (name, client) in clients.into_iter().enumerate() {
        assert_eq!(client.tokens(), rig.answer(&prompt(name as u32, 6), 20));
    }
}

#[test]
fn a_draft_model_catches_up_with_a_prompt_that_landed_from_elsewhere() {
    let mut rig = rig_with(64, config(), twin(64));
    let prompt = prompt(6, 30);
    let (seq, client) = rig.admit(&prompt, greedy(15), Mode::Generate);
    rig.script.land(&client.admission().unwrap().tables, &prompt, 0..30);
    let expected = rig.answer(&prompt, 15);
    rig.engine.apply(Command::Landed(seq, 30));
    rig.engine.apply(Command::Resume(seq, expected[0]));
    rig.settle();
    assert_eq!(client.tokens(), expected[1..]);
    // 30 tokens at 8 a step: four steps without drafts, then with.
    let stats = rig.stats();
    assert!(stats.drafted_tokens >= 6 && stats.accepted_tokens == stats.drafted_tokens, "{stats:?}");
    rig.assert_no_leak();
}

#[test]
fn a_draft_model_with_few_blocks_forgets_and_goes_on() {
    let drafts = DraftModel::new(Box::new(runner()), &layout(), 7, 8);
    let mut rig = rig_with(64, config(), |_| Box::new(drafts));
    for round in 0..3u32 {
        let clients: Vec<_> = (0..3).map(|name| (name, rig.generate(&prompt(round * 3 + name, 6), 20).1)).collect();
        rig.settle();
        for (name, client) in clients {
            assert_eq!(client.tokens(), rig.answer(&prompt(round * 3 + name, 6), 20));
        }
    }
    assert!(rig.stats().accepted_tokens > 0);
    assert_eq!(rig.stats().proposer_failures, 0);
}

#[test]
fn a_draft_model_gives_the_blocks_of_ended_sequences_back() {
    let mut drafts = DraftModel::new(Box::new(runner()), &layout(), 64, 64);
    let (sampling, history) = (greedy(30), History::default());
    let tokens = prompt(1, 10);
    let guess = |seq| Guess { seq: SeqId(seq), tokens: &tokens, sampling: &sampling, history: &history, limit: 2 };
    drafts.propose(&[guess(1), guess(2)]).unwrap();
    let both = drafts.blocks_in_use();
    let longer = prompt(1, 200);
    for len in 0..140 {
        let tokens = [&tokens, &longer[..1]].concat();
        let _ = len;
        drafts.propose(&[Guess { tokens: &tokens, ..guess(2) }]).unwrap();
    }
    assert!(drafts.blocks_in_use() < both, "{} of {both}", drafts.blocks_in_use());
}

/// A model that says the same everywhere.
struct Fixed {
    spec: RunnerSpec,
    logits: Vec<f32>,
}

impl Runner for Fixed {
    fn spec(&self) -> &RunnerSpec {
        &self.spec
    }

    fn run(
        &mut self,
        batch: &[kvasir_model::SeqInput<'_>],
        _: &mut dyn FnMut(usize),
    ) -> Result<kvasir_model::Logits, kvasir_model::Error> {
        let rows: usize = batch.iter().map(|input| input.rows).sum();
        Ok(kvasir_model::Logits { vocab: self.logits.len(), rows: self.logits.repeat(rows) })
    }

    fn copy_blocks(&mut self, _: &[(kvasir_types::BlockId, kvasir_types::BlockId)]) -> Result<(), kvasir_model::Error> {
        unreachable!("nothing is forked here")
    }
}

fn fixed(logits: &[f32]) -> Box<Fixed> {
    let spec = RunnerSpec { vocab: logits.len(), max_len: 1 << 20, eos: vec![], groups: KvGroups::full(LAYERS) };
    Box::new(Fixed { spec, logits: logits.to_vec() })
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    logits.iter().map(|&x| f64::from(x).exp() / total).collect()
}

/// Draws many tokens from a fixed distribution, one draft at a time, and says how often each came and how often the draft
/// was right.
fn draws(target: &[f32], proposer: Box<dyn Proposer>, count: u32) -> (Vec<f64>, f64) {
    let counts = Arc::new(Mutex::new(vec![0.0; target.len()]));
    let config = Config { draft_tokens: 1, max_batch_tokens: 64, chunk_tokens: 16, max_running: 4, ..config() };
    let parts =
        Parts { runner: fixed(target), constraints: None, proposer: Some(proposer), spill: None, on_evict: None };
    let mut engine = Engine::new(config, layout(), count as usize / BLOCK + 64, parts);
    let sampling = Sampling { temperature: 1.0, seed: 99, ..greedy(count) };
    let sink = {
        let counts = Arc::clone(&counts);
        Box::new(move |event| {
            if let crate::Event::Token { sampled, .. } = event {
                counts.lock().unwrap()[sampled.token.0 as usize] += 1.0;
            }
        })
    };
    let (seq, admit) = engine.intake().admit(request(&[TokenId(1); 3], sampling, Mode::Generate), sink).unwrap();
    engine.apply(admit);
    engine.apply(Command::Compute(seq, None));
    while engine.step() == crate::Progress::Busy {}
    let stats = engine.stats();
    assert!(stats.drafted_tokens > u64::from(count) / 4, "{stats:?}");
    let counts = counts.lock().unwrap().clone();
    (counts, stats.accepted_tokens as f64 / stats.drafted_tokens as f64)
}

fn assert_distributed(counts: &[f64], p: &[f64]) {
    let n: f64 = counts.iter().sum();
    let statistic: f64 = counts.iter().zip(p).map(|(count, p)| (count - p * n).powi(2) / (p * n)).sum();
    let freedom = p.len() as f64 - 1.0;
    assert!(statistic < freedom + 5.0 * (2.0 * freedom).sqrt(), "{statistic}: {counts:?}");
}

const TARGET: [f32; 6] = [1.2, 0.3, 2.0, -0.5, 1.1, 0.0];

#[test]
fn with_a_draft_model_the_distribution_is_the_targets_and_acceptance_the_couplings() {
    let draft = [0.8, 0.5, 1.9, -0.2, 0.6, 0.4];
    let proposer = DraftModel::new(fixed(&draft), &layout(), 20_000, 64);
    let (counts, accepted) = draws(&TARGET, Box::new(proposer), 40_000);
    let (p, q) = (softmax(&TARGET), softmax(&draft));
    assert_distributed(&counts, &p);
    let agree = |j: usize| 1.0 / p.iter().zip(&q).map(|(pi, qi)| (pi / p[j]).max(qi / q[j])).sum::<f64>();
    let expected: f64 = (0..p.len()).map(agree).sum();
    // More than independent draws would agree, and within what any coupling can reach.
    let independent: f64 = p.iter().zip(&q).map(|(p, q)| p * q).sum();
    let best: f64 = p.iter().zip(&q).map(|(p, q)| p.min(*q)).sum();
    assert!(independent < expected && expected <= best);
    assert!(
        (accepted - expected).abs() < 5.0 * (expected * (1.0 - expected) / 10_000.0).sqrt(),
        "{accepted}, {expected}"
    );
}

#[test]
fn with_one_guess_the_distribution_is_the_targets_and_acceptance_the_guess_s_probability() {
    struct Always(TokenId);
    impl Proposer for Always {
        fn propose(&mut self, guesses: &[Guess<'_>]) -> Result<Vec<Vec<TokenId>>, Error> {
            Ok(vec![vec![self.0]; guesses.len()])
        }
    }
    // The likeliest token, so that it stays worth guessing.
    let (counts, accepted) = draws(&TARGET, Box::new(Always(TokenId(2))), 40_000);
    let p = softmax(&TARGET);
    assert_distributed(&counts, &p);
    assert!((accepted - p[2]).abs() < 5.0 * (p[2] * (1.0 - p[2]) / 10_000.0).sqrt(), "{accepted}, {}", p[2]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    /// Prompts that come and go, small pools, preemption, drafts right and wrong: every answer is the script's.
    #[test]
    fn random_schedules_give_the_scripts_answers(
        blocks in 8usize..24,
        wrong in prop_oneof![Just(1u64), Just(2), Just(4), Just(u64::MAX)],
        model in any::<bool>(),
        draft_blocks in 1usize..20,
        asked in prop::collection::vec((0u32..9, 1usize..20, 1u32..25, any::<bool>(), 0usize..6), 1..10),
    ) {
        let config = Config { draft_tokens: 5, ..config() };
        let mut rig =
            if model { rig_with(blocks, config, twin(draft_blocks)) } else { rig_with(blocks, config, oracle(wrong)) };
        let mut clients: Vec<(Vec<TokenId>, Sampling, Client)> = Vec::new();
        for (name, len, max_tokens, hot, steps) in asked {
            let prompt = prompt(name, len);
            let temperature = if hot { 1.2 } else { 0.0 };
            let sampling = Sampling { temperature, seed: name.into(), ..greedy(max_tokens) };
            if let Ok((seq, client)) = rig.try_admit(request(&prompt, sampling.clone(), Mode::Generate)) {
                rig.engine.apply(Command::Compute(seq, None));
                clients.push((prompt, sampling, client));
            }
            for _ in 0..steps {
                rig.step();
            }
        }
        rig.settle();
        for (prompt, sampling, client) in clients {
            prop_assert!(client.finished().is_some(), "{:?}", client.failed());
            let tokens = client.tokens();
            prop_assert_eq!(&tokens, &rig.script.answer(&prompt, &sampling, tokens.len()));
        }
        rig.assert_no_leak();
    }
}

#[test]
fn the_script_knows_each_position_of_a_run() {
    // The rig itself: rows of a run of several tokens are the logits after each.
    let mut runner: ScriptedRunner = runner();
    let script = runner.script();
    let (tokens, tables) = (prompt(1, 6), vec![vec![kvasir_types::BlockId(0), kvasir_types::BlockId(1)]]);
    let input = kvasir_model::SeqInput { tokens: &tokens, start: 0, tables: &tables, rows: 3 };
    let logits = runner.run(&[input], &mut |_| {}).unwrap();
    let expected: Vec<f32> = (4..=6).flat_map(|len| script.logits(&tokens[..len])).collect();
    assert_eq!(logits.rows, expected);
}
