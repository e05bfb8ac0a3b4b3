//! Weights on the device: one stretch of its memory, filled from the mapped files by way of two pinned buffers.
//!
//! What is loaded is written down once, by the code that will use it: it runs twice, first to add up how much memory that
//! takes, then to fill it. Matrices that are applied to the same rows (queries, keys and values; gate and up) lie one behind
//! the other, so that one product makes all of them. Rows are padded with zeros to what products take at a time.

use std::sync::Arc;

use super::{
    abi,
    driver::{Buffer, Context, Event, Pinned, Stream},
};
use crate::{
    Error,
    graph::{LinearSpec, NormSpec},
    group::Place,
    weights::{BLOCK, Dtype, Scale, Tensor, Weights},
};

/// By how much scales of neighbouring blocks may differ: sums are carried from the one's units to the other's.
const MAX_QUOTIENT: f32 = 1e24;
/// Where anything begins: enough for the widest loads.
const ALIGNMENT: usize = 256;
/// Bytes of one of the two buffers.
const STAGING: usize = 8 << 20;
/// Bytes between two signs of life.
const TELL: usize = 4 << 30;

/// The width that rows of `cols` elements have there.
pub(super) fn padded(cols: usize) -> usize {
    cols.next_multiple_of(abi::K_UNIT)
}

/// Takes weights: to count them, or to bring them to the device.
pub(super) struct Loader<'a> {
    weights: &'a Weights,
    /// Whose part of them.
    pub(super) place: Place,
    used: usize,
    filling: Option<Filling>,
}

struct Filling {
    buffer: Buffer,
    stream: Stream,
    staging: [(Pinned<u8>, Event); 2],
    next: usize,
    told: usize,
}

/// A matrix, or several of one width below one another, as `linear` kernels take them.
#[derive(Clone, Debug)]
pub(super) struct Matrix {
    pub(super) at: u64,
    pub(super) dtype: Dtype,
    pub(super) rows: usize,
    /// Elements from row to row.
    pub(super) ld: usize,
    /// An `f32` for each row, or 0. With `blocks` a pair for each block of [`abi::SCALE_ROWS`] rows and [`abi::SCALE_COLS`]
    /// columns: its scale, and that by the next block's.
    pub(super) scale: u64,
    /// Blocks of columns that have a scale of their own; 0 if rows have.
    pub(super) blocks: usize,
    /// An `f32` for each row, or 0.
    pub(super) bias: u64,
}

impl Matrix {
    /// Some of its rows.
    pub(super) fn rows(&self, first: usize, count: usize) -> Self {
        let vector = |at: u64| if at == 0 { 0 } else { at + 4 * first as u64 };
        let scale = match self.blocks {
            0 => vector(self.scale),
            blocks => {
                assert!(first.is_multiple_of(abi::SCALE_ROWS), "parts of a matrix begin where blocks do");
                self.scale + (first / abi::SCALE_ROWS * blocks * 8) as u64
            }
        };
        Self {
            at: self.at + (first * self.ld * self.dtype.bytes()) as u64,
            rows: count,
            scale,
            bias: vector(self.bias),
            ..self.clone()
        }
    }

    /// `f32`s of its scales.
    pub(super) fn scales(&self) -> usize {
        match self.blocks {
            0 => self.rows,
            blocks => self.rows.div_ceil(abi::SCALE_ROWS) * blocks * 2,
        }
    }
}

/// An RMS norm's weight, what it is an offset from added.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    pub(super) at: u64,
    pub(super) eps: f32,
}

impl<'a> Loader<'a> {
    /// One that only counts.
    pub(super) fn counting(weights: &'a Weights, place: Place) -> Self {
        Self { weights, place, used: 0, filling: None }
    }

    /// One that brings `bytes` bytes, as counted, to the device.
    pub(super) fn filling(
        weights: &'a Weights,
        place: Place,
        context: &Arc<Context>,
        bytes: usize,
    ) -> Result<Self, Error> {
        let staging = || Ok::<_, Error>((Pinned::new(context, STAGING)?, Event::new(context)?));
        let filling = Filling {
            buffer: Buffer::new(context, bytes)?,
            stream: Stream::new(context)?,
            staging: [staging()?, staging()?],
            next: 0,
            told: 0,
        };
        Ok(Self { weights, place, used: 0, filling: Some(filling) })
    }

    /// Bytes so far.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Waits for what is under way; the memory, if there is any.
    pub(super) fn finish(self) -> Result<Option<Buffer>, Error> {
        let Some(filling) = self.filling else { return Ok(None) };
        let Filling { buffer, stream, .. } = filling;
        stream.wait()?;
        Ok(Some(buffer))
    }

