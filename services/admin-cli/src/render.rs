//! A report as text. Pure: the same report gives the same text.

mod table;
#[cfg(test)]
mod tests;

use kvasir_types::Role;

pub(crate) use self::table::Table;
use crate::report::{Live, MemberReport, Report, RoleTotals, State, TransferReport};

/// Most members that `status` shows in a line each, if not all are asked for.
const SCREEN: usize = 24;

/// `status`: whether it is well, members in a line each, sums, warnings.
pub(crate) fn status(report: &Report, all: bool) -> String {
    if report.members.is_empty() {
        return "no members: no service of this cluster is running (or --prefix names another cluster)\n".to_owned();
    }
    let mut table =
        Table::new(&["ROLE", "MEMBER", "STATE", "VERSION", "MODEL", "FREE", "CACHED", "IN USE", "RUNNING", "WAITING"]);
    let shown: Vec<&MemberReport> = if all || report.members.len() <= SCREEN {
        report.members.iter().collect()
    } else {
        report.members.iter().filter(|member| member.state != State::Ready).take(SCREEN).collect()
    };
    for &member in &shown {
        let mut row = vec![
            role(member),
            member.id.clone(),
            state(member.state).to_owned(),
            member.version.clone(),
            or_dash(member.model.as_deref().unwrap_or_default()),
        ];
        match member.live.as_ref().and_then(Live::worker) {
            Some(numbers) => {
                let blocks = numbers.blocks;
                let cells = [blocks.free, blocks.cached, blocks.in_use, numbers.running, numbers.waiting];
                row.extend(cells.map(|number| number.to_string()));
            }
            None => row.extend(["-"; 5].map(str::to_owned)),
        }
        table.row(row);
    }
    let mut text = match (report.problems(), report.members.len()) {
        (0, members) => format!("all is well: {members} members\n\n"),
        (1, _) => "one thing is wrong, see below\n\n".to_owned(),
        (problems, _) => format!("{problems} things are wrong, see below\n\n"),
    };
    if !table.is_empty() {
        text += &table.render();
    }
    match report.members.len() - shown.len() {
        0 => text.push('\n'),
        rest if table.is_empty() => text += &format!("{rest} members: -o wide shows them\n\n"),
        rest => text += &format!("… and {rest} more: -o wide shows them\n\n"),
    }
    report.totals.iter().for_each(|totals| text.push_str(&sums(totals)));
    text.push_str(&troubles(report));
    text
}

/// `workers`: prefill and decode workers, then store nodes, with what they have done.
pub(crate) fn workers(report: &Report) -> String {
    let mut workers = Table::new(&[
        "ROLE", "MEMBER", "STATE", "GRPC", "UPTIME", "REQUESTS", "RUNNING", "WAITING", "BLOCKS", "FREE", "CACHED",
        "IN USE",
    ]);
    let mut stores = Table::new(&[
        "STORE", "STATE", "GRPC", "UPTIME", "USED", "CAPACITY", "BLOCKS", "PINNED", "RESERVED", "LOOKUPS", "HITS",
        "WRITTEN", "EVICTED",
    ]);
    for member in report.workers() {
        let state = state(member.state).to_owned();
        if member.role == Role::KvStore {
            let mut row = vec![member.id.clone(), state, or_dash(&member.grpc)];
            match &member.live {
                Some(Live::Store(store)) => {
                    row.extend([duration(store.uptime_ms), bytes(store.used_bytes), bytes(store.capacity_bytes)]);
                    let numbers = [
                        store.blocks,
                        store.pinned,
                        store.reserved,
                        store.lookups_total,
                        store.hit_blocks_total,
                        store.committed_blocks_total,
                        store.evicted_blocks_total,
                    ];
                    row.extend(numbers.map(|number| number.to_string()));
                }
                _ => row.extend(["-"; 10].map(str::to_owned)),
            }
            stores.row(row);
        } else {
            let mut row = vec![role(member), member.id.clone(), state, or_dash(&member.grpc)];
            match member.live.as_ref().and_then(Live::worker) {
                Some(worker) => {
                    row.push(duration(worker.uptime_ms));
                    let blocks = worker.blocks;
                    let numbers = [
                        worker.requests_total,
                        worker.running,
                        worker.waiting,
                        blocks.total,
                        blocks.free,
                        blocks.cached,
                        blocks.in_use,
                    ];
                    row.extend(numbers.map(|number| number.to_string()));
                }
                None => row.extend(["-"; 8].map(str::to_owned)),
            }
            workers.row(row);
        }
    }
    let parts: Vec<_> = [&workers, &stores].into_iter().filter(|table| !table.is_empty()).map(Table::render).collect();
    if parts.is_empty() {
        return "no workers and no store nodes\n".to_owned();
    }
    parts.join("\n") + &reasons(report.workers())
}

