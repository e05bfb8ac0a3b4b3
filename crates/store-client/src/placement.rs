//! Which node has which blocks: rendezvous hashing of placement groups over the live store nodes.
//!
//! A prompt's blocks are cut into groups of consecutive blocks; a group's key is the hash of its first block, which stands
//! for everything before it too. Each node's weight for a key is a mix of both; the heaviest has the group. So everybody
//! who knows the same nodes agrees without talking, a prompt touches few nodes, and when a node leaves or joins, only the
//! groups it had or gets move (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998).
//!
//! A node is weighed by its name, not its incarnation: restarted, it has its old share.

use std::collections::HashMap;

use kvasir_cluster::{Member, View};
use kvasir_types::{BlockHash, Incarnation, MemberId, PROTOCOL_VERSION, Role};

/// A store node that can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) id: MemberId,
    pub(crate) incarnation: Incarnation,
    pub(crate) grpc: String,
    seed: u64,
}

impl Node {
    fn of(member: &Member) -> Self {
        let digest = blake3::hash(member.id.as_str().as_bytes());
        Self {
            id: member.id.clone(),
            incarnation: member.incarnation,
            grpc: member.grpc.clone(),
            seed: first_eight(digest.as_bytes()),
        }
    }

    fn weight(&self, key: BlockHash) -> u64 {
        mix(self.seed ^ mix(first_eight(&key.0)))
    }
}

/// Blocks that one call asks one node for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) node: Node,
    /// Indexes into the request's blocks, ascending.
    pub(crate) blocks: Vec<usize>,
}

/// The nodes among which blocks are divided now.
#[derive(Clone, Debug, Default)]
pub(crate) struct Placement {
    nodes: Vec<Node>,
}

impl Placement {
    /// The nodes of a view that stay and speak our protocol.
    pub(crate) fn of(view: &View) -> Self {
        let fit = |member: &&Member| !member.draining && member.protocol == PROTOCOL_VERSION;
        let mut nodes: Vec<Node> = view.role(Role::KvStore).filter(fit).map(Node::of).collect();
        nodes.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        Self { nodes }
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn has(&self, id: &MemberId, incarnation: Incarnation) -> bool {
        self.nodes.iter().any(|node| node.id == *id && node.incarnation == incarnation)
    }

    /// The node that has the group with this key.
    fn node(&self, key: BlockHash) -> Option<usize> {
        (0..self.nodes.len()).max_by_key(|&node| self.nodes[node].weight(key))
    }

    /// Divides a prompt's blocks: what one node has of it in one share, in the prompt's order (so that a node's answer,
    /// which ends at its first missing block, ends where the run ends), split where it is longer than `limit`.
    pub(crate) fn shares(&self, blocks: &[(BlockHash, u64)], group_blocks: usize, limit: usize) -> Vec<Share> {
        let mut by_node: HashMap<usize, Vec<usize>> = HashMap::new();
        for (group, start) in blocks.chunks(group_blocks).zip((0..).step_by(group_blocks)) {
            if let Some(node) = self.node(group[0].0) {
                by_node.entry(node).or_default().extend(start..start + group.len());
            }
        }
        let mut shares: Vec<Share> = by_node
            .into_iter()
            .flat_map(|(node, all)| {
                let node = &self.nodes[node];
                all.chunks(limit).map(|part| Share { node: node.clone(), blocks: part.to_vec() }).collect::<Vec<_>>()
            })
            .collect();
        shares.sort_unstable_by_key(|share| share.blocks[0]);
        shares
    }
}

fn first_eight(bytes: &[u8]) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(eight)
}

/// SplitMix64's output function (Steele, Lea, Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(n: usize) -> Node {
        let id: MemberId = format!("kv-{n}").parse().unwrap();
        let seed = first_eight(blake3::hash(id.as_str().as_bytes()).as_bytes());
        Node { id, incarnation: Incarnation(n as u64), grpc: String::new(), seed }
    }

    fn placement(nodes: usize) -> Placement {
        Placement { nodes: (0..nodes).map(node).collect() }
    }

    fn key(n: u64) -> BlockHash {
        let mut key = [0; 16];
        key.copy_from_slice(&blake3::hash(&n.to_le_bytes()).as_bytes()[..16]);
        BlockHash(key)
    }

    proptest! {
        #[test]
        fn every_block_is_in_one_share_in_order(nodes in 1usize..6, blocks in 0usize..300, group in 1usize..40, limit in 1usize..50) {
            let blocks: Vec<_> = (0..blocks).map(|n| (key(n as u64), 0)).collect();
            let placement = placement(nodes);
            let shares = placement.shares(&blocks, group, limit);
            let mut seen: Vec<usize> = shares.iter().flat_map(|share| share.blocks.iter().copied()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..blocks.len()).collect::<Vec<_>>());
            for share in &shares {
                prop_assert!(share.blocks.len() <= limit);
                prop_assert!(share.blocks.is_sorted());
                for &block in &share.blocks {
                    let first = blocks[block / group * group].0;
                    prop_assert_eq!(&placement.nodes[placement.node(first).unwrap()], &share.node);
                }
            }
        }
    }

    #[test]
    fn a_node_that_leaves_moves_its_own_groups_only() {
        let (all, mut fewer) = (placement(5), placement(5));
        let gone = fewer.nodes.remove(2).id;
        for key in (0..2000).map(key) {
            let before = &all.nodes[all.node(key).unwrap()];
            let after = &fewer.nodes[fewer.node(key).unwrap()];
            assert!(before.id == gone || before.id == after.id);
        }
    }

    #[test]
    fn groups_spread_evenly() {
        let placement = placement(4);
        let mut counts = [0; 4];
        (0..8000).for_each(|n| counts[placement.node(key(n)).unwrap()] += 1);
        // Binomial: mean 2000, standard deviation 39; four of them either way.
        assert!(counts.iter().all(|count| (1845..=2155).contains(count)), "{counts:?}");
    }

    #[test]
    fn without_nodes_there_are_no_shares() {
        assert!(placement(0).shares(&[(key(0), 0)], 32, 1024).is_empty());
    }

    #[test]
    fn placement_is_what_it_was_in_the_first_release() {
        // Clients of two versions must look in the same place: a change here empties every running cluster's cache.
        let placement = placement(4);
        let at: Vec<_> = (0..16).map(|n| placement.node(key(n)).unwrap()).collect();
        assert_eq!(at, [0, 2, 1, 3, 0, 3, 0, 2, 1, 0, 3, 2, 2, 1, 0, 3]);
    }
}
