//! What the KV store said, as text. Pure: the same answers give the same text.

use std::collections::HashMap;

use kvasir_proto::v1;
use serde::Serialize;

use super::{Place, Silent, Told, Whereabouts};
use crate::{
    output::Output,
    probe::printable,
    render::{Table, bytes},
};

/// What all nodes hold.
#[derive(Debug, Serialize)]
pub(crate) struct Stats {
    pub(crate) nodes: Vec<NodeStats>,
    pub(crate) silent: Vec<Silent>,
    /// Whose blocks there are, the most first.
    pub(crate) origins: Vec<OriginStats>,
}

/// What one node holds.
#[derive(Debug, Serialize)]
pub(crate) struct NodeStats {
    pub(crate) node: String,
    pub(crate) memory_used_bytes: u64,
    pub(crate) memory_capacity_bytes: u64,
    pub(crate) memory_blocks: u64,
    pub(crate) disk_used_bytes: u64,
    pub(crate) disk_capacity_bytes: u64,
    pub(crate) disk_blocks: u64,
    pub(crate) disk_state: String,
    pub(crate) reading_blocks: u64,
    pub(crate) writing_blocks: u64,
    pub(crate) pinned_blocks: u64,
    pub(crate) lookups_total: u64,
    pub(crate) hit_blocks_total: u64,
    pub(crate) missed_blocks_total: u64,
    pub(crate) promoted_blocks_total: u64,
    pub(crate) demoted_blocks_total: u64,
    pub(crate) evicted_blocks_total: u64,
    pub(crate) committed_blocks_total: u64,
}

/// Blocks of a model and a tenant.
#[derive(Debug, Serialize)]
pub(crate) struct OriginStats {
    pub(crate) model: String,
    pub(crate) fingerprint: String,
    pub(crate) tenant: String,
    pub(crate) blocks: u64,
}

/// Sorts out the nodes' answers; `names` are those of models by fingerprint.
pub(crate) fn stats(told: Vec<Told<v1::StoreStatusResponse>>, names: &HashMap<Vec<u8>, String>) -> Stats {
    let mut stats = Stats { nodes: Vec::new(), silent: Vec::new(), origins: Vec::new() };
    for Told { node, answer } in told {
        let status = match answer {
            Ok(status) => status,
            Err(why) => {
                stats.silent.push(Silent { node, why });
                continue;
            }
        };
        for origin in &status.origins {
            let fingerprint: String = origin.model.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
            let tenant = printable(&origin.tenant);
            match stats.origins.iter_mut().find(|known| (&known.fingerprint, &known.tenant) == (&fingerprint, &tenant))
            {
                Some(known) => known.blocks += origin.blocks,
                None => stats.origins.push(OriginStats {
                    model: names.get(&origin.model[..]).map(|name| printable(name)).unwrap_or_default(),
                    fingerprint,
                    tenant,
                    blocks: origin.blocks,
                }),
            }
        }
        stats.nodes.push(NodeStats {
            node,
            memory_used_bytes: status.used_bytes,
            memory_capacity_bytes: status.capacity_bytes,
            memory_blocks: status.memory_blocks,
            disk_used_bytes: status.disk_used_bytes,
            disk_capacity_bytes: status.disk_capacity_bytes,
            disk_blocks: status.disk_blocks,
            disk_state: printable(&status.disk_state),
            reading_blocks: status.pinned,
            writing_blocks: status.reserved,
            pinned_blocks: status.kept,
            lookups_total: status.lookups_total,
            hit_blocks_total: status.hit_blocks_total,
            missed_blocks_total: status.missed_blocks_total,
            promoted_blocks_total: status.promoted_blocks_total,
            demoted_blocks_total: status.demoted_blocks_total,
            evicted_blocks_total: status.evicted_blocks_total,
            committed_blocks_total: status.committed_blocks_total,
        });
    }
    stats.origins.sort_by(|a, b| b.blocks.cmp(&a.blocks).then_with(|| a.tenant.cmp(&b.tenant)));
    stats
}