    pub(super) fn tensor(&self, name: &str) -> &'a Tensor {
        self.weights.get(name)
    }

    /// This rank's outputs of a weight's.
    pub(super) fn part(&self, name: &str) -> Tensor {
        let tensor = self.tensor(name);
        tensor.part(self.place.part(tensor.rows))
    }

    /// This rank's outputs of the map that `spec` describes.
    pub(super) fn linear(&mut self, spec: &LinearSpec) -> Result<Matrix, Error> {
        Ok(self.linears(&[spec])?.remove(0))
    }

    /// All outputs of a map, which every rank computes.
    pub(super) fn whole(&mut self, spec: &LinearSpec) -> Result<Matrix, Error> {
        Ok(self.maps(&[spec], Place::ALONE)?.remove(0))
    }

    /// This rank's outputs of maps of the same rows: one matrix if their weights are of one type, else one each.
    pub(super) fn linears(&mut self, specs: &[&LinearSpec]) -> Result<Vec<Matrix>, Error> {
        self.maps(specs, self.place)
    }

    fn maps(&mut self, specs: &[&LinearSpec], place: Place) -> Result<Vec<Matrix>, Error> {
        let part = |spec: &&LinearSpec| {
            let tensor = self.tensor(&format!("{}.weight", spec.name));
            tensor.part(place.part(tensor.rows))
        };
        let tensors: Vec<Tensor> = specs.iter().map(part).collect();
        if tensors.iter().any(|tensor| tensor.dtype != tensors[0].dtype || tensor.cols != tensors[0].cols) {
            return specs.iter().map(|&spec| Ok(self.maps(&[spec], place)?.remove(0))).collect();
        }
        let bias = specs.iter().any(|spec| spec.bias).then(|| {
            let part = |(spec, tensor): (&&LinearSpec, &Tensor)| {
                if spec.bias {
                    self.tensor(&format!("{}.bias", spec.name)).to_f32()[place.part(spec.outputs)].to_vec()
                } else {
                    vec![0.0; tensor.rows]
                }
            };
            specs.iter().zip(&tensors).flat_map(part).collect::<Vec<f32>>()
        });
        Ok(vec![self.stack(&tensors.iter().collect::<Vec<_>>(), bias.as_deref())?])
    }

    /// Matrices of one type and width below one another.
    pub(super) fn stack(&mut self, tensors: &[&Tensor], bias: Option<&[f32]>) -> Result<Matrix, Error> {
        let blocked = |tensor: &&Tensor| matches!(tensor.scale(), Scale::Blocks { .. });
        let begins = |tensor: &&Tensor| match tensor.scale() {
            Scale::Blocks { first, .. } => first.is_multiple_of(abi::SCALE_ROWS),
            Scale::None | Scale::Rows(_) => false,
        };
        let fits = |tensor: &&Tensor| begins(tensor) && tensor.rows.is_multiple_of(abi::SCALE_ROWS);
        if tensors.iter().any(blocked) && !(tensors.iter().all(fits) || tensors.len() == 1 && begins(&tensors[0])) {
            // Blocks of the one would lie across the next one's: then the numbers themselves.
            return self.plain(tensors, bias);
        }
        let (dtype, cols) = (tensors[0].dtype, tensors[0].cols);
        let (ld, rows) = (padded(cols), tensors.iter().map(|tensor| tensor.rows).sum());
        let (width, wanted) = (cols * dtype.bytes(), ld * dtype.bytes());
        let at = if ld == cols {
            self.bytes(&tensors.iter().map(|tensor| tensor.bytes()).collect::<Vec<_>>())?
        } else if self.filling.is_none() {
            self.room(rows * wanted)
        } else {
            let mut whole = vec![0; rows * wanted];
            let from = tensors.iter().flat_map(|tensor| tensor.bytes().chunks_exact(width));
            whole.chunks_exact_mut(wanted).zip(from).for_each(|(to, from)| to[..width].copy_from_slice(from));
            self.bytes(&[&whole])?
        };
        let blocks = if tensors.iter().any(blocked) { cols.div_ceil(abi::SCALE_COLS) } else { 0 };
        let mut scales = Vec::new();
        for tensor in tensors {
            match tensor.scale() {
                Scale::None => {}
                Scale::Rows(scale) => scales.extend_from_slice(scale),
                Scale::Blocks { scale, first } => pairs(scale, first, tensor, &mut scales)?,
            }
        }
        let scale = if scales.is_empty() { 0 } else { self.numbers(&scales)? };
        let bias = bias.map_or(Ok(0), |bias| self.numbers(bias))?;
        Ok(Matrix { at, dtype, rows, ld, scale, blocks, bias })
    }

    /// The same, of matrices that have scales for blocks: the numbers themselves.
    pub(super) fn plain(&mut self, tensors: &[&Tensor], bias: Option<&[f32]>) -> Result<Matrix, Error> {
        let plain: Vec<Tensor> = tensors.iter().map(|tensor| tensor.without_blocks()).collect();
        self.stack(&plain.iter().collect::<Vec<_>>(), bias)
    }

    /// A matrix of bytes that no file holds: `rows` rows, padded already.
    pub(super) fn made(
        &mut self,
        (dtype, rows, ld): (Dtype, usize, usize),
        bytes: impl FnOnce() -> Vec<u8>,
    ) -> Result<Matrix, Error> {
        let at = match self.filling {
            Some(_) => self.bytes(&[&bytes()])?,
            None => self.room(rows * ld * dtype.bytes()),
        };
        Ok(Matrix { at, dtype, rows, ld, scale: 0, blocks: 0, bias: 0 })
    }

    /// The norm that `spec` describes.
    pub(super) fn norm(&mut self, spec: &NormSpec) -> Result<Norm, Error> {
        let mut weight = self.tensor(&format!("{}.weight", spec.name)).to_f32();
        weight.iter_mut().for_each(|weight| *weight += spec.offset);
        Ok(Norm { at: self.numbers(&weight)?, eps: spec.eps })
    }

    /// Numbers, one after the other.
    pub(super) fn numbers(&mut self, values: &[f32]) -> Result<u64, Error> {
        if self.filling.is_none() {
            return Ok(self.room(4 * values.len()));
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.bytes(&[&bytes])
    }

    /// Takes room; the offset of it.
    fn room(&mut self, bytes: usize) -> u64 {
        let at = self.used as u64;
        // Some more behind each, so that a wide load at the end of one stays inside.
        self.used = (self.used + bytes).next_multiple_of(ALIGNMENT) + ALIGNMENT;
        at
    }

    /// Bytes of several pieces, one after the other.
    fn bytes(&mut self, parts: &[&[u8]]) -> Result<u64, Error> {
        let at = self.room(parts.iter().map(|part| part.len()).sum());
        let Some(filling) = &mut self.filling else { return Ok(at) };
        let at = filling.buffer.at + at;
        let mut to = at;
        for part in parts {
            for piece in part.chunks(STAGING) {
                filling.send(to, piece)?;
                to += piece.len() as u64;
            }
        }
        if self.used - filling.told > TELL {
            filling.told = self.used;
            tracing::info!(bytes = self.used, of = filling.buffer.bytes(), "weights on their way to the device");
        }
        Ok(at)
    }
}

