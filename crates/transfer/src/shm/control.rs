//! The fence of shm: how an owner knows, without a message for each operation, that a client is out of its memory.
//!
//! The owner makes two pages for each connected client. In **slots** it writes and the client reads: word `s` holds the
//! nonce of the grant that the client has opened in slot `s`, or zero. In **counts** the client writes and the owner reads:
//! how many of the client's threads are inside slot `s` right now (and, for the owner's metrics, what they moved).
//!
//! ```text
//! client, around every copy                       owner, once, when the grant is revoked
//! C1  counts[s] += 1                              O1  slots[s] = 0
//! C2  slots[s] == my nonce?  no: C4               O2  counts[s] == 0?  yes: the client is out for good
//! C3      copy                                                         no: wait for `left(s)`, or for the
//! C4  counts[s] -= 1                                                   socket's end, then look again
//! C5  slots[s] == my nonce?  no: send `left(s)`
//! ```
//!
//! All of these are `SeqCst`, so there is one order of them that everybody agrees on. **No late byte**: suppose a copy runs
//! (C2 said yes) that the owner does not wait for (O2 said zero). C2 saw the nonce, so C2 comes before O1; with C1 before C2
//! and O1 before O2, O2 comes after C1, and saw its count. So zero means that it also saw C4 of that copy, and C4 is after C3.
//! **No wait for ever**: suppose O2 saw a count above zero. Every thread it counted has C4 after O2, so C5 after O1, sees the
//! nonce gone and sends `left`; the last one does so after the count is zero, so the owner's last look finds zero. A client
//! that dies in mid-copy sends nothing, but then its socket ends, which the kernel brings about only when no thread of it
//! runs any more (files are closed after the address space has been left). A client that is stopped in mid-copy, or that
//! lies about its counts, is waited for as long as it lives: **nothing else can stop a copy between two mappings**, so the
//! owner keeps the range fenced, counts it and says so.
//!
//! Nonces are never used twice by one owner, so a slot may be given to another grant as soon as the client is out of it: who
//! still believes in the old grant fails at C2. (It may then delay the revocation of the new grant by its C1 to C4; C5 sees
//! a foreign nonce and sends `left`, so that wait ends too.)
//!
//! The atomics are shared between processes; the memory model of the language knows threads only. To processors and kernel
//! both are the same: cores that access one physical page.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use super::mapping::{Mapping, Unfit, shared_memory};
use crate::batch::Op;

/// Grants that one client may have open at one owner.
pub(super) const SLOTS: u32 = 8192;
const SLOTS_BYTES: u64 = SLOTS as u64 * 8;
/// One cache line for each slot, so that threads in different slots don't share one.
const COUNT_STRIDE: u64 = 64;
const COUNTS_BYTES: u64 = SLOTS as u64 * COUNT_STRIDE;

/// The words of a cache line in `counts`.
#[derive(Clone, Copy)]
enum Count {
    Inside,
    ReadBytes,
    ReadOps,
    WrittenBytes,
    WrittenOps,
}

fn word(mapping: &Mapping, offset: u64) -> &AtomicU64 {
    let at = mapping.at(offset, 8).expect("slot numbers are checked against SLOTS");
    // SAFETY: eight bytes inside a mapping that lives as long as the reference, at a multiple of eight; every process
    // touches them only by atomic operations (or, if it misbehaves, spoils numbers, not our memory).
    unsafe { AtomicU64::from_ptr(at.cast()) }
}

fn slot_word(slots: &Mapping, slot: u32) -> &AtomicU64 {
    word(slots, u64::from(slot) * 8)
}

fn count_word(counts: &Mapping, slot: u32, count: Count) -> &AtomicU64 {
    word(counts, u64::from(slot) * COUNT_STRIDE + count as u64 * 8)
}

/// What a client says it has moved in one slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moved {
    pub(super) read_bytes: u64,
    pub(super) read_ops: u64,
    pub(super) written_bytes: u64,
    pub(super) written_ops: u64,
}

impl Moved {
    /// What came since `before`. The numbers are the client's and may be any.
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            read_bytes: self.read_bytes.wrapping_sub(before.read_bytes),
            read_ops: self.read_ops.wrapping_sub(before.read_ops),
            written_bytes: self.written_bytes.wrapping_sub(before.written_bytes),
            written_ops: self.written_ops.wrapping_sub(before.written_ops),
        }
    }
}

