//! Times prefill and decode of a model folder on the CPU backend.
//!
//! `cargo run --release -p kvasir-model --example speed -- MODEL_DIR [THREADS [PROMPT_TOKENS [exact|fast]]]`

use std::{
    error::Error,
    path::Path,
    time::{Duration, Instant},
};

use kvasir_model::{
    Backend, Folder, SeqInput,
    cpu::{Compute, CpuBackend, HostArena},
};
use kvasir_types::{BlockId, KvDtype, TokenId};

/// Sequences of the batched step.
const BATCH: usize = 16;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().ok_or("which model folder?")?;
    let threads = args.next().map_or(Ok(2), |text| text.parse())?;
    let prompt_len: usize = args.next().map_or(Ok(512), |text| text.parse())?;
    let compute = match args.next().as_deref() {
        None | Some("exact") => Compute::Exact,
        Some("fast") => Compute::Fast,
        Some(other) => return Err(format!("{other}: exact or fast").into()),
    };

    let start = Instant::now();
    let folder = Folder::open(Path::new(&dir))?;
    println!("open and fingerprint {:.1?}", start.elapsed());

    let layout = folder.kv_layout(16, KvDtype::Bf16);
    let blocks = layout.blocks_for(prompt_len + 64) as u32;
    let arena = HostArena::new((blocks as usize + BATCH) * layout.block_bytes())?;
    let mut backend = CpuBackend::with_compute(&folder, layout, arena, threads, compute)?;
    let prompt: Vec<_> = (0..prompt_len).map(|i| TokenId((i * 7919 % folder.config().vocab) as u32)).collect();

    let mut time = |batch: &[SeqInput<'_>], repeats: usize| -> Result<Duration, kvasir_model::Error> {
        let mut best = Duration::MAX; // whatever else runs can only make it slower
        for _ in 0..repeats {
            let now = Instant::now();
            backend.forward(batch, &mut |_| {})?;
            best = best.min(now.elapsed());
        }
        Ok(best)
    };
    let table = [(0..blocks).map(BlockId).collect()];
    let step = SeqInput { tokens: &prompt[..1], start: 0, tables: &table, rows: 1 };
    // Each sequence of the batch has a block of its own beyond the long one's.
    let tables: Vec<_> = (0..BATCH as u32).map(|i| [vec![BlockId(blocks + i)]]).collect();
    let batch: Vec<_> = tables.iter().map(|tables| SeqInput { start: 5, tables, ..step }).collect();
    let prefill = time(&[SeqInput { tokens: &prompt, ..step }], 3)?;
    println!("prefill of {prompt_len} tokens {prefill:.2?}, {:.0} tok/s", prompt_len as f64 / prefill.as_secs_f64());
    println!("decode step, empty context {:.2?}", time(&[step], 21)?);
    println!("decode step at {prompt_len} tokens {:.2?}", time(&[SeqInput { start: prompt_len, ..step }], 21)?);
    println!("decode step of {BATCH} short sequences {:.2?}", time(&batch, 11)?);
    Ok(())
}
