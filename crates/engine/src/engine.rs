//! The engine proper: commands in, one step at a time, events out. No thread, no clock.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use kvasir_kv_cache::Geometry;
use kvasir_model::{Logits, SeqInput};
use kvasir_types::{KvLayout, TokenId};

use crate::{
    Config, Constraints, Error, Event, Intake, LayerDone, LayerSink, Mask, Mode, NewSequence, Proposer, Runner,
    RunnerSpec, Sampler, SeqId, Stats,
    constrain::{Constrained, MaskThreads},
    scheduler::{Scheduler, Work},
    sequence::State,
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
    /// The whole prompt of a held sequence landed, and this is the first token of its answer.
    Resume(SeqId, TokenId),
    /// Drop the sequence, in whatever state it is.
    Abort(SeqId),
    /// Give back the blocks of a finished `PrefillOnly` sequence.
    Release(SeqId),
    /// Only for the thread: end all sequences and leave.
    Shutdown,
}

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
}

impl<R: Runner + 'static> From<Box<R>> for Parts {
    fn from(runner: Box<R>) -> Self {
        Self { runner, constraints: None, proposer: None }
    }
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
}

impl Engine {
    /// An engine for a pool of `blocks` blocks of the given layout.
    pub fn new(config: Config, layout: KvLayout, blocks: usize, parts: impl Into<Parts>) -> Self {
        let Parts { runner, constraints, proposer } = parts.into();
        let block_size = layout.block_size as usize;
        let config = config.effective(block_size);
        let spec = runner.spec().clone();
        let geometry = Geometry::new(block_size, &spec.groups);
        let mask_threads = if constraints.is_some() { config.mask_threads } else { 0 };
        let mask_threads = MaskThreads::new(mask_threads, config.max_running);
        let intake = Intake::new(&config, geometry.clone(), blocks, &spec, constraints);
        let scheduler = Scheduler::new(config, geometry.clone(), blocks);
        // A state that sums up all that was before can't go back behind a draft that was wrong.
        let proposer = proposer.filter(|_| geometry.has_prefixes());
        Self { runner, spec, intake, scheduler, proposer, sampler: Sampler::default(), mask_threads }
    }

    /// Where requests are checked and become commands.
    pub fn intake(&self) -> &Intake {
        &self.intake
    }

    /// What is going on now, and the totals so far.
    pub fn stats(&self) -> Stats {
        self.scheduler.stats()
    }

    #[cfg(test)]
    pub(crate) fn check(&self) {
        self.scheduler.check();
    }

    /// Obeys a command. Cheap: computing is done by [`step`](Self::step).
    pub fn apply(&mut self, command: Command) {
        match command {
            Command::Admit(new) => self.scheduler.enqueue(*new.0),
            Command::Landed(seq, tokens) => self.scheduler.landed(seq, tokens),
            Command::Compute(seq, sink) => self.compute(seq, sink),
            Command::Resume(seq, first) => self.resume(seq, first),
            Command::Abort(seq) | Command::Release(seq) => drop(self.scheduler.remove(seq)),
            Command::Shutdown => self.close(),
        }
    }

    /// Ends every sequence with `Failed`, and refuses new ones.
    pub fn close(&mut self) {
        self.intake.close();
        for seq in self.scheduler.ids() {
            self.scheduler.end(seq, Event::Failed(Error::Closed));
        }
    }

    fn compute(&mut self, seq: SeqId, sink: Option<Box<dyn LayerSink>>) {
        if let Some(waiting) = self.scheduler.waiting_mut(seq) {
            if let State::Queued { early, .. } = &mut waiting.state {
                early.get_or_insert(sink);
            }
            return;
        }
        let Some(last) = self.scheduler.live(seq).map(|sequence| sequence.tokens.len() - 1) else { return };
        if let Some((sequence, table)) = self.scheduler.unhold(seq, last) {
            sequence.state = State::Prefilling(table, sink);
        }
    }

