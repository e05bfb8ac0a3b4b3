//! Weighted rendezvous hashing: which nodes have which group of blocks, computed by everybody alike. Pure.
//!
//! Each node gets a number for a key, as if drawn at random from the mix of both; the best has the group, the next ones its
//! copies. Whoever knows the same nodes so agrees without talking, and when a node joins, leaves or changes its weight,
//! only the groups that it had or gets move (Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
//! 1998). A node's number is `-weight / ln(u)` for a uniform `u`, which gives it a share of the groups in proportion to its
//! weight (Schindelhauer and Schomaker, "Weighted distributed hash tables", 2005); among equal weights the order is that of
//! the draws.

use std::cmp::Ordering;

use kvasir_types::BlockHash;

/// A node as placement sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spot<'a> {
    /// Its name: draws follow from it, so a node that comes back has its old groups.
    pub name: &'a str,
    /// Its share beside that of the others; above 0.
    pub weight: f64,
    /// Nodes of one zone may fail together.
    pub zone: &'a str,
    /// Whether it gets blocks. One that is about to leave does not, and still has its place in the order.
    pub stays: bool,
}

/// The nodes that groups are divided among, named by their index in what this was made of.
#[derive(Clone, Debug, Default)]
pub struct Rendezvous {
    nodes: Vec<Drawing>,
    /// All weights are the same: the draws alone decide.
    uniform: bool,
}

#[derive(Clone, Debug)]
struct Drawing {
    seed: u64,
    weight: f64,
    /// Number of its zone.
    zone: usize,
    stays: bool,
}

/// How much a node wants a group.
#[derive(Clone, Copy, Debug)]
struct Score {
    weighted: f64,
    draw: u64,
}

impl Score {
    fn cmp(&self, other: &Self) -> Ordering {
        self.weighted.total_cmp(&other.weighted).then(self.draw.cmp(&other.draw))
    }
}

impl Rendezvous {
    /// The division among these nodes. Their order only matters for what their indexes are.
    pub fn new<'a>(spots: impl IntoIterator<Item = Spot<'a>>) -> Self {
        let mut zones: Vec<&str> = Vec::new();
        let nodes: Vec<Drawing> = spots
            .into_iter()
            .map(|spot| {
                let zone = zones.iter().position(|&zone| zone == spot.zone).unwrap_or_else(|| {
                    zones.push(spot.zone);
                    zones.len() - 1
                });
                let digest = blake3::hash(spot.name.as_bytes());
                Drawing { seed: first_eight(digest.as_bytes()), weight: spot.weight, zone, stays: spot.stays }
            })
            .collect();
        let uniform = nodes.windows(2).all(|pair| pair[0].weight == pair[1].weight);
        Self { nodes, uniform }
    }

    /// The node that has the group with this key: the hash of its first block.
    pub fn home(&self, key: BlockHash) -> Option<usize> {
        self.staying().max_by(|&a, &b| self.score(a, key).cmp(&self.score(b, key)))
    }

    /// The nodes that have the group if there are to be so many copies of it: the home first, then the next ones in the
    /// order, each from a zone that has the fewest of them so far. Fewer if there are not so many nodes.
    pub fn homes(&self, key: BlockHash, copies: usize) -> Vec<usize> {
        if copies <= 1 {
            return self.home(key).into_iter().take(copies).collect();
        }
        let mut order: Vec<usize> = self.ranked(key).into_iter().filter(|&node| self.nodes[node].stays).collect();
        let mut homes: Vec<usize> = Vec::with_capacity(copies.min(order.len()));
        while homes.len() < copies && !order.is_empty() {
            let in_zone = |zone| homes.iter().filter(|&&home| self.nodes[home].zone == zone).count();
            // Of several at the least, the first one: the best in the order.
            let next = (0..order.len()).min_by_key(|&at| in_zone(self.nodes[order[at]].zone)).expect("not empty");
            homes.push(order.remove(next));
        }
        homes
    }

    /// All nodes, the one that wants the group most first, those that are about to leave included.
    pub fn ranked(&self, key: BlockHash) -> Vec<usize> {
        let mut scored: Vec<(Score, usize)> = (0..self.nodes.len()).map(|node| (self.score(node, key), node)).collect();
        scored.sort_unstable_by(|(a, _), (b, _)| b.cmp(a));
        scored.into_iter().map(|(_, node)| node).collect()
    }

    /// How many nodes get blocks.
    pub fn len(&self) -> usize {
        self.staying().count()
    }

    /// Whether no node gets blocks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn staying(&self) -> impl Iterator<Item = usize> {
        (0..self.nodes.len()).filter(|&node| self.nodes[node].stays)
    }

    fn score(&self, node: usize, key: BlockHash) -> Score {
        let Drawing { seed, weight, .. } = self.nodes[node];
        let draw = mix(seed ^ mix(first_eight(&key.0)));
        if self.uniform {
            return Score { weighted: 0.0, draw };
        }
        // u = (draw + ½) / 2^64, by way of 1 - u: the best draws are those next to 1, where floats are coarse.
        let below_one = (!draw as f64 + 0.5) / 2f64.powi(64);
        Score { weighted: weight / -(-below_one).ln_1p(), draw }
    }
}

