//! A served model's text side: the files of its folder that have to do with text.
//!
//! | file | what is taken from it |
//! | --- | --- |
//! | `tokenizer.json` | the tokenizer, and its identity: hex BLAKE3 of the file's bytes |
//! | `chat_template.jinja`, else `tokenizer_config.json` | the chat template (optional: without one, no chat) |
//! | `tokenizer_config.json` | `bos_token` and the like, for the template |
//! | `generation_config.json`, `config.json` | end tokens, context length, vocabulary size |
//!
//! Weights are not touched: those are the workers'. Beside that it says how fast its clients should be answered.

use std::{
    collections::{BTreeSet, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use kvasir_types::TokenId;
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use super::{
    Conversation, Encoder, Error, Template, Vocab,
    parse::{Dialect, MARKERS},
    pieces::Pieces,
};
use crate::config::{ModelConfig, Slo};

/// Tokenizer, template and limits of one model.
pub(crate) struct Model {
    name: String,
    encoder: Encoder,
    /// What was tokenized lately; `None`: nothing is kept.
    pieces: Option<Pieces>,
    tokenizer_id: String,
    vocab: Vocab,
    vocab_size: usize,
    template: Option<Template>,
    end_tokens: HashSet<TokenId>,
    context_len: Option<u32>,
    dialect: Dialect,
    markers: Arc<HashSet<TokenId>>,
    slo: Slo,
}

impl Model {
    /// Reads a model's folder.
    pub(crate) fn load(config: &ModelConfig) -> Result<Self, Error> {
        let ModelConfig { name, path: folder, tool_parser, reasoning_parser, slo } = config;
        let slo = *slo;
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let tokenizer = parse_tokenizer(&bytes).map_err(|why| Error::Broken { path, why })?;
        let vocab = Vocab::of(&tokenizer);

        let tokenizer_config = read_object(folder.join("tokenizer_config.json"))?;
        let config = read_object(folder.join("config.json"))?;
        let generation = read_object(folder.join("generation_config.json"))?;
        // Models that also see keep the numbers of their language part one level down.
        let text_config = config.get("text_config").and_then(Value::as_object).unwrap_or(&config);
        let number = |key: &str| text_config.get(key).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());

        let special = special_tokens(&tokenizer_config);
        let mut end_tokens: HashSet<TokenId> =
            [&generation, &config, text_config].into_iter().flat_map(end_tokens).collect();
        let named_end = special.iter().find(|(name, _)| name == "eos_token");
        end_tokens.extend(named_end.and_then(|(_, text)| tokenizer.token_to_id(text)).map(TokenId));

        let template = read_template(folder, &tokenizer_config)?;
        let dialect = Dialect::of(template.as_deref(), *tool_parser, *reasoning_parser);
        let markers = MARKERS.into_iter().filter_map(|marker| tokenizer.token_to_id(marker)).map(TokenId);
        let markers = markers.filter(|&token| vocab.is_special(token)).collect();
        let template = template.map(|source| Template::compile(&source, special)).transpose()?;
        Ok(Self {
            name: name.clone(),
            tokenizer_id: blake3::hash(&bytes).to_hex().to_string(),
            vocab_size: number("vocab_size").map_or(0, |size| size as usize).max(vocab.len()),
            vocab,
            pieces: None,
            encoder: Encoder::of(tokenizer),
            template,
            end_tokens,
            context_len: number("max_position_embeddings"),
            dialect,
            markers: Arc::new(markers),
            slo,
        })
    }

    /// The same, keeping so many bytes of what was tokenized lately.
    pub(crate) fn keeping(self, bytes: usize) -> Self {
        let pieces = Pieces::of(&self.encoder, bytes);
        if bytes > 0 && pieces.is_none() {
            tracing::info!(
                model = self.name,
                "its tokenizer has no tokens at which texts can be taken apart: nothing is kept"
            );
        }
        Self { pieces, ..self }
    }

    /// How fast its clients should be answered.
    pub(crate) fn slo(&self) -> Slo {
        self.slo
    }

    /// What clients call it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Hex BLAKE3 of `tokenizer.json`: workers say which one their model goes with.
    pub(crate) fn tokenizer_id(&self) -> &str {
        &self.tokenizer_id
    }

    /// The token table.
    pub(crate) fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// Token ids the model knows are below this; it may be more than the tokenizer has names for.
    pub(crate) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The tokens that end an answer.
    pub(crate) fn end_tokens(&self) -> &HashSet<TokenId> {
        &self.end_tokens
    }

    /// Positions the model was made for, if its configuration says.
    pub(crate) fn context_len(&self) -> Option<u32> {
        self.context_len
    }

    /// The prompt text of a conversation; `now` in seconds since 1970.
    pub(crate) fn render(&self, conversation: &Conversation, now: u64) -> Result<String, Error> {
        self.template.as_ref().ok_or(Error::NoTemplate)?.render(conversation, now)
    }

    /// How it writes calls and thoughts.
    pub(crate) fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// The special tokens that answers are taken apart by.
    pub(crate) fn markers(&self) -> &Arc<HashSet<TokenId>> {
        &self.markers
    }

    /// The chat template, if there is one.
    pub(crate) fn template(&self) -> Option<&Template> {
        self.template.as_ref()
    }

    /// Text to tokens. `add_special`: with what the tokenizer puts around a text by itself (chat templates write that
    /// themselves).
    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, Error> {
        let failed = |error: tokenizers::Error| Error::Tokenize(error.to_string());
        if !add_special {
            return self.encoder.encode(text).map_err(failed);
        }
        let encoding = self.encoder.tokenizer().encode_fast(text, true).map_err(failed)?;
        Ok(encoding.get_ids().iter().copied().map(TokenId).collect())
    }

    /// A rendered conversation to tokens: what of it was tokenized lately, for the same salt, is not tokenized again.
    pub(crate) fn encode_prompt(&self, text: &str, salt: &str) -> Result<Vec<TokenId>, Error> {
        match &self.pieces {
            Some(pieces) => {
                pieces.encode(&self.encoder, text, salt).map_err(|error| Error::Tokenize(error.to_string()))
            }
            None => self.encode(text, false),
        }
    }

    /// Tokens to text, special ones left out; nothing where the tokenizer fails (ids it has no name for are skipped).
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        self.encoder.tokenizer().decode(ids, true).unwrap_or_default()
    }

    /// The same with special tokens.
    pub(crate) fn decode_all(&self, ids: &[u32]) -> String {
        self.encoder.tokenizer().decode(ids, false).unwrap_or_default()
    }
}

