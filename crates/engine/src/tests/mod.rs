//! The engine's laws: one by one (`laws`, and `sampling` for what requests may ask), all at once under random schedules
//! (`schedules`), and with a real thread (`threads`). `rig` is what they share.

mod laws;
mod rig;
mod sampling;
mod schedules;
mod threads;
