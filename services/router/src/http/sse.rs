//! Answers as they grow: server-sent events, one write for every token.
//!
//! ```text
//! data: {"object":"chat.completion.chunk", …}\n\n      one for every delta
//! data: [DONE]\n\n                                      the end; or, if the answer broke off:
//! data: {"error":{…}}\n\n                               OpenAI's error object, and nothing after it
//! ```
//!
//! The first event waits for the first token, so that what fails before has an HTTP status.

use std::convert::Infallible;

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::Stream;
use http::header;
use serde::Serialize;

use super::{
    live::{Delta, Live},
    wire::{Head, Usage},
};

/// How an endpoint writes the choices of an answer.
pub(crate) trait Shape: Send + 'static {
    /// `object` of a chunk.
    const CHUNK: &'static str;

    /// A choice's chunk before all others, if there is one.
    fn open(&mut self, choice: usize, chunks: &mut Chunks<'_>);
    /// The chunks that say what is new, perhaps that a choice ended.
    fn delta(&mut self, live: &Live, delta: &Delta, chunks: &mut Chunks<'_>);
}

/// Chunks on their way out.
pub(crate) struct Chunks<'a> {
    out: &'a mut BytesMut,
    head: &'a Head,
    object: &'static str,
    /// With usage asked for, every chunk has the field, null until the last one.
    include_usage: bool,
}

impl Chunks<'_> {
    /// One with this choice.
    pub(crate) fn add(&mut self, choice: &impl Serialize) {
        let no_usage = self.include_usage.then_some(None);
        event(self.out, &self.head.around(self.object, std::slice::from_ref(choice), no_usage));
    }

    /// One with the usage alone.
    fn usage(&mut self, usage: Usage) {
        event(self.out, &self.head.around::<()>(self.object, &[], Some(Some(usage))));
    }
}

/// Streams the answer.
pub(crate) fn respond<S: Shape>(live: Live, head: Head, shape: S, include_usage: bool) -> Response {
    let writer = Writer { live, head, shape, include_usage, opened: false };
    let stream = futures_util::stream::unfold(Some(writer), |writer| async {
        let mut writer = writer?;
        let (bytes, more) = writer.step().await?;
        Some((Ok::<_, Infallible>(bytes), more.then_some(writer)))
    });
    response(stream)
}

/// The answer that such a stream is.
pub(crate) fn response(stream: impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        // nginx would collect the events otherwise.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(stream)).into_response()
}

struct Writer<S> {
    live: Live,
    head: Head,
    shape: S,
    include_usage: bool,
    opened: bool,
}

impl<S: Shape> Writer<S> {
    /// What to write next, in one piece, and whether more may follow.
    async fn step(&mut self) -> Option<(Bytes, bool)> {
        let delta = match self.live.next().await {
            Ok(delta) => delta?,
            Err(error) => {
                let mut out = BytesMut::new();
                event(&mut out, &error.object());
                return Some((out.freeze(), false));
            }
        };
        let mut out = BytesMut::with_capacity(512);
        let Self { live, head, shape, include_usage, opened } = self;
        let mut chunks = Chunks { out: &mut out, head, object: S::CHUNK, include_usage: *include_usage };
        if !std::mem::replace(opened, true) {
            (0..live.choices()).for_each(|choice| shape.open(choice, &mut chunks));
        }
        shape.delta(live, &delta, &mut chunks);
        if let Some(cost) = delta.cost {
            if *include_usage {
                chunks.usage(Usage::from(cost));
            }
            out.extend_from_slice(b"data: [DONE]\n\n");
        }
        Some((out.freeze(), delta.cost.is_none()))
    }
}

fn event(out: &mut BytesMut, data: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(out.writer(), data).expect("our own types have no keys that are not text");
    out.extend_from_slice(b"\n\n");
}
