//! Rounded weights: how far from the original, read back the same, and a model that still answers.

use std::{path::PathBuf, sync::Arc};

use kvasir_types::{BlockId, KvDtype, TokenId};

use super::*;
use crate::{
    Backend, SeqInput,
    cpu::{Compute, CpuBackend, HostArena},
};

fn model(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models").join(name)
}

/// The logits after each of some tokens, computed by `compute`.
fn logits(dir: &Path, compute: Compute, kv: KvDtype) -> Vec<Vec<f32>> {
    let folder = Folder::open(dir).unwrap();
    let layout = folder.kv_layout(16, kv);
    let arena = HostArena::new(3 * layout.block_bytes()).unwrap();
    let mut backend = CpuBackend::with_compute(&folder, layout, arena, 2, compute).unwrap();
    let tokens: Vec<_> = (0..41).map(|i| TokenId(i * 37 % 1532)).collect();
    let tables = [(0..3).map(BlockId).collect()];
    let input = SeqInput { tokens: &tokens, start: 0, tables: &tables, rows: tokens.len() };
    backend.forward(&[input], &mut |_| {}).unwrap().iter().map(<[f32]>::to_vec).collect()
}

/// Root of the mean squared difference, relative to the spread of `a`.
fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    let flat = |rows: &[Vec<f32>]| rows.iter().flatten().map(|&v| f64::from(v)).collect::<Vec<_>>();
    let (a, b) = (flat(a), flat(b));
    let mean = a.iter().sum::<f64>() / a.len() as f64;
    let spread: f64 = a.iter().map(|a| (a - mean).powi(2)).sum();
    (a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / spread).sqrt()
}

#[test]
fn a_weight_is_off_by_half_a_step_at_most() {
    let row: Vec<f32> = (0..999).map(|i| ((i * 7919 % 1000) as f32 - 500.0) * 0.37e-3).collect();
    let largest = row.iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
    let mut back = vec![0.0; row.len()];
    let round = |scheme: Scheme, row: &[f32]| {
        let scale = scheme.scale(row.iter().copied());
        (scale, row.iter().map(|&weight| scheme.round(weight, scale)).collect::<Vec<u8>>())
    };
    for scheme in [Scheme::Int8, Scheme::Fp8] {
        let (scale, rounded) = round(scheme, &row);
        crate::weights::widen(&rounded, scheme.dtype(), &mut back);
        for (weight, back) in row.iter().zip(&back) {
            let step = match scheme {
                Scheme::Int8 => largest / 127.0,
                // Three bits of mantissa, and steps of 2⁻⁹ of the scale below the smallest normal number.
                Scheme::Fp8 | Scheme::Fp8Block => (weight.abs() / 8.0).max(scale / 512.0),
            };
            assert!((weight - back * scale).abs() <= step * 0.5001, "{scheme:?} {weight} {}", back * scale);
        }
    }
    for scheme in [Scheme::Int8, Scheme::Fp8] {
        assert_eq!(round(scheme, &[0.0; 5]), (1.0, vec![0; 5]));
        let (tiny, _) = round(scheme, &[1e-42, -1e-42]);
        assert!(tiny > 0.0 && tiny.is_finite());
    }
}

#[test]
fn a_rounded_model_reads_back_and_answers_nearly_the_same() {
    for name in ["demo", "tiny/qwen2-tied", "tiny/llama3-untied"] {
        let exact = logits(&model(name), Compute::Exact, KvDtype::F32);
        // Seen: 0.007 and 0.028 on the demo model; 0.037 and 0.17 on random weights, whose layers amplify more.
        for (scheme, limit) in [(Scheme::Int8, 0.06), (Scheme::Fp8, 0.25), (Scheme::Fp8Block, 0.25)] {
            let out = tempfile::tempdir().unwrap();
            let report = quantize(&model(name), out.path(), scheme).unwrap();
            assert!(report.rounded > 0 && report.kept > 0 && report.bytes_after < report.bytes_before, "{report:?}");
            let error = if scheme == Scheme::Int8 { 0.02 } else { 0.04 };
            assert!((0.001..error).contains(&report.relative_error), "{report:?}");
            let original = Folder::open(&model(name)).unwrap().fingerprint();
            assert_ne!(Folder::open(out.path()).unwrap().fingerprint(), original);

            let rounded = logits(out.path(), Compute::Exact, KvDtype::F32);
            let moved = distance(&exact, &rounded);
            println!("{name} {scheme:?}: weights {:.4}, logits {moved:.4}", report.relative_error);
            assert!((1e-6..limit).contains(&moved), "{name} {scheme:?}: {moved}");
            let fast = logits(out.path(), Compute::Fast, KvDtype::F32);
            assert!(distance(&rounded, &fast) < 0.05, "{name} {scheme:?}");

            assert!(quantize(out.path(), &out.path().join("again"), scheme).is_err());
            assert!(quantize(&model(name), out.path(), scheme).is_err(), "a model is there already");
        }
    }
}