/// `models`: a line for each.
pub(crate) fn models(report: &Report) -> String {
    if report.models.is_empty() {
        return "no models: no worker is running\n".to_owned();
    }
    let mut table =
        Table::new(&["MODEL", "FINGERPRINT", "CONTEXT", "KV DTYPE", "BLOCK", "BLOCK BYTES", "PREFILL", "DECODE"]);
    for model in &report.models {
        table.row(vec![
            model.name.clone(),
            model.fingerprint.chars().take(12).collect(),
            model.max_model_len.to_string(),
            format!("{:?}", model.layout.dtype).to_lowercase(),
            format!("{} tokens", model.layout.block_size),
            bytes(model.block_bytes),
            or_dash(&model.prefill.join(" ")),
            or_dash(&model.decode.join(" ")),
        ]);
    }
    table.render()
}

/// `transfers`: a line for each pair of which one has moved something.
pub(crate) fn transfers(report: &Report) -> String {
    let mut table =
        Table::new(&["MEMBER", "PEER", "TRANSPORT", "READ", "WRITTEN", "DONE", "FAILED", "P50", "P99", "STATE", "WHY"]);
    for TransferReport { member, peers } in report.transfers() {
        for peer in peers {
            let state = match (peer.resting_ms, peer.failures_in_a_row) {
                (0, 0) => "ok".to_owned(),
                (0, failures) => format!("{failures} failures"),
                (rest, _) => format!("rests {}", duration(rest)),
            };
            table.row(vec![
                member.to_owned(),
                peer.name.clone(),
                peer.transport.map_or_else(|| "?".to_owned(), |kind| kind.to_string()),
                bytes(peer.read_bytes),
                bytes(peer.written_bytes),
                peer.completed.to_string(),
                peer.failed.to_string(),
                micros(peer.p50_us),
                micros(peer.p99_us),
                state,
                peer.reason.clone(),
            ]);
        }
    }
    if table.is_empty() {
        return "no transfers: no worker has moved KV blocks yet\n".to_owned();
    }
    table.render() + &reasons(report.workers())
}

/// What it works as, and what it is called if that is something else.
fn role(member: &MemberReport) -> String {
    let mut text = member.works_as.to_string();
    if member.works_as != member.role {
        text += &format!(" (was {})", member.role);
    }
    if member.pinned {
        text += " pinned";
    }
    text
}

/// A bound that is a power of two.
fn micros(bound: u64) -> String {
    match bound {
        0 => "-".to_owned(),
        1..1000 => format!("≤{bound} µs"),
        1000..1_000_000 => format!("≤{:.1} ms", bound as f64 / 1e3),
        _ => format!("≤{:.1} s", bound as f64 / 1e6),
    }
}

fn sums(totals: &RoleTotals) -> String {
    let RoleTotals { role, members, ready, blocks, running, waiting } = totals;
    let mut line = format!("{role}: {ready} of {members} ready");
    if matches!(role, Role::Prefill | Role::Decode) {
        line += &format!(
            ", {} blocks ({} free, {} cached, {} in use), {running} running, {waiting} waiting",
            blocks.total, blocks.free, blocks.cached, blocks.in_use
        );
    }
    line + "\n"
}

/// Warnings and reasons, below an empty line; nothing if all is well.
fn troubles(report: &Report) -> String {
    let mut text = reasons(report.members.iter().filter(|member| member.state != State::Ready).take(SCREEN).collect());
    if !report.warnings.is_empty() && text.is_empty() {
        text.push('\n');
    }
    report.warnings.iter().for_each(|warning| text += &format!("warning: {warning}\n"));
    text
}

fn reasons(members: Vec<&MemberReport>) -> String {
    let lines: String = members
        .iter()
        .filter(|member| member.state != State::Ready)
        .map(|member| format!("{} {}: {}: {}\n", member.role, member.id, state(member.state), member.reason))
        .collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

/// A state in a word or two.
pub(crate) fn state(state: State) -> &'static str {
    match state {
        State::Ready => "ready",
        State::NotReady => "not ready",
        State::Cordoned => "cordoned",
        State::Draining => "draining",
        State::Drained => "drained",
        State::Unreachable => "unreachable",
    }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// The two largest units.
pub(crate) fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m{s:02}s"),
        (0, h, m, _) => format!("{h}h{m:02}m"),
        (d, h, _, _) => format!("{d}d{h:02}h"),
    }
}

/// Bytes in the unit that makes them short.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = None;
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = Some(next);
    }
    unit.map_or_else(|| format!("{bytes} B"), |unit| format!("{value:.1} {unit}"))
}
