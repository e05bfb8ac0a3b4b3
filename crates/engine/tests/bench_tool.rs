//! The bench program end to end on small models: every scenario computes what it says, and tells it in its form.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_kvasir-engine-bench");

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo")
}

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().unwrap()
}

/// What a scenario finds on the demo model.
fn found(scenario: &str, arguments: &[&str]) -> Vec<Value> {
    let demo = demo();
    let all = [&[scenario, "--model", demo.to_str().unwrap(), "--threads", "2", "--json"], arguments].concat();
    let output = run(&all);
    assert!(output.status.success(), "{all:?}: {}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in &lines {
        assert_eq!(line["scenario"], scenario);
        assert_eq!((&line["model"]["parameters"], &line["model"]["weights"]), (&2_446_976.into(), &"bf16".into()));
        let (used, total) = (line["blocks"]["used"].as_u64().unwrap(), line["blocks"]["total"].as_u64().unwrap());
        assert!(0 < used && used <= total, "{line}");
        assert!(number(line, "/memory/peak_rss_bytes") > 2.0 * 2_446_976.0, "the weights were read: {line}");
    }
    lines
}

fn number(found: &Value, pointer: &str) -> f64 {
    found.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {pointer} in {found}"))
}

#[test]
fn decode_writes_the_models_tokens_at_every_batch_size() {
    let both = found("decode", &["--batch", "1,3", "--context", "20", "--steps", "5", "--show-tokens"]);
    let [one, three] = both.as_slice() else { panic!("two measurements were asked for") };
    assert_eq!((&one["batch"], &three["batch"], &one["steps"]), (&1.into(), &3.into(), &5.into()));
    // The first prompt is the same: so is its answer, whatever runs beside it.
    let (alone, beside) = (one["tokens"].as_array().unwrap(), three["tokens"].as_array().unwrap());
    assert!(alone.len() >= 9 && beside.len() >= alone.len() && beside.starts_with(alone), "{alone:?} {beside:?}");
    for found in &both {
        assert!(number(found, "/tokens_per_s") > 0.0 && number(found, "/weight_gb_per_s") > 0.0);
        assert!(number(found, "/step_ms/p50") <= number(found, "/step_ms/max"));
        // A share is the figure over the limit of the same run.
        let share = number(found, "/weight_gb_per_s") / number(found, "/limits/read_gb_per_s");
        assert!((number(found, "/weight_share_of_reads") - share).abs() < 1e-9);
    }
}

#[test]
fn prefill_computes_every_length_asked_for() {
    let lengths = found("prefill", &["--tokens", "40,100", "--chunk", "32", "--repeat", "2", "--no-limits"]);
    assert_eq!(lengths.iter().map(|found| found["tokens"].as_u64().unwrap()).collect::<Vec<_>>(), [40, 100]);
    for found in &lengths {
        assert_eq!(found["engine"]["chunk_tokens"], 32);
        assert!(found["limits"].is_null() && found["share_of_peak"].is_null());
        assert!(number(found, "/tokens_per_s") > 0.0 && number(found, "/gflops") > 0.0);
    }
}

#[test]
fn a_long_prompt_is_computed_in_chunks_and_in_one_piece() {
    let found =
        found("mixed", &["--running", "2", "--context", "20", "--prompt", "300", "--chunk", "64", "--no-limits"]);
    let [found] = found.as_slice() else { panic!("one comparison") };
    assert_eq!(number(found, "/chunked/chunk_tokens"), 64.0);
    assert!(number(found, "/whole/chunk_tokens") >= 288.0);
    let ratio = number(found, "/chunked/gap_ms/max") / number(found, "/whole/gap_ms/max");
    assert!((number(found, "/longest_gap_ratio") - ratio).abs() < 1e-9);
}

#[test]
fn a_second_request_takes_the_shared_beginning_from_the_cache() {
    let found = found("prefix", &["--shared", "200", "--own", "9", "--no-limits"]);
    assert_eq!(found[0]["cached_tokens"], 192, "all whole blocks of it");
}

#[test]
fn throughput_answers_every_request() {
    let arguments = ["--requests", "5", "--concurrency", "2", "--prompt", "10..40", "--output", "3", "--shared", "8"];
    let found = &found("throughput", &[arguments.as_slice(), &["--kv", "f32", "--no-limits"]].concat())[0];
    assert_eq!((&found["output_tokens"], &found["engine"]["kv"]), (&15.into(), &"f32".into()));
    assert!((50..=200).contains(&found["prompt_tokens"].as_u64().unwrap()));
    assert!(number(found, "/ttft_ms/p50") > 0.0 && number(found, "/tpot_ms/p99") > 0.0);
    assert_eq!(found["drafted_tokens"], 0);
}

#[test]
fn guessing_changes_how_many_steps_it_takes_and_not_how_many_tokens_come() {
    // What a model writes greedily past its end token soon repeats itself.
    let arguments =
        ["--requests", "2", "--concurrency", "2", "--prompt", "16", "--output", "60", "--ngram", "--no-limits"];
    let found = &found("throughput", &arguments)[0];
    assert_eq!(found["output_tokens"], 120);
    let [drafted, accepted] = ["/drafted_tokens", "/accepted_tokens"].map(|pointer| number(found, pointer));
    assert!(drafted > 0.0 && accepted <= drafted, "{found}");
}

