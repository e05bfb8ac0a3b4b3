//! What this process knows of the members: a pure structure, fed with what etcd says.
//!
//! ```text
//!   read everything ──▶ snapshot ─┐
//!   watch ──▶ put, delete ────────┼──▶ members ──▶ View
//!   clock ──▶ expire ─────────────┘
//! ```
//!
//! A snapshot after an outage may lack members that are alive: an etcd that came back empty learns of them only when they
//! register again. So a member that a snapshot does not name lingers for as long as a lease; one that the watch reports
//! gone is gone at once.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use kvasir_types::{Epoch, MemberId, Role};

use crate::Member;

/// A member's name.
pub(super) type Name = (Role, MemberId);

/// Most members that are kept; far above any cluster, it bounds what a broken writer can make us hold.
const MAX_MEMBERS: usize = 10_000;

/// Most refused keys that are remembered so as not to complain again.
const MAX_REFUSED: usize = 1_000;

/// A key and its record, as etcd has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    pub(super) key: &'a [u8],
    pub(super) record: &'a [u8],
    /// etcd's revision of the record.
    pub(super) revision: i64,
}

/// A record that is not a member's, seen for the first time.
#[derive(Debug, PartialEq)]
pub(super) struct Refused {
    pub(super) key: String,
    pub(super) reason: String,
}

#[derive(Debug)]
pub(super) struct Table {
    /// What keys begin with.
    prefix: String,
    members: BTreeMap<Name, Member>,
    /// etcd's latest revision of which everything about members is known.
    epoch: Epoch,
    /// Members that the last snapshot did not name, and when they go.
    lingering: BTreeMap<Name, Instant>,
    /// Refused keys and the revision that was complained about.
    refused: HashMap<Vec<u8>, i64>,
}

impl Table {
    pub(super) fn new(prefix: &str) -> Self {
        let prefix = format!("{prefix}/members/");
        Self {
            prefix,
            members: BTreeMap::new(),
            epoch: Epoch::default(),
            lingering: BTreeMap::new(),
            refused: HashMap::new(),
        }
    }

    /// What the keys of all members begin with.
    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// A member's key.
    pub(super) fn key(&self, (role, id): &Name) -> String {
        format!("{}{role}/{id}", self.prefix)
    }

    /// All members, by name.
    pub(super) fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// Everything up to that revision has been taken in. An etcd that came back with other data counts from 1 again; the
    /// epoch stays, for what was said with it must not look newer than what is said now.
    pub(super) fn seen(&mut self, revision: i64) {
        self.epoch = self.epoch.max(Epoch(u64::try_from(revision).unwrap_or(0)));
    }

