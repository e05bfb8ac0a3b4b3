//! Messages of the store's protocol into the node's words and back: every bound is checked here.

use std::{collections::HashMap, time::Instant};

use kvasir_proto::{convert, v1};
use kvasir_types::{BlockHash, GrantKey, MemberId, PROTOCOL_VERSION};

use crate::{
    error::Error,
    node::Node,
    store::{Ahead, BlockBytes, Checksum, Facts, Origin, SlotState, tag},
};

/// Most blocks in one call, as the protocol has it.
pub(crate) const MAX_HASHES: usize = 1024;
/// Most origins in a status.
const MAX_ORIGINS: usize = 100;

pub(crate) fn block_bytes(wire: u64) -> Result<BlockBytes, Error> {
    if wire == 0 { Err(kvasir_proto::Error::Missing("block_bytes").into()) } else { Ok(BlockBytes(wire)) }
}

pub(crate) fn hashes(wire: &[u8]) -> Result<Vec<BlockHash>, Error> {
    Ok(convert::block_hashes(wire, MAX_HASHES)?)
}

/// Blocks and their checksums.
pub(crate) fn named(names: &[u8], checksums: &[u8]) -> Result<HashMap<BlockHash, Checksum>, Error> {
    let (hashes, sums) = (hashes(names)?, convert::checksums(checksums, MAX_HASHES)?);
    if hashes.len() != sums.len() {
        return Err(Error::Count { field: "checksums", got: sums.len(), blocks: hashes.len() });
    }
    Ok(hashes.into_iter().zip(sums).collect())
}

pub(crate) fn origin(model: &[u8], tenant: &str) -> Result<Origin, kvasir_proto::Error> {
    let model = if model.is_empty() { [0; 16] } else { convert::fingerprint(model)?.0 };
    Ok(Origin { model, tenant: convert::tenant(tenant)?.to_owned() })
}

/// What is told of each block's place in its prompt: one for each hash, or none at all. Origins are left open.
pub(crate) fn facts(runs: &[v1::BlockRun], hashes: &[BlockHash]) -> Result<Vec<Facts>, Error> {
    let told: u64 = runs.iter().map(|run| u64::from(run.blocks)).sum();
    if told != hashes.len() as u64 && !runs.is_empty() {
        return Err(Error::Count { field: "runs", got: told as usize, blocks: hashes.len() });
    }
    let mut facts = Vec::with_capacity(if runs.is_empty() { 0 } else { hashes.len() });
    for run in runs {
        let mut parent = match &run.parent[..] {
            [] => 0,
            hash => tag(convert::block_hash(hash)?),
        };
        for n in 0..run.blocks {
            let position = u16::try_from(run.position.saturating_add(n)).unwrap_or(u16::MAX);
            facts.push(Facts { position, parent, group: run.group, ..Facts::default() });
            parent = tag(hashes[facts.len() - 1]);
        }
    }
    Ok(facts)
}

pub(crate) fn slot(slot: &SlotState) -> v1::Slot {
    let (state, offset) = match *slot {
        SlotState::Reserved { offset } => (v1::slot::State::Reserved, offset),
        SlotState::Present => (v1::slot::State::Present, 0),
        SlotState::Busy => (v1::slot::State::Busy, 0),
        SlotState::Full => (v1::slot::State::Full, 0),
    };
    v1::Slot { state: state.into(), offset }
}

pub(crate) fn ahead(ahead: &Ahead, key: GrantKey) -> v1::Ahead {
    v1::Ahead {
        reservation: ahead.reservation.0,
        reservation_ms: ahead.lasts.as_millis() as u64,
        grant: key.0,
        offset: ahead.offset,
        block_bytes: ahead.size.0,
    }
}

pub(crate) fn status(id: &MemberId, node: &Node, started: Instant) -> v1::StoreStatusResponse {
    let (usage, (totals, _)) = (node.usage(), node.totals());
    let mut origins = node.origins();
    origins.sort_unstable_by(|(_, a), (_, b)| b.cmp(a));
    origins.truncate(MAX_ORIGINS);
    let origin = |(origin, blocks): (Origin, u64)| v1::OriginBlocks {
        model: if origin.model == [0; 16] { Default::default() } else { convert::bytes16(&origin.model) },
        tenant: origin.tenant,
        blocks,
    };
    v1::StoreStatusResponse {
        member: id.to_string(),
        incarnation: node.engine().descriptor().incarnation.0,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol_version: PROTOCOL_VERSION,
        capacity_bytes: usage.capacity_bytes,
        used_bytes: usage.used_bytes,
        blocks: usage.blocks,
        pinned: usage.pinned,
        reserved: usage.reserved,
        lookups_total: totals.lookups,
        hit_blocks_total: totals.hit_blocks,
        missed_blocks_total: totals.missed_blocks,
        committed_blocks_total: totals.committed_blocks,
        evicted_blocks_total: totals.evicted_blocks,
        demoted_blocks_total: totals.demoted_blocks,
        promoted_blocks_total: totals.promoted_blocks,
        uptime_ms: started.elapsed().as_millis() as u64,
        memory_blocks: usage.memory_blocks,
        disk_blocks: usage.disk_blocks,
        disk_capacity_bytes: usage.disk_capacity_bytes,
        disk_used_bytes: usage.disk_used_bytes,
        kept: usage.kept,
        disk_state: node.disk_state().to_owned(),
        origins: origins.into_iter().map(origin).collect(),
        ..Default::default()
    }
}
