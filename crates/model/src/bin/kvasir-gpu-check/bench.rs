//! How fast, as shares of what the device can do: time a step takes as a caller sees it, launches and copies included.
//!
//! Weights are random in a published model's dimensions; caches hold whatever lies in them, which costs the same. Arithmetic
//! is `fast` (one bf16 term of each activation, as other programs compute), and `exact` is told beside it.

use std::time::Instant;

use kvasir_model::{
    Error, Folder, SeqInput,
    cpu::Compute,
    cuda::{Limits, Options},
    shapes::Shape,
};
use kvasir_types::{BlockId, KvDtype, TokenId};
use serde_json::json;

use crate::{Cli, Row, rig::Rig};

/// Shapes of the bench: sequences that write at once, after how many tokens each.
const DECODES: [(usize, usize, f64); 2] = [(1, 1024, 0.75), (64, 2048, 0.65)];
const PROMPT: usize = 8192;

pub fn run(cli: &Cli, limits: &Limits) -> Result<Vec<Row>, Error> {
    let name = if cli.quick { "qwen3-tiny" } else { &cli.shape };
    let Some(shape) = Shape::named(name) else {
        let row = Row {
            what: "bench".to_owned(),
            found: format!("no shape {name}"),
            goal: "a known one".to_owned(),
            met: Some(false),
            json: json!(null),
        };
        return Ok(vec![row]);
    };
    let dir = cli.work.join(format!("kvasir-{name}"));
    eprintln!("weights of {name} in {} …", dir.display());
    shape.write(&dir, 1, &mut |_, _| {})?;
    let folder = Folder::open(&dir)?;
    let mut rows = Vec::new();
    for compute in [Compute::Fast, Compute::Exact] {
        rows.extend(of(cli, limits, &folder, compute)?);
    }
    Ok(rows)
}

