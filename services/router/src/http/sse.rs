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
    frame: &'a Frame,
}

impl Chunks<'_> {
    /// One with this choice.
    pub(crate) fn add(&mut self, choice: &impl Serialize) {
        self.out.extend_from_slice(&self.frame.before);
        write(self.out.writer(), choice);
        self.out.extend_from_slice(self.frame.after);
    }
}

/// Streams the answer.
pub(crate) fn respond<S: Shape>(live: Live, head: Head, shape: S, include_usage: bool) -> Response {
    let frame = Frame::of(&head, S::CHUNK, include_usage);
    // In a box: it is large, and moves with every event.
    let writer = Box::new(Writer { live, head, frame, shape, include_usage, opened: false });
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

/// What stands around the choice of every chunk, written once for an answer.
struct Frame {
    before: Vec<u8>,
    after: &'static [u8],
}

impl Frame {
    fn of(head: &Head, object: &'static str, include_usage: bool) -> Self {
        let mut before = b"data: ".to_vec();
        write(&mut before, &head.around::<()>(object, &[], None));
        // Without usage, what follows the choices is the end of their list and of the object.
        before.truncate(before.len() - b"]}".len());
        // With usage asked for, every chunk has the field, null until the last one.
        Self { before, after: if include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" } }
    }
}

struct Writer<S> {
    live: Live,
    head: Head,
    frame: Frame,
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
        let Self { live, head, frame, shape, include_usage, opened } = self;
        let mut chunks = Chunks { out: &mut out, frame };
        if !std::mem::replace(opened, true) {
            (0..live.choices()).for_each(|choice| shape.open(choice, &mut chunks));
        }
        shape.delta(live, &delta, &mut chunks);
        if let Some(cost) = delta.cost {
            if *include_usage {
                event(&mut out, &head.around::<()>(S::CHUNK, &[], Some(Some(Usage::from(cost)))));
            }
            out.extend_from_slice(b"data: [DONE]\n\n");
        }
        Some((out.freeze(), delta.cost.is_none()))
    }
}

fn event(out: &mut BytesMut, data: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    write(out.writer(), data);
    out.extend_from_slice(b"\n\n");
}

fn write(out: impl std::io::Write, data: &impl Serialize) {
    serde_json::to_writer(out, data).expect("our own types have no keys that are not text");
}