    /// As of which revision the members are what they are here.
    pub(super) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Takes in everything that etcd has; members it does not name linger until `now + linger`.
    pub(super) fn snapshot<'a>(
        &mut self,
        entries: impl IntoIterator<Item = Entry<'a>>,
        now: Instant,
        linger: Duration,
    ) -> Vec<Refused> {
        for name in self.members.keys() {
            self.lingering.entry(name.clone()).or_insert(now + linger);
        }
        entries.into_iter().filter_map(|entry| self.put(entry).err().flatten()).collect()
    }

    /// Takes in one record. `Err(Some)`: it is none, and was not complained about yet.
    pub(super) fn put(&mut self, entry: Entry<'_>) -> Result<(), Option<Refused>> {
        match self.parse(entry) {
            Ok(member) => {
                self.refused.remove(entry.key);
                let name = (member.role, member.id.clone());
                self.lingering.remove(&name);
                self.members.insert(name, member);
                Ok(())
            }
            Err(reason) => {
                self.delete(entry.key); // whatever stood there before is overwritten
                Err(self.refuse(entry, reason))
            }
        }
    }

    /// Forgets a member, and says whose key it was.
    pub(super) fn delete(&mut self, key: &[u8]) -> Option<Name> {
        let name = self.name(key)?;
        self.lingering.remove(&name);
        self.members.remove(&name);
        Some(name)
    }

    /// Forgets members that have lingered long enough; whether there were any.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let (over, lingering) = std::mem::take(&mut self.lingering).into_iter().partition(|&(_, end)| end <= now);
        self.lingering = lingering;
        let over: BTreeMap<Name, Instant> = over;
        self.members.retain(|name, _| !over.contains_key(name));
        !over.is_empty()
    }

    /// When [`Self::expire`] has something to do.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.lingering.values().min().copied()
    }

    fn parse(&self, entry: Entry<'_>) -> Result<Member, String> {
        let member = Member::parse(entry.record)?;
        let name = (member.role, member.id.clone());
        if self.key(&name).as_bytes() != entry.key {
            return Err("the record is another member's than the key".to_owned());
        }
        if self.members.len() >= MAX_MEMBERS && !self.members.contains_key(&name) {
            return Err(format!("more than {MAX_MEMBERS} members"));
        }
        Ok(member)
    }

    fn refuse(&mut self, entry: Entry<'_>, reason: String) -> Option<Refused> {
        if self.refused.get(entry.key) == Some(&entry.revision) {
            return None;
        }
        if self.refused.len() >= MAX_REFUSED {
            self.refused.clear(); // at worst somebody is told twice
        }
        self.refused.insert(entry.key.to_owned(), entry.revision);
        let key = String::from_utf8_lossy(entry.key).chars().take(200).collect();
        Some(Refused { key, reason })
    }

    fn name(&self, key: &[u8]) -> Option<Name> {
        let (role, id) = std::str::from_utf8(key).ok()?.strip_prefix(&self.prefix)?.split_once('/')?;
        let role =
            [Role::Router, Role::Prefill, Role::Decode, Role::KvStore].into_iter().find(|r| r.to_string() == role)?;
        Some((role, id.parse().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::member::tests::member;

    const LINGER: Duration = Duration::from_secs(5);

    fn table() -> Table {
        Table::new("/test")
    }

    fn ids(table: &Table) -> Vec<&str> {
        table.members().map(|member| member.id.as_str()).collect()
    }

    fn stored(id: &str) -> (String, String) {
        let member = member(Role::Decode, id, 1);
        (table().key(&(Role::Decode, member.id.clone())), member.record())
    }

    fn entry<'a>((key, record): &'a (String, String), revision: i64) -> Entry<'a> {
        Entry { key: key.as_bytes(), record: record.as_bytes(), revision }
    }

    #[test]
    fn a_member_that_a_snapshot_lacks_lingers_for_a_lease_unless_it_comes_back() {
        let (a, b, c) = (stored("a"), stored("b"), stored("c"));
        let (mut table, start) = (table(), Instant::now());
        table.snapshot([entry(&a, 1), entry(&b, 1), entry(&c, 1)], start, LINGER);
        table.snapshot([], start, LINGER); // an empty etcd
        assert_eq!(ids(&table), ["a", "b", "c"]);
        table.put(entry(&a, 2)).unwrap(); // registered again
        assert_eq!(table.delete(b.0.as_bytes()), Some((Role::Decode, "b".parse().unwrap()))); // and was seen to go
        assert_eq!(ids(&table), ["a", "c"]);
        table.snapshot([entry(&a, 2)], start + LINGER / 2, LINGER); // does not begin c's time anew
        assert_eq!(table.next_expiry(), Some(start + LINGER));
        assert!(!table.expire(start + LINGER / 2));
        assert!(table.expire(start + LINGER));
        assert_eq!((ids(&table), table.next_expiry()), (vec!["a"], None));
    }

    #[test]
    fn what_is_no_member_is_told_once_for_each_of_its_revisions() {
        let mut table = table();
        let (good, bad) = (stored("a"), (stored("a").0, "{".to_owned()));
        table.put(entry(&good, 1)).unwrap();
        let refused = table.put(entry(&bad, 2)).unwrap_err().unwrap();
        assert_eq!(refused.key, "/test/members/decode/a");
        assert_eq!(ids(&table), [""; 0], "a record that was overwritten with rubbish is gone");
        assert_eq!(table.put(entry(&bad, 2)), Err(None));
        assert!(table.snapshot([entry(&bad, 2)], Instant::now(), LINGER).is_empty());
        assert_eq!(table.snapshot([entry(&bad, 3)], Instant::now(), LINGER).len(), 1);
        table.put(entry(&good, 4)).unwrap();
        assert_eq!(ids(&table), ["a"]);
    }

    #[test]
    fn a_record_under_another_members_key_is_refused() {
        let (a, b) = (stored("a"), stored("b"));
        let swapped = (a.0, b.1);
        assert!(table().put(entry(&swapped, 1)).unwrap_err().unwrap().reason.contains("another member"));
    }

    proptest! {
        /// Without outages the table is a map.
        #[test]
        fn puts_and_deletes_are_those_of_a_map(steps in prop::collection::vec((any::<bool>(), 0u8..4), 0..40)) {
            let (mut table, mut oracle) = (table(), std::collections::BTreeSet::new());
            for (revision, (put, which)) in steps.into_iter().enumerate() {
                let id = format!("m{which}");
                let stored = stored(&id);
                if put {
                    table.put(entry(&stored, revision as i64)).unwrap();
                    oracle.insert(id);
                } else {
                    table.delete(stored.0.as_bytes());
                    oracle.remove(&id);
                }
                prop_assert_eq!(ids(&table), oracle.iter().map(String::as_str).collect::<Vec<_>>());
                prop_assert_eq!(table.next_expiry(), None);
            }
        }

        #[test]
        fn no_key_from_outside_panics(key in prop::collection::vec(any::<u8>(), 0..40), tail in "[a-z/]{0,12}") {
            let mut table = table();
            table.delete(&key);
            table.delete(format!("/test/members/{tail}").as_bytes());
            let _ = table.put(Entry { key: &key, record: b"{}", revision: 1 });
        }
    }
}