/// `kv stats`: a line for each node, then whose blocks there are.
pub(crate) fn stats_table(stats: &Stats) -> String {
    let mut nodes = Table::new(&[
        "NODE", "MEMORY", "OF", "BLOCKS", "DISK", "OF", "BLOCKS", "STATE", "PINNED", "LOOKUPS", "HIT", "WRITTEN",
        "PROMOTED", "DEMOTED", "EVICTED",
    ]);
    for node in &stats.nodes {
        let asked = node.hit_blocks_total + node.missed_blocks_total;
        let hit =
            (node.hit_blocks_total * 100).checked_div(asked).map_or_else(|| "-".to_owned(), |hit| format!("{hit} %"));
        let disk = node.disk_state != "none";
        let of_disk = |text: String| if disk { text } else { "-".to_owned() };
        nodes.row(vec![
            node.node.clone(),
            bytes(node.memory_used_bytes),
            bytes(node.memory_capacity_bytes),
            node.memory_blocks.to_string(),
            of_disk(bytes(node.disk_used_bytes)),
            of_disk(bytes(node.disk_capacity_bytes)),
            of_disk(node.disk_blocks.to_string()),
            of_disk(node.disk_state.clone()),
            node.pinned_blocks.to_string(),
            node.lookups_total.to_string(),
            hit,
            node.committed_blocks_total.to_string(),
            node.promoted_blocks_total.to_string(),
            node.demoted_blocks_total.to_string(),
            node.evicted_blocks_total.to_string(),
        ]);
    }
    let mut text = nodes.render();
    if !stats.origins.is_empty() {
        let mut origins = Table::new(&["MODEL", "FINGERPRINT", "TENANT", "BLOCKS"]);
        for origin in &stats.origins {
            origins.row(vec![
                or_dash(&origin.model),
                or_dash(&origin.fingerprint),
                or_dash(&origin.tenant),
                origin.blocks.to_string(),
            ]);
        }
        text.push('\n');
        text.push_str(&origins.render());
    }
    text + &silent(&stats.silent)
}

/// `kv lookup`: a line for each stretch of blocks.
pub(crate) fn whereabouts(found: &Whereabouts) -> String {
    let Whereabouts { model, tokens, blocks, block_tokens, run, stretches, .. } = found;
    let mut text = format!(
        "{tokens} tokens of {model}: {blocks} full blocks of {block_tokens}; the store has the first {run}, {} tokens\n",
        run * block_tokens
    );
    if !stretches.is_empty() {
        let mut table = Table::new(&["BLOCKS", "TOKENS", "WHERE"]);
        for stretch in stretches {
            let end = stretch.first + stretch.blocks;
            table.row(vec![
                format!("{}-{}", stretch.first, end - 1),
                format!("{}-{}", stretch.first * block_tokens, end * block_tokens - 1),
                stretch.places.iter().map(place).collect::<Vec<_>>().join(", "),
            ]);
        }
        text.push_str(&table.render());
    }
    text + &silent(&found.silent)
}

fn place(place: &Place) -> String {
    let tiers = match (place.memory, place.disk) {
        (true, true) => "memory and disk",
        (true, false) => "memory",
        (false, _) => "disk",
    };
    format!("{} ({tiers})", place.node)
}

/// `kv pin`, `kv unpin`: how many blocks on which node.
pub(crate) fn by_node(nodes: &[(String, u64)], blocks: usize, output: Output) -> String {
    let by_name: HashMap<_, _> = nodes.iter().map(|(node, blocks)| (node, blocks)).collect();
    output.show(&serde_json::json!({ "blocks": blocks, "nodes": by_name }), || {
        let lines: String = nodes.iter().map(|(node, count)| format!("{node}: {count} blocks\n")).collect();
        format!("{blocks} blocks in the prompt\n{lines}")
    })
}

/// `kv evict`.
pub(crate) fn evicted(evicted: u64, in_use: u64, output: Output) -> String {
    output.show(&serde_json::json!({ "evicted": evicted, "in_use": in_use }), || match in_use {
        0 => format!("{evicted} blocks given up\n"),
        _ => format!("{evicted} blocks given up, {in_use} in use and left as they are\n"),
    })
}

/// `kv drain`. What goes with the node is said before it goes.
pub(crate) fn leaving(node: &str, leaving: &str, status: &v1::StoreStatusResponse, output: Output) -> String {
    let (given, kept) = (status.handed_over_blocks_total, status.not_handed_over_blocks);
    let disk_only = status.blocks.saturating_sub(status.memory_blocks);
    let answer = serde_json::json!({
        "node": node,
        "leaving": leaving,
        "handed_over_blocks": given,
        "not_handed_over_blocks": kept,
        "disk_only_blocks": disk_only,
    });
    output.show(&answer, || {
        let then = if leaving == "drained" { ", safe to delete" } else { "" };
        let mut text = format!("{node}: {leaving}{then}\n  {given} blocks handed over to other nodes\n");
        if kept > 0 {
            text.push_str(&format!("  {kept} blocks in its memory were not taken by others and go with it\n"));
        }
        if disk_only > 0 {
            let text_of_disk = "on its disk only: found again if it is started with that disk";
            text.push_str(&format!("  {disk_only} blocks {text_of_disk}\n"));
        }
        text
    })
}

fn silent(silent: &[Silent]) -> String {
    silent.iter().map(|silent| format!("{}: not reached, {}\n", silent.node, silent.why)).collect()
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}
