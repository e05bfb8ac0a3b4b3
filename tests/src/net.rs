//! Machines with a network between them: a network namespace each, all on one bridge, which is the test's own.
//!
//! ```text
//!   test, etcd, 10.77.0.1 ── bridge ─┬─ 10.77.0.2, the first machine
//!                                    └─ 10.77.0.3, the second; and so on
//! ```
//!
//! A bridge can keep ports from one another and from nothing else: that is how machines are parted that both reach the
//! test, and what runs beside it. For tests inside of [`Namespace::Network`](crate::namespace::Namespace::Network).

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result};

use crate::{namespace::run, wait};

/// Where a process runs, and listens: beside the test, unless it is told otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its address.
    pub address: IpAddr,
    /// What comes before its command.
    pub enter: Vec<String>,
}

impl Default for Place {
    fn default() -> Self {
        Self { address: Ipv4Addr::LOCALHOST.into(), enter: Vec::new() }
    }
}

/// The machines. Dropped, they are gone.
pub struct Net {
    machines: Vec<Machine>,
}

/// A process that does nothing and has a namespace.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill(); // fails if it is gone already
        let _ = self.0.wait();
    }
}

impl Net {
    /// So many machines, at most 200.
    ///
    /// # Errors
    /// The namespaces or devices can't be had.
    pub async fn new(machines: u8) -> Result<Self> {
        run("ip link set lo up")?;
        run("ip link add name hub type bridge")?;
        run(&format!("ip address add {}/24 dev hub", Self::here()))?;
        run("ip link set hub up")?;
        let mut net = Self { machines: Vec::new() };
        for machine in 0..machines {
            net.add(machine).await.context("iproute2 and util-linux are needed")?;
        }
        Ok(net)
    }

    /// The address of the test, and of what runs beside it.
    pub fn here() -> IpAddr {
        Ipv4Addr::new(10, 77, 0, 1).into()
    }

    /// What runs on that machine.
    pub fn place(&self, machine: usize) -> Place {
        let enter = ["nsenter".to_owned(), self.namespace(machine), "--".to_owned()];
        Place { address: address(machine as u8), enter: enter.into() }
    }

    /// No packet passes between machines any more; between the test and each of them, all do.
    ///
    /// # Errors
    /// The bridge can't do that.
    pub fn part(&self) -> Result<()> {
        self.isolated("on")
    }

    /// All packets pass again.
    ///
    /// # Errors
    /// As of [`Net::part`].
    pub fn heal(&self) -> Result<()> {
        self.isolated("off")
    }

    /// What that machine sends comes at so many megabits in a second.
    ///
    /// # Errors
    /// The kernel lacks what that takes.
    pub fn slow(&self, machine: usize, megabits: u32) -> Result<()> {
        let enter = format!("nsenter {} --", self.namespace(machine));
        run(&format!("{enter} tc qdisc add dev wire root tbf rate {megabits}mbit burst 64kb latency 50ms"))
    }

    fn isolated(&self, state: &str) -> Result<()> {
        let ports = 0..self.machines.len();
        ports
            .into_iter()
            .try_for_each(|port| run(&format!("ip link set port{port} type bridge_slave isolated {state}")))
    }

    fn namespace(&self, machine: usize) -> String {
        format!("--net=/proc/{}/ns/net", self.machines[machine].0.id())
    }

    async fn add(&mut self, machine: u8) -> Result<()> {
        let mut command = Command::new("unshare"); // becomes the program it is given
        // It reads until its input ends, which it does with us, however we end.
        let child = command.args(["--net", "--", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let id = child.id();
        self.machines.push(Machine(child));
        let ours = fs::read_link("/proc/self/ns/net")?;
        let entered = async || fs::read_link(format!("/proc/{id}/ns/net")).is_ok_and(|its| its != ours).then_some(());
        wait::until("the machine has a namespace", wait::SOON, entered).await?;
        run(&format!("ip link add name port{machine} type veth peer name wire netns {id}"))?;
        run(&format!("ip link set port{machine} master hub up"))?;
        let enter = format!("nsenter {} --", self.namespace(machine.into()));
        run(&format!("{enter} ip address add {}/24 dev wire", address(machine)))?;
        run(&format!("{enter} ip link set lo up"))?;
        run(&format!("{enter} ip link set wire up"))
    }
}

fn address(machine: u8) -> IpAddr {
    Ipv4Addr::new(10, 77, 0, machine + 2).into()
}
