//! The two usual designs, each right as long as nobody dies.

use forkring_lockfree::{
    ring::Hint,
    sync::{AtomicU64, Ordering::*, retry},
};

use super::world::Ring;

/// Vyukov's bounded queue. Its push reserves a cell and then publishes it; its take pops and then claims.
pub struct Vyukov {
    head: AtomicU64,
    tail: AtomicU64,
    cells: Vec<(AtomicU64, AtomicU64)>,
}

impl Vyukov {
    fn cell(&self, position: u64) -> &(AtomicU64, AtomicU64) {
        &self.cells[position as usize % self.cells.len()]
    }
}

impl Ring for Vyukov {
    fn new(cells: usize) -> Self {
        Vyukov {
            head: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            cells: (0..cells as u64).map(|i| (AtomicU64::new(i), AtomicU64::new(0))).collect(),
        }
    }

    fn push(&self, hint: Hint) -> bool {
        loop {
            let tail = self.tail.load(Relaxed);
            let (sequence, value) = self.cell(tail);
            let seen = sequence.load(Acquire);
            if seen == tail {
                if self.tail.compare_exchange(tail, tail + 1, Relaxed, Relaxed).is_ok() {
                    value.store(u64::from(hint.generation) << 32 | u64::from(hint.index), Relaxed);
                    sequence.store(tail + 1, Release);
                    return true;
                }
            } else if seen < tail {
                return false;
            }
            retry();
        }
    }

    fn take(&self, mut claim: impl FnMut(Hint) -> bool) -> Option<Hint> {
        loop {
            let head = self.head.load(Relaxed);
            let (sequence, value) = self.cell(head);
            let seen = sequence.load(Acquire);
            if seen == head + 1 {
                if self.head.compare_exchange(head, head + 1, Relaxed, Relaxed).is_ok() {
                    let value = value.load(Relaxed);
                    sequence.store(head + self.cells.len() as u64, Release);
                    let hint = Hint { index: value as u32, generation: (value >> 32) as u32 };
                    if claim(hint) {
                        return Some(hint);
                    }
                }
            } else if seen < head + 1 {
                return None;
            }
            retry();
        }
    }

    fn holds_hints(&self) -> bool {
        self.head.load(Relaxed) != self.tail.load(Relaxed)
    }
}
