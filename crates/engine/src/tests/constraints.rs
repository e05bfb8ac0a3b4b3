//! Answers under a grammar, with a scripted one: what is written follows it, wherever and however it is written.

use std::sync::Arc;

use kvasir_types::{FinishReason, Grammar, Sampling, TokenId};

use super::rig::{Client, EOS, LAYERS, Rig, config, greedy, layout, prompt, request, runner};
use crate::{
    BadGrammar, Command, Config, Constraint, Constraints, Engine, Error, Event, Mask, Mode, Parts, Rejected, SeqId,
};

/// A token may follow if its id and that of the one before are alike modulo 3 after one step (0, 1, 2, 0, …), and the
/// answer may end after a multiple of three tokens; `Regex("n")`: after n of them it is complete.
#[derive(Clone)]
struct Cycle {
    written: usize,
    complete: usize,
    vocab: usize,
    breaks: Breaks,
}

#[derive(Clone, Copy, PartialEq)]
enum Breaks {
    Never,
    MaskFails,
    MaskPanics,
    AdvancePanics,
}

impl Cycle {
    fn mask(&self, ahead: usize) -> Mask {
        let written = self.written + ahead;
        let follow = (1..self.vocab as u32).filter(|token| *token as usize % 3 == written % 3).map(TokenId);
        Mask::of(self.vocab, follow.chain(written.is_multiple_of(3).then_some(EOS)))
    }
}

impl Constraint for Cycle {
    fn advance(&mut self, token: TokenId) -> Result<bool, BadGrammar> {
        assert!(self.breaks != Breaks::AdvancePanics, "the script says so");
        if !self.mask(0).allows(token) {
            return Err(BadGrammar::new(format!("{} does not follow", token.0)));
        }
        self.written += 1;
        Ok(token == EOS || self.written == self.complete)
    }

    fn masks(&mut self, drafts: &[TokenId]) -> Result<Vec<Mask>, BadGrammar> {
        assert!(self.breaks != Breaks::MaskPanics || self.written < 4, "the script says so");
        if self.breaks == Breaks::MaskFails && self.written == 4 {
            return Err(BadGrammar::new("too large"));
        }
        let mut masks = vec![self.mask(0)];
        for (ahead, &draft) in drafts.iter().enumerate() {
            if draft == EOS || !masks[ahead].allows(draft) {
                break;
            }
            masks.push(self.mask(ahead + 1));
        }
        Ok(masks)
    }
}

struct Cycles(Breaks);

impl Constraints for Cycles {
    fn compile(&self, grammar: &Grammar) -> Result<Box<dyn Constraint>, BadGrammar> {
        let Grammar::Regex(complete) = grammar else { return Err(BadGrammar::new("no grammar of mine")) };
        let complete = complete.parse().map_err(|_| BadGrammar::new("no number"))?;
        Ok(Box::new(Cycle { written: 0, complete, vocab: 61, breaks: self.0 }))
    }
}

fn rig(mask_threads: usize, breaks: Breaks) -> Rig {
    let runner = runner();
    let script = runner.script();
    let parts = Parts {
        runner: Box::new(runner),
        constraints: Some(Arc::new(Cycles(breaks))),
        proposer: None,
        spill: None,
        on_evict: None,
    };
    Rig {
        engine: Engine::new(Config { mask_threads, ..config() }, layout(), 64, parts),
        script,
        groups: kvasir_types::KvGroups::full(LAYERS),
    }
}

fn formed(complete: usize, sampling: Sampling) -> Sampling {
    Sampling { grammar: Some(Grammar::Regex(complete.to_string().into())), ..sampling }
}

fn start(rig: &mut Rig, prompt: &[TokenId], sampling: Sampling) -> (SeqId, Client) {
    let (seq, client) = rig.try_admit(request(prompt, sampling, Mode::Generate)).unwrap();
    rig.engine.apply(Command::Compute(seq, None));
    rig.step();
    (seq, client)
}

fn assert_follows(tokens: &[TokenId], reason: Option<FinishReason>, complete: usize) {
    for (at, token) in tokens.iter().enumerate() {
        let ends = *token == EOS && at + 1 == tokens.len() && at % 3 == 0;
        assert!(ends || token.0 as usize % 3 == at % 3, "{tokens:?} at {at}");
    }
    if reason == Some(FinishReason::Stop) {
        assert!(tokens.len() == complete || tokens.last() == Some(&EOS), "{tokens:?}");
    }
}

