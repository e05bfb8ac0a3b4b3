//! Who goes first, who gives way, and what an engine takes on.

use std::sync::{Arc, Mutex};

use kvasir_kv_cache::in_group;
use kvasir_types::{GroupKind, KvGroups, Retry, Sampling, TokenId, chain};

use super::rig::*;
use crate::{
    Admission, CacheEvent, Command, Config, Demand, Duty, Error, Limits, Mode, Priority, Rejected, Request, SeqId,
    Spill, SpilledBlock,
};

fn offline(prompt: &[TokenId], max_tokens: u32) -> Request {
    Request { priority: Priority::Offline, ..request(prompt, greedy(max_tokens), Mode::Generate) }
}

/// Admitted and told to compute by itself.
fn start(rig: &mut Rig, request: Request) -> (SeqId, Client) {
    let (seq, client) = rig.try_admit(request).unwrap();
    rig.engine.apply(Command::Compute(seq, None));
    (seq, client)
}

#[test]
fn online_requests_go_before_offline_ones_that_came_earlier() {
    let mut rig = Rig::new(32, Config { max_running: 1, ..config() });
    let (_, running) = rig.generate(&prompt(1, 6), 3);
    rig.step();
    let (_, patient) = start(&mut rig, offline(&prompt(2, 6), 3));
    let (_, urgent) = rig.generate(&prompt(3, 6), 3);
    while urgent.finished().is_none() {
        assert!(patient.admission().is_none());
        rig.step();
    }
    assert!(running.finished().is_some());
    rig.settle();
    assert_eq!(patient.tokens(), rig.answer(&prompt(2, 6), 3));
    rig.assert_no_leak();
}

#[test]
fn running_offline_sequences_give_way_when_places_or_blocks_run_out() {
    for (blocks, max_running) in [(32, 2), (8, 8)] {
        let mut rig = Rig::new(blocks, Config { max_running, ..config() });
        let (_, elder) = start(&mut rig, offline(&prompt(1, 6), 8));
        let (_, younger) = start(&mut rig, offline(&prompt(2, 6), 8));
        rig.step();
        rig.step();
        assert_eq!(rig.stats().running, 2);
        let (_, urgent) = rig.generate(&prompt(3, 18), 8);
        rig.step();
        // The younger one lost its place at once.
        assert!(urgent.admission().is_some());
        assert_eq!((rig.stats().preempted, rig.stats().preemptions), (1, 1));
        assert_eq!((elder.tokens().len(), younger.tokens().len()), (3, 2));
        rig.settle();
        for (client, name, len) in [(elder, 1, 6), (younger, 2, 6), (urgent, 3, 18)] {
            assert_eq!(client.tokens(), rig.answer(&prompt(name, len), 8));
        }
        rig.assert_no_leak();
    }
}

#[test]
fn nobody_gives_way_in_vain() {
    let mut rig = Rig::new(10, config());
    let (held, _) = rig.admit(&prompt(1, 20), greedy(1), Mode::Generate); // 6 of 10 blocks
    let (_, client) = start(&mut rig, offline(&prompt(2, 6), 20));
    rig.step();
    // Needs 6; with all of the offline one's there would be 4.
    let (_, urgent) = rig.generate(&prompt(3, 20), 2);
    rig.step();
    assert_eq!((rig.stats().preemptions, client.tokens().len()), (0, 2));
    rig.engine.apply(Command::Abort(held));
    rig.settle();
    assert_eq!(urgent.tokens(), rig.answer(&prompt(3, 20), 2));
    assert_eq!(client.tokens(), rig.answer(&prompt(2, 6), 20));
}

