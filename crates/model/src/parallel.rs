//! A model computed by several: one thread for each rank of a group, led by whoever drives the backend.
//!
//! ```text
//! leader (the engine's thread)          rank-0 … rank-N       each drives a backend of its own: its part of the model
//! check, copy the batch ──orders──▶     forward               gathers: see `group`
//! count, after_layer(l) ◀──news────     layer l is written    its heads of it
//! put columns together  ◀──────────     logits                its part of the vocabulary
//! ```
//!
//! All ranks write into one arena of the host, each its heads: the layout's `[k|v][kv_head]` makes them contiguous inside a
//! layer. So blocks have the same bytes whatever the number of ranks, and those who prefill and those who decode may have
//! different ones. What a rank cannot do alone (a device without memory) it tells the others before any of them begins; if
//! one fails later, or panics, the group is broken, every rank ends its step with an error, and so does the backend.

use std::{
    any::Any,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use kvasir_types::{BlockId, KvGroups, KvLayout, TokenId};

use crate::{
    Backend, Error, Folder, Logits, ModelConfig, SeqInput,
    backend::check_batch,
    group::{self, Group, Shared},
};

/// How long the others may take to notice that one has failed.
const GRACE: Duration = Duration::from_secs(10);

/// A backend of several ranks.
pub(crate) struct Parallel {
    config: ModelConfig,
    groups: KvGroups,
    layout: KvLayout,
    blocks: usize,
    ranks: Vec<Rank>,
    news: Receiver<(usize, News)>,
    /// Why nothing can be computed any more.
    broken: Option<String>,
}

/// A rank, as its leader sees it.
struct Rank {
    orders: SyncSender<Order>,
    thread: JoinHandle<()>,
}

/// What ranks are told, all of them the same.
#[derive(Clone)]
enum Order {
    Forward(Arc<[Input]>),
    Copy(Arc<[(BlockId, BlockId)]>),
    Landed(Arc<[BlockId]>),
}

/// What they answer.
enum News {
    /// Its part of this layer is in the arena.
    Layer(usize),
    Done(Result<Logits, Error>),
}

/// A [`SeqInput`] that outlives its caller.
struct Input {
    tokens: Vec<TokenId>,
    start: usize,
    tables: Vec<Vec<BlockId>>,
    rows: usize,
}

impl Parallel {
    /// So many ranks over the first `blocks` blocks of an arena. `open` makes the backend of one: it is called on a thread for
    /// each, and whatever is computed by it later is this rank's part; it fails on all ranks, or the group is broken.
    ///
    /// # Errors
    /// A model that cannot be divided so, or what `open` says.
    pub(crate) fn open<B: Backend + 'static>(
        folder: &Folder,
        layout: KvLayout,
        blocks: usize,
        degree: usize,
        open: impl Fn(Arc<Shared>) -> Result<B, Error> + Sync,
    ) -> Result<Self, Error> {
        let config = folder.config().clone();
        group::check(&config, degree)?;
        let members = Shared::group(degree);
        let opened: Vec<Result<B, Error>> = thread::scope(|scope| {
            let open = &open;
            let threads: Vec<_> = members.iter().map(|member| scope.spawn(|| opening(member, open))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| Err(panicked(0, 0, &*panic))))
                .collect()
        });
        let backends = all_or_first(opened)?;
        // As many as can be under way: a step's layers and its end.
        let (tell, news) = mpsc::sync_channel(degree * (config.layers.len() + 1));
        let mut ranks = Vec::new();
        for (member, backend) in members.into_iter().zip(backends) {
            let (orders, taken) = mpsc::sync_channel(1);
            let (tell, rank) = (tell.clone(), member.place().rank);
            let run = move || serve(backend, &member, &taken, &tell);
            let failed = |error: std::io::Error| Error::Threads { threads: degree, reason: error.to_string() };
            let thread = thread::Builder::new().name(format!("rank-{rank}")).spawn(run).map_err(failed)?;
            ranks.push(Rank { orders, thread });
        }
        tracing::info!(degree, "computing in parallel");
        Ok(Self { groups: config.kv_groups(), config, layout, blocks, ranks, news, broken: None })
    }

    /// Has all ranks do the same; what each made of it.
    fn order(&mut self, order: &Order, after_layer: &mut dyn FnMut(usize)) -> Result<Vec<Logits>, Error> {
        let size = self.ranks.len();
        if let Some(reason) = &self.broken {
            return Err(Error::Rank { rank: 0, size, reason: reason.clone() });
        }
        // A rank that is gone has not told its end: it is missed below.
        self.ranks.iter().for_each(|rank| drop(rank.orders.send(order.clone())));
        let mut written = vec![0; self.config.layers.len()];
        let mut results: Vec<Option<Result<Logits, Error>>> = (0..size).map(|_| None).collect();
        let mut deadline = None;
        while results.iter().any(Option::is_none) {
            let news = match deadline {
                None => self.news.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => self.news.recv_timeout(Instant::saturating_duration_since(&at, Instant::now())),
            };
            match news {
                Ok((_, News::Layer(layer))) => {
                    written[layer] += 1;
                    if written[layer] == size {
                        after_layer(layer);
                    }
                }
                Ok((rank, News::Done(result))) => {
                    if result.as_ref().is_err_and(Error::is_fatal) {
                        deadline.get_or_insert_with(|| Instant::now() + GRACE);
                    }
                    results[rank] = Some(result);
                }
                Err(_) => break,
            }
        }
        let missed = |rank| Err(Error::Rank { rank, size, reason: "it did not end its step".to_owned() });
        let results = results.into_iter().enumerate();
        let outcome = all_or_first(results.map(|(rank, result)| result.unwrap_or_else(|| missed(rank))).collect());
        if let Err(error) = &outcome
            && error.is_fatal()
        {
            self.broken = Some(error.to_string());
        }
        outcome
    }
}

