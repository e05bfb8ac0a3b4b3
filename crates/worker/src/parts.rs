//! What the engine gets beside the model: grammars, from the folder's tokenizer, and guesses at answers.

use std::{io::ErrorKind, path::Path, sync::Arc};

use anyhow::{Context as _, ensure};
use kvasir_engine::{Constraints, DraftModel, ModelRunner, NGrams, Proposer};
use kvasir_grammar::Grammars;
use kvasir_model::{Device, Folder, Options, cpu::HostArena};
use kvasir_runtime::chain;

use crate::{
    config::{Config, Speculation},
    host,
};

/// What makes answers follow grammars, if the folder's tokenizer allows it: it is not needed for anything else.
pub(crate) fn grammars(folder: &Folder, path: &Path) -> anyhow::Result<Option<Arc<dyn Constraints>>> {
    let Some(tokenizer) = tokenizer_json(path)? else { return Ok(None) };
    match Grammars::new(&tokenizer, folder.config().vocab, &folder.config().eos) {
        Ok(grammars) => Ok(Some(Arc::new(grammars))),
        Err(error) => {
            tracing::warn!(error = chain(&error), "answers can't be given a form");
            Ok(None)
        }
    }
}

/// What guesses how answers go on, if that is wanted.
pub(crate) fn proposer(config: &Config, folder: &Folder, threads: usize) -> anyhow::Result<Option<Box<dyn Proposer>>> {
    let speculation = &config.engine.speculation;
    Ok(match speculation.kind {
        Speculation::Off => None,
        Speculation::Ngram => Some(Box::new(NGrams::default())),
        Speculation::Draft => Some(Box::new(draft_model(config, folder, threads)?)),
    })
}

fn draft_model(config: &Config, target: &Folder, threads: usize) -> anyhow::Result<DraftModel> {
    let speculation = &config.engine.speculation;
    let path = &speculation.model;
    let at = || format!("engine.speculation.model {}", path.display());
    let folder = Folder::open(path).with_context(at)?;
    // Else its guesses would be tokens of another language.
    ensure!(
        tokenizer_id(path)? == tokenizer_id(&config.model.path)? && folder.config().eos == target.config().eos,
        "{}: it has another tokenizer or other end tokens than the model",
        at()
    );
    let layout = folder.kv_layout(config.kv.block_size, config.kv.dtype).check().context("kv.block_size")?;
    let blocks = usize::try_from(speculation.memory_bytes).unwrap_or(usize::MAX) / layout.block_bytes();
    ensure!(
        blocks >= 2 && u32::try_from(blocks).is_ok(),
        "engine.speculation.memory_bytes: {} bytes hold {blocks} blocks of {} bytes, at least 2 are needed",
        speculation.memory_bytes,
        layout.block_bytes()
    );
    let arena = HostArena::new(blocks * layout.block_bytes()).context("engine.speculation.memory_bytes")?;
    // So small a model takes longer to gather than to compute.
    let options = Options { tensor_parallel: 1, ..host::options(config, threads) };
    let backend = Device::open(&folder, layout, arena, options).with_context(at)?;
    tracing::info!(model = %path.display(), blocks, "draft model loaded");
    Ok(DraftModel::new(Box::new(ModelRunner::new(backend)), &layout, blocks, config.engine.chunk_tokens))
}

/// What tells routers whether they speak this model's token ids: BLAKE3 of tokenizer.json, or empty without one.
pub(crate) fn tokenizer_id(folder: &Path) -> anyhow::Result<String> {
    Ok(tokenizer_json(folder)?.map(|bytes| blake3::hash(&bytes).to_hex().to_string()).unwrap_or_default())
}

fn tokenizer_json(folder: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    let path = folder.join("tokenizer.json");
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}
