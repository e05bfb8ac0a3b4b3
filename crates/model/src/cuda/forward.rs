//! One step: launches, layer after layer, as [`crate::graph`] describes them.
//!
//! Nothing waits in between: the host is done with a step's launches long before the device is. Of a step with prompts in it the
//! host then waits layer by layer for what others look at, the keys and values in the host's arena; of one that only decodes, for
//! its end. Such a step's launches are one graph (`graphs`), so whatever is launched in a step must be what may be captured: work
//! in `stream`, or in streams that wait for it and that it waits for, with arguments that a [`Step`]'s shape decides.

use std::mem;

use super::{
    CudaBackend,
    abi::{self, Embed, GatherRows, HeadsArgs, LatentKeys, LatentQueries, NormArgs, RotationsArgs, SoftCap, Split},
    attention::Ends,
    driver::Pinned,
    graphs::Graphs,
    load::{Norm, padded},
    mlp::Through,
    model::{Grouped, Latent, Layer, Mlp, Model, Projections, Query},
    module::{Function, Module},
    products::{Many, Out, Planes},
    scratch::{LISTED, Space},
    step::{Attending, Making, Padding, Step},
};
use crate::{Error, Need, SeqInput, cpu::Compute};

/// Everything that is neither a product nor attention.
pub(super) struct Kernels {
    embed: Function,
    norm: Function,
    pub(super) gate: Function,
    split: Function,
    soft_cap: Function,
    gather_rows: Function,
    pub(super) shortlist: Function,
    pub(super) perturb: Function,
    pub(super) pick: Function,
    rotations: Function,
    heads: Function,
    latent_keys: Function,
    latent_queries: Function,
    pub(super) combine: Function,
    /// By number of experts: they ask for memory for each.
    routes: Vec<(usize, Function, Function)>,
}

impl Kernels {
    pub(super) fn new(module: &Module, model: &Model, compute: Compute) -> Result<Self, Error> {
        let find = |name| module.function(name, 0);
        let mut routes: Vec<(usize, Function, Function)> = Vec::new();
        for layer in &model.layers {
            if let Mlp::Routed(mlp) = &layer.mlp
                && routes.iter().all(|(experts, ..)| *experts != mlp.experts)
            {
                let (route, group) = (abi::route_shared(mlp.experts), abi::group_shared(mlp.experts));
                routes.push((mlp.experts, module.function("route", route)?, module.function("group", group)?));
            }
        }
        Ok(Self {
            embed: find("embed")?,
            norm: find("rms_norm")?,
            gate: find(match compute {
                Compute::Exact => "gate_exact",
                Compute::Fast => "gate_fast",
            })?,
            split: find("split")?,
            soft_cap: find("soft_cap")?,
            gather_rows: find("gather_rows")?,
            shortlist: find("shortlist")?,
            perturb: find("perturb")?,
            pick: find("pick")?,
            rotations: find("rotations")?,
            heads: find("heads")?,
            latent_keys: find("latent_keys")?,
            latent_queries: find("latent_queries")?,
            combine: find("combine")?,
            routes,
        })
    }

    fn of(&self, experts: usize) -> &(usize, Function, Function) {
        self.routes.iter().find(|(of, ..)| *of == experts).expect("every number of experts was seen when it was loaded")
    }

    /// Chooses among so many experts.
    pub(super) fn route(&self, experts: usize) -> Function {
        self.of(experts).1
    }

    /// Sorts rows by so many experts.
    pub(super) fn group(&self, experts: usize) -> Function {
        self.of(experts).2
    }
}

/// The rows that are being computed: of the last layer's end, those that are wanted.
#[derive(Clone, Copy)]
struct Rows {
    count: usize,
    /// Rows of the whole step: where rotations lie depends on it.
    step: usize,
    x: u64,
    planes: Planes,
    /// Row of the rotations of each, or 0.
    rotation_of: u64,
    positions: u64,
}

