//! Clients that ask as soon as they have their answer: the same against every router.
//!
//! Requests are bytes made beforehand; of answers only what frames them is read, and events are counted. So the clients take
//! little of the machine, and all routers meet the same ones.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    task::JoinSet,
};

/// Longest wait for anything of an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A request as it is written to a connection.
pub fn request(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let head = "host: bench\r\ncontent-type: application/json";
    format!("POST {path} HTTP/1.1\r\n{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// When clients leave.
#[derive(Clone, Copy)]
pub enum Until {
    /// With the first answer after so long.
    After(Duration),
    /// After so many answers.
    Answers(usize),
}

/// Who asks, and how often.
#[derive(Clone, Copy)]
pub struct Plan {
    pub clients: usize,
    pub until: Until,
    /// Clients begin one after the other over this time.
    pub spread: Duration,
}

/// What the clients saw.
#[derive(Default)]
pub struct Outcome {
    pub answers: usize,
    /// Server-sent events.
    pub events: usize,
    /// From request to the answer's end, in microseconds, in order.
    pub latencies_us: Vec<f64>,
    /// Longest time between two pieces of one answer.
    pub longest_gap: Duration,
    /// Most answers that had begun and not ended at one time.
    pub most_open: usize,
    /// What went wrong, of the first client that saw it.
    pub failure: Option<String>,
    pub failed: usize,
}

impl Outcome {
    /// The latency that so many of a hundred stay below.
    pub fn percentile_us(&self, percent: usize) -> f64 {
        let last = self.latencies_us.len().saturating_sub(1);
        self.latencies_us.get(last * percent / 100).copied().unwrap_or(f64::NAN)
    }

    /// An error if any client failed.
    pub fn all_well(self) -> Result<Self> {
        match &self.failure {
            Some(failure) => bail!("{} clients failed: {failure}", self.failed),
            None => Ok(self),
        }
    }
}

#[derive(Default)]
struct Open {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// Runs all clients to their ends.
pub async fn run(address: &str, requests: &Arc<Vec<Vec<u8>>>, plan: Plan) -> Outcome {
    let open = Arc::new(Open::default());
    let mut clients = JoinSet::new();
    for at in 0..plan.clients {
        let (address, requests, open) = (address.to_owned(), Arc::clone(requests), Arc::clone(&open));
        let begin = plan.spread.mul_f64(at as f64 / plan.clients as f64);
        clients.spawn(async move {
            tokio::time::sleep(begin).await;
            let mut seen = Outcome::default();
            if let Err(error) = client(&address, &requests, at, plan, &open, &mut seen).await {
                seen.failure = Some(format!("{error:#}"));
            }
            seen
        });
    }
    let mut all = Outcome::default();
    while let Some(seen) = clients.join_next().await {
        let seen = seen.expect("clients don't panic");
        all.answers += seen.answers;
        all.events += seen.events;
        all.latencies_us.extend(seen.latencies_us);
        all.longest_gap = all.longest_gap.max(seen.longest_gap);
        all.failed += usize::from(seen.failure.is_some());
        all.failure = all.failure.or(seen.failure);
    }
    all.latencies_us.sort_by(f64::total_cmp);
    all.most_open = open.most.load(Relaxed);
    all
}

async fn client(
    address: &str,
    requests: &[Vec<u8>],
    at: usize,
    plan: Plan,
    open: &Open,
    seen: &mut Outcome,
) -> Result<()> {
    let stream = tokio::time::timeout(PATIENCE, TcpStream::connect(address)).await?.context("connect")?;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::with_capacity(4096, stream);
    let began = Instant::now();
    let mut line = Vec::new();
    for turn in 0.. {
        match plan.until {
            Until::After(time) if began.elapsed() >= time => break,
            Until::Answers(answers) if turn == answers => break,
            _ => {}
        }
        let asked = Instant::now();
        stream.get_mut().write_all(&requests[(at + turn * plan.clients) % requests.len()]).await?;
        let mut answer = Answer { stream: &mut stream, line: &mut line, last: asked, newline: false, seen };
        answer.read(open).await?;
        seen.answers += 1;
        seen.latencies_us.push(asked.elapsed().as_secs_f64() * 1e6);
    }
    Ok(())
}

/// An answer being read.
struct Answer<'a> {
    stream: &'a mut BufReader<TcpStream>,
    line: &'a mut Vec<u8>,
    /// When the last piece came.
    last: Instant,
    /// Whether the last piece ended with one: two end an event.
    newline: bool,
    seen: &'a mut Outcome,
}

impl Answer<'_> {
    async fn read(&mut self, open: &Open) -> Result<()> {
        self.line().await?;
        let status = String::from_utf8_lossy(self.line).trim().to_owned();
        let (mut length, mut chunked) = (0, false);
        loop {
            self.line().await?;
            if self.line.as_slice() == b"\r\n" {
                break;
            }
            let head = String::from_utf8_lossy(self.line);
            let (name, value) = head.split_once(':').context("a header without a colon")?;
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse()?,
                "transfer-encoding" => chunked = value.trim() == "chunked",
                _ => {}
            }
        }
        if !chunked {
            let body = self.piece(length).await?;
            ensure!(status.contains(" 200"), "{status}: {}", String::from_utf8_lossy(&body));
            return Ok(());
        }
        let now = open.now.fetch_add(1, Relaxed) + 1;
        open.most.fetch_max(now, Relaxed);
        let end = self.chunks().await;
        open.now.fetch_sub(1, Relaxed);
        end?;
        ensure!(status.contains(" 200"), "{status}");
        Ok(())
    }

    async fn chunks(&mut self) -> Result<()> {
        loop {
            self.line().await?;
            let length = std::str::from_utf8(self.line)?.trim();
            let length = usize::from_str_radix(length, 16).with_context(|| format!("a chunk of {length:?}"))?;
            let data = self.piece(length).await?;
            self.line().await?;
            if length == 0 {
                return Ok(());
            }
            for byte in data {
                self.seen.events += usize::from(self.newline && byte == b'\n');
                self.newline = byte == b'\n' && !self.newline;
            }
        }
    }

    /// The next line, with its end.
    async fn line(&mut self) -> Result<()> {
        self.line.clear();
        let read = tokio::time::timeout(PATIENCE, self.stream.read_until(b'\n', self.line)).await;
        if read.context("no answer for a minute")?? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).context("the connection was closed");
        }
        let now = Instant::now();
        self.seen.longest_gap = self.seen.longest_gap.max(now - self.last);
        self.last = now;
        Ok(())
    }

    async fn piece(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut piece = vec![0; length];
        tokio::time::timeout(PATIENCE, self.stream.read_exact(&mut piece))
            .await
            .context("no answer for a minute")??;
        Ok(piece)
    }
}
