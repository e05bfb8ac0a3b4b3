//! The engine proper: commands in, one step at a time, events out. No thread, no clock.

use std::{
    any::Any,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use kvasir_kv_cache::{Batch, Geometry, Leaving, OnEvict, Snapshot};
use kvasir_model::{Need, Row, Rows, SeqInput};
use kvasir_types::{BlockHash, BlockId, KvGroups, KvLayout, TokenId};

use crate::{
    Config, Constraints, Duty, Error, Event, Intake, LayerDone, LayerSink, Mask, Mode, NewSequence, Proposer, Runner,
    RunnerSpec, Sampler, SeqId, Spill, Stats,
    constrain::{Constrained, MaskThreads},
    scheduler::{Adopted, Scheduler, Work},
    sequence::{Key, State},
};

/// What callers can ask for. Commands for sequences that are unknown, ended, or not in the state the command is for are
/// ignored: they come from other threads and may cross with events on their way.
pub enum Command {
    /// A request that passed the [`Intake`].
    Admit(NewSequence),
    /// The first so many prompt tokens of a held sequence have valid KV now.
    Landed(SeqId, usize),
    /// Compute the rest of a held sequence's prompt here. Before `Admitted`: as soon as it is.
    Compute(SeqId, Option<Box<dyn LayerSink>>),
    /// Compute the first so many tokens of a held sequence's prompt, while peers may still write the blocks behind them; what is to
    /// become of these is said with `Landed` and `Compute`.
    ComputeUntil(SeqId, Option<Box<dyn LayerSink>>, usize),
    /// The whole prompt of a held sequence landed, and this is the first token of its answer.
    Resume(SeqId, TokenId),
    /// Drop the sequence with all its choices, in whatever state it is.
    Abort(SeqId),
    /// Give back the blocks of a finished `PrefillOnly` sequence.
    Release(SeqId),
    /// Tell the changes of the prefix cache since the last time.
    CacheEvents(Box<dyn FnOnce(Batch) + Send>),
    /// Tell all that is in the prefix cache.
    CacheSnapshot(Box<dyn FnOnce(Snapshot) + Send>),
    /// Keep those of these blocks (names in group 0) that are in the prefix cache as they are, and say which and where.
    Pin(Vec<BlockHash>, Box<dyn FnOnce(PinId, Vec<Option<BlockId>>) + Send>),
    /// Nobody reads the blocks of that pin any more.
    Unpin(PinId),
    /// Only for the thread: end all sequences and leave.
    Shutdown,
}

/// Names blocks that are kept for somebody outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PinId(pub(crate) u64);

/// Whether another step makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Something was computed or changed: step again.
    Busy,
    /// Nothing can be done before the next command.
    Idle,
}

/// What an engine is made of besides its settings.
pub struct Parts {
    /// Computes.
    pub runner: Box<dyn Runner>,
    /// Compiles grammars; without it, requests for answers of a form are refused.
    pub constraints: Option<Arc<dyn Constraints>>,
    /// Guesses how answers go on, if anything does.
    pub proposer: Option<Box<dyn Proposer>>,
    /// Keeps what preempted sequences have computed, if anything does.
    pub spill: Option<Box<dyn Spill>>,
    /// Hears of blocks that leave the prefix cache, on the engine's thread, so it must not block.
    pub on_evict: Option<Box<dyn OnEvict>>,
}

impl<R: Runner + 'static> From<Box<R>> for Parts {
    fn from(runner: Box<R>) -> Self {
        Self { runner, constraints: None, proposer: None, spill: None, on_evict: None }
    }
}

/// One whose panics are its own loss.
#[derive(Debug)]
struct Guarded(Box<dyn OnEvict>);

impl OnEvict for Guarded {
    fn evicted(&mut self, leaving: &Leaving<'_>) {
        let _its_own_loss = catch_unwind(AssertUnwindSafe(|| self.0.evicted(leaving)));
    }
}

