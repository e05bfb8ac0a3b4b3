//! The log law: a service that says WARN or ERROR in a test must have been expected to.

use serde_json::Value;

/// The lines of a log that a person would have to look at: WARN, ERROR, a panic, or anything that is not one of the
/// service's JSON log lines (a library that prints, a message of the loader).
pub fn complaints(log: &str) -> Vec<&str> {
    log.lines().filter(|line| !line.trim().is_empty() && !harmless(line)).collect()
}

/// The last `count` lines, each after `prefix`: what a failed test shows.
pub fn tail(log: &str, count: usize, prefix: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(count)..].iter().map(|line| format!("{prefix}{line}\n")).collect()
}

fn harmless(line: &str) -> bool {
    let Ok(parsed) = serde_json::from_str::<Value>(line) else { return false };
    matches!(parsed["level"].as_str(), Some("INFO" | "DEBUG" | "TRACE"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_errors_panics_and_prints_are_complaints() {
        let log = r#"{"level":"INFO","fields":{"message":"ready"}}
{"level":"WARN","fields":{"message":"prefill failed, trying next"}}

{"level":"ERROR","fields":{"message":"broken"}}
thread 'engine' panicked at src/lib.rs:1:1:
{"level":"DEBUG","fields":{"message":"panicked is only a word here"}}"#;
        let found = complaints(log);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].contains("trying next") && found[1].contains("broken") && found[2].contains("panicked"));
    }

    #[test]
    fn a_tail_is_never_longer_than_the_log() {
        assert_eq!(tail("a\nb\nc", 2, "| "), "| b\n| c\n");
        assert_eq!(tail("", 2, "| "), "");
    }
}
