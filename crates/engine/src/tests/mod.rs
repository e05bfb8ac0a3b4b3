//! The engine's laws: one by one (`laws`), all at once under random schedules (`schedules`), and with a real thread
//! (`threads`). `rig` is what they share.

mod laws;
mod rig;
mod schedules;
mod threads;
