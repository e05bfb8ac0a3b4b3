//! Configuration for people.

use kvasir_cluster::Change;
use kvasir_runtime::config::redacted;
use serde_json::{Value, json};

use super::{Difference, Done, Running, SetFor};
use crate::{events::utc, probe::printable, render::Table};

/// A change without what is nobody's business.
pub(super) fn shown(change: Change) -> Change {
    let value = |value: Option<Value>| value.map(|value| shown_value((change.key.clone(), value)).1);
    Change { from: value(change.from), to: value(change.to), ..change }
}

/// A key and its value, in the same way.
pub(super) fn shown_value((key, value): (String, Value)) -> (String, Value) {
    let name = key.rsplit('.').next().unwrap_or_default();
    let value = redacted(json!({ name: value }))[name].clone();
    (key, value)
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "not set".to_owned(),
        Value::String(text) if text.is_empty() => r#""""#.to_owned(),
        Value::String(text) => printable(text),
        value => printable(&value.to_string()),
    }
}

pub(super) fn running(running: &Running) -> String {
    let mut answer = String::new();
    let mut table = Table::new(&["KEY", "VALUE", "FROM", "LIVE"]);
    for entry in &running.keys {
        let live = if entry.live { "yes" } else { "" };
        table.row(vec![printable(&entry.key), text(&entry.value), printable(&entry.from), live.to_owned()]);
    }
    answer += &table.render();
    if let Some(why) = &running.refused {
        let why: String = why.chars().filter(|c| !c.is_control()).take(400).collect();
        answer += &format!("\n{}: what is set in the cluster can't be used: {why}\n", printable(&running.member));
    }
    answer
}

pub(super) fn documents(all: &[SetFor]) -> String {
    if all.is_empty() {
        return "nothing is set\n".to_owned();
    }
    let mut table = Table::new(&["FOR", "KEY", "VALUE", "LAST CHANGE (UTC)", "BY"]);
    let mut unusable = String::new();
    for found in all {
        let whom = if found.gone { format!("{} (gone)", found.scope) } else { found.scope.clone() };
        for (key, value) in &found.set {
            table.row(vec![whom.clone(), printable(key), text(value), utc(found.at_ms), printable(&found.who)]);
        }
        if let Some(why) = &found.unusable {
            unusable += &format!("{whom}: what is set can't be used: {}\n", printable(why));
        }
    }
    let table = if table.is_empty() { String::new() } else { table.render() };
    table + &unusable
}

pub(super) fn done(done: &Done, dry_run: bool) -> String {
    if done.changes.is_empty() {
        return "nothing changes: it is so already\n".to_owned();
    }
    let would = if dry_run { "would be" } else { "is" };
    let mut answer = String::new();
    for Change { key, from, to, .. } in &done.changes {
        let before = from.as_ref().map_or_else(|| "not set".to_owned(), text);
        let now = to.as_ref().map_or_else(|| "not set any more".to_owned(), |to| format!("set to {}", text(to)));
        answer += &format!("{}: {} {would} {now} (before: {before})\n", done.scope, printable(key));
    }
    if !done.acting.is_empty() {
        answer += &format!("acting on it: {}\n", done.acting.join(", "));
    }
    for (member, why) in &done.not_yet {
        answer += &format!("not yet: {member}: {}\n", printable(why));
    }
    for member in &done.exceptions {
        answer += &format!("{} has something of its own set (kvasirctl config unset)\n", printable(member));
    }
    answer
}

pub(super) fn differences(one: &Running, other: Option<&Running>, all: &[Difference]) -> String {
    let against = other.map_or_else(|| "DEFAULT".to_owned(), |other| printable(&other.member));
    if all.is_empty() {
        return match other {
            None => format!("{} runs with the defaults\n", printable(&one.member)),
            Some(_) => format!("{} and {against} run with the same\n", printable(&one.member)),
        };
    }
    let one = printable(&one.member);
    let mut table = Table::new(&["KEY", one.as_str(), against.as_str(), "FROM"]);
    for Difference { key, one, other, from } in all {
        table.row(vec![printable(key), text(one), text(other), printable(from)]);
    }
    table.render()
}

