//! A peer's bytes through everything that makes values of them: for the fuzzer (`fuzz/`, `scripts/fuzz`) and nothing else.
//!
//! The first byte of an input chooses a conversation of `CONVERSATIONS`, the rest is what the peer sends in it. A
//! conversation reads as the transport's own threads do, but from memory; it stops where they would close the connection.
//! What has to hold: no panic, and no allocation larger than [`LARGEST_ALLOCATION`], which [`Bounded`] checks in the
//! fuzzer's process.

use std::alloc::{GlobalAlloc, Layout, System};

use kvasir_types::{GrantKey, Incarnation, PROTOCOL_VERSION, SegmentId};

use crate::{
    batch::Op,
    notice::MAX_NOTICE_BYTES,
    plan::MAX_RANGES,
    shm,
    tcp::frame::{
        ANSWER_BYTES, Answer, HELLO_BYTES, Hello, MAX_PAYLOAD, RANGE_BYTES, REQUEST_BYTES, Request, Span, Verb,
        Verdict, WELCOME_BYTES,
    },
    ucx,
};

/// No message makes this side allocate more than this in one piece (frames go straight from and into registered memory).
pub const LARGEST_ALLOCATION: usize = 64 << 10;

/// One for each role in each transport's protocol; an input's first byte, modulo their number, is an index.
const CONVERSATIONS: &[fn(&[u8])] = &[tcp_owner, tcp_client, shm::fuzz::owner, shm::fuzz::client, ucx::fuzz::message];

/// Plays the conversation that `input` is.
pub fn decode(input: &[u8]) {
    if let Some((first, bytes)) = input.split_first() {
        CONVERSATIONS[usize::from(*first) % CONVERSATIONS.len()](bytes);
    }
}

/// Valid conversations, one of each kind at least, for the fuzzer to start from.
pub fn seeds() -> Vec<Vec<u8>> {
    let hello = Hello { version: PROTOCOL_VERSION, segment: SegmentId(1), incarnation: Incarnation(2) }.encode();
    let mut owner = [&[0][..], &hello].concat();
    for (verb, lens) in [(Verb::Move(Op::Write), &[3, 5][..]), (Verb::Move(Op::Read), &[1 << 20]), (Verb::Notice, &[])]
    {
        let (ranges, payload) = (lens.len() as u16, if verb == Verb::Notice { 6 } else { lens.iter().sum() });
        Request { verb, ranges, payload, id: 9, key: GrantKey(4) }.encode(&mut owner);
        lens.iter().for_each(|&len| Span { offset: 4096, len }.encode(&mut owner));
        if verb != Verb::Move(Op::Read) {
            owner.extend(0..payload as u8);
        }
    }
    let mut client = [&[1][..], &Verdict::Welcome.encode(PROTOCOL_VERSION)].concat();
    for payload in [0, 7] {
        client.extend(Answer { result: Ok(()), payload, id: 9 }.encode());
        client.extend(0..payload as u8);
    }
    let refused = [&[1][..], &Verdict::Stale.encode(PROTOCOL_VERSION)].concat();
    let [shm_owner, shm_client] = shm::fuzz::seeds();
    let shm = [[&[2][..], &shm_owner].concat(), [&[3][..], &shm_client].concat()];
    let ucx = ucx::fuzz::seeds().into_iter().map(|message| [&[4][..], &message].concat());
    [owner, client, refused].into_iter().chain(shm).chain(ucx).collect()
}

/// What is left of a peer's bytes.
struct Peer<'a>(&'a [u8]);

impl<'a> Peer<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn head<const LEN: usize>(&mut self) -> Option<&'a [u8; LEN]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(head)
    }
}

/// What a client sends to the owner of a segment.
fn tcp_owner(bytes: &[u8]) {
    let mut peer = Peer(bytes);
    let Some(Ok(hello)) = peer.head::<HELLO_BYTES>().map(Hello::decode) else { return };
    assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    let (mut spans, mut again) = (Vec::new(), Vec::new());
    while let Some(Ok(request)) = peer.head::<REQUEST_BYTES>().map(Request::decode) {
        assert_eq!(request.table_bytes(), usize::from(request.ranges) * RANGE_BYTES);
        let Some(table) = peer.take(request.table_bytes()) else { return };
        if request.decode_table(table, &mut spans).is_err() {
            return;
        }
        assert_eq!(spans.len(), usize::from(request.ranges));
        match request.verb {
            Verb::Move(_) => {
                assert!((1..=MAX_RANGES).contains(&spans.len()) && (1..=MAX_PAYLOAD).contains(&request.payload));
                assert_eq!(spans.iter().map(|span| u64::from(span.len)).sum::<u64>(), u64::from(request.payload));
                assert!(spans.iter().all(|span| span.len > 0 && span.offset.checked_add(span.len.into()).is_some()));
            }
            Verb::Notice => assert!(spans.is_empty() && request.payload as usize <= MAX_NOTICE_BYTES),
        }
        again.clear();
        spans.iter().for_each(|span| span.encode(&mut again));
        assert_eq!(again, table, "a table has one form");
        if request.verb != Verb::Move(Op::Read) && peer.take(request.payload as usize).is_none() {
            return;
        }
    }
}

/// What an owner sends to its client.
fn tcp_client(bytes: &[u8]) {
    let mut peer = Peer(bytes);
    let Some(Ok((Verdict::Welcome, _))) = peer.head::<WELCOME_BYTES>().map(Verdict::decode) else { return };
    while let Some(Ok(answer)) = peer.head::<ANSWER_BYTES>().map(Answer::decode) {
        assert!(answer.payload <= MAX_PAYLOAD);
        assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        if peer.take(answer.payload as usize).is_none() {
            return;
        }
    }
}

/// The system's allocator, which ends the process when more than [`LARGEST_ALLOCATION`] is asked for at once.
#[derive(Debug)]
pub struct Bounded;

// SAFETY: every call goes to the system's allocator unchanged, or does not return.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        check(size);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(old, layout) }
    }
}

fn check(size: usize) {
    if size > LARGEST_ALLOCATION {
        // No panic: unwinding would allocate, and must not leave an allocator. The fuzzer keeps the input of an abort.
        let text = b"an allocation beyond the bound\n";
        // SAFETY: writes a constant to stderr.
        let _ = unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::Index};

    use super::*;

    #[test]
    fn valid_conversations_are_understood_to_their_end() {
        let seeds = seeds();
        seeds.iter().for_each(|seed| decode(seed));
        let conversations: std::collections::HashSet<_> = seeds.iter().map(|seed| seed[0]).collect();
        assert_eq!(conversations.len(), CONVERSATIONS.len(), "a seed for each");
    }

    proptest! {
        /// The fuzzer in small, for every run of the tests: changed bytes, bytes left out, bytes put in.
        #[test]
        fn no_change_to_a_valid_conversation_breaks_the_decoders(
            seed: Index,
            changes in prop::collection::vec((any::<Index>(), 0..3, any::<u8>()), 1..12),
        ) {
            let seeds = seeds();
            let mut input = seed.get(&seeds).clone();
            for (at, change, byte) in changes {
                let at = at.index(input.len());
                match change {
                    0 => input[at] ^= byte,
                    1 if input.len() > 1 => drop(input.remove(at)),
                    _ => input.insert(at, byte),
                }
            }
            decode(&input);
        }
    }
}
