//! What the server's `sync` has, from loom; and two things more, both set by [`crate::check`]: a thread that dies after
//! a given access, and a fault that weakens what the code under test asks of memory.

use std::cell::Cell;

use loom::sync::atomic;
pub use loom::sync::atomic::Ordering;

/// What is taken away from the code under test.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Acquire and Release: every access is Relaxed.
    Ordering,
    /// Fences.
    Fence,
    /// The order of all SeqCst fences: they are AcqRel.
    FenceOrder,
}

thread_local! {
    /// All threads of a model are coroutines of the one that checks it.
    static FAULT: Cell<Fault> = const { Cell::new(Fault::None) };
}

loom::thread_local! {
    /// How many accesses this thread of the model may make until it dies; none: as many as it likes.
    static LIFE: Cell<Option<u32>> = Cell::new(None);
}

/// What a dying thread unwinds with.
pub(crate) struct Death;

pub(crate) fn set_fault(fault: Fault) {
    FAULT.set(fault);
}

pub(crate) fn set_life(accesses: Option<u32>) {
    LIFE.with(|life| life.set(accesses));
}

/// An access was made. Whoever has none left is as if killed here: nothing that it would do next happens.
fn accessed<T>(result: T) -> T {
    LIFE.with(|life| {
        if let Some(left) = life.get() {
            life.set(Some(left - 1));
            if left == 1 {
                life.set(None);
                std::panic::resume_unwind(Box::new(Death));
            }
        }
    });
    result
}

fn ordering(order: Ordering) -> Ordering {
    if FAULT.get() == Fault::Ordering { Ordering::Relaxed } else { order }
}

/// loom's, with deaths and faults.
#[derive(Debug)]
pub struct AtomicU64(atomic::AtomicU64);

impl AtomicU64 {
    pub fn new(value: u64) -> Self {
        AtomicU64(atomic::AtomicU64::new(value))
    }

    pub fn load(&self, order: Ordering) -> u64 {
        accessed(self.0.load(ordering(order)))
    }

    pub fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, ordering(order));
        accessed(());
    }

    pub fn swap(&self, value: u64, order: Ordering) -> u64 {
        accessed(self.0.swap(value, ordering(order)))
    }

    pub fn compare_exchange(&self, from: u64, to: u64, ok: Ordering, failed: Ordering) -> Result<u64, u64> {
        accessed(self.0.compare_exchange(from, to, ordering(ok), ordering(failed)))
    }

    pub fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        accessed(self.0.fetch_add(value, ordering(order)))
    }

    pub fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        accessed(self.0.fetch_or(bits, ordering(order)))
    }

    pub fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        accessed(self.0.fetch_and(bits, ordering(order)))
    }
}

pub fn fence(order: Ordering) {
    match FAULT.get() {
        Fault::Fence => {}
        Fault::FenceOrder => atomic::fence(Ordering::AcqRel),
        _ => atomic::fence(order),
    }
    accessed(());
}

/// loom knows no exchange that is a fence: it is one of its own.
pub fn fence_after_exchange() {
    fence(Ordering::SeqCst);
}

/// A step was lost against somebody else's: loom lets the others run.
pub fn retry() {
    loom::thread::yield_now();
}
