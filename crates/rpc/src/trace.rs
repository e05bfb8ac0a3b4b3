//! Which trace a call belongs to, as W3C's Trace Context tells it: the header `traceparent`.
//!
//! Nothing is read or written unless spans are sent somewhere (`trace.otlp`), and nobody's answer depends on it: a header that
//! is none begins a new trace.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    global,
    propagation::{Extractor, Injector},
    trace::TraceContextExt as _,
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
    }
}
