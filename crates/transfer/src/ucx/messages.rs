//! The control protocol: active messages between two engines, the only place where a peer's bytes become values.
//!
//! Where RMA is used, the bytes of batches never travel here: they are put and got straight between registered
//! memories, and these messages ask for the right to do so and take it back. Elsewhere they travel in pieces, each of
//! which the owner checks. All numbers little-endian; every message fits [`MAX_MESSAGE`] bytes; a message is refused as
//! a whole if any byte of it is not understood. UCX does not promise that active messages arrive in the order they were
//! sent, so nothing here relies on it.
//!
//! ```text
//! client                                                  owner
//! hello    kvasirUX 8 | version 4 | segment 8 | incarnation 8
//!                                                         welcome  kvasirVX 8 | version 4 | verdict 1 | rma 1
//! write    request 8 | grant key 8 | n 2 | n × { offset 8 | len 4 } | bytes
//!                                                         wrote    request 8
//! read     request 8 | grant key 8 | n 2 | n × { offset 8 | len 4 }
//!                                                         data     request 8 | bytes
//!
//! with RMA:
//! open     request 8 | grant key 8
//!                                                         opened   request 8 | grant 8 | readable 4 | writable 4 | regions 2
//!                                                         ranges   request 8 | access 1 | first 4 | n × { start 8 | end 8 }
//!                                                         region   request 8 | index 2 | base 8 | len 8 | address 8 | rkey
//!                                                         refused  request 8 | refusal 1
//!                                                         unable   request 8
//!                                                         revoke   grant 8
//! left     grant 8
//! notice   request 8 | grant key 8 | bytes
//!                                                         noticed  request 8 | 0, or 1 + refusal 1
//! ```
//!
//! `refused` answers a write, a read and an open. `rma`: whether the owner's memory may be reached without its part.
//!
//! `grant` is the owner's number for one opening of a grant by one peer, never used twice. `left` says that nothing of
//! the client's touches the ranges any more, nor will: it answers `revoke`, also for a grant the client does not know
//! (yet). `unable`: the grant is good, but UCX can't reach its memory, or it has more ranges than this transport
//! carries. Hello and welcome keep this form in every protocol version; everything else may change with it.

use kvasir_types::{GrantKey, Incarnation, SegmentId};

use super::worker::MAX_MESSAGE;
use crate::{error::Refusal, plan::MAX_RANGES};

const HELLO: [u8; 8] = *b"kvasirUX";
const WELCOME: [u8; 8] = *b"kvasirVX";
/// Most ranges of one access that a grant opened over this transport has: bounds what the client keeps for it.
pub(super) const MAX_GRANT_RANGES: usize = 64 << 10;
/// Most regions that one grant reaches into.
pub(super) const MAX_GRANT_REGIONS: usize = 1024;
/// Most ranges of a grant in one message: those that tell of grants fit one packet.
pub(super) const RANGES_PER_MESSAGE: usize = 256;
/// Longest remote key.
pub(super) const MAX_KEY: usize = 4096;
/// Most bytes of a batch in one message.
pub(super) const MAX_PIECE: usize = 64 << 10;
/// What a piece's message needs besides its bytes, at most.
pub(super) const PIECE_HEAD: usize = 19 + 12 * MAX_RANGES;
const _: () = assert!(MAX_PIECE + PIECE_HEAD <= MAX_MESSAGE);

/// Half-open byte range `[start, end)` of a segment.
pub(super) type Bytes = (u64, u64);

/// A peer's opening of a grant, as numbered by the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct OpenId(pub(super) u64);

/// Tells answers to one client's requests apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct RequestId(pub(super) u64);

/// The owner's answer to a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Welcome,
    /// Another protocol version; the welcome carries ours.
    Version,
    /// Another segment, or an earlier life of this one.
    Stale,
    /// No connection left.
    Busy,
}

/// A stretch of the owner's segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) offset: u64,
    pub(super) len: u32,
}

