//! `kvasirctl planner`: which workers should read and which should write, by the router that plans.

use anyhow::{Context as _, bail};
use kvasir_types::Role;
use serde_json::Value;

use crate::{
    output::Answer,
    probe::{self, printable},
    render::Table,
    session::Session,
};

/// Events shown to people.
const EVENTS: usize = 12;

/// Asks the router that plans; if none does, any.
pub(crate) async fn run(session: &Session) -> anyhow::Result<Answer> {
    let (way, view) = (session.way()?, session.view().await?);
    let mut last = None;
    let mut told = None;
    for router in view.role(Role::Router) {
        match probe::admin(&router.admin, "/planner", None, &way).await {
            Ok(page) => {
                let plans = page["leader"]["here"] == true;
                if told.is_none() || plans {
                    told = Some((router.id.to_string(), page));
                }
                if plans {
                    break;
                }
            }
            Err(why) => last = Some(format!("router {}: {why}", router.id)),
        }
    }
    let Some((router, page)) = told else {
        bail!(last.unwrap_or_else(|| "no router is running (or --prefix names another cluster)".to_owned()));
    };
    let table = show(&router, &page).context("an answer that makes no sense")?;
    Ok(session.output().show(&page, || table).into())
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| "-".to_owned(), printable)
}

fn number(value: &Value) -> String {
    value.as_f64().map_or_else(|| "-".to_owned(), |number| format!("{number:.1}").trim_end_matches(".0").to_owned())
}

/// Sentences may be longer than what else is printed.
fn sentence(value: &Value) -> String {
    value.as_str().unwrap_or_default().chars().filter(|c| !c.is_control()).take(400).collect()
}

fn show(router: &str, page: &Value) -> Option<String> {
    let mut answer = match &page["leader"] {
        Value::Null => format!("nobody plans (asked router {router}; mode {})\n", text(&page["mode"])),
        leader => {
            let (who, term) = (text(&leader["router"]), number(&leader["term"]));
            format!("{who} plans, since term {term}; mode {}\n", text(&page["mode"]))
        }
    };
    let models = page["models"].as_object()?;
    if !models.is_empty() {
        let columns = [
            "MODEL",
            "PREFILL",
            "DECODE",
            "TTFT ms",
            "TARGET",
            "TPOT ms",
            "TARGET",
            "STRAIN",
            "PROMPT tok/s",
            "ANSWER tok/s",
        ];
        let mut table = Table::new(&columns);
        let mut why = String::new();
        for (model, told) in models {
            for (name, split) in [(printable(model), &told["now"]), ("  better".to_owned(), &told["better"])] {
                if split.is_null() {
                    continue;
                }
                let mut row = vec![name];
                row.extend([&split["prefill"], &split["decode"]].map(number));
                row.extend([&split["ttft_ms"], &told["ttft_target_ms"]].map(number));
                row.extend([&split["tpot_ms"], &told["tpot_target_ms"]].map(number));
                row.push(split["strain"].as_f64().map_or_else(|| "-".to_owned(), |strain| format!("{strain:.2}")));
                row.extend([&told["prompt_tokens_per_second"], &told["answer_tokens_per_second"]].map(number));
                table.row(row);
            }
            why += &format!("{}: {}\n", printable(model), sentence(&told["why"]));
        }
        answer += &format!("\n{}\n{why}", table.render());
    }
    let events = page["events"].as_array()?;
    if !events.is_empty() {
        answer.push('\n');
    }
    for event in events.iter().rev().take(EVENTS).rev() {
        let seconds = event["at"].as_u64().unwrap_or_default() / 1000;
        let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
        let clock = format!("{hours:02}:{minutes:02}:{:02} UTC", seconds % 60);
        let who = match event["worker"].as_str() {
            Some(worker) => format!(" {} to {}", printable(worker), text(&event["to"])),
            None => String::new(),
        };
        answer += &format!("{clock}  {}{who}: {}\n", text(&event["what"]), sentence(&event["why"]));
    }
    Some(answer)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn who_plans_what_is_expected_and_what_was_done() {
        let page = json!({
            "mode": "act", "leader": {"router": "router-1", "term": 42, "here": true},
            "models": {"demo": {
                "ttft_target_ms": 2000.0, "tpot_target_ms": 100.0, "prompt_tokens_per_second": 5000.0,
                "answer_tokens_per_second": 120.0,
                "now": {"prefill": 1, "decode": 3, "ttft_ms": 4100.25, "tpot_ms": 12.0, "strain": 2.05},
                "better": {"prefill": 2, "decode": 2, "ttft_ms": 700.0, "tpot_ms": 14.0, "strain": 0.35},
                "why": "waiting whether it stays so (1 of 3 looks)\u{1b}",
            }},
            "events": [
                {"at": 1_000, "what": "leads", "why": "term 42"},
                {"at": 3_723_000, "what": "moved", "model": "demo", "worker": "decode-0", "to": "prefill", "why": "because"},
            ],
        });
        insta::assert_snapshot!(show("router-1", &page).unwrap(), @r"
        router-1 plans, since term 42; mode act

        MODEL     PREFILL  DECODE  TTFT ms  TARGET  TPOT ms  TARGET  STRAIN  PROMPT tok/s  ANSWER tok/s
        demo      1        3       4100.2   2000    12       100     2.05    5000          120
          better  2        2       700      2000    14       100     0.35    5000          120

        demo: waiting whether it stays so (1 of 3 looks)

        00:00:01 UTC  leads: term 42
        01:02:03 UTC  moved decode-0 to prefill: because
        ");
        assert!(
            show("router-0", &json!({"mode": "off", "models": {}, "events": []})).unwrap().starts_with("nobody plans")
        );
        assert!(show("router-0", &json!("nonsense")).is_none());
    }
}
