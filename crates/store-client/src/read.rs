//! Reading: ask every node for its share, see how far the run goes, fetch that much.
//!
//! All nodes are asked at once ([`crate::lookup`]), because one lookup costs a round trip and moves nothing. What comes back
//! is an answer for each share: so many of its blocks, in order. The first block without an answer is where the run ends;
//! blocks past it are not fetched, however many there are. The bytes come in slices, so that one is verified while the next is
//! on its way, and so that a deadline that passes halfway still leaves what had come.

use std::{
    collections::VecDeque,
    ops::Range,
    time::{Duration, Instant},
};

use futures_util::{
    StreamExt,
    future::{join, join_all},
    stream::FuturesUnordered,
};
use kvasir_proto::{convert, v1};
use kvasir_transfer::{Batch, Checksum, Op, Priority};
use kvasir_types::{BlockHash, Deadline, MemberId, PROTOCOL_VERSION, RequestId};

use crate::{
    Error, Inner, MAX_HASHES,
    glance::glance,
    in_flight::InFlight,
    lookup::{Answer, Search},
    peers::Load,
    placement::{Node, collect},
};

/// Slices of a read: as many as this, if they are neither too small nor too large.
const SLICES: u64 = 8;
/// Smallest slice: what the transfer engine copies within a host without waking another thread.
const MIN_SLICE: u64 = 32 << 10;
/// Largest slice.
const MAX_SLICE: u64 = 1 << 20;

/// Most bytes that are read without a lease: a lookup for more takes a small part of the time.
const MAX_GLANCED: u64 = 8 << 20;
/// How long telling a node what was used may take.
const USED_TIMEOUT: Duration = Duration::from_millis(50);

/// How long telling a node of wrong bytes may take: the reader goes on without them anyway.
const REPORT_TIMEOUT: Duration = Duration::from_millis(50);

type Client = v1::store_client::StoreClient<tonic::transport::Channel>;

/// What a read brought.
#[derive(Debug, Default)]
pub struct ReadReport {
    /// Blocks in the run: so many, from the first that was wanted on, are in place, complete and verified.
    pub blocks: usize,
    /// Bytes of those.
    pub bytes: u64,
    /// The first thing that went wrong, if something did; the blocks it concerns are misses.
    pub error: Option<Error>,
}

/// Under way: blocks that follow one another in one share.
struct Piece<'a> {
    answer: &'a Answer,
    /// Index of its first block in the share.
    first: usize,
    /// How many.
    len: usize,
    /// All of their bytes, in order.
    slices: VecDeque<Slice>,
    /// Counts its bytes as under way from its node, for as long as they are.
    _load: Load,
}

/// One batch of a piece.
struct Slice {
    transfer: InFlight,
    parts: Vec<Part>,
}

/// Bytes of one block.
struct Part {
    /// Index of the block in the share.
    at: usize,
    local: u64,
    len: u64,
    /// Whether they are its last.
    last: bool,
}

/// What the store has of a chain: leased for a while, and not read yet. Dropped without
/// [`release`](crate::StoreClient::release), the leases end by themselves.
#[must_use]
pub struct Found {
    blocks: Vec<(BlockHash, u64)>,
    block_bytes: u64,
    /// The run: from the first block that was wanted to behind the last one that is there.
    run: Range<usize>,
    answers: Vec<Answer>,
    error: Option<Error>,
}

/// What of a run one node has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Which node.
    pub member: MemberId,
    /// Blocks that were in its memory when it was asked.
    pub memory: usize,
    /// Blocks that were waited for: they, or some before them in what was asked of the node, were on its disk only.
    pub disk: usize,
}

