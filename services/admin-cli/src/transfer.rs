//! `kvasirctl transfer`: over what members reach one another and how fast that goes, as it was lately and as it is now.

use std::{
    collections::HashMap,
    io::{IsTerminal as _, Write as _},
};

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use kvasir_cluster::{Member, View};
use kvasir_proto::v1::{MeasureEvent, MeasureRequest, paths_client::PathsClient};
use kvasir_types::{PROTOCOL_VERSION, PeerTraffic, Role};
use serde::Serialize;
use serde_json::Value;

use crate::{
    gather,
    output::{Answer, Usage},
    probe::{self, Way},
    render::{self, Table},
    session::Session,
};

/// Beyond the time asked for: both ends answer, and the last transfers end.
const SLACK: std::time::Duration = std::time::Duration::from_secs(20);
/// More members than this are told in a list: a matrix would be wider than a terminal.
const MATRIX: usize = 10;

/// What of the ways is asked.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum TransferCommand {
    /// Which member reaches which, over what, and how fast that went while it did; where each can be reached
    Topology,
    /// Measure the way between two members now: A reads test bytes from B's memory and writes them there, by the transfer engine,
    /// in memory of their own; nobody's KV blocks are touched. Takes bandwidth: needs an operator's token where those are asked for
    Test(TestArgs),
}

/// Between whom, and how much.
#[derive(Clone, Debug, Args)]
pub(crate) struct TestArgs {
    /// The worker or store node that moves the bytes
    a: String,
    /// The one whose memory is read and written
    b: String,
    /// Only read
    #[arg(long, conflicts_with = "write")]
    read: bool,
    /// Only write
    #[arg(long)]
    write: bool,
    /// Bytes of one transfer, with commas between them, up to 16MiB [default: 64KiB,1MiB,4MiB]
    #[arg(long, value_name = "BYTES,…", value_delimiter = ',', value_parser = size)]
    size: Vec<u64>,
    /// How long it may take
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// How much may be moved, an equal share for each size and way [default: 16GiB, and no more]
    #[arg(long, value_name = "BYTES", value_parser = size)]
    max_bytes: Option<u64>,
}

fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor = match &text[digits.len()..] {
        "" | "B" => 1,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        _ => return Err("expected bytes, or so many KiB, MiB or GiB".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| "expected bytes, or so many KiB, MiB or GiB".to_owned())?;
    number.checked_mul(factor).filter(|bytes| *bytes > 0).ok_or_else(|| "expected at least a byte".to_owned())
}

/// Does what is asked and says what came of it.
pub(crate) async fn run(command: TransferCommand, session: &Session) -> anyhow::Result<Answer> {
    match command {
        TransferCommand::Topology => topology(session).await,
        TransferCommand::Test(args) => test(&args, session).await,
    }
}

/// One that others reach.
#[derive(Debug, Serialize)]
struct End {
    member: String,
    role: String,
    /// Transport and address.
    offers: Vec<(String, String)>,
    /// How fast it writes prompts into decode workers' memory, as routers count with it; `None`: it has not yet, or no router
    /// knows.
    hands_over_bytes_per_second: Option<f64>,
}

/// From one that moves blocks to one whose memory it moves them to or from.
#[derive(Debug, Serialize)]
struct Leg {
    from: String,
    to: String,
    transport: Option<String>,
    reason: String,
    bytes: u64,
    /// While transfers were under way; `None`: none was yet.
    bytes_per_second: Option<f64>,
    p50_us: u64,
    p99_us: u64,
    failed: u64,
    rests_ms: u64,
}

#[derive(Debug, Serialize)]
struct Topology {
    members: Vec<End>,
    ways: Vec<Leg>,
}

async fn topology(session: &Session) -> anyhow::Result<Answer> {
    let (way, view) = (session.way()?, session.view().await?);
    let report = gather::ask_all(&view, &way).await;
    let speeds = handover_speeds(&view, &way).await;
    let ends = view.members.iter().filter_map(|member| end(member, &speeds));
    let legs = report.transfers().into_iter().flat_map(|told| told.peers.iter().map(|peer| leg(told.member, peer)));
    let topology = Topology { members: ends.collect(), ways: legs.collect() };
    Ok(session.output().show(&topology, || show(&topology)).into())
}

