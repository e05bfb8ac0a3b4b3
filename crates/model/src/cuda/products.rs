//! Products of activations with weights: which kernel, on what grid. All kernels give a row the same bits; `fast` leaves bf16
//! weights and many rows to cuBLASLt ([`library`](super::library)), whose bits are its own.

use std::sync::Arc;

use super::{
    abi::{self, LinearArgs, ScaleBias},
    driver::{Context, Stream},
    library::Blas,
    load::Matrix,
    module::{Function, Module},
    scratch::PARTIALS,
};
use crate::{Error, cpu::Compute, weights::Dtype};

/// Activations as products take them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planes {
    pub(super) hi: u64,
    pub(super) lo: u64,
    /// Elements from row to row.
    pub(super) ld: usize,
}

/// Where a product goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Out {
    pub(super) at: u64,
    pub(super) ld: usize,
}

/// Several products in one: of the same rows with several matrices, or of rows in groups with a matrix each.
#[derive(Clone, Copy, Debug)]
pub(super) enum Many {
    /// One.
    Single,
    /// Matrix `b` with what lies `x` elements further for each, to what lies `out` elements further.
    Batch { count: usize, w: usize, x: usize, out: usize, scale: usize },
    /// As many groups at most, listed at `at`; a row's activations are found at `x_rows` (0: at its own place).
    Groups { at: u64, count: usize, x_rows: u64, w: usize, scale: usize },
}

/// The kernels for one type of weights.
#[derive(Clone, Copy)]
struct Family {
    narrow8: Function,
    wide64: Function,
    /// Where there is one, and a block has shared memory enough.
    wide128: Option<Function>,
}

pub(super) struct Products {
    /// By type and arithmetic.
    families: [[Option<Family>; 2]; 5],
    sum: Function,
    scale_bias: Function,
    blas: Option<Blas>,
    partials: u64,
    processors: usize,
    compute: Compute,
}

/// Most tokens for which reading the weights is all that counts.
const NARROW: usize = 8;
/// From so many on, large tiles.
const LARGE: usize = 96;

impl Products {
    pub(super) fn new(context: &Arc<Context>, module: &Module, compute: Compute, partials: u64) -> Result<Self, Error> {
        let (sum, scale_bias) = (module.function("linear_sum", 0)?, module.function("scale_bias", 0)?);
        let blas = match compute {
            Compute::Fast => Blas::new(context)?,
            Compute::Exact => None,
        };
        let processors = context.processors as usize;
        Ok(Self { families: [[None; 2]; 5], sum, scale_bias, blas, partials, processors, compute })
    }

    /// Products that cuBLASLt made.
    pub(super) fn by_library(&self) -> u64 {
        self.blas.as_ref().map_or(0, Blas::made)
    }

    /// Looks up the kernels for weights of a type.
    pub(super) fn prepare(&mut self, module: &Module, dtype: Dtype) -> Result<(), Error> {
        for compute in [Compute::Exact, Compute::Fast] {
            let (mode, planes) = match compute {
                Compute::Exact => ("exact", 2),
                Compute::Fast => ("fast", 1),
            };
            let find =
                |tile: &str, shared| module.function(&format!("linear_{tile}_{}_{mode}", abi::name(dtype)), shared);
            let shared = |tile| abi::wide_shared(dtype.bytes(), planes, tile);
            self.families[abi::code(dtype) as usize][compute as usize] = Some(Family {
                narrow8: find("narrow8", 0)?,
                wide64: find("wide64", shared(64))?,
                wide128: find("wide128", shared(128)).ok(),
            });
        }
        Ok(())
    }

    /// `out = x · wᵀ`, scaled and with the bias added.
    pub(super) fn apply(&self, stream: &Stream, w: &Matrix, x: Planes, rows: usize, out: Out) -> Result<(), Error> {
        self.with(stream, w, x, rows, out, Many::Single, self.compute)
    }

    /// The same for several matrices, side by side in `out`.
    pub(super) fn apply_all(
        &self,
        stream: &Stream,
        w: &[Matrix],
        x: Planes,
        rows: usize,
        out: Out,
    ) -> Result<(), Error> {
        let mut column = 0;
        for w in w {
            self.apply(stream, w, x, rows, Out { at: out.at + 4 * column as u64, ..out })?;
            column += w.rows;
        }
        Ok(())
    }

