//! Attention against the formula in `f64`, and its law: a row's bits depend on what it sees, not on its company, its chunk
//! or its thread, and what it does not see may be anything.

use kvasir_types::{KvDtype, KvLayout};
use proptest::prelude::*;

use super::*;
use crate::cpu::{HostArena, kernels::Isa};

/// A sequence and how it is looked at.
#[derive(Clone, Debug)]
struct Case {
    heads: Heads,
    block_size: usize,
    dtype: KvDtype,
    len: usize,
    /// Where a chunk ends.
    cuts: Vec<usize>,
    threads: usize,
    compute: Compute,
    seed: u64,
}

fn cases(lens: impl Strategy<Value = usize>) -> impl Strategy<Value = Case> {
    let dims = prop_oneof![1usize..40, Just(64), Just(128)];
    let shape = (1usize..3, prop::sample::select(vec![1usize, 2, 3, 7]), dims, any::<bool>());
    let window = prop_oneof![Just(None), (1usize..200).prop_map(Some)];
    let cap = prop_oneof![3 => Just(None), 1 => Just(Some(5.0))];
    let dtype = prop::sample::select(vec![KvDtype::Bf16, KvDtype::F16, KvDtype::F32, KvDtype::Fp8]);
    let compute = prop::sample::select(vec![Compute::Exact, Compute::Fast]);
    let size = prop::sample::select(vec![1usize, 3, 16]);
    (shape, window, cap, dtype, compute, size, lens).prop_flat_map(
        |((kv_heads, group, dim, latent), window, soft_cap, dtype, compute, block_size, len)| {
            let (values, v_dim) = if latent { (Half::Keys, dim.div_ceil(2)) } else { (Half::Values, dim) };
            let heads = kv_heads * group;
            let heads = Heads { heads, kv_heads, k_dim: dim, values, v_dim, scale: 0.4, soft_cap, window };
            (prop::collection::vec(1..=len, 0..4), 1usize..4, any::<u64>()).prop_map(
                move |(mut cuts, threads, seed)| {
                    cuts.push(len);
                    cuts.sort_unstable();
                    cuts.dedup();
                    Case { heads, block_size, dtype, len, cuts, threads, compute, seed }
                },
            )
        },
    )
}

