//! Steps that decode run as graphs: they compute what launches one by one do, whatever changes between them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/emulated.rs"]
mod emulated;
#[path = "common/faults.rs"]
mod faults;

use common::{TestMemory, argmax, assert_same_bits, golden, models, tokens};
use emulated::emulated;
use faults::with_faults;
use kvasir_model::{
    Backend, Folder, SeqInput,
    cpu::Compute,
    cuda::{CudaBackend, GraphCounts, Options},
};
use kvasir_types::{BlockId, GroupKind, KvDtype, TokenId};

const OPTIONS: Options = Options { ordinal: 0, compute: Compute::Exact, max_tokens: 64, graphs: true };
const BLOCK_SIZE: usize = 16;

/// A sequence that is being computed.
struct Sequence {
    tokens: Vec<TokenId>,
    computed: usize,
    tables: Vec<Vec<BlockId>>,
}

/// Sequences on a device of their own.
struct Device {
    backend: CudaBackend,
    sequences: Vec<Sequence>,
    free: Vec<BlockId>,
}

impl Device {
    fn new(folder: &Folder, graphs: bool) -> Self {
        emulated();
        let blocks = 128;
        let layout = folder.kv_layout(BLOCK_SIZE as u32, KvDtype::F16);
        let memory = TestMemory::new(blocks as usize * layout.block_bytes());
        let backend = CudaBackend::new(folder, layout, memory, Options { graphs, ..OPTIONS }).unwrap();
        Self { backend, sequences: Vec::new(), free: (0..blocks).map(|i| BlockId(i * 37 % blocks)).collect() }
    }

    fn admit(&mut self, prompt: Vec<TokenId>) {
        let tables = vec![Vec::new(); self.backend.groups().len()];
        self.sequences.push(Sequence { tokens: prompt, computed: 0, tables });
    }

    fn leave(&mut self, index: usize) {
        let gone = self.sequences.remove(index);
        self.free.extend(gone.tables.into_iter().flatten().filter(|&block| block != BlockId::GONE));
    }

    /// Computes `tokens` more tokens of each of these sequences, and appends the likeliest one where all are computed. All
    /// rows of logits.
    fn step(&mut self, parts: &[(usize, usize)]) -> Vec<f32> {
        let groups = self.backend.groups().clone();
        for &(index, count) in parts {
            let Sequence { tables, computed, .. } = &mut self.sequences[index];
            for (group, table) in groups.iter().zip(tables) {
                while table.len() * BLOCK_SIZE < *computed + count {
                    table.push(self.free.pop().unwrap());
                }
                if let GroupKind::Sliding { window } = group.kind {
                    let gone = (*computed + 1).saturating_sub(window as usize) / BLOCK_SIZE;
                    self.free.extend(table[..gone].iter().filter(|&&block| block != BlockId::GONE));
                    table[..gone].fill(BlockId::GONE);
                }
            }
        }
        let inputs = parts.iter().map(|&(index, count)| {
            let Sequence { tokens, computed, tables } = &self.sequences[index];
            let rows = if computed + count == tokens.len() { 1 } else { 0 };
            SeqInput { tokens: &tokens[*computed..computed + count], start: *computed, tables, rows }
        });
        let inputs: Vec<_> = inputs.collect();
        let mut layers = 0;
        let logits = self.backend.forward(&inputs, &mut |layer| {
            assert_eq!(layer, layers);
            layers += 1;
        });
        let logits = logits.unwrap();
        assert_eq!(layers, self.backend.spec().layers.len());
        let mut rows = logits.rows.chunks(logits.vocab);
        for &(index, count) in parts {
            let sequence = &mut self.sequences[index];
            sequence.computed += count;
            if sequence.computed == sequence.tokens.len() {
                sequence.tokens.push(argmax(rows.next().unwrap()));
            }
        }
        logits.rows
    }

    /// One token of each sequence.
    fn decode(&mut self) -> Vec<f32> {
        self.step(&(0..self.sequences.len()).map(|index| (index, 1)).collect::<Vec<_>>())
    }
}

fn prompt(seed: u32, len: u32) -> Vec<TokenId> {
    (0..len).map(|i| TokenId((seed + i * 37) % 1532)).collect()
}

/// Sequences come and go, prompts come between, contexts grow past a part: everything that a graph must not remember.
fn life(device: &mut Device) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    for (seed, len) in [(3, 20), (40, 5), (77, 250), (9, 33), (100, 8)] {
        device.admit(prompt(seed, len));
        let index = device.sequences.len() - 1;
        rows.push(device.step(&[(index, len as usize)]));
    }
    // Five rows, padded to eight where rows are padded; the third sequence enters its second part.
    (0..9).for_each(|_| rows.push(device.decode()));
    device.admit(prompt(500, 30));
    rows.push(device.step(&[(0, 1), (5, 17), (2, 1)]));
    rows.push(device.step(&[(5, 13), (1, 1)]));
    // In another order, with other tables, one left.
    device.leave(1);
    (0..3).for_each(|_| rows.push(device.step(&[(4, 1), (0, 1), (3, 1), (1, 1), (2, 1)])));
    // Two at a time, twice in another company.
    (0..2).for_each(|_| rows.push(device.step(&[(3, 1), (0, 1)])));
    (0..2).for_each(|_| rows.push(device.step(&[(2, 1), (1, 1)])));
    rows
}

