//! shm (in progress)
#![allow(dead_code)]
pub(crate) mod control;
pub(crate) mod mapping;
pub(crate) mod messages;
pub(crate) mod socket;
