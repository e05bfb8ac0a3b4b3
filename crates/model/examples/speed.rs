//! Times prefill and decode of a model folder on the CPU backend.
//!
//! `cargo run --release -p kvasir-model --example speed -- MODEL_DIR [THREADS [PROMPT_TOKENS]]`

use std::{
    error::Error,
    path::Path,
    time::{Duration, Instant},
};

use kvasir_model::{
    Backend, Folder, SeqInput,
    cpu::{CpuBackend, HostArena},
};
use kvasir_types::{BlockId, KvDtype, TokenId};

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().ok_or("which model folder?")?;
    let threads = args.next().map_or(Ok(2), |text| text.parse())?;
    let prompt_len: usize = args.next().map_or(Ok(512), |text| text.parse())?;

    let start = Instant::now();
    let folder = Folder::open(Path::new(&dir))?;
    println!("open and fingerprint {:.1?}", start.elapsed());

    let layout = folder.kv_layout(16, KvDtype::F16);
    let blocks = layout.blocks_for(prompt_len + 64) as u32;
    let arena = HostArena::new(blocks as usize * layout.block_bytes())?;
    let mut backend = CpuBackend::new(&folder, layout, arena, threads)?;
    let table: Vec<_> = (0..blocks).map(BlockId).collect();
    let prompt: Vec<_> = (0..prompt_len).map(|i| TokenId((i * 7919 % folder.config().vocab) as u32)).collect();

    let mut time = |tokens: &[TokenId], start: usize, repeats: usize| -> Result<Duration, kvasir_model::Error> {
        let mut times = Vec::new();
        for _ in 0..repeats {
            let now = Instant::now();
            backend
                .forward(&[SeqInput { tokens, start, tables: std::slice::from_ref(&table), rows: 1 }], &mut |_| {})?;
            times.push(now.elapsed());
        }
        Ok(median(times))
    };
    println!("prefill of {prompt_len} tokens {:.2?}", time(&prompt, 0, 9)?);
    println!("decode step at {prompt_len} tokens {:.2?}", time(&prompt[..1], prompt_len, 51)?);
    Ok(())
}
