//! Weight files: safetensors, memory-mapped, used where they lie.
//!
//! ```text
//! file = [header length: u64 le][header: JSON name → {dtype, shape, data_offsets}][tensor bytes]
//! ```
//!
//! Weights stay in the type they are stored in and are widened while a kernel loads them, so a model costs its file's
//! size in page cache once, however many processes serve it, and nothing more. A folder holds one `model.safetensors` or
//! an index that says which shard holds which tensor.
//!
//! Everything in these files comes from outside: header lengths and offsets are checked against the file's real length,
//! shapes against the configuration, shard names against leaving the folder, before a byte of a tensor is touched.

use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;

use crate::{Error, ModelConfig, config::read_json};

pub(crate) mod expected;
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
}

impl Dtype {
    /// Size of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Its name in a safetensors header.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::Bf16, Self::F16, Self::F32].into_iter().find(|dtype| dtype.as_str() == name)
    }
}

/// One weight: a matrix of `rows × cols` (a vector is one row) inside a mapped file.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    file: Arc<MappedFile>,
    start: usize,
    pub(crate) dtype: Dtype,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Tensor {
    /// Its bytes: row-major, little-endian, of no particular alignment.
    pub(crate) fn bytes(&self) -> &[u8] {
        let len = self.rows * self.cols * self.dtype.bytes();
        &self.file.bytes()[self.start..self.start + len]
    }

    /// One row, widened into `out`.
    pub(crate) fn row_into(&self, row: usize, out: &mut [f32]) {
        let width = self.cols * self.dtype.bytes();
        widen(&self.bytes()[row * width..(row + 1) * width], self.dtype, out);
    }

    /// The whole of a small tensor (norms, biases), widened.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        widen(self.bytes(), self.dtype, &mut out);
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
        for (name, _) in expected::tensors(config) {
            let Some(file) = weight_map.get(&name) else { continue }; // reported below, with its shape
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
            let tensor = shard_of(&name, &shape)?.tensor(&name, &shape)?;
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
        self.tensors.values().for_each(|tensor| tensor.file.advise(tensor.start, tensor.bytes().len(), sampling));
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
        let (tensor, file) = (|| name.to_owned(), || self.path.clone());
        let Some(entry) = self.entries.get(name) else {
            return Err(Error::MissingTensor { tensor: tensor(), expected: expected.to_vec(), file: file() });
        };
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
        Ok(Tensor { file: self.file.clone(), start: entry.start, dtype, rows, cols })
    }
}

#[cfg(test)]
mod tests;
