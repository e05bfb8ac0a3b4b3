//! Connections to one server, and one request on each at a time. Connections are kept for the next request.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout_at},
};

use super::{
    events::{self, Events, Heard, Nonsense},
    http::Response,
    tally::{Answered, Fate},
};
use crate::output::Usage;

/// How much is read at a time.
const BUFFER: usize = 8 << 10;
/// Most times between pieces that are kept of one answer, until it ends.
const MAX_GAPS: usize = 1 << 16;
/// Most connections kept while nobody uses them.
const MAX_IDLE: usize = 20_000;

/// A server.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// Without a path.
    pub(super) url: String,
    host: String,
    /// What the base of all paths is, where there is one: `http://host/base/v1`.
    base: String,
    addresses: Arc<[SocketAddr]>,
    idle: Arc<Mutex<Vec<TcpStream>>>,
    key: Option<String>,
}

/// An answer's times as they came: between two events, from the second event on.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) fate: Fate,
    pub(super) gaps: Vec<Duration>,
}

impl Target {
    /// The server at that URL.
    pub(super) async fn find(url: &str, key: Option<String>) -> anyhow::Result<Self> {
        let wrong = || Usage(format!("{url:?}: expected http://HOST:PORT"));
        let rest = url.strip_prefix("http://").ok_or_else(wrong)?.trim_end_matches('/');
        let rest = rest.strip_suffix("/v1").unwrap_or(rest);
        let (host, base) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if host.is_empty() || !plain(rest) {
            return Err(wrong().into());
        }
        let with_port = if host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
            host.to_owned()
        } else {
            format!("{host}:80")
        };
        let found = tokio::net::lookup_host(&with_port).await.with_context(|| format!("{host} is not found"))?;
        Ok(Self {
            url: url.to_owned(),
            host: host.to_owned(),
            base: base.to_owned(),
            addresses: found.collect(),
            idle: Arc::default(),
            key,
        })
    }

    /// A request's bytes.
    pub(super) fn request(&self, method: &str, path: &str, body: &[u8]) -> Vec<u8> {
        let key = self.key.as_ref().map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
        let Self { host, base, .. } = self;
        let mut bytes = format!(
            "{method} {base}{path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: kvasirctl\r\naccept: */*\r\n{key}content-type: \
             application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        bytes.extend_from_slice(body);
        bytes
    }

    async fn connect(&self) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "no address");
        for address in self.addresses.iter() {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn idle(&self) -> Option<TcpStream> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn give_back(&self, stream: TcpStream) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE {
            idle.push(stream);
        }
    }

    /// Asks, and reads the answer to its end. All times are from `due`.
    pub(super) async fn ask(&self, request: &[u8], due: Instant, stream: bool, patience: Duration) -> Told {
        let mut reading = Reading::new(due, stream);
        let fate = match timeout_at(due + patience, self.converse(request, &mut reading)).await {
            Ok(Ok(())) => reading.fate(),
            Ok(Err(why)) => Fate::Failed(why),
            Err(_) => Fate::Failed("no end in time".to_owned()),
        };
        Told { fate, gaps: reading.gaps }
    }

    async fn converse(&self, request: &[u8], reading: &mut Reading) -> Result<(), String> {
        reading.late = reading.due.elapsed();
        if let Some(stream) = self.idle() {
            match self.exchange(stream, request, reading).await {
                // A kept connection that the server has closed meanwhile says nothing of the server.
                Err(_) if reading.response.status() == 0 && !reading.began => {}
                other => return other,
            }
        }
        let stream = self.connect().await.map_err(|error| format!("connect: {}", kind(&error)))?;
        self.exchange(stream, request, reading).await
    }

    async fn exchange(&self, mut stream: TcpStream, request: &[u8], reading: &mut Reading) -> Result<(), String> {
        stream.write_all(request).await.map_err(|error| format!("send: {}", kind(&error)))?;
        let mut buffer = [0; BUFFER];
        while !reading.response.is_done() {
            let read = stream.read(&mut buffer).await.map_err(|error| format!("receive: {}", kind(&error)))?;
            if read == 0 {
                return if reading.response.end() { Ok(()) } else { Err("broken off".to_owned()) };
            }
            reading.feed(&buffer[..read])?;
        }
        if reading.response.keeps() {
            self.give_back(stream);
        }
        Ok(())
    }

    /// A question that is answered with JSON.
    pub(super) async fn get(&self, path: &str, limit: Duration) -> anyhow::Result<Value> {
        let request = self.request("GET", path, b"");
        let mut reading = Reading::new(Instant::now(), false);
        let told = timeout_at(Instant::now() + limit, self.converse(&request, &mut reading)).await;
        let failed = || format!("{}{path}", self.url);
        told.map_err(|_| anyhow::anyhow!("no answer within {} ms", limit.as_millis()))
            .with_context(failed)?
            .map_err(anyhow::Error::msg)
            .with_context(failed)?;
        anyhow::ensure!(reading.response.status() == 200, "{}: http {}", failed(), reading.response.status());
        serde_json::from_slice(&reading.body).with_context(failed)
    }
}

