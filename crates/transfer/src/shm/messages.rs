//! What is said on an shm connection: the only place where the other process's bytes become values.
//!
//! One message is one datagram of the socket, at most [`MAX_MESSAGE`] bytes, numbers little-endian. Descriptors travel
//! beside the messages marked `+`.
//!
//! ```text
//! client                                             owner
//! hello   1 | kvasirSH | version | segment | incarnation
//!                                                    welcome 1 | kvasirSW | version | verdict   + slots, counts
//! open    2 | key                                    region  2 | base | len | fd offset | writable   + its memory
//!                                                            (each region once, before the first grant in it)
//!                                                    opened  3 | key | nonce | slot | readable | writable
//!                                                    ranges  4 | n × { start 8 | end 8 }   until all are told
//!                                              or    refused 5 | key | why
//! left    3 | slot                                   gone    6 | base          (the region left the segment)
//! notice  4 | id | key | bytes                       noticed 7 | id | result
//! ```
//!
//! Hello and welcome keep this form in every protocol version. Nothing is allocated for a number a peer claims before it
//! has been checked here.

use kvasir_types::{GrantKey, Incarnation, SegmentId};

use crate::{error::Refusal, notice::MAX_NOTICE_BYTES};

/// Most bytes of a message: enough for a notice and for [`RANGES_PER_MESSAGE`].
pub(super) const MAX_MESSAGE: usize = 16 << 10;
/// Ranges told in one message.
pub(super) const RANGES_PER_MESSAGE: usize = 1000;
/// Most ranges of one grant.
pub(super) const MAX_RANGES: usize = 64 << 10;

const HELLO: [u8; 8] = *b"kvasirSH";
const WELCOME: [u8; 8] = *b"kvasirSW";
const RANGE_BYTES: usize = 16;

/// Bytes that are no message of ours, and in what way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("not the transfer protocol")]
    Magic,
    #[error("message {kind} of {len} bytes")]
    Length { kind: u64, len: usize },
    #[error("unknown {what} {value}")]
    Unknown { what: &'static str, value: u64 },
    #[error("{what} {value} is above {limit}")]
    Limit { what: &'static str, value: u64, limit: u64 },
    #[error("ranges out of order or empty")]
    Ranges,
    #[error("{0} where none is due")]
    Unexpected(&'static str),
}

/// What a client says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ToOwner<'a> {
    Hello { version: u32, segment: SegmentId, incarnation: Incarnation },
    Open { key: GrantKey },
    Left { slot: u32 },
    Notice { id: u64, key: GrantKey, bytes: &'a [u8] },
}

/// The owner's answer to a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Welcome,
    /// Another protocol version; the welcome carries the owner's.
    Version,
    /// Another segment, or an earlier life of this one.
    Stale,
    /// No connection left.
    Busy,
    /// A user the owner does not serve.
    Forbidden,
}

/// Why a grant was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Declined {
    Refused(Refusal),
    /// No slot left, or more ranges than may be told.
    Busy,
    /// A region of it can't be mapped by others.
    NotShared,
}

/// What an owner says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ToClient<'a> {
    Welcome { version: u32, verdict: Verdict },
    Region { base: u64, len: u64, fd_offset: u64, writable: bool },
    Opened { key: GrantKey, nonce: u64, slot: u32, readable: u32, writable: u32 },
    Ranges(Ranges<'a>),
    Declined { key: GrantKey, why: Declined },
    Gone { base: u64 },
    Noticed { id: u64, result: Result<(), Refusal> },
}

/// Half-open ranges as they came: not empty, in order, not touching backwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ranges<'a>(&'a [u8]);

impl Ranges<'_> {
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.chunks_exact(RANGE_BYTES).map(|entry| (u64_at(entry, 0), u64_at(entry, 8)))
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// A message of `kind` made of 64-bit words: most of them.
fn words(kind: u64, rest: &[u64]) -> Vec<u8> {
    [kind].iter().chain(rest).flat_map(|word| word.to_le_bytes()).collect()
}

/// Kind and rest; the rest has as many words as its kind needs (`None`: any number of bytes).
fn split(message: &[u8], words_of: fn(u64) -> Option<usize>) -> Result<(u64, &[u8]), Malformed> {
    if message.len() < 8 || message.len() > MAX_MESSAGE {
        return Err(Malformed::Length { kind: 0, len: message.len() });
    }
    let (kind, rest) = (u64_at(message, 0), &message[8..]);
    match words_of(kind) {
        Some(words) if rest.len() != words * 8 => Err(Malformed::Length { kind, len: message.len() }),
        _ => Ok((kind, rest)),
    }
}

