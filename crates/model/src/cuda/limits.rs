//! What a device's memory and its way to the host can do at most, measured: what speeds are shares of.

use std::sync::Arc;

use super::driver::{Buffer, Context, Event, Pinned, Stream};
use crate::Error;

/// A device's name and its limits, in bytes a second.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// As the driver calls it.
    pub device: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Bytes free when this was asked.
    pub free: usize,
    /// Bytes read and written by copying within the device, both counted.
    pub copy: f64,
    /// From pinned host memory.
    pub to_device: f64,
    /// To pinned host memory.
    pub to_host: f64,
}

/// The best of so many rounds counts.
const ROUNDS: usize = 10;

/// Measures a device, for some tenths of a second.
///
/// # Errors
/// No such device, no room, or what its driver says.
pub fn limits(ordinal: usize) -> Result<Limits, Error> {
    let context = Context::open(ordinal)?;
    let (free, _) = context.memory()?;
    let most = if context.is_emulated() { 1 << 20 } else { 1 << 30 };
    let bytes = (free / 4).min(most);
    let (from, to) = (Buffer::new(&context, bytes)?, Buffer::new(&context, bytes)?);
    let host = Pinned::<u8>::new(&context, bytes.min(most / 4))?;
    let stream = Stream::new(&context)?;
    from.fill(1, &stream)?;
    to.fill(2, &stream)?;
    let here = host.len();
    // SAFETY: both buffers are `bytes` long and live until `best` has waited for the stream.
    let copy = best(&context, &stream, 2 * bytes, || unsafe { stream.copy(to.at, from.at, bytes) })?;
    // SAFETY: no more than the buffer and the host memory have; both live until `best` has waited.
    let to_device = best(&context, &stream, here, || unsafe { stream.upload(to.at, host.as_ptr(), here) })?;
    // SAFETY: as above.
    let to_host = best(&context, &stream, here, || unsafe { stream.download(host.as_ptr(), from.at, here) })?;
    Ok(Limits { device: context.name.clone(), capability: context.capability, free, copy, to_device, to_host })
}

/// The most bytes a second of several rounds.
fn best(
    context: &Arc<Context>,
    stream: &Stream,
    bytes: usize,
    work: impl Fn() -> Result<(), Error>,
) -> Result<f64, Error> {
    let (start, end) = (Event::timed(context)?, Event::timed(context)?);
    let mut best = 0.0f64;
    for _ in 0..ROUNDS {
        start.record(stream)?;
        work()?;
        end.record(stream)?;
        stream.wait()?;
        best = best.max(bytes as f64 / (end.since(&start)?.max(1e-6) / 1e3));
    }
    Ok(best)
}