    fn resume(&mut self, seq: SeqId, first: TokenId) {
        let Some(sequence) = self.scheduler.live_mut(seq) else { return };
        let State::Held(table) = &sequence.state else { return };
        if sequence.request.mode != Mode::Generate {
            return;
        }
        if first.0 as usize >= self.spec.vocab {
            let error = Error::UnknownToken { token: first, vocab: self.spec.vocab };
            return self.scheduler.end(seq, Event::Failed(error));
        }
        let (computed, prompt) = (table.computed, sequence.request.prompt.len());
        let finished = match sequence.push(first, &self.spec.eos) {
            Ok(finished) => finished,
            Err(error) => return self.scheduler.end(seq, Event::Failed(error)),
        };
        if let Some((sequence, table)) = self.scheduler.unhold(seq, computed) {
            // What did not land after all is computed here, with the first token behind it.
            sequence.state =
                if computed == prompt { State::Decoding(table, None) } else { State::Prefilling(table, None) };
        }
        self.scheduler.advance(seq, computed, computed);
        if let Some(reason) = finished {
            self.scheduler.end(seq, Event::Finished(reason));
        }
    }

    /// Plans a step, computes it, tells what came out.
    pub fn step(&mut self) -> Progress {
        let (mut work, changed) = self.scheduler.plan();
        if work.is_empty() {
            return if changed { Progress::Busy } else { Progress::Idle };
        }
        self.speculate(&mut work);
        match self.run(&work) {
            Ok(logits) => self.settle(&work, logits),
            Err(error) => {
                for work in work {
                    self.scheduler.end(work.seq, Event::Failed(error.clone()));
                }
            }
        }
        Progress::Busy
    }

    /// Computes the batch. Sequences whose layer sink panicked are ended here.
    fn run(&mut self, work: &[Work]) -> Result<Logits, Error> {
        for item in work.iter().filter(|item| item.last) {
            if let Some(constrained) = self.scheduler.live_mut(item.seq).and_then(|s| s.constrained.as_mut()) {
                constrained.send(&item.drafts, &self.mask_threads);
            }
        }
        // Sinks leave their sequences for the run: the batch borrows these, the callback writes to those.
        let mut watchers: Vec<(&Work, Box<dyn LayerSink>)> = Vec::new();
        for item in work {
            if let Some(State::Prefilling(_, sink)) = self.scheduler.live_mut(item.seq).map(|s| &mut s.state) {
                watchers.extend(sink.take().map(|sink| (item, sink)));
            }
        }
        let mut broken: Vec<SeqId> = Vec::new();
        let scheduler = &self.scheduler;
        let block_size = scheduler.block_size;
        let sequence = |item: &Work| scheduler.live(item.seq).expect("work is planned for live sequences");
        let tables = |item: &Work| sequence(item).table().expect("live sequences have a table").ids();
        let with_drafts = |item: &Work| [&sequence(item).tokens[item.tokens.clone()], &item.drafts].concat();
        let runs: Vec<Option<Vec<TokenId>>> =
            work.iter().map(|item| (!item.drafts.is_empty()).then(|| with_drafts(item))).collect();
        let mut batch: Vec<SeqInput<'_>> = Vec::with_capacity(work.len());
        for (item, run) in work.iter().zip(&runs) {
            let tokens = run.as_deref().unwrap_or_else(|| &sequence(item).tokens[item.tokens.clone()]);
            batch.push(SeqInput { tokens, start: item.tokens.start, tables: tables(item), rows: item.rows() });
        }
        let groups = &self.spec.groups;
        let mut after_layer = |layer: usize| {
            let (group, place) = groups.place(layer);
            for (item, sink) in &mut watchers {
                let table = &tables(item)[group];
                let end = item.tokens.end.div_ceil(block_size).min(table.len());
                let first_block = (item.tokens.start / block_size).min(end);
                let done = LayerDone {
                    layer,
                    layers: groups.layers(),
                    group,
                    place,
                    first_block,
                    blocks: &table[first_block..end],
                    tokens: item.tokens.clone(),
                };
                if !broken.contains(&item.seq) && catch_unwind(AssertUnwindSafe(|| sink.layer_done(done))).is_err() {
                    broken.push(item.seq);
                }
            }
        };
        let result = catch_unwind(AssertUnwindSafe(|| self.runner.run(&batch, &mut after_layer)));
        for (item, sink) in watchers {
            if let Some(State::Prefilling(_, place)) = self.scheduler.live_mut(item.seq).map(|s| &mut s.state) {
                *place = Some(sink);
            }
        }
        for seq in broken {
            self.scheduler.end(seq, Event::Failed(Error::SinkPanicked));
        }
        let logits = match result {
            Ok(computed) => computed.map_err(|error| Error::Runner(Arc::new(error)))?,
            Err(panic) => return Err(Error::RunnerBroken { reason: panic_text(panic.as_ref()) }),
        };
        let rows: usize = work.iter().map(Work::rows).sum();
        if logits.vocab != self.spec.vocab || logits.rows.len() != rows * logits.vocab {
            let reason = format!("{} logits where {rows} rows of {} are due", logits.rows.len(), self.spec.vocab);
            return Err(Error::RunnerBroken { reason: reason.into() });
        }
        Ok(logits)
    }

