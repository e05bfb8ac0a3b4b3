//! How a batch becomes frames: neighbours merged, long ranges cut, frames filled.
//!
//! Pure arithmetic over ranges already checked against both segments.

use std::ops;

use crate::batch::Range;

/// Most ranges in one frame: with header and table the frame is one `sendmsg` (Linux takes 1024 pieces).
pub(crate) const MAX_RANGES: usize = 256;

/// A batch cut into frames.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) ranges: Vec<Range>,
    pub(crate) frames: Vec<FramePlan>,
    pub(crate) bytes: u64,
}

/// One frame: which of the plan's ranges, and their sum.
#[derive(Debug)]
pub(crate) struct FramePlan {
    pub(crate) ranges: ops::Range<usize>,
    pub(crate) bytes: u64,
}

impl Plan {
    pub(crate) fn new(ranges: &[Range], slice_bytes: u64) -> Self {
        let mut plan = Self::default();
        let mut frame = FramePlan { ranges: 0..0, bytes: 0 };
        for mut rest in merged(ranges) {
            plan.bytes += rest.len;
            while rest.len > 0 {
                let len = rest.len.min(slice_bytes - frame.bytes);
                plan.ranges.push(Range { len, ..rest });
                rest = Range { local: rest.local + len, remote: rest.remote + len, len: rest.len - len };
                frame.ranges.end += 1;
                frame.bytes += len;
                if frame.bytes == slice_bytes || frame.ranges.len() == MAX_RANGES {
                    let end = frame.ranges.end;
                    plan.frames.push(std::mem::replace(&mut frame, FramePlan { ranges: end..end, bytes: 0 }));
                }
            }
        }
        if frame.bytes > 0 {
            plan.frames.push(frame);
        }
        plan
    }
}

/// The ranges with empty ones left out and those that continue their predecessor on both sides joined to it.
fn merged(ranges: &[Range]) -> Vec<Range> {
    let mut merged: Vec<Range> = Vec::with_capacity(ranges.len());
    for range in ranges.iter().filter(|range| range.len > 0) {
        match merged.last_mut() {
            Some(last) if last.local + last.len == range.local && last.remote + last.len == range.remote => {
                last.len += range.len;
            }
            _ => merged.push(*range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_move_each_byte_of_the_batch_once_and_in_bounds(
            ranges in prop::collection::vec((0u64..500, 0u64..500, 0u64..60), 0..400),
            slice in 1u64..200,
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(local, remote, len)| Range { local, remote, len }).collect();
            let plan = Plan::new(&ranges, slice);
            let bytes = |ranges: &[Range]| -> Vec<(u64, u64)> {
                ranges.iter().flat_map(|r| (0..r.len).map(|i| (r.local + i, r.remote + i))).collect()
            };
            prop_assert_eq!(bytes(&plan.ranges), bytes(&ranges));
            let mut next = 0;
            for frame in &plan.frames {
                prop_assert_eq!(frame.ranges.start, next);
                next = frame.ranges.end;
                prop_assert!((1..=MAX_RANGES).contains(&frame.ranges.len()));
                prop_assert!(frame.bytes <= slice);
                prop_assert_eq!(frame.bytes, plan.ranges[frame.ranges.clone()].iter().map(|r| r.len).sum::<u64>());
            }
            prop_assert_eq!(next, plan.ranges.len());
            prop_assert_eq!(plan.bytes, ranges.iter().map(|r| r.len).sum::<u64>());
        }
    }

    #[test]
    fn neighbours_on_both_sides_become_one_range() {
        let range = |local, remote| Range { local, remote, len: 10 };
        assert_eq!(merged(&[range(0, 100), range(10, 110), range(20, 200)]).len(), 2);
    }
}
