//! `Prefill.Prefill`: checks a request and starts its job.

use std::{sync::Arc, time::Duration};

use kvasir_engine::Mode;
use kvasir_kv_cache::Geometry;
use kvasir_proto::{check_protocol, convert, v1};
use kvasir_rpc::trace;
use kvasir_runtime::{Kind, story::Story};
use kvasir_types::{Deadline, GrantKey, KvGroups, KvLayout, RequestId, SegmentDescriptor, TokenId};
use tonic::{Request, Response, Status, metadata::MetadataMap};

use super::job;
use crate::{
    caller::{Caller, Events},
    error::Error,
    host::Host,
    pulse::Beating,
    sequence::{Prompt, Sequence},
};

/// The decode worker's memory for one prompt.
pub(super) struct Destination {
    pub(super) segment: SegmentDescriptor,
    pub(super) grant: GrantKey,
    /// One for every group of the model's layers.
    pub(super) groups: Vec<Landing>,
}

/// Where the blocks of one group of layers are or must land.
#[derive(Debug, PartialEq)]
pub(super) struct Landing {
    /// For each block of the prompt; `None`: the decode worker needs it no more.
    pub(super) offsets: Vec<Option<u64>>,
    /// How many blocks, from the first on, the decode worker has all it needs of already.
    pub(super) present: usize,
}

/// A prompt that has been checked.
pub(super) struct Checked {
    pub(super) id: RequestId,
    pub(super) tenant: Arc<str>,
    pub(super) prompt: Arc<[TokenId]>,
    pub(super) destination: Destination,
    pub(super) deadline: Deadline,
    /// What becomes of it.
    pub(super) story: Arc<Story>,
}

/// The gRPC service of a prefill worker.
pub(crate) struct PrefillService {
    host: Arc<Host>,
}

impl PrefillService {
    pub(crate) fn new(host: Arc<Host>) -> Self {
        Self { host }
    }

    async fn start(&self, wire: v1::PrefillRequest, metadata: &MetadataMap) -> Result<Events<v1::PrefillEvent>, Error> {
        if self.host.draining() {
            return Err(Error::Draining);
        }
        check_protocol(wire.protocol_version)?;
        let id: RequestId = wire.request_id.parse().map_err(kvasir_proto::Error::from)?;
        self.host.check_model(&wire.fingerprint)?;
        let theirs = wire.layout.as_ref().ok_or(kvasir_proto::Error::Missing("layout"))?.try_into()?;
        let ours = self.host.model.layout;
        if theirs != ours {
            return Err(Error::Layout { ours, theirs });
        }
        let prompt = self.host.check_prompt(&wire.prompt)?;
        let destination = destination(&wire, prompt.len(), &ours, &self.host.groups)?;
        let tenant = convert::tenant(&wire.tenant)?.into();
        let limit = Duration::from_millis(self.host.now().prefill.max_request_ms);
        let deadline = Deadline::from_wire(wire.deadline_ms, limit);
        let admitted = Prompt {
            id: id.clone(),
            tokens: prompt.clone(),
            root: self.host.root(convert::salt(&wire.cache_salt)?),
            sampling: wire.sampling.as_ref().ok_or(kvasir_proto::Error::Missing("sampling"))?.try_into()?,
            priority: convert::priority(wire.priority),
            choices: 1, // the others' first tokens are drawn by the decode worker
        };
        let story = self.host.stories.begin(id.as_str(), "prefill");
        let present = destination.groups.first().map_or(0, |group| group.present);
        let there = present * ours.block_size as usize;
        story.tell("received", [("prompt_tokens", prompt.len().into()), ("there_already_tokens", there.into())]);
        let admitted = Sequence::admit(&self.host, admitted, Mode::PrefillOnly).await;
        let sequence = admitted.inspect_err(|error| story.end("refused", [("why", error.to_string().into())]))?;
        if self.host.draining() {
            story.end("refused", [("why", "draining".into())]);
            return Err(Error::Draining); // by now
        }
        let (caller, events) = Caller::new(4, deadline, self.host.stages.give_up()); // first token, done, an error, one to spare
        let span = tracing::info_span!("prefill", request_id = %id, worker = %self.host.id, tokens = prompt.len());
        trace::adopt(&span, metadata);
        let checked = Checked { id, tenant, prompt, destination, deadline, story };
        let work = job::run(self.host.clone(), checked, sequence, caller);
        self.host.tasks.spawn_in(Kind::Request, "prefill", span, async move {
            work.await;
            Ok(())
        });
        Ok(events)
    }
}

/// The caller's memory, checked against what the prompt needs. Whether the grant opens it is for its owner to say.
fn destination(
    wire: &v1::PrefillRequest,
    prompt_tokens: usize,
    layout: &KvLayout,
    groups: &KvGroups,
) -> Result<Destination, Error> {
    let segment: SegmentDescriptor =
        wire.destination.as_ref().ok_or(kvasir_proto::Error::Missing("destination"))?.try_into()?;
    let a_group = layout.blocks_for(prompt_tokens);
    let needed = a_group * groups.len();
    if wire.blocks.len() != needed {
        return Err(Error::Targets(format!("{} blocks for a prompt that needs {needed}", wire.blocks.len())));
    }
    let last_offset = segment.len.checked_sub(layout.block_bytes() as u64);
    if let Some(bad) = wire.blocks.iter().find(|block| last_offset.is_none_or(|last| block.offset > last)) {
        return Err(Error::Targets(format!("offset {:#x} is outside a segment of {} bytes", bad.offset, segment.len)));
    }
    let geometry = Geometry::new(layout.block_size as usize, groups);
    let rows = groups.iter().zip(wire.blocks.chunks_exact(a_group));
    // What the prompt's last token looks at: it may have to be computed over there after all.
    let groups = rows.map(|(group, blocks)| landing(blocks, geometry.first_needed(group.kind, prompt_tokens - 1)));
    let groups = groups.collect::<Result<_, _>>()?;
    Ok(Destination { segment, grant: convert::grant_key(wire.grant), groups })
}

