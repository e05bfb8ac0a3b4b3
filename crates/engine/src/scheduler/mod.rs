//! Who gets blocks, and who gets computed in the next step.
//!
//! ```text
//!   waiting ──admission──▶ live (has blocks) ──▶ ended
//!      ▲                     │
//!      └──── preemption ─────┘
//! ```
//!
//! Everybody has a [`Turn`]: online before offline, then by age. The rules, in the order in which a step applies them:
//!
//! 1. offline sequences that have waited long enough become online ones (`admission`);
//! 2. prompts take over what others have computed of the same tokens meanwhile (`sharing`);
//! 3. every decoding sequence gets one token, in order of turns; one that needs a block and finds none takes it from the
//!    last in order that may lose its blocks (see [`Sequence::is_preemptible`]), which is possibly itself (`plan`);
//! 4. those who wait get blocks in order of turns; the first that does not fit stops the line, unless sequences of a lower
//!    class give way to it (`admission`);
//! 5. what is left of the token budget goes to prompts, in order of turns, in chunks that end at block boundaries; one
//!    whose next block is being computed by another in this very step waits for it (`sharing`).
//!
//! Why this ends: the first in order that runs is never a victim of another, and takes from everybody else; waiting long
//! enough makes anybody the first; a sequence that holds the whole pool and wants more is finished with `Length` (its pool
//! is its context; the door lets nobody in who asked for more); a sequence that preempted itself waits first in line for blocks of sequences that their callers hold;
//! and whoever waits for another's blocks waits for one that got work in the same step.

mod admission;
mod plan;
mod sharing;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
};

use kvasir_kv_cache::{Geometry, KvCache, Sealed, Table};
use kvasir_types::{BlockHash, BlockId, FinishReason, GroupKind};

pub(crate) use self::{plan::Work, sharing::Adopted};
use crate::{
    Config, Duty, Error, Event, EventSink, Limits, NewSequence, PinId, Priority, SeqId, Spill, Stats,
    sequence::{Key, Landing, Sequence, State, Turn, Watcher},
};

/// Whom to tell, and how many choices have not ended.
struct Voice {
    events: Box<dyn EventSink>,
    left: u32,
}

/// The sequences and the blocks.
pub(crate) struct Scheduler {
    config: Config,
    pub block_size: usize,
    pub cache: KvCache,
    /// Everybody; in `waiting` or in `live`, as their state says.
    sequences: BTreeMap<Key, Sequence>,
    /// Without blocks, in order of turns: the first is the next to be admitted.
    waiting: BTreeSet<Turn>,
    /// With blocks, in order of turns.
    live: BTreeSet<Turn>,
    voices: HashMap<SeqId, Voice>,
    /// Blocks of sequences that failed while peers were writing into them, until their callers let go.
    stranded: HashMap<SeqId, Table>,
    /// Blocks that somebody outside reads.
    pins: HashMap<PinId, Vec<Sealed>>,
    next_pin: u64,
    pub duty: Duty,
    spill: Option<Box<dyn Spill>>,
    /// Blocks that others have written since the runner was told last.
    pub landed_blocks: Vec<BlockId>,
    /// Steps planned so far: the only clock there is.
    steps: u64,
    /// The totals among the statistics; the rest is counted when asked for.
    pub totals: Stats,
}

/// The blocks of a table, in all groups, that are there and have these numbers.
fn written(table: &Table, numbers: Range<usize>) -> impl Iterator<Item = BlockId> {
    let of_group = move |ids: &'_ Vec<BlockId>| {
        let end = numbers.end.min(ids.len());
        ids[numbers.start.min(end)..end].to_vec()
    };
    table.ids().iter().flat_map(of_group).filter(|block| *block != BlockId::GONE).collect::<Vec<_>>().into_iter()
}

