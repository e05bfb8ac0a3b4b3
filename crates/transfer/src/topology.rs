//! Which network devices this machine has, and which of them to prefer for memory of which NUMA node.
//!
//! Detected from what Linux shows below `/sys`, or read from a file where the operator knows better (a virtual machine whose
//! devices have no node; a device that shall not be used). Preferred first: devices whose link is up, RDMA before sockets, the
//! nearest to the memory, the fastest. A device that is down is never preferred.
//!
//! ```
//! # fn main() -> Result<(), kvasir_transfer::Error> {
//! let topology = kvasir_transfer::Topology::parse(
//!     r#"{"devices": [
//!         {"name": "mlx5_0:1", "kind": "rdma", "node": 0, "speed_mbps": 200000},
//!         {"name": "mlx5_1:1", "kind": "rdma", "node": 1, "speed_mbps": 200000}
//!     ]}"#,
//! )?;
//! let names: Vec<_> = topology.preferred(Some(1)).iter().map(|device| device.name.as_str()).collect();
//! assert_eq!(names, ["mlx5_1:1", "mlx5_0:1"]);
//! # Ok(()) }
//! ```

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    io::Read,
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Most bytes of a file that is read here.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Most devices, and most nodes.
const MAX_ENTRIES: usize = 1024;
/// The distance from a node to itself, by definition of the firmware's table.
const SAME_NODE: u32 = 10;
/// The distance assumed where nothing is known: as if on another node.
const UNKNOWN_DISTANCE: u32 = 20;

/// The network devices and NUMA nodes of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Every port of every device, by name.
    pub devices: Vec<Device>,
    /// The machine's nodes, by number. May be left out of a file.
    #[serde(default)]
    pub nodes: Vec<Node>,
    /// For memory on a node: these devices, best first, and no others. Nodes not named here go by link, kind, distance and
    /// speed. Detection leaves it empty.
    #[serde(default)]
    pub prefer: BTreeMap<u32, Vec<String>>,
}

/// A port of an RDMA device, or a network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// As UCX names it: `mlx5_0:1`, `eth0`.
    pub name: String,
    /// What it is.
    pub kind: DeviceKind,
    /// The NUMA node it is attached to, if it is attached to one.
    #[serde(default)]
    pub node: Option<u32>,
    /// Whether its link is up. Default up.
    #[serde(default)]
    pub link: Link,
    /// Megabits in a second, if known.
    #[serde(default)]
    pub speed_mbps: Option<u64>,
    /// What an RDMA port runs over, `InfiniBand` or `Ethernet`.
    #[serde(default)]
    pub layer: Option<String>,
    /// Made by software (a bridge, a tunnel, the loopback).
    #[serde(default)]
    pub is_virtual: bool,
}

/// Kinds of devices, the better ones first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// Reads and writes remote memory by itself: `ucx`.
    Rdma,
    /// Sockets: `tcp`.
    Net,
}

/// State of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Link {
    /// Bytes can pass.
    #[default]
    Up,
    /// They can't.
    Down,
}

/// A NUMA node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its number.
    pub id: u32,
    /// Its processors, as Linux lists them: `0-15,32-47`.
    #[serde(default)]
    pub cpus: String,
    /// Its memory.
    #[serde(default)]
    pub memory_bytes: u64,
    /// The distance to each node, in the order of the list of nodes; 10 is the node itself.
    #[serde(default)]
    pub distances: Vec<u32>,
}

impl Topology {
    /// What this machine has. Where the system shows nothing, nothing is listed.
    pub fn detect() -> Self {
        Self::detect_below(Path::new("/"))
    }

    /// As [`Self::detect`], with `sys` looked for below another root than `/`.
    pub fn detect_below(root: &Path) -> Self {
        let mut devices = rdma_ports(&root.join("sys/class/infiniband"));
        devices.extend(interfaces(&root.join("sys/class/net")));
        devices.truncate(MAX_ENTRIES);
        Self { devices, nodes: nodes(&root.join("sys/devices/system/node")), prefer: BTreeMap::new() }
    }

