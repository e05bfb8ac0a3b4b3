//! The prefill role: gets a prompt's KV the cheapest way, into the decode worker's memory.

mod job;
mod push;
mod service;

pub(crate) use service::PrefillService;
