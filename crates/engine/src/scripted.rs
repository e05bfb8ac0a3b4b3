//! A runner without a model, for tests of everything above it.
//!
//! The next token is a hash of **the whole history as it stands in the blocks**. A run writes, for every position it
//! computes, the token and the hash of all tokens up to it into the slot that the block table names, as a model writes K
//! and V; and it derives its logits by reading all slots back. So whatever would make a real model answer wrongly makes
//! this one answer wrongly: a block that was reused while held, a table in the wrong order, a chunk that was skipped, a
//! landing that was not complete. [`Script::logits`] says what a correct answer is.

use std::{
    collections::HashMap,
    fmt,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kvasir_model::{Error, Logits, Need, Rows, SeqInput, likeliest};
use kvasir_types::{BlockId, GroupKind, KvGroups, KvLayout, Sampling, TokenId};

use crate::{
    Ask, History, Runner, RunnerSpec, Sampler,
    sampler::{drawable, mix},
};

/// Where the hash of a history starts.
const START: u64 = 0x6b76_6173_6972;

/// A deterministic stand-in for a model; see the module's page. Its [`Script`] controls and observes it.
#[derive(Debug)]
pub struct ScriptedRunner {
    spec: RunnerSpec,
    script: Script,
}

/// The fake KV memory of a [`ScriptedRunner`], the right answers, and faults to order. Clones share all of it.
#[derive(Clone)]
pub struct Script {
    vocab: usize,
    eos: Vec<TokenId>,
    block_size: usize,
    shared: Arc<Mutex<Memory>>,
}

#[derive(Default)]
struct Memory {
    slots: HashMap<(BlockId, usize), Slot>,
    fault: Option<Fault>,
    runs: Vec<usize>,
    /// Runs that saw something else than was written for them.
    bad_reads: usize,
}

/// What was in a block.
#[derive(Clone)]
#[cfg(test)]
pub(crate) struct Saved(Vec<Option<Slot>>);

/// What stands for K and V of one token.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Slot {
    token: TokenId,
    history: u64,
    group: usize,
}

#[derive(Clone, Copy)]
enum Fault {
    Error,
    Panic,
}

impl ScriptedRunner {
    /// A runner for a model of this spec over blocks of this layout (of which size and layers matter).
    pub fn new(spec: RunnerSpec, layout: &KvLayout) -> Self {
        let script = Script {
            vocab: spec.vocab,
            eos: spec.eos.clone(),
            block_size: layout.block_size as usize,
            shared: Arc::new(Mutex::default()),
        };
        Self { spec, script }
    }

    /// The script behind it.
    pub fn script(&self) -> Script {
        self.script.clone()
    }
}

impl Runner for ScriptedRunner {
    fn spec(&self) -> &RunnerSpec {
        &self.spec
    }

    fn run(&mut self, batch: &[SeqInput<'_>], after_layer: &mut dyn FnMut(usize)) -> Result<Logits, Error> {
        let mut memory = self.script.lock();
        memory.runs.push(batch.iter().map(|input| input.tokens.len()).sum());
        match memory.fault.take() {
            Some(Fault::Error) => return Err(Error::NoTokens { input: 0 }),
            Some(Fault::Panic) => {
                drop(memory);
                panic!("the script says so");
            }
            None => {}
        }
        let script = &self.script;
        for input in batch {
            script.write(&mut memory, input);
        }
        let (groups, mut bad) = (&self.spec.groups, 0);
        for input in batch {
            let read = script.try_read(&memory, groups, input.tables, input.start + input.tokens.len());
            bad += usize::from(read.is_none());
        }
        memory.bad_reads += bad;
        let rows = batch.iter().flat_map(|input| {
            let end = input.start + input.tokens.len();
            (end - input.rows + 1..=end).flat_map(|end| script.row(script.read(&memory, groups, input.tables, end)))
        });
        let logits = Logits { vocab: self.spec.vocab, rows: rows.collect() };
        // Sinks may look at the memory.
        drop(memory);
        (0..self.spec.groups.layers()).for_each(after_layer);
        Ok(logits)
    }

    /// As a device does: nothing whole where some tokens are enough.
    fn run_few(
        &mut self,
        batch: &[SeqInput<'_>],
        needs: &[Need],
        after_layer: &mut dyn FnMut(usize),
    ) -> Result<Rows, Error> {
        let logits = self.run(batch, after_layer)?;
        let mut rows = Rows::new(logits.vocab);
        for (row, need) in logits.iter().zip(needs) {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            match *need {
                Need::Whole => rows.push_whole(row),
                Need::Likeliest => rows.push_few(likeliest(row), max),
                // A few that may be drawn.
                Need::Drawn { noise, scale } => rows.push_few(drawable(row, noise, scale).into_iter().take(4), max),
            }
        }
        Ok(rows)
    }

    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), Error> {
        copies.iter().for_each(|&(from, to)| self.script.copy_block(&self.script, from, to));
        Ok(())
    }
}

impl Script {
    /// The logits that follow `history`.
    pub fn logits(&self, history: &[TokenId]) -> Vec<f32> {
        self.row(history.iter().fold(START, |hash, &token| extend(hash, token)))
    }

    /// The first `count` tokens of the right answer to `prompt`, stop rules apart.
    pub fn answer(&self, prompt: &[TokenId], sampling: &Sampling, count: usize) -> Vec<TokenId> {
        let mut tokens = prompt.to_vec();
        let mut history = History::new(sampling, prompt);
        for _ in 0..count {
            let ask = Ask { sampling, position: tokens.len(), history: &history, eos: &self.eos, mask: None };
            let next = Sampler::default().sample(&mut self.logits(&tokens), ask);
            let next = next.expect("the script's logits are finite").token;
            tokens.push(next);
            history.push(next);
        }
        tokens.split_off(prompt.len())
    }