/// Numbers between -1 and 1.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A case's arena and what was written to it.
struct Rig {
    case: Case,
    kv: KvArena,
    table: Vec<BlockId>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Rig {
    fn new(case: Case) -> Self {
        let Heads { heads, kv_heads, k_dim, values, v_dim, .. } = case.heads;
        let stored_v = if values == Half::Values { v_dim } else { 0 };
        let layout = KvLayout {
            block_size: case.block_size as u32,
            layers: 1,
            kv_heads: kv_heads as u32,
            k_dim: k_dim as u32,
            v_dim: stored_v as u32,
            dtype: case.dtype,
        };
        let blocks = case.len.div_ceil(case.block_size);
        let kv = KvArena::new(HostArena::new(blocks * layout.block_bytes()).unwrap(), layout).unwrap();
        // Not in order: a table is to be followed.
        let table = (0..blocks as u32).rev().map(BlockId).collect();
        let (len, seed) = (case.len, case.seed);
        let q = numbers(seed ^ 1, len * heads * k_dim);
        let k = numbers(seed ^ 2, len * kv_heads * k_dim);
        let v = numbers(seed ^ 3, len * kv_heads * stored_v);
        Self { case, kv, table, q, k, v }
    }

    /// Writes the positions of `seen`, and what is not a number everywhere else.
    fn fill(&mut self, isa: Isa, seen: Range<usize>) {
        for position in 0..self.case.len {
            for (half, all) in [(Half::Keys, &self.k), (Half::Values, &self.v)] {
                let width = all.len() / self.case.len;
                let values = match seen.contains(&position) {
                    true => all[position * width..(position + 1) * width].to_vec(),
                    false => vec![f32::NAN; width],
                };
                let (block, slot) = (self.table[position / self.case.block_size], position % self.case.block_size);
                if width > 0 {
                    self.kv.write(isa, block, 0, half, slot, &values);
                }
            }
        }
    }

    /// Rows of the tokens at `positions`.
    fn attend(&self, exec: &Exec, positions: Range<usize>) -> Vec<f32> {
        let width = self.case.heads.heads * self.case.heads.k_dim;
        let span = Span { table: &self.table, first_row: 0, start: positions.start, count: positions.len() };
        let mut out = Vec::new();
        let q = &self.q[positions.start * width..positions.end * width];
        attend(exec, &self.kv, 0, self.case.heads, &[span], q, &mut out);
        out
    }

    /// What a position and head should be, and the largest value it sees.
    fn expected(&self, isa: Isa, position: usize, head: usize) -> Vec<f64> {
        let Heads { heads, kv_heads, k_dim, values, v_dim, scale, soft_cap, .. } = self.case.heads;
        let kv_head = head / (heads / kv_heads);
        let stored = |half: Half, at: usize| {
            let (block, slot) = (self.table[at / self.case.block_size], at % self.case.block_size);
            let matrix = self.kv.read(block, 0, half, kv_head, slot..slot + 1);
            let mut row = vec![0.0; matrix.row_bytes() / self.kv.dtype().bytes()];
            crate::weights::widen(matrix.stored_rows().next().unwrap(), self.kv.dtype(), &mut row);
            row
        };
        let _ = isa;
        let q = &self.q[(position * heads + head) * k_dim..][..k_dim];
        let seen = self.case.heads.seen(position);
        let scores = seen.clone().map(|at| {
            let terms = q.iter().zip(stored(Half::Keys, at)).map(|(q, k)| f64::from(*q) * f64::from(k));
            let score = terms.sum::<f64>() * f64::from(scale);
            soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
        });
        let weights: Vec<f64> = scores.map(f64::exp).collect();
        let total: f64 = weights.iter().sum();
        let mut out = vec![0.0; v_dim];
        for (at, weight) in seen.zip(weights) {
            out.iter_mut().zip(stored(values, at)).for_each(|(out, v)| *out += weight / total * f64::from(v));
        }
        out
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn attention_is_what_the_formula_says(case in cases(1usize..300)) {
        let isa = Isa::detect();
        let (heads, len) = (case.heads, case.len);
        // Rounded queries, keys and weights move a score of up to some tens by a few thousandths each.
        let tolerance = if case.compute == Compute::Fast { 0.04 } else { 1e-4 };
        let exec = Exec::new(isa, case.compute, case.threads).unwrap();
        let mut rig = Rig::new(case);
        rig.fill(isa, 0..len);
        let out = rig.attend(&exec, 0..len);
        for position in [0, len / 3, len - 1] {
            for head in 0..heads.heads {
                let row = &out[(position * heads.heads + head) * heads.v_dim..][..heads.v_dim];
                for (value, expected) in row.iter().zip(rig.expected(isa, position, head)) {
                    let error = (f64::from(*value) - expected).abs();
                    prop_assert!(error < tolerance, "position {position} head {head}: {value}, expected {expected}");
                }
            }
        }
    }

    #[test]
    fn no_chunk_thread_or_processor_changes_a_bit(case in cases(prop_oneof![1usize..300, 500usize..1200])) {
        let (len, heads) = (case.len, case.heads);
        let width = heads.heads * heads.v_dim;
        let mut rig = Rig::new(case.clone());
        rig.fill(Isa::detect(), 0..len);
        let whole = rig.attend(&Exec::new(Isa::detect(), case.compute, 1).unwrap(), 0..len);
        let isas = Isa::available();
        let mut start = 0;
        for (i, &end) in case.cuts.iter().enumerate() {
            let isa = isas[(i + case.seed as usize) % isas.len()];
            let exec = Exec::new(isa, case.compute, case.threads).unwrap();
            rig.fill(isa, heads.seen(start).start..end);
            let part = rig.attend(&exec, start..end);
            let expected = bits(&whole[start * width..end * width]);
            prop_assert_eq!(bits(&part), expected, "{}..{} on {:?}", start, end, isa);
            start = end;
        }
        // Alone, as when it is decoded.
        for position in [len - 1, len / 2] {
            rig.fill(Isa::detect(), heads.seen(position));
            let alone = rig.attend(&Exec::new(Isa::detect(), case.compute, 4).unwrap(), position..position + 1);
            prop_assert_eq!(bits(&alone), bits(&whole[position * width..(position + 1) * width]), "{} alone", position);
        }
    }
}