    /// Reads a file in JSON form, as [`Self::to_json`] writes it.
    ///
    /// # Errors
    /// [`Error::Config`] if it can't be read or [`Self::parse`] refuses it.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = read(path).map_err(|error| bad(format!("{}: {error}", path.display())))?;
        Self::parse(&text).map_err(|error| match error {
            Error::Config { reason, .. } => bad(format!("{}: {reason}", path.display())),
            other => other,
        })
    }

    /// Takes a topology in JSON form. Only `devices` must be there, each with `name` and `kind`.
    ///
    /// # Errors
    /// [`Error::Config`] for what is no topology: an unknown field, a name given twice, a preference for a device that is not
    /// listed.
    pub fn parse(json: &str) -> Result<Self, Error> {
        let topology: Self = serde_json::from_str(json).map_err(|error| bad(error.to_string()))?;
        topology.check()?;
        Ok(topology)
    }

    /// The JSON form, to be edited and read back.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() // of these types none fails
    }

    fn check(&self) -> Result<(), Error> {
        if self.devices.len().max(self.nodes.len()).max(self.prefer.len()) > MAX_ENTRIES {
            return Err(bad(format!("more than {MAX_ENTRIES} devices or nodes")));
        }
        let mut names: Vec<_> = self.devices.iter().map(|device| device.name.as_str()).collect();
        names.sort_unstable();
        for name in &names {
            // The names go into UCX's list of devices.
            if name.is_empty() || name.len() > 64 || name.contains(|c: char| c == ',' || !c.is_ascii_graphic()) {
                return Err(bad(format!("'{name}' is no name of a device")));
            }
        }
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(bad(format!("device {} is listed twice", twice[0])));
        }
        for (node, preferred) in &self.prefer {
            if let Some(unknown) = preferred.iter().find(|name| names.binary_search(&name.as_str()).is_err()) {
                return Err(bad(format!("node {node} prefers {unknown}, which is not among the devices")));
            }
        }
        Ok(())
    }

    /// The devices to use for memory on `node` (`None`: on no node in particular), best first.
    pub fn preferred(&self, node: Option<u32>) -> Vec<&Device> {
        let up = |device: &&Device| device.link == Link::Up;
        if let Some(names) = node.and_then(|node| self.prefer.get(&node)) {
            let named = |name: &String| self.devices.iter().find(|device| device.name == *name);
            return names.iter().filter_map(named).filter(up).collect();
        }
        let mut devices: Vec<_> = self.devices.iter().filter(up).collect();
        devices.sort_by_key(|device| {
            let speed = Reverse(device.speed_mbps.unwrap_or(0));
            (device.kind, device.is_virtual, self.distance(node, device.node), speed, &device.name)
        });
        devices
    }

    /// The RDMA ports among [`Self::preferred`], as [`crate::UcxConfig::net_devices`] takes them; `None` if there is none.
    pub fn ucx_devices(&self, node: Option<u32>) -> Option<String> {
        let preferred = self.preferred(node);
        let names: Vec<_> = preferred.iter().filter(|device| device.kind == DeviceKind::Rdma).collect();
        // The far ones serve only if no near one is up: a transfer over them crosses the link between the nodes.
        let nearest = names.iter().map(|device| self.distance(node, device.node)).min()?;
        let near = names.iter().filter(|device| self.distance(node, device.node) == nearest);
        Some(near.map(|device| device.name.as_str()).collect::<Vec<_>>().join(","))
    }

    /// Whether any RDMA port is up.
    pub fn has_rdma(&self) -> bool {
        self.devices.iter().any(|device| device.kind == DeviceKind::Rdma && device.link == Link::Up)
    }

    fn distance(&self, from: Option<u32>, to: Option<u32>) -> u32 {
        let (Some(from), Some(to)) = (from, to) else { return UNKNOWN_DISTANCE };
        let at = |id| self.nodes.iter().position(|node| node.id == id);
        let known = at(from).zip(at(to)).and_then(|(from, to)| self.nodes[from].distances.get(to).copied());
        known.unwrap_or(if from == to { SAME_NODE } else { UNKNOWN_DISTANCE })
    }
}

fn bad(reason: String) -> Error {
    Error::Config { setting: "topology", reason }
}

/// A small text file; what is beyond the bound is an error, not cut off.
fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(std::io::Error::other(format!("larger than {MAX_FILE_BYTES} bytes")));
    }
    Ok(text)
}

/// One value of `/sys`, if it is there.
fn value(path: &Path) -> Option<String> {
    Some(read(path).ok()?.trim().to_owned()).filter(|text| !text.is_empty())
}

/// The entries of a directory, by name; none if it is not there.
fn entries(dir: &Path) -> Vec<String> {
    let Ok(list) = fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<_> = list.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_by_key(|name| (number_at_end(name), name.clone()));
    names.truncate(MAX_ENTRIES);
    names
}

/// So that `mlx5_10` comes behind `mlx5_9`.
fn number_at_end(name: &str) -> (usize, u64) {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (stem.len(), name[stem.len()..].parse().unwrap_or(0))
}

/// The node of a device; virtual ones and machines with one node say -1 or nothing.
fn node_of(device: &Path) -> Option<u32> {
    value(&device.join("device/numa_node"))?.parse().ok()
}

fn rdma_ports(class: &Path) -> Vec<Device> {
    let ports = |device: String| {
        let dir = class.join(&device);
        entries(&dir.join("ports")).into_iter().map(move |port| {
            let (at, text) = (dir.join("ports").join(&port), |path: &Path, name| value(&path.join(name)));
            Device {
                name: format!("{device}:{port}"),
                kind: DeviceKind::Rdma,
                node: node_of(&dir),
                // "4: ACTIVE"; in the other states nothing can be sent.
                link: if text(&at, "state").is_some_and(|state| state.starts_with("4:")) {
                    Link::Up
                } else {
                    Link::Down
                },
                speed_mbps: text(&at, "rate").and_then(|rate| gigabits(&rate)),
                layer: text(&at, "link_layer"),
                is_virtual: false,
            }
        })
    };
    entries(class).into_iter().flat_map(ports).collect()
}

