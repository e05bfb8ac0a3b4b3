//! How answers about routing look.

use std::fmt::Write as _;

use super::{Chooses, Explanation};
use crate::{probe::printable, render::Table};

/// Where a request would go, and what else was possible.
pub(crate) fn explanation(told: &Explanation) -> String {
    let mut text = String::new();
    let prefill = told.prefill.iter().map(|name| printable(name)).collect::<Vec<_>>().join(", then ");
    let prefill = if prefill.is_empty() { "computes the prompt itself".to_owned() } else { prefill };
    let _infallible = writeln!(
        text,
        "{} chooses by {}: decode {}, prefill {prefill}\nbecause of {}: {} of {} prompt tokens are held there\n",
        printable(&told.router),
        printable(&told.policy),
        printable(&told.decode),
        printable(&told.reason),
        told.cached_tokens,
        told.prompt_tokens
    );
    let ms = |value: f32| format!("{value:.3}");
    let rows = told.candidates.iter().map(|one| {
        vec![
            printable(&one.decode),
            one.prefill.as_deref().map_or_else(|| "itself".to_owned(), printable),
            one.cached_tokens.to_string(),
            ms(one.total_ms),
            ms(one.compute_ms),
            ms(one.wait_ms),
            ms(one.transfer_ms),
            ms(one.decode_ms),
            ms(one.late_ms),
        ]
    });
    let columns = ["DECODE", "PREFILL", "CACHED", "TOTAL ms", "COMPUTE", "WAIT", "TRANSFER", "LOAD", "LATE"];
    text + &table(&columns, rows)
}

/// Routers and their policies.
pub(crate) fn policies(all: &[Chooses]) -> String {
    let rows = all.iter().map(|one| {
        let policy = one.policy.clone().or_else(|| one.error.clone()).unwrap_or_default();
        vec![printable(&one.router), policy]
    });
    table(&["ROUTER", "POLICY"], rows)
}

fn table(columns: &[&'static str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new(columns);
    rows.for_each(|row| table.row(row));
    table.render()
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Candidate, Chooses, Explanation},
        *,
    };

    #[test]
    fn an_explanation_is_a_sentence_and_a_table() {
        let candidate = |decode: &str, prefill: Option<&str>, cached_tokens, total_ms| Candidate {
            decode: decode.into(),
            prefill: prefill.map(str::to_owned),
            cached_tokens,
            total_ms,
            compute_ms: total_ms / 2.0,
            wait_ms: total_ms / 4.0,
            transfer_ms: total_ms / 4.0,
            decode_ms: 0.0,
            late_ms: 0.0,
        };
        let told = Explanation {
            router: "router-0".into(),
            policy: "kv-aware".into(),
            reason: "cache".into(),
            prompt_tokens: 2000,
            cached_tokens: 1600,
            decode: "decode-1".into(),
            prefill: vec!["prefill-1".into(), "prefill-0".into()],
            candidates: vec![
                candidate("decode-1", Some("prefill-1"), 1600, 52.0),
                candidate("decode-0", None, 0, 208.25),
            ],
        };
        insta::assert_snapshot!(explanation(&told), @r"
        router-0 chooses by kv-aware: decode decode-1, prefill prefill-1, then prefill-0
        because of cache: 1600 of 2000 prompt tokens are held there

        DECODE    PREFILL    CACHED  TOTAL ms  COMPUTE  WAIT    TRANSFER  LOAD   LATE
        decode-1  prefill-1  1600    52.000    26.000   13.000  13.000    0.000  0.000
        decode-0  itself     0       208.250   104.125  52.062  52.062    0.000  0.000
        ");
    }

    #[test]
    fn a_router_that_does_not_answer_is_shown() {
        let chooses = |router: &str, policy: Option<&str>, error: Option<&str>| Chooses {
            router: router.into(),
            policy: policy.map(str::to_owned),
            error: error.map(str::to_owned),
        };
        let all = [chooses("router-0", Some("kv-aware"), None), chooses("router-1", None, Some("connection refused"))];
        insta::assert_snapshot!(policies(&all), @r"
        ROUTER    POLICY
        router-0  kv-aware
        router-1  connection refused
        ");
    }
}
