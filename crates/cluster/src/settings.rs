//! Settings that operators change while services run: what is kept of them, and what has become of them.
//!
//! A [`Document`] holds what is set for a [`Scope`]: all members of a role, or one of them. It is written as a whole, and
//! only over the one that its writer has seen: of two operators at once, one is told. Each change of a key goes into a
//! bounded history with it, in one step.
//!
//! What a key means is nobody's business here. Services check what they are given, and a document that can't be used is
//! theirs to refuse.

use std::{
    collections::BTreeMap,
    fmt,
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

use kvasir_types::{MemberId, Role};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;

/// Most bytes of a document's record.
pub(crate) const MAX_DOCUMENT_BYTES: usize = 64 << 10;
/// Most bytes of a change's record.
const MAX_CHANGE_BYTES: usize = 16 << 10;
/// Most documents that are kept.
pub(crate) const MAX_DOCUMENTS: usize = 1024;
/// Most changes that the history keeps.
pub(crate) const MAX_CHANGES: usize = 256;
/// Most keys of a document.
const MAX_KEYS: usize = 256;
/// Most bytes of a name, or of who it was.
const MAX_TEXT: usize = 256;
/// The form of documents that this version writes and reads.
const FORM: u32 = 1;

const ROLES: [Role; 4] = [Role::Router, Role::Prefill, Role::Decode, Role::KvStore];

/// Whom settings are for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scope {
    /// Members of this role.
    pub role: Role,
    /// This one of them only; `None`: all.
    pub member: Option<MemberId>,
}

impl Scope {
    /// All of a role.
    pub fn all(role: Role) -> Self {
        Self { role, member: None }
    }

    /// One of them.
    pub fn one(role: Role, member: MemberId) -> Self {
        Self { role, member: Some(member) }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.member {
            None => write!(f, "{}", self.role),
            Some(member) => write!(f, "{}/{member}", self.role),
        }
    }
}

/// It names no role, or no member.
#[derive(Debug, thiserror::Error)]
#[error("expected router, prefill, decode or kv-store, or one of these and a member's name, as in router/router-0")]
pub struct NoScope;

impl FromStr for Scope {
    type Err = NoScope;

    fn from_str(text: &str) -> Result<Self, NoScope> {
        let (role, member) = text.split_once('/').map_or((text, None), |(role, member)| (role, Some(member)));
        let role = ROLES.into_iter().find(|known| known.to_string() == role).ok_or(NoScope)?;
        let member = member.map(str::parse).transpose().map_err(|_| NoScope)?;
        Ok(Self { role, member })
    }
}

/// What is set for a scope.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// Of the record: another one is another version's.
    pub form: u32,
    /// The metadata's revision of it; 0: it was never written.
    #[serde(skip)]
    pub revision: u64,
    /// When it was written, in milliseconds since 1970, by the clock of the member that wrote it.
    #[serde(default)]
    pub at_ms: u64,
    /// Who wanted it so.
    #[serde(default)]
    pub who: String,
    /// The values, by key, with dots between its sections' names.
    pub set: BTreeMap<String, Value>,
}

impl Default for Document {
    fn default() -> Self {
        Self { form: FORM, revision: 0, at_ms: 0, who: String::new(), set: BTreeMap::new() }
    }
}

impl Document {
    pub(crate) fn record(&self) -> String {
        serde_json::to_string(self).expect("keys are text")
    }

    /// Whether it can be written.
    pub(crate) fn fits(&self, scope: &Scope) -> Result<(), Error> {
        let bytes = self.record().len();
        if bytes > MAX_DOCUMENT_BYTES || self.set.len() > MAX_KEYS {
            return Err(Error::TooManySettings { scope: scope.clone(), keys: self.set.len(), bytes });
        }
        Ok(())
    }

    /// Reads a record from outside.
    pub(crate) fn parse(record: &[u8], revision: u64) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Form {
            form: u32,
        }
        if record.len() > MAX_DOCUMENT_BYTES {
            return Err(format!("{} bytes, at most {MAX_DOCUMENT_BYTES} are allowed", record.len()));
        }
        let malformed = |error: serde_json::Error| format!("not a document of settings: {error}");
        let Form { form } = serde_json::from_slice(record).map_err(malformed)?;
        if form != FORM {
            return Err(format!("written by another version (form {form}, this one reads {FORM})"));
        }
        let read: Self = serde_json::from_slice(record).map_err(malformed)?;
        if read.set.len() > MAX_KEYS {
            return Err(format!("{} keys, at most {MAX_KEYS} are allowed", read.set.len()));
        }
        Ok(Self { revision, who: plain(&read.who), ..read })
    }
}

/// What stands in a document's place.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// A document.
    Document(Document),
    /// Something else: written by hand, or by another version.
    Unusable {
        /// The metadata's revision of it.
        revision: u64,
        /// What is wrong with it.
        reason: String,
    },
}

impl Found {
    /// The metadata's revision of it.
    pub fn revision(&self) -> u64 {
        match self {
            Self::Document(document) => document.revision,
            Self::Unusable { revision, .. } => *revision,
        }
    }
}

/// Everything that is set in the cluster.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// By whom it is for.
    pub documents: BTreeMap<Scope, Found>,
}

impl Settings {
    /// What is there, by names as they are in the metadata. What is for nobody that this version knows is left out.
    pub(crate) fn read<'a>(entries: impl IntoIterator<Item = (&'a str, &'a [u8], u64)>) -> Self {
        let found = entries.into_iter().filter_map(|(name, record, revision)| {
            let found = match Document::parse(record, revision) {
                Ok(document) => Found::Document(document),
                Err(reason) => Found::Unusable { revision, reason: plain(&reason) },
            };
            Some((name.parse().ok()?, found))
        });
        Self { documents: found.take(MAX_DOCUMENTS).collect() }
    }
}