impl Scheduler {
    pub fn new(config: Config, geometry: Geometry, blocks: usize, spill: Option<Box<dyn Spill>>) -> Self {
        Self {
            block_size: geometry.block_size(),
            cache: KvCache::new(geometry, blocks, config.cache_events),
            config,
            sequences: BTreeMap::new(),
            waiting: BTreeSet::new(),
            live: BTreeSet::new(),
            voices: HashMap::new(),
            stranded: HashMap::new(),
            pins: HashMap::new(),
            next_pin: 0,
            duty: Duty::Mixed,
            spill,
            landed_blocks: Vec::new(),
            steps: 0,
            totals: Stats::default(),
        }
    }

    /// The settings, as far as they concern steps.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Goes on with other limits.
    pub fn limit(&mut self, limits: Limits) {
        (self.config.max_batch_tokens, self.config.offline_patience) =
            (limits.max_batch_tokens, limits.offline_patience);
    }

    /// Takes a sequence into the queue.
    pub fn enqueue(&mut self, new: NewSequence) {
        let NewSequence { mut sequence, events } = new;
        sequence.waits_since = self.steps;
        let left = sequence.request.answers();
        self.voices.insert(sequence.key.seq, Voice { events, left });
        self.waiting.insert(sequence.turn());
        self.sequences.insert(sequence.key, *sequence);
    }

    /// A sequence, whatever it is doing.
    pub fn get(&self, key: Key) -> Option<&Sequence> {
        self.sequences.get(&key)
    }

    /// The same, to change.
    pub fn get_mut(&mut self, key: Key) -> Option<&mut Sequence> {
        self.sequences.get_mut(&key)
    }

    /// Every request.
    pub fn ids(&self) -> Vec<SeqId> {
        self.voices.keys().copied().collect()
    }

    /// KV of the first `tokens` tokens of a live sequence is there, and complete for good for the first `sealable` ones.
    pub fn advance(&mut self, key: Key, tokens: usize, sealable: usize) {
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        sequence.advance(tokens);
        if self.config.prefix_cache {
            sequence.seal(sealable, &mut self.cache);
        }
    }

    /// Keeps the blocks of these names in group 0 that can be found, for somebody outside to read.
    pub fn pin(&mut self, hashes: &[BlockHash]) -> (PinId, Vec<Option<BlockId>>) {
        let pin = PinId(self.next_pin);
        self.next_pin += 1;
        let mut shares = Vec::new();
        let mut pin_one = |hash| {
            let share = self.cache.hold(hash)?;
            let block = share.id();
            shares.push(share);
            Some(block)
        };
        let blocks = hashes.iter().map(&mut pin_one).collect();
        if !shares.is_empty() {
            self.pins.insert(pin, shares);
        }
        (pin, blocks)
    }

    /// Nobody outside reads them any more.
    pub fn unpin(&mut self, pin: PinId) {
        // The last one first, as a sequence gives them back.
        for share in self.pins.remove(&pin).unwrap_or_default().into_iter().rev() {
            self.cache.let_go(share);
        }
    }

