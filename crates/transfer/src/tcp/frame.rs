//! The tcp wire format: the only place where a peer's bytes become values.
//!
//! All numbers little-endian, all headers of fixed size; nothing is allocated for a length a peer claims before that
//! length has been checked against the constants here.
//!
//! ```text
//! client                                            owner
//! hello   kvasirTX 8 | version 4 | 0 4 | segment 8 | incarnation 8
//!                                                   welcome  kvasirRX 8 | version 4 | verdict 4      (or closed)
//! request op 1 | 0 1 | ranges 2 | payload 4 | id 8 | grant key 8
//!         ranges × { offset 8 | len 4 }
//!         write: payload bytes, range after range
//!         notice: no ranges, payload bytes
//!                                                   answer   status 1 | 0 3 | payload 4 | id 8
//!                                                            read, granted: payload bytes
//! ```
//!
//! `payload` of a request is the sum of its ranges, for a read as well. The owner answers in the order of the requests.
//! With `Config::tls` all of this is inside a TLS session (see [`super::tls`]).
//! Hello and welcome keep this form in every protocol version; everything after them may change with it. One request
//! carries many ranges (a layer push is 32 ranges of 4 KiB) and gets one answer.

use kvasir_types::{GrantKey, Incarnation, SegmentId};

use crate::{batch::Op, error::Refusal, notice::MAX_NOTICE_BYTES, plan::MAX_RANGES};

/// Opens a hello.
const HELLO: [u8; 8] = *b"kvasirTX";
/// Opens a welcome. Another word than the hello's, because a connect to a port nobody listens on can, rarely, meet itself
/// (TCP's simultaneous open) and then hears its own hello.
const WELCOME: [u8; 8] = *b"kvasirRX";
/// How a TLS handshake begins: type and major version of a record.
const TLS_HANDSHAKE: [u8; 2] = [22, 3];
/// Most payload bytes in one frame.
pub(crate) const MAX_PAYLOAD: u32 = 16 << 20;
pub(crate) const HELLO_BYTES: usize = 32;
pub(crate) const WELCOME_BYTES: usize = 16;
pub(crate) const REQUEST_BYTES: usize = 24;
pub(crate) const RANGE_BYTES: usize = 12;
pub(crate) const ANSWER_BYTES: usize = 16;

/// Bytes that are no frame of ours, and in what way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("not the transfer protocol")]
    Magic,
    #[error("TLS, which this engine does not speak: its Config::tls is not set")]
    Secured,
    #[error("unknown {what} {value}")]
    Unknown { what: &'static str, value: u32 },
    #[error("{what} {value} is not in 1 to {limit}")]
    Limit { what: &'static str, value: u64, limit: u64 },
    #[error("ranges sum up to {sum} bytes, the header says {payload}")]
    Sum { sum: u64, payload: u32 },
    #[error("a range ends beyond 64 bits")]
    Overflow,
}

/// Who the client thinks it talks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) version: u32,
    pub(crate) segment: SegmentId,
    pub(crate) incarnation: Incarnation,
}

/// The owner's answer to a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Welcome,
    /// Another protocol version; the welcome carries ours.
    Version,
    /// Another segment, or an earlier life of this one.
    Stale,
    /// No connection left.
    Busy,
    /// Only TLS is spoken here.
    Secured,
    /// No TLS is spoken here.
    Plain,
}

/// What a request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Move(Op),
    Notice,
}

/// The fixed part of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) verb: Verb,
    pub(crate) ranges: u16,
    pub(crate) payload: u32,
    pub(crate) id: u64,
    pub(crate) key: GrantKey,
}

