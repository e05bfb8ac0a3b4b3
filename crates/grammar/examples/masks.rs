//! How long compiling a grammar and computing a mask take, at a vocabulary of 151,936.
//!
//! ```text
//! cargo run --release -p kvasir-grammar --example masks
//! ```
//!
//! The vocabulary is made up: all bytes, and words of letters, digits and punctuation with and without a blank before them,
//! with the lengths that byte pair encodings have. Answers are drawn at random under the mask. Microseconds.

use std::time::Instant;

use kvasir_engine::{Constraints, Mask};
use kvasir_grammar::Grammars;
use kvasir_types::{Grammar, TokenId};
use serde_json::{Map, Value, json};

const VOCAB: usize = 151_936;
const EOS: TokenId = TokenId(VOCAB as u32 - 1);

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        ((self.0 >> 33) as usize) % limit
    }
}

/// A byte-level tokenizer.json.
fn tokenizer() -> Vec<u8> {
    // GPT-2's names for bytes that have none in print.
    let named = |byte: u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0..=b' ' => char::from_u32(0x100 + u32::from(byte)).expect("in a plane of letters"),
        0x7f..=0xa0 => char::from_u32(0x121 + u32::from(byte - 0x7f)).expect("in a plane of letters"),
        0xad => char::from_u32(0x143).expect("a letter"),
    };
    let mut vocab = Map::new();
    let mut add = |name: String| {
        let id = vocab.len();
        vocab.entry(name).or_insert(Value::from(id));
        vocab.len()
    };
    for byte in 0..=255 {
        add(named(byte).to_string());
    }
    let (letters, others) = (b"etaoinshrdlucmfwypvbgkjqxzETAOINSR", b"0123456789.,:;-_/{}[]()\"'=<>*+#\n\t ");
    let mut random = Random(7);
    loop {
        let mut name = String::new();
        if random.below(5) < 2 {
            name.push(named(b' '));
        }
        let alphabet: &[u8] = if random.below(8) > 0 { letters } else { others };
        for _ in 0..2 + random.below(4) + random.below(5) {
            name.push(named(alphabet[random.below(alphabet.len())]));
        }
        if add(name) == VOCAB - 1 {
            break;
        }
    }
    let end = json!({"id": EOS.0, "content": "<end>", "special": true});
    json!({"decoder": {"type": "ByteLevel"}, "added_tokens": [end], "model": {"vocab": vocab}}).to_string().into_bytes()
}

/// A token of the mask: a random one, but quotes and brackets more often, or strings would not end.
fn choose(mask: &Mask, random: &mut Random) -> TokenId {
    let mut ends = b"\"]},".iter().map(|&byte| TokenId(byte.into())).filter(|&token| mask.allows(token));
    if random.below(4) == 0
        && let Some(token) = ends.next_back()
    {
        return token;
    }
    let start = random.below(VOCAB) as u32;
    let tokens = (start..VOCAB as u32).chain(0..start).map(TokenId);
    tokens.into_iter().find(|&token| mask.allows(token)).expect("a mask allows something")
}

fn main() {
    let tokenizer = tokenizer();
    let started = Instant::now();
    let grammars = Grammars::new(&tokenizer, VOCAB, &[EOS]).expect("it is byte-level");
    println!("tokens' trie, once at start: {} ms", started.elapsed().as_millis());
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "email": {"type": "string", "format": "email"},
            "tags": {"type": "array", "items": {"enum": ["alpha", "beta", "gamma"]}, "maxItems": 5},
            "friends": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}}
        },
        "required": ["name", "age", "email", "tags", "friends"],
        "additionalProperties": false
    });
    println!("{:<24}{:>10}{:>10}{:>10}{:>10}{:>12}", "", "compile", "again", "mask p50", "p99", "advance p50");
    for (name, grammar) in [
        ("json_object", Grammar::JsonObject),
        ("json_schema, 5 fields", Grammar::JsonSchema(person.to_string().into())),
        ("regex, a date", Grammar::Regex("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}".into())),
        ("regex, free text", Grammar::Regex("(.|\n)*END".into())),
        ("choice of 100", Grammar::Choice((0..100).map(|i| format!("the answer number {i}")).collect())),
    ] {
        let micros = |since: Instant| since.elapsed().as_secs_f64() * 1e6;
        let start = Instant::now();
        grammars.compile(&grammar).expect("it is a grammar");
        let compile = micros(start);
        let start = Instant::now();
        grammars.compile(&grammar).expect("it is a grammar");
        let again = micros(start);
        let (mut masks, mut advances, mut random) = (Vec::new(), Vec::new(), Random(1));
        for _ in 0..20 {
            let mut constraint = grammars.compile(&grammar).expect("it is a grammar");
            for _ in 0..100 {
                let start = Instant::now();
                let mask = constraint.masks(&[]).expect("within the limits").remove(0);
                masks.push(micros(start));
                let token = choose(&mask, &mut random);
                let start = Instant::now();
                let complete = token == EOS || constraint.advance(token).expect("allowed");
                advances.push(micros(start));
                if complete {
                    break;
                }
            }
        }
        masks.sort_by(f64::total_cmp);
        advances.sort_by(f64::total_cmp);
        let (p50, p99) = (masks[masks.len() / 2], masks[masks.len() * 99 / 100]);
        println!("{name:<24}{compile:>10.0}{again:>10.0}{p50:>10.0}{p99:>10.0}{:>12.0}", advances[advances.len() / 2]);
    }
}
