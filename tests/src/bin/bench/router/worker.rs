//! What the routers have behind them: workers that compute nothing, each a process of its own, so that a router's
//! processor time is that of its process.
//!
//! | for | it speaks | it is found |
//! | --- | --- | --- |
//! | ours | gRPC `Decode` | in etcd, as any worker |
//! | routers that pass bodies on | SGLang's `/generate` over HTTP/1.1, whole or as server-sent events | by its URL |
//!
//! Both do what the prompt says ([`Pace`]): a request is the same whoever carries it. Tokens of all answers of one pace and
//! phase come at the same moments, as they do from an engine's steps. Every token is written by itself.

use std::{
    pin::Pin,
    sync::LazyLock,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use futures_util::{Stream, stream};
use kvasir_cluster::{EtcdConfig, Member, ModelInfo, connect_etcd};
use kvasir_proto::v1::{
    self,
    decode_server::{Decode, DecodeServer},
    generate_event,
};
use kvasir_types::{Incarnation, KvDtype, KvLayout, ModelFingerprint, PROTOCOL_VERSION, Role};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, BufWriter},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

use super::plan::{MAX_MODEL_LEN, MODEL};

/// Tokens of answers are from here on: words of the demo model.
const WORDS: std::ops::Range<u32> = 400..800;
/// Longest body taken.
const MAX_BODY: usize = 1 << 20;

/// When the tokens of an answer come; a prompt's first two tokens say it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Milliseconds from one token to the next; 0: all at once.
    pub every_ms: u32,
    /// So many of them later than others of that pace.
    pub phase_ms: u32,
}

impl Pace {
    /// All tokens at once.
    pub const AT_ONCE: Self = Self { every_ms: 0, phase_ms: 0 };

    /// Until the next token's moment.
    async fn wait(self) {
        static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
        if self.every_ms == 0 {
            return;
        }
        let [every, phase] = [self.every_ms, self.phase_ms].map(|ms| Duration::from_millis(ms.into()));
        let origin = *ORIGIN + phase;
        let beats = origin.elapsed().as_nanos() / every.as_nanos() + 1;
        tokio::time::sleep_until((origin + every * beats as u32).into()).await;
    }
}

/// A worker's process, until its standard input ends: `grpc ETCD` or `http`. Its first line is its address.
pub async fn run(arguments: &[&str]) -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?.to_string();
    let serving = async {
        match arguments {
            ["grpc", etcd] => Box::pin(grpc(listener, etcd)).await,
            ["http"] => http(listener).await,
            _ => bail!("a worker is 'grpc ETCD' or 'http', not {arguments:?}"),
        }
    };
    println!("{address}");
    // Not the runtime's own way of reading it: that would keep the process from ending with an error.
    let (held, ended) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        let _held = held;
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())
    });
    tokio::select! {
        failed = serving => failed,
        _ = ended => Ok(()),
    }
}

/// Serves gRPC as a member of the cluster in that etcd.
async fn grpc(listener: TcpListener, etcd: &str) -> Result<()> {
    let address = listener.local_addr()?.to_string();
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let decode = DecodeServer::new(Scripted).max_decoding_message_size(kvasir_proto::MAX_MESSAGE_BYTES);
    let server = kvasir_rpc::server().add_service(decode).serve_with_incoming(incoming);
    let config = EtcdConfig { endpoints: vec![etcd.to_owned()], ..EtcdConfig::default() };
    let (registry, watching) = connect_etcd(config).await?;
    let joining = async {
        registry.register(member(address)).await?;
        std::future::pending::<Result<()>>().await
    };
    tokio::select! {
        ended = server => ended.context("the gRPC server"),
        () = watching => bail!("the registry has ended"),
        failed = joining => failed.context("registration"),
    }
}

fn member(grpc: String) -> Member {
    let layout = KvLayout { block_size: 16, layers: 5, kv_heads: 2, k_dim: 32, v_dim: 32, dtype: KvDtype::F16 };
    Member {
        id: "decode-0".parse().expect("a name"),
        incarnation: Incarnation(1),
        role: Role::Decode,
        grpc,
        admin: String::new(),
        http: String::new(),
        protocol: PROTOCOL_VERSION,
        version: String::new(),
        model: Some(ModelInfo {
            name: MODEL.to_owned(),
            fingerprint: ModelFingerprint([7; 16]),
            layout,
            max_model_len: MAX_MODEL_LEN,
            tokenizer: String::new(),
        }),
        segment: None,
        store: None,
        engine: None,
        draining: false,
        duty: kvasir_cluster::Duty::default(),
    }
}

struct Scripted;

#[tonic::async_trait]
impl Decode for Scripted {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateEvent, Status>> + Send>>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        let tokens = request.sampling.map_or(1, |sampling| sampling.max_tokens).max(1);
        let prompt_tokens = request.prompt.len() as u32;
        let [every_ms, phase_ms] = [0, 1].map(|at| request.prompt.get(at).copied().unwrap_or(0));
        // Prompts that were text once begin with anything; they ask for one token.
        let pace = if tokens > 1 { Pace { every_ms, phase_ms } } else { Pace::AT_ONCE };
        let events = stream::unfold(0, move |at| async move {
            let event = if at < tokens {
                pace.wait().await;
                let id = WORDS.start + at % WORDS.len() as u32;
                generate_event::Event::Token(v1::Token { id, logprob: None, top: Vec::new() })
            } else if at == tokens {
                generate_event::Event::Finished(v1::Finished {
                    reason: v1::finished::Reason::Length.into(),
                    prompt_tokens,
                    cached_tokens: 0,
                    output_tokens: tokens,
                    prefill_member: String::new(),
                })
            } else {
                return None;
            };
            Some((Ok(v1::GenerateEvent { event: Some(event), choice: 0 }), at + 1))
        });
        Ok(Response::new(Box::pin(events)))
    }
}