/// A connection's trouble in a word or two: one kind for each.
fn kind(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "refused".to_owned(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => "reset".to_owned(),
        io::ErrorKind::TimedOut => "timed out".to_owned(),
        _ => error.to_string().chars().filter(|c| !c.is_control()).take(60).collect(),
    }
}

/// An answer as it comes.
struct Reading {
    due: Instant,
    late: Duration,
    stream: bool,
    began: bool,
    response: Response,
    events: Events,
    /// A body that is no stream.
    body: Vec<u8>,
    first: Option<Instant>,
    last: Option<Instant>,
    gaps: Vec<Duration>,
}

impl Reading {
    fn new(due: Instant, stream: bool) -> Self {
        Self {
            due,
            late: Duration::ZERO,
            stream,
            began: false,
            response: Response::default(),
            events: Events::default(),
            body: Vec::new(),
            first: None,
            last: None,
            gaps: Vec::new(),
        }
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.began = true;
        let Self { response, events, body, stream, .. } = self;
        let (before, mut wrong) = (events.heard().pieces, None::<Nonsense>);
        let mut take = |status, piece: &[u8]| {
            // An error is no stream, whatever was asked for.
            let taken = if *stream && status == 200 { events.feed(piece) } else { events::keep(body, piece) };
            wrong = wrong.or_else(|| taken.err());
        };
        response.feed(bytes, &mut take).map_err(|error| error.to_string())?;
        if let Some(wrong) = wrong {
            return Err(wrong.to_string());
        }
        let pieces = self.events.heard().pieces - before;
        if pieces > 0 {
            let now = Instant::now();
            // Pieces that came together came at once.
            let together = std::iter::repeat_n(Duration::ZERO, usize::try_from(pieces - 1).unwrap_or(usize::MAX));
            let room = MAX_GAPS.saturating_sub(self.gaps.len());
            self.gaps.extend(self.last.map(|last| now - last).into_iter().chain(together).take(room));
            self.first = self.first.or(Some(now));
            self.last = Some(now);
        }
        Ok(())
    }

    fn fate(&self) -> Fate {
        let status = self.response.status();
        if status != 200 {
            return Fate::Failed(format!("http {status}"));
        }
        let heard = if self.stream { Ok(self.events.heard().clone()) } else { Heard::whole(&self.body) };
        let heard = match heard {
            Ok(heard) => heard,
            Err(nonsense) => return Fate::Failed(nonsense.to_string()),
        };
        if let Some(error) = heard.error {
            return Fate::Failed(format!("in the stream: {error}"));
        }
        if !heard.done && !heard.finished {
            return Fate::Failed("broken off".to_owned());
        }
        if heard.pieces == 0 && heard.usage.is_none_or(|usage| usage.completion_tokens == 0) {
            return Fate::Failed("an empty answer".to_owned());
        }
        let now = Instant::now();
        let usage = heard.usage.unwrap_or_default();
        Fate::Answered(Answered {
            late: self.late,
            ttft: self.first.map(|first| first - self.due),
            last: self.last.unwrap_or(now) - self.due,
            whole: now - self.due,
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens(),
            output_tokens: usage.completion_tokens.max(if heard.usage.is_some() { 0 } else { heard.pieces }),
        })
    }
}
