//! The rows of the report: which figure stands beside which, and what we set out to reach.

use super::plan::{Carrier, Figure, Found, Load, SINGLE, STREAMS, Way};
use crate::report::Row;

const GB_PER_S: fn(&Figure) -> f64 = |figure| figure.gb_per_s;
const CPU: fn(&Figure) -> f64 = |figure| figure.cpu_s_per_gib;
const LATENCY: fn(&Figure) -> f64 = |figure| figure.latency_us;

/// All rows; `auto` is the transport that it chose.
pub fn rows(found: &Found, auto: &str) -> Vec<Row> {
    let host = format!("auto ({auto})");
    let mut rows = Vec::new();
    for (block, batch) in STREAMS {
        for op in [Way::Read, Way::Write] {
            let load = Load { op, block, batch };
            speed(found, load, &host, &mut rows);
            processor_time(found, load, &host, &mut rows);
        }
    }
    latency(found, &host, &mut rows);
    local(found, &mut rows);
    rows
}

fn speed(found: &Found, load: Load, host: &str, rows: &mut Vec<Row>) {
    let beside = |ours, name: &str, rival, rival_load| {
        compare(found, format!("{name}, {}", load.name()), "GB/s", (ours, load), (rival, rival_load), GB_PER_S)
    };
    let mooncake = beside(Carrier::Tcp, "tcp", Carrier::Mooncake, load);
    let socket = beside(Carrier::Tcp, "tcp", Carrier::Socket, load);
    rows.extend(mooncake.map(|row| if load.block >= 64 << 10 { row.at_least(2.0) } else { row }));
    rows.extend(socket.map(|row| if load.block >= 1 << 20 { row.at_least(0.9) } else { row }));
    rows.extend(beside(Carrier::Tcp, "tcp", Carrier::NixlTcp, load));
    // A memcpy has no direction: it was measured with the reads.
    let memcpy = beside(Carrier::Auto, host, Carrier::Memcpy, Load { op: Way::Read, ..load });
    rows.extend(memcpy.map(|row| if load.block == 16 << 20 { row.at_least(0.8) } else { row }));
    rows.extend(beside(Carrier::Auto, host, Carrier::NixlHost, load).map(|row| row.at_least(1.0)));
    rows.extend(beside(Carrier::Ucx, "ucx (tcp)", Carrier::NixlTcp, load));
}

fn processor_time(found: &Found, load: Load, host: &str, rows: &mut Vec<Row>) {
    let pairs = [
        (Carrier::Tcp, "tcp", Carrier::Mooncake),
        (Carrier::Tcp, "tcp", Carrier::NixlTcp),
        (Carrier::Auto, host, Carrier::NixlHost),
    ];
    for (ours, name, rival) in pairs {
        let what = format!("processor time of {name}, {}", load.name());
        let row = compare(found, what, "s/GiB", (ours, load), (rival, load), CPU);
        rows.extend(row.map(|row| row.at_most(1.0)));
    }
    let what = format!("processor time of tcp, {}", load.name());
    rows.extend(compare(found, what, "s/GiB", (Carrier::Tcp, load), (Carrier::Socket, load), CPU));
}

/// One operation at a time. The goal is for what `auto` takes, against whichever rival is better.
fn latency(found: &Found, host: &str, rows: &mut Vec<Row>) {
    for op in [Way::Read, Way::Write] {
        let load = Load { op, block: SINGLE, batch: 1 };
        let beside = |ours, name: &str, rival| {
            let mean = if rival == Carrier::Mooncake { " (its mean)" } else { "" };
            let what = format!("{name}, {} alone, p50{mean}", load.name());
            compare(found, what, "µs", (ours, load), (rival, load), LATENCY)
        };
        let host_rows =
            [Carrier::NixlHost, Carrier::NixlTcp, Carrier::Mooncake].map(|rival| beside(Carrier::Auto, host, rival));
        rows.extend(host_rows.into_iter().flatten().map(|row| if op == Way::Read { row.at_most(1.0) } else { row }));
        rows.extend(
            [Carrier::NixlTcp, Carrier::Mooncake].map(|rival| beside(Carrier::Tcp, "tcp", rival)).into_iter().flatten(),
        );
    }
}

fn local(found: &Found, rows: &mut Vec<Row>) {
    let single = Load { op: Way::Read, block: SINGLE, batch: 1 };
    let (local, memcpy) = (Carrier::Local, Carrier::Memcpy);
    if let (Ok(ours), Ok(theirs)) = (found.get(local, single, LATENCY), found.get(memcpy, single, LATENCY)) {
        let above: Vec<_> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours - theirs).collect();
        rows.push(Row::alone("local, 4 KiB alone, p50 above a memcpy's", "µs", &above).under(2.0));
    }
    for (block, batch) in STREAMS {
        let load = Load { op: Way::Read, block, batch };
        let what = format!("local, {}", load.name());
        let row = compare(found, what, "GB/s", (local, load), (memcpy, load), GB_PER_S);
        rows.extend(row.map(|row| if block >= 1 << 20 { row.at_least(0.9) } else { row }));
    }
}

/// Ours beside the rival's; alone if the rival is missing, and nothing if we are.
fn compare(
    found: &Found,
    what: String,
    unit: &'static str,
    (ours, ours_load): (Carrier, Load),
    (rival, rival_load): (Carrier, Load),
    pick: fn(&Figure) -> f64,
) -> Option<Row> {
    let ours = found.get(ours, ours_load, pick).ok()?;
    Some(match found.get(rival, rival_load, pick) {
        Ok(theirs) => Row::repeated(what, unit, &ours, rival.name(), &theirs),
        Err(reason) => Row::alone(what, unit, &ours).without(rival.name(), reason),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(gb_per_s: f64) -> Figure {
        Figure { gb_per_s, latency_us: 1.0 / gb_per_s, cpu_s_per_gib: 1.0 / gb_per_s }
    }

    #[test]
    fn a_missing_rival_has_rows_that_say_why() {
        let mut found = Found::default();
        for load in super::super::plan::loads() {
            for carrier in
                [Carrier::Tcp, Carrier::Auto, Carrier::Memcpy, Carrier::Local, Carrier::Socket, Carrier::NixlHost]
            {
                found.add(carrier, load, figure(2.0));
            }
        }
        found.miss(Carrier::Mooncake, "no network");
        found.miss(Carrier::NixlTcp, "no network");
        let rows = rows(&found, "shm");
        let missing: Vec<_> = rows.iter().filter(|row| row.rival == "Mooncake TCP: no network").collect();
        assert!(
            missing.iter().all(|row| row.theirs.is_none() && row.met.is_none() && row.ours == 2.0 || row.ours == 0.5)
        );
        // Speed and processor time of ten loads, latency of two for auto and tcp.
        assert_eq!(missing.len(), 2 * 10 + 2 * 2);
        let goal =
            |what: &str, rival: &str| rows.iter().find(|row| row.what == what && row.rival == rival).unwrap().met;
        assert_eq!(goal("auto (shm), 16 MiB write", "memcpy"), Some(true));
        assert_eq!(goal("tcp, 1 MiB read", "plain socket loop"), Some(true));
        assert_eq!(goal("tcp, 64 KiB read", "plain socket loop"), None);
    }
}