fn narrow(what: &'static str, value: u64, limit: u64) -> Result<u32, Malformed> {
    u32::try_from(value).ok().filter(|_| value <= limit).ok_or(Malformed::Limit { what, value, limit })
}

fn refusal_code(refusal: Refusal) -> u64 {
    match refusal {
        Refusal::UnknownGrant => 1,
        Refusal::Access => 2,
        Refusal::Bounds => 3,
        Refusal::Full => 4,
    }
}

fn refusal(code: u64) -> Result<Refusal, Malformed> {
    match code {
        1 => Ok(Refusal::UnknownGrant),
        2 => Ok(Refusal::Access),
        3 => Ok(Refusal::Bounds),
        4 => Ok(Refusal::Full),
        value => Err(Malformed::Unknown { what: "refusal", value }),
    }
}

impl ToOwner<'_> {
    pub(super) fn encode(self) -> Vec<u8> {
        match self {
            Self::Hello { version, segment, incarnation } => {
                words(1, &[u64::from_le_bytes(HELLO), version.into(), segment.0, incarnation.0])
            }
            Self::Open { key } => words(2, &[key.0]),
            Self::Left { slot } => words(3, &[slot.into()]),
            Self::Notice { id, key, bytes } => {
                let mut message = words(4, &[id, key.0]);
                message.extend_from_slice(bytes);
                message
            }
        }
    }
}

impl<'a> ToOwner<'a> {
    pub(super) fn decode(message: &'a [u8]) -> Result<Self, Malformed> {
        let (kind, rest) = split(message, |kind| match kind {
            1 => Some(4),
            2 | 3 => Some(1),
            _ => None,
        })?;
        Ok(match kind {
            1 if rest[..8] != HELLO => return Err(Malformed::Magic),
            1 => Self::Hello {
                version: narrow("version", u64_at(rest, 8), u32::MAX.into())?,
                segment: SegmentId(u64_at(rest, 16)),
                incarnation: Incarnation(u64_at(rest, 24)),
            },
            2 => Self::Open { key: GrantKey(u64_at(rest, 0)) },
            3 => Self::Left { slot: narrow("slot", u64_at(rest, 0), u32::MAX.into())? },
            4 if !(16..=16 + MAX_NOTICE_BYTES).contains(&rest.len()) => {
                return Err(Malformed::Length { kind, len: message.len() });
            }
            4 => Self::Notice { id: u64_at(rest, 0), key: GrantKey(u64_at(rest, 8)), bytes: &rest[16..] },
            value => return Err(Malformed::Unknown { what: "message", value }),
        })
    }
}

impl ToClient<'_> {
    pub(super) fn encode(self) -> Vec<u8> {
        match self {
            Self::Welcome { version, verdict } => {
                let code = match verdict {
                    Verdict::Welcome => 0,
                    Verdict::Version => 1,
                    Verdict::Stale => 2,
                    Verdict::Busy => 3,
                    Verdict::Forbidden => 4,
                };
                words(1, &[u64::from_le_bytes(WELCOME), version.into(), code])
            }
            Self::Region { base, len, fd_offset, writable } => words(2, &[base, len, fd_offset, writable.into()]),
            Self::Opened { key, nonce, slot, readable, writable } => {
                words(3, &[key.0, nonce, slot.into(), readable.into(), writable.into()])
            }
            Self::Ranges(ranges) => [&words(4, &[])[..], ranges.0].concat(),
            Self::Declined { key, why } => {
                let code = match why {
                    Declined::Refused(why) => refusal_code(why),
                    Declined::Busy => 100,
                    Declined::NotShared => 101,
                };
                words(5, &[key.0, code])
            }
            Self::Gone { base } => words(6, &[base]),
            Self::Noticed { id, result } => words(7, &[id, result.map_or_else(refusal_code, |()| 0)]),
        }
    }
}

/// The messages that tell `ranges`.
pub(super) fn encode_ranges(ranges: &[(u64, u64)]) -> impl Iterator<Item = Vec<u8>> {
    ranges.chunks(RANGES_PER_MESSAGE).map(|part| {
        let bytes: Vec<u8> = part.iter().flat_map(|&(start, end)| [start, end]).flat_map(u64::to_le_bytes).collect();
        ToClient::Ranges(Ranges(&bytes)).encode()
    })
}

