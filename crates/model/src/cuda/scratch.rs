//! What a step computes in: memory of the device that is kept from step to step and grows when a step needs more.

use std::sync::Arc;

use super::{
    abi,
    driver::{Buffer, Context, Stream},
    load::padded,
    model::{Mlp, Model, Projections, Query},
};
use crate::{Error, ModelConfig};

/// A stretch of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    /// What the host says about the step.
    Inputs,
    /// The residual stream, and a normalised row's planes.
    X,
    Hi,
    Lo,
    /// The same of the rows whose logits are wanted.
    WantedX,
    WantedHi,
    WantedLo,
    Cos,
    Sin,
    /// Products that become queries, keys and values.
    Source,
    Queries,
    /// Planes on the way to latent queries.
    LatentHi,
    LatentLo,
    NopeHi,
    NopeLo,
    /// Planes of what attention summed up.
    AttendedHi,
    AttendedLo,
    /// What is added to the residual stream.
    Change,
    GateUp,
    GatedHi,
    GatedLo,
    /// Routing: scores, experts chosen, their weights, groups of rows, and where rows are in them.
    Scores,
    Chosen,
    Weights,
    Groups,
    RowOf,
    PlaceOf,
    /// What experts make of their rows, and the shared one of all.
    Experts,
    Shared,
    Logits,
    /// Of several ranks: this one's columns of `Change`, what has been gathered, and planes made of it.
    Part,
    Gathered,
    WholeHi,
    WholeLo,
    /// What tokens are listed by where that is not their logits; noise and scale of each row.
    Noisy,
    Noise,
    /// The listed tokens, and what sums up a row.
    Likeliest,
    /// Sums of parts of products and of attention.
    Partials,
    PartSums,
    PartMax,
}

const SPACES: usize = Space::PartMax as usize + 1;

/// Room for partial sums of products.
pub(super) const PARTIALS: usize = 16 << 20;
/// Room for partial sums of attention, unless one row needs more.
pub(super) const PART_SUMS: usize = 128 << 20;
/// Rows of logits that there is room for from the start.
const LOGITS: usize = 64;

/// Words that tell of a row's listed tokens: which, by what they were listed, the largest of that and the logarithm of the sum of
/// its exponentials, their logits, and the largest logit.
pub(super) const LISTED: usize = 3 * abi::SHORTLIST + 3;

/// Bytes that the model takes of a space for each row.
pub(super) struct PerRow {
    ranks: usize,
    rows: [usize; SPACES],
    wanted: [usize; SPACES],
}

impl PerRow {
    pub(super) fn of(config: &ModelConfig, model: &Model, ranks: usize) -> Self {
        let mut this = Self { ranks, rows: [0; SPACES], wanted: [0; SPACES] };
        let hidden = config.hidden;
        for (space, bytes) in [
            (Space::X, 4 * hidden),
            (Space::Hi, 2 * padded(hidden)),
            (Space::Lo, 2 * padded(hidden)),
            (Space::Change, 4 * hidden),
        ] {
            this.take(space, bytes);
        }
        if ranks > 1 {
            this.take(Space::Part, 4 * hidden / ranks);
            this.take(Space::Gathered, 4 * hidden);
        }
        let pairs: usize = model.ropes.iter().map(|rope| rope.half).sum();
        this.take(Space::Cos, 4 * pairs);
        this.take(Space::Sin, 4 * pairs);
        for layer in &model.layers {
            let attention = &layer.attention;
            this.take(Space::Queries, 4 * attention.heads * attention.k_dim);
            match &attention.projections {
                Projections::Grouped(grouped) => {
                    this.take(Space::Source, 4 * grouped.all.iter().map(|matrix| matrix.rows).sum::<usize>());
                    let width = attention.heads * attention.v_dim;
                    this.both(Space::AttendedHi, Space::AttendedLo, padded(width));
                    this.gathered(1, width);
                }
                Projections::Latent(latent) => {
                    let value = attention.heads * latent.value;
                    this.take(Space::Source, 4 * value);
                    this.take(Space::Source, 4 * latent.kv_down.rows);
                    this.both(Space::AttendedHi, Space::AttendedLo, attention.heads * padded(latent.rank));
                    this.both(Space::AttendedHi, Space::AttendedLo, padded(value));
                    this.gathered(1, value);
                    this.both(Space::NopeHi, Space::NopeLo, attention.heads * padded(latent.nope));
                    match &latent.q {
                        Query::Direct(q) => this.take(Space::Source, 4 * q.rows),
                        Query::Compressed { down, up, .. } => {
                            this.take(Space::Source, 4 * down.rows.max(up.rows));
                            this.both(Space::LatentHi, Space::LatentLo, padded(down.rows));
                        }
                    }
                }
            }
            match &layer.mlp {
                Mlp::Dense(mlp) => this.gated(mlp.width),
                Mlp::Routed(mlp) => {
                    let top_k = mlp.gate.top_k;
                    this.gated(top_k * mlp.width);
                    this.both(Space::GatedHi, Space::GatedLo, top_k * padded(mlp.width));
                    this.gathered(top_k, mlp.width);
                    this.take(Space::Scores, 4 * mlp.experts);
                    for space in [Space::Chosen, Space::Weights, Space::RowOf, Space::PlaceOf] {
                        this.take(space, 4 * top_k);
                    }
                    this.take(Space::Groups, 16 * top_k);
                    this.take(Space::Experts, 4 * top_k * hidden);
                    if let Some(shared) = &mlp.shared {
                        this.gated(shared.width);
                        this.take(Space::Shared, 4 * hidden);
                    }
                }
            }
        }
        for (space, bytes) in [
            (Space::WantedX, 4 * hidden),
            (Space::WantedHi, 2 * padded(hidden)),
            (Space::WantedLo, 2 * padded(hidden)),
            (Space::Logits, 4 * model.output.rows),
            (Space::Noisy, 4 * model.output.rows),
            (Space::Noise, 16),
            (Space::Likeliest, 4 * LISTED),
        ] {
            this.wanted[space as usize] = bytes;
        }
        this
    }

