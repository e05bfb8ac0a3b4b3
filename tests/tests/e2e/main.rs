//! End-to-end tests: separate processes, a real etcd, real sockets. One binary, since linking costs more than running.
//!
//! They start the programs that lie beside this test: build those first (`cargo build --workspace --all-targets`).

#![forbid(unsafe_code)]

mod access;
mod api;
mod away;
mod bad_start;
mod book;
mod cache;
mod chart;
mod choices;
mod config;
mod console;
mod ctl;
mod duty;
mod engines;
mod faults;
mod front;
mod golden;
mod gpu;
mod guarded;
mod http_errors;
mod image;
mod load;
mod moves;
mod openai_client;
mod operate;
mod pairing;
mod priority;
mod prompts;
mod replay;
mod rolling;
mod routing;
mod scripts;
mod settings_page;
mod spill;
mod store;
mod store_nodes;
mod telemetry;
mod tls;
mod tools;
mod traces;
mod ways;
