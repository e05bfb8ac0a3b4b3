//! The engine on its own thread, and the handle to it.
//!
//! Commands travel through one bounded channel. A sequence needs about five in its life, and the number of sequences is
//! bounded by the queue's and the batch's limits; the channel has room for eight for each of them, so a caller that
//! keeps to the protocol never finds it full. If it is full all the same, `admit` refuses and the other commands wait
//! for the step that runs to end, which the engine thread does without waiting for anybody. Event and layer sinks run
//! on that thread and may use the handle, too: their commands go into a list of their own, because a thread that waited
//! for itself to make room would wait for ever.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle, ThreadId},
    time::Instant,
};

use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded};
use kvasir_kv_cache::{Batch, Snapshot};
use kvasir_types::{BlockHash, BlockId, KvLayout, TokenId};

use crate::{
    Command, Config, Duty, Engine, Error, EventSink, Intake, LayerSink, Limits, NewSequence, Parts, PinId, Progress,
    Rejected, Request, SeqId, Stats,
};

/// Room in the channel for each sequence that may be alive.
const COMMANDS_PER_SEQUENCE: usize = 8;

/// Starts an engine on a thread named `engine`. The thread ends when every [`Handle`] is dropped, or after
/// [`Handle::shutdown`]; sequences alive then are told [`Error::Closed`].
///
/// # Panics
/// If the operating system cannot start a thread.
pub fn spawn(config: Config, layout: KvLayout, blocks: usize, parts: impl Into<Parts>) -> (Handle, JoinHandle<()>) {
    let config = config.effective(layout.block_size as usize);
    let sequences = config.max_waiting + config.max_waiting_offline + config.max_running;
    let (commands, inbox) = bounded(COMMANDS_PER_SEQUENCE * sequences);
    let engine = Engine::new(config, layout, blocks, parts);
    let intake = engine.intake().clone();
    let shared = Arc::new(Shared { stats: Mutex::new(engine.stats()), from_sinks: Mutex::default() });
    let thread = {
        let shared = Arc::clone(&shared);
        let body = move || run(engine, &inbox, &shared);
        thread::Builder::new().name("engine".to_owned()).spawn(body).expect("a thread can be started")
    };
    (Handle { commands, intake, shared, engine_thread: thread.thread().id() }, thread)
}

/// What the engine thread and the handles share besides the channel. Both locks are leaves, held for a copy or a push.
struct Shared {
    /// Written by the engine thread after each step, read by anybody.
    stats: Mutex<Stats>,
    /// Commands given on the engine thread itself, in order; written and read there only.
    from_sinks: Mutex<VecDeque<Command>>,
}

/// A poisoned lock guards plain values that are complete at every moment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(mut engine: Engine, inbox: &Receiver<Command>, shared: &Shared) {
    let next_from_sinks = || lock(&shared.from_sinks).pop_front();
    loop {
        // What is there now, not what comes in meanwhile: a flood of commands must not keep the batch from its step.
        for _ in 0..=inbox.len() {
            while let Some(command) = next_from_sinks() {
                engine.apply(command);
            }
            match inbox.try_recv() {
                Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => return leave(engine, inbox, shared),
                Ok(command) => engine.apply(command),
                Err(TryRecvError::Empty) => break,
            }
        }
        let started = Instant::now();
        let progress = engine.step();
        engine.took(started.elapsed());
        *lock(&shared.stats) = engine.stats();
        if progress == Progress::Idle && lock(&shared.from_sinks).is_empty() {
            match inbox.recv() {
                Ok(Command::Shutdown) | Err(_) => return leave(engine, inbox, shared),
                Ok(command) => engine.apply(command),
            }
        }
    }
}

/// Tells everybody, those whose requests are still in the channel included.
fn leave(mut engine: Engine, inbox: &Receiver<Command>, shared: &Shared) {
    engine.close();
    inbox.try_iter().for_each(|command| engine.apply(command));
    let from_sinks = std::mem::take(&mut *lock(&shared.from_sinks));
    from_sinks.into_iter().for_each(|command| engine.apply(command));
    engine.close();
    *lock(&shared.stats) = engine.stats();
    lock(&shared.from_sinks).clear();
}

/// Talks to an engine thread. Cheap to clone; usable from any thread, event and layer sinks included.
#[derive(Clone)]
pub struct Handle {
    commands: Sender<Command>,
    intake: Intake,
    shared: Arc<Shared>,
    engine_thread: ThreadId,
}

impl Handle {
    /// Asks for blocks for a request. It is named at once; the rest is told through `events`, beginning with
    /// [`crate::Event::Admitted`] once there are blocks.
    ///
    /// # Errors
    /// The request comes back at once if the queue is full, the prompt fits neither model nor pool or is not made of this
    /// model's tokens, or the engine is shutting down.
    pub fn admit(&self, request: Request, events: Box<dyn EventSink>) -> Result<SeqId, Rejected> {
        let (seq, command) = self.intake.admit(request, events)?;
        if thread::current().id() == self.engine_thread {
            lock(&self.shared.from_sinks).push_back(command);
            return Ok(seq);
        }
        let (command, error) = match self.commands.try_send(command) {
            Ok(()) => return Ok(seq),
            Err(TrySendError::Full(command)) => {
                (command, Error::QueueFull { limit: self.commands.capacity().unwrap_or_default() })
            }
            Err(TrySendError::Disconnected(command)) => (command, Error::Closed),
        };
        let Command::Admit(NewSequence { sequence, .. }) = command else {
            unreachable!("the intake makes Admit commands")
        };
        Err(Rejected { error, request: Box::new(sequence.request) })
    }