impl Backend for Parallel {
    fn spec(&self) -> &ModelConfig {
        &self.config
    }

    fn groups(&self) -> &KvGroups {
        &self.groups
    }

    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), Error> {
        self.order(&Order::Copy(copies.into()), &mut |_| {}).map(drop)
    }

    fn landed(&mut self, blocks: &[BlockId]) -> Result<(), Error> {
        self.order(&Order::Landed(blocks.into()), &mut |_| {}).map(drop)
    }

    fn forward(&mut self, batch: &[SeqInput<'_>], after_layer: &mut dyn FnMut(usize)) -> Result<Logits, Error> {
        check_batch(&self.config, &self.layout, &self.groups, self.blocks, batch)?;
        let parts = self.order(&Order::Forward(batch.iter().map(Input::of).collect()), after_layer)?;
        Ok(side_by_side(&parts))
    }
}

impl Drop for Parallel {
    fn drop(&mut self) {
        // All of them leave at the same time: devices part from one another together.
        let threads: Vec<_> = self.ranks.drain(..).map(|rank| rank.thread).collect();
        for thread in threads {
            // One that hangs in a device is left to the end of the process.
            if self.broken.is_none() || thread.is_finished() {
                let _ = thread.join();
            }
        }
    }
}

impl fmt::Debug for Parallel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parallel")
            .field("ranks", &self.ranks.len())
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl Input {
    fn of(seq: &SeqInput<'_>) -> Self {
        Self { tokens: seq.tokens.to_vec(), start: seq.start, tables: seq.tables.to_vec(), rows: seq.rows }
    }

    fn borrowed(&self) -> SeqInput<'_> {
        SeqInput { tokens: &self.tokens, start: self.start, tables: &self.tables, rows: self.rows }
    }
}

/// A rank's thread: one order after the other, until there is nobody to give any.
fn serve(mut backend: impl Backend, member: &Arc<Shared>, orders: &Receiver<Order>, tell: &SyncSender<(usize, News)>) {
    let rank = member.place().rank;
    for order in orders {
        let done = guarded(member, || match &order {
            Order::Forward(batch) => {
                let batch: Vec<SeqInput<'_>> = batch.iter().map(Input::borrowed).collect();
                // A leader that is gone misses nothing.
                backend.forward(&batch, &mut |layer| drop(tell.send((rank, News::Layer(layer)))))
            }
            Order::Copy(copies) => backend.copy_blocks(copies).map(|()| Logits::default()),
            Order::Landed(blocks) => backend.landed(blocks).map(|()| Logits::default()),
        });
        if tell.send((rank, News::Done(done))).is_err() {
            return;
        }
    }
}

/// Makes a rank's backend: if one can't be made, none is.
fn opening<B>(member: &Arc<Shared>, open: &impl Fn(Arc<Shared>) -> Result<B, Error>) -> Result<B, Error> {
    let opened = guarded(member, || open(member.clone()));
    opened.inspect_err(|error| member.abort(&format!("rank {} could not start: {error}", member.place().rank)))
}

/// What a rank does on its own: the others hear at once if it cannot go on.
fn guarded<T>(member: &Arc<Shared>, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let group::Place { rank, size } = member.place();
    let done = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(panicked(rank, size, &*panic)));
    if let Err(error) = &done
        && error.is_fatal()
    {
        member.abort(&format!("rank {rank} has failed: {error}"));
    }
    done
}

fn panicked(rank: usize, size: usize, panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    Error::Rank { rank, size, reason: format!("panicked: {}", text.unwrap_or("without a word")) }
}

/// All of them, or what went wrong first: the error of one that failed by itself, rather than of one that heard of it.
fn all_or_first<T>(results: Vec<Result<T, Error>>) -> Result<Vec<T>, Error> {
    let (mut all, mut own, mut heard) = (Vec::new(), None, None);
    for result in results {
        match result {
            Ok(value) => all.push(value),
            Err(error @ (Error::Rank { .. } | Error::Declined { .. })) => drop(heard.get_or_insert(error)),
            Err(error) => drop(own.get_or_insert(error)),
        }
    }
    own.or(heard).map_or(Ok(all), Err)
}

/// Rows of all ranks' columns.
fn side_by_side(parts: &[Logits]) -> Logits {
    let vocab = parts.iter().map(|part| part.vocab).sum();
    let count = parts.first().map_or(0, Logits::len);
    let mut rows = Vec::with_capacity(count * vocab);
    for row in 0..count {
        for part in parts {
            rows.extend_from_slice(&part.rows[row * part.vocab..(row + 1) * part.vocab]);
        }
    }
    Logits { vocab, rows }
}

#[cfg(test)]
mod tests;
