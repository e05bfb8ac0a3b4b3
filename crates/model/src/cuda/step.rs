//! What the host says about a step: tokens, positions, where their keys and values go, who attends to what; packed into one
//! piece of memory that goes to the device in one copy.
//!
//! Rows (tokens) are put in an order of their own: first those of sequences with few tokens, whose attention is computed
//! part by part side by side, then the rest. The caller's order comes back with the logits.

use std::ops::Range;

use kvasir_types::{GroupKind, KvGroups};

use super::{
    abi::{self, Run, Unit},
    scratch::PART_SUMS,
};
use crate::SeqInput;

/// Sequences with so many tokens in a step or fewer are computed part by part.
const FEW_TOKENS: usize = 16;

/// How attention is cut into units.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    pub(super) heads: usize,
    /// Query heads that share a KV head.
    pub(super) group: usize,
    pub(super) v_dim: usize,
    /// Rows (tokens × query heads of a group) of a unit that takes all parts.
    pub(super) prompt_rows: usize,
}

/// Arrays behind one another, each at a multiple of 16 bytes.
#[derive(Default)]
pub(super) struct Packed {
    bytes: Vec<u8>,
}

impl Packed {
    fn put<const N: usize>(&mut self, values: impl Iterator<Item = [u8; N]>) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = self.bytes.len() as u64;
        values.for_each(|value| self.bytes.extend_from_slice(&value));
        at
    }

    fn words(&mut self, values: impl Iterator<Item = u32>) -> u64 {
        self.put(values.map(u32::to_le_bytes))
    }

    fn units(&mut self, units: &[Unit]) -> u64 {
        self.words(units.iter().flat_map(|u| [u.row, u.tokens, u.position, u.table, u.head, u.heads]))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// A step. Addresses are offsets in what is packed.
#[derive(Default)]
pub(super) struct Step {
    pub(super) packed: Packed,
    /// All tokens.
    pub(super) rows: usize,
    pub(super) tokens: u64,
    pub(super) positions: u64,
    /// By group of layers.
    pub(super) groups: Vec<OfGroup>,
    pub(super) tables: u64,
    /// The rows whose logits are wanted; of the last layer only these are computed to the end.
    pub(super) wanted: Wanted,
    /// Bytes that partial sums of attention take at most, and the largest scores.
    pub(super) part_sums: usize,
    pub(super) part_max: usize,
}

/// What differs from group to group of layers: their tables.
#[derive(Default)]
pub(super) struct OfGroup {
    /// Where each row's keys and values go.
    pub(super) slots: u64,
    /// The same as runs of slots.
    pub(super) runs: Vec<Run>,
    pub(super) runs_at: u64,
    /// Attention of all rows.
    pub(super) attend: Attending,
}

/// Units of attention.
#[derive(Default)]
pub(super) struct Attending {
    /// Launches in which parts are computed side by side, and then merged.
    pub(super) split: Vec<Split>,
    /// Units that take all parts themselves.
    pub(super) whole: u64,
    pub(super) wholes: usize,
}

/// Some of the units whose parts are computed side by side: as many as there is room for.
pub(super) struct Split {
    pub(super) units: u64,
    pub(super) count: usize,
    /// Parts of the one that has most.
    pub(super) parts: usize,
    /// Their rows: neighbours.
    pub(super) first_row: usize,
    pub(super) rows: usize,
    /// A list of them.
    pub(super) rows_at: u64,
}

#[derive(Default)]
pub(super) struct Wanted {
    pub(super) count: usize,
    /// Which of all rows each is.
    pub(super) row_of: u64,
    pub(super) positions: u64,
    /// Where among the caller's rows of logits each goes.
    pub(super) order: Vec<usize>,
    /// Attention of the last layer.
    pub(super) attend: Attending,
    /// Whether they are all rows, in order.
    pub(super) all: bool,
}

/// Some neighbouring tokens of one input, as rows.
#[derive(Clone, Copy)]
struct Part {
    input: usize,
    first_row: usize,
    start: usize,
    count: usize,
}

impl Step {
    /// A step of a batch that has been checked. `last` is the group of the last layer.
    pub(super) fn new(batch: &[SeqInput<'_>], groups: &KvGroups, block_size: usize, cut: Cut, last: usize) -> Self {
        let mut step = Self::default();
        let mut packed = Packed::default();
        let mut order: Vec<usize> = (0..batch.len()).collect();
        order.sort_by_key(|&input| batch[input].tokens.len() > FEW_TOKENS);

        let (mut parts, mut wanted, mut row_of) = (Vec::new(), Vec::new(), Vec::new());
        // Where the caller's rows of logits of each input begin.
        let begins: Vec<usize> = batch
            .iter()
            .scan(0, |sum, seq| {
                let begin = *sum;
                *sum += seq.rows;
                Some(begin)
            })
            .collect();
        for &input in &order {
            let SeqInput { tokens, start, rows, .. } = batch[input];
            parts.push(Part { input, first_row: step.rows, start, count: tokens.len() });
            if rows > 0 {
                let skip = tokens.len() - rows;
                wanted.push(Part { input, first_row: row_of.len(), start: start + skip, count: rows });
                row_of.extend((step.rows + skip..step.rows + tokens.len()).map(|row| row as u32));
                step.wanted.order.extend(begins[input]..begins[input] + rows);
            }
            step.rows += tokens.len();
        }
        let positions = |parts: &[Part]| -> Vec<u32> {
            parts.iter().flat_map(|part| part.start..part.start + part.count).map(|position| position as u32).collect()
        };
        step.tokens = packed.words(order.iter().flat_map(|&input| batch[input].tokens).map(|token| token.0));
        step.positions = packed.words(positions(&parts).into_iter());
        step.wanted.count = row_of.len();
        step.wanted.all = row_of.len() == step.rows;
        step.wanted.positions = packed.words(positions(&wanted).into_iter());
        step.wanted.row_of = packed.words(row_of.into_iter());

        // All tables behind one another; where each begins.
        let mut table_at = vec![vec![0; batch.len()]; groups.len()];
        let mut all = Vec::new();
        for (group, begins) in table_at.iter_mut().enumerate() {
            for (input, begin) in begins.iter_mut().enumerate() {
                *begin = all.len();
                let needed = (batch[input].start + batch[input].tokens.len()).div_ceil(block_size);
                let table = &batch[input].tables[group];
                all.extend(table[..needed.min(table.len())].iter().map(|block| block.0));
            }
        }
        step.tables = packed.words(all.iter().copied());

        for (group, begins) in table_at.iter().enumerate() {
            let window = match groups[group].kind {
                GroupKind::Sliding { window } => Some(window as usize),
                GroupKind::Full | GroupKind::Recurrent => None,
            };
            let cutter = Cutter { cut, window, table_at: begins };
            let (mut slots, mut runs) = (Vec::new(), Vec::new());
            for part in &parts {
                let table = &all[begins[part.input]..];
                let mut at = part.start;
                let end = part.start + part.count;
                while at < end {
                    let (block, slot) = (table[at / block_size], at % block_size);
                    let count = (block_size - slot).min(end - at);
                    runs.push(Run { block, slot: slot as u32, count: count as u32, pad: 0 });
                    slots.extend((slot..slot + count).map(|slot| u64::from(block) * block_size as u64 + slot as u64));
                    at += count;
                }
            }
            let slots = packed.put(slots.into_iter().map(u64::to_le_bytes));
            let runs_at = packed.words(runs.iter().flat_map(|run| [run.block, run.slot, run.count, 0]));
            let (attend, sums) = cutter.attending(&parts, &mut packed);
            step.groups.push(OfGroup { slots, runs, runs_at, attend });
            step.count(sums, cut);
            if group == last {
                let (attend, sums) = cutter.attending(&wanted, &mut packed);
                step.wanted.attend = attend;
                step.count(sums, cut);
            }
        }
        step.packed = packed;
        step
    }

    fn count(&mut self, sums: usize, cut: Cut) {
        self.part_sums = self.part_sums.max(4 * sums * cut.v_dim);
        self.part_max = self.part_max.max(8 * sums);
    }
}

/// Makes units for one group's tables.
struct Cutter<'a> {
    cut: Cut,
    window: Option<usize>,
    table_at: &'a [usize],
}

impl Cutter<'_> {
    /// Numbers of the parts that tokens at these positions see.
    fn parts(&self, positions: Range<usize>) -> Range<usize> {
        let first = self.window.map_or(0, |window| (positions.start + 1).saturating_sub(window));
        first / abi::PART..positions.end.div_ceil(abi::PART)
    }

    /// The units of a run's tokens, each at most `rows` rows.
    fn units(&self, part: &Part, rows: usize, units: &mut Vec<Unit>) {
        let group = self.cut.group;
        let (tokens, heads) = ((rows / group).max(1), group.min(rows));
        for token in (0..part.count).step_by(tokens) {
            for head in (0..group).step_by(heads) {
                units.push(Unit {
                    row: (part.first_row + token) as u32,
                    tokens: tokens.min(part.count - token) as u32,
                    position: (part.start + token) as u32,
                    table: self.table_at[part.input] as u32,
                    head: head as u32,
                    heads: heads.min(group - head) as u32,
                });
            }
        }
    }

    /// The units of these runs; and how many partial sums a launch has at most.
    fn attending(&self, parts: &[Part], packed: &mut Packed) -> (Attending, usize) {
        let mut attending = Attending::default();
        let (few, many): (Vec<Part>, Vec<Part>) = parts.iter().partition(|part| part.count <= FEW_TOKENS);
        let room = PART_SUMS / (4 * self.cut.v_dim * self.cut.heads);
        let mut most = 0;
        let mut left = &few[..];
        while let Some(first) = left.first() {
            let (mut rows, mut widest, mut taken) = (0, 0, 0);
            for part in left {
                let seen = self.parts(part.start..part.start + part.count).len().max(widest);
                if taken > 0 && (rows + part.count) * seen > room {
                    break;
                }
                (rows, widest, taken) = (rows + part.count, seen, taken + 1);
            }
            let mut units = Vec::new();
            left[..taken].iter().for_each(|part| self.units(part, abi::DECODE_ROWS, &mut units));
            attending.split.push(Split {
                units: packed.units(&units),
                count: units.len(),
                parts: widest,
                first_row: first.first_row,
                rows,
                rows_at: packed.words((first.first_row..first.first_row + rows).map(|row| row as u32)),
            });
            most = most.max(rows * widest * self.cut.heads);
            left = &left[taken..];
        }
        let mut units = Vec::new();
        // The longest come first: at the end processors wait for one another as little as may be.
        many.iter().for_each(|part| self.units(part, self.cut.prompt_rows, &mut units));
        units.sort_by_key(|unit| std::cmp::Reverse(unit.position));
        attending.wholes = units.len();
        attending.whole = packed.units(&units);
        (attending, most)
    }
}

