//! The lists of blocks by cell, and which filled cell is the poorest.

use super::{
    Block, NONE,
    class::{AGES, CLASSES},
};

pub(super) const CELLS: usize = CLASSES * AGES;
/// Not in any list.
pub(super) const OUT: u16 = u16::MAX;
/// The list of those that were due but that others hang on.
pub(super) const PASSED: u16 = CELLS as u16;

#[derive(Clone, Copy, Debug)]
struct List {
    first: u32,
    last: u32,
}

#[derive(Debug)]
pub(super) struct Cells {
    lists: Vec<List>,
    /// Cells from the poorest on, and at which place each is there.
    order: Vec<u16>,
    place: Vec<u16>,
    /// A bit for each place in the order whose cell has blocks.
    filled: Vec<u64>,
}

impl Cells {
    pub(super) fn new() -> Self {
        // Before anything is known the oldest go first, whatever they are.
        let mut order: Vec<u16> = (0..CELLS as u16).collect();
        order.sort_by_key(|&cell| std::cmp::Reverse(cell as usize % AGES));
        let mut cells = Self {
            lists: vec![List { first: NONE, last: NONE }; CELLS + 1],
            order,
            place: vec![0; CELLS],
            filled: vec![0; CELLS.div_ceil(64)],
        };
        cells.index();
        cells
    }

    /// Orders the cells by what their blocks are worth, equal ones by age, and equal ones of those by number.
    pub(super) fn rank(&mut self, density: &[f32]) {
        self.order.sort_unstable_by(|&a, &b| {
            let key = |cell: u16| (density[cell as usize], std::cmp::Reverse(cell as usize % AGES), cell);
            let ((a, a_age, a_cell), (b, b_age, b_cell)) = (key(a), key(b));
            a.total_cmp(&b).then(a_age.cmp(&b_age)).then(a_cell.cmp(&b_cell))
        });
        self.index();
    }

    fn index(&mut self) {
        self.filled.fill(0);
        for (place, &cell) in self.order.iter().enumerate() {
            self.place[cell as usize] = place as u16;
            if self.lists[cell as usize].first != NONE {
                self.filled[place / 64] |= 1 << (place % 64);
            }
        }
    }

    /// The oldest block of the poorest cell that has any.
    pub(super) fn poorest(&self) -> Option<u32> {
        let (word, bits) = self.filled.iter().enumerate().find(|(_, bits)| **bits != 0)?;
        self.first(self.order[word * 64 + bits.trailing_zeros() as usize])
    }

    pub(super) fn first(&self, list: u16) -> Option<u32> {
        Some(self.lists[list as usize].first).filter(|&first| first != NONE)
    }

    /// Calls `visit` for every cell that has blocks, lower ages of a class before higher ones.
    pub(super) fn each_filled(&mut self, mut visit: impl FnMut(&mut Self, u16)) {
        let mut filled = Vec::new();
        for (word, &bits) in self.filled.iter().enumerate() {
            let mut bits = bits;
            while bits != 0 {
                filled.push(self.order[word * 64 + bits.trailing_zeros() as usize]);
                bits &= bits - 1;
            }
        }
        filled.sort_unstable();
        filled.into_iter().for_each(|cell| visit(self, cell));
    }

    pub(super) fn push(&mut self, blocks: &mut [Block], id: u32, list: u16) {
        let before = std::mem::replace(&mut self.lists[list as usize].last, id);
        match before {
            NONE => self.lists[list as usize].first = id,
            before => blocks[before as usize].after = id,
        }
        let block = &mut blocks[id as usize];
        (block.before, block.after, block.list) = (before, NONE, list);
        self.mark(list);
    }

    pub(super) fn push_front(&mut self, blocks: &mut [Block], id: u32, list: u16) {
        let after = std::mem::replace(&mut self.lists[list as usize].first, id);
        match after {
            NONE => self.lists[list as usize].last = id,
            after => blocks[after as usize].before = id,
        }
        let block = &mut blocks[id as usize];
        (block.before, block.after, block.list) = (NONE, after, list);
        self.mark(list);
    }

    /// Whether the block was in a list.
    pub(super) fn unlink(&mut self, blocks: &mut [Block], id: u32) -> bool {
        let block = &mut blocks[id as usize];
        let (before, after, list) = (block.before, block.after, std::mem::replace(&mut block.list, OUT));
        if list == OUT {
            return false;
        }
        match before {
            NONE => self.lists[list as usize].first = after,
            before => blocks[before as usize].after = after,
        }
        match after {
            NONE => self.lists[list as usize].last = before,
            after => blocks[after as usize].before = before,
        }
        if self.lists[list as usize].first == NONE && list != PASSED {
            let place = self.place[list as usize] as usize;
            self.filled[place / 64] &= !(1 << (place % 64));
        }
        true
    }

    fn mark(&mut self, list: u16) {
        if list != PASSED {
            let place = self.place[list as usize] as usize;
            self.filled[place / 64] |= 1 << (place % 64);
        }
    }
}
