//! The whole of it against servers that are made here, good and bad.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use clap::Parser as _;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::{drive::Done, *};

/// What a server does with every request.
#[derive(Clone, Copy)]
struct Manner {
    /// Before each token.
    pause: Duration,
    /// Every so manieth request is refused.
    refuse: usize,
    /// Streams break off after the first token.
    breaks: bool,
    /// Each connection is closed after its answer, without a word.
    closes: bool,
}

const GOOD: Manner = Manner { pause: Duration::ZERO, refuse: 0, breaks: false, closes: false };

/// A server; it ends with the test.
struct Server {
    url: String,
    connections: Arc<AtomicUsize>,
    _serving: JoinSet<()>,
}

async fn server(manner: Manner) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/", listener.local_addr().unwrap());
    let (connections, requests) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let accepted = connections.clone();
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let mut open = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            accepted.fetch_add(1, Relaxed);
            let requests = requests.clone();
            open.spawn(async move {
                let mut stream = BufReader::new(stream);
                while serve(&mut stream, manner, &requests).await.is_some() {}
            });
        }
    });
    Server { url, connections, _serving: serving }
}

/// One request; none: the connection is over.
async fn serve(stream: &mut BufReader<TcpStream>, manner: Manner, requests: &AtomicUsize) -> Option<()> {
    let (mut line, mut length) = (String::new(), 0);
    loop {
        line.clear();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        if line == "\r\n" {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    if body.is_empty() {
        let models = r#"{"data":[{"id":"demo"}]}"#;
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{models}", models.len());
        return stream.write_all(answer.as_bytes()).await.ok();
    }
    if manner.refuse > 0 && requests.fetch_add(1, Relaxed).is_multiple_of(manner.refuse) {
        return stream.write_all(b"HTTP/1.1 429 Too Many\r\ncontent-length: 4\r\n\r\nbusy").await.ok();
    }
    let body: Value = serde_json::from_slice(&body).ok()?;
    let tokens = body["max_tokens"].as_u64()?;
    if body["stream"] != true {
        let answer = format!(
            r#"{{"choices":[{{"message":{{"content":"x"}},"finish_reason":"length"}}],"usage":{{"prompt_tokens":9,"completion_tokens":{tokens}}}}}"#
        );
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
        return stream.write_all(head.as_bytes()).await.ok();
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.ok()?;
    let chunk = |data: &str| format!("{:x}\r\n{data}\r\n", data.len());
    for _ in 0..tokens {
        tokio::time::sleep(manner.pause).await;
        stream.write_all(chunk("data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n").as_bytes()).await.ok()?;
        if manner.breaks {
            return None;
        }
    }
    let usage = format!("{{\"prompt_tokens\":9,\"completion_tokens\":{tokens}}}");
    let end = chunk(&format!("data: {{\"choices\":[],\"usage\":{usage}}}\n\n")) + &chunk("data: [DONE]\n\n");
    stream.write_all((end + "0\r\n\r\n").as_bytes()).await.ok()?;
    (!manner.closes).then_some(())
}

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    args: BenchArgs,
}

/// Runs it to its end, or until `stop`.
async fn bench(server: &Server, line: &str, stop: impl Future<Output = ()>) -> Done {
    let line = format!("bench --prompt-tokens 5 --output-tokens 4 {line}");
    let args = Line::try_parse_from(line.split_whitespace()).unwrap().args;
    let target = Target::find(&server.url, None).await.unwrap();
    let model = first_model(&target.get("/v1/models", Duration::from_secs(10)).await.unwrap()).unwrap();
    let slo = Slo { ttft: args.slo_ttft.map(ms), tpot: args.slo_tpot.map(ms) };
    let work = Work::open(&args, &model).unwrap();
    drive(course(&args), work, target, Tally { slo, ..Tally::default() }, stop).await.unwrap().0
}

async fn never() {
    pending().await
}

#[tokio::test]
async fn a_closed_loop_sends_so_many_at_a_time_over_connections_that_are_kept() {
    let server = server(GOOD).await;
    let done = bench(&server, "--concurrency 4 --requests 200", never()).await;
    assert_eq!((done.sent, done.tally.answered, done.tally.failed, done.most_open), (200, 200, 0, 4));
    assert_eq!((done.tally.output_tokens, done.tally.prompt_tokens), (800, 1800));
    assert_eq!((done.tally.ttft.count(), done.tally.tpot.count(), done.tally.itl.count()), (200, 200, 600));
    let connections = server.connections.load(Relaxed);
    assert!(connections <= 5, "{connections} connections for four at a time and the question before");
}

#[tokio::test]
async fn whole_answers_are_counted_too() {
    let done = bench(&server(GOOD).await, "--no-stream --concurrency 2 --requests 20", never()).await;
    assert_eq!((done.tally.answered, done.tally.output_tokens, done.tally.ttft.count()), (20, 80, 0));
    assert_eq!(done.tally.whole.count(), 20);
}

#[tokio::test]
async fn an_open_loop_counts_from_when_a_request_was_due() {
    // Answers take a tenth of a second, one is open at a time, and ten are due within that: the last one is sent nine
    // answers late, and that is what its client would have felt.
    let slow = Manner { pause: Duration::from_millis(25), ..GOOD };
    let line = "--rate 100 --arrivals constant --most-open 1 --requests 10";
    let done = bench(&server(slow).await, line, never()).await;
    assert_eq!((done.tally.answered, done.most_open), (10, 1));
    let (late, whole) = (done.tally.late.times().unwrap(), done.tally.whole.times().unwrap());
    assert!(late.max > 750.0 && whole.max > 850.0, "{late:?} {whole:?}");
    assert!(done.tally.itl.permille(500) > 24.0, "{}", done.tally.itl.permille(500));
}

#[tokio::test]
async fn what_was_due_and_not_sent_is_told_and_the_warm_up_is_not_counted() {
    let slow = Manner { pause: Duration::from_millis(700), ..GOOD };
    let line = "--rate 100 --arrivals constant --duration 495ms --most-open 20";
    let done = bench(&server(slow).await, line, never()).await;
    assert_eq!((done.sent, done.not_sent, done.tally.answered), (20, 30, 20));
    let quick = Manner { pause: Duration::from_millis(1), ..GOOD };
    let line = "--rate 100 --arrivals constant --warmup 105ms --duration 200ms";
    let done = bench(&server(quick).await, line, never()).await;
    assert_eq!((done.warm, done.sent, done.tally.answered), (11, 20, 20));
}

#[tokio::test]
async fn goodput_counts_answers_that_keep_both_promises() {
    let server = server(Manner { pause: Duration::from_millis(20), ..GOOD }).await;
    let good =
        async |line: &str| bench(&server, &format!("--concurrency 1 --requests 5 {line}"), never()).await.tally.good;
    assert_eq!(good("--slo-ttft 60000 --slo-tpot 60000").await, 5);
    assert_eq!(good("--slo-ttft 60000 --slo-tpot 5").await, 0);
    assert_eq!(good("--slo-ttft 5").await, 0);
}

#[tokio::test]
async fn errors_are_told_apart() {
    let refusing = server(Manner { refuse: 2, ..GOOD }).await;
    let done = bench(&refusing, "--concurrency 1 --requests 10", never()).await;
    assert_eq!((done.tally.answered, done.tally.errors["http 429"]), (5, 5));
    let breaking = server(Manner { breaks: true, ..GOOD }).await;
    let done = bench(&breaking, "--concurrency 2 --requests 6", never()).await;
    assert_eq!((done.tally.answered, done.tally.errors["broken off"]), (0, 6));
    // Kept connections that were closed meanwhile are nobody's fault.
    let closing = server(Manner { closes: true, ..GOOD }).await;
    let done = bench(&closing, "--concurrency 2 --requests 20", never()).await;
    assert_eq!((done.tally.answered, done.tally.failed), (20, 0), "{:?}", done.tally.errors);
}

#[tokio::test]
async fn a_server_that_goes_away_is_an_error_of_its_requests() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let args = Line::try_parse_from("bench --requests 3 --concurrency 1".split(' ')).unwrap().args;
    let target = Target::find(&format!("http://{gone}"), None).await.unwrap();
    let work = Work::open(&args, "demo").unwrap();
    let (done, _) = drive(course(&args), work, target, Tally::default(), never()).await.unwrap();
    assert_eq!((done.tally.answered, done.tally.errors["connect: refused"]), (0, 3));
}

#[tokio::test]
async fn whoever_stops_it_sees_what_there_is() {
    let server = server(Manner { pause: Duration::from_millis(10), ..GOOD }).await;
    let stop = tokio::time::sleep(Duration::from_millis(500));
    let Done { tally, sent, interrupted, .. } = bench(&server, "--concurrency 3 --duration 1h", stop).await;
    assert!(interrupted);
    assert_eq!((tally.cut_off, tally.answered + 3), (3, sent));
}

#[tokio::test]
async fn what_is_no_address_or_has_no_models_is_refused() {
    for bad in ["", "a:1", "https://a:1", "http://", "http://a b:1"] {
        assert!(Target::find(bad, None).await.unwrap_err().is::<crate::output::Usage>(), "{bad:?}");
    }
    assert!(first_model(&serde_json::json!({"data": []})).is_err());
}

#[test]
fn a_key_is_sent_with_every_request_and_only_one_word_is_a_key() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let target = runtime.block_on(Target::find("http://127.0.0.1:1/base/v1", Some("sk-1".to_owned()))).unwrap();
    let request = String::from_utf8(target.request("POST", "/v1/completions", b"{}")).unwrap();
    assert!(request.starts_with("POST /base/v1/completions HTTP/1.1\r\nhost: 127.0.0.1:1\r\n"), "{request}");
    assert!(request.contains("\r\nauthorization: Bearer sk-1\r\n") && request.ends_with("\r\n\r\n{}"), "{request}");
}