#[cfg(test)]
mod tests {
    use kvasir_types::{BlockId, TokenId};

    use super::*;

    const CUT: Cut = Cut { heads: 8, group: 4, v_dim: 64, prompt_rows: 64 };

    fn words(step: &Step, at: u64, count: usize) -> Vec<u32> {
        let bytes = &step.packed.bytes()[at as usize..][..4 * count];
        bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
    }

    #[test]
    fn short_runs_come_first_and_logits_go_back_to_their_places() {
        let tables = [vec![BlockId(7), BlockId(3)]];
        let tokens: Vec<TokenId> = (0..30).map(TokenId).collect();
        let long = SeqInput { tokens: &tokens[..20], start: 0, tables: &tables, rows: 2 };
        let short = SeqInput { tokens: &tokens[20..21], start: 17, tables: &tables, rows: 1 };
        let groups = KvGroups::of_layers(&[GroupKind::Full]);
        let step = Step::new(&[long, short], &groups, 16, CUT, 0);
        assert_eq!((step.rows, step.wanted.count, step.wanted.all), (21, 3, false));
        assert_eq!(words(&step, step.tokens, 3), [20, 0, 1]);
        assert_eq!(words(&step, step.positions, 3), [17, 0, 1]);
        assert_eq!(words(&step, step.wanted.row_of, 3), [0, 19, 20]);
        assert_eq!(step.wanted.order, [2, 0, 1]);
        // The short one's slot, then the long one's two blocks.
        let runs: Vec<_> = step.groups[0].runs.iter().map(|run| (run.block, run.slot, run.count)).collect();
        assert_eq!(runs, [(3, 1, 1), (7, 0, 16), (3, 0, 4)]);
        let attend = &step.groups[0].attend;
        assert_eq!((attend.split.len(), attend.wholes), (1, 2));
        assert_eq!(words(&step, attend.split[0].units, 6), [0, 1, 17, 2, 0, 4]);
        // Units of 64 rows are 16 tokens of 4 heads; the later one first.
        assert_eq!(words(&step, attend.whole, 12), [17, 4, 16, 0, 0, 4, 1, 16, 0, 0, 0, 4]);
    }

