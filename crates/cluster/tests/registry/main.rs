//! Registries from outside: one contract for both forms, and what etcd's failures look like to a service.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "tests")]

mod contract;
mod etcd;
mod faults;
mod given;
mod guarded;
