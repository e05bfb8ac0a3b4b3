//! Packets that get lost between two machines: two peers, each in a network namespace of its own, and a pair of virtual
//! Ethernet devices between them that drops what arrives.
//!
//! What drops is a classifier of the traffic control (`tc`, four instructions of classic BPF with the kernel's random
//! number): it needs no `netem`, which many kernels lack. It drops on arrival, so that the sender can't know. The namespaces
//! have no names and live as long as the peers do: nothing is left behind by a test that is killed.

use std::{fs, process::Command, time::Duration};

use kvasir_types::{SegmentDescriptor, TransportKind::Tcp};

use crate::{
    peer::{Ask, Outcome, Setup},
    process::Process,
    support::{LONG, MIB, wait_until},
};

/// Set to 1 where namespaces are not permitted: these tests then do nothing.
const LEFT_OUT: &str = "KVASIR_TEST_NO_NETNS";

/// Drops one packet in ten: load a random number; greater than a tenth of 2^32? go on; drop.
const LOSS: &str = "4,32 0 0 4294963256,37 1 0 429496729,6 0 0 2,6 0 0 4294967295";
/// Drops every packet.
const PARTITION: &str = "1,6 0 0 2";

/// Two peers with a network between them. Each is in a namespace of its own.
struct Net {
    client: Process,
    owner: Process,
}

/// Runs a command of the system; what it said if it failed.
fn run(line: &str) -> Result<(), String> {
    let mut words = line.split(' ');
    let output =
        Command::new(words.next().unwrap()).args(words).output().map_err(|error| format!("{line}: {error}"))?;
    let words = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{line}: {}", words.trim())) }
}

fn needed(line: &str) {
    run(line).unwrap_or_else(|reason| {
        panic!("this test needs root, network namespaces, iproute2 and util-linux, or {LEFT_OUT}=1: {reason}")
    });
}

impl Net {
    /// `None` if these tests are to be left out.
    fn new() -> Option<Self> {
        if std::env::var(LEFT_OUT).is_ok_and(|value| value == "1") {
            eprintln!("left out, nothing was tested: {LEFT_OUT}=1");
            return None;
        }
        needed("unshare --net -- true");
        let net = Self { client: Process::spawn_in_own_network(), owner: Process::spawn_in_own_network() };
        let ours = fs::read_link("/proc/self/ns/net").unwrap();
        let (client, owner) = (net.client.id(), net.owner.id());
        wait_until("the peers are in their namespaces", || {
            let theirs = |id| fs::read_link(format!("/proc/{id}/ns/net")).is_ok_and(|theirs| theirs != ours);
            theirs(client) && theirs(owner)
        });
        needed(&format!("ip link add name wire netns {client} type veth peer name wire netns {owner}"));
        for (id, address) in [(client, "10.0.0.1"), (owner, "10.0.0.2")] {
            for command in [
                "ip link set lo up",
                // Real packets, not the 64 KiB bundles that virtual devices pass on: one lost is one packet.
                "ip link set wire mtu 9000 gso_max_segs 1 up",
                &format!("ip address add {address}/24 dev wire"),
                // A lost packet is sent again after the round trip's time, not after the 200 ms meant for continents.
                "ip route change 10.0.0.0/24 dev wire rto_min 5ms",
                "tc qdisc add dev wire clsact",
            ] {
                needed(&format!("nsenter --net=/proc/{id}/ns/net {command}"));
            }
        }
        Some(net)
    }

    fn on_both_ends(&self, command: &str) {
        for id in [self.client.id(), self.owner.id()] {
            // Words inside the classifier's program are separated by spaces, too: it is one argument.
            let (command, program) = command.split_once(" bytecode ").unwrap_or((command, ""));
            let mut tc = Command::new("nsenter");
            tc.arg(format!("--net=/proc/{id}/ns/net")).args(command.split(' '));
            if !program.is_empty() {
                tc.args(["bytecode", program]);
            }
            let output = tc.output().unwrap();
            let words = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "the kernel needs its clsact and cls_bpf, or {LEFT_OUT}=1: {words}");
        }
    }

    fn drop_by(&self, program: &str) {
        self.on_both_ends(&format!("tc filter add dev wire ingress bpf da bytecode {program}"));
    }

    fn heal(&self) {
        self.on_both_ends("tc filter del dev wire ingress");
    }

    /// Starts both engines: the owner's descriptor.
    fn start(&mut self, bytes: usize, setup: impl Fn(Setup) -> Setup) -> SegmentDescriptor {
        self.client.start(setup(Setup::new("client", Tcp, bytes)));
        let bind = ([10, 0, 0, 2], 0).into();
        self.owner.start(setup(Setup { bind, ..Setup::new("owner", Tcp, bytes) }))
    }

    /// Packets that the client's kernel has sent again.
    fn sent_again(&self) -> u64 {
        let snmp = fs::read_to_string(format!("/proc/{}/net/snmp", self.client.id())).unwrap();
        let mut tcp = snmp.lines().filter_map(|line| line.strip_prefix("Tcp: "));
        let (names, values) = (tcp.next().unwrap(), tcp.next().unwrap());
        let at = names.split(' ').position(|name| name == "RetransSegs").unwrap();
        values.split(' ').nth(at).unwrap().parse().unwrap()
    }
}