impl<'a> ToClient<'a> {
    pub(super) fn decode(message: &'a [u8]) -> Result<Self, Malformed> {
        let (kind, rest) = split(message, |kind| match kind {
            1 => Some(3),
            2 => Some(4),
            3 => Some(5),
            5 | 7 => Some(2),
            6 => Some(1),
            _ => None,
        })?;
        Ok(match kind {
            1 if rest[..8] != WELCOME => return Err(Malformed::Magic),
            1 => {
                let verdict = match u64_at(rest, 16) {
                    0 => Verdict::Welcome,
                    1 => Verdict::Version,
                    2 => Verdict::Stale,
                    3 => Verdict::Busy,
                    4 => Verdict::Forbidden,
                    value => return Err(Malformed::Unknown { what: "verdict", value }),
                };
                Self::Welcome { version: narrow("version", u64_at(rest, 8), u32::MAX.into())?, verdict }
            }
            2 => {
                let (base, len, fd_offset) = (u64_at(rest, 0), u64_at(rest, 8), u64_at(rest, 16));
                // What no mapping can be: the rest is seen when it is mapped.
                let limit = i64::MAX as u64;
                for value in [base.checked_add(len), fd_offset.checked_add(len)] {
                    let value = value.unwrap_or(u64::MAX);
                    if value > limit {
                        return Err(Malformed::Limit { what: "end of a region", value, limit });
                    }
                }
                Self::Region { base, len, fd_offset, writable: flag(u64_at(rest, 24))? }
            }
            3 => Self::Opened {
                key: GrantKey(u64_at(rest, 0)),
                nonce: u64_at(rest, 8),
                slot: narrow("slot", u64_at(rest, 16), u32::MAX.into())?,
                readable: narrow("readable ranges", u64_at(rest, 24), MAX_RANGES as u64)?,
                writable: narrow("writable ranges", u64_at(rest, 32), MAX_RANGES as u64)?,
            },
            4 => {
                if rest.is_empty() || !rest.len().is_multiple_of(RANGE_BYTES) {
                    return Err(Malformed::Length { kind, len: message.len() });
                }
                let ranges = Ranges(rest);
                if ranges.iter().any(|(start, end)| start >= end) {
                    return Err(Malformed::Ranges);
                }
                Self::Ranges(ranges)
            }
            5 => {
                let why = match u64_at(rest, 8) {
                    100 => Declined::Busy,
                    101 => Declined::NotShared,
                    code => Declined::Refused(refusal(code)?),
                };
                Self::Declined { key: GrantKey(u64_at(rest, 0)), why }
            }
            6 => Self::Gone { base: u64_at(rest, 0) },
            7 => {
                let result = match u64_at(rest, 8) {
                    0 => Ok(()),
                    code => Err(refusal(code)?),
                };
                Self::Noticed { id: u64_at(rest, 0), result }
            }
            value => return Err(Malformed::Unknown { what: "message", value }),
        })
    }
}

fn flag(value: u64) -> Result<bool, Malformed> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        value => Err(Malformed::Unknown { what: "flag", value }),
    }
}

/// For [`crate::fuzz`]: whether the owner understands a message; what it understands has one form.
pub(crate) fn fuzz_to_owner(message: &[u8]) -> bool {
    let Ok(said) = ToOwner::decode(message) else { return false };
    assert_eq!(said.encode(), message, "a message has one form");
    true
}

/// For [`crate::fuzz`]: whether a client understands a message.
pub(crate) fn fuzz_to_client(message: &[u8]) -> bool {
    let Ok(said) = ToClient::decode(message) else { return false };
    assert_eq!(said.encode(), message, "a message has one form");
    if let ToClient::Ranges(ranges) = said {
        assert!(ranges.iter().all(|(start, end)| start < end));
    }
    true
}

/// For [`crate::fuzz`]: what a client says, to start from.
pub(crate) fn seeds_to_owner() -> Vec<Vec<u8>> {
    let (key, incarnation) = (GrantKey(4), Incarnation(2));
    vec![
        ToOwner::Hello { version: 1, segment: SegmentId(1), incarnation }.encode(),
        ToOwner::Open { key }.encode(),
        ToOwner::Left { slot: 3 }.encode(),
        ToOwner::Notice { id: 5, key, bytes: b"done" }.encode(),
    ]
}