/// Fewest prompt tokens in a step that tell how long prompts take.
const TIMED_TOKENS: usize = 64;

/// What the last step computed, in tokens.
#[derive(Default)]
struct LastStep {
    prompts: usize,
    /// Sum of the prompts' tokens' places.
    positions: u64,
    all: usize,
    /// Answers, and the tokens they look back at.
    answers: u64,
    context: u64,
}

/// Continuous batching over one [`Runner`] and one pool of blocks.
pub struct Engine {
    runner: Box<dyn Runner>,
    pub(crate) spec: RunnerSpec,
    intake: Intake,
    pub(crate) scheduler: Scheduler,
    pub(crate) proposer: Option<Box<dyn Proposer>>,
    sampler: Sampler,
    mask_threads: MaskThreads,
    last_step: LastStep,
    /// The runner said that it is of no use any more.
    broken: bool,
}

impl Engine {
    /// An engine for a pool of `blocks` blocks of the given layout.
    pub fn new(config: Config, layout: KvLayout, blocks: usize, parts: impl Into<Parts>) -> Self {
        let Parts { runner, constraints, proposer, spill, on_evict } = parts.into();
        let block_size = layout.block_size as usize;
        let config = config.effective(block_size);
        let spec = runner.spec().clone();
        let geometry = Geometry::new(block_size, &spec.groups);
        let mask_threads = if constraints.is_some() { config.mask_threads } else { 0 };
        let mask_threads = MaskThreads::new(mask_threads, config.max_running);
        let intake = Intake::new(&config, geometry.clone(), blocks, &spec, constraints);
        let mut scheduler = Scheduler::new(config, geometry.clone(), blocks, spill);
        scheduler.cache.on_evict(on_evict.map(|hears| Box::new(Guarded(hears)) as Box<dyn OnEvict>));
        // A state that sums up all that was before can't go back behind a draft that was wrong.
        let proposer = proposer.filter(|_| geometry.has_prefixes());
        Self {
            runner,
            spec,
            intake,
            scheduler,
            proposer,
            sampler: Sampler::default(),
            mask_threads,
            last_step: LastStep::default(),
            broken: false,
        }
    }

    /// Where requests are checked and become commands.
    pub fn intake(&self) -> &Intake {
        &self.intake
    }

    /// Changes what the engine takes on; see [`Duty`].
    pub fn set_duty(&self, duty: Duty) {
        self.intake.set_duty(duty);
    }

    /// What is going on now, and the totals so far.
    pub fn stats(&self) -> Stats {
        Stats { broken: self.broken, ..self.scheduler.stats() }
    }

    #[cfg(test)]
    pub(crate) fn check(&self) {
        self.scheduler.check();
    }

    /// Obeys a command. Cheap: computing is done by [`step`](Self::step).
    pub fn apply(&mut self, command: Command) {
        match command {
            Command::Admit(new) => self.scheduler.enqueue(new),
            Command::Landed(seq, tokens) => self.scheduler.landed(first(seq), tokens),
            Command::Compute(seq, sink) => self.compute(first(seq), sink),
            Command::ComputeUntil(seq, sink, tokens) => self.scheduler.compute_until(first(seq), sink, tokens),
            Command::Resume(seq, token) => self.resume(first(seq), token),
            Command::Abort(seq) | Command::Release(seq) => self.scheduler.remove(seq),
            Command::CacheEvents(tell) => {
                let batch = self.scheduler.cache.drain_events();
                let _its_own_loss = catch_unwind(AssertUnwindSafe(|| tell(batch)));
            }
            Command::CacheSnapshot(tell) => {
                let snapshot = self.scheduler.cache.snapshot();
                let _its_own_loss = catch_unwind(AssertUnwindSafe(|| tell(snapshot)));
            }
            Command::Pin(hashes, tell) => {
                let (pin, blocks) = self.scheduler.pin(&hashes);
                let _its_own_loss = catch_unwind(AssertUnwindSafe(|| tell(pin, blocks)));
            }
            Command::Unpin(pin) => self.scheduler.unpin(pin),
            Command::Shutdown => self.close(),
        }
    }