/// What routers have heard of the workers' hand-overs, by worker: from the first router that tells.
async fn handover_speeds(view: &View, way: &Way) -> HashMap<String, f64> {
    for router in view.role(Role::Router) {
        if let Ok(state) = probe::admin(&router.admin, "/console/state", None, way).await {
            let workers = state["workers"].as_array().into_iter().flatten();
            let speed = |worker: &Value| {
                let speed = worker["told"]["handoff_bytes_per_second"].as_f64()?;
                (speed > 0.0).then(|| Some((worker["id"].as_str()?.to_owned(), speed))).flatten()
            };
            return workers.filter_map(speed).collect();
        }
    }
    HashMap::new()
}

fn end(member: &Member, speeds: &HashMap<String, f64>) -> Option<End> {
    let segment = member.segment.as_ref()?;
    let offers = segment.transports.iter();
    let offers = offers.map(|offer| (offer.kind.to_string(), probe::printable(&offer.address)));
    Some(End {
        member: member.id.to_string(),
        role: member.works_as().to_string(),
        offers: offers.collect(),
        hands_over_bytes_per_second: speeds.get(member.id.as_str()).copied(),
    })
}

fn leg(from: &str, peer: &PeerTraffic) -> Leg {
    let bytes = peer.read_bytes.saturating_add(peer.written_bytes);
    Leg {
        from: from.to_owned(),
        to: peer.name.clone(),
        transport: peer.transport.map(|kind| kind.to_string()),
        reason: peer.reason.clone(),
        bytes,
        bytes_per_second: (peer.busy_us > 0).then(|| bytes as f64 * 1e6 / peer.busy_us as f64),
        p50_us: peer.p50_us,
        p99_us: peer.p99_us,
        failed: peer.failed,
        rests_ms: peer.resting_ms,
    }
}

fn show(topology: &Topology) -> String {
    let Topology { members, ways } = topology;
    let mut table = Table::new(&["MEMBER", "ROLE", "HANDS OVER AT", "REACHED BY"]);
    for End { member, role, offers, hands_over_bytes_per_second } in members {
        let offers: Vec<String> = offers.iter().map(|(kind, address)| format!("{kind} {address}")).collect();
        let rate = hands_over_bytes_per_second.map_or_else(|| "-".to_owned(), speed);
        table.row(vec![member.clone(), role.clone(), rate, offers.join(", ")]);
    }
    if table.is_empty() {
        return "no worker or store node is there\n".to_owned();
    }
    let mut text = table.render();
    text.push('\n');
    if ways.is_empty() {
        return text + "no KV blocks have moved yet: kvasirctl transfer test A B measures a way\n";
    }
    let cell = |leg: &Leg| {
        let kind = leg.transport.as_deref().unwrap_or("?");
        match leg.bytes_per_second {
            _ if leg.rests_ms > 0 => format!("{kind} fails"),
            Some(rate) => format!("{kind} {}", speed(rate)),
            None => kind.to_owned(),
        }
    };
    if members.len() <= MATRIX {
        let mut head = vec!["FROM \\ TO"];
        head.extend(members.iter().map(|end| end.member.as_str()));
        let mut matrix = Table::new(&head);
        for from in members.iter().filter(|end| ways.iter().any(|leg| leg.from == end.member)) {
            let mut row = vec![from.member.clone()];
            row.extend(members.iter().map(|to| {
                let leg = ways.iter().find(|leg| leg.from == from.member && leg.to == to.member);
                leg.map_or_else(|| "-".to_owned(), cell)
            }));
            matrix.row(row);
        }
        return text + &matrix.render();
    }
    let mut list = Table::new(&["FROM", "TO", "OVER", "SPEED", "MOVED", "P50", "P99", "FAILED"]);
    for leg in ways {
        list.row(vec![
            leg.from.clone(),
            leg.to.clone(),
            leg.transport.clone().unwrap_or_else(|| "?".to_owned()),
            leg.bytes_per_second.map_or_else(|| "-".to_owned(), speed),
            render::bytes(leg.bytes),
            micros(leg.p50_us as f64),
            micros(leg.p99_us as f64),
            leg.failed.to_string(),
        ]);
    }
    text + &list.render()
}

