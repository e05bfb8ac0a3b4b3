//! The engine's laws: one by one (`laws`, and `sampling` and `constraints` for what
//! requests may ask, `speculation`), all at once under random schedules
//! (`schedules`), and with a real thread (`threads`). `rig` is what they share.

mod constraints;
mod laws;
mod rig;
mod sampling;
mod schedules;
mod speculation;
mod threads;
