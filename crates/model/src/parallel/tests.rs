//! Ranks that fail in the middle of a step. That results are the same is `tests/parallel.rs`.

use std::{path::Path, sync::atomic::AtomicUsize, sync::atomic::Ordering::*};

use kvasir_types::KvDtype;

use super::*;
use crate::cpu::{Compute, CpuBackend, HostArena};

/// A rank that does something else in its n-th step, after its first layer is written.
struct Faulty {
    inner: CpuBackend,
    steps: usize,
    fault: Option<Fault>,
}

#[derive(Clone, Copy)]
enum Fault {
    Panic,
    DeviceLost,
    /// It has no memory for the step, and says so before it begins.
    NoMemory,
}

impl Backend for Faulty {
    fn spec(&self) -> &ModelConfig {
        self.inner.spec()
    }
    fn groups(&self) -> &KvGroups {
        self.inner.groups()
    }
    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), Error> {
        self.inner.copy_blocks(copies)
    }
    fn forward(&mut self, batch: &[SeqInput<'_>], after_layer: &mut dyn FnMut(usize)) -> Result<Logits, Error> {
        self.steps += 1;
        let fault = self.fault.filter(|_| self.steps == 2);
        let out_of_memory = || Error::DeviceOutOfMemory { device: "cuda:1".to_owned(), call: "cuMemAlloc" };
        let room = if matches!(fault, Some(Fault::NoMemory)) { Err(out_of_memory()) } else { Ok(()) };
        self.inner.agree(room)?;
        match fault {
            Some(Fault::Panic) => self.inner.forward(batch, &mut |_| panic!("a bug of a rank's")),
            Some(Fault::DeviceLost) => {
                Err(Error::Device { device: "cuda:1".to_owned(), call: "cuLaunchKernel", reason: "lost".to_owned() })
            }
            _ => self.inner.forward(batch, after_layer),
        }
    }
}

/// What a backend of two ranks, the second of which is faulty in its second step, says to three steps.
fn three_steps(fault: Fault) -> Vec<Result<Vec<f32>, Error>> {
    let folder = Folder::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny/mixtral")).unwrap();
    let layout = folder.kv_layout(16, KvDtype::F16);
    let arena = HostArena::new(2 * layout.block_bytes()).unwrap();
    let opened = AtomicUsize::new(0);
    let mut backend = Parallel::open(&folder, layout, 2, 2, |member| {
        opened.fetch_add(1, SeqCst);
        let fault = (member.place().rank == 1).then_some(fault);
        let inner = CpuBackend::rank(&folder, layout, arena.clone(), member, (1, Compute::Exact))?;
        Ok(Faulty { inner, steps: 0, fault })
    })
    .unwrap();
    assert_eq!(opened.load(SeqCst), 2);
    let tables = [vec![BlockId(1)]];
    let step = || SeqInput { tokens: &[TokenId(3), TokenId(4)], start: 0, tables: &tables, rows: 1 };
    (0..3).map(|_| backend.forward(&[step()], &mut |_| {}).map(|logits| logits.rows)).collect()
}

#[test]
fn a_rank_that_panics_ends_the_step_and_the_backend() {
    let steps = three_steps(Fault::Panic);
    assert!(steps[0].is_ok());
    let error = steps[1].as_ref().unwrap_err();
    assert!(error.is_fatal() && error.to_string().contains("a bug of a rank's"), "{error}");
    let error = steps[2].as_ref().unwrap_err();
    assert!(error.is_fatal() && error.to_string().contains("a bug of a rank's"), "{error}");
}

#[test]
fn a_rank_whose_device_is_lost_is_the_one_that_is_told_of() {
    let steps = three_steps(Fault::DeviceLost);
    assert!(matches!(steps[1], Err(Error::Device { .. })), "{:?}", steps[1]);
    assert!(matches!(&steps[2], Err(error) if error.is_fatal()));
}

#[test]
fn a_rank_without_memory_refuses_the_step_and_the_next_one_goes_on() {
    let steps = three_steps(Fault::NoMemory);
    assert!(matches!(&steps[1], Err(error @ Error::DeviceOutOfMemory { .. }) if !error.is_fatal()));
    assert_eq!(steps[2].as_ref().unwrap(), steps[0].as_ref().unwrap());
}

#[test]
fn ranks_that_cannot_be_opened_are_told_by_their_own_error() {
    let folder = Folder::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny/mixtral")).unwrap();
    let layout = folder.kv_layout(16, KvDtype::F16);
    let failed = Parallel::open(&folder, layout, 2, 2, |member| -> Result<CpuBackend, Error> {
        if member.place().rank == 1 {
            return Err(Error::NoDevice { ordinal: 1, reason: "there is one".to_owned() });
        }
        member.barrier()?;
        unreachable!("rank 1 has failed");
    });
    assert!(matches!(failed, Err(Error::NoDevice { ordinal: 1, .. })));
    let failed =
        Parallel::open(&folder, layout, 2, 3, |_| -> Result<CpuBackend, Error> { unreachable!("not divided") });
    let text = failed.unwrap_err().to_string();
    assert_eq!(text, "tensor_parallel 3 does not divide the model's 2 KV heads (possible: 1, 2)");
}

/// A model of eight KV heads, of random weights.
#[test]
fn eight_ranks_compute_what_one_does() {
    const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 77,
        "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 16, "head_dim": 8,
        "num_key_value_heads": 8, "max_position_embeddings": 64, "tie_word_embeddings": false, "eos_token_id": 2}"#;
    let dir = tempfile::tempdir().unwrap();
    crate::shapes::Shape::of("eight", CONFIG).write(dir.path(), 5, &mut |_, _| {}).unwrap();
    let folder = Folder::open(dir.path()).unwrap();
    let layout = folder.kv_layout(16, KvDtype::F16);
    let rows = |degree| {
        let arena = HostArena::new(3 * layout.block_bytes()).unwrap();
        let options = crate::Options {
            device: crate::Device::Cpu,
            compute: Compute::Exact,
            threads: 8,
            tensor_parallel: degree,
            max_tokens: 64,
        };
        let mut backend = crate::Device::open(&folder, layout, arena, options).unwrap();
        let tokens: Vec<TokenId> = (0..40).map(|i| TokenId(i * 7 % 77)).collect();
        let tables = [vec![BlockId(2), BlockId(0), BlockId(1)]];
        let input = SeqInput { tokens: &tokens, start: 0, tables: &tables, rows: 40 };
        backend.forward(&[input], &mut |_| {}).unwrap()
    };
    let one = rows(1);
    assert!(one.rows.iter().all(|value| value.is_finite()));
    for degree in [2, 4, 8] {
        assert!(rows(degree) == one, "{degree} ranks");
    }
}
