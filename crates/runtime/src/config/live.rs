//! The fifth layer: what the cluster's operators set while a service runs, laid over what it was started with.
//!
//! ```text
//!   defaults < file < environment < flags  =  Base   (once, at start)
//!                                     Base < what is set for all of a kind < what is set for this one  =  Running
//! ```
//!
//! Only live keys ([`Config::LIVE`]) may be set so. The result is checked as a whole, as at start; if anything is wrong with
//! it there is no result, and whoever asks keeps what it has.

use std::{collections::BTreeMap, sync::Arc};

use serde_yaml_ng::{Mapping, Value};

use super::{
    Config, Error,
    layers::{self, Origins, flattened},
};

/// What a service was started with, and where each value of it came from.
#[derive(Clone, Debug)]
pub struct Base {
    tree: Value,
    origins: Origins,
}

/// Values by key.
pub type Set = BTreeMap<String, serde_json::Value>;

/// Some of what is set in the cluster.
#[derive(Clone, Copy, Debug)]
pub struct Over<'a> {
    /// What it is called in an error.
    pub name: &'a str,
    /// What is told of values that come from it.
    pub origin: &'static str,
    /// What is set.
    pub set: &'a Set,
}

/// A configuration as it is now.
#[derive(Debug)]
pub struct Running<C> {
    /// The configuration.
    pub config: Arc<C>,
    tree: Value,
    origins: Origins,
}

/// A key, its value and where that comes from.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Entry {
    /// The key, with dots between its sections' names.
    pub key: String,
    /// Its value; secrets are taken out.
    pub value: serde_json::Value,
    /// `default`, `file`, `environment`, `flag`, `start` (nobody knows which of these), `cluster` (set for all of a kind) or `member` (set for this one).
    pub from: &'static str,
    /// Its default.
    pub default: serde_json::Value,
    /// Whether it may be changed while the service runs.
    pub live: bool,
}

impl Base {
    pub(crate) fn new(tree: Value, origins: Origins) -> Self {
        Self { tree, origins }
    }

    /// Of a service that was given its configuration as it is: nobody knows where from.
    pub fn of<C: Config>(config: &C) -> Self {
        let tree = layers::tree_of(config);
        let (defaults, mut origins) = (layers::tree_of(&C::default()), Origins::new());
        let defaults: BTreeMap<String, Value> = flattened(&defaults).into_iter().collect();
        for (key, value) in flattened(&tree) {
            if defaults.get(&key) != Some(&value) {
                origins.insert(key, "start");
            }
        }
        Self { tree, origins }
    }

    /// Without anything laid over it: the configuration that the service was started with, which it has checked itself.
    pub fn alone<C: Config>(&self, config: C) -> Running<C> {
        Running { config: Arc::new(config), tree: self.tree.clone(), origins: self.origins.clone() }
    }

