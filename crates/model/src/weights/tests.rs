use std::fs;

use proptest::prelude::*;
use safetensors::{Dtype as FileDtype, tensor::TensorView};

use super::*;
use crate::{Folder, fingerprint};

/// A one-layer model of 8 × 4 and the like, small enough to write by hand.
const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "tie_word_embeddings": true, "eos_token_id": 2}"#;

type Tensors = Vec<(String, FileDtype, Vec<usize>, Vec<u8>)>;

/// All tensors the configuration asks for, with numbers that depend on name and place.
fn good() -> Tensors {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    let config = ModelConfig::read(dir.path()).unwrap();
    let number = |name: &str, i: usize| ((name.len() * 31 + i * 7) % 100) as f32 / 50.0 - 1.0;
    expected::tensors(&config)
        .into_iter()
        .map(|(name, shape)| {
            let count = shape.iter().product();
            let bytes = (0..count).flat_map(|i| half::bf16::from_f32(number(&name, i)).to_le_bytes()).collect();
            (name, FileDtype::BF16, shape, bytes)
        })
        .collect()
}

fn serialize(tensors: &Tensors) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn open(files: &[(&str, &[u8])]) -> Result<Folder, Error> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    Folder::open(dir.path())
}

fn open_single(tensors: &Tensors) -> Result<Folder, Error> {
    open(&[("model.safetensors", &serialize(tensors))])
}

fn index(tensors: &Tensors, file_of: impl Fn(usize) -> String) -> Vec<u8> {
    let map: HashMap<_, _> = tensors.iter().enumerate().map(|(i, tensor)| (&tensor.0, file_of(i))).collect();
    serde_json::json!({"metadata": {}, "weight_map": map}).to_string().into_bytes()
}

#[test]
fn a_tensor_holds_what_was_written() {
    let tensors = good();
    let folder = open_single(&tensors).unwrap();
    for (name, _, _, bytes) in &tensors {
        assert_eq!(folder.weights().get(name).bytes(), bytes.as_slice());
    }
    let embedding = folder.weights().get(EMBEDDING);
    let mut row = vec![0.0; 8];
    embedding.row_into(3, &mut row);
    assert_eq!(row, embedding.to_f32()[24..32]);
}

#[test]
fn shards_and_one_file_are_the_same_model() {
    let tensors = good();
    let (odd, even): (Vec<_>, Vec<_>) = tensors.iter().cloned().enumerate().partition(|(i, _)| i % 2 == 1);
    let shard = |part: Vec<(usize, _)>| serialize(&part.into_iter().map(|(_, tensor)| tensor).collect());
    let sharded = open(&[
        ("model-0.safetensors", &shard(even)),
        ("model-1.safetensors", &shard(odd)),
        ("model.safetensors.index.json", &index(&tensors, |i| format!("model-{}.safetensors", i % 2))),
    ])
    .unwrap();
    assert_eq!(sharded.fingerprint(), open_single(&tensors).unwrap().fingerprint());
}

#[test]
fn every_changed_byte_of_a_small_model_changes_its_fingerprint() {
    let mut tensors = good();
    let before = open_single(&tensors).unwrap().fingerprint();
    for i in 0..tensors.len() {
        for at in [0, tensors[i].3.len() / 2, tensors[i].3.len() - 1] {
            tensors[i].3[at] ^= 1;
            assert_ne!(open_single(&tensors).unwrap().fingerprint(), before, "{} byte {at}", tensors[i].0);
            tensors[i].3[at] ^= 1;
        }
    }
    assert_eq!(open_single(&tensors).unwrap().fingerprint(), before);
}

#[test]
fn the_fingerprint_covers_the_arithmetic_and_not_the_context_length() {
    let folder = open_single(&good()).unwrap();
    let of = |change: fn(&mut ModelConfig)| {
        let mut config = folder.config().clone();
        change(&mut config);
        fingerprint::compute(&config, folder.weights())
    };
    assert_eq!(of(|_| {}), folder.fingerprint());
    assert_eq!(of(|c| c.max_len = 32), folder.fingerprint());
    assert_eq!(of(|c| c.eos.clear()), folder.fingerprint());
    assert_ne!(of(|c| c.final_norm.eps *= 2.0), folder.fingerprint());
    assert_ne!(of(|c| c.ropes[0].theta += 1.0), folder.fingerprint());
    assert_ne!(of(|c| c.layers[0].attention.window = Some(8)), folder.fingerprint());
    assert_ne!(of(|c| c.layers[0].attention.scale *= 1.0000001), folder.fingerprint());
    assert_ne!(of(|c| c.final_soft_cap = Some(30.0)), folder.fingerprint());
}

