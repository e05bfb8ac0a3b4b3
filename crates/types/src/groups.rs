//! The typed groups of a model's layers: which layers share a block, and how long their keys and values matter.
//!
//! Layers differ in what they look back at: all positions, the last few thousand, or a state of fixed size. Blocks in
//! which all layers lie together would keep what the short-sighted ones need no more. So layers of one kind form groups,
//! and a block holds `block_size` tokens of the layers of ONE group:
//!
//! ```text
//! layers of a model       S  S  S  F  S  S  S  F          S: sliding window, F: full attention
//! groups, two layers each a  a  b  f  b  c  c  f
//! tables of a sequence    f  b0 b4 b5 b9 …                one block table per group
//!                         a  -- -- b7 b8 …                blocks before the window are gone
//! ```
//!
//! All groups have the same number of layers (the last group of a kind may leave room unused), so all blocks of an arena
//! have the same size and any free block serves any group. It is the layout of vLLM's hybrid KV cache manager. A model
//! whose layers are all of one kind has one group, and its blocks are those of `[layer][k|v]…` over all its layers.

use std::{ops::Deref, sync::Arc};

/// How long a layer needs what it has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// Every earlier position: blocks are kept as long as the sequence.
    Full,
    /// The last `window` positions, the present one included: blocks wholly before that are given back.
    Sliding {
        /// Positions that a token sees.
        window: u32,
    },
    /// A state of fixed size: one block for the sequence, whatever its length.
    Recurrent,
}

/// Some layers of a model whose keys and values lie in one block.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KvGroup {
    /// What its layers look back at.
    pub kind: GroupKind,
    /// Its layers by their index in the model, ascending; the i-th is layer i of a block.
    pub layers: Vec<u16>,
}

/// All groups of a model: at least one, each layer in exactly one. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KvGroups(Arc<[KvGroup]>);

impl KvGroups {
    /// Groups for a model whose layer `i` is of kind `kinds[i]`.
    ///
    /// The rarest kind sets how many layers a block has; the others are cut into groups of as many. Kinds in the order of
    /// their first layer, full attention before all others: group 0 of a model that has full attention is full.
    ///
    /// # Panics
    /// If there is no layer or there are more than `u16::MAX`.
    pub fn of_layers(kinds: &[GroupKind]) -> Self {
        assert!(!kinds.is_empty(), "a model has layers");
        let mut by_kind: Vec<KvGroup> = Vec::new();
        for (layer, &kind) in kinds.iter().enumerate() {
            let layer = u16::try_from(layer).expect("a model has at most u16::MAX layers");
            match by_kind.iter_mut().find(|group| group.kind == kind) {
                Some(group) => group.layers.push(layer),
                None => by_kind.push(KvGroup { kind, layers: vec![layer] }),
            }
        }
        by_kind.sort_by_key(|group| group.kind != GroupKind::Full);
        let layers = by_kind.iter().map(|group| group.layers.len()).min().expect("there is a layer");
        let cut = |group: &KvGroup| -> Vec<KvGroup> {
            group.layers.chunks(layers).map(|part| KvGroup { kind: group.kind, layers: part.to_vec() }).collect()
        };
        Self(by_kind.iter().flat_map(cut).collect())
    }

    /// One group of `layers` layers with full attention.
    pub fn full(layers: usize) -> Self {
        Self::of_layers(&vec![GroupKind::Full; layers])
    }

    /// Layers that a block has room for: what [`crate::KvLayout::layers`] must be.
    pub fn layers_per_block(&self) -> usize {
        self.0.iter().map(|group| group.layers.len()).max().expect("at least one group")
    }

    /// Where the keys and values of a layer of the model are: its group, and which layer of that group's blocks it is.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn place(&self, layer: usize) -> (usize, usize) {
        let find = |(group, g): (usize, &KvGroup)| {
            g.layers.iter().position(|&l| usize::from(l) == layer).map(|index| (group, index))
        };
        self.0.iter().enumerate().find_map(find).expect("every layer is in a group")
    }

    /// Layers of the model.
    pub fn layers(&self) -> usize {
        self.0.iter().map(|group| group.layers.len()).sum()
    }
}

impl Deref for KvGroups {
    type Target = [KvGroup];
    fn deref(&self) -> &[KvGroup] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: GroupKind = GroupKind::Sliding { window: 64 };

    #[test]
    fn a_model_of_one_kind_has_one_group() {
        let groups = KvGroups::full(5);
        assert_eq!((groups.len(), groups.layers_per_block(), groups.layers()), (1, 5, 5));
        assert_eq!((0..5).map(|layer| groups.place(layer)).collect::<Vec<_>>(), [0, 1, 2, 3, 4].map(|i| (0, i)));
    }

    #[test]
    fn the_rarest_kind_sets_the_size_of_all_groups() {
        // Seven layers, every third one full, as in the picture above.
        let kinds: Vec<_> = (0..7).map(|layer| if layer % 3 == 2 { GroupKind::Full } else { WINDOW }).collect();
        let groups = KvGroups::of_layers(&kinds);
        let told: Vec<_> = groups.iter().map(|group| (group.kind, group.layers.clone())).collect();
        assert_eq!(
            told,
            [(GroupKind::Full, vec![2, 5]), (WINDOW, vec![0, 1]), (WINDOW, vec![3, 4]), (WINDOW, vec![6])]
        );
        assert_eq!((groups.layers_per_block(), groups.layers()), (2, 7));
        assert_eq!((groups.place(5), groups.place(4), groups.place(6)), ((0, 1), (2, 1), (3, 0)));
    }
}
