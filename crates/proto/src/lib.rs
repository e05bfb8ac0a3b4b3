//! The wire: gRPC code generated from `proto/kvasir/v1`, and the one place where wire bytes become domain values.
//!
//! Rule: a service converts a message with [`convert`] before it looks at any field that has a domain type. Conversion
//! checks versions before meaning and lengths before allocation, so what comes out needs no further doubt.
#![forbid(unsafe_code)]

pub mod convert;
mod sampling;
#[cfg(test)]
mod tests;

/// Generated messages, clients and servers of protocol version 1.
#[expect(
    missing_docs,
    unused_qualifications,
    clippy::allow_attributes,
    reason = "generated; the .proto files carry the documentation"
)]
pub mod v1 {
    tonic::include_proto!("kvasir.v1");
}

pub use convert::{Error, check_protocol};

/// Bound on one gRPC message in either direction. The largest is a prompt of a million tokens: at most 5 bytes each as
/// a varint, plus its block targets.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Metadata of an INVALID_ARGUMENT that names the field at fault, where the caller can say so to its own caller.
pub const FIELD_METADATA: &str = "kvasir-field";
/// Metadata with which an answer to `Generate` begins if signs of life are given as often as was asked for.
pub const HEARTBEAT_METADATA: &str = "kvasir-heartbeat";
/// Metadata of an UNAVAILABLE that says: this worker is on its way out, in good order; another one is to be asked, and there is
/// nothing to worry about.
pub const LEAVING_METADATA: &str = "kvasir-leaving";
/// The field that says what form an answer must have, in [`FIELD_METADATA`].
pub const GRAMMAR_FIELD: &str = "sampling.grammar";
/// The field that asks for a longer answer than the worker's memory holds.
pub const MAX_TOKENS_FIELD: &str = "sampling.max_tokens";
/// The field that is more than the worker's memory holds.
pub const PROMPT_FIELD: &str = "prompt";
