//! Laws of the conversions: what we send comes back as it was, what is out of bounds is refused by name.

use kvasir_types::{
    Grammar, Incarnation, KvDtype, KvLayout, PROTOCOL_VERSION, Priority, RegionInfo, Sampled, Sampling,
    SegmentDescriptor, SegmentId, TokenId, TopLogprob, TransportAddress, TransportKind,
};
use proptest::prelude::*;

use crate::{Error, check_protocol, convert, v1};

fn layouts() -> impl Strategy<Value = KvLayout> {
    let dtype = prop_oneof![Just(KvDtype::Bf16), Just(KvDtype::F16), Just(KvDtype::F32), Just(KvDtype::Fp8)];
    let dims = (1u32..256, 0u32..256);
    (1u32..64, 1u32..100, 1u32..64, dims, dtype).prop_map(|(block_size, layers, kv_heads, (k_dim, v_dim), dtype)| {
        KvLayout { block_size, layers, kv_heads, k_dim, v_dim, dtype }
    })
}

fn grammars() -> impl Strategy<Value = Grammar> {
    prop_oneof![
        Just(Grammar::JsonObject),
        ".{0,40}".prop_map(|text| Grammar::JsonSchema(text.into())),
        ".{0,40}".prop_map(|text| Grammar::Regex(text.into())),
        prop::collection::vec(".{0,9}", 1..5).prop_map(|texts| Grammar::Choice(texts.into())),
        ".{0,40}".prop_map(|text| Grammar::Lark(text.into())),
    ]
}

prop_compose! {
    fn samplings()(
        (temperature, top_p, top_k, min_p) in (0f32..=2.0, 0.01f32..=1.0, 0u32..100, 0f32..=1.0),
        (repetition_penalty, presence_penalty, frequency_penalty) in (0.01f32..=100.0, -2f32..=2.0, -2f32..=2.0),
        bias in prop::collection::btree_map(any::<u32>(), -100f32..=100.0, 0..8),
        (max_tokens, min_tokens, continued) in (1u32..10_000, any::<u32>(), any::<u32>()),
        stop in prop::collection::vec(any::<u32>(), 0..8),
        (seed, ignore_eos, max_tokens_asked) in (any::<u64>(), any::<bool>(), any::<bool>()),
        logprobs in prop::option::of(0u8..=20),
        grammar in prop::option::of(grammars()),
    ) -> Sampling {
        Sampling {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            logit_bias: bias.into_iter().map(|(token, bias)| (TokenId(token), bias)).collect(),
            grammar,
            seed,
            max_tokens,
            max_tokens_asked,
            min_tokens,
            continued,
            stop_token_ids: convert::tokens(&stop),
            ignore_eos,
            logprobs,
        }
    }
}

proptest! {
    #[test]
    fn layouts_round_trip(layout in layouts()) {
        prop_assert_eq!(KvLayout::try_from(&v1::KvLayout::from(layout)).ok(), layout.check().ok());
    }

    #[test]
    fn samplings_round_trip(sampling in samplings()) {
        prop_assert_eq!(Sampling::try_from(&v1::Sampling::from(&sampling)), Ok(sampling));
    }

    #[test]
    fn tokens_round_trip(id in any::<u32>(), logprob in prop::option::of(-50f32..0.0), top in prop::collection::vec((any::<u32>(), -50f32..0.0), 0..20)) {
        let top = top.into_iter().map(|(id, logprob)| TopLogprob { token: TokenId(id), logprob }).collect();
        let sampled = Sampled { token: TokenId(id), logprob, top };
        prop_assert_eq!(Sampled::try_from(&v1::Token::from(&sampled)), Ok(sampled));
    }

    #[test]
    fn no_message_bytes_make_a_conversion_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        use prost::Message;
        if let Ok(wire) = v1::Sampling::decode(&bytes[..]) {
            let _ = Sampling::try_from(&wire);
        }
        if let Ok(wire) = v1::KvLayout::decode(&bytes[..]) {
            let _ = KvLayout::try_from(&wire);
        }
        if let Ok(wire) = v1::SegmentDescriptor::decode(&bytes[..]) {
            let _ = SegmentDescriptor::try_from(&wire);
        }
    }
}

#[test]
fn a_newer_peers_transports_are_skipped_and_the_known_ones_kept() {
    let ours = SegmentDescriptor {
        name: "decode-0".into(),
        regions: vec![RegionInfo { base: 0, len: 4096, shared: true }],
        segment: SegmentId(1),
        incarnation: Incarnation(2),
        len: 3,
        transports: vec![TransportAddress { kind: TransportKind::Tcp, address: "127.0.0.1:1".into() }],
    };
    let mut wire = v1::SegmentDescriptor::from(&ours);
    wire.transports.insert(0, v1::TransportAddress { kind: "warp".into(), address: "ncc-1701".into() });
    assert_eq!(SegmentDescriptor::try_from(&wire), Ok(ours));
}

