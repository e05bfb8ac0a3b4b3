//! Weight files: safetensors, memory-mapped, used where they lie.
//!
//! ```text
//! file = [header length: u64 le][header: JSON name → {dtype, shape, data_offsets}][tensor bytes]
//! ```
//!
//! Weights stay in the type they are stored in (8-bit ones beside a `weight_scale`, as compressed-tensors writes them, or a
//! `weight_scale_inv`, as DeepSeek does) and are widened while a kernel loads them, so a model costs its file's size in page
//! cache once, however many processes serve it, and nothing more. A folder holds one `model.safetensors` or an index that
//! says which shard holds which tensor.
//!
//! Everything in these files comes from outside: header lengths and offsets are checked against the file's real length,
//! shapes against the configuration, shard names against leaving the folder, before a byte of a tensor is touched.

use std::{
    collections::HashMap,
    ops::Range,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;

use crate::{Error, ModelConfig, config::read_json};

pub(crate) mod expected;
pub(crate) mod fp8;
mod header;
mod mapped;

pub(crate) use expected::{EMBEDDING, LM_HEAD};
use header::Entry;
use mapped::MappedFile;

/// A shard index names every tensor of a model: the largest published ones are a few MiB.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// Element type of a stored weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// Signed byte, with a scale per row (or one for all).
    I8,
    /// 8-bit float of 4 exponent and 3 mantissa bits (OCP e4m3, no infinities), scaled as `I8`.
    F8,
}

impl Dtype {
    /// Size of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::I8 | Self::F8 => 1,
        }
    }

    /// Whether elements mean something only together with a scale.
    pub fn is_scaled(self) -> bool {
        matches!(self, Self::I8 | Self::F8)
    }

    /// Its name in a safetensors header.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
            Self::I8 => "I8",
            Self::F8 => "F8_E4M3",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::Bf16, Self::F16, Self::F32, Self::I8, Self::F8].into_iter().find(|dtype| dtype.as_str() == name)
    }
}

/// Rows, and columns, of a block of weights that share a scale.
pub(crate) const BLOCK: usize = 128;

/// What stored elements are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scale<'a> {
    /// They are the numbers themselves.
    None,
    /// One for each row.
    Rows(&'a [f32]),
    /// One for each block of [`BLOCK`]` × `[`BLOCK`] (those at the ends are smaller), `[blocks of rows][blocks of columns]`, of
    /// a matrix that this one begins in at row `first`.
    Blocks { scale: &'a [f32], first: usize },
}

/// One weight: a matrix of `rows × cols` (a vector is one row) inside a mapped file.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    data: Data,
    pub(crate) dtype: Dtype,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// As [`Scale`] has it; empty for types that need none.
    scale: Arc<[f32]>,
    /// Whether those are of blocks; then of all of the matrix that this one begins in at row `first`.
    blocks: bool,
    first: usize,
}

/// Where a tensor's bytes are.
#[derive(Clone, Debug)]
enum Data {
    Mapped { file: Arc<MappedFile>, start: usize },
    Made(Arc<[u8]>),
}

impl Tensor {
    /// What its elements are multiplied by.
    pub(crate) fn scale(&self) -> Scale<'_> {
        match (self.scale.is_empty(), self.blocks) {
            (true, _) => Scale::None,
            (false, false) => Scale::Rows(&self.scale),
            (false, true) => Scale::Blocks { scale: &self.scale, first: self.first },
        }
    }

    /// The same; if blocks of it share a scale then as the numbers themselves.
    pub(crate) fn without_blocks(&self) -> Self {
        if !self.blocks {
            return self.clone();
        }
        let data = Data::Made(self.to_f32().iter().flat_map(|value| value.to_le_bytes()).collect());
        Self {
            data,
            dtype: Dtype::F32,
            rows: self.rows,
            cols: self.cols,
            scale: Arc::default(),
            blocks: false,
            first: 0,
        }
    }

    /// Its bytes: row-major, little-endian, of no particular alignment.
    pub(crate) fn bytes(&self) -> &[u8] {
        let len = self.rows * self.cols * self.dtype.bytes();
        match &self.data {
            Data::Mapped { file, start } => &file.bytes()[*start..start + len],
            Data::Made(bytes) => bytes,
        }
    }

    /// Some of its rows.
    pub(crate) fn part(&self, rows: Range<usize>) -> Self {
        assert!(rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        let (from, until) = (rows.start * self.cols * self.dtype.bytes(), rows.end * self.cols * self.dtype.bytes());
        let data = match &self.data {
            Data::Mapped { file, start } => Data::Mapped { file: file.clone(), start: start + from },
            Data::Made(bytes) => Data::Made(bytes[from..until].into()),
        };
        let scale = match self.scale() {
            Scale::Rows(scale) => scale[rows.clone()].into(),
            Scale::None | Scale::Blocks { .. } => self.scale.clone(),
        };
        Self { data, rows: rows.len(), scale, first: self.first + rows.start, ..self.clone() }
    }

    /// One row, widened into `out`.
    pub(crate) fn row_into(&self, row: usize, out: &mut [f32]) {
        let width = self.cols * self.dtype.bytes();
        widen(&self.bytes()[row * width..(row + 1) * width], self.dtype, out);
        match self.scale() {
            Scale::None => {}
            Scale::Rows(scale) => out.iter_mut().for_each(|value| *value *= scale[row]),
            Scale::Blocks { scale, first } => {
                let scale = &scale[(first + row) / BLOCK * self.cols.div_ceil(BLOCK)..];
                let blocks = out.chunks_mut(BLOCK).zip(scale);
                blocks.for_each(|(block, scale)| block.iter_mut().for_each(|value| *value *= scale));
            }
        }
    }

    /// The whole of a small tensor (norms, biases), widened.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        out.chunks_exact_mut(self.cols).enumerate().for_each(|(row, out)| self.row_into(row, out));
        out
    }
}

