use proptest::prelude::*;

use super::*;

fn refusals() -> impl Strategy<Value = Refusal> {
    prop::sample::select(vec![Refusal::UnknownGrant, Refusal::Access, Refusal::Bounds, Refusal::Full])
}

/// Any message that an engine may send; its borrowed bytes are the slice given.
fn messages(bytes: &'static [u8]) -> impl Strategy<Value = Message<'static>> {
    let verdicts = [Verdict::Welcome, Verdict::Version, Verdict::Stale, Verdict::Busy];
    let number = || any::<u64>();
    let request = || any::<u64>().prop_map(RequestId);
    let range = (0..u64::MAX - 1, 1u64..9).prop_map(|(start, len)| (start, start.saturating_add(len)));
    let count = || 0..=MAX_GRANT_RANGES as u32;
    prop_oneof![
        (any::<u32>(), number(), number()).prop_map(|(version, a, b)| Message::Hello {
            version,
            segment: SegmentId(a),
            incarnation: Incarnation(b)
        }),
        (any::<u32>(), prop::sample::select(verdicts.to_vec()), any::<bool>())
            .prop_map(|(version, verdict, rma)| Message::Welcome { version, verdict, rma }),
        (request(), number(), 0..u64::MAX / 2).prop_map(move |(request, key, offset)| Message::Write {
            request,
            key: GrantKey(key),
            spans: vec![Span { offset, len: 1 }, Span { offset, len: bytes.len() as u32 - 1 }],
            bytes
        }),
        request().prop_map(|request| Message::Wrote { request }),
        (request(), number(), prop::collection::vec((0..u64::MAX / 2, 1u32..200), 0..MAX_RANGES)).prop_map(
            |(request, key, spans)| Message::Read {
                request,
                key: GrantKey(key),
                spans: spans.into_iter().map(|(offset, len)| Span { offset, len }).collect()
            }
        ),
        request().prop_map(move |request| Message::Data { request, bytes }),
        (request(), number()).prop_map(|(request, key)| Message::Open { request, key: GrantKey(key) }),
        (request(), number(), count(), count(), 0..=MAX_GRANT_REGIONS as u16).prop_map(
            |(request, grant, readable, writable, regions)| Message::Opened {
                request,
                grant: OpenId(grant),
                readable,
                writable,
                regions
            }
        ),
        (request(), any::<bool>(), 0..1000u32, prop::collection::vec(range, 0..=RANGES_PER_MESSAGE))
            .prop_map(|(request, writable, first, ranges)| Message::Ranges { request, writable, first, ranges }),
        (request(), 0..MAX_GRANT_REGIONS as u16, 0..u64::MAX / 2, 1..u64::MAX / 4, 0..u64::MAX / 2).prop_map(
            move |(request, index, base, len, address)| Message::Region {
                request,
                index,
                base,
                len,
                address,
                key: bytes
            }
        ),
        (request(), refusals()).prop_map(|(request, refusal)| Message::Refused { request, refusal }),
        request().prop_map(|request| Message::Unable { request }),
        number().prop_map(|grant| Message::Revoke { grant: OpenId(grant) }),
        number().prop_map(|grant| Message::Left { grant: OpenId(grant) }),
        (request(), number()).prop_map(move |(request, key)| Message::Notice { request, key: GrantKey(key), bytes }),
        (request(), prop::option::of(refusals()))
            .prop_map(|(request, refusal)| Message::Noticed { request, result: refusal.map_or(Ok(()), Err) }),
    ]
}

proptest! {
    #[test]
    fn what_is_encoded_fits_and_decodes_to_itself(message in messages(&[7; 300]), cut in 0usize..600) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        prop_assert!(bytes.len() <= MAX_MESSAGE);
        prop_assert_eq!(Message::decode(&bytes), Ok(message.clone()));
        // Cut short it is refused, or (where it ends in a list) another message, never this one.
        if cut < bytes.len() {
            prop_assert_ne!(Message::decode(&bytes[..cut]), Ok(message));
        }
    }

    #[test]
    fn no_bytes_panic_the_decoder_or_pass_its_bounds(kind in 0u8..16, mut bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        if kind > 0 && let Some(first) = bytes.first_mut() {
            *first = kind;
        }
        match Message::decode(&bytes) {
            Ok(Message::Opened { readable, writable, regions, .. }) => {
                prop_assert!(readable as usize <= MAX_GRANT_RANGES && writable as usize <= MAX_GRANT_RANGES);
                prop_assert!(usize::from(regions) <= MAX_GRANT_REGIONS);
            }
            Ok(Message::Ranges { first, ranges, .. }) => {
                prop_assert!(first as usize + ranges.len() <= MAX_GRANT_RANGES);
                prop_assert!(ranges.iter().all(|(start, end)| start < end));
            }
            Ok(Message::Region { index, base, len, address, key, .. }) => {
                prop_assert!(usize::from(index) < MAX_GRANT_REGIONS && key.len() <= MAX_KEY);
                prop_assert!(base.checked_add(len).is_some() && address.checked_add(len).is_some());
            }
            Ok(Message::Write { spans, .. } | Message::Read { spans, .. }) => {
                prop_assert!(spans.iter().map(|span| span.len as usize).sum::<usize>() <= MAX_PIECE);
            }
            Ok(_) | Err(_) => {}
        }
    }
}

#[test]
fn the_longest_of_each_fits() {
    let mut bytes = Vec::new();
    let ranges = vec![(1, 2); RANGES_PER_MESSAGE];
    Message::Ranges { request: RequestId(1), writable: true, first: 0, ranges }.encode(&mut bytes);
    assert!(bytes.len() <= MAX_MESSAGE);
    bytes.clear();
    let key = &[0; MAX_KEY];
    Message::Region { request: RequestId(1), index: 0, base: 0, len: 1, address: 0, key }.encode(&mut bytes);
    assert!(bytes.len() <= MAX_MESSAGE);
    assert_eq!(Message::decode(&vec![kind::DATA; MAX_MESSAGE + 1]), Err(Malformed::Long));
}
