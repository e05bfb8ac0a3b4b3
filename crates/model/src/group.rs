//! Several that compute one model together: whose part is what, and how they hand one another what they computed.
//!
//! The **ranks** of a group divide a model by the outputs of its linear maps (tensor parallelism): of queries, keys and
//! values each has some heads, of every other product some columns. Each element is computed whole, in one order of sums, by
//! one rank, and then everybody gets everybody's (`all_gather`): so the results are to the bit those of one that computes
//! alone, whatever the number of ranks. (The usual other way divides every second product by its inputs and adds up the ranks'
//! sums: half the exchanges, and other bits for every number of ranks.)
//!
//! | group | whose |
//! | --- | --- |
//! | [`Alone`] | one rank: there is nobody to wait for |
//! | [`Shared`] | threads of one process, over its memory |
//! | `cuda::collective` | devices of one host, by NCCL; their threads meet in a [`Shared`] |
//!
//! Who ends, fails or does not come breaks the group ([`Group::abort`]): all others get an error that says so, at once if it
//! is known and after [`PATIENCE`] if not. A group that is broken stays so.

use std::{
    fmt::{self, Debug},
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    Error, ModelConfig,
    graph::{AttentionKind, GatedSpec, MlpSpec},
};

/// Most ranks of a group.
pub(crate) const MAX_RANKS: usize = 8;

/// How long ranks wait for one another: far longer than any part of a step takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How long a rank looks out for the others before it sleeps: longer than they are usually apart.
const WATCH: Duration = Duration::from_micros(50);

/// Which of how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) rank: usize,
    pub(crate) size: usize,
}

impl Place {
    /// The only one.
    pub(crate) const ALONE: Self = Self { rank: 0, size: 1 };

    /// This rank's part of `total` things in a row. Parts differ by one thing at most.
    pub(crate) fn part(self, total: usize) -> Range<usize> {
        total * self.rank / self.size..total * (self.rank + 1) / self.size
    }
}

/// What ranks do together. All ranks call the same operations in the same order.
pub(crate) trait Group: Send + Sync + Debug {
    /// Which rank this is.
    fn place(&self) -> Place;

    /// From this rank's columns of `rows` rows to all ranks' columns of them, side by side in the order of ranks.
    ///
    /// # Errors
    /// A broken group, or ranks that came with different rows, which breaks it.
    fn all_gather(&self, rows: usize, values: &mut Vec<f32>) -> Result<(), Error>;

    /// Returns when all ranks have called it.
    ///
    /// # Errors
    /// A broken group.
    fn barrier(&self) -> Result<(), Error>;

    /// Whether all ranks go on: an error of one is everybody's, and the group stays whole. For what may fail on one rank and
    /// leaves nothing behind.
    ///
    /// # Errors
    /// This rank's own, that another one has one, or a broken group.
    fn agree(&self, mine: Result<(), Error>) -> Result<(), Error>;

    /// Breaks the group: whoever waits in it, or comes to it later, gets an error. The first reason stays.
    fn abort(&self, reason: &str);

    /// Whether it is whole, without waiting for anyone.
    ///
    /// # Errors
    /// A broken group.
    fn check(&self) -> Result<(), Error>;

    /// What is to be done when the group breaks, by the thread that breaks it: for what ranks wait for elsewhere.
    fn on_abort(&self, then: Box<dyn Fn() + Send>);
}

/// [`Group::agree`] on something that each rank has made.
pub(crate) fn agree_on<T>(group: &dyn Group, mine: Result<T, Error>) -> Result<T, Error> {
    match mine {
        Ok(value) => group.agree(Ok(())).map(|()| value),
        Err(error) => Err(group.agree(Err(error)).expect_err("this rank has declined")),
    }
}

/// A group of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alone;

impl Group for Alone {
    fn place(&self) -> Place {
        Place::ALONE
    }

    fn all_gather(&self, _rows: usize, _values: &mut Vec<f32>) -> Result<(), Error> {
        Ok(())
    }

    fn barrier(&self) -> Result<(), Error> {
        Ok(())
    }