    /// Ends every sequence with `Failed`, and refuses new ones.
    pub fn close(&mut self) {
        self.intake.close();
        for seq in self.scheduler.ids() {
            self.scheduler.fail(seq, Error::Closed);
        }
    }

    fn compute(&mut self, key: Key, sink: Option<Box<dyn LayerSink>>) {
        let Some(sequence) = self.scheduler.get_mut(key) else { return };
        if let State::Queued { early, .. } = &mut sequence.state {
            early.get_or_insert(sink);
            return;
        }
        if sequence.landing.is_some() {
            return self.scheduler.all_landed(key);
        }
        let last = sequence.tokens.len() - 1;
        if let Some((sequence, table)) = self.scheduler.unhold(key, last) {
            sequence.state = State::Prefilling(table, sink);
        }
    }

    fn resume(&mut self, key: Key, token: TokenId) {
        let Some(sequence) = self.scheduler.get(key) else { return };
        let State::Held(table) = &sequence.state else { return };
        // One that was brought back is computed, not resumed: its first token has been told.
        if sequence.request.mode != Mode::Generate || !sequence.is_prompt() {
            return;
        }
        if token.0 as usize >= self.spec.vocab {
            let error = Error::UnknownToken { token, vocab: self.spec.vocab };
            return self.scheduler.fail(key.seq, error);
        }
        let (computed, prompt, answers) = (table.computed, sequence.tokens.len(), sequence.request.answers());
        // What did not land after all is computed here, with the first token behind it.
        let landed = computed == prompt;
        if let Some((sequence, table)) = self.scheduler.unhold(key, computed) {
            sequence.state = if landed { State::Decoding(table, None) } else { State::Prefilling(table, None) };
        }
        for choice in 1..answers {
            // The logits after the prompt are not here: the others compute its last token once more.
            self.fork(key, choice, prompt - 1);
        }
        let Some(sequence) = self.scheduler.get_mut(key) else { return };
        match sequence.push(token, &self.spec.eos) {
            Ok(finished) => {
                self.scheduler.advance(key, computed, computed);
                if let Some(reason) = finished {
                    self.scheduler.finish(key, reason);
                }
            }
            Err(error) => self.scheduler.fail(key.seq, error),
        }
    }

    /// Another choice becomes a sequence of its own, which goes on after the first `tokens` tokens.
    fn fork(&mut self, key: Key, choice: u32, tokens: usize) -> Option<Key> {
        let (fork, copies) = self.scheduler.fork(key, choice, tokens)?;
        match self.copy(&copies) {
            Ok(()) => Some(fork),
            Err(error) => {
                self.scheduler.fail(key.seq, error);
                None
            }
        }
    }

    fn copy(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), Error> {
        if copies.is_empty() {
            return Ok(());
        }
        self.take_landed()?;
        match catch_unwind(AssertUnwindSafe(|| self.runner.copy_blocks(copies))) {
            Ok(copied) => copied.map_err(|error| self.failed(error)),
            Err(panic) => Err(Error::RunnerBroken { reason: panic_text(panic.as_ref()) }),
        }
    }

    /// Tells the runner what others have written, before it reads any of it.
    fn take_landed(&mut self) -> Result<(), Error> {
        if self.scheduler.landed_blocks.is_empty() {
            return Ok(());
        }
        match catch_unwind(AssertUnwindSafe(|| self.runner.landed(&self.scheduler.landed_blocks))) {
            Ok(Ok(())) => {
                self.scheduler.landed_blocks.clear();
                Ok(())
            }
            Ok(Err(error)) => Err(self.failed(error)),
            Err(panic) => Err(Error::RunnerBroken { reason: panic_text(panic.as_ref()) }),
        }
    }

