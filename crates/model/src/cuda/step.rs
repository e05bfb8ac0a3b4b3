//! What the host says about a step: tokens, positions, where their keys and values go, who attends to what; packed into one
//! piece of memory that goes to the device in one copy.
//!
//! Rows (tokens) are put in an order of their own: first those of sequences with few tokens, whose attention is computed
//! part by part side by side, then the rest. The caller's order comes back with the logits.

use std::{iter, ops::Range};

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

/// What about a step decides which launches it takes, with which grids and where its inputs lie: steps of one shape are one
/// graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    rows: usize,
    /// Of each group of layers: runs of slots, units of attention, parts.
    groups: Vec<[usize; 3]>,
}

#[cfg(test)]
impl Shape {
    /// Some shape of that many rows.
    pub(super) fn of_rows(rows: usize) -> Self {
        Self { rows, groups: vec![[rows, rows, 1]] }
    }
}

/// What steps are padded to, so that few shapes serve many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Padding {
    /// No step is.
    None,
    /// Everything but rows: a row that nobody asked for would choose experts whose weights nobody needs.
    Lists,
    /// Rows, too.
    Rows,
}

/// Steps with more rows are not padded.
const MAX_PADDED: usize = 512;

/// The rows that a step of so many is padded to.
pub(super) fn padded_rows(rows: usize) -> usize {
    match rows {
        0..=8 => rows.next_power_of_two(),
        9..=128 => rows.next_multiple_of(8),
        129..=MAX_PADDED => rows.next_multiple_of(32),
        _ => rows,
    }
}

/// The same for parts: at most a quarter more.
fn padded_parts(parts: usize) -> usize {
    let step = (parts.max(1).ilog2()).saturating_sub(2);
    parts.next_multiple_of(1 << step)
}

/// A step. Addresses are offsets in what is packed.
#[derive(Default)]
pub(super) struct Step {
    pub(super) packed: Packed,
    /// All tokens, and rows that only fill a shape.
    pub(super) rows: usize,
    /// Whose launches it takes, if its steps are padded to one: all logits are wanted then, and nobody waits for a layer.
    pub(super) shape: Option<Shape>,
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
    /// With those that only fill a shape.
    pub(super) count: usize,
    /// Which of all rows each is.
    pub(super) row_of: u64,
    pub(super) positions: u64,
    /// Where among the caller's rows of logits each goes.
    pub(super) order: Vec<usize>,
    /// Attention of the last layer, unless they are all rows.
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

/// How a model's steps are made.
#[derive(Clone, Copy)]
pub(super) struct Making<'a> {
    pub(super) groups: &'a KvGroups,
    pub(super) block_size: usize,
    pub(super) cut: Cut,
    /// The group of the last layer.
    pub(super) last: usize,
    pub(super) padding: Padding,
}

/// One group's lists, before they are packed.
struct Lists {
    slots: Vec<u64>,
    runs: Vec<Run>,
    units: Units,
}