/// Every message. Borrowed parts point into the message decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message<'a> {
    Hello {
        version: u32,
        segment: SegmentId,
        incarnation: Incarnation,
    },
    Welcome {
        version: u32,
        verdict: Verdict,
        rma: bool,
    },
    /// To be encoded without its bytes, which the sender appends.
    Write {
        request: RequestId,
        key: GrantKey,
        spans: Vec<Span>,
        bytes: &'a [u8],
    },
    Wrote {
        request: RequestId,
    },
    Read {
        request: RequestId,
        key: GrantKey,
        spans: Vec<Span>,
    },
    /// As `Write`.
    Data {
        request: RequestId,
        bytes: &'a [u8],
    },
    Open {
        request: RequestId,
        key: GrantKey,
    },
    Opened {
        request: RequestId,
        grant: OpenId,
        readable: u32,
        writable: u32,
        regions: u16,
    },
    Ranges {
        request: RequestId,
        writable: bool,
        first: u32,
        ranges: Vec<Bytes>,
    },
    Region {
        request: RequestId,
        index: u16,
        base: u64,
        len: u64,
        address: u64,
        key: &'a [u8],
    },
    Refused {
        request: RequestId,
        refusal: Refusal,
    },
    Unable {
        request: RequestId,
    },
    Revoke {
        grant: OpenId,
    },
    Left {
        grant: OpenId,
    },
    Notice {
        request: RequestId,
        key: GrantKey,
        bytes: &'a [u8],
    },
    Noticed {
        request: RequestId,
        result: Result<(), Refusal>,
    },
}

/// Bytes that are no message of ours, and in what way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("longer than a message may be")]
    Long,
    #[error("shorter than its kind of message is")]
    Short,
    #[error("{0} bytes more than its kind of message has")]
    Rest(usize),
    #[error("not the transfer protocol")]
    Magic,
    #[error("unknown {what} {value}")]
    Unknown { what: &'static str, value: u8 },
    #[error("{what} {value} is more than {limit}")]
    Limit { what: &'static str, value: u64, limit: u64 },
    #[error("a range that is empty or ends beyond 64 bits")]
    Range,
    #[error("ranges sum up to {sum} bytes, {len} came")]
    Sum { sum: u64, len: usize },
}

/// The first byte of each kind, except of hello and welcome, which open with their word.
mod kind {
    pub(super) const OPEN: u8 = 1;
    pub(super) const OPENED: u8 = 2;
    pub(super) const RANGES: u8 = 3;
    pub(super) const REGION: u8 = 4;
    pub(super) const REFUSED: u8 = 5;
    pub(super) const UNABLE: u8 = 6;
    pub(super) const REVOKE: u8 = 7;
    pub(super) const LEFT: u8 = 8;
    pub(super) const NOTICE: u8 = 9;
    pub(super) const NOTICED: u8 = 10;
    pub(super) const WRITE: u8 = 11;
    pub(super) const WROTE: u8 = 12;
    pub(super) const READ: u8 = 13;
    pub(super) const DATA: u8 = 14;
}

impl Message<'_> {
    /// Appends its bytes; never more than [`MAX_MESSAGE`] if what it borrows is within the limits above.
    pub(super) fn encode(&self, into: &mut Vec<u8>) {
        match *self {
            Self::Hello { version, segment, incarnation } => {
                into.extend_from_slice(&HELLO);
                into.extend_from_slice(&version.to_le_bytes());
                put_u64s(into, [segment.0, incarnation.0]);
            }
            Self::Welcome { version, verdict, rma } => {
                into.extend_from_slice(&WELCOME);
                into.extend_from_slice(&version.to_le_bytes());
                into.extend_from_slice(&[verdict as u8, rma.into()]);
            }
            Self::Write { request, key, ref spans, bytes } => {
                into.push(kind::WRITE);
                put_spans(into, request, key, spans);
                into.extend_from_slice(bytes);
            }
            Self::Wrote { request } => {
                into.push(kind::WROTE);
                put_u64s(into, [request.0]);
            }
            Self::Read { request, key, ref spans } => {
                into.push(kind::READ);
                put_spans(into, request, key, spans);
            }
            Self::Data { request, bytes } => {
                into.push(kind::DATA);
                put_u64s(into, [request.0]);
                into.extend_from_slice(bytes);
            }
            Self::Open { request, key } => {
                into.push(kind::OPEN);
                put_u64s(into, [request.0, key.0]);
            }
            Self::Opened { request, grant, readable, writable, regions } => {
                into.push(kind::OPENED);
                put_u64s(into, [request.0, grant.0]);
                into.extend_from_slice(&readable.to_le_bytes());
                into.extend_from_slice(&writable.to_le_bytes());
                into.extend_from_slice(&regions.to_le_bytes());
            }
            Self::Ranges { request, writable, first, ref ranges } => {
                into.push(kind::RANGES);
                put_u64s(into, [request.0]);
                into.push(writable.into());
                into.extend_from_slice(&first.to_le_bytes());
                ranges.iter().for_each(|&(start, end)| put_u64s(into, [start, end]));
            }
            Self::Region { request, index, base, len, address, key } => {
                into.push(kind::REGION);
                put_u64s(into, [request.0]);
                into.extend_from_slice(&index.to_le_bytes());
                put_u64s(into, [base, len, address]);
                into.extend_from_slice(key);
            }
            Self::Refused { request, refusal } => {
                into.push(kind::REFUSED);
                put_u64s(into, [request.0]);
                into.push(code(refusal));
            }
            Self::Unable { request } => {
                into.push(kind::UNABLE);
                put_u64s(into, [request.0]);
            }
            Self::Revoke { grant } => {
                into.push(kind::REVOKE);
                put_u64s(into, [grant.0]);
            }
            Self::Left { grant } => {
                into.push(kind::LEFT);
                put_u64s(into, [grant.0]);
            }
            Self::Notice { request, key, bytes } => {
                into.push(kind::NOTICE);
                put_u64s(into, [request.0, key.0]);
                into.extend_from_slice(bytes);
            }
            Self::Noticed { request, result } => {
                into.push(kind::NOTICED);
                put_u64s(into, [request.0]);
                into.push(result.err().map_or(0, code));
            }
        }
    }
}