    /// What the runner could not do. After some errors it can't do anything: then nobody is let in any more.
    fn failed(&mut self, error: kvasir_model::Error) -> Error {
        if error.is_fatal() {
            self.broken = true;
            self.intake.close();
        }
        Error::Runner(Arc::new(error))
    }

    /// How long the last [`step`](Self::step) took: for the statistics ([`crate::PrefillTimes`]).
    pub fn took(&mut self, time: Duration) {
        let LastStep { prompts, positions, all, answers, context } = std::mem::take(&mut self.last_step);
        if prompts >= TIMED_TOKENS.min(self.scheduler.config().chunk_tokens) {
            let times = &mut self.scheduler.totals.prefill;
            times.tokens += prompts as u64;
            times.positions += positions;
            times.time += time.mul_f64(prompts as f64 / all as f64);
        }
        if all > prompts {
            let times = &mut self.scheduler.totals.decode;
            times.steps += 1;
            times.time += time;
            if prompts == 0 {
                times.plain.steps += 1;
                times.plain.time += time;
                times.plain.answers += answers;
                times.plain.context += context;
            }
        }
    }

    /// Plans a step, computes it, tells what came out.
    pub fn step(&mut self) -> Progress {
        self.last_step = LastStep::default();
        if self.broken {
            for seq in self.scheduler.ids() {
                self.scheduler.fail(seq, Error::Closed);
            }
            return Progress::Idle;
        }
        self.scheduler.duty = self.intake.duty();
        self.scheduler.limit(self.intake.limits());
        let adopted = self.scheduler.adopt();
        let took_over = !adopted.is_empty();
        for part in adopted {
            self.take_over(part);
        }
        let (mut work, changed) = self.scheduler.plan();
        if work.is_empty() {
            return if changed || took_over { Progress::Busy } else { Progress::Idle };
        }
        self.speculate(&mut work);
        match self.run(&work) {
            Ok(rows) => self.settle(&work, rows),
            Err(error) => {
                for work in work {
                    self.scheduler.fail(work.key.seq, error.clone());
                }
            }
        }
        Progress::Busy
    }

    /// Part of a watched prompt comes from another sequence: its own blocks get the same contents, and its sink hears of them
    /// as if they had been computed.
    fn take_over(&mut self, Adopted { key, copies, tokens }: Adopted) {
        if let Err(error) = self.copy(&copies) {
            return self.scheduler.fail(key.seq, error);
        }
        let (groups, block_size) = (&self.spec.groups, self.scheduler.block_size);
        let Some(State::Prefilling(table, Some(sink))) = self.scheduler.get_mut(key).map(|s| &mut s.state) else {
            return self.scheduler.advance(key, tokens.end, tokens.end);
        };
        let told = catch_unwind(AssertUnwindSafe(|| {
            for layer in 0..groups.layers() {
                sink.layer_done(layer_done(groups, layer, table.ids(), tokens.clone(), block_size));
            }
        }));
        match told {
            Ok(()) => self.scheduler.advance(key, tokens.end, tokens.end),
            Err(_) => self.scheduler.fail(key.seq, Error::SinkPanicked),
        }
    }