/// The kernels' scale is the folder's: against the same weights multiplied out and stored as `f32`.
#[test]
fn a_scaled_weight_is_its_bytes_times_its_scale() {
    for (name, scheme) in
        [("tiny/qwen3-f32", Scheme::Int8), ("demo", Scheme::Fp8Block), ("tiny/deepseek-v3", Scheme::Fp8Block)]
    {
        is_its_bytes_times_its_scale(name, scheme);
    }
}

fn is_its_bytes_times_its_scale(name: &str, scheme: Scheme) {
    let (out, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let name = model(name);
    quantize(&name, out.path(), scheme).unwrap();
    let folder = Folder::open(out.path()).unwrap();
    let mut header = Map::new();
    let mut data = Vec::new();
    for (name, shape) in expected::tensors(folder.config()) {
        let start = data.len();
        data.extend(folder.weights().get(&name).to_f32().iter().flat_map(|v| v.to_le_bytes()));
        header.insert(name, json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] }));
    }
    let header = Value::Object(header).to_string().into_bytes();
    let file = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
    fs::write(plain.path().join("model.safetensors"), file).unwrap();
    fs::copy(name.join("config.json"), plain.path().join("config.json")).unwrap();
    let moved = distance(
        &logits(out.path(), Compute::Exact, KvDtype::F32),
        &logits(plain.path(), Compute::Exact, KvDtype::F32),
    );
    assert!(moved < 1e-5, "{name:?}: {moved}");
}

/// A chunked prompt has a whole one's bits where blocks share a scale too.
#[test]
fn blocks_keep_the_law() {
    let out = tempfile::tempdir().unwrap();
    quantize(&model("demo"), out.path(), Scheme::Fp8Block).unwrap();
    let whole = logits(out.path(), Compute::Exact, KvDtype::F16);
    assert_eq!(in_chunks(out.path(), KvDtype::F16), whole[40]);
}

#[test]
fn a_scale_that_is_missing_or_no_number_is_refused() {
    let out = tempfile::tempdir().unwrap();
    quantize(&model("tiny/qwen3-f32"), out.path(), Scheme::Fp8).unwrap();
    let path = out.path().join("model.safetensors");
    let good = fs::read(&path).unwrap();
    let scale = good.len() - 4;
    let mut bad = good.clone();
    for value in [0.0f32, -1.0, f32::NAN, f32::INFINITY] {
        bad[scale..].copy_from_slice(&value.to_le_bytes());
        fs::write(&path, &bad).unwrap();
        assert!(matches!(Folder::open(out.path()), Err(Error::BadScale { .. })), "{value}");
    }
    let at = good.windows(19).position(|bytes| bytes == b"q_proj.weight_scale").unwrap();
    let mut bad = good;
    bad[at..at + 19].copy_from_slice(b"q_proj.weight_skale");
    fs::write(&path, &bad).unwrap();
    let error = Folder::open(out.path()).unwrap_err();
    assert!(
        matches!(&error, Error::MissingTensor { tensor, .. } if tensor.ends_with("q_proj.weight_scale")),
        "{error}"
    );
}

/// Keys and values in fp8 keep the law (nothing depends on the cut) and cost what their three bits say.
#[test]
fn fp8_keys_and_values_stay_near() {
    let exact = logits(&model("demo"), Compute::Exact, KvDtype::F32);
    let fp8 = logits(&model("demo"), Compute::Exact, KvDtype::Fp8);
    let moved = distance(&exact, &fp8);
    println!("fp8 KV: logits {moved:.4}");
    assert!((1e-4..0.15).contains(&moved), "{moved}");

    assert_eq!(in_chunks(&model("demo"), KvDtype::Fp8), fp8[40]);
}

/// The logits after the last of the tokens of [`logits`], computed seven at a time.
fn in_chunks(dir: &Path, kv: KvDtype) -> Vec<f32> {
    let folder = Folder::open(dir).unwrap();
    let layout = folder.kv_layout(16, kv);
    let arena = HostArena::new(3 * layout.block_bytes()).unwrap();
    let mut backend = CpuBackend::new(&folder, layout, arena as Arc<_>, 2).unwrap();
    let tokens: Vec<_> = (0..41).map(|i| TokenId(i * 37 % 1532)).collect();
    let tables = [(0..3).map(BlockId).collect()];
    let mut last = Vec::new();
    for start in (0..41).step_by(7) {
        let tokens = &tokens[start..(start + 7).min(41)];
        last = backend.forward(&[SeqInput { tokens, start, tables: &tables, rows: 1 }], &mut |_| {}).unwrap().rows;
    }
    last
}
