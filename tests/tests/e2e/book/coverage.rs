//! Every command of every page is run by a test, or is named here with the reason why it can't be.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use kvasir_tests::workspace;

use super::{
    commands::{self, program_of},
    follow, kubernetes, none,
    pages::{self, Page, What},
    security,
};

/// Commands that another test runs, by their beginning: its file, and its name there.
const BY_OTHERS: &[(&str, &str, &str)] = &[
    ("scripts/quickstart", "scripts.rs", "quickstart_serves_until_it_is_asked_to_end"),
    ("scripts/cluster up", "scripts.rs", "a_cluster_goes_up_answers_and_goes_down_without_a_trace"),
    ("scripts/cluster status", "scripts.rs", "a_cluster_goes_up_answers_and_goes_down_without_a_trace"),
    ("scripts/cluster logs", "scripts.rs", "a_cluster_goes_up_answers_and_goes_down_without_a_trace"),
    ("scripts/cluster down", "scripts.rs", "a_cluster_goes_up_answers_and_goes_down_without_a_trace"),
    ("kvasirctl engine add", "engines/discovery.rs", "engines_in_etcd_are_used_shown_and_taken_out"),
    ("kvasirctl engine remove", "engines/discovery.rs", "engines_in_etcd_are_used_shown_and_taken_out"),
    ("kvasirctl events -f", "operate.rs", "events_are_followed_as_they_happen_and_outlive_who_saw_them"),
    ("kvasirctl status", "ctl.rs", "it_shows_every_member_as_a_table_and_as_json"),
    ("docker build", "image.rs", "the_image_runs_every_program_as_nobody"),
    ("docker push", "image.rs", "the_image_runs_every_program_as_nobody"),
    ("docker compose", "image.rs", "compose_starts_what_the_pages_say"),
];

/// Commands that nobody runs here, by their beginning, and why.
const NOT_HERE: &[(&str, &str)] = &[
    ("vllm serve", "an engine of others, which needs a GPU"),
    ("python -m sglang.launch_server", "an engine of others, which needs a GPU"),
    ("scripts/gpu-check", "needs a GPU"),
    ("scripts/setup", "run by scripts/test before the tests"),
    ("scripts/test", "it is what runs this test"),
    ("scripts/lint", "wants cargo-deny, which is compiled for it; formatting and clippy are stages of scripts/test"),
    ("scripts/bench", "a measurement of minutes to hours, with rivals to install"),
    (
        "cargo build --release",
        "the same programs, built for speed in many minutes; the tests run those of their own build",
    ),
    ("cargo run --release", "a reckoning built for speed; the program's own tests run it smaller"),
    ("examples/kvasir-disk-bench", "writes gigabytes to a disk"),
    ("tests/rivals/foyer/", "a rival, built apart; writes gigabytes to a disk"),
    ("kvasir-engine-bench decode --shape", "writes the gigabytes of a large model's weights first"),
    (
        "kvasirctl bench --concurrency 1 --requests 20",
        "minutes long but for a release build; e2e's tools.rs runs shorter ones",
    ),
    ("kvasirctl bench --concurrency 16 --duration 60s", "a minute long; e2e's tools.rs runs shorter ones"),
    ("kvasirctl bench --rate", "minutes long; e2e's tools.rs runs shorter ones"),
    ("kvasir-simulate conversation --copies", "a reckoning of minutes but for a release build"),
    ("kvasir-replay --simulate conversation --memory 5%", "a reckoning of minutes but for a release build"),
    ("kvasir-replay --simulate conversation chat documents", "a reckoning of minutes but for a release build"),
    ("kvasir-simulate my.jsonl", "a trace and a profile of the reader's own"),
];

/// What the shell does by itself.
const SHELL: [&str; 3] = ["export", "alias", "echo"];

#[test]
fn every_command_is_run_by_a_test_or_named() -> Result<()> {
    let mut all = pages::all()?;
    all.push(Page::read("helm/kvasir/README.md")?);
    let (mut wrong, mut run, mut used) = (Vec::new(), 0, BTreeSet::new());
    for page in &all {
        for block in page.written() {
            let What::Commands(shown) = &block.what else { continue };
            for shown in shown {
                if runs(&page.name, &shown.command) {
                    run += 1;
                    continue;
                }
                for words in commands::simple(&shown.command)? {
                    let (program, line) = program_of(&words);
                    let other = BY_OTHERS.iter().find(|(start, ..)| begins(&line, start));
                    if SHELL.contains(&program) || commands::asks(program, &words) {
                        run += 1;
                    } else if let Some((start, ..)) = other {
                        used.insert(*start);
                        run += 1;
                    } else if let Some((start, why)) = never(&line) {
                        used.insert(start);
                        println!("not run: {}:{}: {line}: {why}", page.name, block.line);
                    } else {
                        wrong.push(format!(
                            "{}:{}: no test runs this: {line}\n    have it run: PAGES and RUN in tests/tests/e2e/book/follow.rs, or \
                             another test (BY_OTHERS in coverage.rs); what can't be run by any machine of CI's is named there with why",
                            page.name, block.line
                        ));
                    }
                }
            }
        }
    }
    for (start, file, name) in BY_OTHERS {
        let text = std::fs::read_to_string(workspace::root().join("tests/tests/e2e").join(file))?;
        if !text.contains(&format!("fn {name}(")) {
            wrong.push(format!("{file} has no test {name}, which is to run {start}"));
        }
    }
    let starts = BY_OTHERS.iter().map(|(start, ..)| start).chain(NOT_HERE.iter().map(|(start, _)| start));
    wrong.extend(starts.filter(|start| !used.contains(**start)).map(|start| format!("no page says {start} any more")));
    ensure!(run > 150, "only {run} commands are run");
    none(&wrong)
}

/// Why nobody runs a command, and by which beginning it is known.
pub(crate) fn never(line: &str) -> Option<(&'static str, &'static str)> {
    NOT_HERE.iter().copied().find(|(start, _)| begins(line, start))
}

fn begins(line: &str, start: &str) -> bool {
    let after = line.strip_prefix(start);
    after.is_some_and(|after| after.is_empty() || after.starts_with(' ') || start.ends_with('/'))
}

/// Whether a command goes on until it is interrupted: a test of its own does that.
pub(crate) fn goes_on(line: &str) -> bool {
    begins(line, "kvasirctl events -f")
}

/// Whether a test of ours runs the whole line.
fn runs(page: &str, line: &str) -> bool {
    follow::runs(page, line) || kubernetes::runs(page, line) || security::runs(page, line)
}
