//! This machine: what services will run into here. Everything is read below a root, so that tests can give another one.

use std::{fs, net::TcpListener, path::Path};

use rustix::process::{Resource, getrlimit};

use super::{Finding, MachineArgs, folder};
use crate::render::bytes;

/// Files a router with thousands of streams, and a worker with its peers, may need.
const FILES: u64 = 65_536;
/// Less than this in /dev/shm, and UCX's shared memory does not start.
const SHM_BYTES: u64 = 64 << 20;

/// Looks at it.
pub(super) fn look(args: &MachineArgs) -> Vec<Finding> {
    let root = Path::new("/");
    let devices = rdma(root);
    let mut findings = vec![
        Finding::ok(
            "kvasirctl",
            format!("version {}, protocol {}", env!("CARGO_PKG_VERSION"), kvasir_types::PROTOCOL_VERSION),
        ),
        processor(root),
        files(getrlimit(Resource::Nofile).current, getrlimit(Resource::Nofile).maximum),
        memlock(getrlimit(Resource::Memlock).current, !devices.is_empty()),
    ];
    findings.extend(memory(root));
    findings.push(shm());
    findings.extend(rdma_findings(root, &devices));
    findings.extend(args.port.iter().map(|&port| port_finding(port)));
    findings.extend(args.model.iter().flat_map(|model| folder::look(model)));
    findings
}

fn read(root: &Path, path: &str) -> String {
    fs::read_to_string(root.join(path)).unwrap_or_default()
}

fn processor(root: &Path) -> Finding {
    let info = read(root, "proc/cpuinfo");
    let flags = info.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|known| known == flag);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    match (flags.is_empty(), has("avx2"), has("avx512f")) {
        (true, ..) => Finding::ok("processor", format!("{cores} cores")),
        (_, _, true) => Finding::ok("processor", format!("{cores} cores, AVX-512")),
        (_, true, _) => Finding::ok("processor", format!("{cores} cores, AVX2")),
        _ => Finding::note(
            "processor",
            format!("{cores} cores without AVX2"),
            "the CPU backend is slow here: use a newer one",
        ),
    }
}

fn files(soft: Option<u64>, hard: Option<u64>) -> Finding {
    let told = |limit: Option<u64>| limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    let found = format!("{} open files, may be raised to {}", told(soft), told(hard));
    if soft.is_none_or(|soft| soft >= FILES) {
        Finding::ok("file limit", found)
    } else {
        Finding::note("file limit", found, "each stream is a file: LimitNOFILE=1048576 of the unit, or ulimit -n 65536")
    }
}

fn memlock(limit: Option<u64>, rdma: bool) -> Finding {
    let found = limit.map_or_else(|| "unlimited".to_owned(), |limit| format!("{} of locked memory", bytes(limit)));
    match (limit, rdma) {
        (None, _) | (_, false) => Finding::ok("memlock", found),
        (Some(_), true) => {
            let remedy = "RDMA locks all of a worker's KV cache: LimitMEMLOCK=infinity, or IPC_LOCK of the container";
            Finding::problem("memlock", found, remedy)
        }
    }
}

/// A number of kilobytes, or of pages, in /proc/meminfo.
fn meminfo(text: &str, key: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    rest.split_whitespace().next()?.parse().ok()
}

fn memory(root: &Path) -> Vec<Finding> {
    let text = read(root, "proc/meminfo");
    let kib = |key| meminfo(&text, key).map(|kib| kib.saturating_mul(1024));
    let mut findings = Vec::new();
    if let (Some(available), Some(total)) = (kib("MemAvailable"), kib("MemTotal")) {
        let found = format!("{} of {} available", bytes(available), bytes(total));
        findings.push(if available < total / 20 {
            Finding::problem(
                "memory",
                found,
                "less than a twentieth is left: smaller kv.memory_bytes, or another machine",
            )
        } else {
            Finding::ok("memory", found)
        });
    }
    let (total, free) = (meminfo(&text, "HugePages_Total"), meminfo(&text, "HugePages_Free"));
    let size = kib("Hugepagesize").unwrap_or_default();
    findings.push(match (total, free) {
        (Some(total), Some(free)) if total > 0 => {
            Finding::ok("huge pages", format!("{free} of {total} free, {} each", bytes(size)))
        }
        _ => Finding::note("huge pages", "none", "only for transfer.huge_pages: sysctl vm.nr_hugepages"),
    });
    findings
}

fn shm() -> Finding {
    match rustix::fs::statvfs("/dev/shm") {
        Err(error) => Finding::note("/dev/shm", error.to_string(), "UCX's shared memory needs it; ours does not"),
        Ok(shm) => {
            let size = shm.f_blocks.saturating_mul(shm.f_frsize);
            if size < SHM_BYTES {
                Finding::note(
                    "/dev/shm",
                    bytes(size),
                    "too little for UCX's shared memory: emptyDir with medium: Memory",
                )
            } else {
                Finding::ok("/dev/shm", bytes(size))
            }
        }
    }
}