    /// Takes one choice out, whatever it is doing, and gives its blocks back.
    fn take_out(&mut self, key: Key) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&key)?;
        let turn = sequence.turn();
        if !self.live.remove(&turn) {
            self.waiting.remove(&turn);
        }
        if let Some(table) = sequence.take_table() {
            self.cache.give_back(table);
        }
        Some(sequence)
    }

    /// Drops a request with all its choices, untold.
    pub fn remove(&mut self, seq: SeqId) {
        let range = Key { seq, choice: 0 }..=Key { seq, choice: u32::MAX };
        let choices: Vec<Key> = self.sequences.range(range).map(|(&key, _)| key).collect();
        // The last choice first: the first one's blocks are the most likely to be asked for again.
        for key in choices.into_iter().rev() {
            self.take_out(key);
        }
        if let Some(table) = self.stranded.remove(&seq) {
            self.cache.give_back(table);
        }
        self.voices.remove(&seq);
    }

    /// Ends one choice; told after its blocks are free again.
    pub fn finish(&mut self, key: Key, reason: FinishReason) {
        if self.take_out(key).is_none() {
            return;
        }
        let Some(voice) = self.voices.get_mut(&key.seq) else { return };
        voice.left -= 1;
        let left = voice.left;
        let told = self.tell(key.seq, Event::Finished { choice: key.choice, reason, left });
        if left == 0 {
            self.totals.finished += 1;
            self.voices.remove(&key.seq);
        } else if !told {
            self.remove(key.seq);
        }
    }

    /// Ends a request with all its choices; told after its blocks are free again.
    pub fn fail(&mut self, seq: SeqId, error: Error) {
        let Some(voice) = self.voices.remove(&seq) else { return };
        let key = Key { seq, choice: 0 };
        if let Some(sequence) = self.sequences.get_mut(&key).filter(|s| s.landing.is_some_and(|landing| landing.open)) {
            let (turn, table) = (sequence.turn(), sequence.take_table());
            self.live.remove(&turn);
            self.sequences.remove(&key);
            self.stranded.extend(table.map(|table| (seq, table)));
        } else {
            self.remove(seq);
        }
        self.totals.failed += 1;
        self.voices.insert(seq, voice);
        let _gone_either_way = self.tell(seq, Event::Failed(error));
        self.voices.remove(&seq);
    }

    /// Tells the caller. False: the sink panicked, and there is nobody left to work for.
    #[must_use]
    pub fn tell(&mut self, seq: SeqId, event: Event) -> bool {
        let Some(voice) = self.voices.get_mut(&seq) else { return false };
        catch_unwind(AssertUnwindSafe(|| voice.events.event(event))).is_ok()
    }

    /// The first `tokens` tokens of a held sequence landed.
    pub fn landed(&mut self, key: Key, tokens: usize) {
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        let known = sequence.tokens.len();
        if let Some(landing) = sequence.landing.as_mut().filter(|landing| landing.open) {
            landing.end = (tokens.min(known - 1) / self.block_size * self.block_size).max(landing.end);
            return;
        }
        let State::Held(table) = &mut sequence.state else { return };
        let landed = if tokens >= known { known } else { tokens / self.block_size * self.block_size };
        let before = table.computed;
        // A sliding group's table has room for the end of the prompt only: a part that leaves out its window is no use.
        if landed <= before || !self.cache.covers(table, landed) {
            return;
        }
        self.cache.fence(table, landed.div_ceil(self.block_size));
        self.totals.landed_tokens += (landed - before) as u64;
        self.landed_blocks.extend(written(table, before / self.block_size..landed.div_ceil(self.block_size)));
        // The block of the last token stays open: if the first output token never comes, `compute` computes the last
        // prompt token here, which writes to that block once more.
        self.advance(key, landed, landed.min(known - 1));
    }

    /// Computes a held sequence up to `tokens`, while peers may still write behind that.
    pub fn compute_until(&mut self, key: Key, sink: Watcher, tokens: usize) {
        let block_size = self.block_size;
        // Of a window or a state, what lies behind says nothing about what comes before it.
        let whole = self.cache.geometry().kinds().iter().all(|kind| *kind == GroupKind::Full);
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        let start = tokens.min(sequence.tokens.len() - 1) / block_size * block_size;
        let State::Held(table) = &sequence.state else { return };
        if !whole || start <= table.computed {
            return;
        }
        if let Some(mut table) = sequence.take_table() {
            self.cache.fence(&mut table, start / block_size);
            sequence.landing = Some(Landing { start, end: start, open: true });
            sequence.state = State::Prefilling(table, sink);
        }
    }

    /// Nobody writes any more behind what such a sequence computes.
    pub fn all_landed(&mut self, key: Key) {
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        let (Some(landing), Some(table)) = (&mut sequence.landing, sequence.state.table_mut()) else { return };
        landing.open = false;
        self.cache.fence(table, usize::MAX);
        self.totals.landed_tokens += (landing.end - landing.start) as u64;
        self.take_landed(key);
    }

    /// A sequence that has come to what landed goes on behind it.
    pub(super) fn take_landed(&mut self, key: Key) {
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        let Some(landing) = sequence.landing.filter(|landing| !landing.open) else { return };
        let computed = sequence.table().map_or(0, |table| table.computed);
        if computed >= landing.start {
            sequence.landing = None;
            if landing.end > computed {
                let blocks = computed / self.block_size..landing.end.div_ceil(self.block_size);
                self.landed_blocks
                    .extend(sequence.table().into_iter().flat_map(|table| written(table, blocks.clone())));
                self.advance(key, landing.end, landing.end);
            }
        }
    }

    /// Takes the table of a held sequence that is to be computed from its first `computed` tokens on: nobody writes into
    /// it any more.
    pub fn unhold(&mut self, key: Key, computed: usize) -> Option<(&mut Sequence, Table)> {
        let sequence = self.sequences.get_mut(&key)?;
        if !matches!(sequence.state, State::Held(_)) {
            return None;
        }
        let mut table = sequence.take_table()?;
        self.cache.fence(&mut table, usize::MAX);
        table.computed = table.computed.min(computed);
        self.cache.rewind(&mut table);
        Some((sequence, table))
    }

    /// Every token that was known is computed, and the next one sampled.
    pub fn begin_answer(&mut self, key: Key) {
        let Some(sequence) = self.sequences.get_mut(&key) else { return };
        let prefilled = matches!(sequence.state, State::Prefilling(..));
        sequence.after_sampling();
        if prefilled && let Some(table) = sequence.state.table_mut() {
            self.cache.give_back_stock(table);
        }
    }

    /// What is going on now, and the totals so far.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats { blocks: self.cache.counts(), ..self.totals };
        for sequence in self.sequences.values() {
            let tokens = sequence.tokens.len();
            match &sequence.state {
                State::Queued { .. } => {
                    stats.waiting += 1;
                    stats.waiting_tokens += tokens as u64;
                }
                State::Preempted => {
                    stats.preempted += 1;
                    stats.waiting_tokens += tokens as u64;
                }
                State::Held(_) => stats.held += 1,
                State::Parked(_) => stats.parked += 1,
                State::Prefilling(table, _) => {
                    stats.running += 1;
                    stats.prefilling_tokens += tokens.saturating_sub(table.computed) as u64;
                }
                State::Decoding(..) => stats.running += 1,
            }
        }
        stats
    }

    /// The live sequences in a state, in order of turns.
    fn live_where(&self, wanted: impl Fn(&State) -> bool) -> Vec<Key> {
        let state = |turn: &&Turn| self.sequences.get(&turn.key).is_some_and(|sequence| wanted(&sequence.state));
        self.live.iter().filter(state).map(|turn| turn.key).collect()
    }

    /// A block that may be written belongs to one sequence, and the counts agree with the tables.
    #[cfg(test)]
    pub fn check(&self) {
        for (key, sequence) in &self.sequences {
            let (live, waiting) = (self.live.contains(&sequence.turn()), self.waiting.contains(&sequence.turn()));
            assert_eq!((live, waiting), (sequence.table().is_some(), sequence.table().is_none()), "{key:?}");
            assert!(self.voices.contains_key(&key.seq), "{key:?} has nobody to tell");
        }
        assert_eq!(self.live.len() + self.waiting.len(), self.sequences.len());
        for (seq, voice) in &self.voices {
            let choices = self.sequences.keys().filter(|key| key.seq == *seq).count();
            assert!(choices > 0 && voice.left as usize >= choices, "{seq}: {choices} choices, {} left", voice.left);
        }
        let tables = || self.sequences.values().filter_map(Sequence::table).chain(self.stranded.values());
        let mut uses = HashMap::new();
        let all = tables().flat_map(|table| table.open_ids().chain(table.sealed_ids().map(|(.., id)| id)));
        all.chain(self.pins.values().flatten().map(Sealed::id)).for_each(|id| *uses.entry(id).or_insert(0) += 1);
        for id in tables().flat_map(Table::open_ids) {
            assert_eq!(uses[&id], 1, "{id} may be written and is in {} tables", uses[&id]);
        }
        let counts = self.cache.counts();
        assert_eq!(counts.in_use, uses.len());
        assert_eq!(counts.shared, uses.values().filter(|&&uses| uses > 1).count());
        assert_eq!(counts.free + counts.cached + counts.in_use, counts.total);
    }
}
