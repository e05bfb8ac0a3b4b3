//! Who is next: start-time fair queueing between tenants, by tokens (Goyal, Vin, Cheng: Start-time Fair Queueing, SIGCOMM
//! 1996). Pure data.
//!
//! Every request costs tokens. A tenant's requests are strung on a line of virtual time, each as long as its cost over the
//! tenant's weight; the one that begins first goes first. A tenant that was away begins now, not where it left: what it did
//! not use is gone, and what others used meanwhile does not count against them. Offline requests have a line of their own and
//! go when no online one waits.

use std::collections::{BTreeMap, HashMap};

use kvasir_types::Priority;

/// A waiting request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Ticket(u64);

/// Virtual time: tokens over weight.
type Tag = u64;

/// The unit of a tag: fractions of a token, so that weights can divide.
const UNIT: u64 = 1 << 10;

/// One line.
#[derive(Debug, Default)]
struct Line {
    /// By start, then by arrival.
    waiting: BTreeMap<(Tag, Ticket), Waiting>,
    /// The start of the one that went last.
    now: Tag,
    /// Where each tenant's last request ends, if that is still to come.
    ends: HashMap<String, Tag>,
}

#[derive(Debug)]
struct Waiting {
    tenant: String,
    cost: u64,
}

/// The queue.
#[derive(Debug, Default)]
pub(crate) struct Fair {
    lines: [Line; 2],
    next: u64,
    /// Waiting requests by ticket: line and start.
    places: HashMap<Ticket, (usize, Tag)>,
    /// Waiting requests of each tenant, and their cost.
    tenants: HashMap<String, (usize, u64)>,
    cost: u64,
}

fn line(priority: Priority) -> usize {
    match priority {
        Priority::Online => 0,
        Priority::Offline => 1,
    }
}

impl Fair {
    /// Appends a request of `cost` tokens.
    pub(crate) fn push(&mut self, tenant: &str, weight: u32, cost: u64, priority: Priority) -> Ticket {
        let ticket = Ticket(self.next);
        self.next += 1;
        let at = line(priority);
        let Line { waiting, now, ends } = &mut self.lines[at];
        let start = ends.get(tenant).copied().unwrap_or(0).max(*now);
        ends.insert(tenant.to_owned(), start.saturating_add(length(cost, weight)));
        waiting.insert((start, ticket), Waiting { tenant: tenant.to_owned(), cost });
        self.places.insert(ticket, (at, start));
        let (count, sum) = self.tenants.entry(tenant.to_owned()).or_default();
        *count += 1;
        *sum += cost;
        self.cost += cost;
        ticket
    }

    /// The next one, offline ones only if `offline`.
    pub(crate) fn pop(&mut self, offline: bool) -> Option<Ticket> {
        let lines = if offline { 2 } else { 1 };
        let at = (0..lines).find(|&at| !self.lines[at].waiting.is_empty())?;
        let line = &mut self.lines[at];
        let ((start, ticket), waiting) = line.waiting.pop_first()?;
        line.now = line.now.max(start);
        if line.waiting.is_empty() && line.ends.len() > 1024 {
            let now = line.now;
            line.ends.retain(|_, end| *end > now);
        }
        self.places.remove(&ticket);
        self.forget(&waiting);
        Some(ticket)
    }

    /// Takes one out that waits no more.
    pub(crate) fn remove(&mut self, ticket: Ticket) {
        let Some((at, start)) = self.places.remove(&ticket) else { return };
        if let Some(waiting) = self.lines[at].waiting.remove(&(start, ticket)) {
            self.forget(&waiting);
        }
    }

    /// What a request of a tenant cost beyond what was thought, or (negative) less: its next ones wait for that.
    pub(crate) fn correct(&mut self, tenant: &str, weight: u32, priority: Priority, more: i64) {
        let line = &mut self.lines[line(priority)];
        let length = length(more.unsigned_abs(), weight);
        let end = line.ends.entry(tenant.to_owned()).or_insert(line.now);
        *end = if more > 0 { end.saturating_add(length) } else { end.saturating_sub(length) };
    }

    /// The last request of the tenant that has most waiting for its share; `None` if that is `tenant` itself.
    pub(crate) fn most_greedy(&self, tenant: &str) -> Option<Ticket> {
        let own = self.tenants.get(tenant).map_or(0, |(count, _)| *count);
        let (greedy, count) = self.tenants.iter().max_by_key(|(name, (count, _))| (*count, name.as_str()))?;
        if count.0 <= own + 1 {
            return None;
        }
        let of = |line: &Line| {
            line.waiting.iter().rev().find(|(_, waiting)| waiting.tenant == *greedy).map(|((_, ticket), _)| *ticket)
        };
        of(&self.lines[1]).or_else(|| of(&self.lines[0]))
    }

    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    /// Tokens that go before a new request of a tenant: at most all that wait.
    pub(crate) fn before(&self, tenant: &str, weight: u32, priority: Priority) -> u64 {
        let at = line(priority);
        let (own, all) = (self.tenants.get(tenant).map_or(0, |(_, cost)| *cost), self.cost);
        // Others go at most as far as our own do, each by its weight; of weights we know ours only: one is the usual.
        let others = self.tenants.iter().filter(|(name, _)| *name != tenant);
        let share: u64 = others.map(|(_, (_, cost))| (*cost).min(own / u64::from(weight.max(1)) + UNIT)).sum();
        if at == 0 { (own + share).min(all) } else { all }
    }

