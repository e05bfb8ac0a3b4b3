//! What must hold of every run, and the program through its front door.

#![forbid(unsafe_code)]

mod cli;
mod laws;
