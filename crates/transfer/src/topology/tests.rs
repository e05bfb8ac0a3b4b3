//! Made-up machines: two sockets with four RDMA ports, one without any, and files.

use std::os::unix::fs::symlink;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// A tree of files like the kernel's.
struct Machine(TempDir);

impl Machine {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn file(&self, path: &str, text: &str) -> &Self {
        let path = self.0.path().join("sys").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    fn node(&self, id: u32, cpus: &str, distance: &str) -> &Self {
        let dir = format!("devices/system/node/node{id}");
        self.file(&format!("{dir}/cpulist"), &format!("{cpus}\n"))
            .file(&format!("{dir}/distance"), &format!("{distance}\n"))
            .file(
                &format!("{dir}/meminfo"),
                &format!("Node {id} MemTotal:       67108864 kB\nNode {id} MemFree: 1 kB\n"),
            )
    }

    /// The class directory holds links, as in `/sys`.
    fn rdma(&self, name: &str, node: &str, state: &str, rate: &str) -> &Self {
        let dir = format!("devices/pci/{name}");
        self.file(&format!("{dir}/device/numa_node"), &format!("{node}\n"))
            .file(&format!("{dir}/ports/1/state"), &format!("{state}\n"))
            .file(&format!("{dir}/ports/1/rate"), &format!("{rate}\n"))
            .file(&format!("{dir}/ports/1/link_layer"), "InfiniBand\n");
        let class = self.0.path().join("sys/class/infiniband");
        fs::create_dir_all(&class).unwrap();
        symlink(self.0.path().join("sys").join(dir), class.join(name)).unwrap();
        self
    }

    fn net(&self, name: &str, state: &str, speed: &str, node: Option<&str>) -> &Self {
        let dir = format!("class/net/{name}");
        if let Some(node) = node {
            self.file(&format!("{dir}/device/numa_node"), node);
        }
        self.file(&format!("{dir}/operstate"), state).file(&format!("{dir}/speed"), speed)
    }

