//! Looking for a prompt's blocks: who is asked for which, and who else where something is missing.
//!
//! In the first round every group is asked of one node: its home, or one of its copies. That is all, unless a miss there
//! need not be one: then there is another round for the groups concerned, up to a limit.
//!
//! | the node asked | who may have it all the same |
//! | --- | --- |
//! | did not answer | the other copies |
//! | has a copy of the group, and lacks a block | the home |
//! | joined lately ("warming") | the next in the order, who had the group before |
//! | is the home, and one that is leaving comes before it in the order | the leaving one |
//! | knows a newer view of the members | the home by that view |
//!
//! A node whose blocks are on disk says so at once, and is asked a second time, to answer when they are in memory: so one that
//! does not answer at all costs little, and a disk may take what time there is.
//!
//! A group for which nobody is left ends the run: what lies behind it is not asked for again.

use std::{ops::Range, sync::Arc, time::Instant};

use futures_util::{StreamExt, stream};
use kvasir_proto::{convert, v1};
use kvasir_rpc::trace;
use kvasir_types::{BlockHash, Deadline, Epoch, GrantKey, MemberId, PROTOCOL_VERSION, RequestId, SegmentDescriptor};
use tonic::Request;

use crate::{
    Error, Inner, MAX_CALLS, MAX_HASHES, glance,
    placement::{Miss, Node, Placement, Share, collect},
    published::Line,
};

/// Most rounds of lookups for one read; each costs a round trip.
const MAX_ROUNDS: usize = 4;

/// What is looked for.
pub(crate) struct Search<'a> {
    pub(crate) inner: &'a Inner,
    pub(crate) request: &'a RequestId,
    pub(crate) blocks: &'a [(BlockHash, u64)],
    /// So many of them, from the first on, are not looked for.
    pub(crate) have: usize,
    pub(crate) block_bytes: u64,
    pub(crate) deadline: Deadline,
}

/// A node's answer to a lookup: it has the first `found.len()` blocks of the share.
pub(crate) struct Answer {
    pub(crate) share: Share,
    pub(crate) found: Vec<Line>,
    /// So many of them the node had in memory when it was asked; for the others it was waited.
    pub(crate) at_once: usize,
    pub(crate) segment: SegmentDescriptor,
    pub(crate) grant: GrantKey,
    /// 0: nobody holds the blocks, they may be given up before they are read.
    pub(crate) lease: u64,
    pub(crate) until: Deadline,
}

/// What a node said beside what it has.
struct Reply {
    answer: Option<Answer>,
    /// How many of its share's blocks it knows, found or not.
    known: usize,
    warming: bool,
    /// It knew a newer view, and blocks are divided otherwise by that.
    moved: bool,
}

/// A placement group's part of what is looked for.
struct Group {
    key: BlockHash,
    /// Those of its blocks that nobody has answered for yet.
    missing: Range<usize>,
    /// Who is asked next; `None`: nobody is left.
    source: Option<Arc<Node>>,
    tried: Vec<MemberId>,
}

impl Group {
    /// Its source has been asked; who else may have it?
    fn tried(&mut self, inner: &Inner, placement: &Placement, why: Miss) {
        let Some(asked) = self.source.take() else { return };
        self.tried.push(asked.id.clone());
        self.source = self.other(inner, placement, &asked, why);
    }

    /// Its source lacks the groups before it: who may have those may have this one. The source itself may, too, and is
    /// asked again if they do not.
    fn follow(&mut self, inner: &Inner, placement: &Placement, why: Miss) {
        let Some(source) = &self.source else { return };
        if let Some(other) = self.other(inner, placement, source, why) {
            self.source = Some(other);
        }
    }

    fn other(&self, inner: &Inner, placement: &Placement, asked: &Node, why: Miss) -> Option<Arc<Node>> {
        let copies = inner.copies(placement, self.key);
        let others = placement.others(self.key, copies, &asked.id, why);
        others.into_iter().find(|node| !self.tried.contains(&node.id))
    }
}

