//! A folder with 8-bit weights, made of one without: half the memory of bf16, and nearly twice the speed of decoding.
//!
//! Every linear map of every layer is rounded to nearest, row by row (or block by block of 128 × 128), against the row's or
//! block's largest weight:
//!
//! ```text
//! int8: scale = max |w| / 127,  q = round(w / scale)            fp8: scale = max |w| / 448,  q = e4m3(w / scale)
//! ```
//!
//! Embedding, output projection, norms, biases and what routes tokens to experts stay as they are, as with llm-compressor:
//! the first two are a table and the logits themselves, and a router's rounding flips choices. The folder is one that vLLM
//! and transformers read as well (compressed-tensors, weights only; blocks as DeepSeek's and Qwen's own files have them).

use std::{
    fs,
    io::{self, BufWriter, Write},
    path::Path,
};

use serde_json::{Map, Value, json};

use crate::{
    Error, Folder,
    config::read_json,
    weights::{BLOCK, Dtype, Tensor, expected, fp8},
};

/// Larger than any real `config.json` by two orders of magnitude.
const MAX_JSON_BYTES: u64 = 4 << 20;

/// What weights are rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Whole numbers of -127 to 127.
    Int8,
    /// Floats of four exponent and three mantissa bits (e4m3).
    Fp8,
    /// The same, with a scale for each block of 128 × 128 weights.
    Fp8Block,
}

impl Scheme {
    /// The scheme of a name: `int8`, `fp8` or `fp8-block`.
    pub fn parse(name: &str) -> Option<Self> {
        [("int8", Self::Int8), ("fp8", Self::Fp8), ("fp8-block", Self::Fp8Block)]
            .into_iter()
            .find(|(known, _)| *known == name)
            .map(|(_, scheme)| scheme)
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::Int8 => Dtype::I8,
            Self::Fp8 | Self::Fp8Block => Dtype::F8,
        }
    }

    /// The largest value there is.
    fn largest(self) -> f32 {
        match self {
            Self::Int8 => 127.0,
            Self::Fp8 | Self::Fp8Block => fp8::MAX,
        }
    }

    /// Rows and columns that share a scale, of a matrix so wide.
    fn shared(self, cols: usize) -> (usize, usize) {
        match self {
            Self::Int8 | Self::Fp8 => (1, cols),
            Self::Fp8Block => (BLOCK, BLOCK),
        }
    }

    /// The scale of some weights.
    fn scale(self, weights: impl Iterator<Item = f32>) -> f32 {
        let largest = weights.fold(0.0f32, |largest, weight| largest.max(weight.abs()));
        // Zeros have no size; and a scale must not vanish in f32.
        if largest > f32::MIN_POSITIVE * self.largest() { largest / self.largest() } else { 1.0 }
    }

    fn round(self, weight: f32, scale: f32) -> u8 {
        match self {
            Self::Int8 => ((weight / scale).round_ties_even().clamp(-127.0, 127.0) as i8).cast_unsigned(),
            Self::Fp8 | Self::Fp8Block => fp8::from_f32(weight / scale),
        }
    }

    /// What its scales are called.
    fn scale_of(self, weight: &str) -> String {
        match self {
            Self::Int8 | Self::Fp8 => format!("{weight}_scale"),
            Self::Fp8Block => format!("{weight}_scale_inv"),
        }
    }
}

/// What became of a model's weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Matrices rounded.
    pub rounded: usize,
    /// Tensors left as they were.
    pub kept: usize,
    /// Bytes of all tensors before.
    pub bytes_before: u64,
    /// And after.
    pub bytes_after: u64,
    /// Root of the mean squared rounding error, relative to that of the weights rounded.
    pub relative_error: f64,
}

/// Writes to `to` what the model folder `from` becomes by `scheme`: weights, configuration, and every other small file
/// (tokenizer, templates) unchanged.
///
/// # Errors
/// `from` is not a folder we can serve or is quantised already; a file cannot be written; `to` holds a model already.
pub fn quantize(from: &Path, to: &Path, scheme: Scheme) -> Result<Report, Error> {
    let folder = Folder::open(from)?;
    let tensors = expected::tensors(folder.config());
    let tensors: Vec<_> = (tensors.into_iter())
        .map(|(name, shape)| (folder.weights().get(&name), name, shape))
        .map(|(tensor, name, shape)| Stored { name, shape, tensor })
        .collect();
    if tensors.iter().any(|stored| stored.tensor.dtype.is_scaled()) {
        let reason = "these weights are 8-bit already".to_owned();
        return Err(Error::Config { path: from.join("config.json"), key: "quantization_config", reason });
    }
    let write = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Write { path, source }
    };
    fs::create_dir_all(to).map_err(write(to))?;
    let weights = to.join("model.safetensors");
    let config = to.join("config.json");
    for path in [&weights, &config] {
        if path.exists() {
            return Err(write(path)(io::ErrorKind::AlreadyExists.into()));
        }
    }
    for entry in fs::read_dir(from).map_err(write(from))? {
        let path = entry.map_err(write(from))?.path();
        let name = path.file_name().unwrap_or_default();
        let other = !["config.json", "model.safetensors.index.json"].iter().any(|known| name == *known);
        let small = path.extension().is_some_and(|kind| ["json", "jinja", "txt", "model"].iter().any(|k| kind == *k));
        if other && small && path.is_file() {
            fs::copy(&path, to.join(name)).map_err(write(&path))?;
        }
    }
    let report = write_weights(&tensors, &weights, scheme).map_err(write(&weights))?;

    // Last: without it the folder is none.
    let mut json: Map<String, Value> = read_json(&from.join("config.json"), MAX_JSON_BYTES)?;
    json.insert("quantization_config".into(), description(scheme));
    let text = serde_json::to_string_pretty(&json).expect("JSON of JSON");
    fs::write(&config, text + "\n").map_err(write(&config))?;
    Ok(report)
}

