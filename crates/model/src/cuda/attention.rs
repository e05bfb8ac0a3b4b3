//! Attention's launches: which kernels a model uses, and how a step's units go through them.

use super::{
    abi::{self, Attend, Merge},
    arena::Arena,
    driver::Stream,
    model::{Attention, Model},
    module::{Function, Module},
    products::Planes,
    step::{Attending, Cut, Step},
};
use crate::{Error, cpu::Compute, weights::Dtype};

/// Widths of heads that there are kernels with tensor cores for.
const DIMS: [usize; 4] = [32, 64, 128, 256];

/// The kernels of a model's attention. Which they are is a function of model, layout, arithmetic and device, never of a batch.
pub(super) struct Attends {
    /// One part of a unit.
    split: Function,
    /// All parts of a unit.
    whole: Function,
    merge: Function,
    threads: u32,
    /// How the merge writes planes.
    fast: bool,
    pub(super) cut: Cut,
}

/// What attention reads and writes in a step.
pub(super) struct Ends {
    pub(super) inputs: u64,
    pub(super) q: u64,
    pub(super) positions: u64,
    pub(super) part_sums: u64,
    pub(super) part_max: u64,
    pub(super) out: Planes,
    /// Elements from head to head in a row of `out`.
    pub(super) head_ld: usize,
}

impl Attends {
    pub(super) fn new(
        module: &Module,
        model: &Model,
        arena: &Arena,
        compute: Compute,
        shared_bytes: u32,
    ) -> Result<Self, Error> {
        let attention = &model.layers[0].attention;
        let &Attention { heads, kv_heads, k_dim, v_dim, .. } = attention;
        if model.layers.iter().any(|layer| layer.attention.heads != heads || layer.attention.v_dim != v_dim) {
            let what = "layers that differ in their number of heads".to_owned();
            return Err(Error::NotOnDevice { device: "cuda".to_owned(), what });
        }
        let merge = module.function("attend_merge", 0)?;
        let (dtype, bytes) = (abi::name(arena.dtype), arena.dtype.bytes());
        let (mode, terms) = match compute {
            Compute::Exact => ("exact", 2),
            Compute::Fast => ("fast", 1),
        };
        let (split_shared, whole_shared) =
            (abi::decode_shared(k_dim, bytes, terms), abi::prompt_shared(k_dim, bytes, terms));
        let on_tensor_cores = arena.dtype != Dtype::F32
            && arena.layout.v_dim == arena.layout.k_dim
            && DIMS.contains(&k_dim)
            && split_shared.max(whole_shared) <= shared_bytes as usize;
        let cut = |prompt_rows| Cut { heads, group: heads / kv_heads, v_dim, prompt_rows };
        if on_tensor_cores {
            let find = |kind, shared| module.function(&format!("attend_{kind}_{dtype}_{k_dim}_{mode}"), shared);
            return Ok(Self {
                split: find("decode", split_shared)?,
                whole: find("prompt", whole_shared)?,
                merge,
                threads: abi::ATTEND_THREADS,
                fast: compute == Compute::Fast,
                cut: cut(abi::prompt_rows(k_dim)),
            });
        }
        let any = module.function(&format!("attend_any_{dtype}"), abi::any_shared(k_dim, v_dim))?;
        Ok(Self { split: any, whole: any, merge, threads: abi::ANY_THREADS, fast: false, cut: cut(abi::ANY_ROWS) })
    }

    /// Attends for all rows of `units`.
    pub(super) fn run(
        &self,
        stream: &Stream,
        arena: &Arena,
        (attention, place): (&Attention, usize),
        (step, units): (&Step, &Attending),
        ends: &Ends,
    ) -> Result<(), Error> {
        let args = Attend {
            kv: arena.kv(place),
            q: ends.q,
            tables: ends.inputs + step.tables,
            partial_sums: ends.part_sums,
            partial_max: ends.part_max,
            hi: ends.out.hi,
            lo: ends.out.lo,
            scale: attention.scale,
            soft_cap: attention.soft_cap.unwrap_or(0.0),
            window: attention.window.map_or(0, |window| u32::try_from(window).unwrap_or(u32::MAX)),
            heads: attention.heads as u32,
            group: self.cut.group as u32,
            v_dim: attention.v_dim as u32,
            ld: ends.out.ld as u32,
            head_ld: ends.head_ld as u32,
            ..Attend::default()
        };
        for split in &units.split {
            // Partial sums are found by row: the first one of this launch is at the beginning of the room.
            let before = (split.first_row * attention.heads * split.parts) as u64;
            let (partial_sums, partial_max) = (
                args.partial_sums.wrapping_sub(4 * before * attention.v_dim as u64),
                args.partial_max.wrapping_sub(8 * before),
            );
            let parts = split.parts as u32;
            let args = Attend { units: ends.inputs + split.units, partial_sums, partial_max, parts, ..args };
            stream.launch(self.split, [split.count, attention.kv_heads, split.parts], self.threads, &args)?;
            let merge = Merge {
                partial_sums,
                partial_max,
                rows: ends.inputs + split.rows_at,
                positions: ends.positions,
                hi: ends.out.hi,
                lo: ends.out.lo,
                count: split.rows as u32,
                window: args.window,
                heads: args.heads,
                v_dim: args.v_dim,
                parts,
                ld: args.ld,
                head_ld: args.head_ld,
                fast: u32::from(self.fast),
            };
            stream.launch(self.merge, [split.rows, attention.heads, 1], abi::ROW_THREADS, &merge)?;
        }
        let args = Attend { units: ends.inputs + units.whole, ..args };
        stream.launch(self.whole, [units.wholes, attention.kv_heads, 1], self.threads, &args)
    }
}