impl Search<'_> {
    /// Every answer there is, and the first thing that went wrong. How far the prompt is known is noted for who writes it.
    pub(crate) async fn run(&self) -> (Vec<Answer>, Option<Error>) {
        let mut placement = self.inner.placement();
        let mut groups = self.groups(&placement);
        let (mut answers, mut error, mut known) = (Vec::new(), None, self.have);
        for _ in 0..MAX_ROUNDS {
            let asking = self.shares(&placement, &groups).into_iter().map(|share| self.ask(share, placement.epoch));
            let replies: Vec<_> = stream::iter(asking).buffer_unordered(MAX_CALLS).collect().await;
            if replies.is_empty() {
                break;
            }
            let mut moved = false;
            for (blocks, reply) in replies {
                let (found, why) = match &reply {
                    Ok(reply) => (
                        reply.answer.as_ref().map_or(0, |answer| answer.found.len()),
                        Miss::Lacks { warming: reply.warming },
                    ),
                    Err(_) => (0, Miss::Failed),
                };
                self.count(&placement, &mut groups, &blocks, found, why);
                match reply {
                    Ok(reply) => {
                        moved |= reply.moved;
                        let last = reply.known.min(blocks.len()).checked_sub(1);
                        known = known.max(last.map_or(0, |last| blocks[last] + 1));
                        answers.extend(reply.answer);
                    }
                    Err(failure) => error = error.or(Some(failure)),
                }
            }
            if moved {
                let newer = self.inner.placement();
                if newer.group_blocks() == placement.group_blocks() {
                    self.divide_anew(&newer, &mut groups);
                    placement = newer;
                }
            }
        }
        self.inner.known.note(self.blocks, known);
        (answers, error)
    }

    fn groups(&self, placement: &Placement) -> Vec<Group> {
        placement
            .groups(self.blocks.len())
            .map(|blocks| Group {
                key: self.blocks[blocks.start].0,
                missing: blocks.start.max(self.have)..blocks.end,
                source: self.inner.source(placement, self.blocks[blocks.start].0),
                tried: Vec::new(),
            })
            .collect()
    }

    /// What to ask of whom: all that is missing, up to the first group that nobody has.
    fn shares(&self, placement: &Placement, groups: &[Group]) -> Vec<Share> {
        let parts = groups
            .iter()
            .filter(|group| !group.missing.is_empty())
            .map_while(|group| Some((group.source.clone()?, group.missing.clone())));
        collect(parts, placement.group_blocks(), MAX_HASHES)
    }

    /// Counts what a node has of a share. Where its run ended, it lacks the group; what lies behind that is not known, and
    /// asked for where the lacking one is. A node that failed lacks all of them.
    fn count(&self, placement: &Placement, groups: &mut [Group], blocks: &[usize], mut found: usize, why: Miss) {
        let (size, mut ended) = (placement.group_blocks(), false);
        for part in blocks.chunk_by(|a, b| a / size == b / size) {
            let group = &mut groups[part[0] / size];
            if ended {
                group.follow(self.inner, placement, why);
                continue;
            }
            let good = found.min(part.len());
            group.missing.start += good;
            found -= good;
            if good < part.len() {
                group.tried(self.inner, placement, why);
                ended = why != Miss::Failed;
                if ended && group.source.is_none() {
                    return;
                }
            }
        }
    }

    /// What is still missing is asked of whoever has it by a newer view, unless that was asked already.
    fn divide_anew(&self, placement: &Placement, groups: &mut [Group]) {
        for group in groups.iter_mut().filter(|group| !group.missing.is_empty()) {
            let source = self.inner.source(placement, group.key);
            if let Some(source) = source.filter(|source| !group.tried.contains(&source.id)) {
                group.source = Some(source);
            }
        }
    }

    async fn ask(&self, share: Share, epoch: Epoch) -> (Vec<usize>, Result<Reply, Error>) {
        (share.blocks.clone(), self.lookup(share, epoch).await)
    }

    /// How long a node may wait for its disk: half of what it has for an answer, or of what is left.
    fn disk_wait(&self) -> u32 {
        let left = u64::try_from(self.deadline.remaining().as_millis()).unwrap_or(u64::MAX);
        u32::try_from(left.min(self.inner.peers.timeout_ms()) / 2).unwrap_or(u32::MAX)
    }

    async fn lookup(&self, share: Share, epoch: Epoch) -> Result<Reply, Error> {
        let message = v1::LookupRequest {
            protocol_version: PROTOCOL_VERSION,
            request_id: self.request.to_string(),
            hashes: convert::pack16(share.blocks.iter().map(|&block| &self.blocks[block].0.0)),
            block_bytes: self.block_bytes,
            wait_ms: 0,
            ended: self.inner.peers.take_ended(&share.node),
            prompt_blocks: u32::try_from(self.blocks.len()).unwrap_or(u32::MAX),
            index: self.inner.peers.index(&share.node).is_none(),
            epoch: epoch.0,
        };
        let (again, mut asked) = (message.clone(), Instant::now());
        let call = async |mut client: Client| client.lookup(trace::carry(Request::new(message))).await;
        let peers = &self.inner.peers;
        let mut response = peers.call_within(peers.lookup_timeout, &share.node, self.deadline, call).await?;
        let at_once = response.offsets.len();
        if response.coming > 0 && !self.deadline.passed() {
            let (wait_ms, ended, now) =
                (self.disk_wait(), Vec::from_iter(Some(response.lease).filter(|&lease| lease != 0)), Instant::now());
            let again = v1::LookupRequest { wait_ms, ended, ..again };
            let call = async |mut client: Client| client.lookup(trace::carry(Request::new(again))).await;
            // Without an answer, the first one stands.
            if let Ok(more) = peers.call(&share.node, self.deadline, call).await {
                (response, asked) = (more, now);
            }
        }
        let moved = response.view.as_ref().is_some_and(|view| self.inner.newer(&share.node, view));
        self.inner.hot.told(&response.hot, Instant::now());
        glance::told(self.inner, &share.node, response.index.as_ref());
        let reply = |answer| Reply { answer, known: response.known as usize, warming: response.warming, moved };
        if response.offsets.is_empty() {
            return Ok(reply(None));
        }
        let member = &share.node.id;
        let unacceptable = |source| Error::Answer { member: member.clone(), source };
        let sums = convert::checksums(&response.checksums, share.blocks.len()).map_err(unacceptable)?;
        if response.offsets.len() != sums.len() || sums.len() > share.blocks.len() {
            let (asked, got) = (share.blocks.len(), response.offsets.len());
            return Err(Error::Count { member: member.clone(), asked, got });
        }
        let found = response.offsets.iter().zip(sums).map(|(&offset, checksum)| Line { offset, checksum }).collect();
        let segment = response.segment.as_ref().ok_or(kvasir_proto::Error::Missing("segment"));
        let segment = segment.and_then(SegmentDescriptor::try_from).map_err(unacceptable)?;
        // The node's lease began after we asked, so by our clock it lasts at least this long.
        let until = crate::read::later(asked, response.lease_ms);
        let grant = convert::grant_key(response.grant);
        Ok(reply(Some(Answer { found, at_once, segment, grant, lease: response.lease, until, share })))
    }
}

type Client = v1::store_client::StoreClient<tonic::transport::Channel>;