    fn detect(&self) -> Topology {
        Topology::detect_below(self.0.path())
    }
}

fn two_sockets() -> Machine {
    let machine = Machine::new();
    machine.node(0, "0-15", "10 21").node(1, "16-31", "21 10");
    machine
        .rdma("mlx5_0", "0", "4: ACTIVE", "200 Gb/sec (4X HDR)")
        .rdma("mlx5_1", "1", "4: ACTIVE", "200 Gb/sec (4X HDR)")
        .rdma("mlx5_2", "1", "4: ACTIVE", "400 Gb/sec (4X NDR)")
        .rdma("mlx5_10", "0", "1: DOWN", "2.5 Gb/sec (1X SDR)");
    machine
        .net("eth0", "up\n", "25000\n", Some("0\n"))
        .net("eth1", "down\n", "-1\n", Some("-1\n"))
        .net("lo", "unknown\n", "", None)
        .file("class/net/bonding_masters", "bond0\n");
    machine
}

fn names(devices: &[&Device]) -> Vec<String> {
    devices.iter().map(|device| device.name.clone()).collect()
}

#[test]
fn memory_prefers_rdma_ports_that_are_up_and_near_and_fast() {
    let topology = two_sockets().detect();
    let all: Vec<_> = topology.devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(all, ["mlx5_0:1", "mlx5_1:1", "mlx5_2:1", "mlx5_10:1", "lo", "eth0", "eth1"]);
    assert_eq!(names(&topology.preferred(Some(0))), ["mlx5_0:1", "mlx5_2:1", "mlx5_1:1", "eth0", "lo"]);
    assert_eq!(names(&topology.preferred(Some(1))), ["mlx5_2:1", "mlx5_1:1", "mlx5_0:1", "eth0", "lo"]);
    assert_eq!(topology.ucx_devices(Some(0)).as_deref(), Some("mlx5_0:1"));
    assert_eq!(topology.ucx_devices(Some(1)).as_deref(), Some("mlx5_2:1,mlx5_1:1"));
    assert_eq!(topology.ucx_devices(None).as_deref(), Some("mlx5_2:1,mlx5_0:1,mlx5_1:1"));
    assert!(topology.has_rdma());
}

#[test]
fn what_the_kernel_shows_is_read() {
    let topology = two_sockets().detect();
    let device = |name: &str| topology.devices.iter().find(|device| device.name == name).unwrap();
    let far = device("mlx5_10:1");
    assert_eq!((far.node, far.link, far.speed_mbps), (Some(0), Link::Down, Some(2500)));
    assert_eq!(far.layer.as_deref(), Some("InfiniBand"));
    let (eth1, lo) = (device("eth1"), device("lo"));
    assert_eq!((eth1.node, eth1.link, eth1.speed_mbps, eth1.is_virtual), (None, Link::Down, None, false));
    assert_eq!((lo.node, lo.link, lo.speed_mbps, lo.is_virtual), (None, Link::Up, None, true));
    let one = &topology.nodes[1];
    assert_eq!((one.id, one.cpus.as_str(), one.memory_bytes), (1, "16-31", 64 << 30));
    assert_eq!(one.distances, [21, 10]);
}

#[test]
fn a_machine_that_shows_nothing_has_nothing() {
    let topology = Machine::new().detect();
    assert_eq!(topology, Topology::default());
    assert_eq!((topology.preferred(Some(0)).len(), topology.ucx_devices(None)), (0, None));
    let text = topology.to_string();
    assert!(text.contains("none known") && text.contains("nothing is up") && text.contains("No RDMA port"), "{text}");
}

#[test]
fn people_see_nodes_devices_and_preferences() {
    let expected = "\
NUMA nodes
  0        64.0 GiB   cpus 0-15             distances 10 21
  1        64.0 GiB   cpus 16-31            distances 21 10
Devices
  mlx5_0:1   rdma     node 0   up    200 Gb/s   InfiniBand
  mlx5_1:1   rdma     node 1   up    200 Gb/s   InfiniBand
  mlx5_2:1   rdma     node 1   up    400 Gb/s   InfiniBand
  mlx5_10:1  rdma     node 0   down  2.5 Gb/s   InfiniBand
  lo         virtual  no node  up
  eth0       net      node 0   up    25 Gb/s
  eth1       net      no node  down
Preferred, best first
  memory on node 0  mlx5_0:1, mlx5_2:1, mlx5_1:1, eth0, lo
  memory on node 1  mlx5_2:1, mlx5_1:1, mlx5_0:1, eth0, lo
";
    assert_eq!(two_sockets().detect().to_string(), expected);
}

#[test]
fn what_is_detected_can_be_written_edited_and_read_back() {
    let machine = two_sockets();
    let mut topology = machine.detect();
    topology.prefer.insert(1, vec!["eth0".into(), "mlx5_10:1".into(), "mlx5_0:1".into()]);
    let path = machine.0.path().join("topology.json");
    fs::write(&path, topology.to_json()).unwrap();
    let again = Topology::from_file(&path).unwrap();
    assert_eq!(again, topology);
    // Those named and up, in their order; elsewhere as before.
    assert_eq!(names(&again.preferred(Some(1))), ["eth0", "mlx5_0:1"]);
    assert_eq!(names(&again.preferred(Some(0)))[0], "mlx5_0:1");
}

#[test]
fn a_file_that_is_no_topology_is_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("topology.json");
    for (text, reason) in [
        ("", "EOF"),
        ("[]", "invalid"),
        (r#"{"devices": [], "colour": "red"}"#, "unknown field `colour`"),
        (r#"{"devices": [{"name": "a,b", "kind": "net"}]}"#, "'a,b' is no name"),
        (r#"{"devices": [{"name": "a", "kind": "rail"}]}"#, "unknown variant `rail`"),
        (r#"{"devices": [{"name": "a", "kind": "net"}, {"name": "a", "kind": "net"}]}"#, "a is listed twice"),
        (r#"{"devices": [], "prefer": {"0": ["mlx5_0:1"]}}"#, "node 0 prefers mlx5_0:1"),
    ] {
        fs::write(&path, text).unwrap();
        let error = Topology::from_file(&path).unwrap_err().to_string();
        let whole = error.starts_with("transfer setting topology: ") && error.contains("topology.json: ");
        assert!(whole && error.contains(reason), "{error}");
    }
    fs::write(&path, vec![b' '; MAX_FILE_BYTES as usize + 1]).unwrap();
    assert!(Topology::from_file(&path).unwrap_err().to_string().contains("larger than"));
    assert!(Topology::from_file(&dir.path().join("none")).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))] // each makes two dozen files

    /// Whatever stands in the kernel's files: nothing panics, and what is preferred is up and listed once.
    #[test]
    fn any_text_in_the_kernels_files_is_survived(
        texts in prop::collection::vec("[ -~\n]{0,24}|-?[0-9]{1,22}|[0-9.]{1,6} Gb/sec|4: ACTIVE|up", 10),
    ) {
        let machine = Machine::new();
        machine.node(0, &texts[0], &texts[1]).file("devices/system/node/node1/meminfo", &texts[2]);
        machine.rdma("mlx5_0", &texts[3], &texts[4], &texts[5]);
        machine.net("eth0", &texts[6], &texts[7], Some(&texts[8])).net("lo", &texts[9], "", None);
        let topology = machine.detect();
        for node in [None, Some(0), Some(1), Some(u32::MAX)] {
            let mut preferred = names(&topology.preferred(node));
            prop_assert!(topology.preferred(node).iter().all(|device| device.link == Link::Up));
            preferred.sort();
            preferred.dedup();
            prop_assert_eq!(preferred.len(), topology.preferred(node).len());
            topology.ucx_devices(node);
        }
        prop_assert!(topology.to_string().contains("Devices"));
        prop_assert_eq!(Topology::parse(&topology.to_json()).unwrap(), topology);
    }
}
