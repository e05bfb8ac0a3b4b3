//! Tensor parallelism on emulated devices: the host code, the kernels and the gathers that real ones get. A device and NCCL read
//! their environment once, so each case is a process of its own.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/emulated.rs"]
mod emulated;
#[path = "common/faults.rs"]
mod faults;

use std::sync::Arc;

use common::{Bench, answer, assert_same_bits, golden, models, tokens};
use emulated::{emulated, emulated_nccl};
use faults::with_faults;
use kvasir_model::{Backend, Device, Error, Folder, Options, SeqInput, cpu::Compute};
use kvasir_types::{BlockId, HostMemory, KvDtype, KvLayout, TokenId};

const BLOCKS: u32 = 64;
const FOUR: (&str, &str) = ("EMULATED_CUDA_DEVICES", "4");

fn open(
    folder: &Folder,
    layout: KvLayout,
    memory: Arc<dyn HostMemory>,
    tensor_parallel: usize,
    device: Device,
) -> Result<Box<dyn Backend>, Error> {
    let options = Options { device, compute: Compute::Exact, threads: 1, tensor_parallel, max_tokens: 64 };
    Device::open(folder, layout, memory, options)
}

fn bench(folder: &Folder, degree: usize) -> Bench {
    emulated_nccl();
    Bench::over(folder, 8, KvDtype::F16, BLOCKS, |layout, memory| {
        open(folder, layout, memory, degree, Device::Cuda(0)).unwrap()
    })
}

/// Prompts in two cuts and company, then steps that decode, long enough for graphs; and a block that goes on elsewhere.
fn life(folder: &Folder, degree: usize, chunk: usize) -> (Vec<f32>, Vec<u8>) {
    let mut bench = bench(folder, degree);
    let prompt: Vec<TokenId> = (0..46).map(|i| TokenId(i * 37 % 1532)).collect();
    let (tables, company) = (bench.tables(prompt.len()), bench.tables(8));
    let mut rows = Vec::new();
    let read = 41;
    for start in (0..read).step_by(chunk) {
        let end = (start + chunk).min(read);
        let tables = bench.with_gone(&tables, start);
        let own = SeqInput { tokens: &prompt[start..end], start, tables: &tables, rows: end - start };
        let other = SeqInput { tokens: &prompt[..3], start: 0, tables: &company, rows: 2 };
        let logits = bench.backend.forward(&[own, other], &mut |_| {}).unwrap();
        rows.extend_from_slice(&logits.rows[..(end - start) * logits.vocab]);
    }
    for at in read..prompt.len() {
        rows.extend(bench.step(&prompt[at..=at], at, &tables).rows);
    }
    let (from, to) = (tables[0][tables[0].len() - 1], bench.table(1)[0]);
    bench.backend.copy_blocks(&[(from, to)]).unwrap();
    let bytes = bench.memory.bytes().to_vec();
    (rows, bytes)
}

#[test]
fn devices_together_have_the_bits_of_one() {
    with_faults("devices_together_have_the_bits_of_one", &[FOUR], || {
        // Grouped heads with norms and ties, windows and soft caps, biases, experts, latents (on four).
        for (name, degree) in
            [("qwen3-tied", 2), ("gemma2", 2), ("qwen2-window", 2), ("mixtral", 2), ("deepseek-v3", 4)]
        {
            let folder = Folder::open(&models().join("tiny").join(name)).unwrap();
            let (one, blocks) = life(&folder, 1, 41);
            let (several, others) = life(&folder, degree, 41);
            assert_same_bits(&several, &one, name);
            assert!(blocks == others, "{name}: blocks differ");
            let (several, _) = life(&folder, degree, 13);
            assert_same_bits(&several, &one, name);
        }
    });
}

/// A prompt by two devices, its answer by one and by processors, and the other way round: over one arena of the host.
#[test]
fn answers_go_on_with_another_number_of_devices() {
    with_faults("answers_go_on_with_another_number_of_devices", &[FOUR], || {
        let dir = models().join("demo");
        let folder = Folder::open(&dir).unwrap();
        let lines = golden(&dir);
        let cases = [((2, Device::Cuda(0)), (1, Device::Cuda(3))), ((1, Device::Cpu), (2, Device::Cuda(2)))];
        for (line, (first, then)) in lines.iter().step_by(20).zip(cases) {
            let prompt = tokens(&line.prompt_ids);
            let mut bench = bench(&folder, 1);
            let tables = bench.tables(prompt.len() + line.output_ids.len());
            let memory = bench.memory.clone();
            let open = |(degree, device)| open(&folder, bench.layout, memory.clone(), degree, device).unwrap();
            let (first, then) = (open(first), open(then));
            bench.backend = first;
            let row = bench.prefill(&prompt, &tables, 24);
            bench.backend = then;
            bench.backend.landed(&tables.concat()).unwrap();
            assert_eq!(answer(&mut bench, line, &row, &tables), tokens(&line.output_ids));
        }
    });
}

