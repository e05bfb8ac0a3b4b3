//! Exemplars: of which trace a value in a histogram is, so that a slow bucket leads to a request that was slow.
//!
//! ```text
//! kvasir_router_ttft_seconds_bucket{le="0.05"} 7 # {trace_id="0af7651916cd43dd8448eb211c80319c"} 0.031 1795371000.1
//! ```
//!
//! Each bucket keeps the last one, so they take as much memory as there are buckets. Only traces that somebody records are
//! named: others lead nowhere. Who asks for OpenMetrics gets them ([`wanted`]); everybody else the page without.

use std::{
    fmt::{self, Write as _},
    time::SystemTime,
};

use opentelemetry::trace::TraceContextExt as _;
use prometheus_client::{
    encoding::{EncodeLabelValue, LabelValueEncoder},
    metrics::exemplar::HistogramWithExemplars,
};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// What stands before every exemplar of ours. Nothing else on a page can look like it: quotes in label values are escaped.
const BEGIN: &str = " # {trace_id=\"";

/// The name of a trace that is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceId(u128);

impl TraceId {
    /// Of the current span, if it is recorded. To be asked once whose child the span is has been said: it is settled by this.
    pub fn current() -> Option<Self> {
        let context = tracing::Span::current().context();
        let span = context.span();
        let span = span.span_context();
        (span.is_valid() && span.is_sampled()).then(|| Self(u128::from_be_bytes(span.trace_id().to_bytes())))
    }
}

impl EncodeLabelValue for TraceId {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        write!(encoder, "{:032x}", self.0)
    }
}

/// A distribution whose buckets name a trace each. Clones are the same.
#[derive(Clone, Debug)]
pub struct TracedHistogram(pub(super) HistogramWithExemplars<[(&'static str, TraceId); 1]>);

impl TracedHistogram {
    /// Counts a value, of that trace if it is anybody's.
    pub fn observe(&self, value: f64, of: Option<TraceId>) {
        self.0.observe(value, of.map(|id| [("trace_id", id)]), of.map(|_| SystemTime::now()));
    }
}

/// Whether somebody with this `Accept` header takes exemplars: it names OpenMetrics.
pub fn wanted(accept: &str) -> bool {
    accept.split(',').any(|range| {
        let mut parts = range.split(';').map(str::trim);
        let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case("application/openmetrics-text"));
        let refused = |part: &str| part.strip_prefix("q=").is_some_and(|q| q.parse::<f64>().is_ok_and(|q| q <= 0.0));
        named && !parts.any(refused)
    })
}

/// The page without exemplars.
pub(super) fn without(page: &str) -> String {
    let mut plain = String::with_capacity(page.len());
    for line in page.split_inclusive('\n') {
        match line.find(BEGIN) {
            Some(end) if !line.starts_with('#') => plain.extend([&line[..end], "\n"]),
            _ => plain.push_str(line),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Metrics;

    #[test]
    fn a_bucket_names_the_last_trace_that_was_recorded_and_others_none() {
        let metrics = Metrics::new();
        let waited = metrics.traced_histogram("waited_seconds", "Waiting", &[0.1, 1.0]);
        waited.observe(0.05, Some(TraceId(1)));
        waited.observe(0.06, Some(TraceId(0xfeed)));
        waited.observe(0.07, None);
        waited.observe(5.0, None);
        let page = metrics.encode_with_exemplars();
        let line = |begin: &str| page.lines().find(|line| line.starts_with(begin)).unwrap().to_owned();
        let low = line("waited_seconds_bucket{le=\"0.1\"}");
        let told = "waited_seconds_bucket{le=\"0.1\"} 3 # {trace_id=\"0000000000000000000000000000feed\"} 0.06 ";
        assert!(low.starts_with(told), "{page}");
        assert!(low[told.len()..].parse::<f64>().unwrap() > 1e9, "when it was: {low}");
        assert_eq!(line("waited_seconds_bucket{le=\"+Inf\"}"), "waited_seconds_bucket{le=\"+Inf\"} 4");
        assert_eq!(page.matches(BEGIN).count(), 1, "{page}");
        assert!(page.ends_with("# EOF\n"), "{page}");

        let plain = metrics.encode();
        assert!(!plain.contains("trace_id") && plain.ends_with("# EOF\n"), "{plain}");
        assert!(plain.contains("\nwaited_seconds_bucket{le=\"0.1\"} 3\n"), "{plain}");
        assert_eq!(plain.lines().count(), page.lines().count());
    }

    #[test]
    fn nothing_but_exemplars_is_left_out() {
        let metrics = Metrics::new();
        let odd = metrics.gauges::<Vec<(&str, String)>>("odd", "Odd # {trace_id=\"");
        odd.get_or_create(&vec![("model", " # {trace_id=\"0\"} 1".to_owned())]).set(7);
        assert_eq!(metrics.encode(), metrics.encode_with_exemplars());
    }

    #[test]
    fn who_names_openmetrics_wants_them() {
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        for accept in [prometheus, "Application/OpenMetrics-Text", " text/plain , application/openmetrics-text ; q=0.1"]
        {
            assert!(wanted(accept), "{accept}");
        }
        let refused = "application/openmetrics-text; q=0.0, text/plain";
        for accept in ["", "*/*", "text/plain", "application/openmetrics-textual", refused, ";q=1,,;"] {
            assert!(!wanted(accept), "{accept}");
        }
    }

    #[test]
    fn without_a_collector_nobody_has_a_trace() {
        let _span = tracing::info_span!("request").entered();
        assert_eq!(TraceId::current(), None);
    }
}
