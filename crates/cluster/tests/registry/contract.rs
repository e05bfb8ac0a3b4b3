//! What every registry promises, checked on each of them.

use kvasir_cluster::{
    Audit, Document, Error, EtcdConfig, Event, EventKind, Found, MemoryHub, Office, Scope, audit, changed,
};
use kvasir_types::{Incarnation, MemberId, Role};

use crate::{
    etcd::Etcd,
    given::{Process, member, until},
};

/// A cluster that processes can join.
enum World {
    Memory(MemoryHub),
    Etcd(Box<Etcd>),
}

impl World {
    async fn process(&self) -> Process {
        self.process_with_lease(2).await
    }

    async fn process_with_lease(&self, lease_ttl_s: u32) -> Process {
        match self {
            Self::Memory(hub) => Process::in_memory(hub),
            Self::Etcd(etcd) => Process::with_etcd(EtcdConfig { lease_ttl_s, ..etcd.config() }).await.unwrap(),
        }
    }
}

/// Each law as a test of each registry.
macro_rules! laws {
    ($($law:ident),* $(,)?) => {
        mod memory {
            $(#[tokio::test]
            async fn $law() {
                super::$law(super::World::Memory(super::MemoryHub::new())).await;
            })*
        }
        mod etcd {
            $(#[tokio::test]
            async fn $law() {
                super::$law(super::World::Etcd(Box::new(super::Etcd::start().await))).await;
            })*
        }
    };
}

laws!(
    a_registered_member_is_seen_by_all_and_by_those_who_come_later,
    an_update_replaces_the_record_and_only_the_holder_may,
    a_deregistered_member_is_gone_at_once_and_its_name_is_free,
    a_name_has_one_holder_and_a_second_process_is_told,
    a_name_is_one_per_role,
    the_same_incarnation_may_register_again,
    a_crashed_process_leaves_the_view_and_its_name_is_free_for_its_next_life,
    a_view_that_did_not_change_is_not_announced,
    who_has_seen_the_same_change_has_the_same_epoch_and_it_grows,
    an_office_has_one_holder_and_a_later_one_has_a_greater_term,
    events_are_read_by_all_in_order_and_outlive_whoever_noted_them,
    what_is_set_is_seen_by_all_and_outlives_whoever_set_it_and_two_at_once_are_told,
);