fn speed(bytes_per_second: f64) -> String {
    match bytes_per_second {
        rate if rate >= 1e9 => format!("{:.2} GB/s", rate / 1e9),
        rate if rate >= 1e6 => format!("{:.1} MB/s", rate / 1e6),
        rate => format!("{:.1} kB/s", rate / 1e3),
    }
}

fn micros(us: f64) -> String {
    match us {
        us if us <= 0.0 => "-".to_owned(),
        us if us >= 10_000.0 => format!("{:.1} ms", us / 1e3),
        us => format!("{us:.0} µs"),
    }
}

/// What was measured of one size, one way.
#[derive(Debug, Serialize)]
struct Measured {
    way: String,
    size_bytes: u64,
    p50_us: f64,
    p99_us: f64,
    bytes_per_second: f64,
    transfers_alone: u64,
    moved_bytes: u64,
    transport: String,
}

#[derive(Debug, Serialize)]
struct Outcome {
    a: String,
    b: String,
    reason: String,
    steps: Vec<Measured>,
    cut: Option<String>,
}

async fn test(args: &TestArgs, session: &Session) -> anyhow::Result<Answer> {
    let (way, view) = (session.way()?, session.view().await?);
    let a = find(&view, &args.a)?;
    find(&view, &args.b)?;
    if args.a == args.b {
        return Err(Usage(format!("{} is at both ends: name two members", args.a)).into());
    }
    let request = MeasureRequest {
        protocol_version: PROTOCOL_VERSION,
        peer: args.b.clone(),
        read: args.read,
        write: args.write,
        sizes: args.size.clone(),
        time_ms: args.seconds * 1000,
        max_bytes: args.max_bytes.unwrap_or(0),
    };
    let failed = |why: String| anyhow::anyhow!("{}: {why}", args.a);
    let channel = tokio::time::timeout(way.limit, probe::connect(&way.rpc, &a.grpc)).await;
    let channel = channel.context("no connection in time").and_then(|made| made.map_err(failed))?;
    let live = session.output().is_for_people() && std::io::stderr().is_terminal();
    let all = async {
        let mut events = PathsClient::new(channel).measure(way.signed(request)).await?.into_inner();
        let mut told =
            Outcome { a: args.a.clone(), b: args.b.clone(), reason: String::new(), steps: vec![], cut: None };
        while let Some(event) = events.message().await? {
            if live {
                let _ = write!(std::io::stderr(), "\r\x1b[K{}", line(&event));
            }
            if event.over {
                take(&mut told, event);
            }
        }
        Ok::<_, tonic::Status>(told)
    };
    let limit = std::time::Duration::from_secs(args.seconds) + SLACK;
    let ended = tokio::time::timeout(limit, all).await;
    if live {
        let _ = write!(std::io::stderr(), "\r\x1b[K");
    }
    let told = match ended {
        Ok(Ok(told)) => told,
        Ok(Err(status)) => return Err(failed(probe::told(status))),
        Err(_) => bail!("{} has not come to an end within {} s", args.a, limit.as_secs()),
    };
    Ok(session.output().show(&told, || measured(&told)).into())
}

/// One with a transfer engine.
fn find<'a>(view: &'a View, name: &str) -> anyhow::Result<&'a Member> {
    let ends = || view.members.iter().filter(|member| member.segment.is_some());
    let named: Vec<&Member> = ends().filter(|member| member.id.as_str() == name).collect();
    match named[..] {
        [member] => Ok(member),
        [] => {
            let names: Vec<&str> = ends().map(|member| member.id.as_str()).collect();
            bail!("no worker or store node is called {name:?}, there are: {}", names.join(", "))
        }
        _ => bail!("several members are called {name:?}: give them different ids"),
    }
}

