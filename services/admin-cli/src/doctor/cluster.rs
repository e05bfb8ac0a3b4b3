//! A cluster: who can't be reached, what does not fit together, whose clock is wrong, which addresses can't work.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures_util::{StreamExt, stream};
use kvasir_cluster::{EtcdConfig, Member, View};

use super::Finding;
use crate::{
    gather,
    probe::{self, Way},
    report::{Report, State},
    session::Session,
};

/// Clocks that differ by more are told: leases and logs get confusing. Servers tell theirs in whole seconds.
const SKEW: f64 = 2.0;
/// Members asked for their clocks at a time.
const AT_ONCE: usize = 64;
/// An etcd that takes longer delays everything that follows from a change.
const SLOW_ETCD: Duration = Duration::from_millis(200);
/// Most members named in one line.
const NAMED: usize = 6;

/// Looks at it. An etcd that can't be reached is a finding like others.
pub(super) async fn look(session: &Session) -> anyhow::Result<Vec<Finding>> {
    let (etcd, way) = (session.etcd()?, session.way()?);
    let endpoints = etcd.endpoints.join(", ");
    let began = Instant::now();
    let view = match session.view().await {
        Ok(view) => view,
        Err(error) => {
            let found = kvasir_runtime::chain(error.as_ref());
            let remedy = match error.downcast_ref::<kvasir_cluster::Error>() {
                Some(kvasir_cluster::Error::Refused { .. }) => "what it says is what to mend (docs/security.md#etcd)",
                _ => {
                    "is it running, is this its address (--etcd), can it be reached from here, does it speak TLS (--etcd-authority)?"
                }
            };
            return Ok(vec![Finding::problem("etcd", found, remedy)]);
        }
    };
    let took = began.elapsed();
    let found = format!("{endpoints} answers in {} ms", took.as_millis());
    let mut findings = vec![if took > SLOW_ETCD {
        Finding::note("etcd", found, "its disk must be fast (an SSD of its own), and its network near")
    } else {
        Finding::ok("etcd", found)
    }];
    let report = gather::ask_all(&view, &way).await;
    findings.extend(members(&report));
    findings.extend(versions(&view));
    findings.extend(addresses(&view));
    findings.extend(clocks(&etcd, &view, &way).await);
    Ok(findings)
}

fn members(report: &Report) -> Vec<Finding> {
    let mut findings = Vec::new();
    if report.members.is_empty() {
        findings.push(Finding::problem("members", "none", "start the services, or is it another --prefix?"));
        return findings;
    }
    for member in &report.members {
        let who = format!("{} {}: {}", member.role, member.id, member.reason);
        match member.state {
            State::Ready => {}
            State::Cordoned | State::Draining | State::Drained => findings.push(Finding::note("member", who, "")),
            State::NotReady => findings.push(Finding::problem("member", who, "its log says what it waits for")),
            State::Unreachable => {
                let remedy =
                    "is its process alive, is the address right, does a firewall or NetworkPolicy stand in between?";
                findings.push(Finding::problem("member", who, remedy));
            }
        }
    }
    findings
        .extend(report.warnings.iter().map(|warning| Finding::problem("cluster", warning.clone(), remedy(warning))));
    if findings.is_empty() {
        findings.push(Finding::ok("members", format!("all {} are ready and fit together", report.members.len())));
    }
    findings
}

/// What to do about a warning of `status`.
fn remedy(warning: &str) -> &'static str {
    let rules = [
        (
            "speaks protocol",
            "run the same release everywhere; old and new do not work together across protocol versions",
        ),
        ("never work together", "start both with the same model folder, kv.dtype and block size"),
        (
            "tokenizers differ",
            "give all workers of a model the same tokenizer.json: cached prompts and answers would differ",
        ),
        ("no decode worker", "start a decode worker, or move one: kvasirctl workers role NAME decode"),
        ("no prefill worker", "start a prefill worker, or move one: kvasirctl workers role NAME prefill"),
        ("no router", "start a router"),
        ("divide unlike", "set placement the same on all store nodes"),
        ("can't move blocks", "firewalls between the two, and their transfer.listen; kvasirctl transfers"),
    ];
    rules.iter().find(|(mark, _)| warning.contains(mark)).map_or("see docs", |(_, remedy)| remedy)
}