impl Found {
    /// Who has the blocks of the run, in which tier.
    pub fn sources(&self) -> Vec<Source> {
        let (mut sources, mut told) = (Vec::<Source>::new(), vec![false; self.blocks.len()]);
        for Answer { share, found, at_once, .. } in &self.answers {
            for (n, &block) in share.blocks[..found.len()].iter().enumerate() {
                // Two nodes may have it, if the members changed meanwhile.
                if !self.run.contains(&block) || std::mem::replace(&mut told[block], true) {
                    continue;
                }
                let source = match sources.iter().position(|source| source.member == share.node.id) {
                    Some(source) => &mut sources[source],
                    None => {
                        sources.push(Source { member: share.node.id.clone(), memory: 0, disk: 0 });
                        sources.last_mut().expect("pushed above")
                    }
                };
                *if n < *at_once { &mut source.memory } else { &mut source.disk } += 1;
            }
        }
        sources
    }

    /// Blocks in the run, from the first that was wanted on.
    pub fn blocks(&self) -> usize {
        self.run.len()
    }

    /// Leaves all but the first so many of them out.
    pub fn truncate(&mut self, blocks: usize) {
        self.run.end = self.run.end.min(self.run.start + blocks);
    }

    /// Leaves the first so many of them out: they are had otherwise.
    pub fn skip(&mut self, blocks: usize) {
        self.run.start = self.run.end.min(self.run.start + blocks);
    }

    /// The first thing that went wrong while nodes were asked, if something did.
    pub fn take_error(&mut self) -> Option<Error> {
        self.error.take()
    }
}

/// Asks for the blocks behind the first `have`.
pub(crate) async fn find(
    inner: &Inner,
    request: &RequestId,
    blocks: Vec<(BlockHash, u64)>,
    have: usize,
    block_bytes: u64,
    deadline: Deadline,
) -> Found {
    let (answers, error) = Search { inner, request, blocks: &blocks, have, block_bytes, deadline }.run().await;
    let run = have..run_end(&answers, have, blocks.len());
    Found { blocks, block_bytes, run, answers, error }
}

/// Reads the run. `progress` hears how many of its blocks, from the first on, are in place, whenever there are more.
pub(crate) async fn fetch(
    inner: &Inner,
    found: &Found,
    deadline: Deadline,
    mut progress: impl FnMut(usize),
) -> ReadReport {
    let Found { blocks, block_bytes, run, answers, .. } = found;
    let pieces = submit(inner, answers, blocks, *block_bytes, run, deadline).into_iter().map(|piece| async {
        let (first, len) = (piece.answer.share.blocks[piece.first], piece.len);
        let (good, failure) = finish(inner, piece, blocks, *block_bytes).await;
        debug_assert!(good <= len, "no more is good than was read");
        (first..first + good, failure)
    });
    let mut pieces: FuturesUnordered<_> = pieces.collect();
    // Pieces end in any order: the run goes as far as none of any is missing.
    let (mut good, mut end, mut error) = (vec![false; run.end], run.start, None);
    while let Some((piece, failure)) = pieces.next().await {
        good[piece].fill(true);
        error = error.or(failure);
        let before = end;
        end += good[end..].iter().take_while(|&&good| good).count();
        if end > before {
            progress(end - run.start);
        }
    }
    let blocks = end - run.start;
    ReadReport { blocks, bytes: blocks as u64 * block_bytes, error }
}

/// Gives the leases back.
pub(crate) fn release(inner: &Inner, found: Found) {
    found.answers.iter().for_each(|answer| inner.peers.end(&answer.share.node, answer.lease));
}

pub(crate) async fn read(
    inner: &Inner,
    request: &RequestId,
    blocks: &[(BlockHash, u64)],
    have: usize,
    block_bytes: u64,
    deadline: Deadline,
) -> ReadReport {
    let seen = read_at_a_glance(inner, blocks, have, block_bytes, deadline).await;
    let have = have + seen.blocks;
    if have == blocks.len() {
        inner.known.note(blocks, have);
        return seen;
    }
    let mut found = find(inner, request, blocks.to_vec(), have, block_bytes, deadline).await;
    let mut report = fetch(inner, &found, deadline, |_| {}).await;
    report.error = found.take_error().or(report.error);
    release(inner, found);
    ReadReport { blocks: seen.blocks + report.blocks, bytes: seen.bytes + report.bytes, error: report.error }
}

