//! What happened in the cluster: a bounded history, kept where it outlives whoever saw it.
//!
//! Writing never waits: an event goes into a short queue, and whoever keeps the registry writes it. What can't be written at
//! once (etcd is away, too much happens) is dropped and counted: [`Registry::events_lost`](crate::Registry::events_lost).
//!
//! Readers skip what they can't read, so a later version may say more; a kind that is not known is shown as it is.

use std::time::{SystemTime, UNIX_EPOCH};

use kvasir_types::MemberId;
use serde::{Deserialize, Serialize};

use crate::Registry;

/// Longest text of an event, in bytes; longer ones are cut.
const MAX_TEXT: usize = 512;
/// Most bytes of an event's record that are read.
pub(crate) const MAX_EVENT_BYTES: usize = 8 << 10;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A member came, went, or was started again.
    Member,
    /// A worker works as something else, or is pinned.
    Role,
    /// A worker or a node of the store is cordoned, drains, is drained, serves again.
    Stage,
    /// Routers choose otherwise.
    Policy,
    /// A router sends nothing to a worker for a while, as it failed.
    Ejection,
    /// A setting was changed.
    Config,
    /// Somebody asked for a change, and got it or not.
    Audit,
}

impl EventKind {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Member, Self::Role, Self::Stage, Self::Policy, Self::Ejection, Self::Config, Self::Audit];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Member => "member",
            Self::Role => "role",
            Self::Stage => "stage",
            Self::Policy => "policy",
            Self::Ejection => "ejection",
            Self::Config => "config",
            Self::Audit => "audit",
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Event {
    /// When, in milliseconds since 1970, by the clock of the one who saw it.
    pub at_ms: u64,
    /// What it is about: an [`EventKind`]'s name, or one of a later version's.
    pub kind: String,
    /// The member that saw it.
    pub seen_by: String,
    /// Whom it happened to.
    pub on: String,
    /// What happened, for people.
    pub what: String,
    /// Who wanted it: an operator's name and address, or a planner's term; empty: nobody in particular.
    pub who: String,
    /// Of an audit: `done`, or why not.
    pub result: String,
}

impl Event {
    /// Just now.
    pub fn now(kind: EventKind, seen_by: &MemberId, on: impl Into<String>, what: impl Into<String>) -> Self {
        let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let (kind, seen_by) = (kind.as_str().to_owned(), seen_by.to_string());
        Self { at_ms, kind, seen_by, on: on.into(), what: what.into(), ..Self::default() }
    }

    /// At somebody's wish.
    #[must_use]
    pub fn by(self, who: impl Into<String>) -> Self {
        Self { who: who.into(), ..self }
    }

    /// The same, in bounds and fit for a terminal.
    pub(crate) fn plain(mut self) -> Self {
        let Self { kind, seen_by, on, what, who, result, .. } = &mut self;
        for text in [kind, seen_by, on, what, who, result] {
            if text.len() > MAX_TEXT || text.chars().any(char::is_control) {
                let mut bytes = 0;
                let fits = |c: &char| {
                    bytes += c.len_utf8();
                    bytes <= MAX_TEXT
                };
                *text = text.chars().filter(|c| !c.is_control()).take_while(fits).collect();
            }
        }
        self
    }

    pub(crate) fn record(&self) -> String {
        serde_json::to_string(self).expect("an event has no map with keys that are not text")
    }

    /// Reads a record from outside; `None`: it is none.
    pub(crate) fn parse(record: &[u8]) -> Option<Self> {
        let event: Self = (record.len() <= MAX_EVENT_BYTES).then(|| serde_json::from_slice(record).ok()).flatten()?;
        Some(event.plain())
    }
}

/// An event and its place in the history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Noted {
    /// Grows with time, as far as clocks agree: what follows it is asked for by it.
    pub key: String,
    /// What happened.
    pub event: Event,
}

/// Somebody asked for a change.
#[derive(Clone, Debug)]
pub struct Audit<'a> {
    /// Where it was asked.
    pub member: &'a MemberId,
    /// Who: an operator and an address.
    pub who: &'a str,
    /// What was asked.
    pub what: &'a str,
    /// For whom, or what.
    pub on: &'a str,
    /// Whether it was done, or why not.
    pub result: Result<(), &'a str>,
    /// One of many by nobody known: it is for the log only.
    pub many: bool,
}

/// Puts a change that was asked for into the log (target `audit`) and into the cluster's events.
pub fn audit(registry: &dyn Registry, audit: &Audit<'_>) {
    let Audit { member, who, what, on, result, many } = audit;
    let event = Event::now(EventKind::Audit, member, *on, *what).by(*who);
    // Whoever asked may be nobody known: what they wrote is cut before it is logged, too.
    let event = Event { result: result.err().unwrap_or("done").to_owned(), ..event }.plain();
    let Event { on, what, who, result, .. } = &event;
    tracing::info!(target: "audit", who, what, on, result, "asked to change");
    if !many {
        registry.note(event);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn events_are_cut_and_cleaned_and_those_of_later_versions_are_read() {
        let long = Event { what: "ü".repeat(400), who: "a\u{1b}[31mb\n".into(), ..Event::default() };
        let plain = long.plain();
        assert_eq!((plain.what.chars().count(), plain.who.as_str()), (256, "a[31mb"));
        assert_eq!(Event::parse(plain.record().as_bytes()), Some(plain));
        let later = br#"{"at_ms":1,"kind":"weather","what":"rain","umbrella":true}"#;
        assert_eq!(Event::parse(later).unwrap().kind, "weather");
        assert_eq!(Event::parse(b"7"), None);
        assert_eq!(Event::parse(&vec![b' '; MAX_EVENT_BYTES + 1]), None);
    }

    proptest! {
        #[test]
        fn no_record_from_outside_panics_or_is_longer_than_its_bounds(record in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Event::parse(&record);
        }

        #[test]
        fn every_text_fits(text in ".{0,900}") {
            let event = Event { on: text, ..Event::default() }.plain();
            prop_assert!(event.on.len() <= MAX_TEXT && !event.on.chars().any(char::is_control));
        }
    }
}
