use std::{collections::BTreeSet, time::Instant};

use kvasir_engine::{Ask, Constraint, Constraints, History, Mask, Sampler};
use kvasir_types::{Grammar, Sampling, TokenId};
use serde_json::{Value, json};

use super::Grammars;

const EOS: TokenId = TokenId(2);
const VOCAB: usize = 1532;

fn tokenizer() -> Vec<u8> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo/tokenizer.json")).unwrap()
}

fn grammars() -> Grammars {
    Grammars::new(&tokenizer(), VOCAB, &[EOS]).unwrap()
}

struct Rig {
    grammars: Grammars,
    bytes: Vec<Vec<u8>>,
    sampler: Sampler,
}

/// An answer, and whether it came to an end.
struct Written {
    tokens: Vec<TokenId>,
    ended: bool,
}

impl Rig {
    fn new() -> Self {
        let json = serde_json::from_slice(&tokenizer()).unwrap();
        let bytes = llguidance::token_bytes_from_tokenizer_json(&json).unwrap();
        Self { grammars: grammars(), bytes, sampler: Sampler::default() }
    }

    fn compile(&self, grammar: &Grammar) -> Box<dyn Constraint> {
        self.grammars.compile(grammar).unwrap_or_else(|error| panic!("{grammar:?}: {error}"))
    }

    fn text(&self, tokens: &[TokenId]) -> String {
        let shown = tokens.iter().filter(|token| **token != EOS).flat_map(|token| self.bytes[token.0 as usize].clone());
        String::from_utf8(shown.collect()).unwrap()
    }

    /// Goes on with an answer as a model without any idea would: random logits, temperature 1. Quotes and brackets are
    /// made likelier, or strings would have no end.
    fn write(&mut self, constraint: &mut dyn Constraint, so_far: usize, seed: u64, limit: usize) -> Written {
        let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
        let mut tokens = Vec::new();
        while tokens.len() < limit {
            let masks = constraint.masks(&[]).unwrap();
            let position = so_far + tokens.len();
            let mut row: Vec<f32> = (0..VOCAB as u64).map(|token| noise(seed, position as u64, token)).collect();
            for (logit, bytes) in row.iter_mut().zip(&self.bytes) {
                if bytes.len() == 1 && b"\"]},".contains(&bytes[0]) {
                    *logit += 5.0;
                }
            }
            let ask =
                Ask { sampling: &sampling, position, history: &History::default(), eos: &[EOS], mask: masks.first() };
            let token = self.sampler.sample(&mut row, ask).unwrap().token;
            tokens.push(token);
            if token == EOS || constraint.advance(token).unwrap() {
                return Written { tokens, ended: true };
            }
        }
        Written { tokens, ended: false }
    }
}

fn noise(seed: u64, position: u64, token: u64) -> f32 {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ position.wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ (token << 40);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32 * 4.0
}

fn schema(value: &Value) -> Grammar {
    Grammar::JsonSchema(value.to_string().into())
}

type Check = fn(&Value) -> bool;

/// −0 is an integer, too, and not one of serde's.
fn whole(v: &Value, min: f64, max: f64) -> bool {
    v.as_f64().is_some_and(|v| v.fract() == 0.0 && (min..=max).contains(&v))
}