    /// The batch is computed: seals blocks, chooses tokens.
    fn settle(&mut self, work: &[Work], logits: Logits) {
        let Logits { vocab, mut rows } = logits;
        let mut rest = rows.as_mut_slice();
        self.scheduler.totals.steps += 1;
        for item in work {
            let (rows, others) = rest.split_at_mut(item.rows() * vocab);
            rest = others;
            let Some(sequence) = self.scheduler.live(item.seq) else { continue };
            if matches!(sequence.state, State::Prefilling(..)) {
                self.scheduler.totals.prefilled_tokens += item.tokens.len() as u64;
            }
            self.scheduler.advance(item.seq, item.tokens.end, item.tokens.end);
            if item.last {
                self.next_tokens(item, rows);
            }
        }
    }

    /// Chooses the next token, and as long as it is what was drafted, the one after.
    fn next_tokens(&mut self, item: &Work, rows: &mut [f32]) {
        let Some(sequence) = self.scheduler.live_mut(item.seq) else { return };
        let masks = match sequence.constrained.as_mut().map(Constrained::receive).transpose() {
            Ok(masks) => masks,
            Err(error) => return self.scheduler.end(item.seq, Event::Failed(error)),
        };
        let mut accepted = 0;
        for (at, row) in rows.chunks_exact_mut(self.spec.vocab).enumerate() {
            // A draft that its grammar does not allow has no mask after it, and is not chosen.
            let mask = masks.as_ref().and_then(|masks| masks.get(at));
            let Some(token) = self.next_token(item.seq, row, mask) else { break };
            if item.drafts.get(at) != Some(&token) {
                break;
            }
            accepted += 1;
            let computed = item.tokens.end + accepted;
            self.scheduler.advance(item.seq, computed, computed);
        }
        if !item.drafts.is_empty() {
            self.scheduler.totals.drafted_tokens += item.drafts.len() as u64;
            self.scheduler.totals.accepted_tokens += accepted as u64;
            if let Some(sequence) = self.scheduler.live_mut(item.seq) {
                sequence.pace.learn(item.drafts.len(), accepted);
            }
        }
    }

    /// Chooses a token and tells it. `None`: the sequence does not go on.
    fn next_token(&mut self, seq: SeqId, row: &mut [f32], mask: Option<&Mask>) -> Option<TokenId> {
        let sequence = self.scheduler.live_mut(seq)?;
        let chosen = self.sampler.sample(row, sequence.ask(&self.spec.eos, mask));
        let pushed = chosen.and_then(|sampled| Ok((sequence.push(sampled.token, &self.spec.eos)?, sampled)));
        let (finished, sampled) = match pushed {
            Ok(pushed) => pushed,
            Err(error) => {
                self.scheduler.end(seq, Event::Failed(error));
                return None;
            }
        };
        let token = sampled.token;
        let told = sequence.tell(Event::Token(sampled));
        let mode = sequence.request.mode;
        self.scheduler.begin_answer(seq);
        self.scheduler.totals.sampled_tokens += 1;
        match finished {
            _ if !told => drop(self.scheduler.remove(seq)),
            Some(reason) if mode == Mode::Generate => self.scheduler.end(seq, Event::Finished(reason)),
            _ => return Some(token),
        }
        None
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> Arc<str> {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("panicked").into()
}
