//! The control protocol's part in [`crate::fuzz`]: one message, either way.

use kvasir_types::{GrantKey, Incarnation, PROTOCOL_VERSION, SegmentId};

use super::messages::{Message, OpenId, RequestId, Span, Verdict};

/// What a peer's message becomes: nothing, or a value with exactly one form.
pub(crate) fn message(bytes: &[u8]) {
    if let Ok(message) = Message::decode(bytes) {
        let mut again = Vec::with_capacity(bytes.len());
        message.encode(&mut again);
        assert_eq!(again, bytes, "a message has one form");
    }
}

/// One message of each shape.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let (request, key, grant) = (RequestId(1), GrantKey(2), OpenId(3));
    let spans = || vec![Span { offset: 4096, len: 2 }, Span { offset: 0, len: 1 }];
    let messages = [
        Message::Hello { version: PROTOCOL_VERSION, segment: SegmentId(1), incarnation: Incarnation(2) },
        Message::Welcome { version: PROTOCOL_VERSION, verdict: Verdict::Welcome, rma: true },
        Message::Write { request, key, spans: spans(), bytes: &[7; 3] },
        Message::Read { request, key, spans: spans() },
        Message::Data { request, bytes: &[7; 5] },
        Message::Open { request, key },
        Message::Opened { request, grant, readable: 2, writable: 0, regions: 1 },
        Message::Ranges { request, writable: false, first: 0, ranges: vec![(0, 5), (7, 9)] },
        Message::Region { request, index: 0, base: 0, len: 10, address: 1 << 40, key: &[5; 16] },
        Message::Revoke { grant },
        Message::Notice { request, key, bytes: b"said" },
        Message::Noticed { request, result: Ok(()) },
    ];
    let encode = |message: &Message<'_>| {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        bytes
    };
    messages.iter().map(encode).collect()
}