    /// Lays what is set over it, the last word last.
    pub fn over<C: Config>(&self, all: &[Over<'_>]) -> Result<Running<C>, Error> {
        let (mut tree, mut origins) = (self.tree.clone(), self.origins.clone());
        for Over { name, origin, set } in all {
            for (key, value) in *set {
                let value = serde_yaml_ng::to_value(value).expect("what is JSON is YAML");
                layers::lay::<C>(&mut tree, nested(key, value), name)?;
                allowed::<C>(key, &tree, name)?;
                origins.retain(|known, _| known != key && !below(known, key));
                origins.insert(key.clone(), origin);
            }
        }
        let config = layers::check::<C>(&tree, all.last().map_or("defaults", |last| last.name))?;
        config.verify().map_err(|reason| Error::Malformed {
            layer: all.last().map_or("defaults", |last| last.name).to_owned(),
            reason,
        })?;
        Ok(Running { tree: layers::tree_of(&config), config: Arc::new(config), origins })
    }

    /// What a value means that somebody wrote for a key: YAML, or a text where that does not fit, as with `--set`.
    ///
    /// # Errors
    /// There is no such key, it may not be changed while a service runs, or the value is none of its values.
    pub fn read<C: Config>(&self, key: &str, text: &str, name: &str) -> Result<serde_json::Value, Error> {
        self.is_live::<C>(key, name)?;
        let path: Vec<String> = key.split('.').map(str::to_owned).collect();
        let mut tree = self.tree.clone();
        layers::lay_text::<C>(&mut tree, &path, text, name)?;
        // What was written, in the form the service understood: not what lies beneath, if it is a section.
        let read = layers::tree_of(&layers::check::<C>(&tree, name)?);
        let mut value = at(&read, key).cloned().unwrap_or(Value::Null);
        if value.is_mapping()
            && let Ok(written) = serde_yaml_ng::from_str::<Value>(text)
        {
            value = written;
        }
        Ok(serde_json::to_value(&value).unwrap_or_default())
    }

    /// Whether a key may be set, or have been set.
    ///
    /// # Errors
    /// It may not, or there is none.
    pub fn is_live<C: Config>(&self, key: &str, name: &str) -> Result<(), Error> {
        if key.split('.').any(str::is_empty) {
            let reason = "expected a key, with dots between its sections' names".to_owned();
            return Err(Error::Refused { layer: name.to_owned(), key: key.to_owned(), reason });
        }
        // Nothing may be no value of it; only whether there is such a key is asked.
        match layers::lay::<C>(&mut self.tree.clone(), nested(key, Value::Null), name) {
            Err(Error::Refused { layer, key, reason }) if reason.starts_with("unknown field") => {
                Err(Error::Refused { layer, key, reason })
            }
            _ => allowed::<C>(key, &self.tree, name),
        }
    }
}

impl<C: Config> Running<C> {
    /// Every key.
    pub fn entries(&self) -> Vec<Entry> {
        let defaults: BTreeMap<String, Value> = flattened(&layers::tree_of(&C::default())).into_iter().collect();
        let entry = |(key, value): (String, Value)| {
            let from = layers::origin(&self.origins, &key);
            let live = C::LIVE.iter().any(|(live, _)| *live == key || below(&key, live));
            let shown = |value: &Value| {
                let name = key.rsplit('.').next().unwrap_or_default();
                let value = serde_json::json!({ name: value });
                super::redacted(value)[name].clone()
            };
            Entry { value: shown(&value), default: defaults.get(&key).map(shown).unwrap_or_default(), from, live, key }
        };
        flattened(&self.tree).into_iter().map(entry).collect()
    }

    /// Its tree, for sections that every service has.
    pub(crate) fn tree(&self) -> &Value {
        &self.tree
    }
}

/// Whether a key may be changed while the service runs.
fn allowed<C: Config>(key: &str, tree: &Value, layer: &str) -> Result<(), Error> {
    if C::LIVE.iter().any(|(live, _)| *live == key || below(key, live)) {
        return Ok(());
    }
    let inside: Vec<&str> = C::LIVE.iter().map(|(live, _)| *live).filter(|live| below(live, key)).collect();
    let reason = if inside.is_empty() || at(tree, key).is_none_or(|value| !value.is_mapping()) {
        "is read at start only; set it in the file (or a variable, or a flag) and start the service again".to_owned()
    } else {
        format!("is a section; while the service runs, one key at a time is set: {}", inside.join(", "))
    };
    Err(Error::Refused { layer: layer.to_owned(), key: key.to_owned(), reason })
}

fn below(key: &str, section: &str) -> bool {
    key.strip_prefix(section).is_some_and(|rest| rest.starts_with('.'))
}

fn at<'a>(tree: &'a Value, key: &str) -> Option<&'a Value> {
    key.split('.').try_fold(tree, |value, name| value.get(name))
}