    #[test]
    fn parts_are_counted_from_the_first_position_that_is_seen() {
        let cutter = |window| Cutter { cut: CUT, window, table_at: &[0] };
        assert_eq!(cutter(None).parts(1000..1001), 0..4);
        assert_eq!(cutter(Some(512)).parts(1024..1025), 2..5);
        assert_eq!(cutter(Some(1)).parts(511..512), 1..2);
    }

    #[test]
    fn a_group_wider_than_a_unit_is_cut_between_heads() {
        let cut = Cut { heads: 40, group: 40, ..CUT };
        let cutter = Cutter { cut, window: None, table_at: &[5] };
        let mut units = Vec::new();
        cutter.units(&Part { input: 0, first_row: 3, start: 9, count: 2 }, 16, &mut units);
        let heads: Vec<_> = units.iter().map(|unit| (unit.row, unit.head, unit.heads)).collect();
        assert_eq!(heads, [(3, 0, 16), (3, 16, 16), (3, 32, 8), (4, 0, 16), (4, 16, 16), (4, 32, 8)]);
    }

    #[test]
    fn what_has_no_room_at_once_is_computed_in_turns() {
        let cut = Cut { heads: 64, group: 4, v_dim: 512, prompt_rows: 64 };
        let cutter = Cutter { cut, window: None, table_at: &[0; 8] };
        // A row has 512 parts of 64 × 512 sums: 64 MiB.
        let parts: Vec<_> = (0..8).map(|i| Part { input: i, first_row: i, start: (128 << 10) - 1, count: 1 }).collect();
        let (attending, most) = cutter.attending(&parts, &mut Packed::default());
        assert_eq!(attending.split.iter().map(|split| split.rows).collect::<Vec<_>>(), [2, 2, 2, 2]);
        assert!(most * 4 * 512 <= PART_SUMS);
    }
}
