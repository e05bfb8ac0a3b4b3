//! Logs: lines for people or JSON for machines, on standard error; panics are log lines too. And spans, sent to a collector
//! if one is named ([`crate::spans`]).
//!
//! Request ids come from spans (`request_id` is a field of the span around a request), so that every line of a request
//! carries it without anybody passing it along.

use std::{backtrace::Backtrace, io::IsTerminal, panic};

use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, reload, util::SubscriberInitExt};

use crate::{LogConfig, LogFormat, Process, TraceConfig, entry::Service, process::Share, spans::Spans};

/// Starts logging for the whole process, and sending its spans as long as what is returned is kept.
///
/// # Errors
/// The collector's address is none.
pub(crate) fn start(
    service: &Service,
    log: &LogConfig,
    trace: &TraceConfig,
) -> anyhow::Result<(Option<Spans>, Process)> {
    let filter = EnvFilter::try_new(&log.filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let (filter, handle) = reload::Layer::new(filter);
    let share = Share::new(trace.sample);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match log.format {
        LogFormat::Human => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    panic::set_hook(Box::new(log_panic));
    let mut layers = vec![lines.with_filter(filter).boxed()];
    let spans = Spans::start(service, trace, &share)?.map(|(spans, layer)| {
        layers.push(layer);
        spans
    });
    // An error means that somebody started logging before (a test in this process): theirs stays.
    let _ = tracing_subscriber::registry().with(layers).try_init();
    Ok((spans, Process::new(handle, share)))
}

/// Whether a filter can be used; the error says what is wrong with it.
pub(crate) fn check_filter(filter: &str) -> Result<(), String> {
    EnvFilter::try_new(filter).map(drop).map_err(|error| error.to_string())
}

fn log_panic(info: &panic::PanicHookInfo<'_>) {
    let message = info.payload_as_str().unwrap_or("(no text)");
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
    // Empty unless RUST_BACKTRACE asks for it.
    let backtrace = Backtrace::capture();
    match backtrace.status() {
        std::backtrace::BacktraceStatus::Captured => tracing::error!(place, thread, %backtrace, "panicked: {message}"),
        _ => tracing::error!(place, thread, "panicked: {message}"),
    }
}