fn nested(key: &str, value: Value) -> Value {
    key.rsplit('.').fold(value, |value, name| Value::Mapping(Mapping::from_iter([(Value::from(name), value)])))
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};
    use serde_json::json;

    use super::*;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Example {
        listen: String,
        limits: Limits,
        shares: BTreeMap<String, u8>,
        token: String,
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Limits {
        inflight: u32,
        threads: u32,
    }

    impl Config for Example {
        const LIVE: &'static [(&'static str, &'static str)] = &[("limits.inflight", "now"), ("shares", "now")];

        fn verify(&self) -> Result<(), String> {
            if self.limits.inflight > 100 { Err("limits.inflight: at most 100".into()) } else { Ok(()) }
        }
    }

    fn base() -> Base {
        let set = vec!["limits.threads=2".to_owned(), "token=abc".to_owned()];
        super::super::Layers { set, ..Default::default() }.load::<Example>().unwrap().base()
    }

    fn over(set: serde_json::Value) -> Result<Running<Example>, Error> {
        let set: Set = serde_json::from_value(set).unwrap();
        base().over(&[Over { name: "cluster settings", origin: "cluster", set: &set }])
    }

    #[test]
    fn the_cluster_has_the_last_word_and_every_value_says_where_it_is_from() {
        let running = over(json!({"limits.inflight": 7, "shares": {"acme": 3}})).unwrap();
        assert_eq!((running.config.limits.inflight, running.config.limits.threads), (7, 2));
        let entries = running.entries();
        let entry = |key: &str| entries.iter().find(|entry| entry.key == key).unwrap_or_else(|| panic!("{entries:?}"));
        assert_eq!((entry("limits.inflight").from, entry("limits.inflight").live), ("cluster", true));
        assert_eq!((entry("limits.threads").from, entry("limits.threads").live), ("flag", false));
        assert_eq!((entry("listen").from, entry("shares.acme").from), ("default", "cluster"));
        assert_eq!((&entry("token").value, entry("token").from), (&json!("(taken out)"), "flag"));
        assert_eq!((&entry("limits.inflight").default, &entry("limits.inflight").value), (&json!(0), &json!(7)));
        let one: Set = [("limits.inflight".to_owned(), json!(9))].into();
        let all: Set = [("limits.inflight".to_owned(), json!(8))].into();
        let layers =
            [Over { name: "all", origin: "cluster", set: &all }, Over { name: "one", origin: "member", set: &one }];
        let running = base().over::<Example>(&layers).unwrap();
        assert_eq!((running.config.limits.inflight, running.entries()[1].from), (9, "member"));
        assert_eq!(Base::of(&*running.config).over::<Example>(&[]).unwrap().config, running.config);
    }

    #[test]
    fn what_may_not_be_set_or_makes_no_sense_is_told_by_its_key() {
        let told = |set| over(set).map(|_| ()).unwrap_err().to_string();
        for (set, line) in [
            (
                json!({"listen": "x"}),
                "cluster settings: listen: is read at start only; set it in the file (or a variable, or a flag) and start \
                 the service again",
            ),
            (
                json!({"limits": {"inflight": 3}}),
                "cluster settings: limits: is a section; while the service runs, one key at a time is set: limits.inflight",
            ),
            (
                json!({"limits.inflght": 3}),
                "cluster settings: limits.inflght: unknown field `inflght` (did you mean `limits.inflight`?), expected \
                 `inflight` or `threads`",
            ),
            (
                json!({"limits.inflight": "many"}),
                "cluster settings: limits.inflight: invalid type: string \"many\", expected u32",
            ),
            (json!({"limits.inflight": 101}), "cluster settings: limits.inflight: at most 100"),
        ] {
            assert_eq!(told(set), line);
        }
        let base = base();
        let read =
            |key: &str, text: &str| base.read::<Example>(key, text, "config set").map_err(|error| error.to_string());
        assert_eq!(read("limits.inflight", "12"), Ok(json!(12)));
        assert_eq!(read("shares", "{acme: 5}"), Ok(json!({"acme": 5})));
        assert_eq!(read("shares.acme", "5"), Ok(json!(5)));
        assert!(read("inflight", "1").unwrap_err().contains("did you mean `limits.inflight`?"));
        for key in ["", "a..b", ".", "limits."] {
            assert!(read(key, "1").is_err(), "{key:?}");
        }
        assert!(base.is_live::<Example>("limits.inflight", "config unset").is_ok());
        assert!(base.is_live::<Example>("shares.nobody", "config unset").is_ok());
        let told = base.is_live::<Example>("limits.thread", "config unset").unwrap_err().to_string();
        assert!(told.contains("did you mean `limits.threads`?"), "{told}");
    }
}
