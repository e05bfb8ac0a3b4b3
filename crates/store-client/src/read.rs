//! Reading: ask every node for its share, see how far the run goes, fetch that much.
//!
//! All nodes are asked at once ([`crate::lookup`]), because one lookup costs a round trip and moves nothing. What comes back
//! is an answer for each share: so many of its blocks, in order. The first block without an answer is where the run ends;
//! blocks past it are not fetched, however many there are. The bytes of a group are one batch, so that a deadline that passes halfway
//! still leaves the groups that had come.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, future::join_all, stream::FuturesUnordered};
use kvasir_proto::v1;
use kvasir_transfer::{Batch, Op, Priority};
use kvasir_types::{BlockHash, Deadline, RequestId};

use crate::{
    Error, Inner,
    in_flight::InFlight,
    lookup::{Answer, Search},
    peers::Load,
    placement::Node,
};

/// How long giving a lease back may take. It only makes blocks evictable earlier than the lease's end would, so it is not
/// worth waiting for.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(50);

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

/// A batch under way: blocks that follow one another in one share.
struct Piece<'a> {
    answer: &'a Answer,
    /// Index of its first block in the share.
    first: usize,
    /// How many.
    len: usize,
    transfer: InFlight,
    /// Counts its bytes as under way from its node, for as long as they are.
    _load: Load,
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

impl Found {
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
pub(crate) async fn release(inner: &Inner, found: Found) {
    join_all(found.answers.iter().map(|answer| release_one(inner, answer))).await;
}

pub(crate) async fn read(
    inner: &Inner,
    request: &RequestId,
    blocks: &[(BlockHash, u64)],
    have: usize,
    block_bytes: u64,
    deadline: Deadline,
) -> ReadReport {
    let mut found = find(inner, request, blocks.to_vec(), have, block_bytes, deadline).await;
    let mut report = fetch(inner, &found, deadline, |_| {}).await;
    report.error = found.take_error().or(report.error);
    release(inner, found).await;
    report
}

type Client = v1::store_client::StoreClient<tonic::transport::Channel>;

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
    stretches
        .into_iter()
        .map(|(answer, first, len)| {
            let ranges = (first..first + len)
                .map(|at| kvasir_transfer::Range {
                    local: blocks[answer.share.blocks[at]].1,
                    remote: answer.found[at].offset,
                    len: block_bytes,
                })
                .collect();
            let batch = Batch {
                op: Op::Read,
                target: answer.segment.clone(),
                grant: answer.grant,
                ranges,
                deadline: deadline.min(answer.until),
                priority: Priority::Normal,
                notice: None,
            };
            let load = inner.peers.load(&answer.share.node, len as u64 * block_bytes);
            Piece { answer, first, len, transfer: InFlight::new(inner.engine.submit(batch)), _load: load }
        })
        .collect()
}

/// Waits for a piece and verifies it: how many of its blocks, from its first on, are good.
async fn finish(
    inner: &Inner,
    piece: Piece<'_>,
    blocks: &[(BlockHash, u64)],
    block_bytes: u64,
) -> (usize, Option<Error>) {
    let Piece { answer, first, len, transfer, _load } = piece;
    let node: &Node = &answer.share.node;
    if let Err(source) = transfer.await {
        inner.transfer_failed(node, &source);
        return (0, Some(Error::Transfer { member: node.id.clone(), source }));
    }
    for at in first..first + len {
        let (hash, offset) = blocks[answer.share.blocks[at]];
        match inner.engine.checksum(offset, block_bytes) {
            Ok(checksum) if checksum == answer.found[at].checksum => {}
            Ok(_) => {
                tracing::warn!(member = %node.id, %hash, "a stored block has other bytes than were stored, taken as a miss");
                return (at - first, Some(Error::Checksum { member: node.id.clone(), hash }));
            }
            Err(source) => return (at - first, Some(Error::Local(source))),
        }
        // A block is a millisecond of hashing at most; a prompt is not, and others use this thread too.
        tokio::task::yield_now().await;
    }
    (len, None)
}

async fn release_one(inner: &Inner, answer: &Answer) {
    let message = v1::ReleaseRequest { lease: answer.lease };
    let call = async |mut client: Client| client.release(message).await;
    let result = inner.peers.call(&answer.share.node, Deadline::after(RELEASE_TIMEOUT), call).await;
    if let Err(error) = result {
        tracing::debug!(member = %answer.share.node.id, %error, "lease not given back, it ends by itself");
    }
}
