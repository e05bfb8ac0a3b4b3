//! What is known about the cluster at the moment it was asked: plain values, ready to be shown in either form.
//!
//! The field names are what `--output json` prints: a public surface.

use kvasir_types::{KvLayout, PeerTraffic, Role};
use serde::Serialize;

/// Everything that `status` tells.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Report {
    /// All members, by role and name.
    pub(crate) members: Vec<MemberReport>,
    /// Sums by role.
    pub(crate) totals: Vec<RoleTotals>,
    /// Models that are served.
    pub(crate) models: Vec<ModelReport>,
    /// What an operator should know: sentences.
    pub(crate) warnings: Vec<String>,
}

/// A member and what it said.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct MemberReport {
    pub(crate) role: Role,
    /// What it works as now; another one than its role if it was moved.
    pub(crate) works_as: Role,
    /// Only people move it.
    pub(crate) pinned: bool,
    pub(crate) id: String,
    pub(crate) state: State,
    /// Why it is in that state; empty for a ready one.
    pub(crate) reason: String,
    pub(crate) version: String,
    pub(crate) protocol: u32,
    pub(crate) incarnation: String,
    pub(crate) grpc: String,
    pub(crate) http: String,
    pub(crate) admin: String,
    /// Name of the model it serves, if it serves one.
    pub(crate) model: Option<String>,
    /// What it said about itself; none for routers and unreachable ones.
    pub(crate) live: Option<Live>,
}

/// Whether a member takes work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    Ready,
    NotReady,
    Cordoned,
    Draining,
    Drained,
    Unreachable,
}

/// A member's own numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Live {
    Worker(WorkerNumbers),
    Store(StoreNumbers),
}

/// Numbers of a prefill or decode worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct WorkerNumbers {
    pub(crate) blocks: Blocks,
    pub(crate) running: u64,
    pub(crate) waiting: u64,
    pub(crate) requests_total: u64,
    pub(crate) uptime_ms: u64,
    /// Those it moves blocks to or from.
    pub(crate) peers: Vec<PeerTraffic>,
}

/// Blocks by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Blocks {
    pub(crate) total: u64,
    pub(crate) free: u64,
    pub(crate) cached: u64,
    pub(crate) in_use: u64,
}

/// Numbers of a store node.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct StoreNumbers {
    pub(crate) capacity_bytes: u64,
    pub(crate) used_bytes: u64,
    pub(crate) blocks: u64,
    pub(crate) pinned: u64,
    pub(crate) reserved: u64,
    pub(crate) lookups_total: u64,
    pub(crate) hit_blocks_total: u64,
    pub(crate) committed_blocks_total: u64,
    pub(crate) evicted_blocks_total: u64,
    pub(crate) uptime_ms: u64,
}

/// The members of a role together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct RoleTotals {
    pub(crate) role: Role,
    pub(crate) members: u64,
    pub(crate) ready: u64,
    pub(crate) blocks: Blocks,
    pub(crate) running: u64,
    pub(crate) waiting: u64,
}

/// A model and who serves it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct ModelReport {
    pub(crate) name: String,
    pub(crate) fingerprint: String,
    pub(crate) max_model_len: u32,
    pub(crate) layout: KvLayout,
    pub(crate) block_bytes: u64,
    pub(crate) tokenizer: String,
    /// Names of its prefill workers.
    pub(crate) prefill: Vec<String>,
    /// Names of its decode workers; without one nobody answers.
    pub(crate) decode: Vec<String>,
}

impl Report {
    /// How much is wrong: members that are not ready, but for those that are leaving, and what is warned of.
    pub(crate) fn problems(&self) -> usize {
        let wrong = |member: &&MemberReport| matches!(member.state, State::NotReady | State::Unreachable);
        self.warnings.len() + self.members.iter().filter(wrong).count()
    }

    /// What `workers` tells: members with a gRPC server.
    pub(crate) fn workers(&self) -> Vec<&MemberReport> {
        self.members.iter().filter(|member| member.role != Role::Router).collect()
    }
}

/// What `transfers` tells of one member.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct TransferReport<'a> {
    pub(crate) member: &'a str,
    pub(crate) peers: &'a [PeerTraffic],
}

impl Report {
    /// What `transfers` tells: workers that move blocks, and to or from whom.
    pub(crate) fn transfers(&self) -> Vec<TransferReport<'_>> {
        let moving = self.members.iter().filter_map(|member| {
            let worker = member.live.as_ref()?.worker()?;
            Some(TransferReport { member: &member.id, peers: &worker.peers })
        });
        moving.collect()
    }
}

impl std::ops::AddAssign for Blocks {
    // Sums of what peers say: a lying one must not make us panic.
    fn add_assign(&mut self, other: Self) {
        self.total = self.total.saturating_add(other.total);
        self.free = self.free.saturating_add(other.free);
        self.cached = self.cached.saturating_add(other.cached);
        self.in_use = self.in_use.saturating_add(other.in_use);
    }
}