    /// The same exactly, whatever the backend's choice.
    pub(super) fn exact(&self, stream: &Stream, w: &Matrix, x: Planes, rows: usize, out: Out) -> Result<(), Error> {
        self.with(stream, w, x, rows, out, Many::Single, Compute::Exact)
    }

    /// Several products. `w.rows` are those of one matrix.
    pub(super) fn many(
        &self,
        stream: &Stream,
        w: &Matrix,
        x: Planes,
        rows: usize,
        out: Out,
        many: Many,
    ) -> Result<(), Error> {
        self.with(stream, w, x, rows, out, many, self.compute)
    }

    #[expect(clippy::too_many_arguments, reason = "private, and each is what a product is made of")]
    fn with(
        &self,
        stream: &Stream,
        w: &Matrix,
        x: Planes,
        rows: usize,
        out: Out,
        many: Many,
        compute: Compute,
    ) -> Result<(), Error> {
        if rows == 0 {
            return Ok(());
        }
        if let (Compute::Fast, Many::Single, Some(blas)) = (compute, many, &self.blas)
            && blas.multiply(stream, w, x, rows, out)?
        {
            if w.bias == 0 {
                return Ok(());
            }
            let (rows, width, ld) = (rows as u32, w.rows as u32, out.ld as u32);
            let args = ScaleBias { y: out.at, scale: 0, bias: w.bias, rows, width, ld, pad: 0 };
            let grid = [rows as usize, w.rows.div_ceil(abi::ROW_THREADS as usize), 1];
            return stream.launch(self.scale_bias, grid, abi::ROW_THREADS, &args);
        }
        let family = self.families[abi::code(w.dtype) as usize][compute as usize];
        let family = family.expect("kernels are looked up for every type of weights that is loaded");
        let mut args = LinearArgs {
            w: w.at,
            scale: w.scale,
            bias: w.bias,
            x_hi: x.hi,
            x_lo: x.lo,
            out: out.at,
            partials: self.partials,
            rows: rows as u32,
            n: w.rows as u32,
            k: w.ld as u32,
            ld_w: w.ld as u32,
            ld_x: x.ld as u32,
            ld_out: out.ld as u32,
            splits: 1,
            scale_blocks: w.blocks as u32,
            ..LinearArgs::default()
        };
        // How many tokens a matrix meets, as far as the host knows.
        let (batch, tokens, grouped) = match many {
            Many::Single => (1, rows, false),
            Many::Batch { count, w, x, out, scale } => {
                (args.w_stride, args.x_stride) = (w as u64, x as u64);
                (args.out_stride, args.scale_stride) = (out as u64, scale as u64);
                (count, rows, false)
            }
            Many::Groups { at, count, x_rows, w, scale } => {
                (args.groups, args.x_rows) = (at, x_rows);
                (args.w_stride, args.scale_stride) = (w as u64, scale as u64);
                (count, rows.div_ceil(count), true)
            }
        };
        let tiles = |tile: usize| if grouped { 1 } else { rows.div_ceil(tile) };
        if tokens <= NARROW {
            let grid = [w.rows.div_ceil(abi::NARROW_ROWS), tiles(NARROW), batch];
            return stream.launch(family.narrow8, grid, abi::NARROW_THREADS, &args);
        }
        let (kernel, tile) = match family.wide128 {
            Some(wide128) if tokens > LARGE => (wide128, 128),
            _ => (family.wide64, 64),
        };
        let panels = w.rows.div_ceil(abi::WIDE_ROWS);
        // Where there are fewer tiles than processors, each slice has a block of its own.
        let room = matches!(many, Many::Single) && abi::K_SLICES * rows * w.rows * 4 <= PARTIALS;
        let splits = if room && panels * tiles(tile) < self.processors { abi::K_SLICES } else { 1 };
        args.splits = splits as u32;
        stream.launch(kernel, [tiles(tile), panels, batch * splits], abi::WIDE_THREADS, &args)?;
        if splits > 1 {
            let grid = [w.rows.div_ceil(abi::ROW_THREADS as usize), rows, 1];
            stream.launch(self.sum, grid, abi::ROW_THREADS, &args)?;
        }
        Ok(())
    }
}