impl CudaBackend {
    /// Computes a batch that has been checked.
    pub(super) fn compute_step(
        &mut self,
        batch: &[SeqInput<'_>],
        needs: &[Need],
        after_layer: &mut dyn FnMut(usize),
    ) -> Result<crate::Rows, Error> {
        let (last, _) = self.groups.place(self.config.layers.len() - 1);
        let making = Making {
            groups: &self.groups,
            block_size: self.arena.layout.block_size as usize,
            cut: self.attends.cut,
            last,
            padding: if self.graphs.are_wanted() { self.padding } else { Padding::None },
        };
        let step = Step::new(batch, making);
        let prepared = self.prepare(&step);
        let inputs = self.collective.agree(prepared)?;
        let needs = self.needs(batch, needs);
        let launched = self.run(&step, inputs).and_then(|()| self.fetch(&step.wanted.order, &needs));
        if let Err(error) = &launched {
            self.collective.abort(error);
            // What was launched reads and writes what the caller frees or reuses next. If this fails, too, the first
            // error says more.
            let _ = self.stream.wait();
            launched?;
        }
        if step.shape.is_none() {
            for (layer, mirrored) in self.mirrored.iter().enumerate() {
                mirrored.wait()?;
                self.collective.check()?;
                after_layer(layer);
            }
        }
        self.stream.wait()?;
        self.collective.check()?;
        if step.shape.is_some() {
            // A step that decodes is over before anyone could do much with a layer of it.
            (0..self.mirrored.len()).for_each(after_layer);
        }
        self.rows(&step.wanted.order, &needs)
    }

    /// All of a step's launches, as one where it has a shape.
    fn run(&mut self, step: &Step, inputs: u64) -> Result<(), Error> {
        // Borrowed apart: the launches read everything else.
        let mut graphs = mem::replace(&mut self.graphs, Graphs::new(false));
        let generation = self.scratch.generation;
        let ran = graphs.run(&self.stream, step.shape.as_ref(), generation, || self.launch(step, inputs));
        self.graphs = graphs;
        ran
    }

    /// Makes room for a step and sends what the host says about it; where the device finds that.
    fn prepare(&mut self, step: &Step) -> Result<u64, Error> {
        let bytes = step.packed.bytes();
        let wanted = step.wanted.count;
        self.scratch.make_room(&self.per_row, step.rows, wanted, &self.stream)?;
        for (space, bytes) in
            [(Space::Inputs, bytes.len()), (Space::PartSums, step.part_sums), (Space::PartMax, step.part_max)]
        {
            // Some more, so that a growing context does not make it grow each time.
            self.scratch.room(space, bytes.next_power_of_two(), &self.stream)?;
        }
        if self.inputs.len() < bytes.len() {
            self.inputs = Pinned::new(&self.context, bytes.len().next_power_of_two())?;
        }
        if self.likeliest.len() < wanted * LISTED {
            self.likeliest = Pinned::new(&self.context, wanted.next_power_of_two() * LISTED)?;
        }
        if self.noise.len() < 2 * wanted {
            self.noise = Pinned::new(&self.context, 2 * wanted.next_power_of_two())?;
        }
        if self.logits.len() < wanted * self.model.output.rows {
            self.logits = Pinned::new(&self.context, wanted.next_power_of_two() * self.model.output.rows)?;
        }
        self.inputs.slice()[..bytes.len()].copy_from_slice(bytes);
        let inputs = self.scratch.at(Space::Inputs);
        // SAFETY: pinned memory of this backend, written again by its next step, which waits for this one.
        unsafe { self.stream.upload(inputs, self.inputs.as_ptr(), bytes.len())? };
        Ok(inputs)
    }

    /// The launches. At their end the stream has waited for all that they set going beside it.
    fn launch(&self, step: &Step, inputs: u64) -> Result<(), Error> {
        self.layers(step, inputs)?;
        self.mirrored.last().map_or(Ok(()), |mirrored| self.stream.after(mirrored))
    }

    fn layers(&self, step: &Step, inputs: u64) -> Result<(), Error> {
        let at = |space| self.scratch.at(space);
        let hidden = self.config.hidden;
        let ld = padded(hidden);
        let all = Rows {
            count: step.rows,
            step: step.rows,
            x: at(Space::X),
            planes: Planes { hi: at(Space::Hi), lo: at(Space::Lo), ld },
            rotation_of: 0,
            positions: inputs + step.positions,
        };
        let wanted = Rows {
            count: step.wanted.count,
            step: step.rows,
            x: at(Space::WantedX),
            planes: Planes { hi: at(Space::WantedHi), lo: at(Space::WantedLo), ld },
            rotation_of: inputs + step.wanted.row_of,
            positions: inputs + step.wanted.positions,
        };
        self.embed(inputs + step.tokens, all)?;
        self.rotations(all)?;
        let mut rows = all;
        // Of the layer before: what is still to be added to the residual stream.
        let mut post: Option<Option<&Norm>> = None;
        let layers = self.model.layers.len();
        for (index, layer) in self.model.layers.iter().enumerate() {
            let last = index + 1 == layers;
            let (group, place) = self.groups.place(index);
            self.norm(rows, post, Some(&layer.attention_norm))?;
            post = Some(layer.mlp_post_norm.as_ref());
            let slots = inputs + step.groups[group].slots;
            let narrowing = last && !step.wanted.all;
            self.project(layer, place, rows, slots, (!narrowing, true))?;
            self.written[index].record(&self.stream)?;
            let runs = &step.groups[group];
            self.arena.mirror(
                place,
                (inputs + runs.runs_at, &runs.runs),
                &self.written[index],
                &self.mirrored[index],
            )?;

            let mut units = &step.groups[group].attend;
            if narrowing {
                // Beyond this point only rows whose logits are wanted matter to anyone.
                if wanted.count == 0 {
                    return Ok(());
                }
                self.keep(rows, wanted)?;
                rows = wanted;
                units = &step.wanted.attend;
                self.project(layer, place, rows, slots, (true, false))?;
            }
            self.attend(layer, place, rows, (step, units), inputs)?;
            self.norm(rows, Some(layer.attention_post_norm.as_ref()), Some(&layer.mlp_norm))?;
            let through = Through {
                stream: &self.stream,
                products: &self.products,
                kernels: &self.kernels,
                scratch: &self.scratch,
                collective: &self.collective,
            };
            through.mlp(&layer.mlp, rows.planes, rows.count, hidden)?;
        }
        self.norm(rows, post, Some(&self.model.final_norm))?;
        self.output(rows)
    }

    /// The embeddings of all tokens.
    fn embed(&self, tokens: u64, rows: Rows) -> Result<(), Error> {
        let weight = &self.model.embedding;
        let args = Embed {
            weight: weight.at,
            row_scale: weight.scale,
            tokens,
            x: rows.x,
            rows: rows.count as u32,
            width: self.config.hidden as u32,
            ld: weight.ld as u32,
            dtype: abi::code(weight.dtype),
            scale: self.config.embedding_scale,
            pad: 0,
        };
        self.stream.launch(self.kernels.embed, [rows.count, 1, 1], abi::ROW_THREADS, &args)
    }

    /// Where the sines and cosines of a rotation are, a row for each of the step's rows.
    fn turns(&self, rope: usize, rows: Rows) -> (u64, u64) {
        let before: usize = self.model.ropes[..rope].iter().map(|rope| 4 * rope.half * rows.step).sum();
        (self.scratch.at(Space::Cos) + before as u64, self.scratch.at(Space::Sin) + before as u64)
    }

    fn rotations(&self, rows: Rows) -> Result<(), Error> {
        for (index, rope) in self.model.ropes.iter().enumerate() {
            let (cos, sin) = self.turns(index, rows);
            let args = RotationsArgs {
                positions: rows.positions,
                frequencies: rope.at,
                cos,
                sin,
                rows: rows.count as u32,
                half: rope.half as u32,
                magnitude: rope.magnitude,
                pad: 0,
            };
            self.stream.launch(self.kernels.rotations, [rows.count, 1, 1], abi::ROW_THREADS, &args)?;
        }
        Ok(())
    }

    /// Adds what the layer's part before has left in `Change` (if there was one), normalised if the model does so; and
    /// normalises the sum for the next.
    fn norm(&self, rows: Rows, post: Option<Option<&Norm>>, norm: Option<&Norm>) -> Result<(), Error> {
        let hidden = self.config.hidden as u32;
        let args = NormArgs {
            x: rows.x,
            change: if post.is_some() { self.scratch.at(Space::Change) } else { 0 },
            post_weight: post.flatten().map_or(0, |norm| norm.at),
            weight: norm.map_or(0, |norm| norm.at),
            hi: rows.planes.hi,
            lo: rows.planes.lo,
            rows: rows.count as u32,
            width: hidden,
            ld_x: hidden,
            ld_change: hidden,
            ld: rows.planes.ld as u32,
            eps: norm.map_or(0.0, |norm| norm.eps),
            post_eps: post.flatten().map_or(0.0, |norm| norm.eps),
            pad: 0,
        };
        self.stream.launch(self.kernels.norm, [rows.count, 1, 1], abi::ROW_THREADS, &args)
    }

    /// Copies the rows that are wanted out of all of them.
    fn keep(&self, from: Rows, to: Rows) -> Result<(), Error> {
        let planes = 2 * from.planes.ld;
        for (from, to_at, bytes) in [
            (from.x, to.x, 4 * self.config.hidden),
            (from.planes.hi, to.planes.hi, planes),
            (from.planes.lo, to.planes.lo, planes),
        ] {
            let bytes = bytes as u64;
            let args = GatherRows {
                from,
                to: to_at,
                row_of: to.rotation_of,
                bytes,
                from_stride: bytes,
                to_stride: bytes,
                rows: to.count as u32,
                pad: 0,
            };
            self.stream.launch(self.kernels.gather_rows, [to.count, 1, 1], abi::ROW_THREADS, &args)?;
        }
        Ok(())
    }

    /// Makes queries, and keys and values into the arena: both, or one of them.
    fn project(
        &self,
        layer: &Layer,
        place: usize,
        rows: Rows,
        slots: u64,
        (queries, keys): (bool, bool),
    ) -> Result<(), Error> {
        match &layer.attention.projections {
            Projections::Grouped(grouped) => self.grouped(grouped, layer, place, rows, slots, (queries, keys)),
            Projections::Latent(latent) => {
                if keys {
                    self.latent_keys(latent, layer, place, rows, slots)?;
                }
                if queries {
                    self.latent_queries(latent, layer, rows)?;
                }
                Ok(())
            }
        }
    }

    fn grouped(
        &self,
        grouped: &Grouped,
        layer: &Layer,
        place: usize,
        rows: Rows,
        slots: u64,
        (queries, keys): (bool, bool),
    ) -> Result<(), Error> {
        let attention = &layer.attention;
        let dim = attention.k_dim;
        let matrices = match (queries, keys) {
            (true, true) => &grouped.all,
            (true, false) => &grouped.q,
            _ => &grouped.kv,
        };
        let q_heads = if queries { attention.heads } else { 0 };
        let kv_heads = if keys { attention.kv_heads } else { 0 };
        let ld = (q_heads + 2 * kv_heads) * dim;
        let source = Out { at: self.scratch.at(Space::Source), ld };
        self.products.apply_all(&self.stream, matrices, rows.planes, rows.count, source)?;
        let (cos, sin) = self.turns(attention.rope, rows);
        let norm = |pick: fn(&(Norm, Norm)) -> &Norm| grouped.norms.as_ref().map(pick);
        let (q_norm, k_norm) = (norm(|norms| &norms.0), norm(|norms| &norms.1));
        let args = HeadsArgs {
            kv: self.arena.kv(place),
            src: source.at,
            q_norm: q_norm.map_or(0, |norm| norm.at),
            k_norm: k_norm.map_or(0, |norm| norm.at),
            cos,
            sin,
            rotation_of: rows.rotation_of,
            slots,
            q_out: self.scratch.at(Space::Queries),
            rows: rows.count as u32,
            ld_src: ld as u32,
            q_at: 0,
            k_at: (q_heads * dim) as u32,
            v_at: ((q_heads + kv_heads) * dim) as u32,
            q_heads: q_heads as u32,
            kv_heads: kv_heads as u32,
            dim: dim as u32,
            q_eps: q_norm.map_or(0.0, |norm| norm.eps),
            k_eps: k_norm.map_or(0.0, |norm| norm.eps),
        };
        // A warp a head.
        let heads = (q_heads + 2 * kv_heads).div_ceil(abi::ROW_THREADS as usize / 32);
        self.stream.launch(self.kernels.heads, [rows.count, heads, 1], abi::ROW_THREADS, &args)
    }

    fn latent_keys(&self, latent: &Latent, layer: &Layer, place: usize, rows: Rows, slots: u64) -> Result<(), Error> {
        let source = Out { at: self.scratch.at(Space::Source), ld: latent.kv_down.rows };
        self.products.apply(&self.stream, &latent.kv_down, rows.planes, rows.count, source)?;
        let (cos, sin) = self.turns(layer.attention.rope, rows);
        let args = LatentKeys {
            kv: self.arena.kv(place),
            src: source.at,
            norm: latent.kv_norm.at,
            cos,
            sin,
            rotation_of: rows.rotation_of,
            slots,
            rows: rows.count as u32,
            ld_src: source.ld as u32,
            rank: latent.rank as u32,
            rope: latent.rope as u32,
            eps: latent.kv_norm.eps,
            pad: 0,
        };
        self.stream.launch(self.kernels.latent_keys, [rows.count, 1, 1], abi::ROW_THREADS, &args)
    }

    fn latent_queries(&self, latent: &Latent, layer: &Layer, rows: Rows) -> Result<(), Error> {
        let at = |space| self.scratch.at(space);
        let (heads, rank) = (layer.attention.heads, latent.rank);
        let source = |ld| Out { at: at(Space::Source), ld };
        let plain = match &latent.q {
            Query::Direct(q) => {
                self.products.apply(&self.stream, q, rows.planes, rows.count, source(q.rows))?;
                source(q.rows)
            }
            Query::Compressed { down, norm, up } => {
                self.products.apply(&self.stream, down, rows.planes, rows.count, source(down.rows))?;
                let ld = padded(down.rows);
                let planes = Planes { hi: at(Space::LatentHi), lo: at(Space::LatentLo), ld };
                let args = NormArgs {
                    x: at(Space::Source),
                    weight: norm.at,
                    hi: planes.hi,
                    lo: planes.lo,
                    rows: rows.count as u32,
                    width: down.rows as u32,
                    ld_x: down.rows as u32,
                    ld: ld as u32,
                    eps: norm.eps,
                    ..NormArgs::default()
                };
                self.stream.launch(self.kernels.norm, [rows.count, 1, 1], abi::ROW_THREADS, &args)?;
                self.products.apply(&self.stream, up, planes, rows.count, source(up.rows))?;
                source(up.rows)
            }
        };
        let (cos, sin) = self.turns(layer.attention.rope, rows);
        let nope_ld = padded(latent.nope);
        let nope = Planes { hi: at(Space::NopeHi), lo: at(Space::NopeLo), ld: heads * nope_ld };
        let width = rank + latent.rope;
        let args = LatentQueries {
            src: plain.at,
            cos,
            sin,
            rotation_of: rows.rotation_of,
            hi: nope.hi,
            lo: nope.lo,
            q_out: at(Space::Queries),
            rows: rows.count as u32,
            ld_src: plain.ld as u32,
            heads: heads as u32,
            nope: latent.nope as u32,
            rope: latent.rope as u32,
            rank: rank as u32,
            nope_ld: nope_ld as u32,
            pad: 0,
        };
        let grid = [rows.count, heads.div_ceil(abi::ROW_THREADS as usize / 32), 1];
        self.stream.launch(self.kernels.latent_queries, grid, abi::ROW_THREADS, &args)?;
        let many = Many::Batch { count: heads, w: rank * latent.absorb.ld, x: nope_ld, out: width, scale: rank };
        let out = Out { at: at(Space::Queries), ld: heads * width };
        self.products.many(&self.stream, &latent.absorb.rows(0, rank), nope, rows.count, out, many)
    }

    /// From queries to what is added to the residual stream.
    fn attend(
        &self,
        layer: &Layer,
        place: usize,
        rows: Rows,
        step: (&Step, &Attending),
        inputs: u64,
    ) -> Result<(), Error> {
        let at = |space| self.scratch.at(space);
        let attention = &layer.attention;
        let (head_ld, ld) = match &attention.projections {
            Projections::Grouped(_) => (attention.v_dim, padded(attention.heads * attention.v_dim)),
            Projections::Latent(_) => (padded(attention.v_dim), attention.heads * padded(attention.v_dim)),
        };
        let mut planes = Planes { hi: at(Space::AttendedHi), lo: at(Space::AttendedLo), ld };
        let ends = Ends {
            inputs,
            q: at(Space::Queries),
            positions: rows.positions,
            part_sums: at(Space::PartSums),
            part_max: at(Space::PartMax),
            out: planes,
            head_ld,
        };
        self.attends.run(&self.stream, &self.arena, (attention, place), step, &ends)?;
        let mut width = attention.heads * attention.v_dim;
        if let Projections::Latent(latent) = &attention.projections {
            // From the latent that each head summed up to the head's value.
            let value = latent.value;
            width = attention.heads * value;
            let stride = latent.nope + value;
            let many =
                Many::Batch { count: attention.heads, w: stride * latent.up.ld, x: head_ld, out: value, scale: stride };
            let values = Out { at: at(Space::Source), ld: width };
            let up = latent.up.rows(latent.nope, value);
            self.products.many(&self.stream, &up, planes, rows.count, values, many)?;
            planes.ld = padded(width);
            let args = Split {
                src: values.at,
                hi: planes.hi,
                lo: planes.lo,
                rows: rows.count as u32,
                width: width as u32,
                ld_src: width as u32,
                ld: planes.ld as u32,
            };
            let grid = [rows.count, planes.ld.div_ceil(abi::ROW_THREADS as usize), 1];
            self.stream.launch(self.kernels.split, grid, abi::ROW_THREADS, &args)?;
        }
        let planes = self.collective.planes(&self.stream, &self.scratch, planes, rows.count, width)?;
        let hidden = self.config.hidden;
        let part = self.collective.part(&self.scratch, hidden);
        self.products.apply(&self.stream, &attention.output, planes, rows.count, part)?;
        self.collective.change(&self.stream, &self.scratch, rows.count, hidden)
    }

    /// The logits of the rows that are wanted.
    fn output(&self, rows: Rows) -> Result<(), Error> {
        let vocab = self.model.output.rows;
        let logits = Out { at: self.scratch.at(Space::Logits), ld: vocab };
        self.products.apply(&self.stream, &self.model.output, rows.planes, rows.count, logits)?;
        let count = rows.count * vocab;
        if let Some(cap) = self.config.final_soft_cap {
            let args = SoftCap { y: logits.at, count: count as u64, cap, pad: 0 };
            let grid = [count.div_ceil(abi::ROW_THREADS as usize), 1, 1];
            self.stream.launch(self.kernels.soft_cap, grid, abi::ROW_THREADS, &args)?;
        }
        Ok(())
    }
}
