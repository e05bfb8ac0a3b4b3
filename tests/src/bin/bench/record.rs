//! `scripts/bench NAME --record`: puts what the last run found into `docs/performance.md`, between two marks. What is
//! around them is written by hand and holds no figure that a run could change.

use std::fs;

use anyhow::{Context, Result};
use kvasir_tests::workspace;

use crate::report::{Report, Row, number, with_range};

/// Where results are kept.
const PAGE: &str = "docs/performance.md";

/// Replaces the page's results of a benchmark by those of its last run.
pub fn record(name: &str) -> Result<()> {
    let report = Report::read(name)?;
    let path = workspace::root().join(PAGE);
    let page = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    fs::write(&path, replaced(&page, name, &results(&report))?)?;
    println!("{PAGE} has the results of {name} at {}", report.commit);
    Ok(())
}

/// The page with other results between the marks of a benchmark.
fn replaced(page: &str, name: &str, results: &str) -> Result<String> {
    let [begin, end] = [format!("<!-- {name}: begin -->\n"), format!("<!-- {name}: end -->\n")];
    let (before, rest) = page.split_once(&begin).with_context(|| format!("{PAGE} has no place for '{name}'"))?;
    let (_, after) = rest.split_once(&end).with_context(|| format!("{PAGE}: the results of '{name}' have no end"))?;
    Ok(format!("{before}{begin}{results}{end}{after}"))
}

/// What was found, as Markdown: what has a goal, then the rest.
fn results(report: &Report) -> String {
    let (goals, others): (Vec<&Row>, Vec<&Row>) = report.rows.iter().partition(|row| row.goal.is_some());
    let met = goals.iter().filter(|row| row.met == Some(true)).count();
    let mut text = format!(
        "Commit `{}` on {}: {met} of {} goals met.\n\n| what | ours | beside | ratio | goal | |\n\
         | --- | --- | --- | --- | --- | --- |\n",
        report.commit,
        report.machine,
        goals.len()
    );
    for row in goals {
        let goal = row.goal.as_deref().unwrap_or_default();
        let met = row.met.map_or("not measured", |met| if met { "met" } else { "**missed**" });
        text += &format!("{} {goal} | {met} |\n", figures(row));
    }
    if !others.is_empty() {
        text += "\nWithout a goal:\n\n| what | ours | beside | ratio |\n| --- | --- | --- | --- |\n";
        others.into_iter().for_each(|row| text += &format!("{}\n", figures(row)));
    }
    text
}

/// The cells that all rows have.
fn figures(row: &Row) -> String {
    // A single repetition has no range.
    let shown = |value: f64, range: Option<[f64; 2]>| with_range(value, range.filter(|[low, high]| low < high));
    let theirs = row.theirs.map(|theirs| shown(theirs, row.theirs_range) + " ").unwrap_or_default();
    let ratio = row.ratio.map(number).unwrap_or_default();
    let [what, rival] = [&row.what, &row.rival].map(|text| text.replace('|', "\\|").replace('\n', " "));
    format!("| {what} | {} {} | {theirs}{rival} | {ratio} |", shown(row.ours, row.ours_range), row.unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_replace_what_is_between_the_marks_and_nothing_else() {
        let page = "before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n";
        let new = replaced(page, "x", "new\n").unwrap();
        assert_eq!(new, "before\n<!-- x: begin -->\nnew\n<!-- x: end -->\nafter\n");
        assert_eq!(replaced(&new, "x", "old\n").unwrap(), page);
        assert!(replaced(page, "y", "").is_err() && replaced("<!-- x: begin -->\n", "x", "").is_err());
    }

    #[test]
    fn goals_come_first_and_what_is_missed_is_seen() {
        let mut report = Report::new("test");
        report.push(Row::alone("latency", "ms", &[2.0, 3.0, 4.0]));
        report.push(Row::repeated("copy", "GB/s", &[4.0], "cp", &[2.0]).at_least(3.0));
        report.push(Row::alone("copy", "GB/s", &[4.0]).without("dd", "not | installed").at_least(1.0));
        (report.commit, report.machine) = ("c0ffee".into(), "a machine".into());
        assert_eq!(
            results(&report),
            "Commit `c0ffee` on a machine: 0 of 2 goals met.\n\n\
             | what | ours | beside | ratio | goal | |\n| --- | --- | --- | --- | --- | --- |\n\
             | copy | 4.00 GB/s | 2.00 cp | 2.00 | ≥ 3 × | **missed** |\n\
             | copy | 4.00 GB/s | dd: not \\| installed |  | ≥ 1 × | not measured |\n\n\
             Without a goal:\n\n| what | ours | beside | ratio |\n| --- | --- | --- | --- |\n\
             | latency | 3.00 (2.00–4.00) ms |  |  |\n"
        );
    }

    #[test]
    fn the_page_has_a_place_for_the_engines_results() {
        let page = fs::read_to_string(workspace::root().join(PAGE)).unwrap();
        let new = replaced(&page, "engine", "other results\n").unwrap();
        assert!(new.contains("other results") && new.len() < page.len());
    }
}
