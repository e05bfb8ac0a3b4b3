//! Named shapes: model folders with the dimensions of published models and random weights, for measuring without a network.
//!
//! Speed depends on a model's dimensions, not on what it has learned, so a benchmark needs no download: a shape is a
//! `config.json` and, written by [`Shape::write`], weights in bf16 that are a pure function of the seed. Other programs
//! read the same folder, so that they are measured on the same weights.
//!
//! The weights are drawn so that activations keep the size they have in a trained model: a matrix of `n` columns has a
//! standard deviation of `n^-1/2`, an embedding of `3 n^-1/2`, which gives logits that differ (a standard deviation of about
//! 3) instead of the flat ones of an untrained initialisation. What training alone makes, outlier channels above all, is
//! missing: what rounding costs on a shape is less than what it costs on a model people use.

use std::{
    fs,
    io::{self, BufWriter, Write},
    path::Path,
};

use serde_json::{Map, Value, json};

use crate::{Error, ModelConfig, weights::expected};

/// A published model's dimensions under a short name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// How it is asked for.
    pub name: &'static str,
    config: &'static str,
}

/// All there are.
pub const SHAPES: [Shape; 10] = [
    Shape { name: "qwen3-tiny", config: include_str!("shapes/qwen3-tiny.json") },
    Shape { name: "qwen3-0.6b", config: include_str!("shapes/qwen3-0.6b.json") },
    Shape { name: "qwen3-1.7b", config: include_str!("shapes/qwen3-1.7b.json") },
    Shape { name: "qwen3-4b", config: include_str!("shapes/qwen3-4b.json") },
    Shape { name: "qwen2.5-0.5b", config: include_str!("shapes/qwen2.5-0.5b.json") },
    Shape { name: "llama-3.2-1b", config: include_str!("shapes/llama-3.2-1b.json") },
    Shape { name: "llama-3.1-8b", config: include_str!("shapes/llama-3.1-8b.json") },
    Shape { name: "gemma-3-1b", config: include_str!("shapes/gemma-3-1b.json") },
    Shape { name: "mixtral-tiny", config: include_str!("shapes/mixtral-tiny.json") },
    Shape { name: "deepseek-tiny", config: include_str!("shapes/deepseek-tiny.json") },
];

/// Written last into a folder: what it was made from. A folder without it is not whole.
const STAMP: &str = "kvasir-shape.json";
/// Part of the stamp: raised when the same seed gives other weights.
const VERSION: u32 = 1;

impl Shape {
    /// One of a test's own.
    #[cfg(test)]
    pub(crate) fn of(name: &'static str, config: &'static str) -> Self {
        Self { name, config }
    }

    /// The shape of that name.
    pub fn named(name: &str) -> Option<Self> {
        SHAPES.into_iter().find(|shape| shape.name == name)
    }

    /// Makes `dir` a model folder of this shape, unless it is one with these weights already. `progress` hears how many
    /// bytes of how many are written. Someone who reads `dir` meanwhile finds no configuration in it.
    ///
    /// # Errors
    /// What cannot be written, and where.
    pub fn write(self, dir: &Path, seed: u64, progress: &mut dyn FnMut(u64, u64)) -> Result<(), Error> {
        let config = blake3::hash(self.config.as_bytes()).to_hex();
        let stamp =
            json!({ "shape": self.name, "seed": seed, "config": config.as_str(), "version": VERSION }).to_string();
        let stamp_path = dir.join(STAMP);
        if fs::read_to_string(&stamp_path).is_ok_and(|found| found == stamp) {
            return Ok(());
        }
        let config_path = dir.join("config.json");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Write { path, source }
        };
        fs::create_dir_all(dir).map_err(failed(dir))?;
        for old in [&stamp_path, &config_path] {
            fs::remove_file(old).or_else(absent_is_fine).map_err(failed(old))?;
        }
        // The configuration is read back by the same reader as any folder's, so a shape can't ask for less than a model.
        let draft = dir.join("draft");
        fs::create_dir_all(&draft).map_err(failed(&draft))?;
        let drafted = draft.join("config.json");
        fs::write(&drafted, self.config).map_err(failed(&drafted))?;
        let config = ModelConfig::read(&draft)?;

        let weights = dir.join("model.safetensors");
        write_weights(&weights, &config, seed, progress).map_err(failed(&weights))?;
        fs::rename(&drafted, &config_path).map_err(failed(&config_path))?;
        fs::remove_dir(&draft).map_err(failed(&draft))?;
        fs::write(&stamp_path, stamp).map_err(failed(&stamp_path))
    }
}