pub(super) fn history(changes: &[Change]) -> String {
    if changes.is_empty() {
        return "nothing was changed\n".to_owned();
    }
    let mut table = Table::new(&["TIME (UTC)", "FOR", "KEY", "FROM", "TO", "BY"]);
    for Change { at_ms, who, scope, key, from, to } in changes {
        let value = |value: &Option<Value>| value.as_ref().map_or_else(|| "not set".to_owned(), text);
        let row = [utc(*at_ms), printable(scope), printable(key), value(from), value(to), printable(who)];
        table.row(row.to_vec());
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Entry, differences as compare};

    fn member(name: &str, keys: &[(&str, Value, &str, Value)]) -> Running {
        let entry = |(key, value, from, default): &(&str, Value, &str, Value)| Entry {
            key: (*key).to_owned(),
            value: value.clone(),
            from: (*from).to_owned(),
            default: default.clone(),
            live: *from == "cluster",
        };
        let keys = keys.iter().map(entry).collect();
        let (member, role) = (name.to_owned(), "router".to_owned());
        Running { member, role, revision: 3, member_revision: 0, refused: None, keys }
    }

    #[test]
    fn values_are_shown_with_where_they_come_from_and_what_differs() {
        let one = member(
            "router-0",
            &[
                ("id", json!("router-0"), "file", json!(null)),
                ("limits.max_inflight", json!(7), "cluster", json!(4096)),
                ("policy", json!("kv-aware"), "default", json!("kv-aware")),
            ],
        );
        let other = member(
            "router-1",
            &[
                ("id", json!("router-1\u{1b}"), "file", json!(null)),
                ("limits.max_inflight", json!(7), "cluster", json!(4096)),
                ("later", json!(1), "file", json!(null)),
            ],
        );
        let refused = Running { refused: Some("config router: not JSON".into()), ..member("router-1", &[]) };
        insta::assert_snapshot!(running(&one), @r"
        KEY                  VALUE     FROM     LIVE
        id                   router-0  file
        limits.max_inflight  7         cluster  yes
        policy               kv-aware  default
        ");
        assert!(
            running(&refused)
                .ends_with("\nrouter-1: what is set in the cluster can't be used: config router: not JSON\n")
        );
        insta::assert_snapshot!(differences(&one, None, &compare(&one, None)), @r"
        KEY                  router-0  DEFAULT  FROM
        id                   router-0  not set  file
        limits.max_inflight  7         4096     cluster
        ");
        insta::assert_snapshot!(differences(&one, Some(&other), &compare(&one, Some(&other))), @r"
        KEY     router-0  router-1  FROM
        id      router-0  router-1  file
        policy  kv-aware  not set   default
        later   not set   1         file
        ");
        assert_eq!(differences(&one, Some(&one), &[]), "router-0 and router-0 run with the same\n");
    }

    #[test]
    fn what_was_changed_says_who_acts_on_it() {
        let change = Change {
            at_ms: 1_709_251_199_000,
            who: "alice from 10.0.0.1:7".into(),
            scope: "router".into(),
            key: "limits.max_inflight".into(),
            from: None,
            to: Some(json!(7)),
        };
        let mut all = Done {
            scope: "router".into(),
            revision: 9,
            changes: vec![change.clone()],
            exceptions: vec!["router-2".into()],
            acting: vec!["router-0".into(), "router-2".into()],
            not_yet: [("router-1".to_owned(), "no answer".to_owned())].into(),
        };
        insta::assert_snapshot!(done(&all, false), @r"
        router: limits.max_inflight is set to 7 (before: not set)
        acting on it: router-0, router-2
        not yet: router-1: no answer
        router-2 has something of its own set (kvasirctl config unset)
        ");
        insta::assert_snapshot!(history(&[change]), @r"
        TIME (UTC)           FOR     KEY                  FROM     TO  BY
        2024-02-29 23:59:59  router  limits.max_inflight  not set  7   alice from 10.0.0.1:7
        ");
        all.changes.clear();
        assert_eq!(done(&all, true), "nothing changes: it is so already\n");
        let secret = Change { key: "access.token".into(), to: Some(json!("abc")), ..Change::default() };
        assert_eq!(shown(secret).to, Some(json!("(taken out)")));
        assert_eq!((history(&[]), documents(&[])), ("nothing was changed\n".into(), "nothing is set\n".into()));
    }
}
