//! A stand-in for an engine of somebody else's, for end-to-end tests: see `kvasir_tests::stand_in`.
#![forbid(unsafe_code)]

use anyhow::Result;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    kvasir_tests::stand_in::serve::run(&arguments).await
}
