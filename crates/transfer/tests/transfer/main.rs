//! The transfer engine from outside: one contract for every transport, and what faulty peers may do.

#![expect(unsafe_code, reason = "looks at memory behind the engine's back")]
#![expect(clippy::unwrap_used, reason = "an error here is a failed test")]

mod contract;
mod faults;
mod support;
mod tls;
mod ucx;
