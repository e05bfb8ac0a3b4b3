//! Model folders and the arithmetic on them: from a Hugging Face directory to rows of logits over paged KV.
//!
//! Reading order: [`Folder`] opens a directory and checks it whole (`config`, `rope`, `weights`, `fingerprint`); a family
//! (`families`) turns its configuration into a description of what is to be computed ([`graph`]); a [`Backend`] computes
//! steps of many sequences at once over the block layout of `kvasir_types::KvLayout`; [`cpu`] is the backend for plain
//! processors, the reference the others are measured against, [`cuda`] the one for NVIDIA GPUs; [`Device`] chooses. [`quantize`] makes folders with 8-bit weights.
//!
//! This crate knows token ids, tensors and blocks. It knows no text, no scheduler, no network and no async runtime.

#![deny(missing_docs)]

mod backend;
mod config;
mod cost;
pub mod cpu;
pub mod cuda;
mod device;
mod error;
mod families;
mod fingerprint;
mod folder;
pub mod graph;
mod group;
mod parallel;
pub mod quantize;
mod rope;
mod rows;
pub mod shapes;
mod weights;

pub use backend::{Backend, SeqInput};
pub use config::ModelConfig;
pub use cost::Cost;
pub use device::{BadDevice, Device, Options};
pub use error::Error;
pub use families::supported as supported_families;
pub use folder::Folder;
pub use rope::{Rope, RopeScaling};
pub use rows::{LIKELIEST, Likely, Logits, Need, Row, Rows, likeliest};
pub use weights::Dtype;
