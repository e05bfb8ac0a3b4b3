//! How Kvasir's processes call one another: the settings of gRPC connections, in one place for all who call and are called.
//!
//! Two processes share **one** HTTP/2 connection for all that goes on between them, so whatever ends it ends thousands of
//! answers at once. h2 has guards against hostile peers that do just that (`GOAWAY`, `ENHANCE_YOUR_CALM`), set for strangers
//! with a browser's habits. Our peers are our own processes, and they do in earnest what looks hostile:
//!
//! | guard of h2 | its default | what ours do | here |
//! | --- | --- | --- | --- |
//! | calls given up before they were accepted | 20 at a time | a thousand clients leave in one moment | [`GIVEN_UP`] |
//! | frames for calls given up and forgotten; 50 are remembered, for a second | 1024 in the connection's **life** | every answer given up had tokens under way | not counted; [`GIVEN_UP`] remembered |
//! | small frames that nobody has read yet | half the connection's window, at 256 bytes each | the tokens of a hundred clients that read slowly | [`ANSWERS`], [`QUESTIONS`] |
//!
//! What is left to bound memory is what bounds it anyway: each stream's own window, and how many calls a service admits.
#![forbid(unsafe_code)]

use std::time::Duration;

use tonic::transport::{Endpoint, Error, Server};

/// Calls of one connection that were given up and are kept in mind all the same, by the one who is called until it accepts
/// them and by the caller for [`REMEMBERED`]. More than can be read from a socket before those read are accepted (a mebibyte,
/// at some thirty bytes each); a kilobyte each at most.
pub const GIVEN_UP: usize = 1 << 16;
/// How long a caller remembers: longer than frames are under way.
const REMEMBERED: Duration = Duration::from_secs(1);
/// Bytes of all answers of a connection that the caller has not read: as many as HTTP/2 can count, as windows of streams bound
/// them. Four million tokens may wait.
pub const ANSWERS: u32 = (1 << 31) - 1;
/// Bytes of all questions of a connection that the called has not read: thirty thousand small ones may wait.
pub const QUESTIONS: u32 = 16 << 20;

/// A server of ours, without services yet.
pub fn server() -> Server {
    Server::builder()
        .http2_max_pending_accept_reset_streams(Some(GIVEN_UP))
        .http2_max_local_error_reset_streams(None)
        .initial_connection_window_size(QUESTIONS)
}

/// A server of ours to be called, at `host:port`. Nothing is connected yet.
///
/// # Errors
/// That is no address.
pub fn endpoint(address: &str) -> Result<Endpoint, Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .tcp_nodelay(true)
        .initial_connection_window_size(ANSWERS)
        .http2_max_concurrent_reset_streams(GIVEN_UP)
        .http2_reset_stream_duration(REMEMBERED)
        .http2_max_local_error_reset_streams(None))
}