/// Every kind of attention and MLP: routed experts, windows, the latent kind.
#[test]
fn the_same_bits_come_with_graphs_and_without() {
    for name in ["gemma3", "deepseek-v2", "qwen3-tied"] {
        let folder = Folder::open(&models().join("tiny").join(name)).unwrap();
        let (mut with, mut without) = (Device::new(&folder, true), Device::new(&folder, false));
        let (captured, plain) = (life(&mut with), life(&mut without));
        for (step, (captured, plain)) in captured.iter().zip(&plain).enumerate() {
            assert_same_bits(captured, plain, &format!("{name}, step {step}"));
        }
        assert_eq!(without.backend.graphs(), GraphCounts::default());
        let GraphCounts { captured, replayed } = with.backend.graphs();
        assert!(captured >= 2 && replayed >= 6, "{name}: {captured} captured, {replayed} replayed");
    }
}

#[test]
fn the_demo_model_answers_as_the_reference_does_from_graphs() {
    let dir = models().join("demo");
    let lines: Vec<_> = golden(&dir).into_iter().skip(3).step_by(12).take(5).collect();
    let mut device = Device::new(&Folder::open(&dir).unwrap(), true);
    for (index, line) in lines.iter().enumerate() {
        device.admit(tokens(&line.prompt_ids));
        device.step(&[(index, line.prompt_ids.len())]);
    }
    // Together, each as long as its answer is.
    let mut steps = 0;
    loop {
        let left = |(index, line): (usize, &common::Golden)| {
            let Sequence { tokens, .. } = &device.sequences[index];
            (tokens.len() < line.prompt_ids.len() + line.output_ids.len()).then_some((index, 1))
        };
        let parts: Vec<_> = lines.iter().enumerate().filter_map(left).collect();
        if parts.is_empty() {
            break;
        }
        device.step(&parts);
        steps += 1;
    }
    for (sequence, line) in device.sequences.iter().zip(&lines) {
        assert_eq!(sequence.tokens[line.prompt_ids.len()..], tokens(&line.output_ids));
    }
    let GraphCounts { captured, replayed } = device.backend.graphs();
    assert!(replayed > steps / 2, "{captured} captured, {replayed} replayed of {steps}");
}

/// What a graph names may move when a step needs more room than any before: the graph is captured again.
#[test]
fn a_graph_does_not_outlive_what_it_names() {
    let folder = Folder::open(&models().join("tiny/qwen3-tied")).unwrap();
    let [with, without] = [true, false].map(|graphs| {
        let mut device = Device::new(&folder, graphs);
        device.admit(prompt(3, 20));
        let mut rows = vec![device.step(&[(0, 20)])];
        (0..4).for_each(|_| rows.push(device.decode()));
        let before = device.backend.graphs();
        device.admit(prompt(9, 300));
        rows.push(device.step(&[(1, 300)]));
        (0..4).for_each(|_| rows.push(device.step(&[(0, 1)])));
        if graphs {
            assert_eq!(before, GraphCounts { captured: 1, replayed: 2 });
            assert_eq!(device.backend.graphs(), GraphCounts { captured: 2, replayed: 4 });
        }
        rows
    });
    for (step, (with, without)) in with.iter().zip(&without).enumerate() {
        assert_same_bits(with, without, &format!("step {step}"));
    }
}

#[test]
fn a_device_that_fails_in_a_graph_is_of_no_use_any_more() {
    with_faults("a_device_that_fails_in_a_graph_is_of_no_use_any_more", &[("EMULATED_CUDA_FAIL_AFTER", "400")], || {
        let mut device = Device::new(&Folder::open(&models().join("tiny/qwen3-tied")).unwrap(), true);
        let table = [vec![BlockId(0), BlockId(1), BlockId(2)]];
        let error = (0..40).find_map(|at| {
            let input = SeqInput { tokens: &[TokenId(5)], start: at, tables: &table, rows: 1 };
            device.backend.forward(&[input], &mut |_| {}).err()
        });
        let error = error.unwrap();
        assert!(error.is_fatal() && error.to_string().contains("ILLEGAL_ADDRESS"), "{error}");
        assert!(device.backend.graphs().replayed > 0, "{:?}", device.backend.graphs());
        let input = SeqInput { tokens: &[TokenId(5)], start: 0, tables: &table, rows: 1 };
        assert!(device.backend.forward(&[input], &mut |_| {}).unwrap_err().is_fatal());
    });
}

#[test]
fn a_driver_that_refuses_graphs_is_asked_once() {
    with_faults("a_driver_that_refuses_graphs_is_asked_once", &[("EMULATED_CUDA_NO_GRAPHS", "1")], || {
        let folder = Folder::open(&models().join("tiny/qwen3-tied")).unwrap();
        let (mut with, mut without) = (Device::new(&folder, true), Device::new(&folder, false));
        for device in [&mut with, &mut without] {
            device.admit(prompt(3, 20));
            device.step(&[(0, 20)]);
        }
        for step in 0..4 {
            assert_same_bits(&with.decode(), &without.decode(), &format!("step {step}"));
        }
        assert_eq!(with.backend.graphs(), GraphCounts::default());
    });
}
