//! The CUDA backend: the same computation on an NVIDIA GPU.
//!
//! ```text
//! host                                            device
//! driver    context, streams, memory              kernels/*.cu   one file per kind, compiled ahead
//! module    kernels by name, launching            abi.h = abi    what they take
//! load      mapped files ──────────────────────▶  model          every weight's address
//! step      tokens, tables, units of attention ─▶ inputs, one copy a step
//! forward   launches, layer after layer           scratch        what a step computes in
//! graphs    the same as one call, for steps that come often
//! library   products of many rows by cuBLASLt, in `fast`
//! likeliest ◀──────────── tokens and logits ────  whole rows only for those who need them
//! arena     the host's blocks ◀── mirror ───────  the device's blocks
//! collective                                      what several devices, each with a part of the model, hand one another
//! ```
//!
//! The law of the seam holds as on the processor: every sum has one order, a function of the model alone (`kernels/abi.h`
//! says which). In [`Compute::Fast`] it does not hold across shapes of batches where products are left to the library.
//! Products of exact arithmetic are of two bf16 terms of each activation with the exact weight: some
//! 16 bits of mantissa, so a CPU's results differ in the last places, as they do between processors' families of kernels.
//!
//! Nothing of this needs CUDA to be built or to start: the driver is looked up when a device is asked for.

#![expect(unsafe_code, reason = "the driver's API is C")]

use std::{fmt, sync::Arc};

use kvasir_types::{BlockId, HostMemory, KvGroups, KvLayout};

use crate::{
    Backend, Error, Folder, Logits, ModelConfig, Need, Rows, SeqInput,
    backend::check_batch,
    cpu::Compute,
    group::{self, Alone, Group, agree_on},
    weights::Dtype,
};

mod abi;
mod arena;
mod attention;
mod collective;
mod driver;
mod forward;
mod graphs;
mod library;
mod likeliest;
mod limits;
mod load;
mod mlp;
mod model;
mod module;
mod products;
mod scratch;
mod step;

pub use graphs::GraphCounts;
pub use limits::{Limits, limits};

use arena::Arena;
use attention::Attends;
use collective::Collective;
use driver::{Buffer, Context, Event, Pinned, Stream};
use graphs::Graphs;
use load::Loader;
use model::{Mlp, Model};
use module::Module;
use products::Products;
use scratch::{PerRow, Scratch, Space};
use step::Padding;

/// How to compute, and on which device.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which of the machine's devices.
    pub ordinal: usize,
    /// The arithmetic.
    pub compute: Compute,
    /// Tokens of the largest step for which memory is set aside from the start. Larger ones take more when they come.
    pub max_tokens: usize,
    /// Whether steps that decode run as graphs, one call each. What is computed is the same.
    pub graphs: bool,
}

/// Whether there is a device of that number, by a driver that can be used: a real one, not one that is emulated for tests.
pub fn is_there(ordinal: usize) -> bool {
    Context::open(ordinal).is_ok_and(|context| !context.is_emulated())
}

/// Computes a model on a CUDA device.
pub struct CudaBackend {
    config: ModelConfig,
    groups: KvGroups,
    context: Arc<Context>,
    // In this order they are dropped: streams wait for what is in them, memory goes, the module, and the context with the
    // last of them.
    stream: Stream,
    graphs: Graphs,
    padding: Padding,
    arena: Arena,
    model: Model,
    _weights: Buffer,
    per_row: PerRow,
    scratch: Scratch,
    inputs: Pinned<u8>,
    logits: Pinned<f32>,
    likeliest: Pinned<u32>,
    noise: Pinned<u64>,
    /// By layer: its keys and values are written, and mirrored to the host.
    written: Vec<Event>,
    mirrored: Vec<Event>,
    products: Products,
    attends: Attends,
    kernels: forward::Kernels,
    collective: Collective,
    _module: Module,
}

impl CudaBackend {
    /// A backend for the model of `folder` over the blocks in `memory`, which the device has a copy of.
    ///
    /// # Errors
    /// A layout that is not the model's, an arena that holds no block, no such device, one whose memory has no room for the
    /// model, or what its driver says.
    pub fn new(
        folder: &Folder,
        layout: KvLayout,
        memory: Arc<dyn HostMemory>,
        options: Options,
    ) -> Result<Self, Error> {
        Self::rank(folder, layout, memory, options, Arc::new(Alone))
    }