/// One group's row, of which blocks from `first` on are needed.
///
/// A needed block that is said to be absent is refused: with blocks present behind it, it would be taken for read when it
/// was not, and its rubbish go into this worker's cache and the store under a good name. Blocks before `first` are not
/// pushed whoever asks: they leave this worker's table while the prompt goes on, and another sequence's bytes may be in
/// them by the time they are sent.
fn landing(blocks: &[v1::BlockTarget], first: usize) -> Result<Landing, Error> {
    let present = blocks.iter().rposition(|block| block.present).map_or(0, |last| last + 1);
    if let Some(index) = blocks.iter().skip(first).position(|block| block.absent) {
        return Err(Error::Targets(format!(
            "block {} is absent, and the prompt's last token looks at it",
            first + index
        )));
    }
    if blocks[..present].iter().any(|block| !block.present && !block.absent) {
        return Err(Error::Targets("a present block after one that is not".into()));
    }
    let wanted = |(index, block): (usize, &v1::BlockTarget)| (!block.absent && index >= first).then_some(block.offset);
    let offsets = blocks.iter().enumerate().map(wanted).collect();
    Ok(Landing { offsets, present })
}

#[tonic::async_trait]
impl v1::prefill_server::Prefill for PrefillService {
    type PrefillStream = Beating<v1::PrefillEvent>;

    async fn prefill(&self, request: Request<v1::PrefillRequest>) -> Result<Response<Self::PrefillStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let every_ms = request.heartbeat_ms;
        let events = self.start(request, &metadata).await.map_err(|error| self.host.refuse(&error))?;
        Ok(self.host.pulse.answer(events, every_ms))
    }
}

#[cfg(test)]
mod tests {
    use kvasir_types::{GroupKind, KvDtype};

    use super::*;

    const LAYOUT: KvLayout =
        KvLayout { block_size: 4, layers: 2, kv_heads: 1, k_dim: 4, v_dim: 4, dtype: KvDtype::Bf16 };

    fn request(blocks: &[(u64, bool)], len: u64) -> v1::PrefillRequest {
        v1::PrefillRequest {
            destination: Some(v1::SegmentDescriptor { len, ..Default::default() }),
            blocks: blocks
                .iter()
                .map(|&(offset, present)| v1::BlockTarget { offset, present, absent: false })
                .collect(),
            ..Default::default()
        }
    }

    #[test]
    fn targets_that_do_not_fit_are_refused_by_what_is_wrong() {
        let block = LAYOUT.block_bytes() as u64;
        for (blocks, len, word) in [
            (vec![(0, false)], 10 * block, "needs 2"),
            (vec![(0, false), (9 * block + 1, false)], 10 * block, "outside"),
            (vec![(0, false), (u64::MAX, false)], 10 * block, "outside"),
            (vec![(0, false), (0, false)], 1, "outside"),
            (vec![(0, false), (block, true)], 10 * block, "present"),
        ] {
            let error = destination(&request(&blocks, len), 5, &LAYOUT, &KvGroups::full(2))
                .map(|_| ())
                .unwrap_err()
                .to_string();
            assert!(error.contains(word), "{error}");
        }
        let good = destination(&request(&[(0, true), (9 * block, false)], 10 * block), 5, &LAYOUT, &KvGroups::full(2))
            .unwrap();
        assert_eq!(good.groups, [Landing { offsets: vec![Some(0), Some(9 * block)], present: 1 }]);
    }

    #[test]
    fn a_block_that_is_needed_cannot_be_absent() {
        let block = LAYOUT.block_bytes() as u64;
        // Present behind it: without the check the first would count as read.
        let mut wire = request(&[(0, true), (block, true)], 10 * block);
        wire.blocks[0] = v1::BlockTarget { absent: true, ..Default::default() };
        let error = destination(&wire, 8, &LAYOUT, &KvGroups::full(2)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("block 0 is absent"), "{error}");
        let sliding = KvGroups::of_layers(&[GroupKind::Sliding { window: 4 }; 2]);
        assert!(destination(&wire, 8, &LAYOUT, &sliding).is_ok());
    }

    #[test]
    fn every_group_has_its_own_row_of_targets() {
        let block = LAYOUT.block_bytes() as u64;
        let mut wire = request(&[(0, true), (block, false), (0, false), (2 * block, false)], 10 * block);
        wire.blocks[2].absent = true;
        let kinds = [GroupKind::Full, GroupKind::Sliding { window: 1 }];
        let two = destination(&wire, 5, &LAYOUT, &KvGroups::of_layers(&kinds)).unwrap();
        let second = Landing { offsets: vec![None, Some(2 * block)], present: 0 };
        assert_eq!(two.groups, [Landing { offsets: vec![Some(0), Some(block)], present: 1 }, second]);
        let error = destination(&wire, 5, &LAYOUT, &KvGroups::full(2)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("needs 2"), "{error}");
        // Asked for all the same, what lies before the window is not sent.
        wire.blocks[2].absent = false;
        let greedy = destination(&wire, 5, &LAYOUT, &KvGroups::of_layers(&kinds)).unwrap();
        assert_eq!(greedy.groups, two.groups);
    }
}
