//! Random commands, and what must come of them: the script says what every answer is.
//!
//! Peers write rubbish into blocks that are landing until the moment they are said to have landed; preempted sequences'
//! blocks are moved out and, sometimes, brought back. After every step the scheduler checks that no block is lost and
//! none that may be written is in two tables; the script's memory, that nothing is read that was not written for just
//! that sequence and position.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use kvasir_types::{BlockHash, BlockId, FinishReason, GroupKind, KvGroups, Sampling, TokenId};
use proptest::prelude::*;

use super::rig::*;
use crate::{
    Admission, Command, Config, Duty, Error, Event, Mode, Priority, Progress, Request, Script, SeqId, Spill,
    SpilledBlock, choice_seed, scripted::Saved,
};

#[derive(Clone, Debug)]
pub enum Op {
    Admit {
        family: u32,
        len: usize,
        max_tokens: u32,
        /// The client asked for so many, and must get them or be refused.
        asked: bool,
        temperature: bool,
        prefill_only: bool,
        offline: bool,
        choices: u32,
    },
    /// A peer writes rubbish, as half-done writes look, then perhaps the real thing up to a block boundary or the end.
    Land {
        who: usize,
        blocks: usize,
    },
    Compute {
        who: usize,
        watched: bool,
    },
    Resume {
        who: usize,
    },
    Abort {
        who: usize,
    },
    Release {
        who: usize,
    },
    Step(u8),
    Duty(Duty),
    Fail {
        panic: bool,
    },
    Follow,
}

pub fn op() -> impl Strategy<Value = Op> {
    let who = any::<usize>;
    let choices = prop_oneof![6 => Just(1u32), 1 => 2u32..5];
    prop_oneof![
        // Few families: prompts of one family are prefixes of one another, so they share blocks.
        6 => (
            (0u32..3, 1usize..30, 1u32..24, any::<bool>()), any::<bool>(), prop::bool::weighted(0.25), any::<bool>(), choices
        ).prop_map(
            |((family, len, max_tokens, asked), temperature, prefill_only, offline, choices)| Op::Admit {
                family, len, max_tokens, asked, temperature, prefill_only, offline, choices,
            }
        ),
        3 => (who(), 0usize..9).prop_map(|(who, blocks)| Op::Land { who, blocks }),
        5 => (who(), prop::bool::weighted(0.2)).prop_map(|(who, watched)| Op::Compute { who, watched }),
        3 => who().prop_map(|who| Op::Resume { who }),
        1 => who().prop_map(|who| Op::Abort { who }),
        1 => who().prop_map(|who| Op::Release { who }),
        12 => (1u8..6).prop_map(Op::Step),
        1 => prop_oneof![2 => Just(Duty::Mixed), 1 => Just(Duty::Prefill), 1 => Just(Duty::Decode)].prop_map(Op::Duty),
        1 => prop::bool::weighted(0.3).prop_map(|panic| Op::Fail { panic }),
        1 => Just(Op::Follow),
    ]
}

/// How large and how limited the engine is.
#[derive(Clone, Debug)]
pub struct Given {
    pub kinds: Vec<GroupKind>,
    pub blocks: usize,
    pub config: Config,
    /// Preempted sequences' blocks are moved out, and brought back every so many times.
    pub spill: Option<u8>,
    /// Tokens are drafted, and one in so many drafts is wrong.
    pub wrong_drafts: Option<u64>,
}

pub fn given() -> impl Strategy<Value = Given> {
    let sliding = |window| GroupKind::Sliding { window };
    let kinds = prop_oneof![
        4 => Just(vec![GroupKind::Full; LAYERS]),
        1 => Just(vec![sliding(7); LAYERS]),
        1 => Just(vec![sliding(2); LAYERS]),
        1 => Just(vec![GroupKind::Full, sliding(9), sliding(9)]),
        1 => Just(vec![sliding(5), GroupKind::Full, sliding(12)]),
    ];
    let spill = prop_oneof![Just(None), (1u8..4).prop_map(Some)];
    let limits = (3usize..24, 1usize..7, 1usize..20, 1u64..40, 1usize..12);
    let drafts = prop_oneof![2 => Just(None), 1 => (1u64..5).prop_map(Some)];
    (kinds, limits, prop::bool::weighted(0.8), spill, drafts).prop_map(
        |(kinds, limits, prefix_cache, spill, wrong_drafts)| {
            let (blocks, max_running, chunk_tokens, offline_patience, remainder_tokens) = limits;
            let config = Config {
                max_batch_tokens: 16,
                chunk_tokens,
                max_running,
                max_waiting: 6,
                max_waiting_offline: 5,
                offline_patience,
                remainder_tokens,
                prefix_cache,
                cache_events: 64,
                ..config()
            };
            Given { kinds, blocks, config, spill, wrong_drafts }
        },
    )
}