/// Schemas, each with what must be true of everything that follows it.
fn schemas() -> Vec<(Value, Check)> {
    vec![
        (json!({"type": "object"}), |v| v.is_object()),
        (json!({"type": "integer", "minimum": -3, "maximum": 120}), |v| whole(v, -3.0, 120.0)),
        (json!({"enum": ["red", 7, null, {"a": [1]}]}), |v| {
            [json!("red"), json!(7), json!(null), json!({"a": [1]})].contains(v)
        }),
        (json!({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5}), |v| {
            let items = v.as_array().unwrap();
            (2..=5).contains(&items.len()) && items.iter().all(Value::is_boolean)
        }),
        (json!({"type": "string", "maxLength": 6}), |v| v.as_str().unwrap().chars().count() <= 6),
        (json!({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}), |v| {
            let bytes = v.as_str().unwrap().as_bytes();
            bytes.len() == 6
                && bytes[..2].iter().all(u8::is_ascii_uppercase)
                && bytes[3..].iter().all(u8::is_ascii_digit)
        }),
        (
            json!({
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 10},
                    "age": {"type": "integer", "minimum": 0, "maximum": 150},
                    "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]}
                },
                "required": ["name", "age", "next"],
                "additionalProperties": false,
                "$defs": {"point": {
                    "type": "object",
                    "properties": {"x": {"type": "number"}, "y": {"const": 1.5}},
                    "required": ["x", "y"],
                    "additionalProperties": false
                }}
            }),
            |v| {
                let object = v.as_object().unwrap();
                let point =
                    |p: &Value| p.as_object().is_some_and(|p| p.len() == 2 && p["x"].is_number() && p["y"] == 1.5);
                object.keys().all(|key| ["name", "age", "tags", "next"].contains(&key.as_str()))
                    && object["name"].as_str().unwrap().chars().count() <= 10
                    && whole(&object["age"], 0.0, 150.0)
                    && (object["next"].is_null() || point(&object["next"]))
                    && object.get("tags").is_none_or(|tags| {
                        let tags = tags.as_array().unwrap();
                        tags.len() <= 3 && tags.iter().all(|tag| tag == "a" || tag == "b")
                    })
            },
        ),
    ]
}

#[test]
fn whatever_a_model_prefers_the_answer_follows_the_schema() {
    let mut rig = Rig::new();
    for (value, check) in schemas() {
        let mut ended = 0;
        for seed in 0..25 {
            let mut constraint = rig.compile(&schema(&value));
            let written = rig.write(&mut *constraint, 0, seed, 300);
            let text = rig.text(&written.tokens);
            if written.ended {
                ended += 1;
                let parsed = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{value}: {text:?}: {error}"));
                assert!(check(&parsed), "{value}: {text}");
            } else {
                // Cut by the limit: an end token must not have been possible before, and so the text is no whole yet or
                // could have gone on.
                assert!(!written.tokens.contains(&EOS));
            }
        }
        assert!(ended >= 20, "{value}: only {ended} of 25 answers came to an end");
    }
}

#[test]
fn the_end_is_allowed_where_the_text_may_end_and_nowhere_else() {
    let rig = Rig::new();
    let digits = Grammar::Regex("[0-9]{2,4}".into());
    for seed in 0..40 {
        let mut constraint = rig.compile(&digits);
        let mut text = String::new();
        loop {
            let mask = constraint.masks(&[]).unwrap().remove(0);
            assert_eq!(mask.allows(EOS), text.len() >= 2, "{text}");
            let allowed: Vec<u32> =
                (0..VOCAB as u32).filter(|&token| TokenId(token) != EOS && mask.allows(TokenId(token))).collect();
            let token = TokenId(allowed[(noise(seed, text.len() as u64, 0) * 1e6) as usize % allowed.len()]);
            text += &rig.text(&[token]);
            if constraint.advance(token).unwrap() {
                break;
            }
        }
        assert!(
            text.len() == 4 && text.bytes().all(|b| b.is_ascii_digit()),
            "complete with four digits, not before: {text}"
        );
    }
}

#[test]
fn an_expression_a_choice_and_a_lark_grammar_are_followed() {
    let mut rig = Rig::new();
    let texts = ["yes".to_owned(), "no \"quoted\"\n".to_owned(), "möglich \\d".to_owned(), "no".to_owned()];
    let mut seen = BTreeSet::new();
    for seed in 0..60 {
        let mut constraint = rig.compile(&Grammar::Choice(texts.to_vec().into()));
        let written = rig.write(&mut *constraint, 0, seed, 60);
        assert!(written.ended);
        seen.insert(rig.text(&written.tokens));
    }
    assert_eq!(seen, texts.into_iter().collect());
    for seed in 0..20 {
        let mut constraint = rig.compile(&Grammar::Regex(r"(ab|c)*d\d+\.[^x]/".into()));
        let written = rig.write(&mut *constraint, 0, seed, 400);
        let text = rig.text(&written.tokens);
        let rest = text.trim_start_matches(['a', 'b', 'c']);
        assert!(!written.ended || (rest.starts_with('d') && text.ends_with('/')), "{text}");
        let mut constraint =
            rig.compile(&Grammar::Lark("start: item (\",\" item)*\nitem: /[a-c]/ | \"[\" start \"]\"".into()));
        let written = rig.write(&mut *constraint, 0, seed, 200);
        let text = rig.text(&written.tokens);
        let depth = text.bytes().map(|b| i32::from(b == b'[') - i32::from(b == b']')).sum::<i32>();
        assert!(!written.ended || depth == 0, "{text}");
    }
}

