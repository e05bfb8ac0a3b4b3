//! Computing once what several sequences begin with: prompts that arrive together, and the choices of one request.
//!
//! **Prompts.** What one has computed is sealed under its name at once, so before each step every prompt looks whether its
//! next blocks can be found by now, and takes them over: by holding those blocks in place of its own, which go back; or,
//! if somebody outside knows its blocks (a [`crate::LayerSink`] watches, or it will be parked), by copying, and the sink is told as if
//! they had been computed. While the next block of a prompt is still to be computed by one that comes before it in this
//! step's order, the prompt waits. Whom it waits for has work in the same step, so there is always somebody who gets on,
//! and if that one ends or loses its blocks, the next plan knows nothing of it.
//!
//! **Choices.** When the prompt is computed, each further choice takes shares in its whole blocks and a copy of the block
//! that is begun. One that finds no place or no blocks waits like a preempted sequence, which finds the prompt in the
//! prefix cache.

use std::{collections::HashSet, ops::Range};

use kvasir_types::{BlockHash, BlockId};

use super::{Key, Scheduler, State};
use crate::Mode;

/// Part of a watched prompt that another sequence has computed, to be copied and told.
pub(crate) struct Adopted {
    pub key: Key,
    /// Blocks to copy: from, to.
    pub copies: Vec<(BlockId, BlockId)>,
    /// Positions that need not be computed.
    pub tokens: Range<usize>,
}

impl Scheduler {
    /// Prompts take over what others have computed meanwhile. The copies must be made before anything else is done here.
    pub fn adopt(&mut self) -> Vec<Adopted> {
        let mut adopted = Vec::new();
        if !self.config.prefix_cache {
            return adopted;
        }
        for key in self.live_where(|state| matches!(state, State::Prefilling(..))) {
            let Some(sequence) = self.sequences.get_mut(&key) else { continue };
            let State::Prefilling(table, watcher) = &sequence.state else { continue };
            // Parked blocks are read by whoever was told of them.
            let known_outside = watcher.is_some() || sequence.request.mode == Mode::PrefillOnly;
            let start = table.computed;
            // Behind what is computed, peers may be writing.
            if !start.is_multiple_of(self.block_size) || sequence.landing.is_some() {
                continue;
            }
            let (chain, table) = sequence.reusable(self.block_size);
            let hit = self.cache.lookup_from(start / self.block_size, chain);
            let Some(table) = table.filter(|_| hit.blocks * self.block_size > start) else { continue };
            let tokens = start..hit.blocks * self.block_size;
            if known_outside {
                // Without room for copies it computes.
                let Some(copies) = self.cache.adopt_copies(table, hit, chain) else { continue };
                adopted.push(Adopted { key, copies, tokens: tokens.clone() });
            } else {
                self.cache.adopt(table, hit, chain);
            }
            self.totals.shared_tokens += tokens.len() as u64;
        }
        adopted
    }

    /// Whether the next block of a prompt is about to be computed by somebody else.
    pub(super) fn waits_for(&mut self, key: Key, coming: &HashSet<BlockHash>) -> bool {
        let Some(sequence) = self.sequences.get_mut(&key) else { return false };
        let State::Prefilling(table, _) = &sequence.state else { return false };
        let (start, block_size) = (table.computed, self.block_size);
        let next = sequence.reusable_hashes(block_size).get(start / block_size);
        start.is_multiple_of(block_size) && next.is_some_and(|next| coming.contains(next))
    }

    /// Makes a sequence of its own of another choice that goes on after the first `tokens` tokens of `key`: its name, and
    /// the blocks to copy before anything else is done.
    pub fn fork(&mut self, key: Key, choice: u32, tokens: usize) -> Option<(Key, Vec<(BlockId, BlockId)>)> {
        let room = self.live.len() < self.config.max_running;
        let sequence = self.sequences.get_mut(&key)?;
        let mut fork = sequence.fork(choice);
        fork.waits_since = self.steps;
        let computed = sequence.table().is_some_and(|table| table.computed >= tokens);
        let table = sequence.state.table_mut().filter(|_| room && computed);
        let copies = match table.and_then(|table| self.cache.fork(table, tokens)) {
            Some((table, copies)) => {
                fork.state = State::Prefilling(table, None);
                self.live.insert(fork.turn());
                self.totals.forks += 1;
                copies
            }
            None => {
                self.waiting.insert(fork.turn());
                Vec::new()
            }
        };
        let name = fork.key;
        self.sequences.insert(name, fork);
        Some((name, copies))
    }
}
