//! A server that speaks OpenAI's HTTP and thinks nothing: the tokens asked for, at once, or one every so often if the model is
//! called `every-MS`. All that it writes is made beforehand.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::Mutex,
    task::JoinSet,
};

/// Longest body taken.
const MAX_BODY: usize = 4 << 20;
/// Most tokens of an answer.
const MAX_TOKENS: usize = 10_000;

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// Serves until its standard input ends. Its first line is its address.
pub async fn run() -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    println!("{}", listener.local_addr()?);
    let (held, ended) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        let _held = held;
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())
    });
    tokio::select! {
        failed = serve(listener) => failed,
        _ = ended => Ok(()),
    }
}

/// Answers that were made: by whether it is a chat, and their tokens.
type Made = Arc<Mutex<HashMap<(bool, usize), Arc<Vec<u8>>>>>;

async fn serve(listener: TcpListener) -> Result<()> {
    let (mut connections, made) = (JoinSet::new(), Made::default());
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let made = made.clone();
        // How it ended is the client's to know.
        connections.spawn(async move { drop(connection(BufReader::new(stream), made).await) });
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(mut stream: BufReader<TcpStream>, made: Made) -> Result<()> {
    let mut line = String::new();
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).context("no request line")?.to_owned();
        let mut length = 0;
        loop {
            line.clear();
            if stream.read_line(&mut line).await? == 0 {
                bail!("the head ends early");
            }
            match line.split_once(':') {
                None => break,
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => length = value.trim().parse()?,
                Some(_) => {}
            }
        }
        anyhow::ensure!(length <= MAX_BODY, "a body of {length} bytes");
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        if path.ends_with("/completions") {
            answer(&mut stream, &body, path.ends_with("/chat/completions"), &made).await?;
        } else {
            let models = r#"{"object":"list","data":[{"id":"demo","object":"model"}]}"#;
            let length = models.len();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n");
            stream.write_all((head + models).as_bytes()).await?;
        }
    }
}

async fn answer(stream: &mut BufReader<TcpStream>, body: &[u8], chat: bool, made: &Made) -> Result<()> {
    let body: serde_json::Value = serde_json::from_slice(body)?;
    let asked = body["max_tokens"].as_u64().or_else(|| body["max_completion_tokens"].as_u64()).unwrap_or(16);
    let tokens = (asked as usize).min(MAX_TOKENS);
    let every = body["model"].as_str().and_then(|model| model.strip_prefix("every-")?.parse().ok());
    let Some(every) = every.map(Duration::from_millis) else {
        let mut made = made.lock().await;
        let bytes = made.entry((chat, tokens)).or_insert_with(|| {
            let pieces: String = (0..tokens).map(|_| chunk(&token(chat))).collect();
            Arc::new((HEAD.to_owned() + &pieces + &end(chat, tokens)).into_bytes())
        });
        let bytes = Arc::clone(bytes);
        drop(made);
        return Ok(stream.write_all(&bytes).await?);
    };
    stream.write_all(HEAD.as_bytes()).await?;
    let began = Instant::now();
    let piece = chunk(&token(chat));
    for at in 0..tokens {
        tokio::time::sleep_until((began + every * at as u32).into()).await;
        stream.write_all(piece.as_bytes()).await?;
    }
    Ok(stream.write_all(end(chat, tokens).as_bytes()).await?)
}

fn token(chat: bool) -> String {
    let choice = if chat { r#""delta":{"content":" word"}"# } else { r#""text":" word""# };
    event(chat, &format!(r#"[{{"index":0,{choice},"finish_reason":null}}]"#), "")
}

fn event(chat: bool, choices: &str, more: &str) -> String {
    let object = if chat { "chat.completion.chunk" } else { "text_completion" };
    format!(r#"data: {{"id":"1","object":"{object}","created":1,"model":"demo","choices":{choices}{more}}}"#) + "\n\n"
}

fn end(chat: bool, tokens: usize) -> String {
    let choice = if chat { r#""delta":{}"# } else { r#""text":"""# };
    let usage =
        format!(r#","usage":{{"prompt_tokens":64,"completion_tokens":{tokens},"total_tokens":{}}}"#, tokens + 64);
    chunk(&event(chat, &format!(r#"[{{"index":0,{choice},"finish_reason":"length"}}]"#), ""))
        + &chunk(&event(chat, "[]", &usage))
        + &chunk("data: [DONE]\n\n")
        + "0\r\n\r\n"
}

fn chunk(data: &str) -> String {
    format!("{:x}\r\n{data}\r\n", data.len())
}