/// Reads what published indexes tell, if it is so little that a lookup would take as long as the bytes. What goes wrong with
/// that is no error yet.
async fn read_at_a_glance(
    inner: &Inner,
    blocks: &[(BlockHash, u64)],
    have: usize,
    block_bytes: u64,
    deadline: Deadline,
) -> ReadReport {
    if ((blocks.len() - have) as u64).saturating_mul(block_bytes) > MAX_GLANCED {
        return ReadReport::default();
    }
    let answers = glances(inner, blocks, have, block_bytes, deadline).await;
    let run = have..run_end(&answers, have, blocks.len());
    if run.is_empty() {
        return ReadReport::default();
    }
    let found = Found { blocks: blocks.to_vec(), block_bytes, run, answers, error: None };
    let telling = found.answers.iter().map(|answer| tell_used(inner, &answer.share.node));
    let (report, _) = join(fetch(inner, &found, deadline, |_| {}), join_all(telling)).await;
    for answer in &found.answers {
        let read = answer.share.blocks.iter().take(answer.found.len()).filter(|&&block| block < have + report.blocks);
        let read: Vec<_> = read.map(|&block| &blocks[block].0.0).collect();
        if read.is_empty() {
            continue;
        }
        let hashes = convert::pack16(read.into_iter());
        let prompt_blocks = u32::try_from(blocks.len()).unwrap_or(u32::MAX);
        inner.peers.used(&answer.share.node, v1::UsedBlocks { block_bytes, hashes, prompt_blocks });
    }
    report
}

/// What the nodes' indexes tell of the blocks behind the first `have`: nobody holds it.
async fn glances(
    inner: &Inner,
    blocks: &[(BlockHash, u64)],
    have: usize,
    block_bytes: u64,
    deadline: Deadline,
) -> Vec<Answer> {
    let placement = inner.placement();
    let behind = |group: Range<usize>| (group.start, group.start.max(have)..group.end);
    let parts = placement.groups(blocks.len()).map(behind).filter(|(_, part)| !part.is_empty());
    let parts = parts.map_while(|(first, part)| Some((inner.source(&placement, blocks[first].0)?, part)));
    let shares = collect(parts, placement.group_blocks(), MAX_HASHES);
    let glances = shares.into_iter().filter_map(|share| {
        let index = inner.peers.index(&share.node)?;
        Some(async move {
            let hashes = share.blocks.iter().map(|&block| blocks[block].0);
            let found = glance(inner, &share.node, &index, hashes, block_bytes, deadline).await;
            let (segment, grant) = (index.segment.clone(), index.grant);
            let at_once = found.len();
            Answer { share, found, at_once, segment, grant, lease: 0, until: deadline }
        })
    });
    join_all(glances).await
}

/// Tells a node what was read earlier without asking it, now and then: what is used is what it keeps.
async fn tell_used(inner: &Inner, node: &Node) {
    let runs = inner.peers.take_used(node);
    if runs.is_empty() {
        return;
    }
    let message = v1::UsedRequest { protocol_version: PROTOCOL_VERSION, runs };
    let call = async |mut client: Client| client.used(message).await;
    match inner.peers.call(node, Deadline::after(USED_TIMEOUT), call).await {
        Ok(answer) => inner.hot.told(&answer.hot, Instant::now()),
        Err(error) => tracing::debug!(member = %node.id, %error, "what was used was not told"),
    }
}

/// So many milliseconds after `start`, bounded: the number comes from outside.
pub(crate) fn later(start: Instant, ms: u64) -> Deadline {
    let lasts = Duration::from_millis(ms).min(Duration::from_secs(3600));
    Deadline::after(lasts.saturating_sub(start.elapsed()))
}

