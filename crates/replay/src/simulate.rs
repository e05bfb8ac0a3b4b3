//! A KV store of many nodes, without the bytes: each request asks for its prompt's blocks, then writes those that were not
//! there.
//!
//! Placement is the store's own ([`Rendezvous`], by the first block of each group), and so are the eviction policies. What
//! a node tells its policy is what a node is told: the time, the prompt's length, the positions of the blocks it is asked
//! for, and, when it is to take blocks, up to where any node had some or remembers some. Every few seconds each node hears
//! what the others have learned. A hit is a block of the longest run that is there from the prompt's start, wherever its parts
//! are: a block behind a gap is of no use. While a request runs, its blocks are held.
//!
//! With a disk, what memory gives up goes there; a block found there is read into memory and stays on disk too, until the
//! disk gives it up.

use std::collections::HashMap;

use kvasir_kv_cache::{Ask, Evict, Facts, Learned, POLICIES, Tick, policy};
use kvasir_store_client::rendezvous::{Rendezvous, Spot};
use kvasir_types::{BlockHash, BlockId};

use crate::trace::Trace;

/// Most nodes of a simulation.
pub const MAX_NODES: usize = 256;

/// A block may be forgotten, and those after it not: so many strangers in a row are believed.
const MAX_STRANGERS: usize = 3;

/// What is simulated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Who goes from memory: a name in [`POLICIES`].
    pub policy: String,
    /// Who goes from disk: another one.
    pub disk_policy: String,
    /// Up to [`MAX_NODES`].
    pub nodes: usize,
    /// Consecutive blocks of the trace that are placed together.
    pub group_blocks: usize,
    /// Blocks in the memory of all nodes together.
    pub memory_blocks: usize,
    /// Blocks on the disks of all nodes together.
    pub disk_blocks: usize,
    /// How often nodes hear what the others have learned; 0: never.
    pub exchange_ms: u64,
}

/// A plan that can't be simulated.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// No policy has that name.
    #[error("{0:?} is no eviction policy; there are {all}", all = POLICIES.join(", "))]
    Policy(String),
    /// No nodes, or too many.
    #[error("{0} nodes: there must be one, and at most {MAX_NODES}")]
    Nodes(usize),
    /// No blocks in a group.
    #[error("a placement group has one block at least")]
    Group,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Outcome {
    /// Blocks asked for.
    pub asked: u64,
    /// Of those: were in memory, were on disk.
    pub memory_hits: u64,
    /// See `memory_hits`.
    pub disk_hits: u64,
    /// Blocks written because they were not there.
    pub written: u64,
    /// Blocks that were moved from memory to disk.
    pub demoted: u64,
    /// For each node, blocks that requests asked it for.
    pub asked_of_node: Vec<u64>,
}

impl Outcome {
    /// Blocks hit of all blocks asked for.
    pub fn hit_rate(&self) -> f64 {
        (self.memory_hits + self.disk_hits) as f64 / self.asked.max(1) as f64
    }

    /// How many times as much the node with the most is asked for as the mean one.
    pub fn imbalance(&self) -> f64 {
        let most = self.asked_of_node.iter().max().copied().unwrap_or(0);
        most as f64 * self.asked_of_node.len() as f64 / self.asked.max(1) as f64
    }
}