    fn take(&mut self, space: Space, bytes: usize) {
        self.rows[space as usize] = self.rows[space as usize].max(bytes);
    }

    fn both(&mut self, hi: Space, lo: Space, elements: usize) {
        self.take(hi, 2 * elements);
        self.take(lo, 2 * elements);
    }

    fn gated(&mut self, width: usize) {
        self.take(Space::GateUp, 8 * width);
        self.both(Space::GatedHi, Space::GatedLo, padded(width));
        self.gathered(1, width);
    }

    /// Planes of `width` columns of this rank, `count` for each row, that all ranks' are gathered of.
    fn gathered(&mut self, count: usize, width: usize) {
        if self.ranks > 1 {
            self.both(Space::WholeHi, Space::WholeLo, count * padded(self.ranks * width));
            self.take(Space::Gathered, 2 * 2 * self.ranks * count * padded(width));
        }
    }

    /// Bytes of each space for a step of so many rows, `wanted` of which have logits.
    fn bytes(&self, rows: usize, wanted: usize) -> impl Iterator<Item = usize> {
        self.rows.iter().zip(&self.wanted).map(move |(a, b)| a * rows + b * wanted)
    }

    /// Bytes that are taken from the start for steps of at most so many rows.
    pub(super) fn total(&self, rows: usize) -> usize {
        let some = self.bytes(rows, LOGITS).map(|bytes| bytes.next_multiple_of(1 << 21)).sum::<usize>();
        some + PARTIALS + PART_SUMS
    }
}

/// The spaces.
pub(super) struct Scratch {
    context: Arc<Context>,
    spaces: [Option<Buffer>; SPACES],
    /// Counts the times that one of them moved.
    pub(super) generation: u64,
}

impl Scratch {
    /// Room for steps of so many rows.
    pub(super) fn new(context: &Arc<Context>, per_row: &PerRow, rows: usize, stream: &Stream) -> Result<Self, Error> {
        let mut this = Self { context: Arc::clone(context), spaces: [const { None }; SPACES], generation: 0 };
        this.make_room(per_row, rows, LOGITS, stream)?;
        this.room(Space::Partials, PARTIALS, stream)?;
        Ok(this)
    }

    /// Sees to it that there is room for a step.
    pub(super) fn make_room(
        &mut self,
        per_row: &PerRow,
        rows: usize,
        wanted: usize,
        stream: &Stream,
    ) -> Result<(), Error> {
        for (space, bytes) in per_row.bytes(rows, wanted).enumerate() {
            self.grow(space, bytes, stream)?;
        }
        Ok(())
    }

    /// Room of one kind.
    pub(super) fn room(&mut self, space: Space, bytes: usize, stream: &Stream) -> Result<(), Error> {
        self.grow(space as usize, bytes, stream)
    }

    fn grow(&mut self, space: usize, bytes: usize, stream: &Stream) -> Result<(), Error> {
        let place = &mut self.spaces[space];
        if bytes == 0 || place.as_ref().is_some_and(|buffer| buffer.bytes() >= bytes) {
            return Ok(());
        }
        // The old one may still be in use, and both may not fit.
        stream.wait()?;
        self.generation += 1;
        *place = None;
        *place = Some(Buffer::new(&self.context, bytes)?);
        Ok(())
    }

    /// Where a space is; 0 where the model needs none of it.
    pub(super) fn at(&self, space: Space) -> u64 {
        self.spaces[space as usize].as_ref().map_or(0, |buffer| buffer.at)
    }
}