/// Behind the last of the blocks that, from number `have` on, all have an answer.
fn run_end(answers: &[Answer], have: usize, blocks: usize) -> usize {
    let mut has = vec![false; blocks];
    has[..have].fill(true);
    for answer in answers {
        answer.share.blocks[..answer.found.len()].iter().for_each(|&block| has[block] = true);
    }
    has.iter().take_while(|&&has| has).count()
}

/// Submits the blocks of the run, a batch for each stretch of a share that is one group, the prompt's beginning first.
fn submit<'a>(
    inner: &Inner,
    answers: &'a [Answer],
    blocks: &[(BlockHash, u64)],
    block_bytes: u64,
    run: &Range<usize>,
    deadline: Deadline,
) -> Vec<Piece<'a>> {
    let mut stretches = Vec::new();
    for answer in answers {
        let group = answer.share.group_blocks;
        let there = &answer.share.blocks[..answer.found.len()];
        let mut first = there.partition_point(|&block| block < run.start);
        let wanted = there.partition_point(|&block| block < run.end).max(first);
        for part in there[first..wanted].chunk_by(|a, b| a / group == b / group) {
            stretches.push((answer, first, part.len()));
            first += part.len();
        }
    }
    stretches.sort_unstable_by_key(|&(answer, first, _)| answer.share.blocks[first]);
    let total = stretches.iter().map(|&(_, _, len)| len as u64 * block_bytes).sum::<u64>();
    let slice = (total / SLICES).clamp(MIN_SLICE, MAX_SLICE);
    stretches
        .into_iter()
        .map(|(answer, first, len)| {
            let places = (first..first + len).map(|at| Place {
                at,
                local: blocks[answer.share.blocks[at]].1,
                remote: answer.found[at].offset,
            });
            let slices = cut(places, block_bytes, slice);
            let start = |ranges: &[(Part, kvasir_transfer::Range)]| Batch {
                op: Op::Read,
                target: answer.segment.clone(),
                grant: answer.grant,
                ranges: ranges.iter().map(|(_, range)| *range).collect(),
                deadline: deadline.min(answer.until),
                priority: Priority::Normal,
                notice: None,
            };
            let slices = slices.into_iter().map(|slice| Slice {
                transfer: InFlight::new(inner.engine.submit(start(&slice))),
                parts: slice.into_iter().map(|(part, _)| part).collect(),
            });
            let load = inner.peers.load(&answer.share.node, len as u64 * block_bytes);
            Piece { answer, first, len, slices: slices.collect(), _load: load }
        })
        .collect()
}

/// A block of a piece: its index in the share, and where it lies here and there.
struct Place {
    at: usize,
    local: u64,
    remote: u64,
}

/// Cuts blocks into slices of so many bytes or a little more, but for the last one; a block that is larger than a slice is cut
/// within.
fn cut(places: impl Iterator<Item = Place>, block_bytes: u64, slice: u64) -> Vec<Vec<(Part, kvasir_transfer::Range)>> {
    let (mut slices, mut current, mut bytes) = (Vec::new(), Vec::new(), 0);
    for Place { at, local, remote } in places {
        let mut done = 0;
        while done < block_bytes {
            let len = slice.min(block_bytes - done);
            let part = Part { at, local: local.saturating_add(done), len, last: done + len == block_bytes };
            let range = kvasir_transfer::Range { local: part.local, remote: remote.saturating_add(done), len };
            current.push((part, range));
            (done, bytes) = (done + len, bytes + len);
            if bytes >= slice {
                slices.push(std::mem::take(&mut current));
                bytes = 0;
            }
        }
    }
    if !current.is_empty() {
        slices.push(current);
    }
    slices
}

