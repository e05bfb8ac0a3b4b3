//! `kvasirctl kv`: what the KV store holds, and what an operator does about it.
//!
//! Every node is asked, whoever should have a block by the rules: what is shown is what is there. A node that can't be
//! reached is shown as such; a command that changes something says so and fails.

mod args;
mod prompt;
mod show;

use std::{collections::HashMap, time::Duration};

use anyhow::{bail, ensure};
use futures_util::future::join_all;
use kvasir_cluster::{Member, View};
use kvasir_proto::{convert, v1};
use kvasir_types::{BlockHash, PROTOCOL_VERSION, Role};
use serde::Serialize;

use args::{EvictArgs, PromptArgs, Strength};
pub(crate) use args::{KvCommand, time};
use prompt::Prompt;
pub(crate) use prompt::{content, numbers};

use crate::{
    output::Answer,
    probe::{self, Way},
    session::Session,
};

/// Hashes in one call, as the protocol has it.
const MAX_HASHES: usize = 1024;
/// Most rounds of following evicted blocks: chains across nodes take one for each node change.
const MAX_ROUNDS: usize = 10_000;

/// Between two looks at a node that is leaving.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

type Client = v1::store_client::StoreClient<tonic::transport::Channel>;

/// A node's answer, or why there is none.
#[derive(Debug)]
pub(crate) struct Told<T> {
    pub(crate) node: String,
    pub(crate) answer: Result<T, String>,
}

/// The store's nodes, as the cluster's metadata names them.
struct Nodes<'a> {
    members: Vec<Member>,
    way: Way,
    session: &'a Session,
}

/// Where a prompt's blocks are.
#[derive(Debug, Serialize)]
pub(crate) struct Whereabouts {
    pub(crate) model: String,
    pub(crate) tokens: usize,
    pub(crate) blocks: usize,
    pub(crate) block_tokens: usize,
    /// So many blocks, from the first on, are somewhere.
    pub(crate) run: usize,
    /// Blocks that follow one another and are in the same places.
    pub(crate) stretches: Vec<Stretch>,
    /// Nodes that did not answer, and why.
    pub(crate) silent: Vec<Silent>,
}

/// Blocks that are in the same places.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Stretch {
    pub(crate) first: usize,
    pub(crate) blocks: usize,
    pub(crate) places: Vec<Place>,
}

/// A node and its tier.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Place {
    pub(crate) node: String,
    pub(crate) memory: bool,
    pub(crate) disk: bool,
}

/// A node that did not answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Silent {
    pub(crate) node: String,
    pub(crate) why: String,
}

/// Does what is asked and says what came of it.
pub(crate) async fn run(command: KvCommand, session: &Session) -> anyhow::Result<Answer> {
    let (way, view) = (session.way()?, session.view().await?);
    let (view, output) = (&view, session.output());
    let members: Vec<Member> = view.role(Role::KvStore).cloned().collect();
    ensure!(!members.is_empty(), "no store node is running (or --prefix names another cluster)");
    let nodes = Nodes { members, way, session };
    let text = match command {
        KvCommand::Stats => {
            let stats = nodes.all(async |mut client| client.store_status(v1::StoreStatusRequest {}).await).await;
            let names = view.members.iter().filter_map(|member| member.model.as_ref());
            let names: HashMap<Vec<u8>, String> =
                names.map(|model| (model.fingerprint.0.to_vec(), model.name.clone())).collect();
            let stats = show::stats(stats, &names);
            Ok(output.show(&stats, || show::stats_table(&stats)))
        }
        KvCommand::Lookup { prompt } => {
            let found = nodes.lookup(&prompt::read(&prompt, view)?).await;
            Ok(output.show(&found, || show::whereabouts(&found)))
        }
        KvCommand::Pin { prompt, keep, ttl } => {
            let keep = match keep {
                Strength::Soft => v1::pin_request::Keep::Soft,
                Strength::Hard => v1::pin_request::Keep::Hard,
            };
            nodes.pin(&prompt::read(&prompt, view)?, keep, ttl).await
        }
        KvCommand::Unpin { prompt } => {
            nodes.pin(&prompt::read(&prompt, view)?, v1::pin_request::Keep::Cached, Duration::ZERO).await
        }
        KvCommand::Evict(args) => nodes.evict(&args, view).await,
        KvCommand::Drain { node, patience, no_wait } => nodes.drain(&node, patience, no_wait).await,
    };
    Ok(text?.into())
}

