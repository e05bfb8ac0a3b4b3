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
    Config, Error, Event, Intake, LayerDone, LayerSink, Mode, NewSequence, Runner, RunnerSpec, Sampler, SeqId, Stats,
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

/// Continuous batching over one [`Runner`] and one pool of blocks.
pub struct Engine {
    runner: Box<dyn Runner>,
    spec: RunnerSpec,
    intake: Intake,
    scheduler: Scheduler,
    sampler: Sampler,
}

impl Engine {
    /// An engine for a pool of `blocks` blocks of the given layout.
    pub fn new(config: Config, layout: KvLayout, blocks: usize, runner: Box<dyn Runner>) -> Self {
        let block_size = layout.block_size as usize;
        let config = config.effective(block_size);
        let spec = runner.spec().clone();
        let geometry = Geometry::new(block_size, &spec.groups);
        let intake = Intake::new(&config, geometry.clone(), blocks, &spec);
        let scheduler = Scheduler::new(config, geometry, blocks);
        Self { runner, spec, intake, scheduler, sampler: Sampler::default() }
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
        let finished = sequence.push(first, &self.spec.eos);
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
        let (work, changed) = self.scheduler.plan();
        if work.is_empty() {
            return if changed { Progress::Busy } else { Progress::Idle };
        }
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
        let input = |item: &Work| {
            let sequence = scheduler.live(item.seq).expect("work is planned for live sequences");
            let tables = sequence.table().expect("live sequences have a table").ids();
            SeqInput {
                tokens: &sequence.tokens[item.tokens.clone()],
                start: item.tokens.start,
                tables,
                rows: usize::from(item.last),
            }
        };
        let batch: Vec<SeqInput<'_>> = work.iter().map(input).collect();
        let groups = &self.spec.groups;
        let mut after_layer = |layer: usize| {
            let (group, place) = groups.place(layer);
            for (item, sink) in &mut watchers {
                let table = &input(item).tables[group];
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
        let rows = work.iter().filter(|item| item.last).count();
        if logits.vocab != self.spec.vocab || logits.rows.len() != rows * logits.vocab {
            let reason = format!("{} logits where {rows} rows of {} are due", logits.rows.len(), self.spec.vocab);
            return Err(Error::RunnerBroken { reason: reason.into() });
        }
        Ok(logits)
    }

    /// The batch is computed: seals blocks, chooses tokens.
    fn settle(&mut self, work: &[Work], mut logits: Logits) {
        let mut rows = logits.rows.chunks_exact_mut(logits.vocab.max(1));
        self.scheduler.totals.steps += 1;
        for item in work {
            let row = if item.last { rows.next() } else { None };
            let Some(sequence) = self.scheduler.live(item.seq) else { continue };
            if matches!(sequence.state, State::Prefilling(..)) {
                self.scheduler.totals.prefilled_tokens += item.tokens.len() as u64;
            }
            self.scheduler.advance(item.seq, item.tokens.end, item.tokens.end);
            if let Some(row) = row {
                self.next_token(item.seq, row);
            }
        }
    }

    fn next_token(&mut self, seq: SeqId, row: &mut [f32]) {
        let Some(sequence) = self.scheduler.live_mut(seq) else { return };
        let sampled = match self.sampler.sample(row, sequence.ask(&self.spec.eos)) {
            Ok(sampled) => sampled,
            Err(error) => return self.scheduler.end(seq, Event::Failed(error)),
        };
        let finished = sequence.push(sampled.token, &self.spec.eos);
        let told = sequence.tell(Event::Token(sampled));
        let mode = sequence.request.mode;
        self.scheduler.begin_answer(seq);
        self.scheduler.totals.sampled_tokens += 1;
        match finished {
            _ if !told => drop(self.scheduler.remove(seq)),
            Some(reason) if mode == Mode::Generate => self.scheduler.end(seq, Event::Finished(reason)),
            _ => {}
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> Arc<str> {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("panicked").into()
}