/// The owner's end, one for each client.
#[derive(Debug)]
pub(super) struct OwnerControl {
    slots: Mapping,
    counts: Mapping,
}

impl OwnerControl {
    /// Fresh pages, all slots closed; and their descriptors for the client: slots, counts.
    pub(super) fn new() -> Result<(Self, [OwnedFd; 2]), Unfit> {
        let (slots, slots_fd) = shared_memory(c"kvasir-shm-slots", SLOTS_BYTES, true)?;
        let (counts, counts_fd) = shared_memory(c"kvasir-shm-counts", COUNTS_BYTES, false)?;
        Ok((Self { slots, counts }, [slots_fd, counts_fd]))
    }

    /// Lets the client in under `nonce`, which is not zero and was never used before.
    pub(super) fn open(&self, slot: u32, nonce: u64) {
        debug_assert_ne!(nonce, 0);
        slot_word(&self.slots, slot).store(nonce, Ordering::SeqCst);
    }

    /// O1: nobody enters any more.
    pub(super) fn close(&self, slot: u32) {
        slot_word(&self.slots, slot).store(0, Ordering::SeqCst);
    }

    /// O2: whether the client is out of a closed slot.
    pub(super) fn is_empty(&self, slot: u32) -> bool {
        count_word(&self.counts, slot, Count::Inside).load(Ordering::SeqCst) == 0
    }

    /// What the client has moved in this slot since the connection began.
    pub(super) fn moved(&self, slot: u32) -> Moved {
        let get = |count| count_word(&self.counts, slot, count).load(Ordering::Relaxed);
        Moved {
            read_bytes: get(Count::ReadBytes),
            read_ops: get(Count::ReadOps),
            written_bytes: get(Count::WrittenBytes),
            written_ops: get(Count::WrittenOps),
        }
    }
}

/// The client's end.
#[derive(Debug)]
pub(super) struct ClientControl {
    slots: Mapping,
    counts: Mapping,
}

impl ClientControl {
    /// Maps what the owner sent.
    pub(super) fn new(slots: &OwnedFd, counts: &OwnedFd) -> Result<Self, Unfit> {
        let slots = Mapping::new(slots.as_fd(), 0, SLOTS_BYTES, false)?;
        let counts = Mapping::new(counts.as_fd(), 0, COUNTS_BYTES, true)?;
        Ok(Self { slots, counts })
    }

    /// Whether a grant was still open a moment ago.
    pub(super) fn is_open(&self, slot: u32, nonce: u64) -> bool {
        // No grant has nonce zero, whatever a closed slot holds.
        nonce != 0 && slot_word(&self.slots, slot).load(Ordering::SeqCst) == nonce
    }

    /// C1 and C2. While what is returned lives, the granted ranges may be touched. `left` sends the message of that name.
    pub(super) fn enter<'a, F: Fn(u32)>(&'a self, slot: u32, nonce: u64, left: F) -> Option<Inside<'a, F>> {
        count_word(&self.counts, slot, Count::Inside).fetch_add(1, Ordering::SeqCst);
        let inside = Inside { control: self, slot, nonce, left };
        self.is_open(slot, nonce).then_some(inside) // else dropped: C4, C5
    }
}

/// One thread's stay in a slot. Dropping it is the promise that it no longer touches the grant's ranges.
#[must_use]
pub(super) struct Inside<'a, F: Fn(u32)> {
    control: &'a ClientControl,
    slot: u32,
    nonce: u64,
    left: F,
}

impl<F: Fn(u32)> Inside<'_, F> {
    /// For the owner's metrics.
    pub(super) fn note_moved(&self, op: Op, bytes: u64, ops: u64) {
        let (byte_count, op_count) = match op {
            Op::Read => (Count::ReadBytes, Count::ReadOps),
            Op::Write => (Count::WrittenBytes, Count::WrittenOps),
        };
        count_word(&self.control.counts, self.slot, byte_count).fetch_add(bytes, Ordering::Relaxed);
        count_word(&self.control.counts, self.slot, op_count).fetch_add(ops, Ordering::Relaxed);
    }
}