/// Where moved-out blocks are, and who waits for theirs.
#[derive(Default)]
struct Store {
    blocks: HashMap<BlockHash, Saved>,
    asked: usize,
    recalled: Vec<(SeqId, Admission)>,
}

struct FakeSpill {
    script: Script,
    store: Arc<Mutex<Store>>,
    every: u8,
}

impl Spill for FakeSpill {
    fn out(&mut self, _: SeqId, blocks: &[SpilledBlock]) {
        let mut store = self.store.lock().unwrap();
        store.blocks.extend(blocks.iter().map(|spilled| (spilled.hash, self.script.save(spilled.block))));
    }

    fn back(&mut self, seq: SeqId, admission: &Admission) -> bool {
        let mut store = self.store.lock().unwrap();
        store.asked += 1;
        let brings = store.asked.is_multiple_of(self.every.into());
        if brings {
            store.recalled.push((seq, admission.clone()));
        }
        brings
    }
}

/// One request as the test knows it.
pub struct Asked {
    seq: SeqId,
    client: Client,
    prompt: Vec<TokenId>,
    sampling: Sampling,
    mode: Mode,
    choices: u32,
    landed: usize,
    told_to_go: bool,
    resumed: bool,
    watched: bool,
    aborted: bool,
    events_at_abort: usize,
}

impl Asked {
    fn is_held(&self) -> bool {
        !self.told_to_go && !self.aborted && self.client.admission().is_some() && self.client.failed().is_none()
    }

    /// A remote writer at work on the blocks that are neither cached nor landed.
    fn disturb(&self, rig: &Rig) {
        let admission = self.client.admission().unwrap();
        let valid = self.landed.max(admission.cached_tokens).div_ceil(BLOCK);
        scribble(rig, &admission, valid);
    }

    fn land(&mut self, rig: &mut Rig, blocks: usize) {
        let admission = self.client.admission().unwrap();
        let until = (blocks * BLOCK).min(self.prompt.len());
        let from = self.landed.max(admission.cached_tokens);
        if until > from {
            let before = rig.stats().landed_tokens;
            rig.script.land(&admission.tables, &self.prompt, from..until);
            rig.engine.apply(Command::Landed(self.seq, until));
            // A part without its window is refused: peers go on writing there.
            if rig.stats().landed_tokens > before {
                self.landed = until;
            }
        }
    }

    /// What must have been told by the time everything has come to rest.
    fn check(&self, rig: &Rig, given: &Given) {
        if self.aborted {
            assert_eq!(self.client.events().len(), self.events_at_abort, "told something after its end");
        }
        for choice in 0..self.choices {
            self.check_choice(rig, given, choice);
        }
        let ends = |event: &Event| matches!(event, Event::Finished { left: 0, .. } | Event::Failed(_));
        let ended = self.client.events().iter().filter(|event| ends(event)).count();
        match self.client.events().last() {
            _ if self.aborted => assert!(ended <= 1), // possibly before it was aborted
            Some(Event::Finished { left: 0, .. }) => assert_eq!(ended, 1),
            Some(Event::Failed(Error::Runner(_) | Error::RunnerBroken { .. })) => assert_eq!(ended, 1),
            Some(Event::Failed(Error::OutOfBlocks { .. })) => {
                let sliding = given.kinds.iter().any(|kind| *kind != GroupKind::Full);
                assert!(self.watched || (sliding && self.mode == Mode::PrefillOnly), "could have been preempted");
            }
            Some(Event::Token { .. }) if self.mode == Mode::PrefillOnly => assert_eq!(ended, 0),
            other => panic!("{:?} ended with {other:?}", self.seq),
        }
    }

    fn check_choice(&self, rig: &Rig, given: &Given, choice: u32) {
        let prompt = self.prompt.len();
        let limit = match self.mode {
            Mode::Generate => (MAX_LEN - prompt).min((self.sampling.max_tokens - self.sampling.continued) as usize),
            Mode::PrefillOnly => 1,
        };
        let sampling = Sampling { seed: choice_seed(self.sampling.seed, choice), ..self.sampling.clone() };
        let mut answer = rig.script.answer(&self.prompt, &sampling, limit);
        let mut reason = FinishReason::Length;
        if let Some(end) = answer.iter().position(|&token| token == EOS) {
            answer.truncate(end + 1);
            reason = FinishReason::Stop;
        }
        let expected = &answer[usize::from(self.resumed && choice == 0)..];
        let tokens = self.client.choice(choice);
        assert_eq!(tokens, expected[..tokens.len().min(expected.len())], "a wrong token in choice {choice}");
        let ends = self.client.events().into_iter().filter_map(|event| match event {
            Event::Finished { choice: of, reason, .. } if of == choice => Some(reason),
            _ => None,
        });
        match ends.collect::<Vec<_>>()[..] {
            [] => {}
            [told] if tokens.len() == expected.len() => assert_eq!(told, reason),
            [told] => {
                // Its pool was its context, and nobody had asked for more.
                assert!(!self.sampling.max_tokens_asked, "ended before the length that was asked for");
                let written = prompt + usize::from(self.resumed && choice == 0) + tokens.len();
                assert_eq!(told, FinishReason::Length);
                assert!(rig.needed(written, BLOCK) > given.blocks, "ended early: {written} tokens");
            }
            ref more => panic!("choice {choice} ended {} times", more.len()),
        }
    }
}

