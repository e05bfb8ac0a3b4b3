//! Sampling through the engine: what is written depends on the request alone, and goes on elsewhere as it would have here.

use kvasir_types::{FinishReason, Sampling, TokenId};

use super::rig::{EOS, Rig, config, greedy, prompt, request};
use crate::{Command, Error, Mode, Rejected};

fn every_option() -> Sampling {
    Sampling {
        temperature: 1.1,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.01,
        repetition_penalty: 1.2,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        logit_bias: vec![(TokenId(7), 1.5), (TokenId(9), -100.0)],
        seed: 77,
        max_tokens: 20,
        min_tokens: 12,
        logprobs: Some(3),
        ..Sampling::default()
    }
}

fn write(rig: &mut Rig, prompt: &[TokenId], sampling: &Sampling) -> (Vec<TokenId>, Option<FinishReason>) {
    let (seq, client) = rig.try_admit(request(prompt, sampling.clone(), Mode::Generate)).unwrap();
    rig.engine.apply(Command::Compute(seq, None));
    rig.settle();
    (client.tokens(), client.finished())
}

#[test]
fn the_same_request_gets_the_same_answer_whatever_else_is_in_the_batch() {
    let prompt = prompt(3, 9);
    let alone = write(&mut Rig::new(64, config()), &prompt, &every_option());
    assert!(alone.0.len() >= 12 && !alone.0.contains(&TokenId(9)), "{alone:?}");
    let mut rig = Rig::new(64, config());
    for name in 10..16 {
        rig.generate(&super::rig::prompt(name, 7), 20);
        rig.step();
    }
    assert_eq!(write(&mut rig, &prompt, &every_option()), alone);
    rig.assert_no_leak();
}

#[test]
fn an_answer_continued_elsewhere_ends_as_it_would_have_here() {
    for sampling in [every_option(), Sampling { frequency_penalty: 0.5, min_tokens: 6, ..greedy(15) }] {
        let prompt = prompt(5, 10);
        let (whole, reason) = write(&mut Rig::new(64, config()), &prompt, &sampling);
        for written in 1..whole.len() {
            let so_far = [&prompt, &whole[..written]].concat();
            let rest = Sampling { continued: written as u32, ..sampling.clone() };
            let (tokens, ended) = write(&mut Rig::new(64, config()), &so_far, &rest);
            assert_eq!((&whole[written..], reason), (&tokens[..], ended), "after {written}");
        }
    }
}

#[test]
fn an_answer_is_not_ended_before_min_tokens() {
    // A script that answers with the end token soon.
    let rig = || Rig::new(64, config());
    let (prompt, end) = (0..)
        .map(|name| prompt(name, 6))
        .find_map(|prompt| {
            let end = rig().answer(&prompt, 6).iter().position(|&token| token == EOS)?;
            Some((prompt, end as u32))
        })
        .unwrap();
    let sampling = Sampling { max_tokens: end + 5, min_tokens: end + 2, ..Sampling::default() };
    let (tokens, _) = write(&mut rig(), &prompt, &sampling);
    assert!(tokens.len() as u32 > end + 1, "{tokens:?}");
    assert!(!tokens[..end as usize + 2].contains(&EOS));
}

#[test]
fn a_continuation_of_nothing_or_of_a_finished_answer_is_refused() {
    let mut rig = Rig::new(64, config());
    let prompt = prompt(1, 5);
    for (continued, max_tokens) in [(5, 9), (6, 9), (3, 3), (4, 2)] {
        let rejected = rig.try_admit(request(&prompt, Sampling { continued, ..greedy(max_tokens) }, Mode::Generate));
        assert!(matches!(rejected, Err(Rejected { error: Error::BadContinuation { .. }, .. })));
    }
    let bias = Sampling { logit_bias: vec![(TokenId(61), 1.0)], ..greedy(3) };
    let rejected = rig.try_admit(request(&prompt, bias, Mode::Generate));
    assert!(matches!(rejected, Err(Rejected { error: Error::UnknownToken { token: TokenId(61), .. }, .. })));
    rig.assert_no_leak();
}
