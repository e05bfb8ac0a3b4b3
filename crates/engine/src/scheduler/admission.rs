//! Getting blocks and losing them: admission, aging, preemption.
//!
//! **Preemption** is free and recompute: what a sequence computed stays in the prefix cache, tail first to be evicted, and
//! is looked up again when the sequence's turn comes. A [`Spill`] may keep it somewhere else besides. For another of its
//! own class a sequence gives way only where that needs a block for its next token; for a more urgent one also before that
//! starts, if enough can be made free in this way.
//!
//! **Aging.** Time is counted in steps. An offline sequence's waits for blocks add up over its life, also those after it
//! lost its blocks, as do the steps in which it was a prompt and the batch was full; with
//! [`crate::Config::offline_patience`] of them it is online for good. So among `n` offline sequences the last one runs,
//! undisturbed by anybody who came later, after so many steps at most, and those that were there before it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use kvasir_kv_cache::{Table, in_group};
use kvasir_types::FinishReason;

use super::{Key, Priority, Scheduler, Sequence, Spill, State, Turn};
use crate::{Admission, Error, Event, SpilledBlock};

impl Scheduler {
    /// Offline sequences that have waited long enough are online from now on.
    pub(super) fn age(&mut self) {
        let first = Turn { class: Priority::Offline, key: Key { seq: crate::SeqId(0), choice: 0 } };
        let waits = |turn: &&Turn| {
            let sequence = &self.sequences[&turn.key];
            sequence.waited + (self.steps - sequence.waits_since) >= self.config.offline_patience
        };
        let stands = |turn: &&Turn| self.sequences[&turn.key].waited >= self.config.offline_patience;
        let mut promoted: Vec<Turn> = self.waiting.range(first..).filter(waits).copied().collect();
        promoted.extend(self.live.range(first..).filter(stands));
        for turn in promoted {
            let line = if self.live.remove(&turn) { &mut self.live } else { &mut self.waiting };
            line.remove(&turn);
            line.insert(Turn { class: Priority::Online, ..turn });
            self.sequences.get_mut(&turn.key).expect("a turn is somebody's").class = Priority::Online;
            self.totals.promotions += 1;
        }
    }

    /// No block is left for the next token of a sequence: takes blocks away from somebody.
    pub(super) fn make_room_for(&mut self, key: Key) {
        let Some(needy) = self.sequences.get(&key) else { return };
        let (blocks, tokens) = (needy.table().map_or(0, Table::len), needy.tokens.len());
        let (turn, is_prompt) = (needy.turn(), needy.is_prompt());
        // Not from earlier ones: they are in this step's work already, and taking in turns would get nobody to the end.
        let may_lose = |turn: &&Turn| self.sequences[&turn.key].is_preemptible();
        match self.live.range(turn..).rev().find(may_lose).map(|turn| turn.key) {
            Some(victim) if victim != key => self.preempt(victim),
            _ if blocks == self.cache.counts().total && !is_prompt => self.finish(key, FinishReason::Length),
            Some(_itself) => self.preempt(key),
            None => self.fail(key.seq, Error::OutOfBlocks { tokens }),
        }
    }

    fn preempt(&mut self, key: Key) {
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        let turn = sequence.turn();
        if let Some(spill) = &mut self.spill {
            move_out(sequence, spill.as_mut());
        }
        if let Some(table) = sequence.take_table() {
            self.cache.give_back(table);
        }
        sequence.waits_since = self.steps;
        self.totals.preemptions += 1;
        self.live.remove(&turn);
        self.waiting.insert(turn);
    }

    /// Gives blocks to the first in line, if there are enough. False: nobody waits, or not now.
    pub(super) fn admit_next(&mut self) -> bool {
        let Some(&turn) = self.waiting.first() else { return false };
        loop {
            let sequence = self.sequences.get_mut(&turn.key).expect("a turn is somebody's");
            let tokens = sequence.tokens_to_reserve();
            let chain = sequence.reusable_hashes(self.block_size);
            let chain = if self.config.prefix_cache { chain } else { &[] };
            if self.live.len() < self.config.max_running
                && let Some(table) = self.cache.reserve(chain, tokens, self.config.chunk_tokens)
            {
                self.start(turn, table);
                return true;
            }
            let (hit, fresh) = self.cache.plan(chain, tokens, self.config.chunk_tokens);
            if !self.give_way_to(turn, fresh + hit.idle) {
                return false;
            }
        }
    }