    /// Computes the batch. Sequences whose layer sink panicked are ended here.
    fn run(&mut self, work: &[Work]) -> Result<Rows, Error> {
        self.take_landed()?;
        for item in work.iter().filter(|item| item.last) {
            if let Some(constrained) = self.scheduler.get_mut(item.key).and_then(|s| s.constrained.as_mut()) {
                constrained.send(&item.drafts, &self.mask_threads);
            }
        }
        // Sinks leave their sequences for the run: the batch borrows these, the callback writes to those.
        let mut watchers: Vec<(&Work, Box<dyn LayerSink>)> = Vec::new();
        for item in work {
            if let Some(State::Prefilling(_, sink)) = self.scheduler.get_mut(item.key).map(|s| &mut s.state) {
                watchers.extend(sink.take().map(|sink| (item, sink)));
            }
        }
        let mut broken: Vec<SeqId> = Vec::new();
        let (scheduler, groups, block_size) = (&self.scheduler, &self.spec.groups, self.scheduler.block_size);
        let sequence = |item: &Work| scheduler.get(item.key).expect("work is planned for live sequences");
        let tables = |item: &Work| sequence(item).table().expect("live sequences have a table").ids();
        let with_drafts = |item: &Work| [&sequence(item).tokens[item.tokens.clone()], &item.drafts].concat();
        let runs: Vec<Option<Vec<TokenId>>> =
            work.iter().map(|item| (!item.drafts.is_empty()).then(|| with_drafts(item))).collect();
        let mut batch: Vec<SeqInput<'_>> = Vec::with_capacity(work.len());
        for (item, run) in work.iter().zip(&runs) {
            let tokens = run.as_deref().unwrap_or_else(|| &sequence(item).tokens[item.tokens.clone()]);
            batch.push(SeqInput { tokens, start: item.tokens.start, tables: tables(item), rows: item.rows() });
        }
        let need = |item: &Work, row| sequence(item).need(&self.spec, row);
        let needs = work.iter().flat_map(|item| (0..item.rows()).map(move |row| (item, row)));
        let needs: Vec<Need> = needs.map(|(item, row)| need(item, row)).collect();
        let mut after_layer = |layer: usize| {
            for (item, sink) in &mut watchers {
                let done = layer_done(groups, layer, tables(item), item.tokens.clone(), block_size);
                let seq = item.key.seq;
                if !broken.contains(&seq) && catch_unwind(AssertUnwindSafe(|| sink.layer_done(done))).is_err() {
                    broken.push(seq);
                }
            }
        };
        let result = catch_unwind(AssertUnwindSafe(|| self.runner.run_few(&batch, &needs, &mut after_layer)));
        for (item, sink) in watchers {
            if let Some(State::Prefilling(_, place)) = self.scheduler.get_mut(item.key).map(|s| &mut s.state) {
                *place = Some(sink);
            }
        }
        for seq in broken {
            self.scheduler.fail(seq, Error::SinkPanicked);
        }
        let computed = match result {
            Ok(computed) => computed.map_err(|error| self.failed(error))?,
            Err(panic) => return Err(Error::RunnerBroken { reason: panic_text(panic.as_ref()) }),
        };
        let (vocab, rows) = (self.spec.vocab, work.iter().map(Work::rows).sum::<usize>());
        if (computed.vocab(), computed.len()) != (vocab, rows) {
            let (of, came) = (computed.vocab(), computed.len());
            let reason = format!("{came} rows of {of} logits where {rows} of {vocab} are due");
            return Err(Error::RunnerBroken { reason: reason.into() });
        }
        Ok(computed)
    }

    /// The batch is computed: seals blocks, chooses tokens.
    fn settle(&mut self, work: &[Work], mut rows: Rows) {
        let mut next = 0;
        self.scheduler.totals.steps += 1;
        for item in work {
            let first = next;
            next += item.rows();
            let Some(sequence) = self.scheduler.get(item.key) else { continue };
            self.last_step.all += item.tokens.len() + item.drafts.len();
            if matches!(sequence.state, State::Prefilling(..)) {
                self.last_step.prompts += item.tokens.len();
                self.last_step.positions += item.tokens.clone().map(|at| at as u64).sum::<u64>();
                self.scheduler.totals.prefilled_tokens += item.tokens.len() as u64;
                self.scheduler.totals.prefilled_prompts += u64::from(item.last);
            } else {
                self.last_step.answers += 1;
                self.last_step.context += item.tokens.end as u64;
            }
            self.scheduler.advance(item.key, item.tokens.end, item.tokens.end);
            if item.last {
                self.next_tokens(item, &mut rows, first);
            }
        }
    }