fn take(told: &mut Outcome, event: MeasureEvent) {
    told.reason = probe::printable(&event.reason);
    if !event.cut.is_empty() {
        told.cut = Some(probe::printable(&event.cut));
    }
    if event.moved_bytes == 0 {
        return;
    }
    told.steps.push(Measured {
        way: probe::printable(&event.way),
        size_bytes: event.size_bytes,
        p50_us: event.p50_us,
        p99_us: event.p99_us,
        bytes_per_second: event.bytes_per_second,
        transfers_alone: event.alone,
        moved_bytes: event.moved_bytes,
        transport: probe::printable(&event.transport),
    });
}

fn line(event: &MeasureEvent) -> String {
    let MeasureEvent { step, steps, size_bytes, p50_us, bytes_per_second, .. } = event;
    let way = probe::printable(&event.way);
    let mut text = format!("{step} of {steps}: {way} {}, p50 {}", render::bytes(*size_bytes), micros(*p50_us));
    if *bytes_per_second > 0.0 {
        text += &format!(", {}", speed(*bytes_per_second));
    }
    text
}

fn measured(told: &Outcome) -> String {
    let mut table = Table::new(&["WAY", "SIZE", "P50", "P99", "4 AT A TIME", "MOVED", "OVER"]);
    for step in &told.steps {
        let way = match step.way.as_str() {
            "read" => format!("{} reads {}", told.a, told.b),
            "write" => format!("{} writes {}", told.a, told.b),
            other => other.to_owned(),
        };
        table.row(vec![
            way,
            render::bytes(step.size_bytes),
            micros(step.p50_us),
            micros(step.p99_us),
            if step.bytes_per_second > 0.0 { speed(step.bytes_per_second) } else { "-".to_owned() },
            render::bytes(step.moved_bytes),
            step.transport.clone(),
        ]);
    }
    let mut text = table.render();
    if !told.reason.is_empty() {
        text += &format!("over that: {}\n", told.reason);
    }
    if let Some(cut) = &told.cut {
        text += &format!("shorter than asked for: {cut}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use kvasir_types::TransportKind;

    use super::*;

    #[test]
    fn sizes_are_written_as_people_write_them() {
        let sizes = ["7", "64KiB", "1MiB", "2M", "1GiB", "9B"].map(size);
        assert_eq!(sizes.map(Result::unwrap), [7, 65_536, 1 << 20, 2 << 20, 1 << 30, 9]);
        for bad in ["", "KiB", "0", "-1", "1.5MiB", "1TB", "99999999999GiB"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn few_members_are_a_matrix_and_many_a_list() {
        let end = |at: usize| End {
            member: format!("decode-{at}"),
            role: "decode".to_owned(),
            offers: vec![("tcp".to_owned(), format!("10.0.0.{at}:7000"))],
            hands_over_bytes_per_second: (at == 1).then_some(2.5e9),
        };
        let peer = PeerTraffic {
            name: "decode-1".into(),
            transport: Some(TransportKind::Tcp),
            reason: "always possible".into(),
            read_bytes: 1_000_000,
            written_bytes: 2_000_000,
            completed: 3,
            failed: 0,
            in_flight_bytes: 0,
            p50_us: 512,
            p99_us: 16_384,
            failures_in_a_row: 0,
            resting_ms: 0,
            busy_us: 2_000,
        };
        let topology = |count| Topology { members: (0..count).map(end).collect(), ways: vec![leg("decode-0", &peer)] };
        let few = show(&topology(2));
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let row = |of: &str| few.lines().find(|line| line.starts_with(of)).map(words).unwrap_or_default();
        assert_eq!(row("decode-0"), "decode-0 decode - tcp 10.0.0.0:7000", "{few}");
        assert_eq!(row("decode-1"), "decode-1 decode 2.50 GB/s tcp 10.0.0.1:7000", "{few}");
        assert!(few.contains("tcp 1.50 GB/s"), "{few}");
        let many = show(&topology(11));
        assert!(many.contains("16.4 ms") && many.contains("1.50 GB/s") && !many.contains('\\'), "{many}");
        let none = show(&Topology { members: vec![end(0)], ways: vec![] });
        assert!(none.contains("no KV blocks have moved yet"), "{none}");
    }
}
