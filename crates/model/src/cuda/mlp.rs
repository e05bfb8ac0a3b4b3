//! The MLP of a layer: one for all rows, or experts of which each row takes a few.
//!
//! Rows that chose the same expert go through it together: they are sorted by expert on the device, and one launch makes the
//! products of all experts, each block finding in a list which matrix and which rows are its own. What experts make of a
//! row is added in ascending order of experts, whoever else is in the batch.

use super::{
    abi::{self, Combine, Gate, GroupArgs, Route},
    collective::Collective,
    driver::Stream,
    forward::Kernels,
    load::{Matrix, padded},
    model::{Gated, Mlp, Routed},
    products::{Many, Out, Planes, Products},
    scratch::{Scratch, Space},
};
use crate::{Error, graph::Scoring};

/// What the MLP computes with.
pub(super) struct Through<'a> {
    pub(super) stream: &'a Stream,
    pub(super) products: &'a Products,
    pub(super) kernels: &'a Kernels,
    pub(super) scratch: &'a Scratch,
    pub(super) collective: &'a Collective,
}

impl Through<'_> {
    /// Applies it to `rows` rows of `x`; what comes out is `f32`, rows of `hidden`.
    pub(super) fn mlp(&self, mlp: &Mlp, x: Planes, rows: usize, hidden: usize) -> Result<(), Error> {
        let out = self.collective.part(self.scratch, hidden);
        match mlp {
            Mlp::Dense(mlp) => self.gated(mlp, x, rows, out)?,
            Mlp::Routed(mlp) => self.routed(mlp, x, rows, out)?,
        }
        self.collective.change(self.stream, self.scratch, rows, hidden)
    }

    fn gated(&self, mlp: &Gated, x: Planes, rows: usize, out: Out) -> Result<(), Error> {
        let both = Out { at: self.scratch.at(Space::GateUp), ld: 2 * mlp.width };
        self.products.apply_all(self.stream, &mlp.gate_up, x, rows, both)?;
        let gated = self.gate(abi::activation(mlp.activation), mlp.width, rows)?;
        let gated = self.collective.planes(self.stream, self.scratch, gated, rows, mlp.width)?;
        self.products.apply(self.stream, &mlp.down, gated, rows, out)
    }

    /// The activation of one half times the other.
    fn gate(&self, activation: u32, width: usize, rows: usize) -> Result<Planes, Error> {
        let (hi, lo, ld) = (self.scratch.at(Space::GatedHi), self.scratch.at(Space::GatedLo), padded(width));
        let args = Gate {
            src: self.scratch.at(Space::GateUp),
            hi,
            lo,
            rows: rows as u32,
            width: width as u32,
            ld_src: 2 * width as u32,
            ld: ld as u32,
            activation,
            pad: 0,
        };
        let grid = [rows, ld.div_ceil(abi::ROW_THREADS as usize), 1];
        self.stream.launch(self.kernels.gate, grid, abi::ROW_THREADS, &args)?;
        Ok(Planes { hi, lo, ld })
    }

    fn routed(&self, mlp: &Routed, x: Planes, rows: usize, out: Out) -> Result<(), Error> {
        let at = |space| self.scratch.at(space);
        let (experts, top_k) = (mlp.experts, mlp.gate.top_k);
        let scores = Out { at: at(Space::Scores), ld: experts };
        self.products.exact(self.stream, &mlp.router, x, rows, scores)?;
        let groups = mlp.gate.groups;
        let route = Route {
            scores: scores.at,
            correction: mlp.correction,
            experts_out: at(Space::Chosen),
            weights_out: at(Space::Weights),
            rows: rows as u32,
            ld: experts as u32,
            experts: experts as u32,
            top_k: top_k as u32,
            scoring: match mlp.gate.scoring {
                Scoring::Softmax => 0,
                Scoring::Sigmoid => 1,
            },
            groups: groups.map_or(0, |groups| groups.count as u32),
            groups_kept: groups.map_or(0, |groups| groups.kept as u32),
            groups_best: groups.map_or(0, |groups| groups.best as u32),
            normalise: u32::from(mlp.gate.normalise),
            scale: mlp.gate.scale,
        };
        self.stream.launch(self.kernels.route(experts), [rows, 1, 1], abi::ROW_THREADS, &route)?;
        let places = rows * top_k;
        let count = experts.min(places);
        let group = GroupArgs {
            chosen: route.experts_out,
            groups: at(Space::Groups),
            row_of: at(Space::RowOf),
            place_of: at(Space::PlaceOf),
            rows: rows as u32,
            top_k: top_k as u32,
            experts: experts as u32,
            max_groups: count as u32,
        };
        self.stream.launch(self.kernels.group(experts), [1, 1, 1], abi::GROUP_THREADS, &group)?;

        let grouped = |matrix: &Matrix, rows: usize, x_rows| {
            let one = Matrix { rows, ..matrix.clone() };
            let (w, scale) = (rows * matrix.ld, one.scales());
            (one, Many::Groups { at: group.groups, count, x_rows, w, scale })
        };
        let (gate_up, many) = grouped(&mlp.gate_up, 2 * mlp.width, group.row_of);
        let both = Out { at: at(Space::GateUp), ld: 2 * mlp.width };
        self.products.many(self.stream, &gate_up, x, places, both, many)?;
        let gated = self.gate(abi::activation(mlp.activation), mlp.width, places)?;
        let gated = self.collective.planes(self.stream, self.scratch, gated, places, mlp.width)?;
        let (down, many) = grouped(&mlp.down, out.ld, 0);
        let made = Out { at: at(Space::Experts), ld: out.ld };
        self.products.many(self.stream, &down, gated, places, made, many)?;

        let shared = Out { at: at(Space::Shared), ld: out.ld };
        if let Some(mlp) = &mlp.shared {
            self.gated(mlp, x, rows, shared)?;
        }
        let combine = Combine {
            change: made.at,
            weights: route.weights_out,
            place_of: group.place_of,
            shared: if mlp.shared.is_some() { shared.at } else { 0 },
            out: out.at,
            rows: rows as u32,
            top_k: top_k as u32,
            width: out.ld as u32,
            ld_change: made.ld as u32,
            ld_shared: shared.ld as u32,
            ld_out: out.ld as u32,
        };
        let grid = [rows, out.ld.div_ceil(abi::ROW_THREADS as usize), 1];
        self.stream.launch(self.kernels.combine, grid, abi::ROW_THREADS, &combine)
    }
}