    /// Chooses the next token, and as long as it is what was drafted, the one after. Its rows are those from `first` on.
    fn next_tokens(&mut self, item: &Work, rows: &mut Rows, first: usize) {
        let Some(sequence) = self.scheduler.get_mut(item.key) else { return };
        let masks = match sequence.constrained.as_mut().map(Constrained::receive).transpose() {
            Ok(masks) => masks,
            Err(error) => return self.scheduler.fail(item.key.seq, error),
        };
        // A draft that its grammar does not allow has no mask after it, and is not chosen.
        let mask = |at: usize| masks.as_ref().and_then(|masks| masks.get(at));
        if sequence.is_prompt() && item.key.choice == 0 {
            for choice in 1..sequence.request.answers() {
                if let Some(fork) = self.fork(item.key, choice, item.tokens.end) {
                    match rows.row(first) {
                        // Choosing uses it up.
                        Some(Row::Whole(row)) => self.next_token(fork, Row::Whole(&mut row.to_vec()), mask(0)),
                        Some(few) => self.next_token(fork, few, mask(0)),
                        None => None,
                    };
                }
            }
        }
        let mut accepted = 0;
        for at in 0..item.rows() {
            let Some(row) = rows.row(first + at) else { break };
            let Some(token) = self.next_token(item.key, row, mask(at)) else { break };
            if item.drafts.get(at) != Some(&token) {
                break;
            }
            accepted += 1;
            let computed = item.tokens.end + accepted;
            self.scheduler.advance(item.key, computed, computed);
        }
        if !item.drafts.is_empty() {
            self.scheduler.totals.drafted_tokens += item.drafts.len() as u64;
            self.scheduler.totals.accepted_tokens += accepted as u64;
            if let Some(sequence) = self.scheduler.get_mut(item.key) {
                sequence.pace.learn(item.drafts.len(), accepted);
            }
        }
    }

    /// Chooses a token and tells it. `None`: the sequence does not go on.
    fn next_token(&mut self, key: Key, row: Row<'_>, mask: Option<&Mask>) -> Option<TokenId> {
        let sequence = self.scheduler.get_mut(key)?;
        let chosen = self.sampler.sample_row(row, sequence.ask(&self.spec.eos, mask));
        let pushed = chosen.and_then(|sampled| Ok((sequence.push(sampled.token, &self.spec.eos)?, sampled)));
        let mode = sequence.request.mode;
        let (finished, sampled) = match pushed {
            Ok(pushed) => pushed,
            Err(error) => {
                self.scheduler.fail(key.seq, error);
                return None;
            }
        };
        let token = sampled.token;
        let told = self.scheduler.tell(key.seq, Event::Token { choice: key.choice, sampled });
        self.scheduler.begin_answer(key);
        self.scheduler.totals.sampled_tokens += 1;
        match finished {
            _ if !told => self.scheduler.remove(key.seq),
            Some(reason) if mode == Mode::Generate => self.scheduler.finish(key, reason),
            _ => return Some(token),
        }
        None
    }
}

/// The sequence that commands mean: until a prompt is computed there is no other choice than the first.
fn first(seq: SeqId) -> Key {
    Key { seq, choice: 0 }
}

/// What a sink is told of one layer of a chunk.
fn layer_done<'a>(
    groups: &KvGroups,
    layer: usize,
    tables: &'a [Vec<BlockId>],
    tokens: Range<usize>,
    block_size: usize,
) -> LayerDone<'a> {
    let (group, place) = groups.place(layer);
    let end = tokens.end.div_ceil(block_size).min(tables[group].len());
    let first_block = (tokens.start / block_size).min(end);
    let blocks = &tables[group][first_block..end];
    LayerDone { layer, layers: groups.layers(), group, place, first_block, blocks, tokens }
}

fn panic_text(panic: &(dyn Any + Send)) -> Arc<str> {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("panicked").into()
}
