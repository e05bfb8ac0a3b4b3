//! From a file to the hashes of a prompt's blocks, as workers compute them.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use kvasir_cluster::{ModelInfo, View};
use kvasir_types::{BlockHash, ModelFingerprint, TokenId, chain};

use super::args::PromptArgs;

/// Most bytes read of a prompt.
const MAX_BYTES: u64 = 64 << 20;

/// A prompt as the store knows it.
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) model: String,
    pub(crate) tokens: usize,
    pub(crate) block_tokens: usize,
    pub(crate) block_bytes: u64,
    /// Of its full blocks.
    pub(crate) hashes: Vec<BlockHash>,
}

/// Reads what the arguments name, for a model that a worker of the cluster serves.
pub(crate) fn read(args: &PromptArgs, view: &View) -> anyhow::Result<Prompt> {
    let model = model(view, args.model.as_deref())?;
    let tokens = match (&args.text, &args.tokens, &args.tokenizer) {
        (Some(text), _, Some(tokenizer)) => tokenize(&content(text)?, tokenizer)?,
        (None, Some(tokens), _) => numbers(&content(tokens)?).with_context(|| tokens.display().to_string())?,
        _ => bail!("a prompt is needed: --tokens FILE, or --text FILE --tokenizer FILE"),
    };
    let block_tokens = model.layout.block_size as usize;
    let salt = kvasir_types::tenant_salt(&args.tenant_salt, &args.salt);
    let root = BlockHash::root(model.fingerprint, &model.layout, &salt);
    Ok(Prompt {
        model: model.name.clone(),
        tokens: tokens.len(),
        block_tokens,
        block_bytes: model.layout.block_bytes() as u64,
        hashes: chain(root, &tokens, block_tokens),
    })
}

/// The model of that name, or the only one there is.
fn model<'a>(view: &'a View, name: Option<&str>) -> anyhow::Result<&'a ModelInfo> {
    let mut models: Vec<&ModelInfo> = view.members.iter().filter_map(|member| member.model.as_ref()).collect();
    models.sort_by_key(|model| (&model.name, model.fingerprint));
    models.dedup_by_key(|model| (&model.name, model.fingerprint));
    let names = models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>().join(", ");
    ensure!(!models.is_empty(), "no worker is running, and only workers know how a model's blocks are named");
    models.retain(|model| name.is_none_or(|name| model.name == name));
    match models[..] {
        [model] => Ok(model),
        [] => bail!("--model: no worker serves {:?}, there are: {names}", name.unwrap_or_default()),
        _ => bail!("--model is needed, there are: {names}"),
    }
}

/// The fingerprint of a model by its name, or as it is.
pub(crate) fn fingerprint(view: &View, name: &str) -> anyhow::Result<ModelFingerprint> {
    if let Ok(model) = model(view, Some(name)) {
        return Ok(model.fingerprint);
    }
    let quoted = serde_json::Value::String(name.to_owned());
    serde_json::from_value(quoted).ok().with_context(|| {
        format!("--model: no worker serves {name:?}, and it is no fingerprint (32 hexadecimal digits, see `kv stats`)")
    })
}

/// What a file says; "-" is the standard input.
pub(crate) fn content(path: &PathBuf) -> anyhow::Result<String> {
    let reader: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(File::open(path).with_context(|| format!("cannot open {}", path.display()))?)
    };
    let mut text = String::new();
    reader.take(MAX_BYTES + 1).read_to_string(&mut text).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(text.len() as u64 <= MAX_BYTES, "{}: over {} MiB", path.display(), MAX_BYTES >> 20);
    Ok(text)
}

fn tokenize(text: &str, tokenizer: &Path) -> anyhow::Result<Vec<TokenId>> {
    let wrong = |error: tokenizers::Error| anyhow::anyhow!("--tokenizer {}: {error}", tokenizer.display());
    let tokenizer = tokenizers::Tokenizer::from_file(tokenizer).map_err(wrong)?;
    // What a chat template put in front is in the text already.
    let encoding = tokenizer.encode_fast(text, false).map_err(wrong)?;
    Ok(encoding.get_ids().iter().map(|&id| TokenId(id)).collect())
}

/// Token ids, with anything between them: a JSON array is fine, and so is a list.
pub(crate) fn numbers(text: &str) -> anyhow::Result<Vec<TokenId>> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(|word| word.parse().map(TokenId).with_context(|| format!("{word:?} is no token id"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_ids_may_come_in_any_form() {
        for text in ["[1, 2,3]", "1 2\n3\n", "1,2;3"] {
            assert_eq!(numbers(text).unwrap(), [TokenId(1), TokenId(2), TokenId(3)], "{text}");
        }
        assert_eq!(numbers("").unwrap(), []);
        for bad in ["1 two", "99999999999", "0x10"] {
            assert!(numbers(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_fingerprint_is_taken_as_it_is() {
        let text = "00112233445566778899aabbccddeeff";
        assert_eq!(fingerprint(&View::default(), text).unwrap().to_string(), text);
        assert!(fingerprint(&View::default(), "qwen").unwrap_err().to_string().contains("no worker serves"));
    }
}
