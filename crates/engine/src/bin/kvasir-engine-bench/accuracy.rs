//! `accuracy`: what rounding weights, keys and values costs, against the same model with f32 keys and values.
//!
//! The reference and every candidate read the same tokens; after each of them both say how likely every next token is, and
//! these distributions are compared. The tokens are a file's, or were drawn from the reference itself: of a model of random
//! weights, only its own writing is likely to it.

mod compare;
mod text;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use kvasir_model::{
    Backend, Folder, SeqInput,
    cpu::{Compute, CpuBackend, HostArena},
};
use kvasir_types::{BlockId, KvDtype, TokenId};
use serde::Serialize;
use serde_json::json;

use self::{compare::Difference, text::Sequence};
use crate::{cli, limits, source};

/// Tokens computed at a time: their logits are what takes memory, 0.6 MiB a token with a vocabulary of 150,000.
const CHUNK: usize = 64;

#[derive(Serialize)]
struct Found<'a> {
    scenario: &'static str,
    reference: &'a str,
    model: &'a str,
    kv: KvDtype,
    compute: Compute,
    weight_bytes: u64,
    sequences: usize,
    /// Distributions compared: one for each token of an answer.
    positions: usize,
    #[serde(flatten)]
    difference: compare::Summary,
}

/// `accuracy`.
pub fn run(options: &cli::Accuracy) -> Result<()> {
    let (reference_name, folder) = source::open(&options.source, options.seed, None)?;
    let sequences = match text::find(options) {
        Some(file) => text::read(&file, folder.config().vocab, options.count as usize)?,
        None => text::draw(&folder, options)?,
    };
    let longest = sequences.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or_default();
    ensure!(longest > 1, "no sequence has two tokens: there is nothing to foretell");
    let mut reference = Model::load(&folder, (KvDtype::F32, Compute::Exact), longest, 1, options)?;

    let mut names = vec![reference_name.clone()];
    let mut folders = vec![folder];
    for dir in &options.against {
        names.push(dir.display().to_string());
        folders.push(open_like(&folders[0], dir)?);
    }
    for &rounding in &options.weights {
        let (name, folder) = source::open(&options.source, options.seed, Some(rounding))?;
        names.push(name);
        folders.push(folder);
    }
    let mut candidates = Vec::new();
    for (name, folder) in names.iter().zip(&folders) {
        for (kv, compute) in options.kv.iter().flat_map(|kv| options.compute.iter().map(move |compute| (kv, compute))) {
            let arithmetic = (kv.dtype(), compute.compute());
            let model = Model::load(folder, arithmetic, longest, 1, options)?;
            candidates.push((name, folder.cost().weight_bytes, arithmetic, model, Difference::default()));
        }
    }
    for (done, Sequence { tokens, from }) in sequences.iter().enumerate() {
        eprintln!("sequence {} of {}: {} tokens", done + 1, sequences.len(), tokens.len());
        for start in (0..tokens.len() - 1).step_by(CHUNK) {
            let chunk = start..(start + CHUNK).min(tokens.len() - 1);
            let next = &tokens[chunk.start + 1..=chunk.end];
            let skip = (from - 1).saturating_sub(start).min(next.len());
            let right = reference.logits(&tokens[chunk.clone()], start)?;
            for (_, _, _, model, difference) in &mut candidates {
                difference.add(&right, &model.logits(&tokens[chunk.clone()], start)?, next, skip);
            }
        }
    }
    let mut head_shown = false;
    for (name, weight_bytes, (kv, compute), _, difference) in &candidates {
        let difference = difference.summary();
        let positions = difference.positions;
        let sequences = sequences.len();
        let reference = reference_name.as_str();
        let weight_bytes = *weight_bytes;
        let found = Found {
            scenario: "accuracy",
            reference,
            model: name,
            kv: *kv,
            compute: *compute,
            weight_bytes,
            sequences,
            positions,
            difference,
        };
        if options.json {
            println!("{}", serde_json::to_string(&found)?);
        } else {
            show(&found, &mut head_shown);
        }
    }
    Ok(())
}

/// The same model with its weights in another type: whatever the folder says, tokens must mean the same.
fn open_like(reference: &Folder, dir: &Path) -> Result<Folder> {
    let folder = Folder::open(dir)?;
    let (ours, theirs) = (reference.config(), folder.config());
    let same = (ours.family, ours.vocab, ours.hidden, ours.layers.len())
        == (theirs.family, theirs.vocab, theirs.hidden, theirs.layers.len());
    ensure!(same, "{} is another model than the reference", dir.display());
    Ok(folder)
}

fn show(found: &Found<'_>, head_shown: &mut bool) {
    let d = &found.difference;
    if !std::mem::replace(head_shown, true) {
        println!(
            "against {} with keys and values in f32: {} sequences, {} positions, perplexity {:.3}\n",
            found.reference, found.sequences, found.positions, d.reference_perplexity
        );
        println!(
            "{:>8}  {:>8}  {:>9}  {:>9}  {:>12}  {:>8}  {:>10}  model",
            "kv", "products", "mean KL", "max KL", "max |Δlog p|", "top-1", "perplexity"
        );
    }
    println!(
        "{:>8}  {:>8}  {:>9.2e}  {:>9.2e}  {:>12.4}  {:>6.2} %  {:>+8.3} %  {} ({:.2} GB)",
        json!(found.kv).as_str().unwrap_or_default(),
        json!(found.compute).as_str().unwrap_or_default(),
        d.mean_kl,
        d.max_kl,
        d.max_logprob_difference,
        100.0 * d.top1_agreement,
        100.0 * d.perplexity_change,
        found.model,
        found.weight_bytes as f64 / 1e9,
    );
}

/// A backend with room for some sequences.
struct Model {
    backend: CpuBackend,
    /// For each sequence, one table per group.
    tables: Vec<Vec<Vec<BlockId>>>,
}

impl Model {
    fn load(
        folder: &Folder,
        (kv, compute): (KvDtype, Compute),
        tokens: usize,
        sequences: usize,
        options: &cli::Accuracy,
    ) -> Result<Self> {
        let max_len = folder.config().max_len;
        ensure!(tokens <= max_len, "a sequence has {tokens} tokens; the model's context has {max_len}");
        let layout = folder.kv_layout(16, kv);
        let groups = folder.kv_groups().len();
        let table_len = layout.blocks_for(tokens);
        let bytes = sequences * groups * table_len * layout.block_bytes();
        let arena = HostArena::new(bytes).with_context(|| format!("{bytes} bytes for keys and values"))?;
        let threads = limits::threads(options.threads);
        let backend = CpuBackend::with_compute(folder, layout, arena, threads, compute)?;
        let mut ids = (0..).map(BlockId);
        let mut table = || ids.by_ref().take(table_len).collect::<Vec<_>>();
        let tables = (0..sequences).map(|_| (0..groups).map(|_| table()).collect()).collect();
        Ok(Self { backend, tables })
    }

    /// The logits after each of the tokens, which begin at `start` of the only sequence.
    fn logits(&mut self, tokens: &[TokenId], start: usize) -> Result<kvasir_model::Logits> {
        let input = SeqInput { tokens, start, tables: &self.tables[0], rows: tokens.len() };
        Ok(self.backend.forward(&[input], &mut |_| {})?)
    }
}