impl Step {
    /// A step of a batch that has been checked.
    pub(super) fn new(batch: &[SeqInput<'_>], making: Making<'_>) -> Self {
        let Making { groups, block_size, cut, last, padding } = making;
        let mut step = Self::default();
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
        step.wanted.all = row_of.len() == step.rows;

        // All tables behind one another; where each begins.
        let mut table_at = vec![vec![0; batch.len()]; groups.len()];
        let mut tables = Vec::new();
        for (group, begins) in table_at.iter_mut().enumerate() {
            for (input, begin) in begins.iter_mut().enumerate() {
                *begin = tables.len();
                let needed = (batch[input].start + batch[input].tokens.len()).div_ceil(block_size);
                let table = &batch[input].tables[group];
                tables.extend(table[..needed.min(table.len())].iter().map(|block| block.0));
            }
        }
        let cutter = |group: usize| Cutter {
            cut,
            window: match groups[group].kind {
                GroupKind::Sliding { window } => Some(window as usize),
                GroupKind::Full | GroupKind::Recurrent => None,
            },
            table_at: &table_at[group],
        };
        let mut lists: Vec<Lists> = table_at
            .iter()
            .enumerate()
            .map(|(group, begins)| {
                let (slots, runs) = slots(&parts, begins, &tables, block_size);
                Lists { slots, runs, units: cutter(group).units_of(&parts) }
            })
            .collect();
        if padding != Padding::None && step.wanted.all && step.rows <= MAX_PADDED {
            step.pad(&mut lists, cut, padding == Padding::Rows);
        }

        let mut packed = Packed::default();
        let fill = step.rows - parts.iter().map(|part| part.count).sum::<usize>();
        let positions = |parts: &[Part], fill: usize| -> Vec<u32> {
            let positions = parts.iter().flat_map(|part| part.start..part.start + part.count);
            positions.map(|position| position as u32).chain(iter::repeat_n(0, fill)).collect()
        };
        let tokens = order.iter().flat_map(|&input| batch[input].tokens).map(|token| token.0);
        step.tokens = packed.words(tokens.chain(iter::repeat_n(0, fill)));
        step.positions = packed.words(positions(&parts, fill).into_iter());
        if step.wanted.all {
            step.wanted.count = step.rows;
        } else {
            step.wanted.count = row_of.len();
            step.wanted.positions = packed.words(positions(&wanted, 0).into_iter());
            step.wanted.row_of = packed.words(row_of.into_iter());
            let units = cutter(last).units_of(&wanted);
            step.count(units.sums, cut);
            step.wanted.attend = units.packed(&mut packed);
        }
        for Lists { slots, runs, units } in lists {
            let slots = packed.put(slots.into_iter().map(u64::to_le_bytes));
            let runs_at = packed.words(runs.iter().flat_map(|run| [run.block, run.slot, run.count, 0]));
            step.count(units.sums, cut);
            step.groups.push(OfGroup { slots, runs, runs_at, attend: units.packed(&mut packed) });
        }
        // Last, because no shape says how long they are: where the others lie does not depend on it.
        step.tables = packed.words(tables.into_iter());
        step.packed = packed;
        step
    }

    /// Makes it a step of some shape by filling its lists with what is nothing to do, if it is one of a kind that comes often:
    /// few tokens a sequence, as many sequences as can be attended to at once.
    fn pad(&mut self, lists: &mut [Lists], cut: Cut, rows: bool) {
        let all = if rows { padded_rows(self.rows) } else { self.rows };
        let at_once = |lists: &Lists| {
            let Units { whole, split, .. } = &lists.units;
            whole.is_empty() && matches!(&split[..], [split] if fits(all * padded_parts(split.parts), cut))
        };
        if !lists.iter().all(at_once) {
            return;
        }
        let filled = |count: usize| match count.is_multiple_of(self.rows) {
            true => count / self.rows * all, // as many for every row
            false => padded_rows(count),
        };
        let mut groups = Vec::new();
        for Lists { slots, runs, units } in lists {
            let split = &mut units.split[0];
            slots.resize(all, abi::NO_SLOT);
            runs.resize(filled(runs.len()), Run::default());
            split.units.resize(filled(split.units.len()), Unit::default());
            split.rows.resize(all, abi::NONE);
            split.parts = padded_parts(split.parts);
            units.sums = all * split.parts * cut.heads;
            groups.push([runs.len(), split.units.len(), split.parts]);
        }
        self.rows = all;
        self.shape = Some(Shape { rows: all, groups });
    }

    fn count(&mut self, sums: usize, cut: Cut) {
        self.part_sums = self.part_sums.max(4 * sums * cut.v_dim);
        self.part_max = self.part_max.max(8 * sums);
    }
}

/// Whether there is room for so many rows' partial sums.
fn fits(rows: usize, cut: Cut) -> bool {
    rows * 4 * cut.v_dim * cut.heads <= PART_SUMS
}

/// Where the keys and values of rows go, and the same as runs of slots.
fn slots(parts: &[Part], begins: &[usize], tables: &[u32], block_size: usize) -> (Vec<u64>, Vec<Run>) {
    let (mut slots, mut runs) = (Vec::new(), Vec::new());
    for part in parts {
        let table = &tables[begins[part.input]..];
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
    (slots, runs)
}

/// Units before they are packed.
#[derive(Default)]
struct Units {
    split: Vec<SplitUnits>,
    whole: Vec<Unit>,
    /// Partial sums that a launch has at most.
    sums: usize,
}

struct SplitUnits {
    units: Vec<Unit>,
    parts: usize,
    /// Neighbours.
    rows: Vec<u32>,
}

impl Units {
    fn packed(self, packed: &mut Packed) -> Attending {
        let split = self.split.into_iter().map(|SplitUnits { units, parts, rows }| Split {
            units: packed.units(&units),
            count: units.len(),
            parts,
            first_row: rows.first().map_or(0, |&row| row as usize),
            rows: rows.len(),
            rows_at: packed.words(rows.into_iter()),
        });
        Attending { split: split.collect(), wholes: self.whole.len(), whole: packed.units(&self.whole) }
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

    /// The units of these runs.
    fn units_of(&self, parts: &[Part]) -> Units {
        let mut made = Units::default();
        let (few, many): (Vec<Part>, Vec<Part>) = parts.iter().partition(|part| part.count <= FEW_TOKENS);
        let mut left = &few[..];
        while let Some(first) = left.first() {
            let (mut rows, mut widest, mut taken) = (0, 0, 0);
            for part in left {
                let seen = self.parts(part.start..part.start + part.count).len().max(widest);
                if taken > 0 && !fits((rows + part.count) * seen, self.cut) {
                    break;
                }
                (rows, widest, taken) = (rows + part.count, seen, taken + 1);
            }
            let mut units = Vec::new();
            left[..taken].iter().for_each(|part| self.units(part, abi::DECODE_ROWS, &mut units));
            let list = (first.first_row..first.first_row + rows).map(|row| row as u32).collect();
            made.split.push(SplitUnits { units, parts: widest, rows: list });
            made.sums = made.sums.max(rows * widest * self.cut.heads);
            left = &left[taken..];
        }
        // The longest come first: at the end processors wait for one another as little as may be.
        many.iter().for_each(|part| self.units(part, self.cut.prompt_rows, &mut made.whole));
        made.whole.sort_by_key(|unit| std::cmp::Reverse(unit.position));
        made
    }
}

#[cfg(test)]
mod tests {
    use kvasir_types::{BlockId, TokenId};

    use super::*;

    const CUT: Cut = Cut { heads: 8, group: 4, v_dim: 64, prompt_rows: 64 };

    fn making(groups: &KvGroups, padding: Padding) -> Making<'_> {
        Making { groups, block_size: 16, cut: CUT, last: 0, padding }
    }

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
        let step = Step::new(&[long, short], making(&groups, Padding::Rows));
        assert_eq!(step.shape, None);
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
        let units = cutter.units_of(&parts);
        assert_eq!(units.split.iter().map(|split| split.rows.len()).collect::<Vec<_>>(), [2, 2, 2, 2]);
        assert!(units.sums * 4 * 512 <= PART_SUMS);
    }

    /// Steps of one shape differ in what is packed, not in where it lies.
    #[test]
    fn steps_that_decode_are_padded_to_a_shape() {
        let groups = KvGroups::of_layers(&[GroupKind::Full]);
        let tables = [(0..200).map(BlockId).collect::<Vec<_>>()];
        let token = [TokenId(9)];
        let batch = |starts: &[usize]| -> Vec<SeqInput<'_>> {
            starts.iter().map(|&start| SeqInput { tokens: &token, start, tables: &tables, rows: 1 }).collect()
        };
        let of = |starts: &[usize], padding| Step::new(&batch(starts), making(&groups, padding));
        let (five, seven) = (of(&[3, 900, 4, 5, 6], Padding::Rows), of(&[3, 800, 4, 5, 6, 7, 2], Padding::Rows));
        assert_eq!(five.shape, Some(Shape { rows: 8, groups: vec![[8, 8, 4]] }));
        assert_eq!(five.shape, seven.shape);
        let places = |step: &Step| {
            let OfGroup { slots, runs_at, attend, .. } = &step.groups[0];
            let Split { units, rows_at, count, rows, parts, .. } = attend.split[0];
            (step.tokens, step.positions, *slots, *runs_at, units, rows_at, count, rows, parts, step.tables)
        };
        assert_eq!(places(&five), places(&seven));
        assert_eq!((five.rows, five.wanted.count, five.wanted.order.len()), (8, 8, 5));
        // What fills it goes nowhere, has nothing to attend to, and nothing to be mirrored.
        assert_eq!(words(&five, five.positions, 8), [3, 900, 4, 5, 6, 0, 0, 0]);
        assert_eq!(words(&five, five.groups[0].slots + 8 * 5, 6), [u32::MAX; 6]);
        assert_eq!(words(&five, five.groups[0].attend.split[0].rows_at, 8)[4..], [4, u32::MAX, u32::MAX, u32::MAX]);
        let tokens: Vec<_> = words(&five, five.groups[0].attend.split[0].units, 48).chunks(6).map(|u| u[1]).collect();
        assert_eq!(tokens, [1, 1, 1, 1, 1, 0, 0, 0]);
        assert_eq!(five.groups[0].runs[5..], [Run::default(); 3]);
        // Rows that choose experts are left as they are; lists that do not cost any are not.
        assert_eq!(of(&[3, 900, 4, 5, 1200], Padding::Lists).shape, Some(Shape { rows: 5, groups: vec![[5, 5, 5]] }));
        assert_eq!(of(&[3], Padding::None).shape, None);
        // A prompt, and a step of which not all logits are wanted, have none.
        let prompt = SeqInput { tokens: &[TokenId(1); 17], start: 0, tables: &tables, rows: 17 };
        assert_eq!(Step::new(&[prompt], making(&groups, Padding::Rows)).shape, None);
        let silent = SeqInput { rows: 0, ..batch(&[3])[0] };
        assert_eq!(Step::new(&[silent], making(&groups, Padding::Rows)).shape, None);
    }

    #[test]
    fn shapes_are_not_many_and_not_much_larger() {
        for n in 1..=MAX_PADDED {
            assert!(padded_rows(n) >= n && padded_rows(n) < n + n.clamp(8, 128) / 4 + 8);
            assert!(padded_parts(n) >= n && padded_parts(n) <= n + n / 4);
            assert_eq!(padded_rows(padded_rows(n)), padded_rows(n));
            assert_eq!(padded_parts(padded_parts(n)), padded_parts(n));
        }
        let shapes: std::collections::HashSet<_> = (1..=MAX_PADDED).map(padded_rows).collect();
        assert_eq!(shapes.len(), 4 + 15 + 12);
    }
}