/// A device's port and what it says of itself.
#[derive(Debug, PartialEq, Eq)]
struct Port {
    device: String,
    number: String,
    state: String,
    rate: String,
}

fn rdma(root: &Path) -> Vec<Port> {
    let names = |folder: &str| -> Vec<String> {
        let entries = fs::read_dir(root.join(folder)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    let mut ports = Vec::new();
    for device in names("sys/class/infiniband") {
        for number in names(&format!("sys/class/infiniband/{device}/ports")) {
            let of =
                |what| read(root, &format!("sys/class/infiniband/{device}/ports/{number}/{what}")).trim().to_owned();
            let state = of("state").rsplit(' ').next().unwrap_or_default().to_owned();
            ports.push(Port { device: device.clone(), number: number.clone(), state, rate: of("rate") });
        }
    }
    ports
}

fn rdma_findings(root: &Path, ports: &[Port]) -> Vec<Finding> {
    if ports.is_empty() {
        return vec![Finding::note(
            "RDMA",
            "no device",
            "blocks go by shared memory and TCP, which is fine on one machine",
        )];
    }
    let active = ports.iter().filter(|port| port.state == "ACTIVE").count();
    let mut findings: Vec<Finding> = ports
        .iter()
        .map(|Port { device, number, state, rate }| {
            let found = format!("{device} port {number} {state}, {rate}");
            match (state.as_str(), active) {
                ("ACTIVE", _) => Finding::ok("RDMA", found),
                (_, 0) => {
                    Finding::problem("RDMA", found, "no port is active: cable, switch, or subnet manager (opensm)")
                }
                _ => Finding::note("RDMA", found, "this port is not used"),
            }
        })
        .collect();
    if active > 0 && fs::read_dir(root.join("dev/infiniband")).is_err() {
        let remedy = "give the container its RDMA resource, or /dev/infiniband";
        findings.push(Finding::problem("RDMA", "devices, but no /dev/infiniband", remedy));
    }
    findings
}

fn port_finding(port: u16) -> Finding {
    match TcpListener::bind(("0.0.0.0", port)) {
        Ok(_) => Finding::ok("port", format!("{port} is free")),
        Err(error) => {
            Finding::problem("port", format!("{port}: {error}"), "stop who has it (ss -ltnp), or set another `listen`")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    fn levels(findings: &[Finding]) -> Vec<Level> {
        findings.iter().map(|finding| finding.level).collect()
    }

    fn with_device(root: &Path, state: &str) {
        let port = root.join("sys/class/infiniband/mlx5_0/ports/1");
        fs::create_dir_all(&port).unwrap();
        fs::write(port.join("state"), format!("4: {state}\n")).unwrap();
        fs::write(port.join("rate"), "400 Gb/sec (4X NDR)\n").unwrap();
    }

    #[test]
    fn rdma_devices_need_an_active_port_their_files_and_locked_memory() {
        let root = tempfile::tempdir().unwrap();
        let look = || rdma_findings(root.path(), &rdma(root.path()));
        assert_eq!(levels(&look()), [Level::Note]);
        with_device(root.path(), "DOWN");
        assert_eq!(levels(&look()), [Level::Problem]);
        with_device(root.path(), "ACTIVE");
        assert_eq!(levels(&look()), [Level::Ok, Level::Problem]);
        fs::create_dir_all(root.path().join("dev/infiniband")).unwrap();
        assert_eq!(levels(&look()), [Level::Ok]);
        assert_eq!(look()[0].found, "mlx5_0 port 1 ACTIVE, 400 Gb/sec (4X NDR)");
        assert_eq!(
            levels(&[memlock(Some(65_536), true), memlock(Some(65_536), false), memlock(None, true)]),
            [Level::Problem, Level::Ok, Level::Ok]
        );
    }

    #[test]
    fn memory_files_and_ports() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc")).unwrap();
        let write = |text: &str| fs::write(root.path().join("proc/meminfo"), text).unwrap();
        write(
            "MemTotal:  1000 kB\nMemAvailable:  900 kB\nHugePages_Total:  4\nHugePages_Free:  3\nHugepagesize:  2048 kB\n",
        );
        let found = memory(root.path());
        assert_eq!(levels(&found), [Level::Ok, Level::Ok]);
        assert_eq!(found[1].found, "3 of 4 free, 2.0 MiB each");
        write("MemTotal:  1000 kB\nMemAvailable:  9 kB\n");
        assert_eq!(levels(&memory(root.path())), [Level::Problem, Level::Note]);
        assert_eq!(levels(&[files(Some(1024), Some(4096)), files(None, None)]), [Level::Note, Level::Ok]);
        let taken = TcpListener::bind("0.0.0.0:0").unwrap();
        assert_eq!(port_finding(taken.local_addr().unwrap().port()).level, Level::Problem);
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        let found = look(&MachineArgs::default());
        let whats: Vec<&str> = found.iter().map(|finding| finding.what.as_str()).collect();
        for what in ["kvasirctl", "processor", "file limit", "memlock", "huge pages", "/dev/shm", "RDMA"] {
            assert!(whats.contains(&what), "{what}: {whats:?}");
        }
    }
}
