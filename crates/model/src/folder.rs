//! A model folder, opened: configuration, mapped weights and fingerprint, checked against one another.

use std::{path::Path, sync::Arc};

use kvasir_types::{KvDtype, KvGroups, KvLayout, ModelFingerprint};

use crate::{Cost, Error, ModelConfig, cpu::Compute, fingerprint, weights::Weights};

/// A Hugging Face model folder whose configuration is supported and whose weights all have the shapes it asks for.
///
/// Cheap to clone. The weight files stay mapped, not read: pages come in when they are first used and are shared by all
/// backends (and processes) that use the folder. The files must not be truncated while it lives.
#[derive(Clone, Debug)]
pub struct Folder(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: ModelConfig,
    weights: Weights,
    fingerprint: ModelFingerprint,
}

impl Folder {
    /// Opens `dir`: reads the configuration, maps the weights, checks every shape, takes the fingerprint.
    ///
    /// # Errors
    /// The first thing that is wrong, by file and key or tensor.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let config = ModelConfig::read(dir)?;
        let weights = Weights::open(dir, &config)?;
        let fingerprint = fingerprint::compute(&config, &weights);
        Ok(Self(Arc::new(Inner { config, weights, fingerprint })))
    }

    /// Shape and conventions of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.0.config
    }

    /// Which model this is; equal for equal weights and arithmetic wherever the folder lies.
    pub fn fingerprint(&self) -> ModelFingerprint {
        self.0.fingerprint
    }

    /// The fingerprint of this model computed in that way: workers that compute in different ways do not pair.
    pub fn fingerprint_of(&self, compute: Compute) -> ModelFingerprint {
        fingerprint::computed(self.0.fingerprint, compute)
    }

    /// The KV layout of the model with the given block size and element type.
    pub fn kv_layout(&self, block_size: u32, dtype: KvDtype) -> KvLayout {
        self.0.config.kv_layout(block_size, dtype)
    }

    /// Which layers of the model share a block.
    pub fn kv_groups(&self) -> KvGroups {
        self.0.config.kv_groups()
    }

    /// What computing with it comes to.
    pub fn cost(&self) -> Cost {
        Cost::of(self)
    }

    pub(crate) fn weights(&self) -> &Weights {
        &self.0.weights
    }
}
