//! The shm conversations for [`crate::fuzz`]: what the other process says, taken in as a connection does, from memory.
//!
//! In an input each message has its length before it, in two bytes.

use kvasir_types::{GrantKey, Incarnation, PROTOCOL_VERSION, SegmentId};

use super::{
    granted::Arriving,
    messages::{Declined, MAX_MESSAGE, MAX_RANGES, ToClient, ToOwner, Verdict, encode_ranges},
};
use crate::{error::Refusal, notice::MAX_NOTICE_BYTES};

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (head, rest) = bytes.split_first_chunk()?;
        let (message, rest) = rest.split_at_checked(u16::from_le_bytes(*head).into())?;
        bytes = rest;
        Some(message)
    })
}

fn conversation(messages: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
    messages.into_iter().flat_map(|message| [&(message.len() as u16).to_le_bytes()[..], &message].concat()).collect()
}

/// What a client says.
pub(crate) fn owner(bytes: &[u8]) {
    for message in messages(bytes) {
        let Ok(said) = ToOwner::decode(message) else { return };
        if let ToOwner::Notice { bytes, .. } = said {
            assert!(bytes.len() <= MAX_NOTICE_BYTES);
        }
        assert!(message.len() <= MAX_MESSAGE);
        assert_eq!(said.encode(), message, "a message has one form");
    }
}

/// What an owner says.
pub(crate) fn client(bytes: &[u8]) {
    let mut arriving: Option<Arriving> = None;
    for message in messages(bytes) {
        let Ok(said) = ToClient::decode(message) else { return };
        assert_eq!(said.encode(), message, "a message has one form");
        match (said, &mut arriving) {
            (ToClient::Opened { readable, writable, .. }, None) => {
                assert!(readable as usize <= MAX_RANGES && writable as usize <= MAX_RANGES);
                arriving = Some(Arriving::new(readable, writable));
            }
            (ToClient::Ranges(ranges), Some(grant)) => match grant.take(&ranges) {
                Ok(()) => {}
                Err(_) => return,
            },
            (ToClient::Opened { .. } | ToClient::Ranges(_), _) => return,
            _ => {}
        }
        arriving.take_if(|grant| grant.is_complete());
    }
}

/// A valid conversation for each.
pub(crate) fn seeds() -> [Vec<u8>; 2] {
    let key = GrantKey(4);
    let client = [
        ToOwner::Hello { version: PROTOCOL_VERSION, segment: SegmentId(1), incarnation: Incarnation(2) },
        ToOwner::Open { key },
        ToOwner::Left { slot: 3 },
        ToOwner::Notice { id: 1, key, bytes: b"layer 3" },
    ];
    let owner = [
        ToClient::Welcome { version: PROTOCOL_VERSION, verdict: Verdict::Welcome },
        ToClient::Region { base: 0, len: 1 << 20, fd_offset: 0, writable: true },
        ToClient::Declined { key, why: Declined::Refused(Refusal::UnknownGrant) },
        ToClient::Noticed { id: 1, result: Ok(()) },
        ToClient::Gone { base: 0 },
        ToClient::Opened { key, nonce: 9, slot: 3, readable: 2, writable: 1 },
    ];
    let owner = owner.into_iter().map(ToClient::encode).chain(encode_ranges(&[(0, 4096), (8192, 9000), (4096, 8192)]));
    [conversation(client.into_iter().map(ToOwner::encode)), conversation(owner)]
}