async fn what_is_set_is_seen_by_all_and_outlives_whoever_set_it_and_two_at_once_are_told(world: World) {
    let (one, two) = (world.process().await, world.process().await);
    let scope = Scope::all(Role::Router);
    let only = Scope::one(Role::Router, "router-0".parse().unwrap());
    assert_eq!(one.registry.settings_of(&scope).await.unwrap(), None);
    let wanted = |value: u64| [("limits.max_inflight".to_owned(), Some(value.into()))];

    let (document, changes) = changed(&Document::default(), &scope, "alice", wanted(7));
    let revision = one.registry.set(&scope, &document, &changes).await.unwrap();
    let late = one.registry.set(&scope, &document, &changes).await;
    // Somebody who has not seen that.
    let (other, other_changes) = changed(&Document::default(), &scope, "bob", wanted(8));
    let refused = two.registry.set(&scope, &other, &other_changes).await.unwrap_err();
    assert!(matches!(&refused, Error::Changed { by, .. } if by == "alice"), "{refused}");
    assert!(refused.to_string().contains("router were changed in the meantime by alice"), "{refused}");
    // In etcd, an answer that got lost and the same once more is one.
    assert!(matches!(late, Ok(again) if again == revision) || matches!(late, Err(Error::Changed { .. })), "{late:?}");

    let Some(Found::Document(seen)) = two.registry.settings_of(&scope).await.unwrap() else { panic!("none") };
    assert_eq!((seen.revision, seen.set["limits.max_inflight"].as_u64()), (revision, Some(7)));
    let (next, next_changes) = changed(&seen, &scope, "bob", wanted(8));
    let newer = two.registry.set(&scope, &next, &next_changes).await.unwrap();
    assert!(newer > revision);
    let (document, changes) = changed(&Document::default(), &only, "carol", wanted(1));
    one.registry.set(&only, &document, &changes).await.unwrap();

    let value = |found: Option<&Found>| match found {
        Some(Found::Document(document)) => document.set["limits.max_inflight"].as_u64(),
        _ => None,
    };
    drop(one);
    for process in [&two, &world.process().await] {
        let mut settings = process.registry.settings();
        let both = settings.wait_for(|settings| {
            let of = |scope| settings.as_ref().and_then(|settings| value(settings.documents.get(scope)));
            (of(&scope), of(&only)) == (Some(8), Some(1))
        });
        tokio::time::timeout(crate::given::LIMIT, both).await.expect("seen").unwrap();
        let changes = process.registry.changes().await.unwrap();
        let told: Vec<_> = changes.iter().map(|change| (change.who.as_str(), change.scope.as_str())).collect();
        assert_eq!(told, [("alice", "router"), ("bob", "router"), ("carol", "router/router-0")]);
        assert_eq!((changes[1].from.as_ref(), changes[1].to.as_ref()), (Some(&7.into()), Some(&8.into())));
    }

    // There is an end to what is kept.
    let mut document = Document::default();
    let many = Scope::all(Role::Decode);
    for value in 0..300 {
        let (next, changes) = changed(&document, &many, "alice", wanted(value));
        let revision = two.registry.set(&many, &next, &changes).await.unwrap();
        document = Document { revision, ..next };
    }
    let changes = two.registry.changes().await.unwrap();
    assert_eq!((changes.len(), changes.last().unwrap().to.clone()), (256, Some(299.into())));
    let long = [("a".to_owned(), Some("x".repeat(70_000).into()))];
    let (document, changes) = changed(&document, &many, "alice", long);
    let refused = two.registry.set(&many, &document, &changes).await.unwrap_err();
    assert!(matches!(refused, Error::TooManySettings { bytes: 70_000.., .. }), "{refused}");
}

async fn events_are_read_by_all_in_order_and_outlive_whoever_noted_them(world: World) {
    let (one, two) = (world.process().await, world.process().await);
    let me: MemberId = "router-0".parse().unwrap();
    let event = |number: u64| {
        let event = Event::now(EventKind::Role, &me, "decode-1", format!("{number}")).by("planner");
        Event { at_ms: 1_000 + number, ..event }
    };
    for number in 0..5 {
        one.registry.note(event(number));
    }
    let asked = Audit {
        member: &me,
        who: "alice",
        what: "drain\n",
        on: "decode-1",
        result: Err("it is the last"),
        many: false,
    };
    // Those of a flood of nobody known are in the log alone.
    (0..9).for_each(|_| audit(&*one.registry, &Audit { many: true, ..asked.clone() }));
    audit(&*one.registry, &asked);
    let mut seen = Vec::new();
    until("all are there", async || {
        seen = two.registry.events("").await.unwrap();
        seen.len() == 6
    })
    .await;
    for (number, noted) in seen[..5].iter().enumerate() {
        assert_eq!(noted.event, event(number as u64));
    }
    let last = &seen[5].event;
    let texts = [&last.kind, &last.seen_by, &last.who, &last.what, &last.on, &last.result].map(String::as_str);
    assert_eq!(texts, ["audit", "router-0", "alice", "drain", "decode-1", "it is the last"]);
    assert_eq!(one.registry.events_lost(), 0);

    drop(one);
    assert_eq!(world.process().await.registry.events("").await.unwrap(), seen);
    assert_eq!(two.registry.events(&seen[2].key).await.unwrap(), seen[3..]);
    assert_eq!(two.registry.events(&seen[5].key).await.unwrap(), []);
}

