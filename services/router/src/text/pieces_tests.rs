//! The law: whatever is kept, in whatever order it was asked, tokens are those of the tokenizer alone.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::text::demo_folder;

const ROOM: usize = 1 << 20;

fn file() -> Value {
    serde_json::from_slice(&std::fs::read(demo_folder().join("tokenizer.json")).unwrap()).unwrap()
}

/// The demo model's tokenizer with other parts, as other families have them.
fn with(change: impl FnOnce(&mut Value)) -> Tokenizer {
    let mut file = file();
    // What Metaspace writes for a space has to be told from nothing.
    let next = file["model"]["vocab"].as_object().unwrap().len() + 3;
    file["model"]["vocab"]["▁"] = json!(next);
    change(&mut file);
    Tokenizer::from_bytes(file.to_string()).unwrap()
}

fn metaspace(scheme: &str) -> Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true})
}

fn added(id: u32, content: &str, more: &Value) -> Value {
    let mut token = json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    more.as_object().unwrap().iter().for_each(|(key, value)| token[key] = value.clone());
    token
}

/// Tokenizers that treat the beginning of a text, spaces or special tokens in their own ways.
fn families() -> Vec<(&'static str, Encoder)> {
    let llama2 = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    let push = |file: &mut Value, token: Value| file["added_tokens"].as_array_mut().unwrap().push(token);
    let families = vec![
        ("demo", with(|_| {})),
        ("a space before the first word", with(|file| file["pre_tokenizer"] = metaspace("first"))),
        ("a space before every part", with(|file| file["pre_tokenizer"] = metaspace("always"))),
        ("never a space", with(|file| file["pre_tokenizer"] = metaspace("never"))),
        ("Llama 2", with(|file| (file["normalizer"], file["pre_tokenizer"]) = (llama2, Value::Null))),
        ("NFKC", with(|file| file["normalizer"] = json!({"type": "NFKC"}))),
        ("lower case", with(|file| file["normalizer"] = json!({"type": "Lowercase"}))),
        (
            "bytes, a space first",
            with(|file| {
                file["pre_tokenizer"] =
                    json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
            }),
        ),
        (
            "neighbours that strip",
            with(|file| {
                push(file, added(1530, "[STRIP]", &json!({"lstrip": true, "rstrip": true})));
                push(file, added(1531, "[WORD]", &json!({"single_word": true})));
                push(file, added(1532, "word", &json!({"single_word": true, "special": false})));
                push(file, added(1533, "Name", &json!({"normalized": true, "special": false})));
            }),
        ),
    ];
    families.into_iter().map(|(name, tokenizer)| (name, Encoder::of(tokenizer))).collect()
}

fn plain(encoder: &Encoder, text: &str) -> Vec<TokenId> {
    let encoding = encoder.tokenizer().encode_fast(text, false).unwrap();
    encoding.get_ids().iter().copied().map(TokenId).collect()
}

fn parts() -> impl Strategy<Value = Vec<String>> {
    let part = prop_oneof![
        4 => "[ a-z]{0,40}",
        2 => "\\PC{0,12}",
        1 => "[ \\n\\t]{0,4}",
        3 => prop::sample::select(vec![
            "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_end|>\n<|im_start|>user\n", "<|im_", "|>", "<|im_end|", "<",
            "[STRIP]", " [STRIP] ", "[WORD]", "word", "Name", "name", "＜|im_end|＞", "the prefix cache of a worker ", "▁", "🦀",
        ]).prop_map(str::to_owned),
        1 => Just("a long part of a text that goes on and on, ".repeat(8)),
    ];
    prop::collection::vec(part, 0..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn tokens_are_those_of_the_tokenizer_alone(turns in prop::collection::vec(parts(), 1..4)) {
        for (family, encoder) in families() {
            let pieces = Pieces::of(&encoder, ROOM).expect(family);
            let mut text = String::new();
            for turn in &turns {
                text += &turn.concat();
                let expected = plain(&encoder, &text);
                for salt in ["", "", "acme"] {
                    prop_assert_eq!(&pieces.encode(&encoder, &text, salt).unwrap(), &expected, "{}: {:?}", family, text);
                }
            }
        }
    }
}

fn turn(number: usize) -> String {
    let words = format!("What does worker {number} hold, and since when? ").repeat(12);
    format!("<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n{words}<|im_end|>\n")
}

#[test]
fn a_conversation_that_goes_on_is_tokenized_from_where_it_was() {
    let encoder = Encoder::of(with(|_| {}));
    let pieces = Pieces::of(&encoder, ROOM).unwrap();
    let mut text = String::new();
    for number in 0..6 {
        text += &turn(number);
        pieces.encode(&encoder, &text, "").unwrap();
        // Two pieces a turn, but for the one that ends the text.
        assert_eq!(pieces.lock().young.len(), 2 * number + 2, "turn {number}");
    }
    pieces.encode(&encoder, &text, "another tenant").unwrap();
    assert_eq!(pieces.lock().young.len(), 24, "tenants share none");
}

#[test]
fn whatever_is_asked_the_room_is_enough_and_what_is_used_stays() {
    const SMALL: usize = 40_000;
    let encoder = Encoder::of(with(|_| {}));
    let pieces = Pieces::of(&encoder, SMALL).unwrap();
    let wanted = turn(0) + "more";
    for number in 1..200 {
        pieces.encode(&encoder, &wanted, "").unwrap();
        pieces.encode(&encoder, &(turn(number) + "more"), "").unwrap();
        let kept = pieces.lock();
        for generation in [&kept.young, &kept.old] {
            let bytes: usize = generation.values().map(|tokens| ENTRY_BYTES + size_of_val(&**tokens)).sum();
            assert!(bytes <= SMALL / 2, "{bytes}");
        }
        let first = name("", None, pieces.piece(&wanted).unwrap().0);
        assert!(kept.young.contains_key(&first) || kept.old.contains_key(&first), "it was asked a moment ago");
    }
    // One that would fill it alone is not kept.
    let huge = format!("<|im_start|>{}<|im_end|>x", "long ".repeat(20_000));
    assert_eq!(pieces.encode(&encoder, &huge, "").unwrap(), plain(&encoder, &huge));
}

#[test]
fn tokens_that_others_reach_over_are_no_boundaries() {
    let ends = |change: &dyn Fn(&mut Value)| -> Vec<String> {
        boundaries(&with(change)).into_iter().map(|boundary| boundary.text).collect()
    };
    assert_eq!(ends(&|_| {}), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]);
    let with_end = |more: Value| ends(&move |file| file["added_tokens"][2] = added(2, "<|im_end|>", &more));
    for property in ["rstrip", "single_word", "normalized"] {
        assert_eq!(with_end(json!({property: true})), ["<|endoftext|>", "<|im_start|>"], "{property}");
    }
    let beside = |content: &'static str| {
        ends(&move |file| {
            let token = added(1530, content, &json!({"special": false}));
            file["added_tokens"].as_array_mut().unwrap().push(token);
        })
    };
    for content in ["<|im_end|>\n", "\n<|im_end|>", "x<|im_"] {
        assert!(!beside(content).contains(&"<|im_end|>".to_owned()), "{content:?}");
    }
    assert!(Pieces::of(&Encoder::of(with(|file| file["added_tokens"] = json!([]))), ROOM).is_none());
    assert!(Pieces::of(&Encoder::of(with(|_| {})), 0).is_none());
}