/// Waits for a piece and verifies it: how many of its blocks, from its first on, are good.
async fn finish(
    inner: &Inner,
    mut piece: Piece<'_>,
    blocks: &[(BlockHash, u64)],
    block_bytes: u64,
) -> (usize, Option<Error>) {
    let (good, failure) = match verify(inner, &mut piece, blocks).await {
        Ok(()) => (piece.len, None),
        Err((at, failure)) => (at - piece.first, Some(failure)),
    };
    // What is of no use any more is waited for all the same: it writes to memory.
    for slice in piece.slices {
        let _ = slice.transfer.await;
    }
    // Of what nobody held it is no wonder.
    if let Some(Error::Checksum { hash, .. }) = &failure
        && piece.answer.lease != 0
    {
        report(inner, piece.answer, *hash, block_bytes).await;
    }
    (good, failure)
}

/// Tells a node that it has wrong bytes under a hash, so that the next reader does not fetch them as well. The lease ends with
/// it: a block that is held is not given up.
async fn report(inner: &Inner, answer: &Answer, hash: BlockHash, block_bytes: u64) {
    let message = v1::ReportRequest { block_bytes, hashes: convert::bytes16(&hash.0), ended: vec![answer.lease] };
    let call = async |mut client: Client| client.report(message).await;
    if let Err(error) = inner.peers.call(&answer.share.node, Deadline::after(REPORT_TIMEOUT), call).await {
        tracing::debug!(member = %answer.share.node.id, %error, "wrong bytes not reported");
    }
}

/// Verifies slice after slice as they come; fails with the first block of the share that is not good.
async fn verify(inner: &Inner, piece: &mut Piece<'_>, blocks: &[(BlockHash, u64)]) -> Result<(), (usize, Error)> {
    let (answer, node): (_, &Node) = (piece.answer, &piece.answer.share.node);
    let mut sum = Checksum::new(&inner.engine);
    while let Some(Slice { transfer, parts }) = piece.slices.pop_front() {
        let first = parts.first().map_or(piece.first, |part| part.at);
        if let Err(source) = transfer.await {
            inner.transfer_failed(node, &source);
            return Err((first, Error::Transfer { member: node.id.clone(), source }));
        }
        for part in parts {
            sum.add(part.local, part.len).map_err(|source| (part.at, Error::Local(source)))?;
            if part.last {
                let found = std::mem::replace(&mut sum, Checksum::new(&inner.engine)).finish();
                if found != answer.found[part.at].checksum {
                    let hash = blocks[answer.share.blocks[part.at]].0;
                    if answer.lease == 0 {
                        tracing::debug!(member = %node.id, %hash, "a block was given up before it was read");
                    } else {
                        tracing::warn!(member = %node.id, %hash, "a stored block has other bytes than were stored, taken as a miss");
                    }
                    return Err((part.at, Error::Checksum { member: node.id.clone(), hash }));
                }
            }
            // A slice is a fraction of a millisecond of hashing; a prompt is not, and others use this thread too.
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn slices_are_all_bytes_of_all_blocks_in_order(blocks in 1u64..20, block_bytes in 1u64..500, slice in 1u64..300) {
            let place = |at: u64| Place { at: at as usize, local: at * 1000, remote: 100_000 - at * 1000 };
            let slices = cut((0..blocks).map(place), block_bytes, slice);
            let (mut at, mut done) = (0, 0);
            for (index, cut) in slices.iter().enumerate() {
                let bytes: u64 = cut.iter().map(|(part, _)| part.len).sum();
                prop_assert!(bytes < 2 * slice && (bytes >= slice || index + 1 == slices.len()));
                for (part, range) in cut {
                    let Place { local, remote, .. } = place(at);
                    prop_assert_eq!((part.at as u64, part.local, part.len), (at, local + done, range.len));
                    prop_assert_eq!((range.local, range.remote), (local + done, remote + done));
                    done += part.len;
                    prop_assert_eq!(part.last, done == block_bytes);
                    if part.last {
                        (at, done) = (at + 1, 0);
                    }
                }
            }
            prop_assert_eq!((at, done), (blocks, 0));
        }
    }
}
