//! The engine's laws: one by one (`laws`; `scheduling` for who goes first, `sharing` for what is computed once, `groups` for
//! sliding windows, `landing` for blocks that come while others are computed, `sampling` and `constraints` for what requests may ask, `speculation`), all at once under random
//! schedules (`schedules`, with the `oracle`), and with a real thread (`threads`). `rig` is what they share.

mod constraints;
mod groups;
mod landing;
mod laws;
mod oracle;
mod rig;
mod sampling;
mod schedules;
mod scheduling;
mod sharing;
mod speculation;
mod threads;