    /// One of the ranks of a group, all of which are over the same blocks; devices are those from `options.ordinal` on.
    pub(crate) fn rank(
        folder: &Folder,
        layout: KvLayout,
        memory: Arc<dyn HostMemory>,
        options: Options,
        group: Arc<dyn Group>,
    ) -> Result<Self, Error> {
        let (place, ordinal) = (group.place(), options.ordinal + group.place().rank);
        let Options { compute, max_tokens, graphs, .. } = options;
        let config = folder.config().clone();
        let expected = config.kv_layout(layout.block_size, layout.dtype);
        if layout != expected || layout.check().is_err() {
            return Err(Error::Layout { layout, expected });
        }
        group::check(&config, place.size)?;
        let blocks = arena::blocks(memory.as_ref(), &layout)?;
        let context = Context::open(ordinal)?;
        let module = Module::load(&context)?;
        let stream = Stream::new(&context)?;

        // First how much, then whether it fits, then the rest.
        let weights = folder.weights();
        let mut counting = Loader::counting(weights, place);
        let counted = Model::load(&config, &mut counting)?;
        let per_row = PerRow::of(&config, &counted, place.size);
        // Small steps are padded.
        let max_tokens = step::padded_rows(max_tokens.max(1));
        let block_bytes = arena::part(&layout, place).block_bytes();
        let library = if compute == Compute::Fast { library::WORKSPACE } else { 0 };
        let scratched = per_row.total(max_tokens) + library;
        let room = check_room(&context, counting.used(), scratched, max_tokens, blocks, block_bytes);
        agree_on(&*group, room)?;
        let mut filling = Loader::filling(weights, place, &context, counting.used())?;
        let model = Model::load(&config, &mut filling)?;
        let weights_bytes = counting.used();
        let weights = filling.finish()?.expect("it was filled");

        let arena = Arena::new(&context, &module, memory, layout, &stream, &*group)?;
        let scratch = Scratch::new(&context, &per_row, max_tokens, &stream)?;
        let mut products = Products::new(&context, &module, compute, scratch.at(Space::Partials))?;
        for dtype in folder.weights().sorted().iter().map(|(_, tensor)| tensor.dtype).chain([Dtype::F32]) {
            products.prepare(&module, dtype)?;
        }
        let attends = Attends::new(&module, &model, &arena, compute, context.shared_bytes)?;
        let kernels = forward::Kernels::new(&module, &model, compute)?;
        let collective = Collective::new(group, &module, &stream, compute)?;
        let events = || (0..config.layers.len()).map(|_| Event::new(&context)).collect::<Result<Vec<_>, _>>();
        let (written, mirrored) = (events()?, events()?);
        let (inputs, logits) = (Pinned::new(&context, 1 << 16)?, Pinned::new(&context, 1)?);
        let (likeliest, noise) = (Pinned::new(&context, 1)?, Pinned::new(&context, 1)?);
        stream.wait()?;
        if graphs && !arena.is_pinned() {
            tracing::warn!("without a pinned arena steps can't be graphs: every launch is a call of its own");
        }
        let graphs = Graphs::new(graphs && arena.is_pinned());
        let routed = model.layers.iter().any(|layer| matches!(layer.mlp, Mlp::Routed(_)));
        let padding = if routed { Padding::Lists } else { Padding::Rows };
        tracing::info!(
            device = context.name,
            capability = format!("{}.{}", context.capability.0, context.capability.1),
            ?compute,
            blocks,
            weights_bytes,
            "cuda backend ready"
        );
        Ok(Self {
            groups: config.kv_groups(),
            config,
            stream,
            graphs,
            padding,
            arena,
            model,
            _weights: weights,
            per_row,
            scratch,
            inputs,
            logits,
            likeliest,
            noise,
            written,
            mirrored,
            products,
            attends,
            kernels,
            collective,
            _module: module,
            context,
        })
    }
}

impl CudaBackend {
    /// What graphs have done so far.
    pub fn graphs(&self) -> GraphCounts {
        self.graphs.counts
    }

    /// Products that were left to cuBLASLt so far: in `fast` arithmetic, of many rows with bf16 weights.
    pub fn products_by_library(&self) -> u64 {
        self.products.by_library()
    }
}

/// Compares what the model needs with what is free.
fn check_room(
    context: &Context,
    weights: usize,
    scratch: usize,
    tokens: usize,
    blocks: usize,
    block_bytes: usize,
) -> Result<(), Error> {
    let (free, total) = context.memory()?;
    let rest = free.saturating_sub(weights).saturating_sub(scratch).saturating_sub(RESERVE);
    let fit = rest / block_bytes;
    tracing::info!(device = context.name, free, total, weights, scratch, blocks, fit, "room on the device");
    if blocks <= fit {
        return Ok(());
    }
    let device = format!("cuda:{}", context.ordinal);
    Err(Error::DeviceTooSmall { device, free, total, weights, scratch, tokens, blocks, block_bytes, fit })
}

/// Bytes of the device that are left alone: for the driver's own needs.
const RESERVE: usize = 64 << 20;

impl Backend for CudaBackend {
    fn spec(&self) -> &ModelConfig {
        &self.config
    }

    fn groups(&self) -> &KvGroups {
        &self.groups
    }

    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), Error> {
        self.context.enter()?;
        self.arena.copy(copies, &self.stream)
    }

    fn landed(&mut self, blocks: &[BlockId]) -> Result<(), Error> {
        self.context.enter()?;
        self.arena.landed(blocks, &self.stream)
    }

    fn forward(&mut self, batch: &[SeqInput<'_>], after_layer: &mut dyn FnMut(usize)) -> Result<Logits, Error> {
        self.forward_few(batch, &[], after_layer).map(Rows::into_logits)
    }

    fn forward_few(
        &mut self,
        batch: &[SeqInput<'_>],
        needs: &[Need],
        after_layer: &mut dyn FnMut(usize),
    ) -> Result<Rows, Error> {
        check_batch(&self.config, &self.arena.whole, &self.groups, self.arena.blocks, batch)?;
        if batch.is_empty() {
            (0..self.config.layers.len()).for_each(after_layer);
            return Ok(Rows::new(self.model.output.rows));
        }
        self.context.enter()?;
        self.compute_step(batch, needs, after_layer)
    }
}

impl fmt::Debug for CudaBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaBackend")
            .field("device", &self.context.name)
            .field("blocks", &self.arena.blocks)
            .finish_non_exhaustive()
    }
}
