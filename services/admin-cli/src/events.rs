//! `kvasirctl events`: what happened in the cluster, from its history in etcd.

use std::{
    collections::BTreeSet,
    io::{self, Write as _},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use kvasir_cluster::{Event, EventKind, Noted};

use crate::{
    kv::time,
    output::{Answer, Output},
    render::Table,
    session::Session,
};

/// Between two looks at the history.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Clocks differ and writes take a moment: so far back it is looked for what is new.
const LATE: Duration = Duration::from_secs(10);

/// Which events.
#[derive(Clone, Debug, Args)]
pub(crate) struct EventsArgs {
    /// Go on with what happens from now on, until interrupted
    #[arg(long, short)]
    follow: bool,
    /// Those of so long ago and later: 90s, 15m, 12h
    #[arg(long, value_name = "TIME", value_parser = time)]
    since: Option<Duration>,
    /// Only those of this kind; may be repeated
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = EventKind::ALL.map(EventKind::as_str))]
    kind: Vec<String>,
    /// So many at most, the latest [default: 200, or all if --since is given]
    #[arg(long, value_name = "COUNT")]
    last: Option<usize>,
}

/// Shows them.
pub(crate) async fn run(args: EventsArgs, session: &Session) -> anyhow::Result<Answer> {
    let (registry, _) = kvasir_cluster::connect_etcd(session.etcd()?).await?;
    let output = session.output();
    let after = args.since.map_or_else(String::new, |since| key_at(now_ms().saturating_sub(millis(since))));
    let all = registry.events(&after).await?;
    let newest = all.iter().map(|noted| noted.event.at_ms).max().unwrap_or_else(now_ms);
    let mut seen: BTreeSet<String> = all.iter().map(|noted| noted.key.clone()).collect();
    let mut chosen: Vec<Event> = all.into_iter().map(|noted| noted.event).filter(|event| args.wants(event)).collect();
    let most = args.last.unwrap_or_else(|| if args.since.is_some() { usize::MAX } else { 200 });
    chosen.drain(..chosen.len().saturating_sub(most));
    if !args.follow {
        return Ok(output.show(&chosen, || table(&chosen)).into());
    }
    for event in &chosen {
        say(&line(event, output))?;
    }
    let (mut newest, mut told) = (newest, false);
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        match registry.events(&key_at(newest.saturating_sub(millis(LATE)))).await {
            Ok(events) => {
                told = false;
                for Noted { key, event } in events {
                    newest = newest.max(event.at_ms.min(now_ms() + millis(LATE)));
                    if seen.insert(key) && args.wants(&event) {
                        say(&line(&event, output))?;
                    }
                }
                let forgotten = key_at(newest.saturating_sub(2 * millis(LATE)));
                seen.retain(|key| *key > forgotten);
            }
            Err(error) if !told => {
                eprintln!("{}; going on", kvasir_runtime::chain(&error));
                told = true;
            }
            Err(_) => {}
        }
    }
}

impl EventsArgs {
    fn wants(&self, event: &Event) -> bool {
        self.kind.is_empty() || self.kind.contains(&event.kind)
    }
}

/// A reader that has seen enough closes the pipe.
fn say(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn key_at(ms: u64) -> String {
    format!("{ms:013}")
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis)
}

/// One event as it is followed: a line.
fn line(event: &Event, output: Output) -> String {
    match output {
        Output::Json => serde_json::to_string(event).unwrap_or_default() + "\n",
        Output::Yaml => format!("---\n{}", output.show(event, String::new)),
        Output::Table | Output::Wide => {
            let Event { at_ms, kind, on, .. } = event;
            format!("{}  {kind:8}  {on}  {}\n", utc(*at_ms), story(event))
        }
    }
}

fn story(event: &Event) -> String {
    let Event { what, who, result, .. } = event;
    let by = if who.is_empty() { String::new() } else { format!(" (by {who})") };
    let result = if result.is_empty() { String::new() } else { format!(": {result}") };
    format!("{what}{by}{result}")
}

fn table(events: &[Event]) -> String {
    if events.is_empty() {
        return "no such events\n".to_owned();
    }
    let mut table = Table::new(&["TIME (UTC)", "KIND", "ON", "WHAT", "SEEN BY"]);
    for event in events {
        table.row(vec![utc(event.at_ms), event.kind.clone(), event.on.clone(), story(event), event.seen_by.clone()]);
    }
    table.render()
}

/// A moment for people, by the Gregorian calendar (Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days).
pub(crate) fn utc(ms: u64) -> String {
    let (days, second) = (ms / 86_400_000, ms / 1_000 % 86_400);
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, year) = if month < 10 { (month + 3, year) } else { (month - 9, year + 1) };
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}", year + era * 400)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_days_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00"),
            (951_827_696, "2000-02-29 12:34:56"),
            (1_709_251_199, "2024-02-29 23:59:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
        ] {
            assert_eq!(utc(seconds * 1_000 + 999), expected);
        }
    }

    #[test]
    fn an_event_is_a_line_with_whoever_wanted_it() {
        let event = Event {
            at_ms: 1_709_251_199_000,
            kind: "audit".into(),
            seen_by: "decode-1".into(),
            on: "decode-1".into(),
            what: "drain".into(),
            who: "alice from 10.0.0.1:7".into(),
            result: "done".into(),
        };
        let text = line(&event, Output::Table);
        assert_eq!(text, "2024-02-29 23:59:59  audit     decode-1  drain (by alice from 10.0.0.1:7): done\n");
        assert_eq!(serde_json::from_str::<Event>(&line(&event, Output::Json)).unwrap(), event);
        assert_eq!(
            table(&[event]),
            "TIME (UTC)           KIND   ON        WHAT                                    SEEN BY\n\
             2024-02-29 23:59:59  audit  decode-1  drain (by alice from 10.0.0.1:7): done  decode-1\n"
        );
        assert_eq!(table(&[]), "no such events\n");
    }
}
