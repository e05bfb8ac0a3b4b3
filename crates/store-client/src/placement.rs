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

    /// Divides a prompt's blocks: what one node has of it in one share, in the prompt's order (so that a node's answer,
    /// which ends at its first missing block, ends where the run ends), split where it is longer than `limit`.
    pub(crate) fn shares(&self, blocks: &[(BlockHash, u64)], limit: usize) -> Vec<Share> {
        let home = |group: Range<usize>| Some((self.rendezvous.home(blocks[group.start].0)?, group));
        self.collect(self.groups(blocks.len()).filter_map(home), limit)
    }

    /// The groups of a prompt of so many blocks.
    fn groups(&self, blocks: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let size = self.group_blocks;
        (0..blocks).step_by(size).map(move |start| start..blocks.min(start + size))
    }

    /// One share for each node that is to have any of these groups, which come in the prompt's order.
    fn collect(&self, parts: impl Iterator<Item = (usize, Range<usize>)>, limit: usize) -> Vec<Share> {
        let mut by_node: HashMap<usize, Vec<usize>> = HashMap::new();
        for (node, part) in parts {
            by_node.entry(node).or_default().extend(part);
        }
        let mut shares: Vec<Share> = by_node
            .into_iter()
            .flat_map(|(node, all)| {
                let share = |part: &[usize]| Share {
                    node: self.nodes[node].clone(),
                    blocks: part.to_vec(),
                    group_blocks: self.group_blocks,
                };
                all.chunks(limit).map(share).collect::<Vec<_>>()
            })
            .collect();
        shares.sort_unstable_by_key(|share| share.blocks[0]);
        shares
    }
}

/// What most of the nodes that stay say, of several such values that of the first node by name.
fn majority(nodes: &[Node], value: impl Fn(&StoreInfo) -> u32) -> u32 {
    let mut counts: Vec<(u32, usize)> = Vec::new();
    for node in nodes.iter().filter(|node| !node.draining) {
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
            let blocks: Vec<_> = (0..blocks).map(|n| (key(n as u64), 0)).collect();
            let placement = placement(nodes, group);
            let shares = placement.shares(&blocks, limit);
            let mut seen: Vec<usize> = shares.iter().flat_map(|share| share.blocks.iter().copied()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..blocks.len()).collect::<Vec<_>>());
            for share in &shares {
                prop_assert!(share.blocks.len() <= limit);
                prop_assert!(share.blocks.is_sorted());
                for &block in &share.blocks {
                    let group = group as usize;
                    let first = blocks[block / group * group].0;
                    let home = placement.rendezvous.home(first).unwrap();
                    prop_assert_eq!(&placement.nodes[home], &share.node);
                }
            }
        }
    }

    #[test]
    fn without_nodes_there_are_no_shares() {
        assert!(placement(0, 32).shares(&[(key(0), 0)], 1024).is_empty());
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