impl Nodes<'_> {
    /// Makes one call to every node at the same time.
    async fn all<T>(&self, call: impl AsyncFn(Client) -> Result<tonic::Response<T>, tonic::Status>) -> Vec<Told<T>> {
        let one = async |member: &Member| {
            let answer = probe::ask_store(&member.grpc, &self.way, &call).await;
            Told { node: member.id.to_string(), answer }
        };
        join_all(self.members.iter().map(one)).await
    }

    async fn lookup(&self, prompt: &Prompt) -> Whereabouts {
        let mut places: Vec<Vec<Place>> = vec![Vec::new(); prompt.hashes.len()];
        let mut silent: Vec<Silent> = Vec::new();
        for (part, start) in prompt.hashes.chunks(MAX_HASHES).zip((0..).step_by(MAX_HASHES)) {
            let request = v1::ExistsRequest {
                protocol_version: PROTOCOL_VERSION,
                block_bytes: prompt.block_bytes,
                hashes: pack(part),
                index: false,
            };
            for Told { node, answer } in self.all(async |mut client| client.exists(request.clone()).await).await {
                match answer {
                    Ok(there) => {
                        for (places, &tiers) in places[start..].iter_mut().zip(there.tiers.iter()) {
                            let (memory, disk) = (tiers & 1 != 0, tiers & 2 != 0);
                            if memory || disk {
                                places.push(Place { node: node.clone(), memory, disk });
                            }
                        }
                    }
                    Err(why) if silent.iter().all(|known| known.node != node) => silent.push(Silent { node, why }),
                    Err(_) => {}
                }
            }
        }
        Whereabouts {
            model: prompt.model.clone(),
            tokens: prompt.tokens,
            blocks: prompt.hashes.len(),
            block_tokens: prompt.block_tokens,
            run: places.iter().take_while(|places| !places.is_empty()).count(),
            stretches: stretches(&places),
            silent,
        }
    }

    async fn pin(&self, prompt: &Prompt, keep: v1::pin_request::Keep, ttl: Duration) -> anyhow::Result<String> {
        let mut by_node: Vec<(String, u64)> = Vec::new();
        for part in prompt.hashes.chunks(MAX_HASHES) {
            let request = v1::PinRequest {
                protocol_version: PROTOCOL_VERSION,
                block_bytes: prompt.block_bytes,
                hashes: pack(part),
                keep: keep.into(),
                ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
            };
            for (node, answer) in
                all_or_none(self.all(async |mut client| client.pin(self.way.signed(request.clone())).await).await)?
            {
                match by_node.iter_mut().find(|(known, _)| *known == node) {
                    Some((_, blocks)) => *blocks += u64::from(answer.blocks),
                    None => by_node.push((node, answer.blocks.into())),
                }
            }
        }
        Ok(show::by_node(&by_node, prompt.hashes.len(), self.session.output()))
    }

    async fn evict(&self, args: &EvictArgs, view: &View) -> anyhow::Result<String> {
        let request = v1::EvictRequest { protocol_version: PROTOCOL_VERSION, ..Default::default() };
        let (evicted, in_use) = if args.text.is_some() || args.tokens.is_some() {
            let prompt = PromptArgs {
                text: args.text.clone(),
                tokens: args.tokens.clone(),
                tokenizer: args.tokenizer.clone(),
                model: args.model.clone(),
                salt: args.salt.clone(),
                tenant_salt: args.tenant_salt.clone(),
            };
            let prompt = prompt::read(&prompt, view)?;
            ensure!(
                !prompt.hashes.is_empty(),
                "{} tokens are less than a block of {}",
                prompt.tokens,
                prompt.block_tokens
            );
            self.session
                .confirm(&format!("give up {} blocks of this prompt, and all that follow them", prompt.hashes.len()))?;
            self.evict_prompt(&prompt, request).await?
        } else if args.all {
            self.session.confirm("give up all blocks of all nodes")?;
            self.evict_once(v1::EvictRequest { all: true, ..request }).await?.0
        } else {
            let model = args.model.as_deref().map(|name| prompt::fingerprint(view, name)).transpose()?;
            let what = match (&args.model, &args.tenant) {
                (Some(model), Some(tenant)) => format!("all blocks of tenant {tenant:?} and model {model:?}"),
                (Some(model), None) => format!("all blocks of model {model:?}"),
                (None, Some(tenant)) => format!("all blocks of tenant {tenant:?}"),
                (None, None) => bail!("evict what? --tokens, --text, --model, --tenant or --all"),
            };
            self.session.confirm(&format!("give up {what}"))?;
            let model = model.map_or_else(Default::default, |model| convert::bytes16(&model.0));
            self.evict_once(v1::EvictRequest { model, tenant: args.tenant.clone(), ..request }).await?.0
        };
        Ok(show::evicted(evicted, in_use, self.session.output()))
    }

    /// Tells a node to leave and watches it until it has handed over what it had.
    async fn drain(&self, node: &str, patience: Duration, no_wait: bool) -> anyhow::Result<String> {
        let names = || self.members.iter().map(|member| member.id.as_str()).collect::<Vec<_>>().join(", ");
        let Some(member) = self.members.iter().find(|member| member.id.as_str() == node) else {
            bail!("no store node is called {node:?}, there are: {}", names());
        };
        let wrong = |why: String| anyhow::anyhow!("store node {node}: {why}");
        let begin = async |mut client: Client| client.drain(self.way.signed(v1::DrainRequest {})).await;
        probe::ask_store(&member.grpc, &self.way, begin).await.map_err(wrong)?;
        let start = std::time::Instant::now();
        loop {
            let ask = async |mut client: Client| client.store_status(v1::StoreStatusRequest {}).await;
            let status = probe::ask_store(&member.grpc, &self.way, ask).await.map_err(wrong)?;
            let leaving = probe::printable(&status.leaving);
            if leaving == "drained" || no_wait {
                return Ok(show::leaving(node, &leaving, &status, self.session.output()));
            }
            ensure!(
                start.elapsed() < patience,
                "store node {node} is {leaving} after {} s; it goes on, ask again",
                patience.as_secs()
            );
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// The prompt's blocks; then, wherever they are, those that follow evicted ones, and so on.
    async fn evict_prompt(&self, prompt: &Prompt, request: v1::EvictRequest) -> anyhow::Result<(u64, u64)> {
        let (mut evicted, mut in_use) = (0, 0);
        let mut after: Vec<u32> = Vec::new();
        for part in prompt.hashes.chunks(MAX_HASHES) {
            let block_bytes = prompt.block_bytes;
            let part = v1::EvictRequest { block_bytes, hashes: pack(part), ..request.clone() };
            let ((gone, used), names) = self.evict_once(part).await?;
            (evicted, in_use) = (evicted + gone, in_use + used);
            after.extend(names);
        }
        // What follows a block in the middle of the prompt is another prompt's, and goes as well.
        for _ in 0..MAX_ROUNDS {
            after.sort_unstable();
            after.dedup();
            if after.is_empty() {
                break;
            }
            let ((gone, used), names) = self.evict_once(v1::EvictRequest { after, ..request.clone() }).await?;
            (evicted, in_use) = (evicted + gone, in_use + used);
            after = names;
        }
        Ok((evicted, in_use))
    }

    /// One call to every node: how many are evicted, how many in use, and how the hashes of the evicted begin.
    async fn evict_once(&self, request: v1::EvictRequest) -> anyhow::Result<((u64, u64), Vec<u32>)> {
        let answers =
            all_or_none(self.all(async |mut client| client.evict(self.way.signed(request.clone())).await).await)?;
        let (mut counts, mut gone) = ((0, 0), Vec::new());
        for (_, answer) in answers {
            counts = (counts.0 + answer.evicted, counts.1 + answer.in_use);
            gone.extend(answer.gone);
        }
        Ok((counts, gone))
    }
}

/// The answers, if there is one from every node.
fn all_or_none<T>(told: Vec<Told<T>>) -> anyhow::Result<Vec<(String, T)>> {
    let mut answers = Vec::with_capacity(told.len());
    for Told { node, answer } in told {
        match answer {
            Ok(answer) => answers.push((node, answer)),
            Err(why) => bail!("store node {node}: {why}; the others have done what was asked"),
        }
    }
    Ok(answers)
}

/// Blocks that follow one another and are in the same places; those that are nowhere are left out.
fn stretches(places: &[Vec<Place>]) -> Vec<Stretch> {
    let mut first = 0;
    let mut stretches = Vec::new();
    for part in places.chunk_by(|a, b| a == b) {
        if !part[0].is_empty() {
            stretches.push(Stretch { first, blocks: part.len(), places: part[0].clone() });
        }
        first += part.len();
    }
    stretches
}

fn pack(hashes: &[BlockHash]) -> tonic::codegen::Bytes {
    convert::pack16(hashes.iter().map(|hash| &hash.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_in_the_same_places_are_one_stretch() {
        let place = |node: &str, memory| Place { node: node.to_owned(), memory, disk: !memory };
        let (a, b) = (vec![place("a", true)], vec![place("a", true), place("b", false)]);
        let none = Vec::new();
        let all = [a.clone(), a.clone(), b.clone(), none.clone(), none, a.clone()];
        let found = stretches(&all);
        assert_eq!(
            found.iter().map(|s| (s.first, s.blocks, s.places.len())).collect::<Vec<_>>(),
            [(0, 2, 1), (2, 1, 2), (5, 1, 1)]
        );
        assert!(stretches(&[]).is_empty());
    }
}