    fn forget(&mut self, waiting: &Waiting) {
        self.cost -= waiting.cost;
        if let Some((count, sum)) = self.tenants.get_mut(&waiting.tenant) {
            *count -= 1;
            *sum -= waiting.cost;
            if *count == 0 {
                self.tenants.remove(&waiting.tenant);
            }
        }
    }
}

fn length(cost: u64, weight: u32) -> Tag {
    cost.saturating_mul(UNIT) / u64::from(weight.max(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ONLINE: Priority = Priority::Online;
    const OFFLINE: Priority = Priority::Offline;

    #[test]
    fn a_tenant_with_a_thousand_requests_does_not_keep_another_waiting() {
        let mut queue = Fair::default();
        let flood: Vec<_> = (0..1_000).map(|_| queue.push("flood", 1, 100, ONLINE)).collect();
        for ticket in &flood[..10] {
            assert_eq!(queue.pop(true), Some(*ticket));
        }
        let small = queue.push("small", 1, 100, ONLINE);
        let next: Vec<_> = (0..2).filter_map(|_| queue.pop(true)).collect();
        assert!(next.contains(&small), "{next:?}");
        // What it did not use while it was away is not saved up.
        let many: Vec<_> = (0..10).map(|_| queue.push("small", 1, 100, ONLINE)).collect();
        let next: Vec<_> = (0..10).filter_map(|_| queue.pop(true)).collect();
        let of_small = next.iter().filter(|ticket| many.contains(ticket)).count();
        assert!((4..=6).contains(&of_small), "{of_small}");
    }

    #[test]
    fn offline_requests_go_when_no_online_one_waits() {
        let mut queue = Fair::default();
        let offline = queue.push("a", 1, 1, OFFLINE);
        let online = queue.push("a", 1, 1_000, ONLINE);
        assert_eq!((queue.pop(true), queue.pop(false), queue.pop(true)), (Some(online), None, Some(offline)));
    }

    #[test]
    fn what_cost_more_than_was_thought_is_waited_for() {
        let mut queue = Fair::default();
        let first = queue.push("a", 1, 10, ONLINE);
        assert_eq!(queue.pop(true), Some(first));
        queue.correct("a", 1, ONLINE, 1_000);
        let a = queue.push("a", 1, 10, ONLINE);
        let b: Vec<_> = (0..50).map(|_| queue.push("b", 1, 10, ONLINE)).collect();
        assert!((0..50).all(|at| queue.pop(true) == Some(b[at])));
        assert_eq!(queue.pop(true), Some(a));
    }

    #[test]
    fn a_full_queue_sends_away_the_last_of_whoever_has_most_in_it() {
        let mut queue = Fair::default();
        let many: Vec<_> = (0..10).map(|_| queue.push("many", 1, 1, ONLINE)).collect();
        queue.push("few", 1, 1, ONLINE);
        assert_eq!(queue.most_greedy("new"), Some(many[9]));
        assert_eq!(queue.most_greedy("few"), Some(many[9]));
        assert_eq!(queue.most_greedy("many"), None);
    }

    proptest! {
        #[test]
        fn shares_follow_weights_and_nothing_is_lost(
            weights in prop::collection::vec(1u32..5, 2..5),
            costs in prop::collection::vec(1u64..100, 20..60),
        ) {
            let mut queue = Fair::default();
            let mut owner = HashMap::new();
            // Everybody has more waiting than will be served.
            for (at, weight) in weights.iter().enumerate() {
                for _ in 0..20 {
                    for cost in &costs {
                        let ticket = queue.push(&format!("t{at}"), *weight, *cost, ONLINE);
                        owner.insert(ticket, (at, *cost));
                    }
                }
            }
            let total = owner.len();
            let mut served = vec![0u64; weights.len()];
            for _ in 0..total / weights.len() {
                let ticket = queue.pop(true).unwrap();
                let (at, cost) = owner.remove(&ticket).unwrap();
                served[at] += cost;
            }
            // While all are waiting, no two are further apart than two of the largest requests (theorem 1 of the paper).
            if (0..weights.len()).all(|at| queue.tenants.contains_key(&format!("t{at}"))) {
                let share: Vec<f64> = served.iter().zip(&weights).map(|(s, w)| *s as f64 / f64::from(*w)).collect();
                let (least, most) = share.iter().fold((f64::MAX, 0f64), |(l, m), s| (l.min(*s), m.max(*s)));
                prop_assert!(most - least <= 200.0, "{share:?}");
            }
            while let Some(ticket) = queue.pop(true) {
                prop_assert!(owner.remove(&ticket).is_some());
            }
            prop_assert!(owner.is_empty() && queue.len() == 0 && queue.cost == 0 && queue.tenants.is_empty());
        }

        #[test]
        fn removed_ones_are_never_popped(removed in prop::collection::btree_set(0usize..50, 0..50)) {
            let mut queue = Fair::default();
            let tickets: Vec<_> = (0..50).map(|at| queue.push(&format!("t{}", at % 3), 1, at, ONLINE)).collect();
            removed.iter().for_each(|at| queue.remove(tickets[*at]));
            removed.iter().for_each(|at| queue.remove(tickets[*at]));
            let popped: Vec<_> = std::iter::from_fn(|| queue.pop(true)).collect();
            prop_assert_eq!(popped.len(), 50 - removed.len());
            prop_assert!(removed.iter().all(|at| !popped.contains(&tickets[*at])));
        }
    }
}