#[test]
fn an_offline_request_waits_for_no_longer_than_its_patience() {
    let mut rig = Rig::new(32, Config { max_running: 1, offline_patience: 20, max_waiting: 16, ..config() });
    let (_, patient) = start(&mut rig, offline(&prompt(1, 6), 30));
    let mut steps = 0;
    // Somebody more urgent is always there.
    while patient.finished().is_none() {
        while rig.stats().waiting < 4 {
            rig.generate(&prompt(2 + steps % 5, 6), 4);
        }
        rig.step();
        steps += 1;
        assert!(steps < 100, "starved: {:?}", rig.stats());
    }
    // 20 steps of patience, the running one's rest, and its own 30.
    assert!((50..60).contains(&steps), "{steps}");
    assert_eq!((rig.stats().promotions, rig.stats().preemptions), (1, 0));
    assert_eq!(patient.tokens(), rig.answer(&prompt(1, 6), 30));
}

#[test]
fn an_offline_prompt_that_gets_no_place_in_the_batch_is_aged_too() {
    let mut rig = Rig::new(64, Config { max_batch_tokens: 12, chunk_tokens: 12, offline_patience: 5, ..config() });
    let (_, patient) = start(&mut rig, offline(&prompt(1, 30), 1));
    let mut name = 2;
    for _ in 0..40 {
        if rig.stats().running < 3 {
            // Prompts that fill every step.
            rig.generate(&prompt(name, 36), 1);
            name += 1;
        }
        rig.step();
    }
    assert!(patient.finished().is_some(), "{:?}", rig.stats());
    assert_eq!(rig.stats().promotions, 1);
}

#[test]
fn each_priority_has_its_own_bounded_queue() {
    let mut rig = Rig::new(32, Config { max_running: 1, max_waiting: 2, max_waiting_offline: 3, ..config() });
    rig.admit(&prompt(0, 4), greedy(1), Mode::Generate);
    (0..2).for_each(|_| drop(rig.try_admit(request(&prompt(0, 4), greedy(1), Mode::Generate)).unwrap()));
    (0..3).for_each(|_| drop(rig.try_admit(offline(&prompt(0, 4), 1)).unwrap()));
    let full = |rejected: Rejected| match rejected.error {
        Error::QueueFull { limit } => limit,
        other => panic!("{other}"),
    };
    assert_eq!(full(rig.try_admit(request(&prompt(0, 4), greedy(1), Mode::Generate)).err().unwrap()), 2);
    assert_eq!(full(rig.try_admit(offline(&prompt(0, 4), 1)).err().unwrap()), 3);
    rig.engine.close();
    rig.assert_no_leak();
}

#[test]
fn other_limits_count_at_the_door_at_once_and_in_the_next_step() {
    let first_step = |limits: Option<Limits>| {
        let mut rig = Rig::new(32, config());
        if let Some(limits) = limits {
            rig.engine.intake().set_limits(limits);
        }
        let both = [1, 2].map(|name| rig.generate(&prompt(name, 8), 1));
        rig.step();
        let computed = rig.stats().prefilled_tokens;
        rig.settle();
        assert!(both.iter().all(|(_, client)| client.finished().is_some()));
        rig.assert_no_leak();
        computed
    };
    let usual = config().limits();
    assert_eq!(first_step(None), 16);
    // As few as can work: a token for each that may write, and a block.
    assert_eq!(first_step(Some(Limits { max_batch_tokens: 0, ..usual })), 12);

    let mut rig = Rig::new(32, Config { max_running: 1, ..config() });
    rig.admit(&prompt(0, 4), greedy(1), Mode::Generate);
    let admit = |rig: &mut Rig| rig.try_admit(request(&prompt(0, 4), greedy(1), Mode::Generate)).map(drop);
    admit(&mut rig).unwrap();
    rig.engine.intake().set_limits(Limits { max_waiting: 1, ..usual });
    assert!(matches!(admit(&mut rig).unwrap_err().error, Error::QueueFull { limit: 1 }));
    rig.engine.intake().set_limits(Limits { max_waiting: 2, ..usual });
    admit(&mut rig).unwrap();
    rig.engine.close();
    rig.assert_no_leak();
}

