//! One question to one member, with a time limit.
//!
//! Whatever comes back is from outside: texts are cut and freed of control characters before a terminal sees them.

use std::{error::Error, fmt, future::Future, time::Duration};

use kvasir_proto::v1::{
    StatusRequest, StoreStatusRequest, TransferPeer, store_client::StoreClient, worker_client::WorkerClient,
};
use kvasir_rpc::Rpc;
use kvasir_types::PeerTraffic;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::transport::Channel;

use crate::report::{Blocks, Live, StoreNumbers, WorkerNumbers};

/// Most characters of a text from outside …
const MOST: usize = 120;
/// … and of what a member says to a call: it may say what to do.
const MOST_TOLD: usize = 400;

/// Most bytes read of a readiness page.
const MAX_PAGE_BYTES: u64 = 16 << 10;
/// Most bytes read of another answer.
const MAX_ANSWER_BYTES: u64 = 1 << 20;
/// Most bytes read of a metrics page.
const MAX_METRICS_BYTES: u64 = 8 << 20;

/// Most peers shown of a worker: as many as one remembers.
const MAX_PEERS: usize = 1024;

/// What a member said over gRPC.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) live: Live,
    pub(crate) draining: bool,
}

/// What a member's `/ready` said.
#[derive(Debug, PartialEq)]
pub(crate) enum Readiness {
    Ready,
    NotReady(String),
    /// Nothing that makes sense, and why.
    Unknown(String),
}

/// How members are asked, and how long they may take.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) rpc: Rpc,
    pub(crate) limit: Duration,
    /// Goes with calls that change something, and with no others: who is only asked need not know it.
    pub(crate) token: Option<Token>,
}

/// What an operator proves itself with.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Token(pub(crate) String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

impl Way {
    /// A gRPC call that changes something: with the token, if there is one.
    pub(crate) fn signed<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Some(Token(token)) = &self.token
            && let Ok(value) = format!("Bearer {token}").parse()
        {
            request.metadata_mut().insert("authorization", value);
        }
        request
    }
}

/// `Worker.Status`.
pub(crate) async fn worker(address: &str, way: &Way) -> Result<Answer, String> {
    within(way.limit, async {
        let status =
            WorkerClient::new(connect(&way.rpc, address).await?).status(StatusRequest {}).await.map_err(told)?;
        let status = status.into_inner();
        let blocks = status.blocks.unwrap_or_default();
        let blocks = Blocks { total: blocks.total, free: blocks.free, cached: blocks.cached, in_use: blocks.in_use };
        let live = Live::Worker(WorkerNumbers {
            blocks,
            running: status.running.into(),
            waiting: status.waiting.into(),
            requests_total: status.requests_total,
            uptime_ms: status.uptime_ms,
            peers: status.peers.into_iter().take(MAX_PEERS).map(peer).collect(),
        });
        Ok(Answer { live, draining: status.draining })
    })
    .await
}

/// `Store.StoreStatus`.
pub(crate) async fn store(address: &str, way: &Way) -> Result<Answer, String> {
    within(way.limit, async {
        let status = StoreClient::new(connect(&way.rpc, address).await?)
            .store_status(StoreStatusRequest {})
            .await
            .map_err(told)?;
        let status = status.into_inner();
        let live = Live::Store(StoreNumbers {
            capacity_bytes: status.capacity_bytes,
            used_bytes: status.used_bytes,
            blocks: status.blocks,
            pinned: status.pinned,
            reserved: status.reserved,
            lookups_total: status.lookups_total,
            hit_blocks_total: status.hit_blocks_total,
            committed_blocks_total: status.committed_blocks_total,
            evicted_blocks_total: status.evicted_blocks_total,
            uptime_ms: status.uptime_ms,
        });
        Ok(Answer { live, draining: false })
    })
    .await
}

/// One call to a worker.
pub(crate) async fn ask_worker<T>(
    address: &str,
    way: &Way,
    call: impl AsyncFnOnce(WorkerClient<Channel>) -> Result<tonic::Response<T>, tonic::Status>,
) -> Result<T, String> {
    within(way.limit, async {
        let client = WorkerClient::new(connect(&way.rpc, address).await?);
        Ok(call(client).await.map_err(told)?.into_inner())
    })
    .await
}

/// One call to a store node.
pub(crate) async fn ask_store<T>(
    address: &str,
    way: &Way,
    call: impl AsyncFnOnce(StoreClient<Channel>) -> Result<tonic::Response<T>, tonic::Status>,
) -> Result<T, String> {
    within(way.limit, async {
        let client = StoreClient::new(connect(&way.rpc, address).await?);
        Ok(call(client).await.map_err(told)?.into_inner())
    })
    .await
}

