//! What a verb answers: a text in the form that was asked for, and whether all is well.

use clap::ValueEnum;
use serde::Serialize;

/// Form of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    Table,
    /// For people with a wide terminal: every member, more columns
    Wide,
    /// For programs
    Json,
    /// For programs
    Yaml,
}

impl Output {
    /// A person reads it.
    pub(crate) fn is_for_people(self) -> bool {
        matches!(self, Self::Table | Self::Wide)
    }

    /// The answer in this form; `table` makes the one for people.
    pub(crate) fn show<T: Serialize + ?Sized>(self, answer: &T, table: impl FnOnce() -> String) -> String {
        match self {
            Self::Table | Self::Wide => table(),
            Self::Json => json(answer),
            Self::Yaml => yaml(answer),
        }
    }
}

/// What a verb has to say at its end.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// For the standard output.
    pub(crate) text: String,
    /// It was answered, and the answer is that something is wrong: exit status 3.
    pub(crate) unwell: bool,
}

impl From<String> for Answer {
    fn from(text: String) -> Self {
        Self { text, unwell: false }
    }
}

/// Wrong usage that only shows once arguments, variables and contexts are put together: exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// The answer as JSON.
pub(crate) fn json(answer: &(impl Serialize + ?Sized)) -> String {
    let mut text = serde_json::to_string_pretty(answer).expect("an answer has no map with keys that are not text");
    text.push('\n');
    text
}

/// The same as YAML: by way of JSON, so that both have the same names.
fn yaml(answer: &(impl Serialize + ?Sized)) -> String {
    let value = serde_json::to_value(answer).expect("an answer has no map with keys that are not text");
    serde_yaml_ng::to_string(&value).expect("what is JSON is YAML")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_get_the_same_in_both_forms() {
        let answer = serde_json::json!({"b": [1, "x: y"], "a": {"deep": null}});
        let table = || "table".to_owned();
        let json = Output::Json.show(&answer, table);
        let yaml = Output::Yaml.show(&answer, table);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap(), answer);
        assert_eq!(serde_yaml_ng::from_str::<serde_json::Value>(&yaml).unwrap(), answer);
        assert_eq!([Output::Table, Output::Wide].map(|form| form.show(&answer, table)), ["table", "table"]);
    }
}