#[test]
fn a_duty_decides_at_the_door_and_leaves_alone_what_is_under_way() {
    let mut rig = Rig::new(64, config());
    let (_, writing) = rig.generate(&prompt(1, 6), 12);
    let (prefill, parked) = rig.try_admit(request(&prompt(2, 20), greedy(1), Mode::PrefillOnly)).unwrap();
    rig.engine.apply(Command::Compute(prefill, None));
    rig.step();
    for (duty, refused, taken) in
        [(Duty::Prefill, Mode::Generate, Mode::PrefillOnly), (Duty::Decode, Mode::PrefillOnly, Mode::Generate)]
    {
        rig.engine.set_duty(duty);
        let rejected = rig.try_admit(request(&prompt(3, 6), greedy(2), refused)).err().unwrap();
        assert!(matches!(rejected.error, Error::WrongDuty { duty: told } if told == duty));
        assert_eq!(rejected.error.retry(), Retry::Elsewhere);
        let (seq, _) = rig.try_admit(*rejected.request.clone()).err().map_or_else(
            || panic!("taken after all"),
            |_| rig.try_admit(request(&prompt(3, 6), greedy(2), taken)).unwrap(),
        );
        let before = writing.tokens().len();
        rig.step();
        assert_eq!(writing.tokens().len(), before + 1, "an answer goes on in every step");
        rig.engine.apply(Command::Abort(seq));
    }
    rig.settle();
    assert_eq!(parked.tokens(), rig.answer(&prompt(2, 20), 1));
    assert_eq!(writing.tokens(), rig.answer(&prompt(1, 6), 12));
    rig.engine.apply(Command::Release(prefill));
    rig.assert_no_leak();
}

#[test]
fn while_decoding_is_the_duty_prompts_get_small_chunks_beside_answers_and_large_ones_alone() {
    let config = Config { max_batch_tokens: 40, chunk_tokens: 32, remainder_tokens: 4, ..config() };
    let mut rig = Rig::new(64, config);
    rig.engine.set_duty(Duty::Decode);
    let (_, writing) = rig.generate(&prompt(1, 6), 6);
    rig.step();
    let (_, other) = rig.generate(&prompt(2, 40), 3);
    rig.settle();
    let runs = rig.script.runs();
    // The first prompt alone; five tokens with a block each beside them; the rest of the second prompt; two tokens.
    assert_eq!(runs, [6, 5, 5, 5, 5, 5, 20, 1, 1]);
    assert_eq!(writing.tokens(), rig.answer(&prompt(1, 6), 6));
    assert_eq!(other.tokens(), rig.answer(&prompt(2, 40), 3));
}

#[test]
fn a_request_says_how_many_blocks_it_needs_and_may_come_to_need() {
    let rig = Rig::new(64, config());
    let ask = |prompt_len, max_tokens, choices, mode| {
        let request = Request { choices, ..request(&prompt(1, prompt_len), greedy(max_tokens), mode) };
        let Demand { to_start, to_end, at_most } = rig.engine.intake().demand(&request);
        (to_start, to_end, at_most)
    };
    assert_eq!(ask(8, 1, 1, Mode::Generate), (3, 3, 3));
    assert_eq!(ask(8, 10, 1, Mode::Generate), (3, 5, 5)); // KV of 17 tokens
    assert_eq!(ask(8, 10, 3, Mode::Generate), (3, 5, 5 + 2 * 3));
    assert_eq!(ask(8, 1000, 1, Mode::Generate), (3, 12, 12)); // the context ends at 48
    assert_eq!(ask(8, 1000, 4, Mode::PrefillOnly), (2, 2, 2));
}