/// What decides where a group is: the first eight bytes of the hash of its first block.
pub fn group_key(first: BlockHash) -> u64 {
    first_eight(&first.0)
}

pub(crate) fn first_eight(bytes: &[u8]) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(eight)
}

/// SplitMix64's output function (Steele, Lea, Flood 2014).
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn key(n: u64) -> BlockHash {
        let mut key = [0; 16];
        key.copy_from_slice(&blake3::hash(&n.to_le_bytes()).as_bytes()[..16]);
        BlockHash(key)
    }

    /// Nodes `kv-0`, … by name, with their weights and zones.
    type Nodes = BTreeMap<String, (f64, u8)>;

    fn nodes(weights: &[(f64, u8)]) -> Nodes {
        weights.iter().enumerate().map(|(n, &node)| (format!("kv-{n}"), node)).collect()
    }

    fn rendezvous(nodes: &Nodes) -> Rendezvous {
        let zones: Vec<String> = nodes.values().map(|(_, zone)| format!("z{zone}")).collect();
        let spot =
            |((name, &(weight, _)), zone): ((&'_ String, &(f64, u8)), &'_ String)| (name.clone(), weight, zone.clone());
        let spots: Vec<_> = nodes.iter().zip(&zones).map(spot).collect();
        Rendezvous::new(spots.iter().map(|(name, weight, zone)| Spot { name, weight: *weight, zone, stays: true }))
    }

    fn home<'a>(nodes: &'a Nodes, rendezvous: &Rendezvous, key: BlockHash) -> &'a str {
        nodes.keys().nth(rendezvous.home(key).unwrap()).unwrap()
    }

    fn weights() -> impl Strategy<Value = Vec<(f64, u8)>> {
        let weight = prop_oneof![Just(256.0), 1.0..10_000.0f64];
        prop::collection::vec((weight, 0u8..4), 2..12)
    }

    proptest! {
        #[test]
        fn who_joins_leaves_or_is_weighed_anew_moves_its_own_share_only(
            weights in weights(), which in any::<prop::sample::Index>(), weight in 1.0..10_000.0f64,
        ) {
            let all = nodes(&weights);
            let changed = all.keys().nth(which.index(all.len())).unwrap().clone();
            let (mut fewer, mut other) = (all.clone(), all.clone());
            fewer.remove(&changed);
            other.get_mut(&changed).unwrap().0 = weight;
            let (of_all, of_fewer, of_other) = (rendezvous(&all), rendezvous(&fewer), rendezvous(&other));
            let grows = weight >= all[&changed].0;
            for key in (0..500).map(key) {
                let before = home(&all, &of_all, key);
                // Leaves; read backwards: joins.
                let without = home(&fewer, &of_fewer, key);
                prop_assert!(before == changed || before == without);
                let after = home(&other, &of_other, key);
                let may_move = if grows { after == changed } else { before == changed };
                prop_assert!(before == after || may_move, "{before} to {after}, and {changed} changed");
            }
        }

        #[test]
        fn copies_are_on_different_nodes_and_in_as_many_zones_as_there_are(weights in weights(), copies in 1usize..9) {
            let all = nodes(&weights);
            let rendezvous = rendezvous(&all);
            let zone_of = |node: &usize| all.values().nth(*node).unwrap().1;
            let mut zones: Vec<u8> = all.values().map(|&(_, zone)| zone).collect();
            zones.sort_unstable();
            zones.dedup();
            for key in (0..50).map(key) {
                let homes = rendezvous.homes(key, copies);
                prop_assert_eq!(homes.len(), copies.min(all.len()));
                prop_assert_eq!(homes.first().copied(), rendezvous.home(key));
                prop_assert_eq!(rendezvous.ranked(key)[0], homes[0]);
                let (mut distinct, mut of_zone) = (homes.clone(), homes.iter().map(zone_of).collect::<Vec<_>>());
                distinct.sort_unstable();
                distinct.dedup();
                prop_assert_eq!(distinct.len(), homes.len());
                of_zone.sort_unstable();
                of_zone.dedup();
                prop_assert_eq!(of_zone.len(), homes.len().min(zones.len()));
                // More copies are the same and others.
                prop_assert!(rendezvous.homes(key, copies + 1).starts_with(&homes));
            }
        }

        #[test]
        fn in_one_zone_copies_are_on_the_best_nodes_and_losing_one_adds_the_next(weights in weights(), copies in 2usize..5) {
            let all = nodes(&weights.iter().map(|&(weight, _)| (weight, 0)).collect::<Vec<_>>());
            let rendezvous = rendezvous(&all);
            for key in (0..50).map(key) {
                let (homes, ranked) = (rendezvous.homes(key, copies), rendezvous.ranked(key));
                prop_assert_eq!(&homes[..], &ranked[..copies.min(all.len())]);
            }
        }
    }

    #[test]
    fn groups_are_divided_in_proportion_to_weights() {
        for weights in [[1.0; 4], [256.0, 256.0, 512.0, 1024.0], [0.5, 2.0, 3.5, 10.0]] {
            let rendezvous = rendezvous(&nodes(&weights.map(|weight| (weight, 0))));
            let (groups, mut counts) = (20_000, [0u32; 4]);
            (0..groups).for_each(|n| counts[rendezvous.home(key(n)).unwrap()] += 1);
            let sum: f64 = weights.iter().sum();
            for (count, weight) in counts.iter().zip(weights) {
                let share = weight / sum;
                let (mean, deviation) = (share * groups as f64, (groups as f64 * share * (1.0 - share)).sqrt());
                assert!((f64::from(*count) - mean).abs() < 4.0 * deviation, "{weights:?}: {counts:?}");
            }
        }
    }

    #[test]
    fn equal_weights_are_placed_as_no_weights_were() {
        // Clients of two versions must look in the same place: a change here empties every running cluster's cache.
        for weight in [1.0, 256.0] {
            let rendezvous = rendezvous(&nodes(&[(weight, 0); 4]));
            let at: Vec<_> = (0..16).map(|n| rendezvous.home(key(n)).unwrap()).collect();
            assert_eq!(at, [0, 2, 1, 3, 0, 3, 0, 2, 1, 0, 3, 2, 2, 1, 0, 3]);
        }
    }

    #[test]
    fn the_weighted_order_of_equal_weights_is_that_of_the_draws() {
        let equal = rendezvous(&nodes(&[(256.0, 0); 6]));
        let weighted = Rendezvous { uniform: false, ..equal.clone() };
        (0..5_000).map(key).for_each(|key| assert_eq!(equal.ranked(key), weighted.ranked(key)));
    }

    #[test]
    fn the_best_and_the_worst_draw_have_a_finite_place_in_the_order() {
        let ends = Rendezvous { nodes: Vec::new(), uniform: false };
        assert!(ends.home(key(0)).is_none() && ends.homes(key(0), 3).is_empty() && ends.is_empty());
        for draw in [0u64, u64::MAX] {
            let below_one = (!draw as f64 + 0.5) / 2f64.powi(64);
            let weighted = 1e15 / -(-below_one).ln_1p();
            assert!(weighted.is_finite() && weighted >= 0.0, "{draw}: {weighted}");
        }
    }

    #[test]
    fn who_is_about_to_leave_gets_nothing_and_keeps_its_place_in_the_order() {
        let spot = |name, stays| Spot { name, weight: 1.0, zone: "", stays };
        let all = Rendezvous::new([spot("kv-0", true), spot("kv-1", true), spot("kv-2", true)]);
        let leaving = Rendezvous::new([spot("kv-0", true), spot("kv-1", false), spot("kv-2", true)]);
        let without = Rendezvous::new([spot("kv-0", true), spot("kv-2", true)]);
        for key in (0..300).map(key) {
            assert_eq!(all.ranked(key), leaving.ranked(key));
            assert_eq!(leaving.home(key), without.home(key).map(|node| node * 2));
            assert!(!leaving.homes(key, 3).contains(&1));
        }
        assert_eq!(leaving.len(), 2);
    }
}