/// A key that was set otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Change {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Who wanted it.
    pub who: String,
    /// For whom: a [`Scope`], as text.
    pub scope: String,
    /// Which key.
    pub key: String,
    /// What it was set to before; `None`: to nothing.
    pub from: Option<Value>,
    /// What it is set to; `None`: it is not set any more.
    pub to: Option<Value>,
}

impl Change {
    pub(crate) fn record(&self) -> String {
        serde_json::to_string(self).expect("keys are text")
    }

    /// Reads a record from outside; `None`: it is none.
    pub(crate) fn parse(record: &[u8]) -> Option<Self> {
        let change: Self = (record.len() <= MAX_CHANGE_BYTES).then(|| serde_json::from_slice(record).ok()).flatten()?;
        let Self { who, scope, key, .. } = &change;
        Some(Self { who: plain(who), scope: plain(scope), key: plain(key), ..change })
    }

    /// A record that readers accept: what is long is not kept twice.
    pub(crate) fn bounded(&self) -> Self {
        let short = |value: &Option<Value>| {
            let long = |value: &Value| value.to_string().len() > MAX_CHANGE_BYTES / 4;
            value.as_ref().map(|value| if long(value) { Value::from("(too long to be kept)") } else { value.clone() })
        };
        let Self { who, scope, key, .. } = self;
        let (from, to) = (short(&self.from), short(&self.to));
        Self { who: plain(who), scope: plain(scope), key: plain(key), from, to, at_ms: self.at_ms }
    }
}

/// Now, as documents and changes have it.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// In bounds, and fit for a terminal.
fn plain(text: &str) -> String {
    let mut bytes = 0;
    let fits = |c: &char| {
        bytes += c.len_utf8();
        bytes <= MAX_TEXT
    };
    text.chars().filter(|c| !c.is_control()).take_while(fits).collect()
}

/// What is set for a scope after some of its keys are set otherwise, and what that changes.
pub fn changed(
    before: &Document,
    scope: &Scope,
    who: &str,
    wanted: impl IntoIterator<Item = (String, Option<Value>)>,
) -> (Document, Vec<Change>) {
    let at_ms = now_ms();
    let mut after = Document { at_ms, who: plain(who), ..before.clone() };
    let mut changes = Vec::new();
    for (key, to) in wanted {
        let from = match &to {
            Some(value) => after.set.insert(key.clone(), value.clone()),
            None => after.set.remove(&key),
        };
        if from != to {
            changes.push(Change { at_ms, who: after.who.clone(), scope: scope.to_string(), key, from, to });
        }
    }
    (after, changes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_scope_is_a_role_or_one_of_its_members() {
        for text in ["router", "prefill", "decode", "kv-store", "decode/decode-0"] {
            assert_eq!(text.parse::<Scope>().unwrap().to_string(), text);
        }
        for bad in ["", "gpu-farm", "router/", "router/a/b", "/router", "router/a b"] {
            assert!(bad.parse::<Scope>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_no_document_stands_there_with_its_reason_and_what_is_for_nobody_is_left_out() {
        let good = Document { who: "alice\u{1b}".into(), ..Document::default() }.record();
        let entries: [(&str, &[u8], u64); 5] = [
            ("router", good.as_bytes(), 3),
            ("decode", b"{", 4),
            ("prefill", br#"{"form": 2, "keys": []}"#, 5),
            ("gpu-farm", good.as_bytes(), 6),
            ("kv-store/a", br#"{"form": 1, "set": {"a": 1}, "later": true}"#, 7),
        ];
        let read = Settings::read(entries);
        let reason = |scope: &str| match &read.documents[&scope.parse().unwrap()] {
            Found::Document(_) => String::new(),
            Found::Unusable { reason, .. } => reason.clone(),
        };
        assert_eq!(read.documents.len(), 4);
        assert_eq!((reason("router"), reason("kv-store/a")), (String::new(), String::new()));
        assert!(reason("decode").starts_with("not a document of settings: "), "{}", reason("decode"));
        assert_eq!(reason("prefill"), "written by another version (form 2, this one reads 1)");
        let Found::Document(router) = &read.documents[&Scope::all(Role::Router)] else { panic!("refused") };
        assert_eq!((router.who.as_str(), router.revision), ("alice", 3));
    }

    #[test]
    fn only_what_changes_is_a_change() {
        let scope = Scope::all(Role::Router);
        let wanted = [("a".to_owned(), Some(json!(1))), ("b".to_owned(), None)];
        let (first, changes) = changed(&Document::default(), &scope, "alice", wanted.clone());
        assert_eq!(changes.len(), 1);
        assert_eq!((changes[0].key.as_str(), &changes[0].from, &changes[0].to), ("a", &None, &Some(json!(1))));
        let (second, changes) = changed(&first, &scope, "bob", wanted);
        assert_eq!((changes, second.set == first.set), (vec![], true));
        let (third, changes) = changed(&second, &scope, "bob", [("a".to_owned(), None)]);
        assert!(third.set.is_empty() && changes[0].to.is_none());
        let long = Change { to: Some(json!("x".repeat(20_000))), ..Change::default() }.bounded();
        assert!(Change::parse(long.record().as_bytes()).is_some());
    }

    proptest! {
        #[test]
        fn no_record_from_outside_panics(record in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Document::parse(&record, 1);
            let _ = Change::parse(&record);
        }
    }
}