/// Widens stored elements to `f32`.
pub(crate) fn widen(bytes: &[u8], dtype: Dtype, out: &mut [f32]) {
    let half = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]);
    match dtype {
        Dtype::Bf16 => {
            let values = bytes.chunks_exact(2).map(|b| half::bf16::from_bits(half(b)).to_f32());
            out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
        }
        Dtype::F16 => {
            let values = bytes.chunks_exact(2).map(|b| half::f16::from_bits(half(b)).to_f32());
            out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
        }
        Dtype::F32 => {
            let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            out.iter_mut().zip(values).for_each(|(o, v)| *o = v);
        }
        Dtype::I8 => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = f32::from(b.cast_signed())),
        Dtype::F8 => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = fp8::to_f32(b)),
    }
}

/// All weights a configuration asks for, each found and of the right shape. Tensors beyond those are ignored.
#[derive(Debug)]
pub(crate) struct Weights {
    tensors: HashMap<String, Tensor>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Weights {
    /// Maps the weight files of `dir` and checks them against `config`.
    pub(crate) fn open(dir: &Path, config: &ModelConfig) -> Result<Self, Error> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.exists() {
            let shard = Shard::open(single)?;
            return Self::collect(config, |_, _| Ok(&shard));
        }
        if !index.exists() {
            return Err(Error::NoWeights { dir: dir.to_owned() });
        }
        let Index { weight_map } = read_json(&index, MAX_INDEX_BYTES)?;
        let mut shards = HashMap::new();
        let names = expected::tensors(config).into_iter();
        let names = names.flat_map(|(name, _)| [scale_of(&name), inverse_of(&name), name]);
        for name in names {
            let Some(file) = weight_map.get(&name) else { continue }; // reported below, where it is needed
            if !is_plain_shard_name(file) {
                let file = file.chars().take(128).collect();
                return Err(Error::BadShardName { index, tensor: name, file });
            }
            if !shards.contains_key(file) {
                shards.insert(file.clone(), Shard::open(dir.join(file))?);
            }
        }
        Self::collect(config, |name, expected| {
            weight_map.get(name).and_then(|file| shards.get(file)).ok_or_else(|| Error::MissingTensor {
                tensor: name.to_owned(),
                expected: expected.to_vec(),
                file: index.clone(),
            })
        })
    }

    fn collect<'a>(
        config: &ModelConfig,
        shard_of: impl Fn(&str, &[usize]) -> Result<&'a Shard, Error>,
    ) -> Result<Self, Error> {
        let mut tensors = HashMap::new();
        for (name, shape) in expected::tensors(config) {
            let mut tensor = shard_of(&name, &shape)?.tensor(&name, &shape)?;
            if tensor.dtype.is_scaled() {
                let inverse = inverse_of(&name);
                let is_there = shard_of(&inverse, &[]).is_ok_and(|shard| shard.entries.contains_key(&inverse));
                let name = if is_there { inverse } else { scale_of(&name) };
                let (scale, blocks) = shard_of(&name, &[tensor.rows, 1])?.scale(&name, &tensor)?;
                (tensor.scale, tensor.blocks) = (spread(&scale, tensor.rows), blocks);
                tensors.insert(name, scale); // as every tensor that matters, for the fingerprint
            }
            tensors.insert(name, tensor);
        }
        Ok(Self { tensors })
    }

    /// A weight that the configuration asks for.
    ///
    /// # Panics
    /// If it does not: names come from the same list the folder was checked by.
    pub(crate) fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{name} is not on the list of expected tensors"))
    }

    /// All weights, ordered by name.
    pub(crate) fn sorted(&self) -> Vec<(&str, &Tensor)> {
        let mut all: Vec<_> = self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        all.sort_unstable_by_key(|(name, _)| *name);
        all
    }

    /// Tells the system how the mapped files will be read next; advice only.
    pub(crate) fn advise_sampling(&self, sampling: bool) {
        for tensor in self.tensors.values() {
            let Data::Mapped { file, start } = &tensor.data else { continue };
            file.advise(*start, tensor.bytes().len(), sampling);
        }
    }
}

