//! What the CUDA backend does when something fails, and blocks that travel between it and the processor's. On an emulated
//! device whose faults are asked for by its environment, so each case is a process of its own.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/emulated.rs"]
mod emulated;
#[path = "common/faults.rs"]
mod faults;

use common::{BLOCKS, Bench, TestMemory, argmax, assert_same_bits, models, tokens};
use emulated::emulated;
use faults::with_faults;
use kvasir_model::{
    Backend, Device, Error, Folder, SeqInput,
    cpu::{Compute, CpuBackend},
    cuda::{CudaBackend, Options},
};
use kvasir_types::{BlockId, KvDtype, TokenId};

const OPTIONS: Options = Options { ordinal: 0, compute: Compute::Exact, max_tokens: 16, graphs: true };

fn folder() -> Folder {
    Folder::open(&models().join("tiny/qwen3-tied")).unwrap()
}

fn bench(folder: &Folder, blocks: u32) -> Bench {
    emulated();
    Bench::over(folder, 16, KvDtype::F16, blocks, |layout, memory| {
        Box::new(CudaBackend::new(folder, layout, memory, OPTIONS).unwrap())
    })
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_numbers() {
    with_faults("a_model_that_does_not_fit_is_refused_with_numbers", &[("EMULATED_CUDA_MEMORY", "268435456")], || {
        emulated();
        let folder = folder();
        let layout = folder.kv_layout(16, KvDtype::F16);
        let build =
            |blocks: usize| CudaBackend::new(&folder, layout, TestMemory::new(blocks * layout.block_bytes()), OPTIONS);
        let many = 256 << 20;
        let error = build(many / layout.block_bytes()).unwrap_err();
        let Error::DeviceTooSmall { fit, blocks, .. } = error else { panic!("{error}") };
        assert!(fit < blocks, "{fit} of {blocks}");
        assert!(error.to_string().contains(&format!("{fit} blocks would fit")), "{error}");
    });
}

#[test]
fn a_step_for_which_there_is_no_memory_is_refused_and_the_next_is_computed() {
    let name = "a_step_for_which_there_is_no_memory_is_refused_and_the_next_is_computed";
    with_faults(name, &[("EMULATED_CUDA_MEMORY", "301989888")], || {
        let folder = folder();
        let mut bench = bench(&folder, 64);
        let prompt: Vec<TokenId> = (0..900).map(|i| TokenId(i * 31 % 1532)).collect();
        let tables = bench.tables(prompt.len());
        // Every row with its logits, many times what is set aside.
        let inputs: Vec<_> =
            (0..64).map(|_| SeqInput { tokens: &prompt, start: 0, tables: &tables, rows: prompt.len() }).collect();
        let error = bench.backend.forward(&inputs, &mut |_| {}).unwrap_err();
        assert!(matches!(error, Error::DeviceOutOfMemory { .. }) && !error.is_fatal(), "{error}");
        let logits = bench.step(&prompt[..5], 0, &tables);
        assert!(logits.rows.iter().all(|logit| logit.is_finite()));
    });
}

#[test]
fn a_device_that_fails_is_of_no_use_any_more() {
    with_faults("a_device_that_fails_is_of_no_use_any_more", &[("EMULATED_CUDA_FAIL_AFTER", "40")], || {
        let folder = folder();
        let mut bench = bench(&folder, 16);
        let tables = bench.tables(40);
        let errors = (0..40).find_map(|at| {
            let input = SeqInput { tokens: &[TokenId(5)], start: at, tables: &tables, rows: 1 };
            bench.backend.forward(&[input], &mut |_| {}).err()
        });
        let error = errors.unwrap();
        assert!(error.is_fatal() && error.to_string().contains("ILLEGAL_ADDRESS"), "{error}");
        let input = SeqInput { tokens: &[TokenId(5)], start: 0, tables: &tables, rows: 1 };
        assert!(bench.backend.forward(&[input], &mut |_| {}).unwrap_err().is_fatal());
    });
}

#[test]
fn an_arena_that_can_not_be_pinned_is_copied_all_the_same() {
    with_faults("an_arena_that_can_not_be_pinned_is_copied_all_the_same", &[("EMULATED_CUDA_NO_PINNING", "1")], || {
        blocks_travel(KvDtype::F16);
    });
}

/// Logits after a prompt of many rows in `fast`, beside the processor's, and how many products the library made of them.
fn fast(name: &str) -> (f32, u64) {
    let folder = Folder::open(&models().join(name)).unwrap();
    let layout = folder.kv_layout(16, KvDtype::F16);
    let memory = || TestMemory::new(32 * layout.block_bytes());
    let options = Options { compute: Compute::Fast, max_tokens: 512, ..OPTIONS };
    let mut cuda = CudaBackend::new(&folder, layout, memory(), options).unwrap();
    let mut cpu = CpuBackend::new(&folder, layout, memory(), 1).unwrap();
    let prompt = tokens(&(0..300).map(|i| i * 41 % 1532).collect::<Vec<_>>());
    let tables = [(0..32).map(BlockId).collect()];
    // In two steps: the second finds the ways of the first.
    let mut apart = 0.0f32;
    for part in [0..140, 140..300] {
        let input = SeqInput { tokens: &prompt[part.clone()], start: part.start, tables: &tables, rows: 8 };
        let rows = |backend: &mut dyn Backend| backend.forward(&[input], &mut |_| {}).unwrap().rows;
        apart = apart.max(common::furthest(&rows(&mut cuda), &rows(&mut cpu)));
    }
    (apart, cuda.products_by_library())
}

#[test]
fn products_of_many_rows_are_left_to_the_library_where_there_is_one() {
    with_faults("products_of_many_rows_are_left_to_the_library_where_there_is_one", &[], || {
        emulated::emulated_cublas();
        for (name, limit) in [("demo", 0.2), ("tiny/qwen2-tied", 0.2)] {
            let (apart, products) = fast(name);
            assert!(apart < limit, "{name}: logits differ by {apart}");
            assert!(products > 8, "{name}: {products} products");
        }
    });
}

#[test]
fn a_library_that_fails_is_done_without() {
    with_faults("a_library_that_fails_is_done_without", &[("EMULATED_CUBLAS_FAIL", "1")], || {
        emulated::emulated_cublas();
        let (apart, products) = fast("demo");
        assert!(apart < 0.2 && products == 0, "{apart}, {products} products");
    });
}

#[test]
fn blocks_of_one_backend_are_read_by_the_other() {
    for dtype in [KvDtype::F16, KvDtype::Fp8] {
        blocks_travel(dtype);
    }
}

/// A prompt computed here, its next tokens there, both ways; the arena's bytes are all that goes between.
fn blocks_travel(dtype: KvDtype) {
    emulated();
    let folder = folder();
    let blocks = 16;
    let layout = folder.kv_layout(16, dtype);
    let memory = TestMemory::new(blocks * layout.block_bytes());
    let mut cuda = CudaBackend::new(&folder, layout, memory.clone(), OPTIONS).unwrap();
    let mut cpu = CpuBackend::new(&folder, layout, memory.clone(), 1).unwrap();
    let prompt = tokens(&(0..37).map(|i| i * 41 % 1532).collect::<Vec<_>>());
    let (of_cuda, of_cpu): (Vec<_>, Vec<_>) =
        (vec![(0..4).map(BlockId).collect()], vec![(4..8).map(BlockId).collect()]);
    let run = |backend: &mut dyn Backend, tokens: &[TokenId], start, tables: &[Vec<BlockId>]| {
        let input = SeqInput { tokens, start, tables, rows: 1 };
        backend.forward(&[input], &mut |_| {}).unwrap().rows
    };
    let first_cuda = argmax(&run(&mut cuda, &prompt, 0, &of_cuda));
    let first_cpu = argmax(&run(&mut cpu, &prompt, 0, &of_cpu));
    assert_eq!(first_cuda, first_cpu);
    // The processor goes on from the device's blocks, the device from the processor's.
    cuda.landed(&of_cpu[0]).unwrap();
    let crossed = [run(&mut cpu, &[first_cuda], 37, &of_cuda), run(&mut cuda, &[first_cpu], 37, &of_cpu)];
    assert_eq!(argmax(&crossed[0]), argmax(&crossed[1]));
    // And from a copy of what landed.
    let copies: Vec<_> = (4..8).map(|block| (BlockId(block), BlockId(block + 4))).collect();
    cuda.copy_blocks(&copies).unwrap();
    let copied = run(&mut cuda, &[first_cpu], 37, &[(8..12).map(BlockId).collect()]);
    assert_same_bits(&crossed[1], &copied, "from a copy");
    let outside = [BlockId(blocks as u32)];
    assert!(matches!(cuda.landed(&outside), Err(Error::BlockOutOfArena { .. })));
    assert!(matches!(cuda.copy_blocks(&[(BlockId(0), outside[0])]), Err(Error::BlockOutOfArena { .. })));
}

#[test]
fn an_emulated_device_is_never_taken_unasked() {
    emulated();
    assert!(!kvasir_model::cuda::is_there(0));
    let folder = folder();
    let layout = folder.kv_layout(16, KvDtype::F16);
    let options = kvasir_model::Options {
        device: Device::Auto,
        compute: Compute::Exact,
        threads: 1,
        tensor_parallel: 1,
        max_tokens: 16,
    };
    let open = |device| {
        let memory = TestMemory::new(BLOCKS as usize * layout.block_bytes());
        Device::open(&folder, layout, memory, kvasir_model::Options { device, ..options })
    };
    assert!(open(Device::Auto).is_ok() && open(Device::Cpu).is_ok());
    let missing = open(Device::Cuda(7)).err().unwrap();
    assert!(matches!(missing, Error::NoDevice { ordinal: 7, .. }), "{missing}");
}