    fn agree(&self, mine: Result<(), Error>) -> Result<(), Error> {
        mine
    }

    fn abort(&self, _reason: &str) {}

    fn check(&self) -> Result<(), Error> {
        Ok(())
    }

    fn on_abort(&self, _then: Box<dyn Fn() + Send>) {}
}

/// A rank of a group of threads.
#[derive(Debug)]
pub(crate) struct Shared {
    rank: usize,
    hall: Arc<Hall>,
    /// How many gathers there were.
    gathers: AtomicUsize,
}

/// Where they meet.
#[derive(Debug)]
struct Hall {
    size: usize,
    patience: Duration,
    /// Meetings that have ended; moved under the lock, read without it by those who look out.
    ended: AtomicU64,
    meeting: Mutex<Meeting>,
    moved: Condvar,
    /// What each rank brings to a gather, alternating: who overwrites one has met all others since they read it.
    brought: Vec<[RwLock<Vec<f32>>; 2]>,
    /// What is to be done when it breaks.
    then: Mutex<Thens>,
}

#[derive(Default)]
struct Thens(Vec<Box<dyn Fn() + Send>>);

impl Debug for Thens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Thens").field(&self.0.len()).finish()
    }
}

#[derive(Debug, Default)]
struct Meeting {
    /// Which ranks are there.
    here: Vec<bool>,
    /// The first of them that cannot go on, and what came of that in the meeting before.
    declined: Option<usize>,
    outcome: Option<usize>,
    broken: Option<String>,
}

impl Shared {
    /// All ranks of a group of `size`.
    pub(crate) fn group(size: usize) -> Vec<Arc<Self>> {
        Self::with_patience(size, PATIENCE)
    }

    fn with_patience(size: usize, patience: Duration) -> Vec<Arc<Self>> {
        let hall = Arc::new(Hall {
            size,
            patience,
            ended: AtomicU64::new(0),
            meeting: Mutex::new(Meeting { here: vec![false; size], ..Meeting::default() }),
            moved: Condvar::new(),
            brought: (0..size).map(|_| Default::default()).collect(),
            then: Mutex::default(),
        });
        (0..size).map(|rank| Arc::new(Self { rank, hall: hall.clone(), gathers: AtomicUsize::new(0) })).collect()
    }

    fn broken(&self, reason: &str) -> Error {
        Error::Rank { rank: self.rank, size: self.hall.size, reason: reason.to_owned() }
    }

