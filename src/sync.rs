//! What the lock-free code needs of the processor. `tests/lockfree` compiles that code with another such module, whose
//! atomics belong to a model checker.

pub(crate) use core::sync::atomic::{AtomicU64, Ordering, fence};

/// A step was lost against somebody else's and is tried again. Here that is nothing; a model checker must be told, so
/// that it lets the others run.
#[inline(always)]
pub(crate) fn retry() {}