    /// Writes KV of the positions `range` of `history` into the blocks of `tables`, one for each group, as a peer's
    /// one-sided writes would; what is gone is left out.
    pub fn land(&self, tables: &[Vec<BlockId>], history: &[TokenId], range: Range<usize>) {
        let mut memory = self.lock();
        let before = history[..range.start].iter().fold(START, |hash, &token| extend(hash, token));
        for (group, table) in tables.iter().enumerate() {
            self.write_from(&mut memory, group, table, range.start, &history[range.clone()], before);
        }
    }

    /// Copies a block out of another engine's memory into this one's, as a transfer would.
    pub fn copy_block(&self, from: &Script, source: BlockId, target: BlockId) {
        let copied: Vec<_> = {
            let memory = from.lock();
            (0..self.block_size).map(|slot| memory.slots.get(&(source, slot)).copied()).collect()
        };
        let mut memory = self.lock();
        for (slot, value) in copied.into_iter().enumerate() {
            match value {
                Some(value) => memory.slots.insert((target, slot), value),
                None => memory.slots.remove(&(target, slot)),
            };
        }
    }

    /// How often a run read a slot that was not written for its position, history and group.
    pub fn bad_reads(&self) -> usize {
        self.lock().bad_reads
    }

    #[cfg(test)]
    pub(crate) fn save(&self, block: BlockId) -> Saved {
        let memory = self.lock();
        Saved((0..self.block_size).map(|slot| memory.slots.get(&(block, slot)).copied()).collect())
    }

    #[cfg(test)]
    pub(crate) fn restore(&self, block: BlockId, saved: &Saved) {
        let mut memory = self.lock();
        for (slot, &value) in saved.0.iter().enumerate() {
            match value {
                Some(value) => memory.slots.insert((block, slot), value),
                None => memory.slots.remove(&(block, slot)),
            };
        }
    }

    /// Overwrites a block with rubbish, as a write that comes too late would.
    pub fn scribble(&self, block: BlockId) {
        let mut memory = self.lock();
        for slot in 0..self.block_size {
            memory.slots.insert((block, slot), Slot { token: TokenId(u32::MAX), history: u64::MAX, group: 0 });
        }
    }

    /// The next run fails.
    pub fn fail_next_run(&self) {
        self.lock().fault = Some(Fault::Error);
    }

    /// The next run panics.
    pub fn panic_in_next_run(&self) {
        self.lock().fault = Some(Fault::Panic);
    }

    /// How many tokens each run so far was asked to compute.
    pub fn runs(&self) -> Vec<usize> {
        self.lock().runs.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, table: &[BlockId], position: usize) -> (BlockId, usize) {
        (table[position / self.block_size], position % self.block_size)
    }

    fn write(&self, memory: &mut Memory, input: &SeqInput<'_>) {
        for (group, table) in input.tables.iter().enumerate() {
            let before = match input.start {
                0 => START,
                // An empty slot stands for whatever was in memory: any value but the right one.
                start => memory.slots.get(&self.slot(table, start - 1)).map_or(!START, |slot| slot.history),
            };
            self.write_from(memory, group, table, input.start, input.tokens, before);
        }
    }

    fn write_from(
        &self,
        memory: &mut Memory,
        group: usize,
        table: &[BlockId],
        start: usize,
        tokens: &[TokenId],
        before: u64,
    ) {
        let mut history = before;
        for (position, &token) in (start..).zip(tokens) {
            history = extend(history, token);
            let (block, slot) = self.slot(table, position);
            if block != BlockId::GONE {
                memory.slots.insert((block, slot), Slot { token, history, group });
            }
        }
    }

    /// The hash of the first `len` tokens as they stand in the blocks; something else if any slot that the last of them
    /// sees is not what was written there for this history and group.
    fn read(&self, memory: &Memory, groups: &KvGroups, tables: &[Vec<BlockId>], len: usize) -> u64 {
        self.try_read(memory, groups, tables, len).unwrap_or_else(|| mix(len as u64))
    }

    fn try_read(&self, memory: &Memory, groups: &KvGroups, tables: &[Vec<BlockId>], len: usize) -> Option<u64> {
        let one = |(group, table): (usize, &Vec<BlockId>)| {
            let first = match groups[group].kind {
                GroupKind::Sliding { window } => len.saturating_sub(window as usize),
                GroupKind::Full | GroupKind::Recurrent => 0,
            };
            // The first token that is seen tells what was before it, if anything was.
            let mut history = (first == 0).then_some(START);
            for position in first..len {
                let slot = memory.slots.get(&self.slot(table, position)).filter(|slot| slot.group == group)?;
                if history.is_some_and(|before| slot.history != extend(before, slot.token)) {
                    return None;
                }
                history = Some(slot.history);
            }
            history
        };
        let mut read = tables.iter().enumerate().map(one);
        let first = read.next()??;
        read.all(|other| other == Some(first)).then_some(first)
    }

    /// Noise, with one token well above it.
    fn row(&self, history: u64) -> Vec<f32> {
        let noise = |token: u64| (mix(history ^ mix(token + 1)) >> 40) as f32 / (1u32 << 24) as f32;
        let mut row: Vec<f32> = (0..self.vocab as u64).map(noise).collect();
        row[(history % self.vocab as u64) as usize] += 2.0;
        row
    }
}

fn extend(history: u64, token: TokenId) -> u64 {
    mix(history.rotate_left(17) ^ (u64::from(token.0) + 1))
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script").field("vocab", &self.vocab).finish_non_exhaustive()
    }
}
