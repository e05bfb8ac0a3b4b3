//! The safetensors header: parsed without trusting a number in it.
//!
//! Our own instead of the crate's because the crate adds up offsets unchecked before it compares them with the file
//! (an overflow panics in debug builds), and because an unknown dtype there is a parse error without a tensor's name.

use std::collections::HashMap;

use serde::Deserialize;

use super::Dtype;

/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const LENGTH_BYTES: usize = 8;

/// What a header says of one tensor; its bytes are known to lie inside the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) dtype: Option<Dtype>,
    pub(super) dtype_name: String,
    pub(super) shape: Vec<usize>,
    /// From the file's beginning.
    pub(super) start: usize,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// Parses the header of a whole file. An error is the reason in words.
pub(super) fn parse(file: &[u8]) -> Result<HashMap<String, Entry>, String> {
    let length = file.first_chunk::<LENGTH_BYTES>().ok_or("shorter than its header's length field")?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(format!("a header of {length} bytes is above the limit of {MAX_HEADER_BYTES}"));
    }
    let data_start = LENGTH_BYTES + length as usize;
    let header = file
        .get(LENGTH_BYTES..data_start)
        .ok_or_else(|| format!("a header of {length} bytes passes the end of the file"))?;
    let raw: HashMap<String, serde_json::Value> =
        serde_json::from_slice(header).map_err(|e| format!("header is not JSON: {e}"))?;
    let data_len = file.len() - data_start;
    raw.into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(|(name, value)| match entry(value, data_start, data_len) {
            Ok(entry) => Ok((name, entry)),
            Err(reason) => Err(format!("tensor {}: {reason}", name.chars().take(128).collect::<String>())),
        })
        .collect()
}

fn entry(value: serde_json::Value, data_start: usize, data_len: usize) -> Result<Entry, String> {
    let RawEntry { dtype: dtype_name, shape, data_offsets: [begin, end] } =
        serde_json::from_value(value).map_err(|e| e.to_string())?;
    if begin > end || end > data_len {
        return Err(format!("bytes {begin}..{end} are not within the {data_len} of the file's data"));
    }
    let dtype = Dtype::parse(&dtype_name);
    if let Some(dtype) = dtype {
        let bytes = shape.iter().try_fold(dtype.bytes(), |product, &dim| product.checked_mul(dim));
        if bytes != Some(end - begin) {
            let len = end - begin;
            return Err(format!("shape {shape:?} of {dtype_name} does not take the {len} bytes the offsets span"));
        }
    }
    let dtype_name = dtype_name.chars().take(32).collect();
    Ok(Entry { dtype, dtype_name, shape, start: data_start + begin })
}
