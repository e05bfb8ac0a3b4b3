//! Reading: ask every node for its share, see how far the run goes, fetch that much.
//!
//! All nodes are asked at once, because one lookup costs a round trip and moves nothing. What comes back is an answer for
//! each share: so many of its blocks, in order. The first block without an answer is where the run ends; blocks past it
//! are not fetched, however many there are. The bytes of a group are one batch, so that a deadline that passes halfway
//! still leaves the groups that had come.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, future::join_all, stream};
use kvasir_proto::{convert, v1};
use kvasir_transfer::{Batch, Op, Priority, Range};
use kvasir_types::{BlockHash, Deadline, GrantKey, PROTOCOL_VERSION, RequestId, SegmentDescriptor};

use crate::{
    Error, Inner, MAX_CALLS,
    in_flight::InFlight,
    placement::{Node, Share},
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

/// A node's answer to a lookup: it has the first `found.len()` blocks of the share.
struct Answer {
    share: Share,
    found: Vec<Found>,
    segment: SegmentDescriptor,
    grant: GrantKey,
    lease: u64,
    until: Deadline,
}

struct Found {
    offset: u64,
    checksum: [u8; 16],
}

/// A batch under way: blocks that follow one another in one share.
struct Piece<'a> {
    answer: &'a Answer,
    /// Index of its first block in the share.
    first: usize,
    /// How many.
    len: usize,
    transfer: InFlight,
}

pub(crate) async fn read(
    inner: &Inner,
    request: &RequestId,
    blocks: &[(BlockHash, u64)],
    have: usize,
    block_bytes: u64,
    deadline: Deadline,
) -> ReadReport {
    let shares = inner.shares(blocks, have);
    let lookups = shares.into_iter().map(|share| lookup(inner, request, blocks, block_bytes, deadline, share));
    let results: Vec<_> = stream::iter(lookups).buffer_unordered(MAX_CALLS).collect().await;
    let mut error = None;
    let mut answers = Vec::with_capacity(results.len());
    for result in results {
        match result {
            Ok(answer) => answers.extend(answer),
            Err(failure) => error = error.or(Some(failure)),
        }
    }
    let run = run_end(&answers, have, blocks.len());
    let fetched =
        join_all(submit(inner, &answers, blocks, block_bytes, run, deadline).into_iter().map(|piece| async {
            let (first, len) = (piece.answer.share.blocks[piece.first], piece.len);
            let (good, failure) = finish(inner, piece, blocks, block_bytes).await;
            (first, len, good, failure)
        }))
        .await;
    // Pieces are in the prompt's order only within a share: the run ends at the first bad block of any.
    let mut end = run;
    for (first, len, good, failure) in fetched {
        if good < len {
            end = end.min(first + good);
        }
        error = error.or(failure);
    }
    join_all(answers.iter().map(|answer| release(inner, answer))).await;
    ReadReport { blocks: end - have, bytes: (end - have) as u64 * block_bytes, error }
}

async fn lookup(
    inner: &Inner,
    request: &RequestId,
    blocks: &[(BlockHash, u64)],
    block_bytes: u64,
    deadline: Deadline,
    share: Share,
) -> Result<Option<Answer>, Error> {
    let message = v1::LookupRequest {
        protocol_version: PROTOCOL_VERSION,
        request_id: request.to_string(),
        hashes: convert::pack16(share.blocks.iter().map(|&block| &blocks[block].0.0)),
        block_bytes,
    };
    let asked = Instant::now();
    let call = async |mut client: Client| client.lookup(message).await;
    let response = inner.peers.call(&share.node, deadline, call).await?;
    if response.offsets.is_empty() {
        return Ok(None);
    }
    let member = &share.node.id;
    let unacceptable = |source| Error::Answer { member: member.clone(), source };
    let sums = convert::checksums(&response.checksums, share.blocks.len()).map_err(unacceptable)?;
    if response.offsets.len() != sums.len() || sums.len() > share.blocks.len() {
        let (asked, got) = (share.blocks.len(), response.offsets.len());
        return Err(Error::Count { member: member.clone(), asked, got });
    }
    let found = response.offsets.iter().zip(sums).map(|(&offset, checksum)| Found { offset, checksum }).collect();
    let segment = response.segment.as_ref().ok_or(kvasir_proto::Error::Missing("segment"));
    let segment = segment.and_then(SegmentDescriptor::try_from).map_err(unacceptable)?;
    // The node's lease began after we asked, so by our clock it lasts at least this long.
    let until = deadline.min(later(asked, response.lease_ms));
    let grant = convert::grant_key(response.grant);
    Ok(Some(Answer { found, segment, grant, lease: response.lease, until, share }))
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
    run: usize,
    deadline: Deadline,
) -> Vec<Piece<'a>> {
    let group = inner.config.group_blocks.max(1);
    let mut stretches = Vec::new();
    for answer in answers {
        let wanted = answer.share.blocks[..answer.found.len()].partition_point(|&block| block < run);
        let mut first = 0;
        for part in answer.share.blocks[..wanted].chunk_by(|a, b| a / group == b / group) {
            stretches.push((answer, first, part.len()));
            first += part.len();
        }
    }
    stretches.sort_unstable_by_key(|&(answer, first, _)| answer.share.blocks[first]);
    stretches
        .into_iter()
        .map(|(answer, first, len)| {
            let ranges = (first..first + len)
                .map(|at| Range {
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
            Piece { answer, first, len, transfer: InFlight::new(inner.engine.submit(batch)) }
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
    let Piece { answer, first, len, transfer } = piece;
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

async fn release(inner: &Inner, answer: &Answer) {
    let message = v1::ReleaseRequest { lease: answer.lease };
    let call = async |mut client: Client| client.release(message).await;
    let result = inner.peers.call(&answer.share.node, Deadline::after(RELEASE_TIMEOUT), call).await;
    if let Err(error) = result {
        tracing::debug!(member = %answer.share.node.id, %error, "lease not given back, it ends by itself");
    }
}