#[test]
fn a_client_that_asks_for_more_than_the_pool_can_hold_is_refused_with_the_numbers() {
    let asked = |max_tokens| Sampling { max_tokens_asked: true, ..greedy(max_tokens) };
    let long = prompt(2, 5);
    let ask = |groups: KvGroups, sampling, choices| {
        let mut rig = Rig::with_groups(4, config(), groups);
        let (seq, client) =
            rig.try_admit(Request { choices, ..request(&long, sampling, Mode::Generate) }).map_err(|rejected| {
                assert_eq!(rejected.error.retry(), Retry::Elsewhere, "another pool may be larger");
                rejected.error.to_string()
            })?;
        rig.engine.apply(Command::Compute(seq, None));
        rig.settle();
        rig.assert_no_leak();
        Ok::<_, String>((0..choices).map(|choice| client.choice(choice).len()).collect::<Vec<_>>())
    };
    let full = || KvGroups::full(LAYERS);
    let refused = |sampling| ask(full(), sampling, 1).unwrap_err();
    // 16 slots hold the KV of 5 + 11 tokens; the 12th token of the answer needs none.
    let told = "a prompt of 5 tokens and an answer of 13 may need 5 blocks, there are 4: ask for at most 12 tokens";
    assert_eq!(refused(asked(13)), told);
    assert_eq!(ask(full(), asked(12), 1), Ok(vec![12]));
    assert_eq!(ask(full(), greedy(13), 1), Ok(vec![12]), "nobody asked for 13");
    // What the context leaves is all that can be meant: 43 tokens, whose last needs no slot.
    let told = "a prompt of 5 tokens and an answer of 43 may need 12 blocks, there are 4: ask for at most 12 tokens";
    assert_eq!(refused(asked(1_000_000)), told);
    // Of an answer that is being continued, the tokens that are there count: 2 of these 14.
    let told = "a prompt of 5 tokens and an answer of 15 may need 5 blocks, there are 4: ask for at most 14 tokens";
    assert_eq!(refused(Sampling { continued: 2, ..asked(15) }), told);
    // Several choices may have the pool one after another: only what one alone needs must be there.
    assert_eq!(ask(full(), asked(12), 3), Ok(vec![12; 3]));
    assert!(ask(full(), asked(13), 3).is_err());
    // A window keeps what an answer needs small, however long it gets.
    let window = KvGroups::of_layers(&[GroupKind::Sliding { window: 5 }; LAYERS]);
    assert_eq!(ask(window, asked(40), 1), Ok(vec![40]));
}

/// What was moved out, of whom.
type Out = Vec<(SeqId, Vec<SpilledBlock>)>;

/// Writes down what is moved out; brings back what it is told to.
#[derive(Clone, Default)]
struct Keeps {
    out: Arc<Mutex<Out>>,
    back: Arc<Mutex<Vec<(SeqId, Admission)>>>,
    brings: bool,
    panics: bool,
}

impl Spill for Keeps {
    fn out(&mut self, seq: SeqId, blocks: &[SpilledBlock]) {
        assert!(!self.panics, "a spill's bug");
        self.out.lock().unwrap().push((seq, blocks.to_vec()));
    }

    fn back(&mut self, seq: SeqId, admission: &Admission) -> bool {
        self.back.lock().unwrap().push((seq, admission.clone()));
        self.brings
    }
}

/// Two answers that do not fit side by side; the younger one's blocks are moved out.
fn spilling(keeps: &Keeps) -> (Rig, [Client; 2]) {
    let full = KvGroups::full(LAYERS);
    let mut rig = Rig::with_parts(9, config(), full, |_, parts| parts.spill = Some(Box::new(keeps.clone())));
    let clients = [1, 2].map(|name| rig.generate(&prompt(name, 10), 14).1);
    while rig.stats().preemptions == 0 {
        rig.step();
    }
    (rig, clients)
}

#[test]
fn what_a_preempted_sequence_has_computed_is_offered_with_its_names() {
    let keeps = Keeps::default();
    let (mut rig, clients) = spilling(&keeps);
    let out = keeps.out.lock().unwrap().clone();
    let [(_, blocks)] = &out[..] else { panic!("{out:?}") };
    let tokens = [prompt(2, 10), clients[1].tokens()].concat();
    let names = chain(request(&tokens, greedy(1), Mode::Generate).root, &tokens, BLOCK);
    assert!(blocks.len() >= 3);
    for (index, spilled) in blocks.iter().enumerate() {
        assert_eq!((spilled.hash, spilled.group), (in_group(names[index], 0), 0));
    }
    rig.settle();
    for (client, name) in clients.iter().zip([1, 2]) {
        assert_eq!(client.tokens(), rig.answer(&prompt(name, 10), 14));
    }
    // Asked, but without an answer: it was computed.
    assert_eq!((keeps.back.lock().unwrap().len(), rig.stats().recalls), (1, 0));
    rig.assert_no_leak();
}

