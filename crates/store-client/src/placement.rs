//! Which blocks of a prompt are asked of which node.
//!
//! A prompt's blocks are cut into groups of consecutive blocks; a group's key is the hash of its first block, which stands
//! for everything before it too. [`crate::rendezvous`] gives each group its nodes. How large groups are and how many
//! copies there are is what the nodes' records say, so that everybody divides alike.
//!
//! A node is known by its name, not its incarnation: restarted, it has its old share.

use std::{collections::HashMap, ops::Range, sync::Arc};

use kvasir_cluster::{Member, StoreInfo, View};
use kvasir_types::{BlockHash, Epoch, Incarnation, MemberId, PROTOCOL_VERSION, Role};

use crate::rendezvous::{Rendezvous, Spot};

/// A store node that can be asked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) id: MemberId,
    pub(crate) incarnation: Incarnation,
    pub(crate) grpc: String,
    pub(crate) store: StoreInfo,
    /// About to leave: gets nothing new, and has what it had.
    pub(crate) draining: bool,
}

impl Node {
    fn of(member: &Member) -> Self {
        Self {
            id: member.id.clone(),
            incarnation: member.incarnation,
            grpc: member.grpc.clone(),
            store: member.store.clone().unwrap_or_default(),
            draining: member.draining,
        }
    }
}

/// Blocks that one call asks one node for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Share {
    pub(crate) node: Arc<Node>,
    /// Indexes into the request's blocks, ascending.
    pub(crate) blocks: Vec<usize>,
    /// How many blocks a group has.
    pub(crate) group_blocks: usize,
}

/// The nodes among which blocks are divided now.
#[derive(Clone, Debug)]
pub(crate) struct Placement {
    /// As of when.
    pub(crate) epoch: Epoch,
    nodes: Vec<Arc<Node>>,
    rendezvous: Rendezvous,
    group_blocks: usize,
    /// On how many nodes each group is kept.
    replicas: usize,
}

/// Why a node did not give a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Miss {
    /// It did not answer.
    Failed,
    /// It does not have it.
    Lacks {
        /// It joined lately.
        warming: bool,
    },
}

/// A node whose record says otherwise than those of most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Odd {
    pub(crate) member: MemberId,
    /// Key of its configuration.
    pub(crate) key: &'static str,
    pub(crate) value: u32,
    /// What counts instead.
    pub(crate) counts: u32,
}

impl Placement {
    /// The nodes of a view that speak our protocol.
    pub(crate) fn of(view: &View) -> Self {
        let fit = |member: &&Member| member.protocol == PROTOCOL_VERSION;
        Self::new(view.epoch, view.role(Role::KvStore).filter(fit).map(Node::of).collect())
    }

    pub(crate) fn new(epoch: Epoch, mut nodes: Vec<Node>) -> Self {
        nodes.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        let rendezvous = Rendezvous::new(nodes.iter().map(|node| Spot {
            name: node.id.as_str(),
            weight: node.store.weight,
            zone: &node.store.zone,
            stays: !node.draining,
        }));
        let group_blocks = majority(&nodes, |store| store.group_blocks);
        let replicas = majority(&nodes, |store| store.replicas);
        let nodes = nodes.into_iter().map(Arc::new).collect();
        Self { epoch, nodes, rendezvous, group_blocks: group_blocks as usize, replicas: replicas as usize }
    }

    /// How many nodes get blocks.
    pub(crate) fn len(&self) -> usize {
        self.rendezvous.len()
    }

    /// Nodes that say otherwise than most how blocks are to be divided.
    pub(crate) fn odd(&self) -> Vec<Odd> {
        let odd = |node: &Node, key, value, counts: usize| {
            let counts = counts as u32;
            (value != counts).then(|| Odd { member: node.id.clone(), key, value, counts })
        };
        self.nodes
            .iter()
            .flat_map(|node| {
                let StoreInfo { group_blocks, replicas, .. } = node.store;
                [
                    odd(node, "group_blocks", group_blocks, self.group_blocks),
                    odd(node, "replicas", replicas, self.replicas),
                ]
            })
            .flatten()
            .collect()
    }

    pub(crate) fn has(&self, id: &MemberId, incarnation: Incarnation) -> bool {
        self.nodes.iter().any(|node| node.id == *id && node.incarnation == incarnation)
    }

    /// The nodes that have the group with this key if there are so many copies of it, the home first.
    pub(crate) fn homes(&self, key: BlockHash, copies: usize) -> Vec<Arc<Node>> {
        self.rendezvous.homes(key, copies).into_iter().map(|node| self.nodes[node].clone()).collect()
    }

