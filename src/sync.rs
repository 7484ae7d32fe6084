//! What the lock-free code needs of the processor. `tests/lockfree` compiles that code with another such module, whose
//! atomics belong to a model checker.

pub(crate) use core::sync::atomic::{AtomicU64, Ordering, fence};

/// A SeqCst fence for a thread that has just made a successful compare-exchange. On x86 that was a full barrier, with whatever
/// ordering it was asked for, so that only the compiler must be kept from reordering; a fence more would be a quarter of a
/// worker's time. Linux has the same as `smp_mb__after_atomic`.
#[inline(always)]
pub(crate) fn fence_after_exchange() {
    if cfg!(all(target_arch = "x86_64", not(miri))) {
        core::sync::atomic::compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// A step was lost against somebody else's and is tried again. Here that is nothing; a model checker must be told, so
/// that it lets the others run.
#[inline(always)]
pub(crate) fn retry() {}