impl<'a> Message<'a> {
    /// Reads one message: all of `bytes`, or an error. Allocates no more than a message's worth of ranges.
    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        if bytes.len() > MAX_MESSAGE {
            return Err(Malformed::Long);
        }
        let mut rest = Reader(bytes);
        let message = match rest.u8()? {
            b'k' => return Self::decode_greeting(bytes),
            kind::OPEN => Self::Open { request: rest.request()?, key: GrantKey(rest.u64()?) },
            kind::OPENED => Self::decode_opened(&mut rest)?,
            kind::RANGES => Self::decode_ranges(&mut rest)?,
            kind::REGION => Self::decode_region(&mut rest)?,
            kind::REFUSED => Self::Refused { request: rest.request()?, refusal: refusal(rest.u8()?)? },
            kind::UNABLE => Self::Unable { request: rest.request()? },
            kind::REVOKE => Self::Revoke { grant: OpenId(rest.u64()?) },
            kind::LEFT => Self::Left { grant: OpenId(rest.u64()?) },
            kind::NOTICE => Self::Notice { request: rest.request()?, key: GrantKey(rest.u64()?), bytes: rest.all() },
            kind::NOTICED => {
                let request = rest.request()?;
                let result = match rest.u8()? {
                    0 => Ok(()),
                    code => Err(refusal(code)?),
                };
                Self::Noticed { request, result }
            }
            kind::WRITE => Self::decode_write(&mut rest)?,
            kind::WROTE => Self::Wrote { request: rest.request()? },
            kind::READ => {
                let (request, key, spans, _) = rest.spans()?;
                Self::Read { request, key, spans }
            }
            kind::DATA => Self::Data { request: rest.request()?, bytes: rest.all() },
            value => return Err(Malformed::Unknown { what: "kind of message", value }),
        };
        rest.end()?;
        Ok(message)
    }

    fn decode_greeting(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut rest = Reader(bytes);
        let word = rest.take(8)?;
        let version = u32::from_le_bytes(rest.array()?);
        let message = if word == HELLO {
            Self::Hello { version, segment: SegmentId(rest.u64()?), incarnation: Incarnation(rest.u64()?) }
        } else if word == WELCOME {
            let verdict = match rest.u8()? {
                0 => Verdict::Welcome,
                1 => Verdict::Version,
                2 => Verdict::Stale,
                3 => Verdict::Busy,
                value => return Err(Malformed::Unknown { what: "verdict", value }),
            };
            let rma = match rest.u8()? {
                0 => false,
                1 => true,
                value => return Err(Malformed::Unknown { what: "flag", value }),
            };
            Self::Welcome { version, verdict, rma }
        } else {
            return Err(Malformed::Magic);
        };
        rest.end()?;
        Ok(message)
    }

    fn decode_write(rest: &mut Reader<'a>) -> Result<Self, Malformed> {
        let (request, key, spans, sum) = rest.spans()?;
        let bytes = rest.all();
        if bytes.len() as u64 != sum {
            return Err(Malformed::Sum { sum, len: bytes.len() });
        }
        Ok(Self::Write { request, key, spans, bytes })
    }

    fn decode_opened(rest: &mut Reader<'a>) -> Result<Self, Malformed> {
        let (request, grant) = (rest.request()?, OpenId(rest.u64()?));
        let (readable, writable) = (u32::from_le_bytes(rest.array()?), u32::from_le_bytes(rest.array()?));
        let regions = u16::from_le_bytes(rest.array()?);
        limit("number of ranges", readable.into(), MAX_GRANT_RANGES as u64)?;
        limit("number of ranges", writable.into(), MAX_GRANT_RANGES as u64)?;
        limit("number of regions", regions.into(), MAX_GRANT_REGIONS as u64)?;
        Ok(Self::Opened { request, grant, readable, writable, regions })
    }

    fn decode_ranges(rest: &mut Reader<'a>) -> Result<Self, Malformed> {
        let request = rest.request()?;
        let writable = match rest.u8()? {
            0 => false,
            1 => true,
            value => return Err(Malformed::Unknown { what: "access", value }),
        };
        let first = u32::from_le_bytes(rest.array()?);
        let (entries, []) = rest.all().as_chunks::<16>() else { return Err(Malformed::Short) };
        limit("number of ranges", entries.len() as u64, RANGES_PER_MESSAGE as u64)?;
        limit("number of ranges", u64::from(first) + entries.len() as u64, MAX_GRANT_RANGES as u64)?;
        let ranges: Vec<Bytes> = entries.iter().map(|entry| (u64_at(entry, 0), u64_at(entry, 8))).collect();
        if ranges.iter().any(|(start, end)| start >= end) {
            return Err(Malformed::Range);
        }
        Ok(Self::Ranges { request, writable, first, ranges })
    }

    fn decode_region(rest: &mut Reader<'a>) -> Result<Self, Malformed> {
        let (request, index) = (rest.request()?, u16::from_le_bytes(rest.array()?));
        let (base, len, address, key) = (rest.u64()?, rest.u64()?, rest.u64()?, rest.all());
        limit("index of a region", index.into(), MAX_GRANT_REGIONS as u64 - 1)?;
        limit("length of a key", key.len() as u64, MAX_KEY as u64)?;
        if len == 0 || base.checked_add(len).is_none() || address.checked_add(len).is_none() {
            return Err(Malformed::Range);
        }
        Ok(Self::Region { request, index, base, len, address, key })
    }
}

