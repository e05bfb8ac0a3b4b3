//! Prints what this machine can do at most: the figures benchmarks divide by.
//!
//! `cargo run --release -p kvasir-model --example limits -- [THREADS]`

use kvasir_model::cpu::limits;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = std::env::args().nth(1).map_or(Ok(2), |text| text.parse())?;
    println!("{threads} threads");
    println!("f32 multiply-adds  {:8.1} GFLOP/s", limits::peak_f32(threads) / 1e9);
    match limits::peak_bf16(threads) {
        Some(flops) => println!("bf16 dot products  {:8.1} GFLOP/s", flops / 1e9),
        None => println!("bf16 dot products  not on this processor"),
    }
    println!("memory reads       {:8.1} GB/s", limits::read_bandwidth(threads, 512 << 20) / 1e9);
    Ok(())
}
