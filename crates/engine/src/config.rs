//! The engine's settings.

/// How much the engine takes on at once.
///
/// Values that cannot work are raised to the least that can (said at each field): a limit of zero would not be a limit
/// but a stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Most tokens computed in one step, over all sequences. Decoding sequences come first with one token each, chunks of
    /// prompts share what is left. Default 1024; at least `max_running` + one block, so that neither kind starves.
    pub max_batch_tokens: usize,
    /// Most tokens of one prompt computed in one step. Default 512; rounded down to whole blocks, at least one block.
    /// Smaller: layers are pushed to the decode worker sooner, and other sequences wait less. Larger: fewer, fatter
    /// matrix products.
    pub chunk_tokens: usize,
    /// Most sequences that hold blocks: held, being computed, or kept after a prefill. Default 64, at least 1.
    pub max_running: usize,
    /// Most online requests that wait for blocks; one more is refused with [`crate::Error::QueueFull`]. Default 256, at least
    /// 1.
    pub max_waiting: usize,
    /// The same for offline requests. Default 1024, at least 1.
    pub max_waiting_offline: usize,
    /// Steps without a turn after which an offline request counts as online: what it waited for its blocks, again after
    /// losing them, and, being a prompt, for a place in the batch. Default 1000, at least 1.
    pub offline_patience: u64,
    /// Most prompt tokens computed in a step beside answers while the duty is to decode. Default 64, at least one block.
    pub remainder_tokens: usize,
    /// Keep finished blocks for later requests with the same beginning. Default true.
    pub prefix_cache: bool,
    /// Changes of the prefix cache that are kept until somebody asks for them ([`crate::Handle::cache_events`]). Default
    /// 65536 (48 bytes each); 0 keeps none.
    pub cache_events: usize,
    /// Threads that compute what grammars allow, beside the model. 0: the engine's own thread does, before each step.
    /// Default 1: masks take microseconds, tens of them in the time of a step.
    pub mask_threads: usize,
    /// Most tokens that a [`crate::Proposer`], if there is one, drafts for a sequence in a step. Default 4: with seven in
    /// ten right, the fifth would be of use one time in six.
    pub draft_tokens: usize,
}

/// Of the settings, those that may be changed while the engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// See [`Config::max_batch_tokens`].
    pub max_batch_tokens: usize,
    /// See [`Config::offline_patience`].
    pub offline_patience: u64,
    /// See [`Config::max_waiting`].
    pub max_waiting: usize,
    /// See [`Config::max_waiting_offline`].
    pub max_waiting_offline: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_batch_tokens: 1024,
            chunk_tokens: 512,
            max_running: 64,
            max_waiting: 256,
            max_waiting_offline: 1024,
            offline_patience: 1000,
            remainder_tokens: 64,
            prefix_cache: true,
            cache_events: 1 << 16,
            mask_threads: 1,
            draft_tokens: 4,
        }
    }
}

impl Config {
    /// Those of them that may be changed later.
    pub fn limits(&self) -> Limits {
        let Self { max_batch_tokens, offline_patience, max_waiting, max_waiting_offline, .. } = *self;
        Limits { max_batch_tokens, offline_patience, max_waiting, max_waiting_offline }
    }

    /// The same with others, raised where they could not work.
    pub(crate) fn limited(self, limits: Limits, block_size: usize) -> Self {
        let Limits { max_batch_tokens, offline_patience, max_waiting, max_waiting_offline } = limits;
        Self { max_batch_tokens, offline_patience, max_waiting, max_waiting_offline, ..self }.effective(block_size)
    }

    /// The same with every value raised or rounded as its field says.
    pub(crate) fn effective(self, block_size: usize) -> Self {
        let max_running = self.max_running.max(1);
        Self {
            max_batch_tokens: self.max_batch_tokens.max(max_running + block_size),
            chunk_tokens: (self.chunk_tokens / block_size).max(1) * block_size,
            max_running,
            max_waiting: self.max_waiting.max(1),
            max_waiting_offline: self.max_waiting_offline.max(1),
            offline_patience: self.offline_patience.max(1),
            remainder_tokens: self.remainder_tokens.max(block_size),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_would_stop_everything_are_raised() {
        let zero = Config {
            max_batch_tokens: 0,
            chunk_tokens: 0,
            max_running: 0,
            max_waiting: 0,
            max_waiting_offline: 0,
            offline_patience: 0,
            remainder_tokens: 0,
            prefix_cache: false,
            cache_events: 0,
            mask_threads: 0,
            draft_tokens: 0,
        };
        let raised = Config {
            max_batch_tokens: 17,
            chunk_tokens: 16,
            max_running: 1,
            max_waiting: 1,
            max_waiting_offline: 1,
            offline_patience: 1,
            remainder_tokens: 16,
            ..zero.clone()
        };
        assert_eq!(zero.effective(16), raised);
        let usual = Config { chunk_tokens: 40, ..Config::default() };
        assert_eq!(usual.clone().effective(16), Config { chunk_tokens: 32, ..usual });
    }
}