impl<F: Fn(u32)> Drop for Inside<'_, F> {
    fn drop(&mut self) {
        count_word(&self.control.counts, self.slot, Count::Inside).fetch_sub(1, Ordering::SeqCst);
        if !self.control.is_open(self.slot, self.nonce) {
            (self.left)(self.slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            atomic::{AtomicBool, AtomicU32},
            mpsc,
        },
        thread,
    };

    use super::*;

    fn both() -> (OwnerControl, ClientControl) {
        let (owner, [slots, counts]) = OwnerControl::new().unwrap();
        (owner, ClientControl::new(&slots, &counts).unwrap())
    }

    fn silent(_: u32) {}

    #[test]
    fn only_the_nonce_of_an_open_slot_lets_in() {
        let (owner, client) = both();
        assert!(client.enter(3, 5, silent).is_none() && client.enter(3, 0, silent).is_none());
        owner.open(3, 5);
        assert!(client.enter(3, 6, silent).is_none());
        assert!(client.enter(2, 5, silent).is_none());
        let inside = client.enter(3, 5, |_| panic!("nothing was revoked")).unwrap();
        inside.note_moved(Op::Read, 100, 2);
        assert!(!owner.is_empty(3));
        drop(inside);
        assert!(owner.is_empty(3));
        assert_eq!(owner.moved(3), Moved { read_bytes: 100, read_ops: 2, ..Moved::default() });
    }

    #[test]
    fn who_was_inside_when_its_grant_ended_says_when_it_left() {
        let (owner, client) = both();
        owner.open(0, 1);
        let said = AtomicU32::new(0);
        let inside = client.enter(0, 1, |slot| said.store(slot + 10, Ordering::SeqCst)).unwrap();
        owner.close(0);
        assert!(!owner.is_empty(0));
        assert_eq!(said.load(Ordering::SeqCst), 0);
        drop(inside);
        assert!(owner.is_empty(0));
        assert_eq!(said.load(Ordering::SeqCst), 10);
        // One that comes too late says it too: it may have been counted.
        said.store(0, Ordering::SeqCst);
        assert!(client.enter(0, 1, |slot| said.store(slot + 20, Ordering::SeqCst)).is_none());
        assert_eq!(said.load(Ordering::SeqCst), 20);
    }

    #[test]
    fn pages_of_another_size_are_refused() {
        let (_, [slots, counts]) = OwnerControl::new().unwrap();
        assert!(ClientControl::new(&slots, &slots).is_err());
        assert!(ClientControl::new(&counts, &slots).is_err());
    }

    /// Threads enter and "copy" without pause while the owner opens and closes the slot: after the owner has been told
    /// that the slot is empty, nobody is ever seen inside, and every wait ends.
    #[test]
    fn no_copy_outlasts_its_fence_and_every_fence_ends() {
        const ROUNDS: u64 = 3000;
        let (owner, client) = both();
        let (nonce, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        // What the copies write: each thread a word of its own, with the nonce it believes in.
        let memory: [AtomicU64; 3] = Default::default();
        let (left, has_left) = mpsc::channel();
        let entered = AtomicU64::new(0);
        thread::scope(|scope| {
            for word in &memory {
                let (client, nonce, stop, left, entered) = (&client, &nonce, &stop, left.clone(), &entered);
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let mine = nonce.load(Ordering::Relaxed);
                        if let Some(_inside) = client.enter(0, mine, |slot| left.send(slot).unwrap()) {
                            for _ in 0..20 {
                                word.store(mine, Ordering::Relaxed);
                            }
                            entered.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            for round in 1..=ROUNDS {
                owner.open(0, round);
                nonce.store(round, Ordering::Relaxed);
                let before = entered.load(Ordering::Relaxed);
                // Now and then wait until somebody was in, else as fast as it goes.
                while round.is_multiple_of(4) && entered.load(Ordering::Relaxed) == before {
                    thread::yield_now();
                }
                owner.close(0);
                while !owner.is_empty(0) {
                    has_left.recv().unwrap();
                }
                memory.iter().for_each(|word| word.store(0, Ordering::Relaxed));
                for _ in 0..50 {
                    assert!(
                        memory.iter().all(|word| word.load(Ordering::Relaxed) == 0),
                        "a late byte in round {round}"
                    );
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(entered.load(Ordering::Relaxed) >= ROUNDS / 4);
    }
}