    /// If all nodes are about to leave: the one of them that had the group.
    pub(crate) fn leaving(&self, key: BlockHash) -> Option<Arc<Node>> {
        self.rendezvous.ranked(key).first().map(|&node| self.nodes[node].clone())
    }

    /// Who, in this order, may have blocks of a group that `asked` did not give.
    pub(crate) fn others(&self, key: BlockHash, copies: usize, asked: &MemberId, why: Miss) -> Vec<Arc<Node>> {
        // Nearly always there is nobody: then the whole order need not be known.
        let leaving = self.nodes.iter().any(|node| node.draining);
        let is_home = self.rendezvous.home(key).is_some_and(|home| self.nodes[home].id == *asked);
        if is_home && !leaving && copies <= 1 && why != (Miss::Lacks { warming: true }) {
            return Vec::new();
        }
        let (homes, ranked) = (self.rendezvous.homes(key, copies), self.rendezvous.ranked(key));
        let home = homes.first().copied();
        let mut others = Vec::new();
        // It is the home that has everything, if anybody does; if it can't be asked, the copies are what there is.
        others.extend(home);
        if why == Miss::Failed {
            others.extend(&homes[1.min(homes.len())..]);
        }
        // Who is leaving and comes before the home had the group until now.
        others.extend(ranked.iter().copied().take_while(|&node| Some(node) != home));
        if why == (Miss::Lacks { warming: true }) {
            let before = ranked.iter().copied().skip_while(|&node| self.nodes[node].id != *asked).skip(1);
            others.extend(before.filter(|&node| !self.nodes[node].draining).take(1));
        }
        others.into_iter().map(|node| self.nodes[node].clone()).filter(|node| node.id != *asked).collect()
    }

    /// The node of that name.
    pub(crate) fn get(&self, id: &MemberId) -> Option<&Node> {
        self.nodes.iter().find(|node| node.id == *id).map(|node| &**node)
    }

    /// How many blocks a group has.
    pub(crate) fn group_blocks(&self) -> usize {
        self.group_blocks
    }

    /// On how many nodes each group is kept.
    pub(crate) fn replicas(&self) -> usize {
        self.replicas
    }

    /// Whether everything is on the same nodes, which are at the same addresses.
    pub(crate) fn divides_like(&self, other: &Self) -> bool {
        self.nodes == other.nodes
    }

    /// The groups of a prompt of so many blocks.
    pub(crate) fn groups(&self, blocks: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let size = self.group_blocks;
        (0..blocks).step_by(size).map(move |start| start..blocks.min(start + size))
    }
}

/// What one node is asked for in one share, in the prompt's order (so that a node's answer, which ends at its first missing
/// block, ends where the run ends), split where it is longer than `limit`. The parts come in the prompt's order.
pub(crate) fn collect(
    parts: impl Iterator<Item = (Arc<Node>, Range<usize>)>,
    group_blocks: usize,
    limit: usize,
) -> Vec<Share> {
    let mut by_node: HashMap<MemberId, (Arc<Node>, Vec<usize>)> = HashMap::new();
    for (node, part) in parts {
        by_node.entry(node.id.clone()).or_insert_with(|| (node, Vec::new())).1.extend(part);
    }
    let mut shares: Vec<Share> = by_node
        .into_values()
        .flat_map(|(node, all)| {
            let share = |part: &[usize]| Share { node: node.clone(), blocks: part.to_vec(), group_blocks };
            all.chunks(limit).map(share).collect::<Vec<_>>()
        })
        .collect();
    shares.sort_unstable_by_key(|share| share.blocks[0]);
    shares
}