/// "100 Gb/sec (4X EDR)", "2.5 Gb/sec (1X SDR)", in Mb/s.
fn gigabits(rate: &str) -> Option<u64> {
    let number: f64 = rate.split_whitespace().next()?.parse().ok()?;
    (number.is_finite() && number > 0.0).then_some((number * 1000.0) as u64)
}

fn interfaces(class: &Path) -> Vec<Device> {
    let interface = |name: String| {
        let dir = class.join(&name);
        let state = value(&dir.join("operstate"))?; // among the interfaces there are files, too
        Some(Device {
            kind: DeviceKind::Net,
            node: node_of(&dir),
            // The loopback's state is "unknown", and so is that of others which have no carrier to watch.
            link: if matches!(state.as_str(), "up" | "unknown") { Link::Up } else { Link::Down },
            speed_mbps: value(&dir.join("speed")).and_then(|speed| speed.parse().ok()).filter(|&speed| speed > 0),
            layer: None,
            is_virtual: !dir.join("device").exists(),
            name,
        })
    };
    entries(class).into_iter().filter_map(interface).collect()
}

fn nodes(dir: &Path) -> Vec<Node> {
    let node = |name: String| {
        let (id, at) = (name.strip_prefix("node")?.parse().ok()?, dir.join(&name));
        let meminfo = value(&at.join("meminfo")).unwrap_or_default();
        let total = meminfo.lines().find(|line| line.contains("MemTotal:"));
        let kib = total.and_then(|line| line.split_whitespace().rev().nth(1)?.parse::<u64>().ok());
        let distances = value(&at.join("distance")).unwrap_or_default();
        Some(Node {
            id,
            cpus: value(&at.join("cpulist")).unwrap_or_default(),
            memory_bytes: kib.unwrap_or(0).saturating_mul(1024),
            distances: distances.split_whitespace().filter_map(|distance| distance.parse().ok()).collect(),
        })
    };
    let mut nodes: Vec<_> = entries(dir).into_iter().filter_map(node).collect();
    nodes.sort_by_key(|node: &Node| node.id);
    nodes
}

impl fmt::Display for Topology {
    /// For people: nodes, devices, and what is preferred where.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "NUMA nodes")?;
        for Node { id, cpus, memory_bytes, distances } in &self.nodes {
            let distances: Vec<_> = distances.iter().map(u32::to_string).collect();
            let gib = *memory_bytes as f64 / f64::from(1 << 30);
            writeln!(f, "  {id:<4} {gib:>8.1} GiB   cpus {cpus:<16} distances {}", distances.join(" "))?;
        }
        if self.nodes.is_empty() {
            writeln!(f, "  none known")?;
        }
        let width = self.devices.iter().map(|device| device.name.len()).max().unwrap_or(0).max(8);
        writeln!(f, "Devices")?;
        for device in &self.devices {
            let kind = match (device.kind, device.is_virtual) {
                (DeviceKind::Rdma, _) => "rdma",
                (DeviceKind::Net, false) => "net",
                (DeviceKind::Net, true) => "virtual",
            };
            let node = device.node.map_or_else(|| "no node".to_owned(), |node| format!("node {node}"));
            let link = if device.link == Link::Up { "up" } else { "down" };
            let speed = device.speed_mbps.map_or_else(String::new, |mbps| format!("{} Gb/s", mbps as f64 / 1000.0));
            let layer = device.layer.as_deref().unwrap_or_default();
            let line = format!("  {:<width$}  {kind:<8} {node:<8} {link:<5} {speed:<10} {layer}", device.name);
            writeln!(f, "{}", line.trim_end())?;
        }
        if self.devices.is_empty() {
            writeln!(f, "  none")?;
        }
        writeln!(f, "Preferred, best first")?;
        let anywhere = (self.nodes.is_empty() && self.prefer.is_empty()).then_some(None);
        let mut ids: Vec<_> = self.nodes.iter().map(|node| node.id).chain(self.prefer.keys().copied()).collect();
        ids.sort_unstable();
        ids.dedup();
        for node in ids.into_iter().map(Some).chain(anywhere) {
            let preferred: Vec<_> = self.preferred(node).iter().map(|device| device.name.as_str()).collect();
            let place = node.map_or_else(|| "memory anywhere".to_owned(), |node| format!("memory on node {node}"));
            let list = if preferred.is_empty() { "nothing is up".to_owned() } else { preferred.join(", ") };
            writeln!(f, "  {place:<17} {list}")?;
        }
        if !self.has_rdma() {
            writeln!(f, "No RDMA port is up: between hosts, tcp.")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