/// Scales of blocks as kernels take them: for each [`abi::SCALE_ROWS`] rows, pairs.
fn pairs(scale: &[f32], begin: usize, tensor: &Tensor, out: &mut Vec<f32>) -> Result<(), Error> {
    const { assert!(BLOCK == abi::SCALE_COLS && BLOCK.is_multiple_of(abi::SCALE_ROWS)) };
    let across = tensor.cols.div_ceil(BLOCK);
    for first in (begin..begin + tensor.rows).step_by(abi::SCALE_ROWS) {
        let row = &scale[first / BLOCK * across..][..across];
        for (i, &scale) in row.iter().enumerate() {
            let quotient = row.get(i + 1).map_or(1.0, |next| scale / next);
            if !(1.0 / MAX_QUOTIENT..=MAX_QUOTIENT).contains(&quotient) {
                let what = format!("neighbouring blocks of weights whose scales are {quotient:e} apart");
                return Err(Error::NotOnDevice { device: "cuda".to_owned(), what });
            }
            out.extend([scale, quotient]);
        }
    }
    Ok(())
}

impl Filling {
    fn send(&mut self, to: u64, piece: &[u8]) -> Result<(), Error> {
        let (staging, sent) = &mut self.staging[self.next];
        self.next ^= 1;
        // What it held before is on the device. (An event that was never recorded has passed.)
        sent.wait()?;
        staging.slice()[..piece.len()].copy_from_slice(piece);
        // SAFETY: pinned memory that is not touched again before the event behind the copy has passed; `to` is inside the
        // buffer by the count that it was made from.
        unsafe { self.stream.upload(to, staging.as_ptr(), piece.len())? };
        sent.record(&self.stream)
    }
}