    /// The first `tokens` tokens of the held sequence's prompt have valid KV in their blocks now: a multiple of the block
    /// size (else rounded down) or the whole prompt. Full blocks go into the prefix cache.
    pub fn landed(&self, seq: SeqId, tokens: usize) {
        self.send(Command::Landed(seq, tokens));
    }

    /// Compute the rest of the prompt here, in chunks, then sample. `sink` sees every layer of every chunk; while it
    /// lives, the sequence's blocks are not taken away. May be called before `Admitted`, and then takes effect with it.
    /// Without a sink nobody else can want the blocks of a `Generate` sequence any more: the engine may exchange them.
    pub fn compute(&self, seq: SeqId, sink: Option<Box<dyn LayerSink>>) {
        self.send(Command::Compute(seq, sink));
    }

    /// Compute the first `tokens` tokens (whole blocks) of a held sequence's prompt already, while peers may still write into the
    /// blocks behind them. Then, in this order: [`landed`](Self::landed), if there are tokens behind those that landed, and,
    /// when no peer can write any more, [`compute`](Self::compute) (whose sink is not looked at; this one sees all), which
    /// computes what is left. Ignored for models whose layers are not all of one kind, and if nothing is to be computed before
    /// `tokens`: the sequence is held as before.
    ///
    /// Should the sequence fail meanwhile, its blocks stay out of use until [`abort`](Self::abort).
    pub fn compute_until(&self, seq: SeqId, sink: Option<Box<dyn LayerSink>>, tokens: usize) {
        self.send(Command::ComputeUntil(seq, sink, tokens));
    }

    /// The whole prompt landed and `first` is the first token of the answer, told to the client by somebody else already:
    /// it is not told again. Should part of the prompt not have landed, it is computed here.
    pub fn resume(&self, seq: SeqId, first: TokenId) {
        self.send(Command::Resume(seq, first));
    }

    /// Drops the sequence, whatever it is doing; harmless if it is gone. Its blocks may have new owners soon after: peers
    /// must not be able to touch them any more. Events that the engine sends before it sees this may still arrive.
    pub fn abort(&self, seq: SeqId) {
        self.send(Command::Abort(seq));
    }

    /// The end of a `PrefillOnly` sequence: nobody reads its blocks any more. Full ones stay in the prefix cache.
    pub fn release(&self, seq: SeqId) {
        self.send(Command::Release(seq));
    }

    /// What the engine takes on.
    pub fn duty(&self) -> Duty {
        self.intake.duty()
    }

    /// Changes what the engine takes on, while it runs: at the door at once, in how steps are shared from the next one on.
    pub fn set_duty(&self, duty: Duty) {
        self.intake.set_duty(duty);
    }

    /// Other limits, while it runs: at the door at once, for steps from the next one on.
    pub fn set_limits(&self, limits: Limits) {
        self.intake.set_limits(limits);
    }

    /// Has the engine tell what changed in its prefix cache since the last time, on its own thread (so `tell` must not
    /// block) and between two steps. For one follower: what is told is told once. Not called if the engine is gone.
    pub fn cache_events(&self, tell: impl FnOnce(Batch) + Send + 'static) {
        self.send(Command::CacheEvents(Box::new(tell)));
    }

    /// Has the engine tell all that is in its prefix cache, in the same way, for a follower that begins or has missed
    /// something: it goes on with the events from [`Snapshot::next`] on.
    pub fn cache_snapshot(&self, tell: impl FnOnce(Snapshot) + Send + 'static) {
        self.send(Command::CacheSnapshot(Box::new(tell)));
    }

    /// Keeps those of these blocks (their names in group 0) that are in the prefix cache as they are, and has the engine
    /// say where they are, on its own thread (so `tell` must not block) and between two steps. For short reading: what is
    /// pinned is out of use for sequences that need blocks. Not called if the engine is gone.
    pub fn pin(&self, hashes: Vec<BlockHash>, tell: impl FnOnce(Pinned) + Send + 'static) {
        let engine = self.clone();
        let tell = move |id, blocks| tell(Pinned { engine, id, blocks });
        self.send(Command::Pin(hashes, Box::new(tell)));
    }

    /// What the engine was doing at the end of its last step; `waiting` is as of now.
    pub fn stats(&self) -> Stats {
        Stats { waiting: self.intake.waiting(), ..*lock(&self.shared.stats) }
    }

    /// Refuses requests from now on, fails those that are there, ends the thread. Draining first is the caller's part:
    /// stop admitting, wait for the sequences to end, then this.
    pub fn shutdown(&self) {
        self.intake.close();
        self.send(Command::Shutdown);
    }

    #[cfg(test)]
    pub(crate) fn channel_is_full(&self) -> bool {
        self.commands.is_full()
    }

    fn send(&self, command: Command) {
        if thread::current().id() == self.engine_thread {
            lock(&self.shared.from_sinks).push_back(command);
        } else {
            // Fails only if the thread is gone, and every sequence with it.
            let _ = self.commands.send(command);
        }
    }
}

/// Blocks of the prefix cache that stay as they are for as long as this exists.
#[derive(Debug)]
pub struct Pinned {
    engine: Handle,
    id: PinId,
    blocks: Vec<Option<BlockId>>,
}

impl Pinned {
    /// For each block asked for, where it is; `None`: it is not in the cache.
    pub fn blocks(&self) -> &[Option<BlockId>] {
        &self.blocks
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.engine.send(Command::Unpin(self.id));
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("stats", &self.stats()).finish_non_exhaustive()
    }
}