/// A stretch of the owner's segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) result: Result<(), Refusal>,
    pub(crate) payload: u32,
    pub(crate) id: u64,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl Hello {
    pub(crate) fn encode(self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(&HELLO);
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.segment.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.incarnation.0.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, Malformed> {
        if bytes[..8] != HELLO {
            return Err(if bytes[..2] == TLS_HANDSHAKE { Malformed::Secured } else { Malformed::Magic });
        }
        let (segment, incarnation) = (SegmentId(u64_at(bytes, 16)), Incarnation(u64_at(bytes, 24)));
        Ok(Self { version: u32_at(bytes, 8), segment, incarnation })
    }
}

impl Verdict {
    pub(crate) fn encode(self, version: u32) -> [u8; WELCOME_BYTES] {
        let mut bytes = [0; WELCOME_BYTES];
        bytes[..8].copy_from_slice(&WELCOME);
        bytes[8..12].copy_from_slice(&version.to_le_bytes());
        let code: u32 = match self {
            Self::Welcome => 0,
            Self::Version => 1,
            Self::Stale => 2,
            Self::Busy => 3,
            Self::Secured => 4,
            Self::Plain => 5,
        };
        bytes[12..].copy_from_slice(&code.to_le_bytes());
        bytes
    }

    /// The verdict and the owner's version.
    pub(crate) fn decode(bytes: &[u8; WELCOME_BYTES]) -> Result<(Self, u32), Malformed> {
        if bytes[..8] != WELCOME {
            return Err(Malformed::Magic);
        }
        let verdict = match u32_at(bytes, 12) {
            0 => Self::Welcome,
            1 => Self::Version,
            2 => Self::Stale,
            3 => Self::Busy,
            4 => Self::Secured,
            5 => Self::Plain,
            value => return Err(Malformed::Unknown { what: "verdict", value }),
        };
        Ok((verdict, u32_at(bytes, 8)))
    }
}

impl Request {
    pub(crate) fn encode(self, into: &mut Vec<u8>) {
        let verb = match self.verb {
            Verb::Move(Op::Read) => 0,
            Verb::Move(Op::Write) => 1,
            Verb::Notice => 2,
        };
        into.extend_from_slice(&[verb, 0]);
        into.extend_from_slice(&self.ranges.to_le_bytes());
        into.extend_from_slice(&self.payload.to_le_bytes());
        into.extend_from_slice(&self.id.to_le_bytes());
        into.extend_from_slice(&self.key.0.to_le_bytes());
    }

    pub(crate) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, Malformed> {
        let verb = match bytes[0] {
            0 => Verb::Move(Op::Read),
            1 => Verb::Move(Op::Write),
            2 => Verb::Notice,
            value => return Err(Malformed::Unknown { what: "operation", value: value.into() }),
        };
        let (ranges, payload) = (u16_at(bytes, 2), u32_at(bytes, 4));
        if verb == Verb::Notice {
            limit("number of ranges plus one", u64::from(ranges) + 1, 1)?;
            limit("length of a notice plus one", u64::from(payload) + 1, MAX_NOTICE_BYTES as u64 + 1)?;
        } else {
            limit("number of ranges", ranges.into(), MAX_RANGES as u64)?;
            limit("payload", payload.into(), MAX_PAYLOAD.into())?;
        }
        Ok(Self { verb, ranges, payload, id: u64_at(bytes, 8), key: GrantKey(u64_at(bytes, 16)) })
    }

    /// Bytes of the table that follows: bounded, as the number of ranges was.
    pub(crate) fn table_bytes(self) -> usize {
        usize::from(self.ranges) * RANGE_BYTES
    }

    /// The table's ranges, into `spans`; they sum up to the payload (a notice has none, whatever its payload).
    pub(crate) fn decode_table(self, table: &[u8], spans: &mut Vec<Span>) -> Result<(), Malformed> {
        spans.clear();
        let mut sum = 0u64;
        for entry in table.chunks_exact(RANGE_BYTES) {
            let span = Span { offset: u64_at(entry, 0), len: u32_at(entry, 8) };
            limit("length of a range", span.len.into(), self.payload.into())?;
            span.offset.checked_add(span.len.into()).ok_or(Malformed::Overflow)?;
            sum += u64::from(span.len);
            spans.push(span);
        }
        if sum == u64::from(self.payload) || self.verb == Verb::Notice {
            Ok(())
        } else {
            Err(Malformed::Sum { sum, payload: self.payload })
        }
    }
}

fn limit(what: &'static str, value: u64, limit: u64) -> Result<(), Malformed> {
    if (1..=limit).contains(&value) { Ok(()) } else { Err(Malformed::Limit { what, value, limit }) }
}

impl Span {
    pub(crate) fn encode(self, into: &mut Vec<u8>) {
        into.extend_from_slice(&self.offset.to_le_bytes());
        into.extend_from_slice(&self.len.to_le_bytes());
    }
}

impl Answer {
    pub(crate) fn encode(self) -> [u8; ANSWER_BYTES] {
        let mut bytes = [0; ANSWER_BYTES];
        bytes[0] = match self.result {
            Ok(()) => 0,
            Err(Refusal::UnknownGrant) => 1,
            Err(Refusal::Access) => 2,
            Err(Refusal::Bounds) => 3,
            Err(Refusal::Full) => 4,
        };
        bytes[4..8].copy_from_slice(&self.payload.to_le_bytes());
        bytes[8..].copy_from_slice(&self.id.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; ANSWER_BYTES]) -> Result<Self, Malformed> {
        let result = match bytes[0] {
            0 => Ok(()),
            1 => Err(Refusal::UnknownGrant),
            2 => Err(Refusal::Access),
            3 => Err(Refusal::Bounds),
            4 => Err(Refusal::Full),
            value => return Err(Malformed::Unknown { what: "status", value: value.into() }),
        };
        let payload = u32_at(bytes, 4);
        if payload > 0 {
            limit("payload", payload.into(), MAX_PAYLOAD.into())?;
        }
        Ok(Self { result, payload, id: u64_at(bytes, 8) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_itself(id: u64, key: u64, lens in prop::collection::vec(1u32..4096, 1..=MAX_RANGES), write: bool) {
            let verb = Verb::Move(if write { Op::Write } else { Op::Read });
            let spans: Vec<_> = lens.iter().map(|&len| Span { offset: key >> 1, len }).collect();
            let request = Request { verb, ranges: spans.len() as u16, payload: lens.iter().sum(), id, key: GrantKey(key) };
            let mut bytes = Vec::new();
            request.encode(&mut bytes);
            spans.iter().for_each(|span| span.encode(&mut bytes));
            let (head, table) = bytes.split_at(REQUEST_BYTES);
            let decoded = Request::decode(head.try_into().unwrap()).unwrap();
            prop_assert_eq!(decoded, request);
            prop_assert_eq!(table.len(), decoded.table_bytes());
            let mut again = Vec::new();
            decoded.decode_table(table, &mut again).unwrap();
            prop_assert_eq!(again, spans);
            let hello = Hello { version: 7, segment: SegmentId(id), incarnation: Incarnation(key) };
            prop_assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        }

        #[test]
        fn no_bytes_panic_a_decoder_or_pass_its_bounds(
            hello: [u8; HELLO_BYTES], welcome: [u8; WELCOME_BYTES], answer: [u8; ANSWER_BYTES],
            mut request: [u8; REQUEST_BYTES], small: bool, table in prop::collection::vec(any::<u8>(), 0..MAX_RANGES * RANGE_BYTES),
        ) {
            let _ = (Hello::decode(&hello), Verdict::decode(&welcome));
            if let Ok(answer) = Answer::decode(&answer) {
                prop_assert!(answer.payload <= MAX_PAYLOAD);
            }
            if small {
                request[0] &= 1;
                request[3] = 0;
                request[7] = 0;
            }
            if let Ok(request) = Request::decode(&request) {
                prop_assert!(request.table_bytes() <= MAX_RANGES * RANGE_BYTES && request.payload <= MAX_PAYLOAD);
                let mut spans = Vec::new();
                if request.verb != Verb::Notice && request.decode_table(&table, &mut spans).is_ok() {
                    prop_assert_eq!(spans.iter().map(|s| u64::from(s.len)).sum::<u64>(), u64::from(request.payload));
                }
                prop_assert!(spans.capacity() <= 2 * MAX_RANGES);
            }
        }
    }

    #[test]
    fn answers_and_verdicts_round_trip() {
        for result in
            [Ok(()), Err(Refusal::UnknownGrant), Err(Refusal::Access), Err(Refusal::Bounds), Err(Refusal::Full)]
        {
            let answer = Answer { result, payload: 5, id: 6 };
            assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }
        let hello = Hello { version: 1, segment: SegmentId(0), incarnation: Incarnation(0) }.encode();
        assert_eq!(Verdict::decode(hello.first_chunk().unwrap()), Err(Malformed::Magic), "a hello is no welcome");
        for verdict in
            [Verdict::Welcome, Verdict::Version, Verdict::Stale, Verdict::Busy, Verdict::Secured, Verdict::Plain]
        {
            assert_eq!(Verdict::decode(&verdict.encode(9)), Ok((verdict, 9)));
        }
    }
}