fn absent_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// Every tensor in bf16, in the order of the list.
fn write_weights(path: &Path, config: &ModelConfig, seed: u64, progress: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
    let tensors = expected::tensors(config);
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" })); // transformers opens no file without it
    let mut end = 0;
    for (name, shape) in &tensors {
        let start = end;
        end += 2 * shape.iter().map(|&n| n as u64).product::<u64>();
        header.insert(name.clone(), json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }));
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // So that tensors begin at cache lines: products of a few tokens with unaligned rows take up to twice as long.
    header.resize((header.len() + 8).next_multiple_of(64) - 8, b' ');
    let mut file = BufWriter::with_capacity(1 << 20, fs::File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut written = 0;
    for (name, shape) in &tensors {
        let mut random = Normal::new(seed, name);
        let (mean, deviation) = distribution(name, shape, config.final_norm.offset);
        for _ in 0..shape.iter().product::<usize>() {
            file.write_all(&half::bf16::from_f32(mean + deviation * random.next()).to_le_bytes())?;
        }
        written += 2 * shape.iter().map(|&n| n as u64).product::<u64>();
        progress(written, end);
    }
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// Mean and standard deviation of a tensor's elements; see the module's page. What norms multiply by is around one, wherever
/// their weights are offsets from.
fn distribution(name: &str, shape: &[usize], norm_offset: f32) -> (f32, f32) {
    let columns = shape.last().map_or(1.0, |&n| n as f32);
    match shape {
        [_] if name.ends_with("norm.weight") => (1.0 - norm_offset, 0.1),
        [_] => (0.0, 0.02), // biases
        _ if name == expected::EMBEDDING || name == expected::LM_HEAD => (0.0, 3.0 / columns.sqrt()),
        _ => (0.0, 1.0 / columns.sqrt()),
    }
}

/// Nearly normal numbers: sums of four uniform ones, scaled to mean 0 and variance 1, none beyond 3.5. Any order of tensors
/// gives each the same numbers.
struct Normal(u64);

impl Normal {
    fn new(seed: u64, tensor: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(tensor.as_bytes());
        let mut start = [0; 8];
        start.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        Self(u64::from_le_bytes(start))
    }

    /// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014), one step a number.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let sum = (z & 0xffff) + ((z >> 16) & 0xffff) + ((z >> 32) & 0xffff) + (z >> 48);
        // Four uniform 16-bit numbers: mean 4 × 65535/2, variance 4 × 65536²/12.
        (sum as f32 - 131_070.0) * (1.0 / 37_837.2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Folder;

    #[test]
    fn every_shape_has_a_configuration_of_its_own_size() {
        let parameters = |shape: Shape| {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("config.json"), shape.config).unwrap();
            let config = ModelConfig::read(dir.path()).unwrap();
            expected::tensors(&config).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>()
        };
        let billions: Vec<_> =
            SHAPES.iter().map(|shape| (shape.name, (parameters(*shape) as f64 / 1e7).round() / 100.0)).collect();
        // As published; the names say less than the embeddings weigh.
        let published = [
            ("qwen3-tiny", 0.0),
            ("qwen3-0.6b", 0.6),
            ("qwen3-1.7b", 1.72),
            ("qwen3-4b", 4.02),
            ("qwen2.5-0.5b", 0.49),
            ("llama-3.2-1b", 1.24),
            ("llama-3.1-8b", 8.03),
            ("gemma-3-1b", 1.0),
            ("mixtral-tiny", 0.0),
            ("deepseek-tiny", 0.0),
        ];
        assert_eq!(billions, published);
    }

    #[test]
    fn a_folder_is_written_once_and_is_a_function_of_the_seed() {
        let dir = tempfile::tempdir().unwrap();
        let shape = Shape::named("qwen3-tiny").unwrap();
        let fingerprint = |place: &str, seed| {
            let dir = dir.path().join(place);
            let mut calls = 0;
            shape.write(&dir, seed, &mut |_, _| calls += 1).unwrap();
            (Folder::open(&dir).unwrap().fingerprint(), calls > 0)
        };
        let (first, written) = fingerprint("a", 1);
        assert!(written);
        assert_eq!(fingerprint("a", 1), (first, false));
        assert_eq!(fingerprint("b", 1), (first, true));
        let (other, written) = fingerprint("a", 2);
        assert!(written && other != first);
    }

    #[test]
    fn a_folder_that_was_not_finished_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let shape = Shape::named("qwen3-tiny").unwrap();
        shape.write(dir.path(), 1, &mut |_, _| {}).unwrap();
        let fingerprint = Folder::open(dir.path()).unwrap().fingerprint();
        fs::remove_file(dir.path().join(STAMP)).unwrap();
        fs::write(dir.path().join("model.safetensors"), "half of it").unwrap();
        shape.write(dir.path(), 1, &mut |_, _| {}).unwrap();
        assert_eq!(Folder::open(dir.path()).unwrap().fingerprint(), fingerprint);
    }

    #[test]
    fn every_small_shape_opens_as_a_model() {
        let dir = tempfile::tempdir().unwrap();
        for shape in SHAPES.into_iter().filter(|shape| shape.name.ends_with("-tiny")) {
            let dir = dir.path().join(shape.name);
            shape.write(&dir, 1, &mut |_, _| {}).unwrap();
            assert_eq!(Folder::open(&dir).unwrap().config().max_len, 8192, "{}", shape.name);
        }
    }

    #[test]
    fn numbers_are_normal_enough() {
        let mut random = Normal::new(7, "x");
        let numbers: Vec<f64> = (0..100_000).map(|_| f64::from(random.next())).collect();
        let moment = |power| numbers.iter().map(|x| x.powi(power)).sum::<f64>() / 1e5;
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.02 && moment(3).abs() < 0.05);
        assert!(numbers.iter().all(|x| x.abs() < 3.5));
    }
}