/// For [`crate::fuzz`]: what an owner says, to start from.
pub(crate) fn seeds_to_client() -> Vec<Vec<u8>> {
    let key = GrantKey(4);
    let mut seeds = vec![
        ToClient::Welcome { version: 1, verdict: Verdict::Welcome }.encode(),
        ToClient::Region { base: 0, len: 4096, fd_offset: 0, writable: true }.encode(),
        ToClient::Opened { key, nonce: 6, slot: 1, readable: 2, writable: 0 }.encode(),
        ToClient::Declined { key, why: Declined::Busy }.encode(),
        ToClient::Gone { base: 0 }.encode(),
        ToClient::Noticed { id: 5, result: Err(Refusal::Full) }.encode(),
    ];
    seeds.extend(encode_ranges(&[(0, 10), (20, 30)]));
    seeds
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_refusal() -> impl Strategy<Value = Refusal> {
        prop_oneof![Just(Refusal::UnknownGrant), Just(Refusal::Access), Just(Refusal::Bounds), Just(Refusal::Full)]
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_itself(
            a in 0..u64::MAX / 4, b in 0..u64::MAX / 4, c: u64, slot: u32, few in 0..=MAX_RANGES as u32, yes: bool,
            bytes in prop::collection::vec(any::<u8>(), 0..=MAX_NOTICE_BYTES), refusal in any_refusal(),
        ) {
            for said in [
                ToOwner::Hello { version: slot, segment: SegmentId(a), incarnation: Incarnation(c) },
                ToOwner::Open { key: GrantKey(c) },
                ToOwner::Left { slot },
                ToOwner::Notice { id: c, key: GrantKey(a), bytes: &bytes },
            ] {
                let message = said.encode();
                prop_assert!(message.len() <= MAX_MESSAGE);
                prop_assert_eq!(ToOwner::decode(&message), Ok(said));
            }
            for verdict in [Verdict::Welcome, Verdict::Version, Verdict::Stale, Verdict::Busy, Verdict::Forbidden] {
                let said = ToClient::Welcome { version: slot, verdict };
                let message = said.encode();
                prop_assert_eq!(ToClient::decode(&message), Ok(said));
            }
            for why in [Declined::Refused(refusal), Declined::Busy, Declined::NotShared] {
                let said = ToClient::Declined { key: GrantKey(c), why };
                let message = said.encode();
                prop_assert_eq!(ToClient::decode(&message), Ok(said));
            }
            for said in [
                ToClient::Region { base: a, len: b, fd_offset: b, writable: yes },
                ToClient::Opened { key: GrantKey(c), nonce: a, slot, readable: few, writable: few },
                ToClient::Gone { base: c },
                ToClient::Noticed { id: c, result: Ok(()) },
                ToClient::Noticed { id: c, result: Err(refusal) },
            ] {
                let message = said.encode();
                prop_assert_eq!(ToClient::decode(&message), Ok(said));
            }
        }

        #[test]
        fn ranges_are_told_in_messages_within_the_bound(lens in prop::collection::vec(1u64..100, 0..3 * RANGES_PER_MESSAGE)) {
            let mut at = 0;
            let ranges: Vec<_> = lens.iter().map(|len| { at += len + 1; (at - len, at) }).collect();
            let mut told = Vec::new();
            for message in encode_ranges(&ranges) {
                prop_assert!(message.len() <= MAX_MESSAGE);
                match ToClient::decode(&message) {
                    Ok(ToClient::Ranges(part)) => told.extend(part.iter()),
                    other => panic!("{other:?}"),
                }
            }
            prop_assert_eq!(told, ranges);
        }

        #[test]
        fn no_bytes_panic_a_decoder_or_pass_its_bounds(
            kind in prop_oneof![0u64..10, any::<u64>()], rest in prop::collection::vec(any::<u8>(), 0..100), cut in 0usize..20,
            small: bool,
        ) {
            let mut message = words(kind, &[]);
            // Words that are small numbers pass the first checks.
            message.extend(rest.iter().enumerate().map(|(i, &byte)| if small && i % 8 > 0 { 0 } else { byte }));
            message.truncate(message.len() - cut.min(message.len()));
            let _ = ToOwner::decode(&message);
            match ToClient::decode(&message) {
                Ok(ToClient::Opened { readable, writable, .. }) => {
                    prop_assert!(readable as usize <= MAX_RANGES && writable as usize <= MAX_RANGES);
                }
                Ok(ToClient::Region { base, len, fd_offset, .. }) => {
                    prop_assert!(base + len <= i64::MAX as u64 && fd_offset + len <= i64::MAX as u64);
                }
                Ok(ToClient::Ranges(ranges)) => prop_assert!(ranges.iter().all(|(start, end)| start < end)),
                _ => {}
            }
        }
    }

    #[test]
    fn a_message_beyond_the_bound_is_refused() {
        let long = vec![4; MAX_MESSAGE + 1];
        assert!(matches!(ToOwner::decode(&long), Err(Malformed::Length { .. })));
        assert!(matches!(ToClient::decode(&long), Err(Malformed::Length { .. })));
        assert!(matches!(ToOwner::decode(&[]), Err(Malformed::Length { .. })));
    }
}
