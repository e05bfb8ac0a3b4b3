//! Members that come and go, put into the cluster's history by one of the routers: the first by name of those there are.
//!
//! All of them see the same, so no word between them is needed; while the members change, two may put down the same thing, or
//! the one that would have goes itself, and then the next one sees that.

use std::{collections::BTreeMap, sync::Arc};

use kvasir_cluster::{Event, EventKind, Member, Registry, View};
use kvasir_types::{MemberId, Role};

/// Watches for as long as the process lives.
pub(crate) async fn watch(id: MemberId, registry: Arc<dyn Registry>) {
    let mut views = registry.view();
    let mut before = Arc::clone(&views.borrow_and_update());
    loop {
        if views.changed().await.is_err() {
            return std::future::pending().await; // the process is about to end
        }
        let now = Arc::clone(&views.borrow_and_update());
        let first = now.role(Role::Router).map(|router| &router.id).min();
        if first == Some(&id) {
            for (on, what) in differences(&before, &now) {
                registry.note(Event::now(EventKind::Member, &id, on, what));
            }
        }
        before = now;
    }
}

/// Who came, went, or is another life of itself.
fn differences(before: &View, now: &View) -> Vec<(String, String)> {
    let by_name = |view: &View| -> BTreeMap<(Role, MemberId), Member> {
        view.members.iter().map(|member| ((member.role, member.id.clone()), member.clone())).collect()
    };
    let (before, now) = (by_name(before), by_name(now));
    let came = now.iter().filter_map(|(name, member)| {
        let what = match before.get(name) {
            None => "came",
            Some(former) if former.incarnation != member.incarnation => "was started again",
            Some(_) => return None,
        };
        let version = if member.version.is_empty() { String::new() } else { format!(" (version {})", member.version) };
        Some((name.1.to_string(), format!("{} {what}{version}", name.0)))
    });
    let went = before.keys().filter(|name| !now.contains_key(name));
    let went = went.map(|name| (name.1.to_string(), format!("{} went", name.0)));
    came.chain(went).collect()
}

#[cfg(test)]
mod tests {
    use kvasir_cluster::{Duty, MemoryHub};
    use kvasir_types::{Incarnation, PROTOCOL_VERSION};

    use super::*;

    fn member(role: Role, id: &str, incarnation: u64) -> Member {
        Member {
            id: id.parse().unwrap(),
            incarnation: Incarnation(incarnation),
            role,
            grpc: String::new(),
            admin: String::new(),
            http: String::new(),
            protocol: PROTOCOL_VERSION,
            version: "1.2".into(),
            model: None,
            segment: None,
            store: None,
            engine: None,
            draining: false,
            duty: Duty::default(),
        }
    }

    #[test]
    fn who_comes_goes_or_starts_again_is_told_and_who_changes_is_not() {
        let view = |members: &[Member]| View { members: members.to_vec(), ..View::default() };
        let (a, b) = (member(Role::Decode, "a", 1), member(Role::Prefill, "b", 2));
        let mut moved = a.clone();
        moved.draining = true;
        let again = member(Role::Prefill, "b", 3);
        assert_eq!(differences(&view(&[a.clone(), b.clone()]), &view(&[moved, b.clone()])), []);
        let told = differences(&view(&[a.clone(), b]), &view(&[again, member(Role::Router, "r", 4)]));
        let told: Vec<String> = told.into_iter().map(|(on, what)| format!("{on}: {what}")).collect();
        assert_eq!(
            told,
            ["r: router came (version 1.2)", "b: prefill was started again (version 1.2)", "a: decode went"]
        );
    }

    #[tokio::test]
    async fn one_router_of_several_puts_it_on_record() {
        let hub = MemoryHub::new();
        let registries = [hub.registry(), hub.registry()];
        let watching = async |at: usize, id: &str| {
            registries[at].register(member(Role::Router, id, at as u64)).await.unwrap();
            watch(id.parse().unwrap(), Arc::clone(&registries[at])).await;
        };
        let worker = hub.registry();
        let story = async {
            tokio::task::yield_now().await;
            worker.register(member(Role::Decode, "d", 7)).await.unwrap();
            loop {
                let events = worker.events("").await.unwrap();
                if events.iter().any(|noted| noted.event.on == "d") {
                    return events;
                }
                tokio::task::yield_now().await;
            }
        };
        let events = tokio::select! {
            events = story => events,
            () = async { futures_util::future::join(watching(0, "r-0"), watching(1, "r-1")).await; } => unreachable!(),
        };
        let of_d: Vec<_> = events.iter().filter(|noted| noted.event.on == "d").collect();
        assert_eq!(of_d.len(), 1);
        assert_eq!((of_d[0].event.seen_by.as_str(), of_d[0].event.kind.as_str()), ("r-0", "member"));
    }
}
