//! The doorbell's protocol: who sleeps, and whom to ring.
//!
//! # What it promises
//!
//! No wakeup is missed: when a waker publishes something and a sleeper goes to sleep at the same time, the sleeper
//! sees what was published or the waker rings. No syscall is made unless somebody sleeps.
//!
//! # Why no wakeup is missed
//!
//! It is the store-buffering pattern with a fence on each side:
//!
//! ```text
//!     sleeper: set own bit → D0 fence(SeqCst) → look once more → sleep
//!     waker:   publish     → D1 fence(SeqCst) → load the bits  → ring
//! ```
//!
//! The two fences are totally ordered. If D0 comes first, the waker's load sees the bit and rings. If D1 comes first,
//! the sleeper's look sees what was published. The fences are needed and acquire/release is not enough: without them
//! both loads may be satisfied before either store is visible. They are fences and not SeqCst accesses because the
//! publication is a Release store of another module, and because loom models them.
//!
//! A waker *clears* the bit it rings for, so that of several wakers one makes the syscall. If it is killed between the
//! two, or the process that it woke is killed, the supervisor rings everybody: it does so after every death.
//!
//! # Who writes what
//!
//! A bit is set by its sleeper (before sleeping) and cleared by its sleeper (after waking) or by one waker.

use crate::{
    crash_point::crash_point,
    sync::{AtomicU64, Ordering::*, fence},
};

/// The sleepers of one place, a bit each: the parked flag of a front, the idle bitmap of a pool.
#[derive(Clone, Copy, Debug)]
pub struct Sleepers<'a> {
    words: &'a [AtomicU64],
}

impl<'a> Sleepers<'a> {
    /// Sleepers over bit words; bit `i` is bit `i % 64` of word `i / 64`.
    pub fn new(words: &'a [AtomicU64]) -> Self {
        Sleepers { words }
    }

    /// The sleeper's half. After it the caller must look once more at what it waits for, and sleep only if there is
    /// nothing; then, or on waking, `leave`.
    pub fn enter(&self, bit: usize) {
        self.words[bit / 64].fetch_or(1 << (bit % 64), Relaxed);
        crash_point!("doorbell.entered");
        // D0: pairs with D1.
        fence(SeqCst);
    }

    /// The sleeper is awake. False if a waker has cleared the bit, and so has rung or is about to.
    pub fn leave(&self, bit: usize) -> bool {
        let mask = 1 << (bit % 64);
        // A waker may have been here first: then there is nothing left to write.
        let left = self.words[bit / 64].load(Relaxed) & mask != 0
            && self.words[bit / 64].fetch_and(!mask, Relaxed) & mask != 0;
        crash_point!("doorbell.left");
        left
    }

    /// The waker's half, after publishing: whom to ring, if anybody sleeps. Always the lowest bit, so that the same
    /// few sleepers stay warm.
    pub fn wake_one(&self) -> Option<usize> {
        // D1: pairs with D0.
        fence(SeqCst);
        for (i, word) in self.words.iter().enumerate() {
            let mut bits = word.load(Relaxed);
            while bits != 0 {
                let lowest = bits & bits.wrapping_neg();
                bits = word.fetch_and(!lowest, Relaxed);
                if bits & lowest != 0 {
                    crash_point!("doorbell.cleared");
                    return Some(i * 64 + lowest.trailing_zeros() as usize);
                }
            }
        }
        None
    }

    /// Whether anybody sleeps; a guess, for whoever has no fence to spend.
    pub fn any(&self) -> bool {
        self.words.iter().any(|word| word.load(Relaxed) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wakes_the_lowest_and_only_once() {
        let words = [AtomicU64::new(0), AtomicU64::new(0)];
        let sleepers = Sleepers::new(&words);
        assert_eq!(sleepers.wake_one(), None);
        for bit in [70, 3, 9] {
            sleepers.enter(bit);
        }
        assert!(sleepers.any());
        assert_eq!(sleepers.wake_one(), Some(3));
        assert!(!sleepers.leave(3), "a waker took the bit");
        assert!(sleepers.leave(9));
        assert_eq!(sleepers.wake_one(), Some(70));
        assert_eq!(sleepers.wake_one(), None);
    }
}
