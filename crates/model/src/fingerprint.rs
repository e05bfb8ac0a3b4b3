//! The model fingerprint: BLAKE3 over what determines the KV and the logits.
//!
//! ```text
//! fingerprint = first 16 bytes of BLAKE3-derive-key(context,
//!     configuration ‖ for each tensor, ordered by name: len(name) ‖ name ‖ dtype ‖ rows ‖ cols ‖ contents)
//! configuration = the description of what is computed (`graph`) as JSON
//! contents      = all bytes of a tensor up to 4 MiB; of a larger one the first and the last 64 KiB
//!                 and 64 pages of 4 KiB spaced evenly over it
//! ```
//!
//! It is the same wherever the folder lies and however the weights are sharded; it leaves out what changes neither KV nor
//! logits (context length, end tokens, tensors the model does not use). Sampling keeps it quick: an 8-billion-parameter
//! model costs about 100 MiB of reads. The price: two models that differ only between the sampled pages of large
//! tensors look alike. Training or quantising touches every page, so this takes an adversary, who could lie about a
//! fingerprint anyway; and small models, whose tensors are all below 4 MiB, are hashed to the last byte.

use kvasir_types::ModelFingerprint;

use crate::{ModelConfig, cpu::Compute, weights::Weights};

/// Domain separation: bump the version when what is hashed changes.
const CONTEXT: &str = "kvasir 2026-11 model fingerprint v2";
const WHOLE_BYTES: usize = 4 << 20;
const END_BYTES: usize = 64 << 10;
const PAGE_BYTES: usize = 4 << 10;
const PAGES: usize = 64;

/// The fingerprint of a configuration with these weights.
pub(crate) fn compute(config: &ModelConfig, weights: &Weights) -> ModelFingerprint {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(canonical(config).as_bytes());
    weights.advise_sampling(true);
    for (name, tensor) in weights.sorted() {
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(tensor.dtype.as_str().as_bytes());
        hasher.update(&(tensor.rows as u64).to_le_bytes());
        hasher.update(&(tensor.cols as u64).to_le_bytes());
        sample(tensor.bytes(), |part| {
            hasher.update(part);
        });
    }
    weights.advise_sampling(false);
    let mut short = [0; 16];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    ModelFingerprint(short)
}

/// The configuration in one form, whatever the file's: all that [`ModelConfig`] serialises, so a field that changes what is
/// computed is covered as soon as it exists. Floats are written so that they read back as the same bits. Renaming a field
/// changes the fingerprints of all models, which costs a cold cache where versions are mixed.
fn canonical(config: &ModelConfig) -> String {
    serde_json::to_string(config).expect("a description is plain data")
}

/// The fingerprint of a model whose products are computed in this way. Exact ones are what the model's own says; others are
/// different numbers, so their keys and values must not meet.
pub(crate) fn computed(model: ModelFingerprint, compute: Compute) -> ModelFingerprint {
    match compute {
        Compute::Exact => model,
        Compute::Fast => {
            let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
            hasher.update(&model.0);
            hasher.update(b"fast products, attention too");
            let mut short = [0; 16];
            short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
            ModelFingerprint(short)
        }
    }
}

/// Hands the parts of a tensor that are hashed to `take`, in order.
fn sample(bytes: &[u8], mut take: impl FnMut(&[u8])) {
    if bytes.len() <= WHOLE_BYTES {
        return take(bytes);
    }
    let (first, last) = (&bytes[..END_BYTES], &bytes[bytes.len() - END_BYTES..]);
    take(first);
    // Rounded down to whole pages so that a page sampled is one page read (tensors start at arbitrary offsets, so it
    // may be two).
    let step = bytes.len() / PAGES / PAGE_BYTES * PAGE_BYTES;
    for page in 0..PAGES {
        take(&bytes[page * step..page * step + PAGE_BYTES]);
    }
    take(last);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_and_fast_products_are_different_models() {
        let model = ModelFingerprint([7; 16]);
        assert_eq!(computed(model, Compute::Exact), model);
        assert_ne!(computed(model, Compute::Fast), model);
    }

    #[test]
    fn small_tensors_are_hashed_whole_and_large_ones_from_end_to_end() {
        let mut total = 0;
        sample(&vec![0; WHOLE_BYTES], |part| total += part.len());
        assert_eq!(total, WHOLE_BYTES);

        let big: Vec<u8> = vec![0; 3 * WHOLE_BYTES + 12_345];
        let (mut parts, mut end) = (0, 0);
        sample(&big, |part| {
            parts += 1;
            end = part.as_ptr() as usize + part.len() - big.as_ptr() as usize;
        });
        assert_eq!((parts, end), (PAGES + 2, big.len()));
    }
}
