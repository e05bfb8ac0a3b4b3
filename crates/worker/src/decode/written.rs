//! What a request has written, as far as the KV store may want it.

use std::sync::Arc;

use kvasir_engine::Admission;
use kvasir_types::{BlockHash, RequestId, TokenId};

use super::service::Checked;
use crate::{
    host::Host,
    store::{Finished, Store},
};

/// The tokens of a request's choices, and the names of the blocks that they fill.
pub(super) struct Written {
    /// `None`: nobody wants them.
    store: Option<Arc<Store>>,
    request: RequestId,
    tenant: Arc<str>,
    prompt: Arc<[TokenId]>,
    hashes: Arc<[BlockHash]>,
    root: BlockHash,
    block_size: usize,
    /// Blocks before this one are somebody else's to write.
    first: usize,
    choices: Vec<Vec<TokenId>>,
}

impl Written {
    pub(super) fn new(host: &Host, request: &Checked, admission: &Admission) -> Self {
        let wanted = |store: &&Arc<Store>| store.write_back.wants_finished() && !store.write_back.needs_sequence();
        Self {
            store: host.store.as_ref().filter(wanted).cloned(),
            request: request.id.clone(),
            tenant: Arc::clone(&request.tenant),
            prompt: request.prompt.clone(),
            hashes: admission.hashes.clone(),
            root: host.root(&request.salt),
            block_size: host.model.layout.block_size as usize,
            first: 0,
            choices: vec![Vec::new(); request.choices as usize],
        }
    }

    /// Whoever computed the prompt's blocks writes them.
    pub(super) fn prompt_is_anothers(&mut self) {
        self.first = self.hashes.len();
    }

    /// The next token of a choice.
    pub(super) fn token(&mut self, choice: u32, token: TokenId) {
        if self.store.is_some() {
            self.choices[choice as usize].push(token);
        }
    }

    /// A choice is complete: its blocks are in the cache and go to the store from there.
    pub(super) fn finished(&mut self, choice: u32) {
        let Some(store) = &self.store else { return };
        let answer = std::mem::take(&mut self.choices[choice as usize]);
        let chain = chain(self.root, &self.hashes, &self.prompt, &answer, self.block_size);
        let (request, tenant) = (self.request.clone(), Arc::clone(&self.tenant));
        let first = self.first.min(chain.len());
        store.write_back.offer(Finished { request, tenant, chain, first, held: None });
        // The other choices have the same prompt.
        self.prompt_is_anothers();
    }
}

/// Names of the blocks that a prompt and its answer fill. The last token is told, but never computed.
fn chain(
    root: BlockHash,
    prompt_hashes: &[BlockHash],
    prompt: &[TokenId],
    answer: &[TokenId],
    block_size: usize,
) -> Arc<[BlockHash]> {
    let blocks = (prompt.len() + answer.len()).saturating_sub(1) / block_size;
    let mut chain = prompt_hashes[..blocks.min(prompt_hashes.len())].to_vec();
    let whole = chain.len() * block_size;
    let rest: Vec<TokenId> = prompt[whole..].iter().chain(answer).copied().collect();
    for tokens in rest.chunks_exact(block_size).take(blocks - chain.len()) {
        chain.push(chain.last().unwrap_or(&root).extend(tokens));
    }
    chain.into()
}

#[cfg(test)]
mod tests {
    use kvasir_types::{KvDtype, KvLayout, ModelFingerprint};

    use super::*;

    #[test]
    fn a_chain_goes_on_from_the_prompt_into_the_answer() {
        const LAYOUT: KvLayout =
            KvLayout { block_size: 4, layers: 1, kv_heads: 1, k_dim: 2, v_dim: 2, dtype: KvDtype::Bf16 };
        let root = BlockHash::root(ModelFingerprint([1; 16]), &LAYOUT, "");
        let tokens: Vec<TokenId> = (0..40).map(TokenId).collect();
        let mut names: Vec<BlockHash> = Vec::new();
        for block in tokens.chunks_exact(4) {
            names.push(names.last().unwrap_or(&root).extend(block));
        }
        for prompt in 1..20 {
            for answer in 0..20 {
                let (before, after) = (&tokens[..prompt], &tokens[prompt..prompt + answer]);
                let chain = chain(root, &names[..prompt / 4], before, after, 4);
                assert_eq!(*chain, names[..(prompt + answer - 1) / 4], "{prompt} and {answer}");
            }
        }
    }
}