fn scribble(rig: &Rig, admission: &Admission, from: usize) {
    let open = admission.tables.iter().flat_map(|table| table.get(from..).unwrap_or_default());
    open.filter(|&&block| block != BlockId::GONE).for_each(|&block| rig.script.scribble(block));
}

pub struct World {
    pub rig: Rig,
    pub given: Given,
    asked: Vec<Asked>,
    store: Arc<Mutex<Store>>,
    follower: Follower,
    pub steps: usize,
}

impl World {
    pub fn new(given: Given) -> Self {
        let groups = KvGroups::of_layers(&given.kinds);
        let store = Arc::<Mutex<Store>>::default();
        let to = Arc::clone(&store);
        let every = given.spill;
        let rig = Rig::with_parts(given.blocks, given.config.clone(), groups, |script, parts| {
            if let Some(every) = every {
                parts.spill = Some(Box::new(FakeSpill { script: script.clone(), store: to, every }));
            }
            parts.proposer = given.wrong_drafts.map(|wrong| super::speculation::oracle(wrong)(script.clone()));
        });
        Self { rig, given, asked: Vec::new(), store, follower: Follower::default(), steps: 0 }
    }

    fn admit(&mut self, op: &Op) {
        let &Op::Admit { family, len, max_tokens, asked: max_tokens_asked, .. } = op else { return };
        let &Op::Admit { temperature, prefill_only, offline, choices, .. } = op else { return };
        let (prompt, seed) = (prompt(family, len), u64::from(family));
        let temperature = if temperature { 1.3 } else { 0.0 };
        // Some answers depend on every token before them, and some are the rest of an answer begun elsewhere.
        let (frequency_penalty, min_tokens, continued) =
            if family % 2 == 1 { (0.4, 3, family.min(2).min(len as u32 - 1)) } else { (0.0, 0, 0) };
        let sampling = Sampling {
            max_tokens: max_tokens + continued,
            max_tokens_asked,
            temperature,
            top_p: 0.9,
            frequency_penalty,
            min_tokens,
            continued,
            seed,
            ..Sampling::default()
        };
        let mode = if prefill_only { Mode::PrefillOnly } else { Mode::Generate };
        let priority = if offline { Priority::Offline } else { Priority::Online };
        let asked = Request { priority, choices, ..request(&prompt, sampling.clone(), mode) };
        let intake = self.rig.engine.intake();
        let (demand, blocks) = (intake.demand(&asked), self.given.blocks);
        let demand_of = |max_tokens: usize| {
            let sampling = Sampling { max_tokens: max_tokens as u32, ..sampling.clone() };
            intake.demand(&Request { sampling, ..asked.clone() }).to_end
        };
        let at_most = (1..=sampling.max_tokens as usize).rev().find(|&tokens| demand_of(tokens) <= blocks);
        match self.rig.try_admit(asked) {
            Ok((seq, client)) => {
                assert!(!max_tokens_asked || demand.to_end <= blocks, "{demand:?} of {blocks} blocks");
                self.asked.push(Asked {
                    seq,
                    client,
                    prompt,
                    sampling,
                    mode,
                    choices: if prefill_only { 1 } else { choices },
                    landed: 0,
                    told_to_go: false,
                    resumed: false,
                    watched: false,
                    aborted: false,
                    events_at_abort: 0,
                });
            }
            Err(rejected) => match rejected.error {
                Error::QueueFull { .. } => {}
                Error::PromptExceedsPool { needed, .. } => assert!(needed == demand.to_start && needed > blocks),
                Error::AnswerExceedsPool { needed, at_most: told, .. } => {
                    assert!(
                        max_tokens_asked && needed == demand.to_end && needed > blocks && demand.to_start <= blocks
                    );
                    assert_eq!(Some(told), at_most);
                }
                Error::WrongDuty { duty } => assert_ne!(duty, Duty::Mixed),
                other => panic!("{other}"),
            },
        }
    }