/// What most of the nodes that stay say, or of all if none does; of several such values that of the first node by name.
fn majority(nodes: &[Node], value: impl Fn(&StoreInfo) -> u32) -> u32 {
    let mut counts: Vec<(u32, usize)> = Vec::new();
    let none_stays = nodes.iter().all(|node| node.draining);
    for node in nodes.iter().filter(|node| none_stays || !node.draining) {
        let value = value(&node.store);
        match counts.iter_mut().find(|(known, _)| *known == value) {
            Some((_, count)) => *count += 1,
            None => counts.push((value, 1)),
        }
    }
    let most = counts.iter().map(|&(_, count)| count).max();
    let first = counts.iter().find(|&&(_, count)| Some(count) == most);
    first.map_or_else(|| value(&StoreInfo::default()), |&(value, _)| value).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(n: usize, group_blocks: u32) -> Node {
        Node {
            id: format!("kv-{n}").parse().unwrap(),
            incarnation: Incarnation(n as u64),
            grpc: String::new(),
            store: StoreInfo { group_blocks, ..StoreInfo::default() },
            draining: false,
        }
    }

    fn placement(nodes: usize, group_blocks: u32) -> Placement {
        Placement::new(Epoch(1), (0..nodes).map(|n| node(n, group_blocks)).collect())
    }

    fn key(n: u64) -> BlockHash {
        let mut key = [0; 16];
        key.copy_from_slice(&blake3::hash(&n.to_le_bytes()).as_bytes()[..16]);
        BlockHash(key)
    }

    proptest! {
        #[test]
        fn every_block_is_in_one_share_in_order(nodes in 1usize..6, blocks in 0usize..300, group in 1u32..40, limit in 1usize..50) {
            let blocks: Vec<_> = (0..blocks).map(|n| key(n as u64)).collect();
            let placement = placement(nodes, group);
            let home = |group: Range<usize>| (placement.homes(blocks[group.start], 1).remove(0), group);
            let shares = collect(placement.groups(blocks.len()).map(home), placement.group_blocks(), limit);
            let mut seen: Vec<usize> = shares.iter().flat_map(|share| share.blocks.iter().copied()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..blocks.len()).collect::<Vec<_>>());
            for share in &shares {
                prop_assert!(share.blocks.len() <= limit);
                prop_assert!(share.blocks.is_sorted());
                for &block in &share.blocks {
                    let group = group as usize;
                    let first = blocks[block / group * group];
                    prop_assert_eq!(&placement.homes(first, 1)[0], &share.node);
                }
            }
        }
    }

    #[test]
    fn without_nodes_nobody_has_anything() {
        assert!(placement(0, 32).homes(key(0), 1).is_empty());
        assert!(placement(0, 32).others(key(0), 2, &"x".parse().unwrap(), Miss::Failed).is_empty());
    }

    #[test]
    fn others_are_asked_only_where_they_may_have_it() {
        const LACKS: Miss = Miss::Lacks { warming: false };
        let ids = |nodes: Vec<Arc<Node>>| nodes.into_iter().map(|node| node.id.clone()).collect::<Vec<_>>();
        let all = placement(4, 32);
        for key in (0..100).map(key) {
            let order = ids(all.homes(key, 4));
            for (copies, asked, why, expected) in [
                (1, 0, LACKS, vec![]),
                (1, 0, Miss::Failed, vec![]),
                (1, 0, Miss::Lacks { warming: true }, vec![1]),
                (3, 0, LACKS, vec![]),
                (3, 0, Miss::Failed, vec![1, 2]),
                (3, 2, LACKS, vec![0]),
                (3, 1, Miss::Failed, vec![0, 2]),
            ] {
                let others = ids(all.others(key, copies, &order[asked], why));
                let expected: Vec<_> = expected.into_iter().map(|n: usize| order[n].clone()).collect();
                assert_eq!(others, expected, "{copies} copies, {asked} asked, {why:?}");
            }
            // The home is about to leave: the next one has the group, and the old one is asked for what that lacks.
            let mut nodes: Vec<Node> = (0..4).map(|n| node(n, 32)).collect();
            nodes.iter_mut().for_each(|node| node.draining = node.id == order[0]);
            let leaving = Placement::new(Epoch(2), nodes);
            assert_eq!(ids(leaving.homes(key, 1)), order[1..2]);
            assert_eq!(ids(leaving.others(key, 1, &order[1], LACKS)), order[..1]);
        }
    }

    #[test]
    fn what_most_nodes_say_counts_and_the_others_are_told() {
        let (mut placement, odd) = (placement(0, 1), |n: usize, value, counts| Odd {
            member: format!("kv-{n}").parse().unwrap(),
            key: "group_blocks",
            value,
            counts,
        });
        for (groups, counts, odds) in [
            (vec![4, 4, 8], 4, vec![odd(2, 8, 4)]),
            (vec![4, 8, 8], 8, vec![odd(0, 4, 8)]),
            (vec![8, 4], 8, vec![odd(1, 4, 8)]),
            (vec![5], 5, vec![]),
        ] {
            let nodes = groups.into_iter().enumerate().map(|(n, group)| node(n, group)).collect();
            placement = Placement::new(placement.epoch, nodes);
            assert_eq!((placement.group_blocks, placement.odd()), (counts, odds));
        }
    }
}