async fn an_office_has_one_holder_and_a_later_one_has_a_greater_term(world: World) {
    let (one, two, three) = (world.process().await, world.process().await, world.process().await);
    let [planner, other, a, b, c] = ["planner", "other", "a", "b", "c"].map(|id| id.parse::<MemberId>().unwrap());
    let early = one.registry.claim_office(&planner, &a, Role::Decode).await;
    assert!(matches!(early, Err(Error::NotRegistered { .. })), "{early:?}");
    for (process, id, incarnation) in [(&one, "a", 1), (&two, "b", 2), (&three, "c", 3)] {
        process.registry.register(member(id, incarnation)).await.unwrap();
    }

    let first = one.registry.claim_office(&planner, &a, Role::Decode).await.unwrap();
    assert!(first.ours && first.holder == a);
    assert_eq!(one.registry.claim_office(&planner, &a, Role::Decode).await.unwrap(), first, "still");
    let seen = two.registry.claim_office(&planner, &b, Role::Decode).await.unwrap();
    assert_eq!(seen, Office { ours: false, ..first.clone() });
    let another = two.registry.claim_office(&other, &b, Role::Decode).await.unwrap();
    assert!(another.ours, "offices have nothing to do with one another");

    // The holder leaves; whoever asks next has it.
    one.registry.deregister(&a, Role::Decode).await.unwrap();
    let second = two.registry.claim_office(&planner, &b, Role::Decode).await.unwrap();
    assert!(second.ours && second.term > first.term, "{second:?} after {first:?}");

    // The holder crashes; its lease ends.
    drop(two);
    let mut third = second.clone();
    until("the office is free", async || {
        third = three.registry.claim_office(&planner, &c, Role::Decode).await.unwrap();
        third.ours
    })
    .await;
    assert!(third.term > second.term && third.holder == c, "{third:?} after {second:?}");
}

async fn a_registered_member_is_seen_by_all_and_by_those_who_come_later(world: World) {
    let (one, two) = (world.process().await, world.process().await);
    one.registry.register(member("b", 1)).await.unwrap();
    two.registry.register(member("a", 2)).await.unwrap();
    for process in [&one, &two, &world.process().await] {
        process.sees(&["a", "b"]).await;
        assert_eq!(process.view().members, [member("a", 2), member("b", 1)]);
        assert_eq!(process.view().role(Role::Decode).count(), 2);
        assert_eq!(process.view().role(Role::Prefill).count(), 0);
    }
}

async fn an_update_replaces_the_record_and_only_the_holder_may(world: World) {
    let (one, two) = (world.process().await, world.process().await);
    let mut changed = member("a", 1);
    one.registry.register(changed.clone()).await.unwrap();
    changed.draining = true;
    assert!(matches!(two.registry.update(changed.clone()).await, Err(Error::NotRegistered { .. })));
    one.registry.update(changed.clone()).await.unwrap();
    let mut view = two.registry.view();
    let seen = view.wait_for(|view| view.members == [changed.clone()]);
    tokio::time::timeout(crate::given::LIMIT, seen).await.unwrap().unwrap();
}

async fn a_deregistered_member_is_gone_at_once_and_its_name_is_free(world: World) {
    // With leases that outlast this test: only saying so takes the member out.
    let (one, two) = (world.process_with_lease(600).await, world.process_with_lease(600).await);
    let a = member("a", 1);
    one.registry.register(a.clone()).await.unwrap();
    two.sees(&["a"]).await;
    two.registry.deregister(&a.id, a.role).await.unwrap(); // not its own: nothing happens
    two.sees(&["a"]).await;
    one.registry.deregister(&a.id, a.role).await.unwrap();
    two.sees(&[]).await;
    one.registry.deregister(&a.id, a.role).await.unwrap();
    assert!(matches!(one.registry.update(a).await, Err(Error::NotRegistered { .. })));
    two.registry.register(member("a", 2)).await.unwrap();
    one.sees(&["a"]).await;
}

