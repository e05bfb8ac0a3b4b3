//! Workers as their callers see them: real processes' worth of worker (engine, arena, gRPC server) in this process, the
//! demo model, real sockets.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod failing_prefill;
mod harness;
mod memory;
mod pair;
mod watch;
