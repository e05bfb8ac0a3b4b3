//! What can go wrong between a folder on disk and a row of logits.
//!
//! Three kinds: the folder is not one we can serve (told to the operator at start, naming file and tensor), the caller
//! handed in a batch that makes no sense (a bug of the engine's, answered with an error because the alternative is a
//! write outside the arena), or a device failed ([`Error::is_fatal`] says whether anything can be computed on it after
//! that). None goes away by trying the same again here; another worker may fare better after a device's failure.

use std::path::PathBuf;

use kvasir_types::{BlockId, KvLayout, Retry, TokenId};

/// Why a model cannot be loaded or a batch not be computed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened, read or mapped.
    #[error("{}: cannot be read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("{}: cannot be written", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A JSON file is larger than any sane one.
    #[error("{}: {bytes} bytes, more than the {limit} expected at most of such a file", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The bound.
        limit: u64,
    },
    /// A JSON file is not what it should be.
    #[error("{}: not valid: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A model family nobody has taught us.
    #[error("{}: model `{model}` is not supported (supported: {supported})", path.display())]
    UnsupportedModel {
        /// The configuration file.
        path: PathBuf,
        /// What it says, under `model_type` or `architectures`.
        model: String,
        /// The `model_type`s it may say.
        supported: String,
    },
    /// A configuration value that is missing, out of bounds or asks for something not implemented.
    #[error("{}: `{key}`: {reason}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// Neither `model.safetensors` nor its index is there.
    #[error("{}: holds neither model.safetensors nor model.safetensors.index.json", dir.display())]
    NoWeights {
        /// The model folder.
        dir: PathBuf,
    },
    /// The index names a file outside the folder, or something that is not a safetensors file.
    #[error("{}: tensor {tensor} is said to be in {file:?}, which is not the name of a .safetensors file of this folder", index.display())]
    BadShardName {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the index says.
        file: String,
    },
    /// The header of a weight file contradicts itself or the file.
    #[error("{}: not a valid safetensors file: {reason}", file.display())]
    BadHeader {
        /// The weight file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A weight the configuration asks for is not there.
    #[error("{}: tensor {tensor} of shape {expected:?} is missing", file.display())]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// The shape it should have.
        expected: Vec<usize>,
        /// Where it was looked for.
        file: PathBuf,
    },
    /// A weight has another shape than the configuration asks for.
    #[error("{}: tensor {tensor} has shape {shape:?}, expected {expected:?}", file.display())]
    TensorShape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
        /// The file it is in.
        file: PathBuf,
    },
    /// A weight is of a type we do not compute with.
    #[error("{}: tensor {tensor} of shape {shape:?} is {dtype}, expected BF16, F16, F32, or I8 or F8_E4M3 with a scale", file.display())]
    TensorDtype {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its type.
        dtype: String,
        /// The file it is in.
        file: PathBuf,
    },
    /// The scale of an 8-bit weight is not a positive number for each row.
    #[error("{}: tensor {tensor} is to scale a weight, but not all of it is above zero and finite", file.display())]
    BadScale {
        /// The scale.
        tensor: String,
        /// The file it is in.
        file: PathBuf,
    },
    /// The KV layout is not this model's.
    #[error("kv layout {layout:?} does not fit the model: expected {expected:?} (any block_size and dtype)")]
    Layout {
        /// The layout handed in.
        layout: KvLayout,
        /// One that fits.
        expected: KvLayout,
    },
    /// More rows of logits are asked for than there are tokens.
    #[error("input {input}: {rows} rows of logits wanted of {tokens} tokens")]
    TooManyRows {
        /// Which input of the batch.
        input: usize,
        /// Rows asked for.
        rows: usize,
        /// Tokens of the input.
        tokens: usize,
    },
    /// Not one block table per group of layers.
    #[error("input {input}: {tables} block tables for {groups} groups of layers")]
    WrongTables {
        /// Which input of the batch.
        input: usize,
        /// Its tables.
        tables: usize,
        /// The model's groups.
        groups: usize,
    },
    /// The arena cannot hold a single block.
    #[error("an arena of {bytes} bytes holds no block of {block_bytes} bytes")]
    ArenaTooSmall {
        /// Bytes of the arena.
        bytes: usize,
        /// Bytes of a block.
        block_bytes: usize,
    },
    /// The worker threads could not be started.
    #[error("cannot start {threads} compute threads: {reason}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// Why not.
        reason: String,
    },
    /// An input has no token to compute.
    #[error("input {input}: no tokens")]
    NoTokens {
        /// Index in the batch.
        input: usize,
    },
    /// A token id the model does not know.
    #[error("input {input}: token {} is outside the vocabulary of {vocab}", token.0)]
    TokenOutOfVocabulary {
        /// Index in the batch.
        input: usize,
        /// The token.
        token: TokenId,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A position past the model's context length.
    #[error("input {input}: positions {start}..{end} pass the model's {max_len}")]
    TooLong {
        /// Index in the batch.
        input: usize,
        /// First position to compute.
        start: usize,
        /// One past the last.
        end: usize,
        /// The model's context length.
        max_len: usize,
    },
    /// The block table does not reach the last token.
    #[error("input {input}: a table of {blocks} blocks is too short for {tokens} tokens, which need {needed}")]
    TableTooShort {
        /// Index in the batch.
        input: usize,
        /// Blocks in the table.
        blocks: usize,
        /// Tokens the sequence has after this step.
        tokens: usize,
        /// Blocks they occupy.
        needed: usize,
    },
    /// The block table names a block the arena does not have.
    #[error("input {input}: block {block} is outside the arena of {blocks} blocks")]
    BlockOutOfArena {
        /// Index in the batch.
        input: usize,
        /// The block.
        block: BlockId,
        /// Blocks in the arena.
        blocks: usize,
    },
    /// There is no such device, or nothing to reach one by.
    #[error("cuda:{ordinal}: {reason}")]
    NoDevice {
        /// Which was asked for.
        ordinal: usize,
        /// What is missing.
        reason: String,
    },
    /// A device has no kernels of ours that it could run, or the binary's do not fit its host side.
    #[error("{device}: {reason}")]
    Kernels {
        /// The device.
        device: String,
        /// What does not fit.
        reason: String,
    },
    /// Weights, scratch and blocks do not fit into the device's memory.
    #[error(
        "{device}: {free} of {total} bytes are free, but weights take {weights}, scratch for {tokens} tokens a step \
         {scratch}, and {blocks} blocks of {block_bytes} bytes {}: {fit} blocks would fit (kv.memory_bytes {})",
        blocks * block_bytes,
        fit * block_bytes
    )]
    DeviceTooSmall {
        /// The device.
        device: String,
        /// Bytes that were free.
        free: usize,
        /// Bytes that there are.
        total: usize,
        /// Bytes of the model's weights there.
        weights: usize,
        /// Bytes that a step computes in.
        scratch: usize,
        /// Tokens of the largest step.
        tokens: usize,
        /// Blocks wanted.
        blocks: usize,
        /// Bytes of one.
        block_bytes: usize,
        /// Blocks for which there is room.
        fit: usize,
    },
    /// A device had no memory left for what it was asked to do, which was not done.
    #[error("{device}: out of memory in {call}")]
    DeviceOutOfMemory {
        /// The device.
        device: String,
        /// What was called.
        call: &'static str,
    },
    /// A device failed: nothing can be computed on it any more by this process.
    #[error("{device}: {call} failed: {reason}")]
    Device {
        /// The device.
        device: String,
        /// What was called, perhaps long after what failed.
        call: &'static str,
        /// What the driver says.
        reason: String,
    },
    /// A group of devices cannot divide the model in equal parts.
    #[error("tensor_parallel {degree} does not divide the model's {count} {what} (possible: {degrees})")]
    Degree {
        /// How many were to compute it.
        degree: usize,
        /// What cannot be divided.
        what: &'static str,
        /// How many of them there are.
        count: usize,
        /// How many could compute it.
        degrees: String,
    },
    /// One of several that compute a model together failed, or did not come: none of them computes any more.
    #[error("rank {rank} of {size}: {reason}")]
    Rank {
        /// Who says so.
        rank: usize,
        /// How many there are.
        size: usize,
        /// What happened.
        reason: String,
    },
    /// One of several that compute a model together could not take part in a step, which was not computed. Its own error says
    /// why.
    #[error("rank {rank} could not take part in this step")]
    Declined {
        /// Which.
        rank: usize,
    },
    /// The model asks for something that kernels do not compute.
    #[error("{device}: {what}")]
    NotOnDevice {
        /// The device.
        device: String,
        /// What that is, and what is possible.
        what: String,
    },
}

impl Error {
    /// Whether trying again may help. Another worker serves the same folder and would get the same batch: never, unless a
    /// device failed, which others do not share.
    pub fn retry(&self) -> Retry {
        let elsewhere = matches!(self, Self::DeviceOutOfMemory { .. } | Self::Declined { .. });
        if elsewhere || self.is_fatal() { Retry::Elsewhere } else { Retry::Never }
    }

    /// Whether the backend is of no use any more: a device that was lost or touched memory that is not there, or one of several
    /// that compute together and has ended.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Device { .. } | Self::Rank { .. })
    }
}