#[test]
fn an_answer_goes_on_from_any_point_as_if_it_had_never_stopped() {
    let mut rig = Rig::new();
    for (value, _) in schemas() {
        let grammar = schema(&value);
        let mut constraint = rig.compile(&grammar);
        let whole = rig.write(&mut *constraint, 0, 3, 80);
        for cut in 0..whole.tokens.len().min(40) {
            let mut resumed = rig.compile(&grammar);
            for &token in &whole.tokens[..cut] {
                assert!(!resumed.advance(token).unwrap(), "complete too early");
            }
            let rest = rig.write(&mut *resumed, cut, 3, 80 - cut);
            assert_eq!((&rest.tokens[..], rest.ended), (&whole.tokens[cut..], whole.ended), "{value} from {cut}");
        }
    }
}

#[test]
fn masks_ahead_are_those_that_come_and_leave_the_state_as_it_was() {
    let mut rig = Rig::new();
    for (value, _) in schemas() {
        let grammar = schema(&value);
        let whole = rig.write(&mut *rig.grammars.compile(&grammar).unwrap(), 0, 9, 60).tokens;
        let mut constraint = rig.compile(&grammar);
        let mut one_by_one: Vec<Mask> = Vec::new();
        for &token in &whole {
            one_by_one.push(constraint.masks(&[]).unwrap().remove(0));
            if token == EOS || constraint.advance(token).unwrap() {
                break;
            }
        }
        let mut constraint = rig.compile(&grammar);
        for at in 0..one_by_one.len() - 1 {
            let drafts = &whole[at..(at + 5).min(one_by_one.len() - 1)];
            let ahead = constraint.masks(drafts).unwrap();
            assert_eq!(ahead[..], one_by_one[at..at + drafts.len() + 1], "{value} at {at}");
            // A draft that is not allowed ends it.
            let wrong = (0..VOCAB as u32).map(TokenId).find(|&token| !one_by_one[at].allows(token)).unwrap();
            assert_eq!(constraint.masks(&[wrong, whole[at]]).unwrap(), one_by_one[at..=at]);
            constraint.advance(whole[at]).unwrap();
        }
    }
}