fn of(cli: &Cli, limits: &Limits, folder: &Folder, compute: Compute) -> Result<Vec<Row>, Error> {
    let fast = compute == Compute::Fast;
    let label = if fast { "fast" } else { "exact" };
    // Only `fast` is what others do, so goals are its.
    let goal = |share: f64, of: &str| {
        if fast && !cli.quick { (format!("≥ {share} of {of}"), true) } else { (format!("({of})"), false) }
    };
    let cut = |tokens: usize| if cli.quick { tokens / 32 } else { tokens };
    let prompt = cut(PROMPT);
    let most = DECODES
        .map(|(batch, context, _)| batch * (cut(context) + 16).div_ceil(16))
        .into_iter()
        .fold(prompt.div_ceil(16), usize::max);
    let groups = folder.config().kv_groups().len();
    let options = Options { ordinal: cli.ordinal, compute, max_tokens: prompt.min(2048), graphs: true };
    let mut rig = Rig::device(folder, KvDtype::F16, (most * groups) as u32, options)?;
    let cost = folder.cost();
    let kv_bytes = rig.layout.block_bytes() / rig.layout.block_size as usize * groups;
    let mut rows = Vec::new();
    // Beside PyTorch, if it was measured: what others would run.
    let beside = |rows: &mut Vec<Row>, what: &str, seconds: f64| {
        let theirs = cli.baseline.iter().flat_map(|baseline| &baseline.rows).find(|row| fast && row.what == what);
        let Some(theirs) = theirs else { return };
        let ratio = theirs.seconds / seconds;
        rows.push(Row {
            what: format!("{what}, beside PyTorch"),
            found: format!("{ratio:.2} × ({:.3} ms)", theirs.seconds * 1e3),
            goal: "≥ 1.5 ×".to_owned(),
            met: (!cli.quick).then_some(ratio >= 1.5),
            json: json!({ "seconds": theirs.seconds, "ratio": ratio }),
        });
    };

    for (batch, context, share) in DECODES {
        let (batch, context) = (if cli.quick { batch.min(4) } else { batch }, cut(context));
        rig.forget();
        let tables: Vec<_> = (0..batch).map(|_| rig.tables(context + 1)).collect();
        let tables: Vec<_> = tables.iter().map(|tables| rig.with_gone(tables, context)).collect();
        let tokens = [TokenId(7)];
        let inputs: Vec<_> =
            tables.iter().map(|tables| SeqInput { tokens: &tokens, start: context, tables, rows: 1 }).collect();
        let seconds = median(cli, &mut || rig.backend.forward(&inputs, &mut |_| {}).map(drop))?;
        let bytes = cost.step_weight_bytes as f64 + (batch * context * kv_bytes) as f64;
        let of_floor = bytes / limits.copy / seconds;
        let (goal, counts) = goal(share, "the bytes' floor");
        rows.push(Row {
            what: format!("{label}: decode, batch {batch}, {context} tokens"),
            found: format!("{:.3} ms, {:.0} tok/s, {of_floor:.3} of the floor", seconds * 1e3, batch as f64 / seconds),
            goal,
            met: counts.then_some(of_floor >= share),
            json: json!({ "seconds": seconds, "bytes": bytes, "of_floor": of_floor, "tokens_per_second": batch as f64 / seconds }),
        });
        beside(&mut rows, &format!("decode, batch {batch}, {context} tokens"), seconds);
    }

    rig.forget();
    let tables = rig.tables(prompt);
    let tables = rig.with_gone(&tables, 0);
    let tokens: Vec<TokenId> = (0..prompt).map(|i| TokenId((i * 37 % folder.config().vocab) as u32)).collect();
    let inputs = [SeqInput { tokens: &tokens, start: 0, tables: &tables, rows: 1 }];
    let seconds = median(cli, &mut || rig.backend.forward(&inputs, &mut |_| {}).map(drop))?;
    let rate = cost.flops(0, prompt) / seconds;
    let of_matrix = cli.matrix.map(|matrix| rate / (matrix * 1e12));
    let (goal, counts) = goal(0.55, "the measured bf16 matrix rate");
    rows.push(Row {
        what: format!("{label}: prefill of {prompt} tokens"),
        found: format!("{:.1} ms, {:.0} TFLOP/s{}", seconds * 1e3, rate / 1e12, of_matrix.map_or(String::new(), |share| format!(", {share:.3} of matrices"))),
        goal,
        met: of_matrix.filter(|_| counts).map(|share| share >= 0.55),
        json: json!({ "seconds": seconds, "flops_per_second": rate, "of_matrix": of_matrix, "tokens_per_second": prompt as f64 / seconds }),
    });
    beside(&mut rows, &format!("prefill of {prompt} tokens"), seconds);
    if fast {
        rows.push(landing(cli, limits, &mut rig, prompt)?);
    }
    Ok(rows)
}

/// Blocks that a peer wrote into the host's arena, to the device: the time of a step that waits for them beside one that has
/// none to wait for.
fn landing(cli: &Cli, limits: &Limits, rig: &mut Rig, tokens: usize) -> Result<Row, Error> {
    rig.forget();
    let tables = rig.tables(tokens);
    let blocks: Vec<BlockId> = tables.concat();
    let tokens = [TokenId(7)];
    let inputs = [SeqInput { tokens: &tokens, start: 0, tables: &tables, rows: 1 }];
    let inputs = &inputs;
    let without = median(cli, &mut || rig.backend.forward(inputs, &mut |_| {}).map(drop))?;
    let with = median(cli, &mut || {
        rig.backend.landed(&blocks)?;
        rig.backend.forward(inputs, &mut |_| {}).map(drop)
    })?;
    let rate = (blocks.len() * rig.layout.block_bytes()) as f64 / (with - without).max(1e-9);
    let share = rate / limits.to_device;
    Ok(Row {
        what: format!("blocks landed, {}", blocks.len()),
        found: format!("{:.1} GB/s, {share:.3} of the way to the device", rate / 1e9),
        goal: if cli.quick { "(what copies do)".to_owned() } else { "≥ 0.8 of what copies do".to_owned() },
        met: (!cli.quick).then_some(share >= 0.8),
        json: json!({ "bytes_per_second": rate, "share": share }),
    })
}

/// The median time of some rounds, after some that do not count.
fn median(cli: &Cli, work: &mut dyn FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    let (before, rounds) = if cli.quick { (0, 1) } else { (3, 15) };
    for _ in 0..before {
        work()?;
    }
    let mut times = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        work()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