/// Without pinned memory blocks go to the host copy by copy.
#[test]
fn an_arena_that_is_not_pinned_has_the_same_blocks() {
    with_faults("an_arena_that_is_not_pinned_has_the_same_blocks", &[FOUR, ("EMULATED_CUDA_NO_PINNING", "1")], || {
        let folder = Folder::open(&models().join("tiny/qwen3-tied")).unwrap();
        let ((one, blocks), (two, others)) = (life(&folder, 1, 41), life(&folder, 2, 41));
        assert_same_bits(&one, &two, "not pinned");
        assert!(blocks == others);
    });
}

#[test]
fn what_is_missing_is_told() {
    let refused = |degree: usize, device: Device| {
        let folder = Folder::open(&models().join("tiny/llama-linear-f16")).unwrap();
        let layout = folder.kv_layout(8, KvDtype::F16);
        open(&folder, layout, common::TestMemory::new(2 * layout.block_bytes()), degree, device).err().unwrap()
    };
    with_faults("what_is_missing_is_told", &[FOUR, ("EMULATED_NCCL_VERSION", "21100")], || {
        emulated_nccl();
        let error = refused(2, Device::Cuda(3));
        assert!(matches!(error, Error::NoDevice { ordinal: 4, .. }), "{error}");
        let error = refused(8, Device::Cuda(0)).to_string();
        assert_eq!(error, "tensor_parallel 8 does not divide the model's 4 KV heads (possible: 1, 2, 4)");
        let error = refused(2, Device::Cuda(0)).to_string();
        assert!(error.ends_with("libnccl.so.2 is version 21100, at least 21600 (2.16) is needed"), "{error}");
    });
}

#[test]
fn a_device_that_fails_ends_the_step_of_all() {
    let name = "a_device_that_fails_ends_the_step_of_all";
    with_faults(name, &[FOUR, ("EMULATED_CUDA_FAIL_AFTER", "300")], || {
        let folder = Folder::open(&models().join("tiny/qwen3-tied")).unwrap();
        let mut bench = bench(&folder, 2);
        let tables = bench.tables(8);
        let step = SeqInput { tokens: &[TokenId(5), TokenId(6)], start: 0, tables: &tables, rows: 1 };
        let error = loop {
            match bench.backend.forward(&[step], &mut |_| {}) {
                Ok(logits) => assert!(logits.rows.iter().all(|value| value.is_finite())),
                Err(error) => break error,
            }
        };
        assert!(error.is_fatal(), "{error}");
        assert!(bench.backend.forward(&[step], &mut |_| {}).is_err_and(|error| error.is_fatal()));
    });
}

/// What the devices have no memory for is refused on all of them, and the next step is computed.
#[test]
fn a_step_without_memory_is_refused_by_all() {
    let name = "a_step_without_memory_is_refused_by_all";
    with_faults(name, &[FOUR, ("EMULATED_CUDA_MEMORY", "301989888")], || {
        emulated();
        let folder = Folder::open(&models().join("tiny/qwen3-tied")).unwrap();
        let mut bench = bench(&folder, 2);
        let prompt: Vec<TokenId> = (0..400).map(|i| TokenId(i * 31 % 1532)).collect();
        let tables = bench.tables(prompt.len());
        // Every row with its logits, many times what is set aside.
        let all = SeqInput { tokens: &prompt, start: 0, tables: &tables, rows: prompt.len() };
        let batch = vec![all; 200];
        let refused = bench.backend.forward(&batch, &mut |_| {}).map(|logits| logits.len());
        assert!(matches!(refused, Err(Error::DeviceOutOfMemory { .. })), "{refused:?}");
        let few = SeqInput { tokens: &prompt[..5], start: 0, tables: &[vec![BlockId(1)]], rows: 1 };
        assert_eq!(bench.backend.forward(&[few], &mut |_| {}).unwrap().len(), 1);
    });
}
