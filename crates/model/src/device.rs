//! Which device computes a model, and opening a backend on it.

use std::{fmt, str::FromStr, sync::Arc};

use kvasir_types::{HostMemory, KvLayout};
use serde::{Deserialize, Serialize};

use crate::{
    Backend, Error, Folder,
    cpu::{Compute, CpuBackend},
    cuda::{self, CudaBackend},
    group::{self, Shared},
    parallel::Parallel,
};

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Device {
    /// The first CUDA device, where there is one whose memory has room for the model, or the first few of them if several are to
    /// compute it; else the processor.
    Auto,
    /// The processor: what is computed with unless somebody says otherwise, until a GPU has run the kernels (docs/cuda.md).
    #[default]
    Cpu,
    /// The CUDA device of this number, or none at all.
    Cuda(usize),
}

/// How a backend is to compute.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// On what.
    pub device: Device,
    /// Its arithmetic.
    pub compute: Compute,
    /// On how many threads, where the processor does.
    pub threads: usize,
    /// How many compute it together: so many devices, from the one named on; or parts of the processor.
    pub tensor_parallel: usize,
    /// Tokens of the largest step, for which a device sets memory aside: larger ones are computed in several parts.
    pub max_tokens: usize,
}

impl Device {
    /// A backend for the model of `folder` over the blocks in `memory`.
    ///
    /// # Errors
    /// As for the device's backend. `auto` falls back to the processor instead, and says so in the log.
    pub fn open(
        folder: &Folder,
        layout: KvLayout,
        memory: Arc<dyn HostMemory>,
        options: Options,
    ) -> Result<Box<dyn Backend>, Error> {
        let Options { device, compute, threads, tensor_parallel, max_tokens } = options;
        group::check(folder.config(), tensor_parallel)?;
        let blocks = memory.len() / layout.block_bytes();
        let parallel = |open: &(dyn Fn(Arc<Shared>) -> Result<Box<dyn Backend>, Error> + Sync)| {
            Ok(Box::new(Parallel::open(folder, layout, blocks, tensor_parallel, open)?) as Box<dyn Backend>)
        };
        let on_cuda = |ordinal, memory: Arc<dyn HostMemory>| -> Result<Box<dyn Backend>, Error> {
            let options = cuda::Options { ordinal, compute, max_tokens, graphs: true };
            if tensor_parallel == 1 {
                return Ok(Box::new(CudaBackend::new(folder, layout, memory, options)?));
            }
            parallel(&|member| Ok(Box::new(CudaBackend::rank(folder, layout, memory.clone(), options, member)?)))
        };
        let ordinal = match device {
            Self::Cuda(ordinal) => return on_cuda(ordinal, memory),
            Self::Auto if (0..tensor_parallel).all(cuda::is_there) => Some(0),
            Self::Auto | Self::Cpu => None,
        };
        if let Some(ordinal) = ordinal {
            match on_cuda(ordinal, memory.clone()) {
                Ok(backend) => return Ok(backend),
                Err(error) => tracing::warn!(%error, "computing on the processor: the device is not usable"),
            }
        }
        if tensor_parallel == 1 {
            return Ok(Box::new(CpuBackend::with_compute(folder, layout, memory, threads, compute)?));
        }
        let threads = (threads / tensor_parallel).max(1);
        parallel(&|member| Ok(Box::new(CpuBackend::rank(folder, layout, memory.clone(), member, (threads, compute))?)))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Not the name of a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no device: auto, cpu, or cuda:N (cuda:0 is the first)")]
pub struct BadDevice(String);

impl FromStr for Device {
    type Err = BadDevice;

    fn from_str(name: &str) -> Result<Self, BadDevice> {
        let bad = || BadDevice(name.chars().take(32).collect());
        match name {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let number = name.strip_prefix("cuda:").and_then(|number| number.parse().ok());
                number.filter(|&number| number < 1024).map(Self::Cuda).ok_or_else(bad)
            }
        }
    }
}

impl TryFrom<String> for Device {
    type Error = BadDevice;

    fn try_from(name: String) -> Result<Self, BadDevice> {
        name.parse()
    }
}

impl From<Device> for String {
    fn from(device: Device) -> Self {
        device.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_what_it_is_called() {
        for device in [Device::Auto, Device::Cpu, Device::Cuda(0), Device::Cuda(7)] {
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:1024", "cuda:0x1", "Cuda:0", "cpu "] {
            assert!(bad.parse::<Device>().is_err(), "{bad}");
        }
    }
}