/// A question to the admin page that is answered in JSON: `GET`, or `POST` if there is a body, which takes the token along.
/// What the page refuses, it says why.
pub(crate) async fn admin(
    address: &str,
    path: &str,
    body: Option<&serde_json::Value>,
    way: &Way,
) -> Result<serde_json::Value, String> {
    let (method, body) = body.map_or(("GET", String::new()), |body| ("POST", body.to_string()));
    let signed = match &way.token {
        Some(Token(token)) if method == "POST" => format!("authorization: Bearer {token}\r\n"),
        _ => String::new(),
    };
    let request = format!(
        "{method} {path} HTTP/1.0\r\nhost: {address}\r\n{signed}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let page = within(way.limit, page(address, request, MAX_ANSWER_BYTES)).await?;
    let status = page.split(' ').nth(1).unwrap_or_default();
    let body = page.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let answer: serde_json::Value =
        serde_json::from_str(body).map_err(|_| format!("status {}, not an answer in JSON", printable(status)))?;
    match (status, answer["error"].as_str()) {
        ("200", _) => Ok(answer),
        (_, Some(why)) => Err(why.chars().filter(|c| !c.is_control()).take(400).collect()),
        (status, None) => Err(format!("status {}", printable(status))),
    }
}

/// Twenty lines of HTTP/1.0 rather than a client library for one request.
async fn page(address: &str, request: String, most_bytes: u64) -> Result<String, String> {
    let told = |error: std::io::Error| printable(&error.to_string());
    let mut stream = TcpStream::connect(address).await.map_err(told)?;
    stream.write_all(request.as_bytes()).await.map_err(told)?;
    let mut page = Vec::new();
    stream.take(most_bytes).read_to_end(&mut page).await.map_err(told)?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

/// A page with its head, of an admin port or of etcd.
pub(crate) async fn text(address: &str, path: &str, limit: Duration) -> Result<String, String> {
    let request = format!("GET {path} HTTP/1.0\r\nhost: {address}\r\n\r\n");
    within(limit, page(address, request, MAX_METRICS_BYTES)).await
}

/// `GET /ready` of the admin page.
pub(crate) async fn ready(address: &str, limit: Duration) -> Readiness {
    let request = format!("GET /ready HTTP/1.0\r\nhost: {address}\r\n\r\n");
    let page = within(limit, page(address, request, MAX_PAGE_BYTES)).await;
    page.map_or_else(Readiness::Unknown, |page| readiness(&page))
}

/// `GET /health` of an engine of somebody else's: what it says is in the status.
pub(crate) async fn health(address: &str, limit: Duration) -> Readiness {
    let request = format!("GET /health HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    match within(limit, page(address, request, MAX_PAGE_BYTES)).await {
        Err(why) => Readiness::Unknown(why),
        Ok(page) => match page.split(' ').nth(1).unwrap_or_default() {
            "200" => Readiness::Ready,
            status if page.starts_with("HTTP/1.") => Readiness::NotReady(format!("/health says {}", printable(status))),
            _ => Readiness::Unknown("not a health page".to_owned()),
        },
    }
}

fn readiness(page: &str) -> Readiness {
    let status = page.split(' ').nth(1).unwrap_or_default();
    let body = page.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let reason = || serde_json::from_str::<serde_json::Value>(body).ok()?["reason"].as_str().map(printable);
    match status {
        "200" => Readiness::Ready,
        "503" => Readiness::NotReady(reason().unwrap_or_default()),
        _ => Readiness::Unknown("not a readiness page".to_owned()),
    }
}

pub(crate) async fn connect(rpc: &Rpc, address: &str) -> Result<Channel, String> {
    let endpoint = kvasir_rpc::endpoint(address).map_err(|_| "not an address".to_owned())?;
    rpc.connect(&endpoint).await.map_err(|error| printable(&cause(&error)))
}

/// tonic says "transport error"; what happened is at the end of the chain.
fn cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

async fn within<T>(limit: Duration, question: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let silence = || format!("no answer within {} ms", limit.as_millis());
    timeout(limit, question).await.unwrap_or_else(|_| Err(silence()))
}

fn peer(wire: TransferPeer) -> PeerTraffic {
    let peer = PeerTraffic::from(wire);
    PeerTraffic { name: printable(&peer.name), reason: printable(&peer.reason), ..peer }
}

pub(crate) fn told(status: tonic::Status) -> String {
    match status.source() {
        // Not the member's words: its connection broke.
        Some(broken) => printable(&cause(broken)),
        None => cut(&format!("{}: {}", status.code().description(), status.message()), MOST_TOLD),
    }
}

/// Text from outside, cut and freed of what a terminal would obey.
pub(crate) fn printable(text: &str) -> String {
    cut(text, MOST)
}

fn cut(text: &str, most: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(most).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_readiness_page_is_understood_as_one() {
        for (page, expected) in [
            ("HTTP/1.0 200 OK\r\n\r\n{}", Readiness::Ready),
            (
                "HTTP/1.1 503 X\r\na: b\r\n\r\n{\"reason\":\"star\\u001b[31mting\"}",
                Readiness::NotReady("star[31mting".into()),
            ),
            ("HTTP/1.1 503 X\r\n\r\n", Readiness::NotReady(String::new())),
            ("HTTP/1.1 404 X\r\n\r\n", Readiness::Unknown("not a readiness page".into())),
            ("", Readiness::Unknown("not a readiness page".into())),
        ] {
            assert_eq!(readiness(page), expected, "{page:?}");
        }
    }
}
