//! The law: tokens are those of the library alone, whatever the text, and where this is not known to be so, it is left to it.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::text::demo_folder;

/// The expressions of published tokenizers.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn with(change: impl FnOnce(&mut Value)) -> Tokenizer {
    let mut file: Value =
        serde_json::from_slice(&std::fs::read(demo_folder().join("tokenizer.json")).unwrap()).unwrap();
    change(&mut file);
    Tokenizer::from_bytes(file.to_string()).unwrap()
}

fn bytes(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn split(pattern: &str, behavior: &str, invert: bool) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert})
}

fn steps(steps: &[Value]) -> impl FnOnce(&mut Value) + use<> {
    let sequence = json!({"type": "Sequence", "pretokenizers": steps});
    move |file| file["pre_tokenizer"] = sequence
}

fn ours() -> Vec<(&'static str, Encoder)> {
    let digits = |alone: bool| json!({"type": "Digits", "individual_digits": alone});
    let qwen2 = || steps(&[split(QWEN2, "Isolated", false), bytes(false)]);
    [
        ("demo", with(|_| {})),
        ("GPT-2", with(|file| file["pre_tokenizer"] = bytes(true))),
        ("Llama 3", with(steps(&[split(LLAMA3, "Isolated", false), bytes(false)]))),
        ("numbers together", with(steps(&[digits(false), bytes(true)]))),
        ("not cut at all", with(|file| file["pre_tokenizer"] = bytes(false))),
        ("several expressions", with(steps(&[split("[aeiou]+", "Isolated", false), split(QWEN2, "Isolated", false), bytes(false)]))),
        (
            "Qwen 2",
            with(|file| {
                qwen2()(file);
                file["normalizer"] = json!({"type": "NFC"});
                for (id, content, normalized) in [(1530, "word", true), (1531, "[TOOL]", false)] {
                    let token = json!({"id": id, "content": content, "single_word": false, "lstrip": true, "rstrip": false,
                        "normalized": normalized, "special": false});
                    file["added_tokens"].as_array_mut().unwrap().push(token);
                }
            }),
        ),
    ]
    .map(|(name, tokenizer)| (name, Encoder::of(tokenizer)))
    .into()
}

#[test]
fn what_only_cuts_and_spells_is_done_here() {
    for (name, encoder) in ours() {
        assert!(encoder.cuts.is_some(), "{name}");
    }
}

#[test]
fn what_does_more_is_left_to_the_library() {
    let prefixed = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let theirs = [
        ("a space is put before", with(|file| file["pre_tokenizer"] = prefixed)),
        ("what is found is dropped", with(steps(&[split(r"\s+", "Removed", false), bytes(false)]))),
        ("what is not found", with(steps(&[split(r"\s+", "Isolated", true), bytes(false)]))),
        ("bytes are not spelled", with(|file| file["pre_tokenizer"] = split(QWEN2, "Isolated", false))),
        ("nothing is done", with(|file| file["pre_tokenizer"] = Value::Null)),
    ];
    for (name, tokenizer) in theirs {
        let encoder = Encoder::of(tokenizer);
        assert!(encoder.cuts.is_none(), "{name}");
        assert!(TRIAL.iter().all(|text| encoder.agrees(text)), "{name}");
    }
}

#[test]
fn one_that_fails_the_trial_is_left_to_the_library() {
    let mut encoder = Encoder::of(with(|_| {}));
    encoder.cuts = Some(vec![Cut::Found(SysRegex::new("[a-m]").unwrap())]);
    assert!(!TRIAL.iter().all(|text| encoder.agrees(text)), "the trial tells them apart");
}

fn texts() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => "[ a-zA-Z'0-9]{0,40}",
        3 => "\\PC{0,16}",
        2 => "[ \\n\\t\\r\u{a0}\u{3000}]{0,6}",
        1 => "[\u{0}-\u{ff}]{0,12}",
        2 => prop::sample::select(vec![
            "<|im_end|>", "<|im_start|>user\n", "<|im_", "word", " word ", "[TOOL]", "  [TOOL]", "it's", "WE'LL", "e\u{301}",
            "１２３", "½²Ⅷ", "你好", "🦀👩‍👩‍👧", "\u{200d}", "ſ's",
        ]).prop_map(str::to_owned),
    ];
    prop::collection::vec(part, 0..16).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn tokens_are_those_of_the_library(texts in prop::collection::vec(texts(), 1..4)) {
        for (name, encoder) in ours() {
            for text in &texts {
                prop_assert_eq!(encoder.encode(text).unwrap(), encoder.by_library(text).unwrap(), "{}: {:?}", name, text);
            }
        }
    }
}