/// `accuracy` has no engine: its lines have a form of their own.
fn differences(arguments: &[&str]) -> Vec<Value> {
    let output = run(&[&["accuracy", "--json"], arguments].concat());
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn rounding_keys_and_values_costs_the_more_the_fewer_bits_they_have() {
    let demo = demo();
    let found = differences(&["--model", demo.to_str().unwrap(), "--count", "4"]);
    let kinds: Vec<_> = found.iter().map(|found| found["kv"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["f32", "f16", "bf16", "fp8"]);
    let kl: Vec<_> = found.iter().map(|found| number(found, "/mean_kl")).collect();
    // The reference itself, to the bit; then 11, 8 and 4 significant bits.
    assert!(kl[0] < 1e-12 && kl[0] < kl[1] && kl[1] < kl[2] && kl[2] < kl[3], "{kl:?}");
    for found in &found[..3] {
        // The sequences are the demo model's own answers after short prompts.
        assert!(found["positions"].as_u64().unwrap() > 50);
        assert!(number(found, "/top1_agreement") > 0.97, "{found}");
        assert!(number(found, "/perplexity_change").abs() < 0.01, "{found}");
        // The model is sure of what it wrote greedily; of what it was asked it could know nothing.
        assert!(number(found, "/reference_perplexity") < 1.5, "{found}");
    }
}

#[test]
fn fast_products_cost_something_and_little() {
    let demo = demo();
    let found =
        differences(&["--model", demo.to_str().unwrap(), "--count", "3", "--kv", "f32", "--compute", "exact,fast"]);
    let [exact, fast] = found.as_slice() else { panic!("two kinds of products: {found:?}") };
    assert_eq!((&exact["compute"], &fast["compute"]), (&"exact".into(), &"fast".into()));
    assert!(number(exact, "/mean_kl") < 1e-12 && number(fast, "/mean_kl") < 0.01, "{found:?}");
    assert!(number(fast, "/mean_kl") > number(exact, "/mean_kl") && number(fast, "/top1_agreement") > 0.95, "{fast}");
}

#[test]
fn a_model_of_random_weights_is_compared_on_what_it_writes() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().unwrap();
    let shape = ["--shape", "qwen3-tiny", "--shapes-dir", place, "--count", "2", "--tokens", "70", "--kv", "f16"];
    let folder = dir.path().join("qwen3-tiny");
    let found = differences(&[&shape[..], &["--against", folder.to_str().unwrap()]].concat());
    let [itself, again] = found.as_slice() else { panic!("the reference's folder and one more: {found:?}") };
    assert_eq!((&itself["positions"], &itself["sequences"]), (&138.into(), &2.into()));
    // Less likely than one of the vocabulary's 512 tokens at random, were the sequences not its own.
    assert!(number(itself, "/reference_perplexity") < 512.0 / 2.0, "{itself}");
    assert_eq!(itself["mean_kl"], again["mean_kl"], "the same weights");
}

#[test]
fn weights_are_rounded_once_and_cost_half() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().unwrap();
    let shape = ["--shape", "qwen3-tiny", "--shapes-dir", place];
    let found = differences(&[&shape[..], &["--weights", "int8,fp8", "--tokens", "40", "--kv", "f32"]].concat());
    let [exact, int8, fp8] = found.as_slice() else { panic!("three weights: {found:?}") };
    assert_eq!([exact, int8, fp8].map(|found| number(found, "/mean_kl") > 0.0), [false, true, true]);
    assert!(number(int8, "/mean_kl") < number(fp8, "/mean_kl"), "7 bits and 4: {int8} {fp8}");
    let again = run(&[&["decode", "--steps", "2", "--weights", "int8", "--json", "--no-limits"], &shape[..]].concat());
    assert!(again.status.success() && again.stderr.is_empty(), "{}", String::from_utf8_lossy(&again.stderr));
    let again: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(again["model"]["weights"], "i8");
    assert!(number(&again, "/model/weight_bytes") < 0.8 * number(exact, "/weight_bytes"), "{again}");
}

#[test]
fn a_shape_is_written_once_and_opens() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().unwrap();
    let output = run(&["shape", "qwen3-tiny", "--shapes-dir", place]);
    let folder = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && Path::new(folder.trim()).join("model.safetensors").is_file(), "{folder}");
    let again = run(&["decode", "--shape", "qwen3-tiny", "--shapes-dir", place, "--steps", "2", "--no-limits"]);
    assert!(again.status.success() && again.stderr.is_empty(), "{}", String::from_utf8_lossy(&again.stderr));
    assert!(String::from_utf8(again.stdout).unwrap().contains("tok/s"));
}

#[test]
fn what_cannot_be_measured_is_said() {
    let demo = demo();
    let demo = demo.to_str().unwrap();
    for (arguments, reason) in [
        (&["decode", "--shape", "gpt-5"][..], "there is no shape 'gpt-5'; there are: qwen3-tiny"),
        (&["decode"][..], "--model"),
        (&["prefill", "--model", demo, "--tokens", "9000"][..], "the model's context has 8192"),
        (&["decode", "--model", "no/such/folder"][..], "config.json"),
        (&["accuracy", "--model", demo, "--prompts", "no/such/file"][..], "no/such/file"),
    ] {
        let output = run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(reason), "{arguments:?}: {said}");
    }
}