/// Serves SGLang's HTTP.
async fn http(listener: TcpListener) -> Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        // How it ended is the client's to know.
        connections.spawn(async move { drop(connection(stream).await) });
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(mut stream: TcpStream) -> Result<()> {
    let (read, write) = stream.split();
    let (mut read, mut write) = (BufReader::new(read), BufWriter::new(write));
    let mut line = String::new();
    loop {
        line.clear();
        if read.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).context("no request line")?.to_owned();
        let body = read_body(&mut read, &mut line).await?;
        answer(&mut write, &path, &body).await?;
    }
}

/// The rest of a request; only its length is looked at.
async fn read_body(read: &mut (impl AsyncBufReadExt + Unpin), line: &mut String) -> Result<Vec<u8>> {
    let mut length = 0;
    loop {
        line.clear();
        if read.read_line(line).await? == 0 {
            bail!("the head ends early");
        }
        if line == "\r\n" {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse()?;
        }
    }
    if length > MAX_BODY {
        bail!("a body of {length} bytes");
    }
    let mut body = vec![0; length];
    read.read_exact(&mut body).await?;
    Ok(body)
}

async fn answer(write: &mut (impl AsyncWriteExt + Unpin), path: &str, body: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(body);
    match path.split('?').next().unwrap_or_default() {
        "/generate" if text.contains("\"stream\":true") => return stream_answer(write, &text).await,
        "/generate" => {
            let meta = format!(r#"{{"id":"0","finish_reason":{{"type":"length","length":1}},"prompt_tokens":{}"#, 512);
            whole(
                write,
                "200 OK",
                &format!(r#"{{"text":" word","output_ids":[400],"meta_info":{meta},"completion_tokens":1}}}}"#),
            )
            .await?;
        }
        // What routers ask a worker about itself.
        "/health" => whole(write, "200 OK", "").await?,
        "/model_info" | "/get_model_info" => {
            whole(
                write,
                "200 OK",
                &format!(r#"{{"model_path":"{MODEL}","tokenizer_path":"{MODEL}","is_generation":true}}"#),
            )
            .await?;
        }
        "/server_info" | "/get_server_info" => {
            whole(write, "200 OK", &format!(r#"{{"model_path":"{MODEL}","served_model_name":"{MODEL}"}}"#)).await?;
        }
        "/v1/models" => {
            whole(write, "200 OK", &format!(r#"{{"object":"list","data":[{{"id":"{MODEL}","object":"model"}}]}}"#))
                .await?;
        }
        _ => whole(write, "404 Not Found", "").await?,
    }
    Ok(())
}

async fn whole(write: &mut (impl AsyncWriteExt + Unpin), status: &str, body: &str) -> Result<()> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n");
    write.write_all(head.as_bytes()).await?;
    write.write_all(body.as_bytes()).await?;
    Ok(write.flush().await?)
}

async fn stream_answer(write: &mut (impl AsyncWriteExt + Unpin), body: &str) -> Result<()> {
    let tokens = number_after(body, "\"max_new_tokens\":").unwrap_or(1);
    let prompt = body.split_once("\"input_ids\":[").map_or("", |(_, prompt)| prompt);
    let first = |prompt: &str| number_after(prompt, "").unwrap_or(0);
    let pace = Pace { every_ms: first(prompt), phase_ms: prompt.split_once(',').map_or(0, |(_, rest)| first(rest)) };
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    write.write_all(head.as_bytes()).await?;
    for at in 0..tokens {
        pace.wait().await;
        let id = WORDS.start + at % WORDS.len() as u32;
        let meta = format!(r#"{{"id":"0","finish_reason":null,"prompt_tokens":512,"completion_tokens":{}}}"#, at + 1);
        chunk(write, &format!("data: {{\"text\":\" word\",\"output_ids\":[{id}],\"meta_info\":{meta}}}\n\n")).await?;
    }
    chunk(write, "data: [DONE]\n\n").await?;
    write.write_all(b"0\r\n\r\n").await?;
    Ok(write.flush().await?)
}

async fn chunk(write: &mut (impl AsyncWriteExt + Unpin), data: &str) -> Result<()> {
    write.write_all(format!("{:x}\r\n{data}\r\n", data.len()).as_bytes()).await?;
    Ok(write.flush().await?)
}

/// The number that follows the first `mark`.
fn number_after(text: &str, mark: &str) -> Option<u32> {
    let (_, rest) = if mark.is_empty() { ("", text) } else { text.split_once(mark)? };
    let rest = rest.trim_start();
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_up_to_what_follows() {
        assert_eq!(number_after(r#"{"max_new_tokens":128,"x":1}"#, "\"max_new_tokens\":"), Some(128));
        assert_eq!((number_after("10, 3]", ""), number_after("]", ""), number_after("1", "x")), (Some(10), None, None));
    }
}
