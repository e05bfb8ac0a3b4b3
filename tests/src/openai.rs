//! A small OpenAI client: requests as JSON values, answers as they came, server-sent events one by one.
//!
//! It hides nothing (statuses, headers, event order), since that is what the tests look at. The users' own client, PyPI's
//! `openai`, is driven in the `openai_client` test.

use std::{collections::VecDeque, time::Duration};

use anyhow::{Context, Result, bail};
use futures_util::StreamExt;
use reqwest::header::HeaderMap;
use serde_json::Value;

/// No test waits longer for an answer.
const LIMIT: Duration = Duration::from_secs(100);

/// A client of one router.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    key: Option<String>,
}

/// An answer that is not a stream.
#[derive(Debug)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// HTTP headers.
    pub headers: HeaderMap,
    /// The body; `Null` if it is no JSON.
    pub body: Value,
}

impl Reply {
    /// The body of a 200; anything else is an error that shows it.
    pub fn ok(self) -> Result<Value> {
        if self.status == 200 { Ok(self.body) } else { bail!("HTTP {}: {}", self.status, self.body) }
    }
}

impl Client {
    /// A client of the router at `host:port`.
    pub fn new(address: &str) -> Self {
        let http = reqwest::Client::builder().timeout(LIMIT).build().expect("a client without TLS can be built");
        Self { http, base: format!("http://{address}"), key: None }
    }

    /// The same with an API key.
    #[must_use]
    pub fn with_key(self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self }
    }

    /// The base URL, without `/v1`.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// GET.
    pub async fn get(&self, path: &str) -> Result<Reply> {
        reply(self.http.get(format!("{}{path}", self.base))).await
    }

    /// POST of a JSON body that asks where it goes and why: the answer, and what `x-kvasir-route` says.
    pub async fn explained(&self, path: &str, body: &Value) -> Result<(Value, Value)> {
        let answered = reply(self.request(path, body.to_string()).header("x-kvasir-explain", "1")).await?;
        let route = answered.headers.get("x-kvasir-route").context("the answer says where it went")?;
        let route = serde_json::from_slice(route.as_bytes())?;
        Ok((answered.ok()?, route))
    }

    /// POST of a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Reply> {
        self.post_raw(path, body.to_string()).await
    }

    /// POST of any text, said to be JSON.
    pub async fn post_raw(&self, path: &str, body: String) -> Result<Reply> {
        reply(self.request(path, body)).await
    }

    /// POST of a JSON body under a request id of the caller's.
    pub async fn post_as(&self, request_id: &str, path: &str, body: &Value) -> Result<Reply> {
        reply(self.request(path, body.to_string()).header("x-request-id", request_id)).await
    }

    /// A chat completion that must succeed.
    pub async fn chat(&self, body: &Value) -> Result<Value> {
        self.post("/v1/chat/completions", body).await?.ok()
    }

    /// A text completion that must succeed.
    pub async fn complete(&self, body: &Value) -> Result<Value> {
        self.post("/v1/completions", body).await?.ok()
    }

    /// POST of a body that asks for a stream. Dropping the answer hangs up.
    pub async fn stream(&self, path: &str, body: &Value) -> Result<Stream> {
        let response = self.request(path, body.to_string()).send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        if status != 200 {
            bail!("HTTP {status}: {}", response.text().await?);
        }
        let bytes = response.bytes_stream().map(|chunk| chunk.map(|bytes| bytes.to_vec())).boxed();
        Ok(Stream { headers, bytes, parser: EventParser::default(), ready: VecDeque::new() })
    }

    fn request(&self, path: &str, body: String) -> reqwest::RequestBuilder {
        let request = self.http.post(format!("{}{path}", self.base));
        let request = match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        request.header("content-type", "application/json").body(body)
    }
}

async fn reply(request: reqwest::RequestBuilder) -> Result<Reply> {
    let response = request.send().await?;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let body = serde_json::from_str(&response.text().await?).unwrap_or_default();
    Ok(Reply { status, headers, body })
}

/// An answer that arrives as server-sent events.
pub struct Stream {
    /// HTTP headers.
    pub headers: HeaderMap,
    bytes: futures_util::stream::BoxStream<'static, reqwest::Result<Vec<u8>>>,
    parser: EventParser,
    ready: VecDeque<String>,
}

impl Stream {
    /// The data of the next event; `None` at the end of the connection.
    pub async fn next(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            match self.bytes.next().await {
                None => return Ok(None),
                Some(chunk) => self.ready.extend(self.parser.feed(&chunk.context("the stream broke")?)),
            }
        }
    }

    /// The next event, which must be a JSON chunk.
    pub async fn chunk(&mut self) -> Result<Value> {
        let event = self.next().await?.context("the stream ended early")?;
        serde_json::from_str(&event).with_context(|| format!("not a JSON chunk: {event}"))
    }

    /// All chunks up to `[DONE]`, which must be the last event.
    pub async fn chunks(mut self) -> Result<Vec<Value>> {
        let mut chunks = Vec::new();
        loop {
            match self.next().await?.context("the stream ended without [DONE]")?.as_str() {
                "[DONE]" => break,
                event => chunks.push(serde_json::from_str(event).with_context(|| format!("no JSON: {event}"))?),
            }
        }
        match self.next().await? {
            None => Ok(chunks),
            Some(event) => bail!("an event after [DONE]: {event}"),
        }
    }
}

/// The text that the chunks of a chat (or text) completion add up to.
pub fn text_of(chunks: &[Value]) -> String {
    let piece = |chunk: &Value| {
        let choice = &chunk["choices"][0];
        choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str()).map(str::to_owned)
    };
    chunks.iter().filter_map(piece).collect()
}

/// Server-sent events out of arbitrarily cut bytes: the `data` of each event.
#[derive(Default)]
pub struct EventParser {
    line: Vec<u8>,
    data: Vec<String>,
}

impl EventParser {
    /// Takes bytes as they come; returns the data of the events that they complete.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut events = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            let line = String::from_utf8_lossy(&self.line).trim_end_matches('\r').to_owned();
            self.line.clear();
            if let Some(data) = line.strip_prefix("data:") {
                self.data.push(data.strip_prefix(' ').unwrap_or(data).to_owned());
            } else if line.is_empty() && !self.data.is_empty() {
                events.push(std::mem::take(&mut self.data).join("\n"));
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_do_not_depend_on_how_the_bytes_are_cut() {
        let text = "data: {\"a\": \"ä\"}\r\n\r\n: a comment\ndata:[DONE]\n\ndata: two\ndata: lines\n\n".as_bytes();
        let expected = ["{\"a\": \"ä\"}", "[DONE]", "two\nlines"];
        for size in 1..text.len() {
            let mut parser = EventParser::default();
            let events: Vec<_> = text.chunks(size).flat_map(|chunk| parser.feed(chunk)).collect();
            assert_eq!(events, expected, "cut every {size} bytes");
        }
    }

    #[test]
    fn an_unfinished_event_is_not_an_event() {
        assert!(EventParser::default().feed(b"data: half\n").is_empty());
    }
}