#[test]
fn one_packet_in_ten_lost_costs_time_and_no_byte() {
    const AREA: usize = 32 * MIB;
    const PART: u64 = 4 * MIB as u64;
    let Some(mut net) = Net::new() else { return };
    let target = net.start(2 * AREA, |setup| Setup { connections: 16, ..setup });
    net.drop_by(LOSS);
    // The lower half is read, the upper half written.
    net.owner.fill(0, AREA, 1);
    net.client.fill(AREA as u64, AREA, 2);
    for write in [false, true] {
        let from = if write { AREA as u64 } else { 0 };
        let key = net.owner.grant(from, AREA as u64, write);
        for offset in (from..from + AREA as u64).step_by(PART as usize) {
            let (target, ranges) = (target.clone(), vec![(offset, offset, PART)]);
            net.client.ask::<()>(&Ask::Submit { write, target, key, ranges, deadline_ms: LONG.as_millis() as u64 });
        }
        assert_eq!(net.client.wait(), vec![Ok(PART); AREA / PART as usize]);
    }
    assert_eq!(net.client.sum(0, 2 * AREA), net.owner.sum(0, 2 * AREA));
    assert!(net.sent_again() > 100, "only {} packets were lost", net.sent_again());
}

const HALF: usize = 8 * MIB;

/// See [`parted`].
struct Parted {
    net: Net,
    target: SegmentDescriptor,
    /// The keys to the owner's halves.
    lower: u64,
    upper: u64,
}

impl Parted {
    fn write(&mut self, key: u64, ranges: Vec<(u64, u64, u64)>, deadline: Duration) {
        let (target, deadline_ms) = (self.target.clone(), deadline.as_millis() as u64);
        self.net.client.ask::<()>(&Ask::Submit { write: true, target, key, ranges, deadline_ms });
    }
}

/// Two peers of which one writes into the other's lower half without end, until the network between them parts.
fn parted(deadline: Duration) -> Option<Parted> {
    let mut net = Net::new()?;
    let target = net.start(2 * HALF, |setup| Setup { slice_bytes: HALF, ..setup }); // large frames: it parts in one
    let keys = [0, HALF as u64].map(|offset| net.owner.grant(offset, HALF as u64, true));
    net.client.fill(0, 2 * HALF, 1);
    let untouched = net.owner.sum(0, HALF);
    let mut parted = Parted { net, target, lower: keys[0], upper: keys[1] };
    parted.write(parted.lower, vec![(0, 0, HALF as u64); 2048], deadline);
    until("bytes land", || parted.net.owner.sum(0, HALF) != untouched);
    parted.net.drop_by(PARTITION);
    Some(parted)
}

#[test]
fn a_network_that_parts_costs_the_deadline_and_transfers_work_when_it_heals() {
    let Some(mut parted) = parted(Duration::from_millis(1500)) else { return };
    let range = vec![(HALF as u64, HALF as u64, HALF as u64)];
    let is_late = |outcomes: Vec<Outcome>| {
        let (cause, words) = outcomes[0].as_ref().expect_err("no byte gets through");
        assert_eq!(cause, "deadline", "{words}");
    };
    is_late(parted.net.client.wait());
    parted.write(parted.upper, range.clone(), Duration::from_millis(500)); // begins without a network
    is_late(parted.net.client.wait());
    parted.net.heal();
    until("transfers work again", || {
        parted.write(parted.upper, range.clone(), Duration::from_secs(5));
        parted.net.client.wait()[0].is_ok()
    });
    let Net { owner, client } = &mut parted.net;
    assert_eq!(owner.sum(HALF as u64, HALF), client.sum(HALF as u64, HALF));
}

#[test]
fn memory_taken_back_from_a_writer_that_is_out_of_reach_is_left_alone_when_the_network_heals() {
    let Some(Parted { mut net, lower, .. }) = parted(LONG) else { return };
    net.owner.ask::<()>(&Ask::Revoke { key: lower });
    net.owner.fill(0, HALF, 9);
    let ours = net.owner.sum(0, HALF);
    net.heal();
    let outcomes = net.client.wait(); // its kernel has sent again what was on its way, and has been answered
    let (cause, words) = outcomes[0].as_ref().expect_err("the grant has ended");
    assert!(["refused", "disconnected"].contains(&cause.as_str()), "{cause}: {words}");
    assert_eq!(net.owner.sum(0, HALF), ours, "what was on its way landed after the revocation");
}

/// [`wait_until`] for conditions that ask the peers.
fn until(what: &str, condition: impl FnMut() -> bool) {
    let condition = std::cell::RefCell::new(condition);
    wait_until(what, || condition.borrow_mut()());
}
