//! The requests of a conversation go where its first one went, without anybody remembering where that was.
//!
//! Rendezvous hashing: each worker gets a number made of the session's and its own; the highest wins. A worker that comes or
//! goes moves only the sessions that it wins or had. One that has more than its share to do is passed over for the next.

use super::{Ask, Decision, LeastLoaded, MAX_PREFILL, Policy, Pool, Reason};

/// A worker has too much to do beyond so many times the mean, in eighths …
const SHARE_EIGHTHS: u64 = 10;
/// … and so many requests …
const SPARE_REQUESTS: u64 = 4;
/// … or prompt tokens more.
const SPARE_TOKENS: u64 = 8192;

/// The same workers for all requests of a session; by load for those without one.
#[derive(Clone, Copy, Debug, Default)]
pub struct SessionSticky;

impl Policy for SessionSticky {
    fn decide(&self, ask: &Ask, pool: &Pool) -> Option<Decision> {
        let Some(session) = ask.session else { return LeastLoaded.decide(ask, pool) };
        let requests: Vec<u64> = pool.decode.iter().map(|option| option.load.requests).collect();
        let most = bound(&requests, SPARE_REQUESTS);
        let mut order: Vec<usize> = (0..pool.decode.len()).collect();
        order.sort_by_key(|&at| std::cmp::Reverse(score(session, pool.decode[at].key)));
        // One of them has no more than the mean.
        let decode = order.iter().copied().find(|&at| requests[at] <= most)?;
        let reason = if order.first() == Some(&decode) { Reason::Session } else { Reason::SessionBusy };

        let mut prefill: Vec<usize> =
            pool.pairs(decode).iter().copied().filter(|&at| at < pool.prefill.len()).collect();
        let tokens: Vec<u64> = prefill.iter().map(|&at| pool.prefill[at].load.tokens).collect();
        let most = bound(&tokens, SPARE_TOKENS);
        prefill.sort_by_key(|&at| {
            let option = &pool.prefill[at];
            (option.load.tokens > most, std::cmp::Reverse(score(session, option.key)))
        });
        prefill.truncate(MAX_PREFILL);
        Some(Decision { decode, prefill, reason })
    }
}

fn bound(loads: &[u64], spare: u64) -> u64 {
    let sum: u64 = loads.iter().sum();
    sum.saturating_mul(SHARE_EIGHTHS) / (8 * loads.len().max(1) as u64) + spare
}

/// SplitMix64's output function over both.
fn score(session: u64, key: u64) -> u64 {
    let mut z = session ^ key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
