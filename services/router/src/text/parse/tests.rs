use proptest::prelude::*;

use super::*;

/// The parts, neighbours of one kind put together.
fn joined(parts: Vec<Part>) -> Vec<Part> {
    let mut all: Vec<Part> = Vec::new();
    for part in parts {
        match (all.last_mut(), part) {
            (Some(Part::Reasoning(so_far)), Part::Reasoning(text)) => so_far.push_str(&text),
            (Some(Part::Content(so_far)), Part::Content(text)) => so_far.push_str(&text),
            (Some(Part::Arguments { index: a, text: so_far }), Part::Arguments { index: b, text }) if *a == b => {
                so_far.push_str(&text);
            }
            (_, part) => all.push(part),
        }
    }
    all
}

fn parse<'a>(mut parser: Parser, pieces: impl IntoIterator<Item = &'a str>) -> Vec<Part> {
    let mut parts = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut parts);
    }
    parser.finish(&mut parts);
    joined(parts)
}

fn calls(notation: Notation, text: &str) -> Vec<Part> {
    parse(Parser::new(None, Some(Calls::new(notation, true))), [text])
}

fn llama() -> Notation {
    Notation::Llama3(vec!["f".to_owned(), "g".to_owned()])
}

/// `index` name arguments, and content as it is.
fn told(parts: &[Part]) -> String {
    let mut out = String::new();
    for part in parts {
        match part {
            Part::Reasoning(text) => out += &format!("({text})"),
            Part::Content(text) => out += text,
            Part::Call { index, name } => out += &format!("|{index} {name} "),
            Part::Arguments { index, text } => out += &format!("{index}:{text}"),
        }
    }
    out
}