/// Runs the trace; `progress` hears of every thousandth request.
///
/// # Errors
/// If the plan can't be simulated.
pub fn simulate(trace: &Trace, plan: &Plan, mut progress: impl FnMut(usize)) -> Result<Outcome, Error> {
    let &Plan { nodes, group_blocks, memory_blocks, disk_blocks, exchange_ms, .. } = plan;
    if nodes == 0 || nodes > MAX_NODES {
        return Err(Error::Nodes(nodes));
    }
    if group_blocks == 0 {
        return Err(Error::Group);
    }
    let names: Vec<String> = (0..nodes).map(|node| format!("kv-{node}")).collect();
    let spot = |name| Spot { name, weight: 1.0, zone: "", stays: true };
    let placement = Rendezvous::new(names.iter().map(|name| spot(name)));
    let share = |all: usize, node: usize| all / nodes + usize::from(node < all % nodes);
    let order = |name: &String, room| policy(name, room).ok_or_else(|| Error::Policy(name.clone()));
    let tier = |name, room| Ok(Tier { order: order(name, room)?, room, used: 0 });
    let mut store = (0..nodes)
        .map(|node| {
            let memory = tier(&plan.policy, share(memory_blocks, node))?;
            Ok(Node::new(memory, tier(&plan.disk_policy, share(disk_blocks, node))?))
        })
        .collect::<Result<Vec<Node>, Error>>()?;
    let mut exchanged_ms = 0;
    let mut outcome = Outcome { asked_of_node: vec![0; nodes], ..Outcome::default() };
    let mut homes: HashMap<u32, usize> = HashMap::new();
    for (n, request) in trace.requests.iter().enumerate() {
        if n % 1000 == 0 {
            progress(n);
        }
        if exchange_ms > 0 && nodes > 1 && request.at_ms >= exchanged_ms + exchange_ms {
            exchanged_ms = request.at_ms;
            exchange(&mut store);
        }
        let now = Tick((request.at_ms * 16 / 1000) as u32);
        // Each node's part of the prompt: position and name of its blocks.
        let mut parts: Vec<(usize, Vec<(u32, u32)>)> = Vec::new();
        for (group, start) in request.blocks.chunks(group_blocks).zip((0u32..).step_by(group_blocks)) {
            let home =
                *homes.entry(group[0]).or_insert_with(|| placement.home(hash(group[0])).expect("there is a node"));
            let part = match parts.iter().position(|(node, _)| *node == home) {
                Some(part) => part,
                None => {
                    parts.push((home, Vec::new()));
                    parts.len() - 1
                }
            };
            parts[part].1.extend((start..).zip(group.iter().copied()));
        }
        // The first position that some node has not ends the run.
        let end = |(node, part): &(usize, Vec<(u32, u32)>)| {
            part.iter().find(|(_, name)| !store[*node].has(*name)).map(|&(position, _)| position)
        };
        let run = parts.iter().filter_map(end).min().unwrap_or(request.blocks.len() as u32);
        let there = |(node, part): &(usize, Vec<(u32, u32)>)| store[*node].remembered(part);
        let (known, blocks) = (parts.iter().map(there).max().unwrap_or(0), request.blocks.len() as u32);
        for (node, part) in &parts {
            outcome.asked_of_node[*node] += part.len() as u64;
            store[*node].serve(now, part, run, Ask { found: known, blocks }, &mut outcome);
        }
        outcome.asked += request.blocks.len() as u64;
    }
    Ok(outcome)
}

/// Every node hears what all others have learned, as it is on the way between nodes.
fn exchange(store: &mut [Node]) {
    let told: Vec<Option<Learned>> = store.iter().map(Node::learned).collect();
    // Each hears the sum of those before it and of those behind it.
    let mut behind = vec![Learned::default(); store.len() + 1];
    for node in (0..store.len()).rev() {
        behind[node] = behind[node + 1].clone();
        told[node].iter().for_each(|learned| behind[node].add(learned));
    }
    let mut others = Learned::default();
    for (node, learned) in told.iter().enumerate() {
        let mut hears = others.clone();
        hears.add(&behind[node + 1]);
        store[node].memory.order.hear(hears);
        learned.iter().for_each(|learned| others.add(learned));
    }
}

/// A block's hash, made of its number.
fn hash(name: u32) -> BlockHash {
    let mut hash = [0; 16];
    hash.copy_from_slice(&blake3::hash(&name.to_le_bytes()).as_bytes()[..16]);
    BlockHash(hash)
}

/// Blocks of one tier and who of them goes next.
struct Tier {
    order: Box<dyn Evict<BlockId>>,
    room: usize,
    used: usize,
}

impl Tier {
    /// Whether there is room for one more, after `evicted` has heard who goes for it, if somebody must.
    fn make_room(&mut self, evicted: impl FnOnce(BlockId)) -> bool {
        if self.used < self.room {
            self.used += 1;
            return true;
        }
        self.order.pop().map(evicted).is_some()
    }
}

struct Entry {
    name: u32,
    facts: Facts<BlockId>,
    in_memory: bool,
    on_disk: bool,
}

/// One store node.
struct Node {
    memory: Tier,
    disk: Tier,
    entries: Vec<Entry>,
    vacant: Vec<BlockId>,
    at: HashMap<u32, BlockId>,
}

impl Node {
    fn new(memory: Tier, disk: Tier) -> Self {
        Self { memory, disk, entries: Vec::new(), vacant: Vec::new(), at: HashMap::new() }
    }

    /// What the memory's policy has learned, as others get it.
    fn learned(&self) -> Option<Learned> {
        let bytes = self.memory.order.learned()?.encode();
        Some(Learned::decode(&bytes).expect("what was encoded can be decoded"))
    }

    fn has(&self, name: u32) -> bool {
        self.at.contains_key(&name)
    }

    /// One past the last of these blocks that is here.
    fn known(&self, part: &[(u32, u32)]) -> u32 {
        part.iter().rfind(|(_, name)| self.has(*name)).map_or(0, |&(position, _)| position + 1)
    }

