//! The program: what it prints, writes and refuses.

use std::{
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

fn simulate(arguments: &[&str], dir: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvasir-simulate"));
    command.args(arguments).current_dir(dir).output().expect("it starts")
}

fn error(arguments: &[&str], dir: &Path) -> String {
    let output = simulate(arguments, dir);
    assert!(!output.status.success(), "{arguments:?} went well");
    String::from_utf8(output.stderr).expect("it says text")
}

const SMALL: [&str; 6] = ["conversation", "--limit", "300", "--speed", "4", "--policy=all"];

#[test]
fn a_table_json_and_a_picture_and_the_same_again() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str| {
        let (json, svg) = (format!("{name}.json"), format!("{name}.svg"));
        let arguments = [&SMALL[..], &["--prefill", "2", "--decode", "2", "--json", &json, "--svg", &svg]].concat();
        let output = simulate(&arguments, dir.path());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut told: Value = serde_json::from_str(&std::fs::read_to_string(dir.path().join(json)).unwrap()).unwrap();
        let real = told.as_object_mut().unwrap().remove("real").unwrap();
        let svg = std::fs::read_to_string(dir.path().join(svg)).unwrap();
        (String::from_utf8(output.stdout).unwrap(), told, real, svg)
    };
    let (text, told, real, svg) = run("first");
    assert!(text.contains("300 requests") && text.contains("decisions/s"), "{text}");
    let rows = told["rows"].as_array().unwrap();
    assert_eq!((rows.len(), real.as_array().unwrap().len()), (5, 5));
    for row in rows {
        assert!(text.contains(row["policy"].as_str().unwrap()));
        assert_eq!(row["answered"], 300);
        assert!(row["ttft_ms"]["p99"].as_f64() >= row["ttft_ms"]["p50"].as_f64(), "{row}");
    }
    let picture = roxmltree::Document::parse(&svg).unwrap();
    let of = |name: &str| picture.descendants().filter(|node| node.tag_name().name() == name).count();
    // A distribution and two lines over time for each policy.
    assert_eq!((of("polyline"), of("title")), (15, 1));
    let texts: Vec<_> = picture.descendants().filter_map(|node| node.text()).collect();
    assert!(texts.iter().any(|text| text.starts_with("kv-aware: ")), "{texts:?}");

    let (_, again, _, svg_again) = run("again");
    assert_eq!((told, svg), (again, svg_again));
}

#[test]
fn a_name_of_a_trace_stays_text_in_the_picture() {
    let dir = tempfile::tempdir().unwrap();
    let name = "a<b>&\"c\".txt";
    std::fs::write(dir.path().join(name), "0 600 5 0-1\n").unwrap();
    let output = simulate(&[name, "--svg", "out.svg", "--policy", "random"], dir.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let svg = std::fs::read_to_string(dir.path().join("out.svg")).unwrap();
    let picture = roxmltree::Document::parse(&svg).unwrap();
    assert!(picture.descendants().filter_map(|node| node.text()).any(|text| text.contains(name)));
}

#[test]
fn what_can_not_be_simulated_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &[u8]| std::fs::write(dir.path().join(name), text).unwrap();
    let request = r#"{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1]}"#;
    write("field.jsonl", format!("{request}\n{{\"timestamp\": 2, \"input_length\": -3}}\n").as_bytes());
    write("short.txt", b"1 2 3 4\n1 2\n");
    write("bytes.txt", b"1 2 3 4\n\xff\xfe\n");
    write("long.txt", " ".repeat(1 << 20).as_bytes());
    write("empty.txt", b"\n");
    write("late.txt", b"99999999999999999 2 3 4\n");
    write("profile.yaml", b"source: me\nprefill: {step_seconds: fast}\n");
    let error = |arguments: &[&str]| error(arguments, dir.path());
    let told = error(&["field.jsonl"]);
    assert!(told.contains("line 2 of the trace is no request: invalid value: integer `-3`"), "{told}");
    assert!(error(&["short.txt"]).contains("line 2 of the trace has fewer"));
    assert!(error(&["bytes.txt"]).contains("line 2 of the trace can't be read"));
    assert!(error(&["long.txt"]).contains("line 1 of the trace is longer"));
    assert!(error(&["empty.txt"]).contains("no requests"));
    assert!(error(&["late.txt"]).contains("request 1 of the trace"));
    assert!(error(&["nothing.txt"]).contains("trace nothing.txt can't be opened"));
    assert!(error(&["chat", "--policy", "best"]).contains("there is no policy \"best\""));
    assert!(error(&["chat", "--profile", "nothing"]).contains("profile nothing is none of"));
    let told = error(&["chat", "--profile", "profile.yaml"]);
    assert!(told.contains("profile profile.yaml") && told.contains("prefill.step_seconds"), "{told}");
    assert!(error(&["chat", "--set", "kv.room_tokens=0"]).contains("kv.room_tokens is 0"));
    assert!(error(&["chat", "--speed", "0"]).contains("speed 0"));
    assert!(error(&["chat", "--decode", "0"]).contains("one decode worker"));
    assert!(error(&["chat", "--prefill", "99999999"]).contains("at most"));
    assert!(error(&["conversation", "--copies", "4000000000"]).contains("copies"));
    assert!(error(&["chat", "--json", "no/such/file"]).contains("no/such/file could not be written"));
}

#[test]
fn a_profile_can_be_shown_changed_and_used() {
    let dir = tempfile::tempdir().unwrap();
    let shown = simulate(&["--print-profile", "--profile", "h100-llama-8b"], dir.path()).stdout;
    let text = String::from_utf8(shown).unwrap().replace("max_running: 256", "max_running: 7");
    std::fs::write(dir.path().join("my.yaml"), text).unwrap();
    let arguments =
        ["chat", "--limit", "50", "--profile", "my.yaml", "--set", "hop_seconds=0.25", "--json", "out.json"];
    let output = simulate(&[&arguments[..], &["--policy", "least-loaded"]].concat(), dir.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Value = serde_json::from_str(&std::fs::read_to_string(dir.path().join("out.json")).unwrap()).unwrap();
    assert_eq!(told["plan"]["profile"]["decode"]["max_running"], 7);
    assert!(told["rows"][0]["ttft_ms"]["p50"].as_f64().unwrap() > 1000.0, "four hops of a quarter of a second");
}