#[test]
fn answers_follow_their_grammar_and_end_when_it_is_complete() {
    for mask_threads in [0, 1, 2] {
        let mut rig = rig(mask_threads, Breaks::Never);
        let hot = |seed| Sampling { temperature: 1.5, seed, max_tokens: 20, ..Sampling::default() };
        let asked: Vec<_> = (0..6u32)
            .map(|name| {
                let complete = [3, 10, 99][name as usize % 3];
                let sampling = formed(complete, hot(u64::from(name)));
                (start(&mut rig, &prompt(name, 5 + name as usize), sampling).1, complete)
            })
            .collect();
        let (_, free) = rig.generate(&prompt(9, 9), 12);
        rig.settle();
        for (client, complete) in asked {
            assert!(client.finished().is_some(), "{:?}", client.events().last());
            assert_follows(&client.tokens(), client.finished(), complete);
        }
        assert_eq!(free.tokens(), rig.answer(&prompt(9, 9), 12), "who asked for no form was given one");
        rig.assert_no_leak();
    }
}

#[test]
fn an_answer_of_a_form_goes_on_elsewhere_as_it_would_have_here() {
    let sampling = formed(17, Sampling { temperature: 1.2, seed: 5, ..greedy(30) });
    let prompt = prompt(4, 7);
    let mut first = rig(1, Breaks::Never);
    let (_, client) = start(&mut first, &prompt, sampling.clone());
    first.settle();
    let whole = client.tokens();
    assert!(whole.len() > 2);
    for written in 1..whole.len() {
        let mut other = rig(1, Breaks::Never);
        let rest = Sampling { continued: written as u32, ..sampling.clone() };
        let (_, client) = start(&mut other, &[&prompt, &whole[..written]].concat(), rest);
        other.settle();
        assert_eq!((client.tokens(), client.finished()), (whole[written..].to_vec(), Some(FinishReason::Stop)));
    }
}

#[test]
fn a_first_token_from_elsewhere_is_held_to_the_grammar() {
    for (first, fine) in [(TokenId(3), true), (TokenId(4), false)] {
        let mut rig = rig(1, Breaks::Never);
        let prompt = prompt(2, 8);
        let (seq, client) = rig.try_admit(request(&prompt, formed(4, greedy(9)), Mode::Generate)).unwrap();
        rig.step();
        let admission = client.admission().unwrap();
        rig.script.land(&admission.tables, &prompt, 0..8);
        rig.engine.apply(Command::Landed(seq, 8));
        rig.engine.apply(Command::Resume(seq, first));
        rig.settle();
        if fine {
            assert_follows(&[vec![first], client.tokens()].concat(), client.finished(), 4);
        } else {
            assert!(matches!(client.failed(), Some(Error::Grammar(_))));
        }
        rig.assert_no_leak();
    }
}

#[test]
fn a_form_that_can_not_be_given_is_refused_with_the_request() {
    let sampling = |text: &str| Sampling { grammar: Some(Grammar::Regex(text.into())), ..greedy(3) };
    let refused = |rig: &mut Rig, sampling| match rig.try_admit(request(&prompt(1, 5), sampling, Mode::Generate)) {
        Err(Rejected { error: Error::Grammar(bad), .. }) => bad.to_string(),
        other => panic!("{:?}", other.map(|_| ()).map_err(|rejected| rejected.error)),
    };
    let mut rig = rig(0, Breaks::Never);
    assert_eq!(refused(&mut rig, sampling("x")), "no number");
    let complete = Sampling { continued: 3, max_tokens: 9, ..sampling("3") };
    assert!(refused(&mut rig, complete).contains("follow"), "the prompt's end does not follow the grammar");
    assert!(refused(&mut Rig::new(8, config()), sampling("3")).contains("tokenizer"));
    rig.assert_no_leak();
}

#[test]
fn a_grammar_that_breaks_fails_its_own_answer_only() {
    for mask_threads in [0, 1] {
        for breaks in [Breaks::MaskFails, Breaks::MaskPanics, Breaks::AdvancePanics] {
            let mut rig = rig(mask_threads, breaks);
            let (_, broken) = start(&mut rig, &prompt(1, 5), formed(99, greedy(20)));
            let (_, other) = rig.generate(&prompt(2, 6), 20);
            rig.settle();
            assert!(matches!(broken.events().last(), Some(Event::Failed(Error::Grammar(_)))));
            assert_eq!(other.tokens(), rig.answer(&prompt(2, 6), 20));
            rig.assert_no_leak();
        }
    }
}

#[test]
fn an_abort_in_the_middle_leaves_nothing_behind() {
    let mut rig = rig(2, Breaks::Never);
    for steps in 0..6 {
        let (seq, _) = start(&mut rig, &prompt(steps, 9), formed(99, greedy(30)));
        for _ in 0..steps {
            rig.step();
        }
        rig.engine.apply(Command::Abort(seq));
    }
    rig.settle();
    rig.assert_no_leak();
}