#[test]
fn what_can_not_be_followed_is_refused_in_words() {
    let grammars = grammars();
    for (grammar, word) in [
        (Grammar::JsonSchema("{".into()), "not JSON"),
        (Grammar::JsonSchema("[]".into()), "not an object"),
        (Grammar::JsonSchema(r#"{"type": "colour"}"#.into()), "colour"),
        (Grammar::JsonSchema(r##"{"$ref": "#/$defs/none"}"##.into()), "none"),
        (Grammar::JsonSchema(r#"{"$ref": "http://127.0.0.1:9/schema"}"#.into()), "ref"),
        (Grammar::Regex("(".into()), "regex"),
        (Grammar::Regex("a(?=b)".into()), "look-around"),
        (Grammar::Lark("start: nothing".into()), "nothing"),
        (Grammar::JsonSchema(r#"{"type": "integer", "minimum": 5, "maximum": 4}"#.into()), ""),
    ] {
        let error = match grammars.compile(&grammar) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("{grammar:?} was taken"),
        };
        assert!(error.to_lowercase().contains(&word.to_lowercase()), "{grammar:?}: {error}");
        assert!(error.len() < 1000);
    }
    // The client's options for llguidance are not obeyed.
    let blank = Grammar::JsonSchema(r#"{"enum": [1], "x-guidance": {"whitespace_pattern": "x*"}}"#.into());
    let mask = grammars.compile(&blank).unwrap().masks(&[]).unwrap().remove(0);
    let x = Rig::new().bytes.iter().position(|bytes| bytes == b"x").unwrap();
    assert!(!mask.allows(TokenId(x as u32)));
}

#[test]
fn hostile_grammars_cost_bounded_time() {
    let mut rig = Rig::new();
    let nested =
        |open: &str, close: &str, depth: usize| format!("{}{}{}", open.repeat(depth), "true", close.repeat(depth));
    let wide: Value =
        (0..5000).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect::<serde_json::Map<_, _>>().into();
    let any_of: Vec<Value> =
        (0..300).map(|i| json!({"type": "object", "properties": {format!("k{i}"): {"type": "object"}}})).collect();
    for grammar in [
        Grammar::Regex("(a{1000}){1000}".into()),
        Grammar::Regex("((a?){50}){50}a{50}".into()),
        Grammar::Regex("(.*a){30}.{40}".into()),
        Grammar::Regex(".*a.{24}".into()),
        Grammar::Regex(format!("({})*", (0..2000).map(|i| format!("w{i}")).collect::<Vec<_>>().join("|")).into()),
        schema(&json!({"type": "string", "maxLength": 1_000_000_000})),
        schema(&json!({"type": "array", "minItems": 100_000, "items": {"type": "object"}})),
        schema(&json!({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"})),
        schema(&json!({"type": "object", "properties": wide})),
        schema(&json!({"anyOf": any_of})),
        schema(&json!({"oneOf": any_of})),
        Grammar::JsonSchema(nested(r#"{"items":"#, "}", 100).into()),
        Grammar::JsonSchema(nested(r#"{"items":"#, "}", 5000).into()),
        Grammar::Lark("start: start start | \"a\" | \"\"".into()),
        Grammar::Lark(format!("start: {}", "(".repeat(3000)).into()),
        Grammar::Choice((0..20_000).map(|i| format!("choice number {i}")).collect::<Vec<_>>().into()),
    ] {
        let start = Instant::now();
        let name: String = format!("{grammar:?}").chars().take(80).collect();
        match rig.grammars.compile(&grammar) {
            Err(_) => {}
            Ok(mut constraint) => {
                for at in 0..20 {
                    let Ok(masks) = constraint.masks(&[]) else { break };
                    let allowed: Vec<u32> =
                        (0..VOCAB as u32).filter(|&token| masks[0].allows(TokenId(token))).collect();
                    let token = TokenId(allowed[(noise(1, at, 1) * 1e6) as usize % allowed.len()]);
                    if token == EOS || constraint.advance(token) != Ok(false) {
                        break;
                    }
                }
            }
        }
        // On a busy machine and without optimisation; the fuel that llguidance may spend is a tenth of this.
        println!("{:>6} ms {name}", start.elapsed().as_millis());
        assert!(start.elapsed().as_secs() < 20, "{name}: {:?}", start.elapsed());
    }
    let _ = &mut rig;
}

#[test]
fn a_compiled_grammar_is_kept_and_each_answer_has_its_own_state() {
    let grammars = grammars();
    let grammar = Grammar::Regex("ab".into());
    let mut first = grammars.compile(&grammar).unwrap();
    let start = first.masks(&[]).unwrap();
    let a = (0..VOCAB as u32).map(TokenId).find(|&token| start[0].allows(token)).unwrap();
    first.advance(a).unwrap();
    assert_eq!(grammars.compile(&grammar).unwrap().masks(&[]).unwrap(), start);
    for i in 0..100 {
        grammars.compile(&Grammar::Regex(format!("x{i}").into())).unwrap();
    }
    assert_eq!(grammars.compile(&grammar).unwrap().masks(&[]).unwrap(), start);
}

#[test]
fn a_tokenizer_of_another_kind_is_an_error_in_words() {
    for (json, word) in [("{", "JSON"), (r#"{"decoder": {"type": "WordPiece"}}"#, "WordPiece")] {
        let error = Grammars::new(json.as_bytes(), 10, &[]).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
    // A model without an end token: a text that is complete ends the answer all the same.
    let grammars = Grammars::new(&tokenizer(), VOCAB + 100, &[]).unwrap();
    let mut constraint = grammars.compile(&Grammar::Regex("a".into())).unwrap();
    let mask = constraint.masks(&[]).unwrap().remove(0);
    let allowed: Vec<u32> = (0..VOCAB as u32 + 100).filter(|&token| mask.allows(TokenId(token))).collect();
    assert_eq!(allowed.len(), 1);
    assert!(constraint.advance(TokenId(allowed[0])).unwrap());
}
