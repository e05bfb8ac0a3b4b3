//! A process that speaks the wire protocol and lies.

use std::io::Write;

use kvasir_transfer::{Access, Refused};
use kvasir_types::{GrantKey, PROTOCOL_VERSION, SegmentDescriptor, TransportKind::Tcp};
use serde::{Deserialize, Serialize};

use crate::{
    peer::{Ask, Setup},
    process::Process,
    support::{MIB, RawPeer, bytes, config, engine, grant, wait_until},
};

const LEN: u32 = 1 << 16;

/// How to misbehave.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Lie {
    /// Write one byte more than is granted.
    Beyond,
    /// Write where only reading is granted.
    Direction,
    /// A request with more ranges than there can be.
    Ranges,
    /// Ranges that sum up to something else than the header says.
    Sum,
    /// No protocol at all.
    Noise,
    /// A life that the owner has not.
    Life,
}

impl Lie {
    /// Tells it, with all the bytes that go with it; whether the owner closed the connection.
    pub fn tell(self, target: &SegmentDescriptor, key: GrantKey) -> bool {
        let (segment, life) = (target.segment.0, target.incarnation.0);
        let mut peer = match self {
            Self::Noise | Self::Life => RawPeer::connect(target),
            _ => RawPeer::welcomed(target),
        };
        let bytes = vec![0x66; LEN as usize + 1];
        match self {
            Self::Beyond | Self::Direction => {
                let len = if matches!(self, Self::Beyond) { LEN + 1 } else { LEN };
                peer.request(1, 7, key, &[(0, len)]);
                let _ = peer.0.write_all(&bytes[..len as usize]); // cut short when the owner has closed
                let (status, payload, id) = peer.answer();
                assert!(status > 0 && (payload, id) == (0, 7), "not refused");
            }
            Self::Ranges | Self::Sum => {
                let mut request = vec![1, 0];
                let ranges: u16 = if matches!(self, Self::Ranges) { u16::MAX } else { 1 };
                request.extend_from_slice(&ranges.to_le_bytes());
                request.extend_from_slice(&LEN.to_le_bytes());
                request.extend_from_slice(&[0; 8]);
                request.extend_from_slice(&key.0.to_le_bytes());
                request.extend_from_slice(&[0; 8]);
                request.extend_from_slice(&(LEN - 1).to_le_bytes());
                let _ = peer.0.write_all(&request);
                let _ = peer.0.write_all(&bytes);
            }
            Self::Noise => _ = peer.0.write_all(&bytes),
            Self::Life => assert_eq!(peer.hello(PROTOCOL_VERSION, segment, life ^ 1), 2),
        }
        peer.is_closed()
    }
}

#[test]
fn a_process_that_lies_is_counted_refused_and_disconnected_and_the_others_are_served() {
    let owner = engine(config(Tcp), MIB);
    let target = owner.descriptor();
    let write = grant(&owner, 0, LEN.into(), Access::Write);
    let read = grant(&owner, 0, LEN.into(), Access::Read);
    let (mut liar, mut honest) = (Process::spawn(), Process::spawn());
    for peer in [&mut liar, &mut honest] {
        peer.start(Setup::new("peer", Tcp, MIB));
    }
    let counted = |refused: Refused| [refused.bounds, refused.access, refused.malformed, refused.stale];
    let mut expected = [0; 4];
    for (lie, key, counter) in [
        (Lie::Beyond, write.key(), 0),
        (Lie::Direction, read.key(), 1),
        (Lie::Ranges, write.key(), 2),
        (Lie::Sum, write.key(), 2),
        (Lie::Noise, write.key(), 2),
        (Lie::Life, write.key(), 3),
    ] {
        assert!(liar.ask::<bool>(&Ask::Lie { target: target.clone(), key: key.0, lie }), "{lie:?}: not disconnected");
        expected[counter] += 1;
        assert_eq!(counted(owner.stats().refused), expected, "{lie:?}");
        assert_eq!(bytes(&owner, 0, LEN as usize + 1), vec![0; LEN as usize + 1], "{lie:?}: something landed");
        honest.ask::<()>(&Ask::Submit {
            write: false,
            target: target.clone(),
            key: read.key().0,
            ranges: vec![(0, 0, LEN.into())],
            deadline_ms: 30_000,
        });
        assert_eq!(honest.wait(), [Ok(LEN.into())], "{lie:?}");
    }
    drop(liar);
    drop(honest);
    wait_until("no connection is left", || owner.stats().accepted_connections == 0);
}