#[test]
fn a_missing_tensor_is_named_with_its_shape_and_file() {
    let mut tensors = good();
    tensors.retain(|(name, ..)| !name.ends_with("up_proj.weight"));
    let error = open_single(&tensors).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: tensor model.layers.0.mlp.up_proj.weight of shape [12, 8]"), "{error}");
    let sharded = open(&[
        ("a.safetensors", &serialize(&tensors)),
        ("model.safetensors.index.json", &index(&tensors, |_| "a.safetensors".into())),
    ]);
    let error = sharded.unwrap_err().to_string();
    assert!(error.contains("index.json: tensor model.layers.0.mlp.up_proj.weight of shape [12, 8]"), "{error}");
}

#[test]
fn a_misshapen_tensor_is_named_with_both_shapes() {
    let mut tensors = good();
    tensors.iter_mut().find(|tensor| tensor.0.contains("k_proj")).unwrap().2 = vec![8, 4];
    let error = open_single(&tensors).unwrap_err().to_string();
    assert!(error.contains("k_proj.weight has shape [8, 4], expected [4, 8]"), "{error}");
}

#[test]
fn a_tensor_of_another_type_is_named_with_it() {
    let mut tensors = good();
    tensors.iter_mut().find(|tensor| tensor.0.contains("k_proj")).unwrap().1 = FileDtype::I16;
    let error = open_single(&tensors).unwrap_err().to_string();
    assert!(error.contains("k_proj.weight of shape [4, 8] is I16, expected BF16, F16, F32, or I8"), "{error}");
}

#[test]
fn an_index_cannot_lead_out_of_the_folder() {
    let tensors = good();
    for evil in [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "",
        ".",
        "x.bin",
        "a\\b.safetensors",
        "./x.safetensors",
        "x.safetensors/",
        "nul\0.safetensors",
    ] {
        let error = open(&[("model.safetensors.index.json", &index(&tensors, |_| evil.into()))]).unwrap_err();
        assert!(matches!(error, Error::BadShardName { .. }), "{evil:?}: {error}");
    }
    let absent = open(&[("model.safetensors.index.json", &index(&tensors, |_| "gone.safetensors".into()))]);
    assert!(absent.unwrap_err().to_string().contains("gone.safetensors"));
    assert!(matches!(open(&[]), Err(Error::NoWeights { .. })));
}

fn with_header(header: &str, data_len: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + data_len, 0);
    file
}

#[test]
fn a_header_that_contradicts_the_file_is_refused() {
    let entry = |shape: &str, begin: u64, end: u64| {
        with_header(&format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#), 16)
    };
    assert!(header::parse(&entry("[4]", 0, 16)).is_ok());
    for bad in [
        vec![],
        vec![1; 7],
        u64::MAX.to_le_bytes().to_vec(),
        99_999_999u64.to_le_bytes().to_vec(),
        with_header("not json", 0),
        with_header("[]", 0),
        with_header(r#"{"a": 3}"#, 0),
        entry("[4]", 0, 17),
        entry("[4]", 16, 0),
        entry("[5]", 0, 16),
        entry("[18446744073709551615,18446744073709551615]", 0, 16),
        entry("[2305843009213693952,8]", 0, u64::MAX),
        entry("[-1]", 0, 16),
    ] {
        assert!(header::parse(&bad).is_err(), "{bad:?}");
        assert!(matches!(open(&[("model.safetensors", &bad)]), Err(Error::BadHeader { .. })), "{bad:?}");
    }
}

proptest! {
    #[test]
    fn a_damaged_file_is_an_error_or_a_model_never_a_panic(at in 0usize..3000, byte in any::<u8>(), cut in any::<bool>()) {
        let mut file = serialize(&good());
        let at = at % file.len();
        if cut {
            file.truncate(at);
        } else {
            file[at] = byte;
        }
        let _ = open(&[("model.safetensors", &file)]);
    }

    #[test]
    fn any_bytes_parse_or_do_not(mut bytes in prop::collection::vec(any::<u8>(), 0..200), len in 0u64..200) {
        if bytes.len() >= 8 {
            bytes[..8].copy_from_slice(&len.to_le_bytes());
        }
        let _ = header::parse(&bytes);
    }
}
