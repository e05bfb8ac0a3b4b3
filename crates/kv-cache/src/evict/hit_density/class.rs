//! What is known of a block, in few enough values that each is met often; and ages, in steps that grow with them.

use crate::Ask;

/// Steps of age: two to each doubling, up to twelve days of sixteenths of a second.
pub(super) const AGES: usize = 48;

const USES: u16 = 6;
const SHARES: u16 = 4;
const RESTS: u16 = 8;

/// Values of [`Class::root`].
pub(super) const ROOTS: usize = USES as usize * 2;
/// Classes with one root.
pub(super) const BRANCHES: usize = (SHARES * RESTS) as usize;
pub(super) const CLASSES: usize = ROOTS * BRANCHES;

/// Uses and whether a block hangs on it (the *root*: what matters most); then, of the prompt it was last asked for in, how much was
/// there and how long the rest was. If that is [unknown](Ask::UNKNOWN), all was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Class(u16);

impl Class {
    /// Of a block that nobody has told anything about.
    pub(super) const UNKNOWN: Self = Self(u16::MAX);

    pub(super) fn of(uses: u8, child: bool, Ask { found, blocks }: Ask) -> Self {
        let rest = blocks.saturating_sub(found);
        let share = match found {
            _ if found <= 1 => 0,
            _ if found < rest => 1,
            _ if rest > 1 => 2,
            _ => 3,
        };
        let rest = (u32::BITS - rest.leading_zeros()).min(u32::from(RESTS) - 1) as u16;
        let root = u16::from(uses).min(USES - 1) * 2 + u16::from(child);
        Self((root * SHARES + share) * RESTS + rest)
    }

    pub(super) fn index(self) -> usize {
        usize::from(self.0)
    }

    fn root(self) -> u16 {
        self.0 / (SHARES * RESTS)
    }

    pub(super) fn uses(self) -> u8 {
        (self.root() / 2) as u8
    }

    pub(super) fn has_child(self) -> bool {
        self.root() % 2 == 1
    }

    pub(super) fn with_child(self) -> Self {
        if self.has_child() { self } else { Self(self.0 + SHARES * RESTS) }
    }
}

/// What the branch says: how much was there, how long the rest was.
pub(super) fn branch(index: usize) -> [usize; 2] {
    let branch = index % BRANCHES;
    [branch / usize::from(RESTS), branch % usize::from(RESTS)]
}

/// How many values each of [`branch`] has.
pub(super) const BRANCH_VALUES: [usize; 2] = [SHARES as usize, RESTS as usize];

/// The cell of a class and a step of age. Greater ages of one class have greater cells.
pub(super) fn cell(class: Class, age: usize) -> u16 {
    debug_assert!(class != Class::UNKNOWN && age < AGES);
    class.0 * AGES as u16 + age as u16
}

/// The step that an age is in.
pub(super) fn age_step(age: u32) -> usize {
    let age = age.max(1);
    let octave = age.ilog2();
    let half = if octave == 0 { 0 } else { (age >> (octave - 1)) & 1 };
    ((octave * 2 + half) as usize).min(AGES - 1)
}

/// Where a step begins.
pub(super) fn step_start(step: usize) -> f32 {
    match step {
        0 => 0.0,
        _ => (1u64 << (step / 2)) as f32 * (1.0 + 0.5 * (step % 2) as f32),
    }
}
