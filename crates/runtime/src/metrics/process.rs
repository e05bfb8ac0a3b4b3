//! Metrics of the process itself, read from `/proc` when somebody looks.

use std::{
    fs,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use super::Metrics;
use crate::Service;

/// `/proc/self/statm` counts pages. The page size is 4 KiB on x86-64 and on nearly every aarch64 kernel; asking for it
/// would take a C call for a number that is only looked at. VmRSS of `/proc/self/status` is in KiB and exact.
const STATUS: &str = "/proc/self/status";

/// Registers them. Names without our prefix are Prometheus's own conventions, which dashboards know.
pub(super) fn register(metrics: &Metrics, service: &Service) {
    let labels = [("service", service.name), ("version", service.version)];
    metrics
        .gauges::<[(&str, &str); 2]>("kvasir_build", "Which program this is; always 1")
        .get_or_create(&labels)
        .set(1);

    let started = Instant::now();
    let start_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    metrics
        .float_gauge("process_start_time_seconds", "When it started, seconds since 1970")
        .set(start_time.as_secs_f64());

    let resident = metrics.gauge("process_resident_memory_bytes", "Memory in use that is in RAM");
    let files = metrics.gauge("process_open_fds", "Open files and sockets");
    let uptime = metrics.float_gauge("kvasir_uptime_seconds", "Time since start");
    metrics.on_scrape(move || {
        resident.set(resident_bytes().unwrap_or(0));
        files.set(open_files().unwrap_or(0));
        uptime.set(started.elapsed().as_secs_f64());
    });
}

/// `None` where there is no `/proc`.
fn resident_bytes() -> Option<i64> {
    let status = fs::read_to_string(STATUS).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Without the one that is open for counting.
fn open_files() -> Option<i64> {
    Some(fs::read_dir("/proc/self/fd").ok()?.count() as i64 - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_is_on_its_own_page() {
        let service = Service { name: "example", about: "", version: "1.2.3" };
        let page = Metrics::of_process(&service).encode();
        let value = |name: &str| -> f64 {
            let line =
                page.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {page}"));
            line.trim().parse().unwrap()
        };
        assert_eq!(value("kvasir_build{service=\"example\",version=\"1.2.3\"}"), 1.0);
        assert!(value("process_resident_memory_bytes ") > 1e5);
        assert!(value("process_open_fds ") >= 3.0);
        assert!(value("process_start_time_seconds ") > 1.7e9);
        assert!((0.0..60.0).contains(&value("kvasir_uptime_seconds ")));
    }
}
