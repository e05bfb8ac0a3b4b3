//! How a disk is: whether it may be used, and when it is tried again. Pure: `now` is an argument.
//!
//! ```text
//!             ┌──── a new slot was written, or could be ─────┐
//!             ▼                                              │
//!         Working ──── no space ──▶ Full: new slots are refused, one is let through every `retry`
//!          ▲    │                    │
//!          │    └─ errors in a row ──┴──▶ Failing: all is refused, one operation is let through every `retry`
//!          └──────── it succeeded ───────────┘
//! ```

use std::{
    io,
    time::{Duration, Instant},
};

use super::Failure;

/// Errors in a row after which a disk is left alone: one bad sector is not a bad disk.
const TOLERATED: u32 = 3;

/// How a disk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// It does as it is told.
    #[default]
    Working,
    /// The file system has no room; slots once written can be written again.
    Full,
    /// It failed several times in a row, or is gone.
    Failing,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Working, Self::Full, Self::Failing];

    /// In one word: a metric's label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Working => "working",
            Self::Full => "full",
            Self::Failing => "failing",
        }
    }
}

/// What an operation wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// To read, to write again where something was written before, to forget.
    Reuse,
    /// To write where nothing was.
    Grow,
}

pub(super) struct Health {
    state: State,
    retry: Duration,
    errors: u32,
    /// While not working: when the next operation is let through.
    next_trial: Option<Instant>,
}

impl Health {
    pub(super) fn new(retry: Duration) -> Self {
        Self { state: State::Working, retry, errors: 0, next_trial: None }
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Whether such an operation would be let through.
    pub(super) fn would_admit(&self, wish: Wish, now: Instant) -> Result<(), Failure> {
        let trial = self.next_trial.is_none_or(|at| at <= now);
        match self.state {
            State::Failing if !trial => Err(Failure::Resting),
            State::Full if wish == Wish::Grow && !trial => Err(Failure::Full),
            _ => Ok(()),
        }
    }

    /// Lets an operation through, or not. The one that is let through as a trial is alone until `retry` has passed or it
    /// is told what became of it.
    pub(super) fn admit(&mut self, wish: Wish, now: Instant) -> Result<(), Failure> {
        self.would_admit(wish, now)?;
        if self.state == State::Failing || self.state == State::Full && wish == Wish::Grow {
            self.next_trial = Some(now + self.retry);
        }
        Ok(())
    }

    /// What became of an operation that was let through; the new state if it is another one.
    pub(super) fn ended(&mut self, wish: Wish, result: Result<(), &io::Error>, now: Instant) -> Option<State> {
        let before = self.state;
        match result {
            Ok(()) => {
                self.errors = 0;
                // Writing over what is there says nothing about room.
                if self.state == State::Failing || self.state == State::Full && wish == Wish::Grow {
                    self.state = State::Working;
                    self.next_trial = None;
                }
            }
            Err(error) if is_full(error) => {
                self.errors = 0;
                self.state = State::Full;
                self.next_trial = Some(now + self.retry);
            }
            Err(error) => {
                self.errors = self.errors.saturating_add(1);
                if self.errors >= TOLERATED || is_final(error) || self.state == State::Failing {
                    self.state = State::Failing;
                    self.next_trial = Some(now + self.retry);
                }
            }
        }
        (self.state != before).then_some(self.state)
    }
}

/// Whether the file system has no room for more.
pub(super) fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// Whether trying the next block is to no purpose.
fn is_final(error: &io::Error) -> bool {
    use io::ErrorKind::{NotFound, PermissionDenied, ReadOnlyFilesystem, StaleNetworkFileHandle};
    matches!(error.kind(), NotFound | PermissionDenied | ReadOnlyFilesystem | StaleNetworkFileHandle)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RETRY: Duration = Duration::from_secs(30);

    fn error(kind: io::ErrorKind) -> io::Error {
        kind.into()
    }

    fn fail(health: &mut Health, kind: io::ErrorKind, now: Instant) -> Option<State> {
        health.ended(Wish::Reuse, Err(&error(kind)), now)
    }

    #[test]
    fn single_errors_change_nothing_several_in_a_row_do() {
        let (mut health, now) = (Health::new(RETRY), Instant::now());
        for _ in 0..10 {
            assert_eq!(fail(&mut health, io::ErrorKind::Other, now), None);
            assert_eq!(fail(&mut health, io::ErrorKind::Other, now), None);
            assert_eq!(health.ended(Wish::Reuse, Ok(()), now), None);
        }
        for change in [None, None, Some(State::Failing), None] {
            assert_eq!(fail(&mut health, io::ErrorKind::Other, now), change, "told once");
        }
    }

    #[test]
    fn a_disk_that_went_read_only_or_away_is_left_alone_at_once() {
        for kind in [io::ErrorKind::ReadOnlyFilesystem, io::ErrorKind::NotFound] {
            assert_eq!(fail(&mut Health::new(RETRY), kind, Instant::now()), Some(State::Failing));
        }
    }

    #[test]
    fn a_failing_disk_is_tried_with_one_operation_at_a_time() {
        let (mut health, start) = (Health::new(RETRY), Instant::now());
        fail(&mut health, io::ErrorKind::NotFound, start);
        assert!(matches!(health.admit(Wish::Reuse, start + RETRY / 2), Err(Failure::Resting)));
        let later = start + RETRY;
        health.would_admit(Wish::Grow, later).unwrap();
        health.admit(Wish::Grow, later).unwrap();
        assert!(matches!(health.admit(Wish::Reuse, later), Err(Failure::Resting)), "one at a time");
        assert_eq!(fail(&mut health, io::ErrorKind::Other, later), None, "still failing, told before");
        assert!(matches!(health.admit(Wish::Reuse, later + RETRY / 2), Err(Failure::Resting)));
        health.admit(Wish::Reuse, later + RETRY).unwrap();
        assert_eq!(health.ended(Wish::Reuse, Ok(()), later + RETRY), Some(State::Working));
        health.admit(Wish::Grow, later + RETRY).unwrap();
    }

    #[test]
    fn a_full_disk_is_read_and_written_over_but_grows_only_once_there_is_room() {
        let (mut health, start) = (Health::new(RETRY), Instant::now());
        assert_eq!(fail(&mut health, io::ErrorKind::StorageFull, start), Some(State::Full));
        health.admit(Wish::Reuse, start).unwrap();
        assert_eq!(health.ended(Wish::Reuse, Ok(()), start), None, "says nothing about room");
        assert!(matches!(health.admit(Wish::Grow, start), Err(Failure::Full)));
        let later = start + RETRY;
        health.admit(Wish::Grow, later).unwrap();
        assert!(matches!(health.admit(Wish::Grow, later), Err(Failure::Full)), "one at a time");
        assert_eq!(health.ended(Wish::Grow, Err(&error(io::ErrorKind::StorageFull)), later), None);
        health.admit(Wish::Grow, later + RETRY).unwrap();
        assert_eq!(health.ended(Wish::Grow, Ok(()), later + RETRY), Some(State::Working));
    }
}