/// What compressed-tensors, or DeepSeek, calls it.
fn description(scheme: Scheme) -> Value {
    let (kind, format) = match scheme {
        Scheme::Int8 => ("int", "int-quantized"),
        Scheme::Fp8 => ("float", "float-quantized"),
        Scheme::Fp8Block => {
            return json!({
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
            });
        }
    };
    let weights = json!({
        "num_bits": 8, "type": kind, "symmetric": true, "strategy": "channel", "dynamic": false, "group_size": null,
        "block_structure": null, "actorder": null, "observer": "minmax", "observer_kwargs": {},
    });
    json!({
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": weights, "input_activations": null, "output_activations": null,
        }},
        "ignore": ["lm_head", "re:.*\\.gate$"], "kv_cache_scheme": null, "global_compression_ratio": null,
    })
}

/// A tensor as it lies in the folder.
struct Stored<'a> {
    name: String,
    shape: Vec<usize>,
    tensor: &'a Tensor,
}

impl Stored<'_> {
    /// Whether it is the weight of a linear map that may be rounded.
    fn rounds(&self) -> bool {
        let kept = [expected::EMBEDDING, expected::LM_HEAD].contains(&self.name.as_str());
        self.shape.len() == 2 && !kept && self.name.ends_with(".weight") && !self.name.ends_with(".gate.weight")
    }
}

fn write_weights(tensors: &[Stored<'_>], path: &Path, scheme: Scheme) -> io::Result<Report> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let (mut end, mut report) = (0, Report::default());
    let mut place = |name: String, dtype: Dtype, shape: Vec<usize>| {
        let start = end;
        end += dtype.bytes() * shape.iter().product::<usize>();
        header.insert(name, json!({ "dtype": dtype.as_str(), "shape": shape, "data_offsets": [start, end] }));
    };
    // Weights first, each a multiple of a cache line as a rule, so that rows begin where lines do; scales after all.
    for stored in tensors {
        let dtype = if stored.rounds() { scheme.dtype() } else { stored.tensor.dtype };
        place(stored.name.clone(), dtype, stored.shape.clone());
    }
    for stored in tensors.iter().filter(|stored| stored.rounds()) {
        let (rows, cols) = scheme.shared(stored.tensor.cols);
        let shape = vec![stored.tensor.rows.div_ceil(rows), stored.tensor.cols.div_ceil(cols)];
        place(scheme.scale_of(&stored.name), Dtype::F32, shape);
    }
    report.bytes_after = end as u64;
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize((text.len() + 8).next_multiple_of(64) - 8, b' ');

    let mut file = BufWriter::with_capacity(1 << 20, fs::File::create(path)?);
    file.write_all(&(text.len() as u64).to_le_bytes())?;
    file.write_all(&text)?;
    let (mut scales, mut errors, mut squares) = (Vec::new(), 0.0, 0.0);
    for stored @ Stored { tensor, .. } in tensors {
        report.bytes_before += tensor.bytes().len() as u64;
        if !stored.rounds() {
            report.kept += 1;
            file.write_all(tensor.bytes())?;
            continue;
        }
        report.rounded += 1;
        let (height, width) = scheme.shared(tensor.cols);
        for first in (0..tensor.rows).step_by(height) {
            let mut band = vec![vec![0.0; tensor.cols]; height.min(tensor.rows - first)];
            band.iter_mut().enumerate().for_each(|(i, row)| tensor.row_into(first + i, row));
            let (mut rounded, mut back) = (vec![0; tensor.cols], vec![0.0; tensor.cols]);
            let pieces = (0..tensor.cols).step_by(width).map(|col| col..tensor.cols.min(col + width));
            let of_band: Vec<f32> = pieces
                .map(|piece| scheme.scale(band.iter().flat_map(|row| row[piece.clone()].iter().copied())))
                .collect();
            for row in &band {
                let scale = |col: usize| of_band[col / width];
                rounded.iter_mut().zip(row).enumerate().for_each(|(i, (to, &w))| *to = scheme.round(w, scale(i)));
                file.write_all(&rounded)?;
                crate::weights::widen(&rounded, scheme.dtype(), &mut back);
                for (i, (weight, back)) in row.iter().zip(&back).enumerate() {
                    errors += f64::from(weight - back * scale(i)).powi(2);
                    squares += f64::from(*weight).powi(2);
                }
            }
            scales.extend(of_band);
        }
    }
    for scale in scales {
        file.write_all(&scale.to_le_bytes())?;
    }
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    report.relative_error = if squares > 0.0 { (errors / squares).sqrt() } else { 0.0 };
    Ok(report)
}

#[cfg(test)]
mod tests;
