//! The transfer engine's decoders against any bytes: no panic, no allocation beyond a fixed bound.

#![no_main]

use std::{env, fs, path::Path};

use kvasir_transfer::fuzz::{Bounded, decode, seeds};
use libfuzzer_sys::fuzz_target;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

/// Puts valid conversations into the corpus, the first argument that is no option.
fn plant() {
    let Some(corpus) = env::args().skip(1).find(|argument| !argument.starts_with('-')) else { return };
    if Path::new(&corpus).is_dir() {
        for (index, seed) in seeds().iter().enumerate() {
            fs::write(Path::new(&corpus).join(format!("seed-{index}")), seed).expect("the corpus can be written");
        }
    }
}

fuzz_target!(init: plant(), |input: &[u8]| decode(input));