    /// Waits for all ranks; the first that declined, if one did.
    fn meet(&self, declines: bool) -> Result<Option<usize>, Error> {
        let hall = &*self.hall;
        let mut meeting = hall.lock();
        if let Some(reason) = &meeting.broken {
            return Err(self.broken(reason));
        }
        let number = hall.ended.load(Ordering::Acquire);
        meeting.here[self.rank] = true;
        if declines && meeting.declined.is_none_or(|rank| rank > self.rank) {
            meeting.declined = Some(self.rank);
        }
        if meeting.here.iter().all(|&here| here) {
            meeting.here.fill(false);
            meeting.outcome = meeting.declined.take();
            hall.ended.store(number + 1, Ordering::Release);
            hall.moved.notify_all();
            return Ok(meeting.outcome);
        }
        drop(meeting);
        let start = Instant::now();
        while hall.ended.load(Ordering::Acquire) == number && start.elapsed() < WATCH {
            std::thread::yield_now();
        }
        let mut meeting = hall.lock();
        loop {
            // Nobody can begin and end the next meeting without this rank, so the outcome is this one's.
            if hall.ended.load(Ordering::Acquire) != number {
                return Ok(meeting.outcome);
            }
            if let Some(reason) = &meeting.broken {
                return Err(self.broken(reason));
            }
            let left = hall.patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                let absent: Vec<String> =
                    (0..hall.size).filter(|&rank| !meeting.here[rank]).map(|rank| rank.to_string()).collect();
                let reason = format!("rank {} did not come within {:?}", absent.join(", "), hall.patience);
                hall.break_up(&mut meeting, &reason);
                continue;
            }
            meeting = hall.moved.wait_timeout(meeting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Hall {
    /// What it guards is whole between any two statements: a thread that panicked has not spoiled it.
    fn lock(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn break_up(&self, meeting: &mut Meeting, reason: &str) {
        if meeting.broken.is_none() {
            meeting.broken = Some(reason.to_owned());
            self.then.lock().unwrap_or_else(PoisonError::into_inner).0.iter().for_each(|then| then());
        }
        self.moved.notify_all();
    }
}

impl Group for Shared {
    fn place(&self) -> Place {
        Place { rank: self.rank, size: self.hall.size }
    }

    fn all_gather(&self, rows: usize, values: &mut Vec<f32>) -> Result<(), Error> {
        let turn = self.gathers.fetch_add(1, Ordering::Relaxed) % 2;
        let of = |rank: usize| &self.hall.brought[rank][turn];
        std::mem::swap(&mut *of(self.rank).write().unwrap_or_else(PoisonError::into_inner), values);
        self.meet(false)?;
        let parts: Vec<_> =
            (0..self.hall.size).map(|rank| of(rank).read().unwrap_or_else(PoisonError::into_inner)).collect();
        if let Some((rank, part)) = parts.iter().enumerate().find(|(_, part)| part.len() % rows.max(1) != 0) {
            let reason = format!("rank {rank} brought {} numbers where {rows} rows were gathered", part.len());
            self.abort(&reason);
            return Err(self.broken(&reason));
        }
        let width = |part: &[f32]| part.len() / rows.max(1);
        values.clear();
        values.reserve(parts.iter().map(|part| part.len()).sum());
        for row in 0..rows {
            for part in &parts {
                values.extend_from_slice(&part[row * width(part)..(row + 1) * width(part)]);
            }
        }
        Ok(())
    }

    fn barrier(&self) -> Result<(), Error> {
        self.meet(false).map(drop)
    }

    fn agree(&self, mine: Result<(), Error>) -> Result<(), Error> {
        let declined = self.meet(mine.is_err());
        mine?;
        match declined? {
            Some(rank) => Err(Error::Declined { rank }),
            None => Ok(()),
        }
    }

    fn abort(&self, reason: &str) {
        self.hall.break_up(&mut self.hall.lock(), reason);
    }

    fn check(&self) -> Result<(), Error> {
        self.hall.lock().broken.as_ref().map_or(Ok(()), |reason| Err(self.broken(reason)))
    }

    fn on_abort(&self, then: Box<dyn Fn() + Send>) {
        let meeting = self.hall.lock();
        if meeting.broken.is_some() {
            then();
        }
        self.hall.then.lock().unwrap_or_else(PoisonError::into_inner).0.push(then);
    }
}

/// Whether a group of so many can divide the model: all that is divided must come in equal parts, but the vocabulary.
///
/// # Errors
/// What can't be, and which degrees would do.
pub(crate) fn check(config: &ModelConfig, degree: usize) -> Result<(), Error> {
    let divided = divided(config);
    let fits = |degree: usize| divided.iter().all(|(_, count)| count.is_multiple_of(degree));
    let Some((what, count)) = divided.iter().find(|(_, count)| degree == 0 || !count.is_multiple_of(degree)) else {
        return Ok(());
    };
    let degrees = (1..=MAX_RANKS).filter(|&degree| fits(degree)).map(|degree| degree.to_string()).collect::<Vec<_>>();
    Err(Error::Degree { degree, what, count: *count, degrees: degrees.join(", ") })
}

/// Everything that comes in equal parts.
fn divided(config: &ModelConfig) -> Vec<(&'static str, usize)> {
    let mut all = vec![("columns of the residual stream", config.hidden)];
    let gated = |mlp: &GatedSpec| ("columns of an MLP", mlp.gate.outputs);
    for layer in &config.layers {
        all.push(match &layer.attention.kind {
            AttentionKind::Grouped(grouped) => ("KV heads", grouped.kv_heads),
            AttentionKind::Latent(_) => ("query heads", layer.attention.heads),
        });
        match &layer.mlp {
            MlpSpec::Dense(mlp) => all.push(gated(mlp)),
            MlpSpec::Routed(mlp) => all.extend(mlp.experts.iter().chain(&mlp.shared).map(gated)),
        }
    }
    all.sort_unstable();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// What each rank of a group of `size` makes of its membership.
    fn ranks<T: Send>(members: &[Arc<Shared>], run: impl Fn(&Shared) -> T + Sync) -> Vec<T> {
        thread::scope(|scope| {
            let run = &run;
            let threads: Vec<_> = members.iter().map(|member| scope.spawn(move || run(member))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn parts_are_the_whole_in_order() {
        for (total, size) in [(8, 1), (8, 8), (1532, 8), (7, 3), (0, 2)] {
            let parts: Vec<usize> = (0..size).flat_map(|rank| Place { rank, size }.part(total)).collect();
            assert_eq!(parts, (0..total).collect::<Vec<_>>());
        }
    }

    #[test]
    fn everybody_gets_everybodys_columns() {
        // Uneven parts, many times: nobody overwrites what another one still reads.
        let gathered = ranks(&Shared::group(3), |member| {
            let mut all = Vec::new();
            for turn in 0..200 {
                let rows = turn % 4;
                let part = Place { rank: member.rank, size: 3 }.part(7);
                let mut values: Vec<f32> = (0..rows)
                    .flat_map(|row| part.clone().map(move |at| (1000 * turn + 10 * row + at) as f32))
                    .collect();
                member.all_gather(rows, &mut values).unwrap();
                all.push(values);
            }
            all
        });
        for rank in gathered {
            for (turn, values) in rank.into_iter().enumerate() {
                let whole = (0..turn % 4).flat_map(|row| (0..7).map(move |at| (1000 * turn + 10 * row + at) as f32));
                assert_eq!(values, whole.collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn what_one_declines_nobody_does_and_the_group_stays_whole() {
        let outcomes = ranks(&Shared::group(3), |member| {
            let mine = if member.rank == 1 { Err(Error::NoTokens { input: 7 }) } else { Ok(()) };
            let first = member.agree(mine).unwrap_err().to_string();
            (first, member.agree(Ok(())).is_ok(), member.barrier().is_ok())
        });
        let declined = "rank 1 could not take part in this step".to_owned();
        assert_eq!(outcomes[0], (declined.clone(), true, true));
        assert_eq!(outcomes[1], ("input 7: no tokens".to_owned(), true, true));
        assert_eq!(outcomes[2], (declined, true, true));
    }

    #[test]
    fn whoever_ends_wakes_the_others_with_the_reason() {
        let outcomes = ranks(&Shared::group(3), |member| match member.rank {
            2 => {
                member.barrier().unwrap();
                member.abort("rank 2 has had enough");
                member.abort("and says so twice");
                None
            }
            _ => {
                member.barrier().unwrap();
                let error = member.all_gather(1, &mut vec![1.0]).unwrap_err();
                assert!(error.is_fatal());
                Some((error.to_string(), member.barrier().is_err()))
            }
        });
        for (rank, outcome) in outcomes[..2].iter().enumerate() {
            assert_eq!(*outcome, Some((format!("rank {rank} of 3: rank 2 has had enough"), true)));
        }
    }

    #[test]
    fn who_does_not_come_is_told_by_name() {
        let members = Shared::with_patience(3, Duration::from_millis(20));
        let reasons = ranks(&members[..2], |member| member.barrier().unwrap_err().to_string());
        assert_eq!(reasons[0], "rank 0 of 3: rank 2 did not come within 20ms");
        // The one that was late finds out, too.
        assert!(members[2].barrier().is_err());
    }

    #[test]
    fn ranks_that_gather_different_rows_are_an_error() {
        let outcomes = ranks(&Shared::group(2), |member| {
            let rows = 2;
            member.all_gather(rows, &mut vec![0.0; rows + member.rank]).map_err(|error| error.to_string())
        });
        assert!(outcomes.iter().all(|outcome| outcome.as_ref().unwrap_err().contains("rank 1 brought 3 numbers")));
    }
}