    pub fn apply(&mut self, op: &Op) {
        match *op {
            Op::Admit { .. } => self.admit(op),
            Op::Land { who, blocks } => self.with(who, |one, rig| {
                if one.is_held() {
                    one.disturb(rig);
                    one.land(rig, blocks);
                }
            }),
            // Also before it is admitted, and (ignored) after it was told.
            Op::Compute { who, watched } => self.with(who, |one, rig| {
                let sink = watched.then(|| Box::new(Watch::default()) as Box<dyn crate::LayerSink>);
                one.watched |= watched && !one.told_to_go;
                one.told_to_go = true;
                rig.engine.apply(Command::Compute(one.seq, sink));
            }),
            Op::Resume { who } => self.with(who, |one, rig| {
                if one.is_held() && one.mode == Mode::Generate {
                    let first = rig.script.answer(&one.prompt, &one.sampling, 1)[0];
                    (one.told_to_go, one.resumed) = (true, true);
                    rig.engine.apply(Command::Resume(one.seq, first));
                }
            }),
            Op::Abort { who } | Op::Release { who } => {
                let release = matches!(op, Op::Release { .. });
                self.with(who, |one, rig| {
                    if !one.aborted {
                        (one.aborted, one.events_at_abort) = (true, one.client.events().len());
                        rig.engine.apply(if release { Command::Release(one.seq) } else { Command::Abort(one.seq) });
                    }
                });
            }
            Op::Step(count) => (0..count).for_each(|_| {
                self.step();
            }),
            Op::Duty(duty) => self.rig.engine.set_duty(duty),
            Op::Fail { panic: true } => self.rig.script.panic_in_next_run(),
            Op::Fail { panic: false } => self.rig.script.fail_next_run(),
            Op::Follow => self.follower.follow(&mut self.rig.engine),
        }
    }

    fn with(&mut self, who: usize, act: impl FnOnce(&mut Asked, &mut Rig)) {
        let len = self.asked.len();
        if len > 0 {
            act(&mut self.asked[who % len], &mut self.rig);
        }
    }

    fn step(&mut self) -> Progress {
        self.asked.iter().filter(|one| one.is_held()).for_each(|one| one.disturb(&self.rig));
        let recalled = std::mem::take(&mut self.store.lock().unwrap().recalled);
        for (seq, admission) in recalled {
            self.bring_back(seq, &admission);
        }
        self.steps += 1;
        let progress = self.rig.step();
        assert_eq!(self.rig.script.bad_reads(), 0, "something was read that was not written for its reader");
        progress
    }

    /// The store's part in a recall: what it has, from the first block that is missing on.
    fn bring_back(&mut self, seq: SeqId, admission: &Admission) {
        scribble(&self.rig, admission, admission.cached_tokens / BLOCK);
        let store = self.store.lock().unwrap();
        let mut blocks = admission.cached_tokens / BLOCK;
        'blocks: while let Some(&hash) = admission.hashes.get(blocks) {
            for (group, table) in admission.tables.iter().enumerate() {
                let gone = table[blocks] == BlockId::GONE;
                match store.blocks.get(&kvasir_kv_cache::in_group(hash, group)).filter(|_| !gone) {
                    Some(saved) => self.rig.script.restore(table[blocks], saved),
                    None if gone => {}
                    None => break 'blocks,
                }
            }
            blocks += 1;
        }
        drop(store);
        self.rig.engine.apply(Command::Landed(seq, blocks * BLOCK));
        self.rig.engine.apply(Command::Compute(seq, None));
    }

    /// Lets everybody who is held be computed and everybody who is done go, until nothing is left; then checks.
    pub fn finish(&mut self) {
        self.rig.engine.set_duty(Duty::Mixed);
        for _ in 0..10_000 {
            for one in self.asked.iter_mut() {
                if one.is_held() {
                    one.told_to_go = true;
                    self.rig.engine.apply(Command::Compute(one.seq, None));
                }
                if one.mode == Mode::PrefillOnly && !one.client.tokens().is_empty() {
                    self.rig.engine.apply(Command::Release(one.seq));
                }
            }
            let stats = self.rig.stats();
            let alive = stats.waiting + stats.preempted + stats.held + stats.running + stats.parked;
            if self.step() == Progress::Idle && alive == 0 {
                self.asked.iter().for_each(|one| one.check(&self.rig, &self.given));
                self.rig.assert_no_leak();
                self.follower.follow(&mut self.rig.engine);
                assert!(self.given.config.prefix_cache || stats.blocks.cached == 0);
                self.asked.clear();
                return;
            }
        }
        panic!("not at rest after 10000 steps: {:?}", self.rig.stats());
    }
}
