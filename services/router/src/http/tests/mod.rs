//! The router as its clients see it: over HTTP, in front of scripted decode workers.
//!
//! The workers here are mocks: they speak the real protocol over real sockets and say what their script says. What a
//! real worker does is tested end to end elsewhere.

mod access;
mod answers;
mod bad_input;
mod faults;
mod harness;
mod live_keys;
mod moves;
mod responses;
mod tools;