fn put_u64s<const N: usize>(into: &mut Vec<u8>, values: [u64; N]) {
    values.iter().for_each(|value| into.extend_from_slice(&value.to_le_bytes()));
}

fn put_spans(into: &mut Vec<u8>, request: RequestId, key: GrantKey, spans: &[Span]) {
    put_u64s(into, [request.0, key.0]);
    into.extend_from_slice(&(spans.len() as u16).to_le_bytes());
    for span in spans {
        into.extend_from_slice(&span.offset.to_le_bytes());
        into.extend_from_slice(&span.len.to_le_bytes());
    }
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

fn code(refusal: Refusal) -> u8 {
    match refusal {
        Refusal::UnknownGrant => 1,
        Refusal::Access => 2,
        Refusal::Bounds => 3,
        Refusal::Full => 4,
    }
}

fn refusal(code: u8) -> Result<Refusal, Malformed> {
    match code {
        1 => Ok(Refusal::UnknownGrant),
        2 => Ok(Refusal::Access),
        3 => Ok(Refusal::Bounds),
        4 => Ok(Refusal::Full),
        value => Err(Malformed::Unknown { what: "refusal", value }),
    }
}

fn limit(what: &'static str, value: u64, limit: u64) -> Result<(), Malformed> {
    if value <= limit { Ok(()) } else { Err(Malformed::Limit { what, value, limit }) }
}

/// What is left of a message.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn request(&mut self) -> Result<RequestId, Malformed> {
        Ok(RequestId(self.u64()?))
    }

    /// The head of a piece: its ranges are bounded in number and sum.
    fn spans(&mut self) -> Result<(RequestId, GrantKey, Vec<Span>, u64), Malformed> {
        let (request, key) = (self.request()?, GrantKey(self.u64()?));
        let count = u16::from_le_bytes(self.array()?);
        limit("number of ranges", count.into(), MAX_RANGES as u64)?;
        let table = self.take(usize::from(count) * 12)?;
        let (mut spans, mut sum) = (Vec::with_capacity(count.into()), 0u64);
        let mut entries = Reader(table);
        for _ in 0..count {
            let span = Span { offset: entries.u64()?, len: u32::from_le_bytes(entries.array()?) };
            if span.len == 0 || span.offset.checked_add(span.len.into()).is_none() {
                return Err(Malformed::Range);
            }
            sum += u64::from(span.len);
            spans.push(span);
        }
        limit("length of a piece", sum, MAX_PIECE as u64)?;
        Ok((request, key, spans, sum))
    }

    fn all(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed::Rest(self.0.len())) }
    }
}

#[cfg(test)]
mod tests;