fn parse_tokenizer(bytes: &[u8]) -> Result<Tokenizer, String> {
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| one_line(&error.to_string()))?;
    // Some files carry the truncation and padding of their training: a prompt is never cut or filled up.
    tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A JSON file with an object in it; a missing file is an empty object.
fn read_object(path: PathBuf) -> Result<Map<String, Value>, Error> {
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(source) => return Err(Error::Read { path, source }),
    };
    serde_json::from_slice(&bytes).map_err(|error| Error::Broken { path, why: error.to_string() })
}

fn read_template(folder: &Path, tokenizer_config: &Map<String, Value>) -> Result<Option<String>, Error> {
    let path = folder.join("chat_template.jinja");
    match std::fs::read_to_string(&path) {
        Ok(source) => return Ok(Some(source)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(Error::Read { path, source }),
    }
    // Either one template, or a list of named ones of which `default` is for chat.
    Ok(match tokenizer_config.get("chat_template") {
        Some(Value::String(source)) => Some(source.clone()),
        Some(Value::Array(named)) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    })
}

/// `bos_token` and the like: a string, or an object with the string as `content`.
fn special_tokens(tokenizer_config: &Map<String, Value>) -> Vec<(String, String)> {
    let named = tokenizer_config.iter().filter(|(key, _)| key.ends_with("_token"));
    named
        .filter_map(|(key, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((key.clone(), text.to_owned()))
        })
        .collect()
}

/// `eos_token_id`: a number or a list of numbers.
fn end_tokens(config: &Map<String, Value>) -> BTreeSet<TokenId> {
    let ids = match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.as_slice(),
        Some(id) => std::slice::from_ref(id),
        None => &[],
    };
    ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).map(TokenId).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::OnceLock;

    use super::*;
    use crate::text::Message;

    pub(crate) fn demo_folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo")
    }

    pub(crate) fn demo_tokenizer() -> Tokenizer {
        parse_tokenizer(&std::fs::read(demo_folder().join("tokenizer.json")).unwrap()).unwrap()
    }

    /// The demo model, read once.
    pub(crate) fn demo() -> Arc<Model> {
        static DEMO: OnceLock<Arc<Model>> = OnceLock::new();
        Arc::clone(DEMO.get_or_init(|| Arc::new(Model::load(&ModelConfig::new("demo", demo_folder())).unwrap())))
    }

    #[test]
    fn prompts_and_answers_are_those_of_the_reference() {
        let golden = std::fs::read_to_string(demo_folder().join("golden.jsonl")).unwrap();
        let model = demo();
        let ids = |value: &Value| -> Vec<TokenId> {
            value.as_array().unwrap().iter().map(|id| TokenId(id.as_u64().unwrap() as u32)).collect()
        };
        let mut lines = 0;
        for line in golden.lines() {
            let case: Value = serde_json::from_str(line).unwrap();
            let text = |message: &Value, key: &str| message[key].as_str().unwrap().to_owned();
            let messages: Vec<Message> = case["messages"]
                .as_array()
                .unwrap()
                .iter()
                .map(|m| Message::said(&text(m, "role"), &text(m, "content")))
                .collect();
            let prompt = model.encode(&model.render(&Conversation::of(messages), 0).unwrap(), false).unwrap();
            assert_eq!(prompt, ids(&case["prompt_ids"]), "{line}");

            let output: Vec<u32> = ids(&case["output_ids"]).iter().map(|t| t.0).collect();
            assert_eq!(model.decode(&output), case["text"].as_str().unwrap());
            lines += 1;
        }
        assert!(lines >= 40, "the golden file has {lines} lines");
    }

    #[test]
    fn the_demo_folder_says_what_it_is() {
        let model = demo();
        assert_eq!(model.end_tokens(), &HashSet::from([TokenId(2)]));
        assert_eq!((model.context_len(), model.vocab_size()), (Some(8192), 1532));
        assert_eq!(model.tokenizer_id().len(), 64);
    }

    #[test]
    fn a_broken_folder_is_refused_by_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = Model::load(&ModelConfig::new("x", folder.path())).err().unwrap();
        assert!(error.to_string().starts_with("read ") && error.to_string().ends_with("tokenizer.json"), "{error}");

        std::fs::write(folder.path().join("tokenizer.json"), "{\"version\":\n 1}").unwrap();
        let error = Model::load(&ModelConfig::new("x", folder.path())).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json: ") && !error.contains('\n'), "{error}");

        std::fs::copy(demo_folder().join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
        std::fs::write(folder.path().join("config.json"), "[1]").unwrap();
        let error = Model::load(&ModelConfig::new("x", folder.path())).err().unwrap().to_string();
        assert!(error.contains("config.json"), "{error}");
    }

    #[test]
    fn templates_and_tokens_are_found_in_every_form() {
        let config = |json: Value| json.as_object().unwrap().clone();
        let nowhere = Path::new("/nonexistent");
        let plain = config(
            serde_json::json!({"chat_template": "a", "bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": true}),
        );
        assert_eq!(read_template(nowhere, &plain).unwrap().unwrap(), "a");
        let special = special_tokens(&plain);
        assert_eq!(special, [("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())]);
        let named = config(
            serde_json::json!({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}),
        );
        assert_eq!(read_template(nowhere, &named).unwrap().unwrap(), "d");
        assert!(read_template(nowhere, &Map::new()).unwrap().is_none());
        assert_eq!(end_tokens(&config(serde_json::json!({"eos_token_id": [1, 2]}))).len(), 2);
    }
}