async fn a_name_has_one_holder_and_a_second_process_is_told(world: World) {
    let (one, two) = (world.process().await, world.process().await);
    // Somebody listens there: it may only be slow to say that it lives.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut held = member("a", 1);
    held.grpc = listener.local_addr().unwrap().to_string();
    one.registry.register(held.clone()).await.unwrap();
    let error = two.registry.register(member("a", 2)).await.unwrap_err();
    assert!(matches!(error, Error::Taken { holder: Incarnation(1), .. }), "{error}");
    assert!(error.to_string().contains("decode a is registered by another process"), "{error}");
    two.sees(&["a"]).await;
    assert_eq!(two.view().members, [held]);
}

async fn a_name_is_one_per_role(world: World) {
    let process = world.process().await;
    let mut prefill = member("a", 2);
    prefill.role = Role::Prefill;
    process.registry.register(member("a", 1)).await.unwrap();
    process.registry.register(prefill.clone()).await.unwrap();
    process.sees(&["a", "a"]).await;
    process.registry.deregister(&prefill.id, Role::Prefill).await.unwrap();
    process.sees(&["a"]).await;
    assert_eq!(process.view().members[0].role, Role::Decode);
}

async fn the_same_incarnation_may_register_again(world: World) {
    let process = world.process().await;
    let mut a = member("a", 1);
    process.registry.register(a.clone()).await.unwrap();
    a.grpc = "127.0.0.1:9".into();
    process.registry.register(a.clone()).await.unwrap();
    let mut view = process.registry.view();
    let seen = view.wait_for(|view| view.members == [a.clone()]);
    tokio::time::timeout(crate::given::LIMIT, seen).await.unwrap().unwrap();
}

async fn a_crashed_process_leaves_the_view_and_its_name_is_free_for_its_next_life(world: World) {
    let (one, two) = (world.process().await, world.process().await);
    one.registry.register(member("a", 1)).await.unwrap();
    two.sees(&["a"]).await;
    drop(one);
    // Its next life comes up at once, and gets its name then, or when the last one's lease is over.
    let next = world.process().await;
    next.registry.register(member("a", 2)).await.unwrap();
    let mut view = two.registry.view();
    let seen = view.wait_for(|view| view.members == [member("a", 2)]);
    tokio::time::timeout(crate::given::LIMIT, seen).await.unwrap().unwrap();
    drop(next);
    two.sees(&[]).await;
}

async fn a_view_that_did_not_change_is_not_announced(world: World) {
    let process = world.process().await;
    process.registry.register(member("a", 1)).await.unwrap();
    process.sees(&["a"]).await;
    let mut view = process.registry.view();
    let before = view.borrow_and_update().revision;
    process.registry.update(member("a", 1)).await.unwrap();
    process.registry.register(member("b", 2)).await.unwrap();
    process.sees(&["a", "b"]).await;
    assert_eq!(process.view().revision, before + 1);
}

async fn who_has_seen_the_same_change_has_the_same_epoch_and_it_grows(world: World) {
    let (one, two) = (world.process().await, world.process().await);
    let mut last = one.view().epoch;
    for (n, ids) in [(1, &["a"][..]), (2, &["a", "b"]), (3, &["a", "b", "c"])] {
        one.registry.register(member(ids[n - 1], n as u64)).await.unwrap();
        let late = world.process().await;
        for process in [&one, &two, &late] {
            process.sees(ids).await;
        }
        let epochs = [&one, &two, &late].map(|process| process.view().epoch);
        assert!(epochs[0] > last && epochs == [epochs[0]; 3], "{epochs:?} after {last}");
        last = epochs[0];
    }
    one.registry.deregister(&"b".parse().unwrap(), Role::Decode).await.unwrap();
    two.sees(&["a", "c"]).await;
    assert!(two.view().epoch > last);
}