#[test]
fn a_recalled_sequence_waits_for_its_blocks_and_computes_what_did_not_come() {
    for bring in [0, 1, usize::MAX] {
        let keeps = Keeps { brings: true, ..Keeps::default() };
        let (mut rig, clients) = spilling(&keeps);
        rig.settle();
        let (seq, admission) = keeps.back.lock().unwrap()[0].clone();
        assert_eq!((rig.stats().held, rig.stats().recalls), (1, 1));
        let tokens = [prompt(2, 10), clients[1].tokens()].concat();
        let cached = admission.cached_tokens / BLOCK;
        let until = admission.hashes.len().min(cached + bring.min(10));
        assert!(admission.hashes.len() > cached);
        rig.script.land(&admission.tables, &tokens, cached * BLOCK..until * BLOCK);
        let prefilled = rig.stats().prefilled_tokens;
        rig.engine.apply(Command::Landed(seq, until * BLOCK));
        rig.engine.apply(Command::Resume(seq, TokenId(1))); // not a prompt any more: ignored
        rig.engine.apply(Command::Compute(seq, None));
        rig.settle();
        assert_eq!(rig.stats().prefilled_tokens - prefilled, (tokens.len() - until * BLOCK) as u64);
        for (client, name) in clients.iter().zip([1, 2]) {
            assert_eq!(client.tokens(), rig.answer(&prompt(name, 10), 14));
        }
        rig.assert_no_leak();
    }
}

#[test]
fn a_spill_that_panics_keeps_nothing_and_harms_nobody() {
    let keeps = Keeps { panics: true, ..Keeps::default() };
    let (mut rig, clients) = spilling(&keeps);
    rig.settle();
    for (client, name) in clients.iter().zip([1, 2]) {
        assert_eq!(client.tokens(), rig.answer(&prompt(name, 10), 14));
    }
    assert_eq!(keeps.back.lock().unwrap().len(), 0);
    rig.assert_no_leak();
}

#[test]
fn followers_of_the_cache_know_what_is_in_it() {
    let mut rig = Rig::new(8, Config { cache_events: 12, ..config() });
    let mut follower = Follower::default();
    for name in 0..6 {
        rig.generate(&prompt(name, 14), 3);
        rig.settle();
        follower.follow(&mut rig.engine);
    }
    assert_eq!((follower.known.len(), follower.snapshots), (rig.stats().blocks.cached, 0));
    // One that sleeps too long is told so, and begins anew.
    for name in 6..12 {
        rig.generate(&prompt(name, 14), 3);
        rig.settle();
    }
    follower.follow(&mut rig.engine);
    assert_eq!(follower.snapshots, 1);
    // Blocks hang on one another from the tenant's root on.
    let told = Arc::<Mutex<Vec<CacheEvent>>>::default();
    let to = Arc::clone(&told);
    let all = prompt(20, 14);
    rig.generate(&all, 1);
    rig.settle();
    rig.engine.apply(Command::CacheEvents(Box::new(move |batch| *to.lock().unwrap() = batch.events)));
    let root = request(&all, greedy(1), Mode::Generate).root;
    let names = chain(root, &all, BLOCK);
    let stored: Vec<_> = told
        .lock()
        .unwrap()
        .iter()
        .filter_map(|event| match event {
            CacheEvent::Stored(stored) => Some((stored.hash, stored.parent, stored.group)),
            CacheEvent::Removed(_) => None,
        })
        .collect();
    assert_eq!(stored, [(names[0], root, 0), (names[1], names[0], 0), (names[2], names[1], 0)]);
}
