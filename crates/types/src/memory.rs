//! The one place where two crates that know nothing of one another meet in memory.
//!
//! The transfer engine owns the arena (it must pin, map and register it); the model's backend computes in it. Both sides
//! need raw addresses, neither may depend on the other, so they meet here.

/// A stretch of host memory that stays where it is while anybody holds it.
///
/// Contract, relied upon by the unsafe code of the crates on both sides:
/// - `base()` is valid for reads and writes of `len()` bytes and aligned to 64 while `self` lives, and never changes;
/// - the bytes were zeroed when the memory was made, so no read is of uninitialised memory;
/// - who may touch which bytes when is decided outside by block ownership: a block being written (computed, or landing
///   from a peer under a grant) is read by nobody until it is complete; a complete block is written by nobody.
///
/// Implement it only for memory that keeps these promises (`kvasir-transfer`'s regions do).
pub trait HostMemory: Send + Sync + 'static {
    /// Address of the first byte.
    fn base(&self) -> *mut u8;
    /// Length in bytes.
    fn len(&self) -> usize;
    /// Whether there are no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
