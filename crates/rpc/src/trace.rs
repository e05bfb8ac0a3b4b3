//! Which trace a call belongs to, as W3C's Trace Context tells it: the header `traceparent`.
//!
//! Nothing is read or written unless spans are sent somewhere (`trace.otlp`), and nobody's answer depends on it: a header that
//! is none begins a new trace.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context, global,
    propagation::{Extractor, Injector},
    trace::{SpanContext, TraceContextExt as _},
};
use tonic::{Request, metadata::MetadataMap};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Tells the called which span calls: the current one.
pub fn carry<T>(mut request: Request<T>) -> Request<T> {
    let mut headers = HeaderMap::new();
    carry_http(&mut headers);
    if !headers.is_empty() {
        let metadata = std::mem::take(request.metadata_mut());
        let mut all = metadata.into_headers();
        all.extend(headers);
        *request.metadata_mut() = MetadataMap::from_headers(all);
    }
    request
}

/// The same, for a call by HTTP.
pub fn carry_http(headers: &mut HeaderMap) {
    let context = Span::current().context();
    if context.span().span_context().is_valid() {
        global::get_text_map_propagator(|propagator| propagator.inject_context(&context, &mut Headers(headers)));
    }
}

/// Makes a span, which nobody has entered yet, a child of the one that called.
pub fn adopt(span: &Span, metadata: &MetadataMap) {
    adopt_http(span, metadata.as_ref());
}

/// The same, of a call by HTTP.
pub fn adopt_http(span: &Span, headers: &HeaderMap) {
    let context = global::get_text_map_propagator(|propagator| propagator.extract(&Told(headers)));
    if context.span().span_context().is_valid() {
        let _ = span.set_parent(context); // without a collector there is nothing to be a child of
    }
}

/// The span of a call that is a part of somebody's trace, a child of the one that called. None of a call that isn't: such
/// calls are many, and one alone says nothing.
pub fn part_of(metadata: &MetadataMap, span: impl FnOnce() -> Span) -> Span {
    if !metadata.contains_key("traceparent") {
        return Span::none();
    }
    let span = span();
    adopt(&span, metadata);
    span
}

/// A place in a trace, for what is done later because of it: it keeps no span from ending.
#[derive(Clone, Debug)]
pub struct Here(SpanContext);

impl Here {
    /// The current span.
    pub fn current() -> Self {
        Self(Span::current().context().span().span_context().clone())
    }

    /// In no trace.
    pub fn nowhere() -> Self {
        Self(SpanContext::empty_context())
    }

    /// A span of what is done later; none if this is in no trace.
    pub fn later(&self, span: impl FnOnce() -> Span) -> Span {
        if !self.0.is_valid() {
            return Span::none();
        }
        let span = span();
        let _ = span.set_parent(Context::new().with_remote_span_context(self.0.clone())); // nobody has entered it
        span
    }
}

struct Headers<'a>(&'a mut HeaderMap);

impl Injector for Headers<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (key.parse::<HeaderName>(), HeaderValue::from_str(&value)) {
            self.0.insert(name, value);
        }
    }
}

struct Told<'a>(&'a HeaderMap);

impl Extractor for Told<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_collector_nothing_is_told_and_nothing_believed() {
        let mut headers = HeaderMap::new();
        carry_http(&mut headers);
        assert!(headers.is_empty());
        let request = carry(Request::new(()));
        assert!(request.metadata().is_empty());
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        for text in [parent, "", "00-00-00-00", "\u{e9}"] {
            headers.insert("traceparent", HeaderValue::from_bytes(text.as_bytes()).unwrap());
            adopt_http(&Span::none(), &headers);
        }
        for here in [Here::current(), Here::nowhere()] {
            assert!(here.later(|| unreachable!("in no trace")).is_none());
        }
        assert!(part_of(&MetadataMap::new(), || unreachable!("in no trace")).is_none());
    }
}