#[test]
fn another_protocol_version_is_refused_by_number() {
    assert_eq!(check_protocol(PROTOCOL_VERSION), Ok(()));
    assert_eq!(check_protocol(99), Err(Error::Version { theirs: 99, ours: PROTOCOL_VERSION }));
}

#[test]
fn what_an_older_peer_does_not_say_means_none() {
    let wire = v1::Sampling { repetition_penalty: None, ..v1::Sampling::from(&Sampling::default()) };
    assert_eq!(Sampling::try_from(&wire), Ok(Sampling::default()));
}

#[test]
fn a_priority_nobody_knows_is_online() {
    for priority in [Priority::Online, Priority::Offline] {
        assert_eq!(convert::priority(v1::Priority::from(priority).into()), priority);
    }
    for unknown in [0, 3, -1, i32::MAX] {
        assert_eq!(convert::priority(unknown), Priority::Online, "{unknown}");
    }
}

#[test]
fn bad_values_are_refused_by_name() {
    let good = v1::Sampling::from(&Sampling::default());
    let bias = |token, bias| v1::LogitBias { token, bias };
    let long = "x".repeat(convert::MAX_GRAMMAR_BYTES + 1);
    let grammar = |form| Some(v1::Grammar { form });
    for (field, bad) in [
        ("min_p", v1::Sampling { min_p: 1.1, ..good.clone() }),
        ("repetition_penalty", v1::Sampling { repetition_penalty: Some(0.0), ..good.clone() }),
        ("repetition_penalty", v1::Sampling { repetition_penalty: Some(f32::NAN), ..good.clone() }),
        ("presence_penalty", v1::Sampling { presence_penalty: -2.1, ..good.clone() }),
        ("frequency_penalty", v1::Sampling { frequency_penalty: f32::INFINITY, ..good.clone() }),
        ("logit_bias", v1::Sampling { logit_bias: (0..1025).map(|t| bias(t, 1.0)).collect(), ..good.clone() }),
        ("logit_bias.bias", v1::Sampling { logit_bias: vec![bias(1, f32::NAN)], ..good.clone() }),
        ("logit_bias.token", v1::Sampling { logit_bias: vec![bias(1, 1.0), bias(1, 2.0)], ..good.clone() }),
        ("grammar.form", v1::Sampling { grammar: grammar(None), ..good.clone() }),
        ("grammar", v1::Sampling { grammar: grammar(Some(v1::grammar::Form::Regex(long))), ..good.clone() }),
        (
            "grammar.choice",
            v1::Sampling { grammar: grammar(Some(v1::grammar::Form::Choice(Default::default()))), ..good.clone() },
        ),
        ("temperature", v1::Sampling { temperature: f32::NAN, ..good.clone() }),
        ("temperature", v1::Sampling { temperature: -0.1, ..good.clone() }),
        ("top_p", v1::Sampling { top_p: 0.0, ..good.clone() }),
        ("max_tokens", v1::Sampling { max_tokens: 0, ..good.clone() }),
        ("stop_token_ids", v1::Sampling { stop_token_ids: vec![0; 65], ..good.clone() }),
        ("logprobs", v1::Sampling { logprobs: Some(21), ..good.clone() }),
    ] {
        let error = Sampling::try_from(&bad).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
    assert!(convert::fingerprint(&[0; 15]).is_err());
    assert!(convert::salt(&"x".repeat(257)).is_err());
}

proptest! {
    #[test]
    fn packed_hashes_come_back_and_others_are_refused(hashes in prop::collection::vec(any::<[u8; 16]>(), 0..20), cut in 1usize..16) {
        let packed = convert::pack16(hashes.iter());
        let back = convert::block_hashes(&packed, hashes.len()).unwrap();
        prop_assert!(back.iter().map(|hash| hash.0).eq(hashes.iter().copied()));
        prop_assert_eq!(convert::checksums(&packed, 20).unwrap(), hashes.clone());
        if let Some(limit) = hashes.len().checked_sub(1) {
            let (got, field) = (hashes.len(), "hashes");
            prop_assert_eq!(convert::block_hashes(&packed, limit), Err(Error::TooMany { field, got, limit }));
            let torn = convert::block_hashes(&packed[cut..], 20);
            prop_assert!(matches!(torn, Err(Error::Length { .. })), "{torn:?}");
        }
    }
}
