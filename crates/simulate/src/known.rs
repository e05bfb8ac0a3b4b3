//! What a router knows of a worker's load: what it sent there, and what the worker told, some moments ago.
//!
//! The same rules as the router's own pulse of a worker, on a virtual clock. Nobody sends messages here: a worker tells its
//! load at fixed times, and what it told last is found out when it matters, since between two events nothing changes.

use kvasir_router::route::{Load, Speed};

use crate::workload::Ns;

/// What a worker tells.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Told {
    /// Requests that hold memory or wait for it.
    pub requests: u64,
    /// Prompt tokens that it is to compute.
    pub work: u64,
    /// Tokens that it has room for.
    pub room: u64,
    /// How fast it is.
    pub speed: Speed,
}

/// A request's place in what is known of a worker.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lease {
    tokens: u64,
    work: u64,
    began: u64,
}

/// See the module's page.
#[derive(Clone, Debug)]
pub struct Known {
    every: Ns,
    phase: Ns,
    /// How many times it told, and when it will again.
    ticks: u64,
    next: Ns,
    told: Told,
    requests: u64,
    tokens: u64,
    work: u64,
    since: Load,
}

impl Known {
    /// Of a worker that tells every so often, a `phase` later than others; nothing yet.
    pub fn new(every: Ns, phase: Ns) -> Self {
        let (told, since) = (Told::default(), Load::default());
        Self { every: every.max(1), phase, ticks: 0, next: 0, told, requests: 0, tokens: 0, work: 0, since }
    }

    /// It is `now`: hears what the worker told since, which has been `like` this since it last changed. To be called before
    /// anything changes.
    pub fn hear(&mut self, now: Ns, like: impl FnOnce() -> Told) {
        if now >= self.next {
            self.ticks = (now + self.phase) / self.every + 1;
            self.next = self.ticks * self.every - self.phase;
            self.told = like();
            self.since = Load::default();
        }
    }

    /// One more request there, with so many prompt tokens, `work` of which are to be computed.
    pub fn begin(&mut self, tokens: u64, work: u64) -> Lease {
        self.requests += 1;
        self.tokens += tokens;
        self.work += work;
        self.since.requests += 1;
        self.since.tokens += work;
        Lease { tokens, work, began: self.ticks }
    }

    /// It is over.
    pub fn end(&mut self, lease: Lease) {
        self.requests -= 1;
        self.tokens -= lease.tokens;
        self.work -= lease.work;
        let Told { requests, work, .. } = &mut self.told;
        let (requests, work) = match lease.began == self.ticks {
            true => (&mut self.since.requests, &mut self.since.tokens),
            false => (requests, work),
        };
        *requests = requests.saturating_sub(1);
        *work = work.saturating_sub(lease.work);
    }

    /// As a decode worker: the tokens are those of prompts there.
    pub fn decode_load(&self) -> Load {
        let reported = Load { requests: self.told.requests, tokens: 0 };
        let since = Load { requests: self.since.requests, tokens: 0 };
        Load::estimate(reported, since, Load { requests: self.requests, tokens: self.tokens })
    }

    /// As a prefill worker: the tokens are those to compute.
    pub fn prefill_load(&self) -> Load {
        let reported = Load { requests: self.told.requests, tokens: self.told.work };
        Load::estimate(reported, self.since, Load { requests: self.requests, tokens: self.work })
    }

    /// What it told last.
    pub fn told(&self) -> &Told {
        &self.told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_counts_at_once_and_what_is_there_is_known_at_the_next_telling() {
        let mut known = Known::new(100, 0);
        known.hear(0, Told::default);
        let ours = known.begin(1000, 600);
        assert_eq!(known.prefill_load(), Load { requests: 1, tokens: 600 });
        assert_eq!(known.decode_load(), Load { requests: 1, tokens: 1000 });
        // Not yet: nothing was told since.
        known.hear(99, || Told { requests: 9, work: 9000, ..Told::default() });
        assert_eq!(known.prefill_load(), Load { requests: 1, tokens: 600 });
        known.hear(100, || Told { requests: 2, work: 900, ..Told::default() });
        assert_eq!(known.prefill_load(), Load { requests: 2, tokens: 900 });
        let more = known.begin(10, 10);
        assert_eq!(known.prefill_load(), Load { requests: 3, tokens: 910 });
        known.end(ours);
        assert_eq!(known.prefill_load(), Load { requests: 2, tokens: 310 });
        known.end(more);
        assert_eq!(known.prefill_load(), Load { requests: 1, tokens: 300 });
    }

    #[test]
    fn workers_tell_at_different_moments() {
        let mut known = Known::new(100, 30);
        known.hear(0, Told::default);
        known.hear(69, || Told { work: 5, ..Told::default() });
        assert_eq!(known.told().work, 0);
        known.hear(70, || Told { work: 5, ..Told::default() });
        assert_eq!(known.told().work, 5);
    }
}