    /// The same, also with blocks that are gone but were here once.
    fn remembered(&self, part: &[(u32, u32)]) -> u32 {
        let was = |name| self.has(name) || self.memory.order.remembers(hash(name));
        let (mut known, mut strangers) = (0, 0);
        for &(position, name) in part {
            (known, strangers) = if was(name) { (position + 1, 0) } else { (known, strangers + 1) };
            if strangers == MAX_STRANGERS {
                break;
            }
        }
        known
    }

    /// A request asks for these blocks of its prompt, of which those before `run` are of use to it, and writes the others,
    /// with what it has heard from all nodes.
    fn serve(&mut self, now: Tick, part: &[(u32, u32)], run: u32, writes: Ask, outcome: &mut Outcome) {
        // While it looks, a node knows of its own blocks only.
        let whole = part.len() as u32 == writes.blocks;
        let ask = Ask { found: if whole { self.known(part) } else { Ask::UNKNOWN }, ..writes };
        self.memory.order.ask(now, ask);
        self.disk.order.ask(now, ask);
        let mut held = Vec::with_capacity(part.len());
        for &(position, name) in part {
            let known = self.at.get(&name).copied();
            match known {
                Some(id) => {
                    let in_memory = self.entries[id.0 as usize].in_memory;
                    if position < run {
                        *(if in_memory { &mut outcome.memory_hits } else { &mut outcome.disk_hits }) += 1;
                    }
                    self.disk.order.touch(&id);
                    self.disk.order.remove(&id);
                    if in_memory {
                        self.memory.order.touch(&id);
                        self.memory.order.remove(&id);
                    } else {
                        self.promote(id, ask, outcome);
                    }
                    held.push(id);
                }
                None => {
                    let above = part.iter().find(|(above, _)| above + 1 == position);
                    let parent = above.and_then(|(_, name)| self.at.get(name).copied());
                    let facts = Facts { hash: hash(name), parent, position, ask: writes };
                    if let Some(id) = self.write(name, facts, outcome) {
                        outcome.written += 1;
                        held.push(id);
                    }
                }
            }
        }
        // The tail first, as whoever gives back a prompt does.
        for id in held.into_iter().rev() {
            let Entry { in_memory, on_disk, .. } = self.entries[id.0 as usize];
            if in_memory {
                self.memory.order.insert(id);
            }
            if on_disk {
                self.disk.order.insert(id);
            }
        }
    }

    /// A new block, in memory. `None`: everything is held.
    fn write(&mut self, name: u32, facts: Facts<BlockId>, outcome: &mut Outcome) -> Option<BlockId> {
        if !self.room_in_memory(outcome) {
            return None;
        }
        let entry = Entry { name, facts, in_memory: true, on_disk: false };
        let id = match self.vacant.pop() {
            Some(id) => {
                self.entries[id.0 as usize] = entry;
                id
            }
            None => {
                self.entries.push(entry);
                BlockId(self.entries.len() as u32 - 1)
            }
        };
        self.at.insert(name, id);
        self.memory.order.describe(id, facts);
        Some(id)
    }

    /// Reads a block from disk into memory, if there is room.
    fn promote(&mut self, id: BlockId, ask: Ask, outcome: &mut Outcome) {
        if self.room_in_memory(outcome) {
            let entry = &mut self.entries[id.0 as usize];
            entry.in_memory = true;
            self.memory.order.describe(id, Facts { ask, ..entry.facts });
        }
    }

    fn room_in_memory(&mut self, outcome: &mut Outcome) -> bool {
        let mut victim = None;
        let room = self.memory.make_room(|id| victim = Some(id));
        if let Some(id) = victim {
            self.entries[id.0 as usize].in_memory = false;
            self.demote(id, outcome);
        }
        room
    }

    /// Memory has given the block up: it goes to disk, if it is not there and there is room; else it is gone.
    fn demote(&mut self, id: BlockId, outcome: &mut Outcome) {
        if self.entries[id.0 as usize].on_disk {
            return;
        }
        let mut victim = None;
        if self.disk.make_room(|id| victim = Some(id)) {
            self.entries[id.0 as usize].on_disk = true;
            self.disk.order.describe(id, self.entries[id.0 as usize].facts);
            self.disk.order.insert(id);
            outcome.demoted += 1;
        } else {
            self.forget(id);
        }
        if let Some(id) = victim {
            self.entries[id.0 as usize].on_disk = false;
            if !self.entries[id.0 as usize].in_memory {
                self.forget(id);
            }
        }
    }

    fn forget(&mut self, id: BlockId) {
        self.at.remove(&self.entries[id.0 as usize].name);
        self.vacant.push(id);
    }
}

#[cfg(test)]
mod tests;
