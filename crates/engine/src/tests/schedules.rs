//! Every order of commands and steps, against an oracle: the script says what the answer is.

use kvasir_types::{FinishReason, Sampling, TokenId};
use proptest::prelude::*;

use super::rig::*;
use crate::{Command, Config, Error, Event, Mode, Progress, SeqId};

#[derive(Clone, Debug)]
enum Op {
    Admit {
        family: u32,
        len: usize,
        max_tokens: u32,
        temperature: bool,
        prefill_only: bool,
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
    Fail {
        panic: bool,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let who = any::<usize>;
    prop_oneof![
        // Few families: prompts of one family are prefixes of one another, so they share blocks.
        6 => (0u32..3, 1usize..30, 1u32..24, any::<bool>(), prop::bool::weighted(0.25)).prop_map(
            |(family, len, max_tokens, temperature, prefill_only)| Op::Admit {
                family, len, max_tokens, temperature, prefill_only,
            }
        ),
        3 => (who(), 0usize..9).prop_map(|(who, blocks)| Op::Land { who, blocks }),
        5 => (who(), prop::bool::weighted(0.2)).prop_map(|(who, watched)| Op::Compute { who, watched }),
        3 => who().prop_map(|who| Op::Resume { who }),
        1 => who().prop_map(|who| Op::Abort { who }),
        1 => who().prop_map(|who| Op::Release { who }),
        12 => (1u8..6).prop_map(Op::Step),
        1 => prop::bool::weighted(0.3).prop_map(|panic| Op::Fail { panic }),
    ]
}

/// One request as the test knows it.
struct Asked {
    seq: SeqId,
    client: Client,
    prompt: Vec<TokenId>,
    sampling: Sampling,
    mode: Mode,
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
        admission.tables[0][valid..].iter().for_each(|&block| rig.script.scribble(block));
    }

    fn land(&mut self, rig: &mut Rig, blocks: usize) {
        let admission = self.client.admission().unwrap();
        let until = (blocks * BLOCK).min(self.prompt.len());
        let from = self.landed.max(admission.cached_tokens);
        if until > from {
            rig.script.land(&admission.tables[0], &self.prompt, from..until);
            self.landed = until;
        }
        rig.engine.apply(Command::Landed(self.seq, until));
    }

    /// The oracle: what must have been told by the time everything has come to rest.
    fn check(&self, rig: &Rig, blocks: usize) {
        let prompt = self.prompt.len();
        if self.aborted {
            assert_eq!(self.client.events().len(), self.events_at_abort, "told something after its end");
        }
        let room = (MAX_LEN - prompt).min((blocks * BLOCK + 1).saturating_sub(prompt));
        let limit = match self.mode {
            Mode::Generate => room.min((self.sampling.max_tokens - self.sampling.continued) as usize),
            Mode::PrefillOnly => 1,
        };
        let mut answer = rig.script.answer(&self.prompt, &self.sampling, limit);
        let mut reason = FinishReason::Length;
        if let Some(end) = answer.iter().position(|&token| token == EOS) {
            answer.truncate(end + 1);
            reason = FinishReason::Stop;
        }
        let expected = &answer[usize::from(self.resumed)..];
        let tokens = self.client.tokens();
        assert_eq!(tokens, expected[..tokens.len().min(expected.len())], "a wrong token");
        match self.client.events().last() {
            _ if self.aborted => {}
            Some(Event::Finished(told)) => assert_eq!((*told, tokens.len()), (reason, expected.len())),
            Some(Event::Token(_)) => assert_eq!((self.mode, tokens.len()), (Mode::PrefillOnly, 1)),
            Some(Event::Failed(Error::Runner(_) | Error::RunnerBroken { .. })) => {}
            Some(Event::Failed(Error::OutOfBlocks { .. })) => assert!(self.watched, "could have been preempted"),
            other => panic!("{:?} ended with {other:?}", self.seq),
        }
    }
}

fn pick(asked: &mut [Asked], who: usize) -> Option<&mut Asked> {
    let len = asked.len();
    (len > 0).then(|| &mut asked[who % len])
}

fn admit(rig: &mut Rig, asked: &mut Vec<Asked>, op: &Op) {
    let &Op::Admit { family, len, max_tokens, temperature, prefill_only } = op else { return };
    let (prompt, seed) = (prompt(family, len), u64::from(family));
    let temperature = if temperature { 1.3 } else { 0.0 };
    // Some answers depend on every token before them, and some are the rest of an answer begun elsewhere.
    let (frequency_penalty, min_tokens, continued) =
        if family % 2 == 1 { (0.4, 3, family.min(2).min(len as u32 - 1)) } else { (0.0, 0, 0) };
    let max_tokens = max_tokens + continued;
    let sampling = Sampling {
        max_tokens,
        temperature,
        top_p: 0.9,
        frequency_penalty,
        min_tokens,
        continued,
        seed,
        ..Sampling::default()
    };
    let mode = if prefill_only { Mode::PrefillOnly } else { Mode::Generate };
    match rig.try_admit(request(&prompt, sampling.clone(), mode)) {
        Ok((seq, client)) => asked.push(Asked {
            seq,
            client,
            prompt,
            sampling,
            mode,
            landed: 0,
            told_to_go: false,
            resumed: false,
            watched: false,
            aborted: false,
            events_at_abort: 0,
        }),
        Err(rejected) => assert!(
            matches!(rejected.error, Error::QueueFull { .. } | Error::PromptExceedsPool { .. }),
            "{}",
            rejected.error
        ),
    }
}

fn apply(rig: &mut Rig, asked: &mut Vec<Asked>, op: &Op) {
    match *op {
        Op::Admit { .. } => admit(rig, asked, op),
        Op::Land { who, blocks } => {
            if let Some(one) = pick(asked, who).filter(|one| one.is_held()) {
                one.disturb(rig);
                one.land(rig, blocks);
            }
        }
        Op::Compute { who, watched } => {
            // Also before it is admitted, and (ignored) after it was told.
            if let Some(one) = pick(asked, who) {
                let sink = watched.then(|| Box::new(Watch::default()) as Box<dyn crate::LayerSink>);
                one.watched |= watched && !one.told_to_go;
                one.told_to_go = true;
                rig.engine.apply(Command::Compute(one.seq, sink));
            }
        }
        Op::Resume { who } => {
            if let Some(one) = pick(asked, who).filter(|one| one.is_held() && one.mode == Mode::Generate) {
                let first = rig.script.answer(&one.prompt, &one.sampling, 1)[0];
                (one.told_to_go, one.resumed) = (true, true);
                rig.engine.apply(Command::Resume(one.seq, first));
            }
        }
        Op::Abort { who } | Op::Release { who } => {
            if let Some(one) = pick(asked, who).filter(|one| !one.aborted) {
                (one.aborted, one.events_at_abort) = (true, one.client.events().len());
                let release = matches!(op, Op::Release { .. });
                rig.engine.apply(if release { Command::Release(one.seq) } else { Command::Abort(one.seq) });
            }
        }
        Op::Step(count) => {
            for _ in 0..count {
                asked.iter().filter(|one| one.is_held()).for_each(|one| one.disturb(rig));
                rig.step();
            }
        }
        Op::Fail { panic: true } => rig.script.panic_in_next_run(),
        Op::Fail { panic: false } => rig.script.fail_next_run(),
    }
}

/// Lets everybody who is held be computed and everybody who is done go, until nothing is left.
fn finish(rig: &mut Rig, asked: &mut [Asked]) {
    for _ in 0..10_000 {
        for one in asked.iter_mut() {
            if one.is_held() {
                one.told_to_go = true;
                rig.engine.apply(Command::Compute(one.seq, None));
            }
            if one.mode == Mode::PrefillOnly && !one.client.tokens().is_empty() {
                rig.engine.apply(Command::Release(one.seq));
            }
        }
        let stats = rig.stats();
        let alive = stats.waiting + stats.preempted + stats.held + stats.running + stats.parked;
        if rig.step() == Progress::Idle && alive == 0 {
            return;
        }
    }
    panic!("not at rest after 10000 steps: {:?}", rig.stats());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn every_order_of_commands_gives_the_scripts_answers_and_leaks_nothing(
        blocks in 3usize..24,
        max_running in 1usize..7,
        chunk_tokens in 1usize..20,
        prefix_cache in prop::bool::weighted(0.8),
        ops in prop::collection::vec(op(), 1..100),
    ) {
        let config = Config { max_batch_tokens: 16, chunk_tokens, max_running, max_waiting: 6, prefix_cache, mask_threads: 0, draft_tokens: 3 };
        let mut rig = Rig::new(blocks, config);
        let mut asked = Vec::new();
        for op in &ops {
            apply(&mut rig, &mut asked, op);
        }
        finish(&mut rig, &mut asked);
        asked.iter().for_each(|one| one.check(&rig, blocks));
        rig.assert_no_leak();
        if !prefix_cache {
            prop_assert_eq!(rig.stats().blocks.free, blocks);
        }
    }
}
