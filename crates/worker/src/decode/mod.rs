//! The decode role: owns a request from admission to its last token.

mod answer;
mod remote;
mod request;
mod service;
mod written;

pub(crate) use service::DecodeService;