#[test]
fn hermes_calls_are_found() {
    for (text, expected) in [
        ("Just text.\n", "Just text.\n"),
        ("a < b <tool", "a < b <tool"),
        (r#"<tool_call>{"name": "f", "arguments": {"a": "}\"{"}}</tool_call>"#, r#"|0 f 0:{"a": "}\"{"}"#),
        (
            "Look:\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1, {}]}}\n</tool_call>\n<tool_call>\n{\"arguments\": {}, \"name\": \"g\"}\n</tool_call>\n",
            "Look:|0 f 0:{\"a\": [1, {}]}|1 g 1:{}",
        ),
        // No arguments; as text; a closing tag forgotten; text between.
        (r#"<tool_call>{"name": "f"}</tool_call>"#, "|0 f 0:{}"),
        (r#"<tool_call>{"name": "f", "arguments": null}</tool_call>"#, "|0 f 0:{}"),
        (r#"<tool_call>{"name": "f", "arguments": "{\"a\": 1}"}</tool_call>"#, r#"|0 f 0:{"a": 1}"#),
        (r#"<tool_call>{"name":"f","arguments":{}}"#, "|0 f 0:{}"),
        (
            r#"<tool_call>{"name":"f","arguments":{}}</tool_call> and <tool_call>{"name":"g"}</tool_call>."#,
            "|0 f 0:{} and|1 g 1:{}.",
        ),
        (r#"<tool_call>{"name":"f","arguments":{}}<tool_call>{"name":"g"}</tool_call>"#, "|0 f 0:{}|1 g 1:{}"),
        (
            r#"<tool_call>{"id": 7, "name": "f", "x": true, "arguments": {}, "parameters": {"a": 1}}</tool_call>"#,
            "|0 f 0:{}",
        ),
        // No calls at all: told as they were written.
        ("<tool_call>hello</tool_call>", "<tool_call>hello</tool_call>"),
        (r#"<tool_call>{"a": 1}</tool_call>"#, r#"<tool_call>{"a": 1}</tool_call>"#),
        (r#"<tool_call>{"name": 3}"#, r#"<tool_call>{"name": 3}"#),
        (r#"<tool_call>{"nam"#, r#"<tool_call>{"nam"#),
        // Cut short: as far as it goes.
        (r#"<tool_call>{"name": "f", "argu"#, "|0 f "),
        (r#"<tool_call>{"name": "f", "arguments": {"a": "b"#, r#"|0 f 0:{"a": "b"#),
    ] {
        assert_eq!(told(&calls(Notation::Hermes, text)), expected, "{text}");
    }
}

#[test]
fn llama_calls_are_found() {
    for (text, expected) in [
        (r#"{"name": "f", "parameters": {"a": 1}}"#, r#"|0 f 0:{"a": 1}"#),
        (r#" <|python_tag|>{"type": "function", "name": "f", "parameters": {}}"#, "|0 f 0:{}"),
        (r#"{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}"#, "|0 f 0:{}|1 g 1:{}"),
        (r#"{"name": "other", "age": 3} is he."#, r#"{"name": "other", "age": 3} is he."#),
        (r#"{"answer": 3}"#, r#"{"answer": 3}"#),
        (r#"It is {"name": "f"}."#, r#"It is {"name": "f"}."#),
        ("<|python", "<|python"),
        ("", ""),
    ] {
        assert_eq!(told(&calls(llama(), text)), expected, "{text}");
    }
}

#[test]
fn mistral_calls_are_found() {
    for (text, expected) in [
        (
            r#"[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}, "id": "x"}]"#,
            r#"|0 f 0:{"a": 1}|1 g 1:{}"#,
        ),
        (r#"Well. [TOOL_CALLS] [{"name": "f", "arguments": {}}] "#, "Well.|0 f 0:{}"),
        (
            r#"[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{"b": "]"}"#,
            r#"|0 f 0:{"a": 1}|1 g 1:{"b": "]"}"#,
        ),
        (r#"[TOOL_CALLS]f{"a": {}}"#, r#"|0 f 0:{"a": {}}"#),
        ("[TOOL_CALLS]f", "[TOOL_CALLS]f"),
        ("[TOOL_CALLS][3]", "[TOOL_CALLS][3]"),
        ("a [TOOL", "a [TOOL"),
    ] {
        assert_eq!(told(&calls(Notation::Mistral, text)), expected, "{text}");
    }
}

#[test]
fn constrained_calls_are_found() {
    for (notation, text, expected) in [
        (
            Notation::List,
            r#"[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]"#,
            r#"|0 f 0:{"a": 1}|1 g 1:{}"#,
        ),
        (Notation::List, r#" [ {"name": "f", "parameters": {"a"#, r#"|0 f 0:{"a"#),
        (Notation::Named("f".to_owned()), "\n{\"a\": 1}\n", "|0 f 0:{\"a\": 1}"),
    ] {
        assert_eq!(told(&calls(notation, text)), expected, "{text}");
    }
}

#[test]
fn only_one_call_is_told_where_one_is_asked_for() {
    let parser = Parser::new(None, Some(Calls::new(Notation::List, false)));
    let text = r#"[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {"a": 1}}]"#;
    assert_eq!(told(&parse(parser, [text])), "|0 f 0:{}");
}

#[test]
fn arguments_come_as_they_are_written() {
    let mut parser = Parser::new(None, Some(Calls::new(Notation::Hermes, true)));
    let mut push = |text| {
        let mut parts = Vec::new();
        parser.push(text, &mut parts);
        told(&parts)
    };
    let pieces = [
        "Now ",
        "<tool",
        "_call>\n{\"name\": \"f",
        "\", \"arguments\": {",
        "\"a\": \"b",
        "c\"",
        "}}\n",
        "</tool_call>",
    ];
    let said: Vec<String> = pieces.into_iter().map(&mut push).collect();
    assert_eq!(said, ["Now", "", "", "|0 f 0:{", "0:\"a\": \"b", "0:c\"", "0:}", ""]);
}

#[test]
fn thoughts_are_split_off() {
    for (opened, text, expected) in [
        (Opened::Perhaps, "<think>\nHm, 1 < 2.\n\n</think>\n\nYes.", "(Hm, 1 < 2.)Yes."),
        (Opened::Perhaps, "\n<think></think>\n\nYes. </think> <think>", "Yes. </think> <think>"),
        (Opened::Perhaps, " Yes <think>x</think>", " Yes <think>x</think>"),
        (Opened::Perhaps, "<thin", "<thin"),
        (Opened::Perhaps, "<think>Hm </th", "(Hm </th)"),
        (Opened::ByPrompt, "\nHm.\n</think>\n\nYes.\n", "(Hm.)Yes.\n"),
        (Opened::ByPrompt, "<think>\nHm.</think>Yes.", "(Hm.)Yes."),
        (Opened::ByPrompt, "Hm", "(Hm)"),
        (Opened::ByPrompt, "</think>", ""),
    ] {
        assert_eq!(told(&parse(Parser::new(Some(Reasoning::new(opened)), None), [text])), expected, "{text}");
    }
    assert!(matches!(Reasoning::after("<|assistant|>\n<think>\n").opened(), Opened::ByPrompt));
    assert!(matches!(Reasoning::after("<think>\n\n</think>\n\n").opened(), Opened::Perhaps));
}

#[test]
fn thoughts_and_calls_in_one_answer() {
    let parser = Parser::new(Some(Reasoning::new(Opened::ByPrompt)), Some(Calls::new(Notation::Hermes, true)));
    let text = "Call <tool_call>?\n</think>\n\nSure.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
    assert_eq!(told(&parse(parser, [text])), "(Call <tool_call>?)Sure.|0 f 0:{}");
}

fn any_parser() -> impl Strategy<Value = Parser> {
    let reasoning = prop_oneof![
        Just(None),
        Just(Some(Reasoning::new(Opened::Perhaps))),
        Just(Some(Reasoning::new(Opened::ByPrompt)))
    ];
    let notation = prop_oneof![
        Just(Notation::Hermes),
        Just(llama()),
        Just(Notation::Mistral),
        Just(Notation::List),
        Just(Notation::Named("f".to_owned()))
    ];
    (reasoning, proptest::option::of((notation, any::<bool>()))).prop_map(|(reasoning, calls)| {
        Parser::new(reasoning, calls.map(|(notation, parallel)| Calls::new(notation, parallel)))
    })
}

/// Texts in which everything that means something comes up, whole and in halves.
fn any_text() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "<think>",
        "</think>",
        "<th",
        "ink>",
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[TOOL",
        "<|python_tag|>",
        "{\"name\": \"f\"",
        ", \"arguments\": {",
        "\"a\": \"\\\"}\"",
        "}",
        "}}",
        "[",
        "]",
        "{",
        ",",
        ";",
        " ",
        "\n",
        "text",
        "é",
        "🦀",
        "\"",
        "\\",
        "null",
        ": ",
        "{\"name\": \"g\", \"parameters\": {}}",
    ]);
    prop::collection::vec(word, 0..16).prop_map(|words| words.concat())
}

proptest! {
    #[test]
    fn how_the_text_is_cut_makes_no_difference(parser in any_parser(), text in any_text(), cuts in prop::collection::vec(0.0..1.0f64, 0..8)) {
        let mut at: Vec<usize> = cuts.iter().map(|cut| text.floor_char_boundary((cut * text.len() as f64) as usize)).collect();
        at.extend([0, text.len()]);
        at.sort_unstable();
        let pieces: Vec<&str> = at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        prop_assert_eq!(parse(parser.clone(), pieces), parse(parser, [text.as_str()]));
    }

    #[test]
    fn nothing_that_is_not_white_space_is_lost_without_calls(parser in any_parser(), text in "[a-z <{\\[]{0,40}") {
        let parts = parse(parser, [text.as_str()]);
        // A named call has its text as arguments.
        let mut all: String = parts.iter().map(|part| match part {
            Part::Reasoning(text) | Part::Content(text) | Part::Arguments { text, .. } => text.as_str(),
            Part::Call { .. } => "",
        }).collect();
        all.retain(|c| !c.is_whitespace());
        let expected: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        prop_assert_eq!(all, expected);
    }
}
