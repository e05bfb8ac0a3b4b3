//! What a planner does, by what is asked of the workers.

use proptest::prelude::*;

use super::{
    forecast::{Demand, Fleet, Split, Targets, forecast},
    plan::{Candidate, Planner, Settings, Situation},
    speeds::{Prompt, Step},
};

fn fleet() -> Fleet {
    Fleet {
        step: Step { base: 0.01, per_answer: 4e-4, per_context_token: 1e-7 },
        prompt: Prompt { per_token: 5e-5, per_place: 1e-9 },
        room_tokens: 200_000.0,
    }
}

fn workers(prefill: usize, decode: usize) -> Vec<Candidate> {
    let one = |at: usize| Candidate { decodes: at >= prefill, movable: true, work: at as f64 };
    (0..prefill + decode).map(one).collect()
}

/// Long prompts and short answers, or the other way round.
fn asked(prompts: f64, answers: f64) -> Demand {
    Demand {
        prompt_tokens_per_second: prompts,
        prompt_tokens: 2000.0,
        answer_tokens_per_second: answers,
        context_tokens: 2000.0,
        backlog_tokens: 0.0,
    }
}

fn situation(demand: Demand, workers: Vec<Candidate>) -> Situation {
    Situation { demand, fleet: Some(fleet()), targets: Targets { ttft: 0.5, tpot: 0.05 }, workers }
}

/// Looks every two seconds and moves who is to be moved; the splits that came about.
fn run(planner: &mut Planner, situation: &mut Situation, from: f64, looks: usize) -> Vec<Split> {
    let mut splits = Vec::new();
    for look in 0..looks {
        let verdict = planner.look(from + 2.0 * look as f64, situation);
        for at in verdict.moves {
            situation.workers[at].decodes = !situation.workers[at].decodes;
        }
        splits.push(verdict.now);
    }
    splits.dedup();
    splits
}

#[test]
fn workers_follow_the_mix_there_and_back() {
    let mut planner = Planner::new(Settings::default());
    // Four prefill workers read 80,000 tokens a second; 90,000 are too many for them.
    let mut now = situation(asked(90_000.0, 500.0), workers(4, 4));
    let splits = run(&mut planner, &mut now, 0.0, 100);
    assert_eq!(splits.first(), Some(&Split { prefill: 4, decode: 4 }));
    let there = *splits.last().unwrap();
    assert!(there.prefill > 4, "{splits:?}");
    assert!(forecast(there, &now.demand, &fleet()).strain(&now.targets) < 0.8, "{splits:?}");
    // It stays there.
    assert_eq!(run(&mut planner, &mut now, 200.0, 200), [there]);
    // Now few prompts, and answers that one or two workers can't write.
    now.demand = asked(2_000.0, 8_000.0);
    let splits = run(&mut planner, &mut now, 600.0, 200);
    let back = *splits.last().unwrap();
    assert!(back.decode > there.decode, "{splits:?}");
    assert!(forecast(back, &now.demand, &fleet()).strain(&now.targets) < 0.8, "{splits:?}");
}

#[test]
fn nothing_is_moved_while_all_is_well_or_nothing_helps_or_nobody_may() {
    let mut planner = Planner::new(Settings::default());
    let mut look = |situation: &Situation| (0..20).map(|at| planner.look(f64::from(at), situation)).last().unwrap();
    // Uneven, but fast enough.
    let verdict = look(&situation(asked(1_000.0, 100.0), workers(1, 7)));
    assert!(verdict.moves.is_empty() && verdict.why.contains("met with ease"), "{verdict:?}");
    // Too much of both.
    let verdict = look(&situation(asked(80_000.0, 9_000.0), workers(2, 2)));
    assert!(verdict.moves.is_empty(), "{verdict:?}");
    // All are pinned.
    let pinned = workers(2, 6).into_iter().map(|worker| Candidate { movable: false, ..worker }).collect();
    let verdict = look(&situation(asked(90_000.0, 10.0), pinned));
    assert!(verdict.moves.is_empty() && verdict.why.contains("nobody can be moved"), "{verdict:?}");
    // Nothing was measured.
    let unknown = Situation { fleet: None, ..situation(asked(90_000.0, 10.0), workers(2, 6)) };
    assert!(look(&unknown).why.contains("not known"));
    // Of one kind there is nobody.
    assert!(look(&situation(asked(90_000.0, 10.0), workers(0, 6))).moves.is_empty());
}

#[test]
fn those_with_the_least_to_do_are_moved_and_the_reason_has_the_numbers() {
    let mut planner = Planner::new(Settings { votes: 1, ..Settings::default() });
    let mut all = workers(2, 6);
    all[5].work = 0.0; // a decode worker with nothing to write
    let verdict = planner.look(0.0, &situation(asked(60_000.0, 10.0), all));
    assert_eq!(verdict.moves, [5], "{verdict:?}");
    assert!(
        verdict.why.contains("with 2 prefill and 6 decode") && verdict.why.contains("target 500"),
        "{}",
        verdict.why
    );
}

#[test]
fn a_mix_that_swings_from_look_to_look_moves_nobody() {
    let mut planner = Planner::new(Settings::default());
    let (reading, writing) =
        (situation(asked(90_000.0, 10.0), workers(4, 4)), situation(asked(10.0, 12_000.0), workers(4, 4)));
    for at in 0..200 {
        let now = if at % 2 == 0 { &reading } else { &writing };
        let verdict = planner.look(f64::from(at) * 2.0, now);
        assert!(verdict.moves.is_empty(), "look {at}: {verdict:?}");
    }
}

proptest! {
    #[test]
    fn a_move_never_strains_more_and_leaves_minima_pins_and_pauses_alone(
        prompts in 0.0..200_000f64, answers in 0.0..20_000f64, prefill in 1usize..20, decode in 1usize..20,
        pins in prop::collection::vec(any::<bool>(), 40), min_prefill in 0usize..4, min_decode in 0usize..4,
    ) {
        let settings = Settings { min_prefill, min_decode, ..Settings::default() };
        let mut planner = Planner::new(settings);
        let mut all = workers(prefill, decode);
        all.iter_mut().zip(&pins).for_each(|(worker, &pin)| worker.movable = pin);
        let mut now = situation(asked(prompts, answers), all);
        let mut moved_at: Option<f64> = None;
        for look in 0..60 {
            let time = 2.0 * f64::from(look);
            let verdict = planner.look(time, &now);
            if verdict.moves.is_empty() {
                continue;
            }
            prop_assert!(moved_at.is_none_or(|before| time - before >= settings.pause));
            moved_at = Some(time);
            for &at in &verdict.moves {
                prop_assert!(now.workers[at].movable);
                now.workers[at].decodes = !now.workers[at].decodes;
            }
            let decode = now.workers.iter().filter(|worker| worker.decodes).count();
            let split = Split { prefill: now.workers.len() - decode, decode };
            prop_assert!(split.decode >= 1 && split.prefill >= 1);
            prop_assert!(split.prefill >= settings.min_prefill.min(verdict.now.prefill));
            prop_assert!(split.decode >= settings.min_decode.min(verdict.now.decode));
            let strain = |split| forecast(split, &now.demand, &fleet()).strain(&now.targets);
            prop_assert!(strain(split) <= strain(verdict.now) * (1.0 + 1e-9));
        }
    }
}