    /// Takes their blocks from sequences of a lower class than the first in line, the last ones first, if `needed` blocks
    /// and a place can be made free in this way.
    fn give_way_to(&mut self, turn: Turn, needed: usize) -> bool {
        let missing = needed.saturating_sub(self.cache.available());
        let places = (self.live.len() + 1).saturating_sub(self.config.max_running);
        let (mut victims, mut freed) = (Vec::new(), 0);
        for other in self.live.iter().rev().take_while(|other| other.class > turn.class) {
            if freed >= missing && victims.len() >= places.max(1) {
                break;
            }
            let sequence = &self.sequences[&other.key];
            if let (true, Some(table)) = (sequence.is_preemptible(), sequence.table()) {
                freed += self.cache.exclusive(table);
                victims.push(other.key);
            }
        }
        if victims.is_empty() || freed < missing || victims.len() < places {
            return false;
        }
        victims.into_iter().for_each(|victim| self.preempt(victim));
        true
    }

    /// A sequence has its blocks: on to the caller, or straight on computing.
    fn start(&mut self, turn: Turn, mut table: Table) {
        let sequence = self.sequences.get_mut(&turn.key).expect("a turn is somebody's");
        self.waiting.remove(&turn);
        self.live.insert(turn);
        sequence.waited += self.steps - sequence.waits_since;
        let first_time = matches!(sequence.state, State::Queued { .. });
        let known = sequence.tokens.len();
        let needed = self.cache.geometry().needed(sequence.tokens_to_reserve(), self.config.chunk_tokens);
        // One that has outgrown the pool will end soon: it has no blocks for all that it had.
        let lost = sequence.spilled > table.computed / self.block_size
            && sequence.request.choices == 1
            && needed <= self.cache.counts().total;
        if lost || matches!(sequence.state, State::Queued { early: None, .. }) {
            self.cache.open(&mut table, known);
        }
        let blocks = known.div_ceil(self.block_size);
        let mut admission = Admission {
            tables: table.ids().iter().map(|ids| ids[..blocks.min(ids.len())].to_vec()).collect(),
            hashes: sequence.prompt_hashes.clone(),
            cached_tokens: table.computed,
        };
        let state = std::mem::replace(&mut sequence.state, State::Preempted);
        sequence.state = match state {
            State::Queued { early: Some(watcher), .. } => State::Prefilling(table, watcher),
            State::Queued { early: None, .. } => State::Held(table),
            _ if lost => {
                admission.hashes = sequence.hashes()[..sequence.spilled].into();
                let spill = self.spill.as_mut();
                let bring = |spill: &mut Box<dyn Spill>| spill.back(turn.key.seq, &admission);
                if spill.is_some_and(|spill| catch_unwind(AssertUnwindSafe(|| bring(spill))).unwrap_or(false)) {
                    self.totals.recalls += 1;
                    State::Held(table)
                } else {
                    self.cache.fence(&mut table, usize::MAX);
                    self.cache.rewind(&mut table);
                    State::Prefilling(table, None)
                }
            }
            _ => State::Prefilling(table, None),
        };
        sequence.spilled = 0;
        if first_time {
            self.totals.cached_tokens += admission.cached_tokens as u64;
            if !self.tell(turn.key.seq, Event::Admitted(admission)) {
                self.remove(turn.key.seq);
            }
        }
    }
}

/// Offers the complete blocks of a sequence to whoever keeps them.
fn move_out(sequence: &mut Sequence, spill: &mut dyn Spill) {
    let Some(table) = sequence.table() else { return };
    let hashes = sequence.hashes();
    let blocks: Vec<SpilledBlock> = table
        .sealed_ids()
        .filter_map(|(group, index, block)| {
            Some(SpilledBlock { hash: in_group(*hashes.get(index)?, group), group, block })
        })
        .collect();
    let whole = table.sealed_ids().map(|(_, index, _)| index + 1).max().unwrap_or(0).min(hashes.len());
    let seq = sequence.key.seq;
    if !blocks.is_empty() && catch_unwind(AssertUnwindSafe(|| spill.out(seq, &blocks))).is_ok() {
        sequence.spilled = whole;
    }
}