/// What compressed-tensors and its like call the scale of a weight.
fn scale_of(weight: &str) -> String {
    format!("{weight}_scale")
}

/// What DeepSeek's files call it: to multiply by all the same, an inverse of what the weight was multiplied by.
fn inverse_of(weight: &str) -> String {
    format!("{weight}_scale_inv")
}

/// A scale for each of `rows` rows, or for each block.
fn spread(scale: &Tensor, rows: usize) -> Arc<[f32]> {
    match scale.to_f32()[..] {
        [one] => vec![one; rows].into(),
        ref all => all.into(),
    }
}

/// An index may only name files that lie in the folder itself, by their plain name.
fn is_plain_shard_name(file: &str) -> bool {
    let mut components = Path::new(file).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == file);
    plain && file.ends_with(".safetensors") && !file.contains(['/', '\\', '\0'])
}

/// One weight file and what its header says.
struct Shard {
    path: PathBuf,
    file: Arc<MappedFile>,
    entries: HashMap<String, Entry>,
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, Error> {
        let file = MappedFile::open(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let entries = header::parse(file.bytes()).map_err(|reason| Error::BadHeader { file: path.clone(), reason })?;
        Ok(Self { path, file: Arc::new(file), entries })
    }

    fn tensor(&self, name: &str, expected: &[usize]) -> Result<Tensor, Error> {
        match self.entries.get(name) {
            Some(entry) => self.tensor_of(name, entry, expected),
            None => Err(Error::MissingTensor {
                tensor: name.to_owned(),
                expected: expected.to_vec(),
                file: self.path.clone(),
            }),
        }
    }

    fn tensor_of(&self, name: &str, entry: &Entry, expected: &[usize]) -> Result<Tensor, Error> {
        let (tensor, file) = (|| name.to_owned(), || self.path.clone());
        if entry.shape != expected {
            let shape = entry.shape.clone();
            return Err(Error::TensorShape { tensor: tensor(), shape, expected: expected.to_vec(), file: file() });
        }
        let Some(dtype) = entry.dtype else {
            let (shape, dtype) = (entry.shape.clone(), entry.dtype_name.clone());
            return Err(Error::TensorDtype { tensor: tensor(), shape, dtype, file: file() });
        };
        let (rows, cols) = match *expected {
            [cols] => (1, cols),
            [rows, cols] => (rows, cols),
            _ => unreachable!("expected shapes are vectors and matrices"),
        };
        let data = Data::Mapped { file: self.file.clone(), start: entry.start };
        Ok(Tensor { data, dtype, rows, cols, scale: Arc::default(), blocks: false, first: 0 })
    }

    /// The scale of a weight, one for each row, for each block, or for all; and whether it is for blocks.
    fn scale(&self, name: &str, weight: &Tensor) -> Result<(Tensor, bool), Error> {
        let rows = weight.rows;
        let of_blocks = [rows.div_ceil(BLOCK), weight.cols.div_ceil(BLOCK)];
        let (shape, one, blocks): (&[usize], _, _) = match self.entries.get(name).map(|entry| entry.shape.as_slice()) {
            Some([] | [1] | [1, 1]) => (&[1], true, false),
            Some([n]) if *n == rows => (&[rows], false, false),
            Some(shape) if shape == of_blocks => (&of_blocks, false, true),
            _ => (&[rows, 1], false, false), // or an error that says so
        };
        let scale = match self.entries.get(name) {
            // An element is an element, whatever the shape around it.
            Some(entry) if one => self.tensor_of(name, &Entry { shape: vec![1], ..entry.clone() }, shape)?,
            _ => self.tensor(name, shape)?,
        };
        let usable = |scale: &f32| scale.is_finite() && *scale > 0.0;
        if scale.dtype.is_scaled() || !scale.to_f32().iter().all(usable) {
            return Err(Error::BadScale { tensor: name.to_owned(), file: self.path.clone() });
        }
        Ok((scale, blocks))
    }
}

#[cfg(test)]
mod tests;
