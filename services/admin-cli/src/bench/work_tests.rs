use clap::Parser as _;

use super::*;

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    args: BenchArgs,
}

fn args(line: &str) -> BenchArgs {
    Line::try_parse_from(["bench"].into_iter().chain(line.split_whitespace())).unwrap().args
}

fn work(line: &str) -> Work {
    Work::open(&args(line), "demo").unwrap()
}

fn body(work: &mut Work) -> Value {
    serde_json::from_slice(&work.next().unwrap().unwrap().body).unwrap()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn words(body: &Value) -> Vec<String> {
    let text = body["messages"][0]["content"].as_str().or_else(|| body["prompt"].as_str()).unwrap();
    text.split(' ').map(str::to_owned).collect()
}

#[test]
fn made_up_prompts_have_their_length_their_shared_beginning_and_the_same_seed_the_same_words() {
    let mut made = work("--prompt-tokens 100 --shared-prefix 40 --output-tokens 7");
    let (a, b) = (body(&mut made), body(&mut made));
    assert_eq!((words(&a).len(), words(&b).len()), (100, 100));
    assert_eq!(words(&a)[..40], words(&b)[..40]);
    assert_ne!(words(&a)[40..], words(&b)[40..]);
    assert_eq!((&a["max_tokens"], &a["ignore_eos"], &a["model"]), (&json!(7), &json!(true), &json!("demo")));
    assert_eq!((&a["stream"], &a["stream_options"]["include_usage"]), (&json!(true), &json!(true)));
    assert_eq!(body(&mut work("--prompt-tokens 100 --shared-prefix 40 --output-tokens 7")), a);
    assert_ne!(body(&mut work("--prompt-tokens 100 --shared-prefix 40 --output-tokens 7 --seed 2")), a);
    let plain = body(&mut work("--no-stream --may-stop"));
    assert!(plain.get("stream").is_none() && plain.get("ignore_eos").is_none());
}

#[test]
fn lengths_vary_within_their_bounds() {
    let mut made = work("--prompt-tokens 5-9 --output-tokens 1-3");
    let all: Vec<Value> = (0..200).map(|_| body(&mut made)).collect();
    let lengths: std::collections::BTreeSet<usize> = all.iter().map(|body| words(body).len()).collect();
    let outputs: std::collections::BTreeSet<u64> =
        all.iter().map(|body| body["max_tokens"].as_u64().unwrap()).collect();
    assert_eq!(lengths.into_iter().collect::<Vec<_>>(), [5, 6, 7, 8, 9]);
    assert_eq!(outputs.into_iter().collect::<Vec<_>>(), [1, 2, 3]);
}

#[test]
fn prompts_of_ids_are_completions_only() {
    let mut made = work("--ids 600 --api completions --prompt-tokens 50 --shared-prefix 10");
    let prompt = body(&mut made)["prompt"].clone();
    assert_eq!(prompt.as_array().unwrap().len(), 50);
    assert!(prompt.as_array().unwrap().iter().all(|id| (256..600).contains(&id.as_u64().unwrap())));
    assert!(Work::open(&args("--ids 600"), "demo").is_err());
}

#[test]
fn a_datasets_lines_are_texts_prompts_chats_or_conversations_and_it_begins_again() {
    let file = file(
        "just \"text\"\n\n{\"prompt\": \"p\", \"max_tokens\": 3}\n\
         {\"messages\": [{\"role\": \"system\", \"content\": \"s\"}]}\n\
         {\"conversations\": [{\"from\": \"gpt\", \"value\": \"no\"}, {\"from\": \"human\", \"value\": \"yes\"}]}\n",
    );
    let line = format!("--dataset {} --output-tokens 9", file.path().display());
    let mut dataset = work(&line);
    let all: Vec<Value> = (0..5).map(|_| body(&mut dataset)).collect();
    assert_eq!(all[0]["messages"][0]["content"], "just \"text\"");
    assert_eq!((&all[1]["messages"][0]["content"], &all[1]["max_tokens"]), (&json!("p"), &json!(3)));
    assert_eq!((&all[2]["messages"][0]["role"], &all[2]["max_tokens"]), (&json!("system"), &json!(9)));
    assert_eq!(all[3]["messages"][0]["content"], "yes");
    assert_eq!((&all[4], dataset.rounds()), (&all[0], 1));
    assert!(all[0].get("ignore_eos").is_none(), "answers end where the model ends them");

    let mut completions = work(&format!("{line} --api completions"));
    assert_eq!(body(&mut completions)["prompt"], "just \"text\"");
    assert_eq!(body(&mut completions)["prompt"], "p");
    let error = format!("{:#}", completions.next().unwrap_err());
    assert!(error.contains("line 4") && error.contains("messages"), "{error}");
}

#[test]
fn a_trace_keeps_its_times_and_shares_what_its_ids_share() {
    let file = file(
        "{\"timestamp\": 0, \"input_length\": 25, \"output_length\": 5, \"hash_ids\": [1, 2]}\n\
         {\"timestamp\": 3000, \"input_length\": 25, \"output_length\": 500, \"hash_ids\": [1, 3]}\n\
         {\"timestamp\": 3000, \"input_length\": 15, \"output_length\": 0, \"hash_ids\": [1, 2]}\n",
    );
    let mut trace = work(&format!("--trace {} --block-tokens 10 --speed 2 --cut-output 50", file.path().display()));
    let all: Vec<Ask> = std::iter::from_fn(|| trace.next().unwrap()).collect();
    let times: Vec<Duration> = all.iter().filter_map(|ask| ask.at).collect();
    assert_eq!(times, [0.0, 1.5, 1.5].map(Duration::from_secs_f64));
    let bodies: Vec<Value> = all.iter().map(|ask| serde_json::from_slice(&ask.body).unwrap()).collect();
    let words: Vec<Vec<String>> = bodies.iter().map(words).collect();
    assert_eq!(words.iter().map(Vec::len).collect::<Vec<_>>(), [25, 25, 15]);
    assert_eq!(words[0][..10], words[1][..10]);
    assert_ne!(words[0][10..20], words[1][10..20]);
    assert_eq!(words[0][..15], words[2][..15]);
    assert_ne!(words[0][20..], words[1][20..]);
    assert_eq!(bodies.iter().map(|body| body["max_tokens"].as_u64().unwrap()).collect::<Vec<_>>(), [5, 50, 1]);
}

#[test]
fn files_that_make_no_sense_are_named_with_their_line() {
    assert!(format!("{:#}", Work::open(&args("--dataset no/such"), "m").err().unwrap()).contains("no/such"));
    for (flag, text, expected) in [
        ("--dataset", "", "nothing in it"),
        ("--dataset", "fine\n{\"prompt\": 7}\n", "line 2"),
        ("--dataset", "fine\n{}\n", "line 2"),
        ("--trace", "{\"timestamp\": 0, \"input_length\": 1, \"output_length\": 1}\n0 1 2\n", "line 2"),
        ("--trace", "{\"timestamp\": -1, \"input_length\": 1, \"output_length\": 1}\n", "line 1"),
    ] {
        let file = file(text);
        let mut work = work(&format!("{flag} {}", file.path().display()));
        let error = std::iter::repeat_with(|| work.next()).find_map(Result::err).unwrap();
        assert!(format!("{error:#}").contains(expected), "{error:#}");
    }
}