fn versions(view: &View) -> Vec<Finding> {
    let mut by_version: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for member in view.members.iter().filter(|member| member.engine.is_none()) {
        by_version.entry(&member.version).or_default().push(member.id.as_str());
    }
    match by_version.len() {
        0 => Vec::new(),
        1 => by_version.keys().map(|version| Finding::ok("versions", format!("{version} everywhere"))).collect(),
        _ => {
            let told = by_version.iter().map(|(version, members)| format!("{version}: {}", names(members)));
            let found = told.collect::<Vec<_>>().join("; ");
            vec![Finding::note("versions", found, "fine while a new release is rolled out; finish it")]
        }
    }
}

fn names(members: &[&str]) -> String {
    let shown = members.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
    let more = members.len().saturating_sub(NAMED);
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

/// Addresses that are good on the member's own machine only.
fn addresses(view: &View) -> Vec<Finding> {
    let of = |member: &Member| [&member.grpc, &member.admin].map(|address| host(address).to_owned());
    let all: Vec<(&str, String)> = view
        .members
        .iter()
        .flat_map(|member| of(member).map(|host| (member.id.as_str(), host)))
        .filter(|(_, host)| !host.is_empty())
        .collect();
    let is_loopback = |host: &str| host.starts_with("127.") || host == "[::1]" || host == "localhost";
    let is_any = |host: &str| host == "0.0.0.0" || host == "[::]";
    let elsewhere = all.iter().any(|(_, host)| !is_loopback(host) && !is_any(host));
    let mut bad: Vec<&str> =
        all.iter().filter(|(_, host)| is_any(host) || (elsewhere && is_loopback(host))).map(|(id, _)| *id).collect();
    bad.dedup();
    if bad.is_empty() {
        return Vec::new();
    }
    let found = format!("{} advertise an address that is good on their own machine only", names(&bad));
    vec![Finding::problem("addresses", found, "set `advertise` (or listen on the machine's own address)")]
}

fn host(address: &str) -> &str {
    address.rsplit_once(':').map_or("", |(host, _)| host)
}

/// Everybody's clock beside this machine's, by the Date header of a small page.
async fn clocks(etcd: &EtcdConfig, view: &View, way: &Way) -> Vec<Finding> {
    let admins = view.members.iter().filter(|member| !member.admin.is_empty());
    let of_members = stream::iter(admins).map(async |member| {
        let page = probe::text(&member.admin, "/health", way.limit).await.ok()?;
        Some((member.id.to_string(), skew(&page, SystemTime::now())?))
    });
    let of_etcd = stream::iter(&etcd.endpoints).map(async |endpoint| {
        let page = kvasir_cluster::etcd_page(etcd, endpoint, "/version").await.ok()?;
        Some((format!("etcd {endpoint}"), skew(&page, SystemTime::now())?))
    });
    let mut skews: Vec<Option<(String, f64)>> = of_etcd.buffered(AT_ONCE).collect().await;
    skews.extend(of_members.buffered(AT_ONCE).collect::<Vec<_>>().await);
    let skews: Vec<(String, f64)> = skews.into_iter().flatten().collect();
    let wrong: Vec<&(String, f64)> = skews.iter().filter(|(_, skew)| skew.abs() > SKEW).collect();
    if wrong.is_empty() {
        let found = format!("{} differ from this one's by less than {SKEW} s", skews.len());
        return if skews.is_empty() { Vec::new() } else { vec![Finding::ok("clocks", found)] };
    }
    let told = wrong.iter().take(NAMED).map(|(name, skew)| {
        let way = if *skew > 0.0 { "ahead" } else { "behind" };
        format!("{name} {:.0} s {way}", skew.abs())
    });
    let found = told.collect::<Vec<_>>().join(", ");
    // If everybody is, it is us.
    let remedy = if wrong.len() == skews.len() {
        "this machine's own clock differs from all others: chronyc makestep, here"
    } else {
        "run chrony or systemd-timesyncd there: logs and deadlines are compared across machines"
    };
    vec![Finding::problem("clocks", found, remedy)]
}

/// Seconds that the page's sender is ahead of `now`; its Date header is in whole seconds, so that half of one is added.
fn skew(page: &str, now: SystemTime) -> Option<f64> {
    let head = page.split("\r\n\r\n").next()?;
    let date = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("date").then(|| value.trim())
    })?;
    let now = now.duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
    Some(http_date(date)? as f64 + 0.5 - now)
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` as seconds since 1970.
fn http_date(text: &str) -> Option<i64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.split_once(", ")?.1.split(' ');
    let day: i64 = words.next()?.parse().ok()?;
    let month = words.next()?;
    let month = MONTHS.iter().position(|known| *known == month)? as i64 + 1;
    let year: i64 = words.next()?.parse().ok().filter(|year| (1970..=9999).contains(year))?;
    let mut clock =
        words.next()?.split(':').map(|part| part.parse::<i64>().ok().filter(|part| (0..=60).contains(part)));
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    // Days from civil (Hinnant, chrono-compatible low-level date algorithms): years begin in March.
    let (shifted, year) = ((month + 9) % 12, if month <= 2 { year - 1 } else { year });
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * shifted + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    Some(days * 86_400 + hour * 3_600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};
    use crate::gather::tests::decode;

    #[test]
    fn dates_are_read_and_clocks_compared() {
        for (text, seconds) in [
            ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
            ("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_777),
            ("Thu, 29 Feb 2024 23:59:59 GMT", 1_709_251_199),
        ] {
            assert_eq!(http_date(text), Some(seconds), "{text}");
        }
        for bad in
            ["", "x, y", "Sun, 06 Foo 1994 08:49:37 GMT", "Sun, 06 Nov 1 08:49:37 GMT", "Sun, 06 Nov 1994 99:00:00 GMT"]
        {
            assert_eq!(http_date(bad), None, "{bad}");
        }
        let now = UNIX_EPOCH + Duration::from_secs(784_111_777 - 10);
        let page = "HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\ndate: no";
        assert_eq!(skew(page, now), Some(10.5));
        assert_eq!(skew("HTTP/1.1 200 OK\r\n\r\ndate: Sun, 06 Nov 1994 08:49:37 GMT", now), None);
    }

    #[test]
    fn addresses_that_only_their_own_machine_can_reach_are_found() {
        let found = |members: &[(&str, &str)]| {
            let members = members.iter().map(|(id, address)| decode(id, address, address)).collect();
            addresses(&View { members, ..View::default() })
        };
        assert!(found(&[("a", "127.0.0.1:1"), ("b", "127.0.0.1:2")]).is_empty(), "one machine");
        assert!(found(&[("a", "10.0.0.1:1"), ("b", "10.0.0.2:2")]).is_empty());
        let mixed = found(&[("a", "127.0.0.1:1"), ("b", "10.0.0.2:2")]);
        assert!(mixed[0].level == Level::Problem && mixed[0].found.starts_with("a advertise"), "{mixed:?}");
        assert_eq!(found(&[("a", "0.0.0.0:1")]).len(), 1);
    }

    #[test]
    fn other_versions_are_a_note_and_every_warning_has_a_remedy() {
        let mut other = decode("b", "127.0.0.1:1", "127.0.0.1:1");
        other.version = "0.2.0".to_owned();
        let members = vec![decode("a", "127.0.0.1:1", "127.0.0.1:1"), other];
        let found = versions(&View { members, ..View::default() });
        assert_eq!((found[0].level, found[0].found.as_str()), (Level::Note, "0.1.0: a; 0.2.0: b"));
        for warning in ["no router is ready", "a and b never work together: x", "model m: tokenizers differ: …"] {
            assert_ne!(remedy(warning), "see docs", "{warning}");
        }
    }
}
