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
//! publication is a Release store of another module, and because loom models them. A waker that makes a compare-exchange
//! after it published, for a purpose of its own, has the fence for nothing ([`Sleepers::wake_one_after_exchange`]).
//!
//! A waker *clears* the bit it rings for, so that of several wakers one makes the syscall. If it is killed between the
//! two, or the process that it woke is killed, the supervisor rings everybody: it does so after every death.
//!
//! # Who writes what
//!
//! A bit is set by its sleeper (before sleeping) and cleared by its sleeper (after waking) or by one waker.

use crate::{
    crash_point::crash_point,
    sync::{AtomicU64, Ordering::*, fence, fence_after_exchange},
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
        self.clear_lowest()
    }

    /// The same, if the caller has made a successful compare-exchange since it published.
    pub fn wake_one_after_exchange(&self) -> Option<usize> {
        // D1: pairs with D0.
        fence_after_exchange();
        self.clear_lowest()
    }

    fn clear_lowest(&self) -> Option<usize> {
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

    /// Returns whether this one sleeps and has not been rung; a guess, as it may wake at any time.
    pub fn has(&self, bit: usize) -> bool {
        self.words[bit / 64].load(Relaxed) & 1 << (bit % 64) != 0
    }

    /// Whether anybody sleeps; a guess, for whoever has no fence to spend.
    pub fn any(&self) -> bool {
        self.words.iter().any(|word| word.load(Relaxed) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::atomic::{AtomicU32, Ordering::SeqCst},
        thread,
    };

    fn words() -> [AtomicU64; 2] {
        [AtomicU64::new(0), AtomicU64::new(0)]
    }

    #[test]
    fn the_lowest_is_woken_first_and_each_once() {
        let words = words();
        let sleepers = Sleepers::new(&words);
        assert!(!sleepers.any());
        assert_eq!(sleepers.wake_one(), None);
        for bit in [127, 3, 64, 0, 63] {
            assert!(!sleepers.has(bit));
            sleepers.enter(bit);
            assert!(sleepers.any() && sleepers.has(bit));
        }
        for bit in [0, 3, 63, 64, 127] {
            assert!(sleepers.any());
            assert_eq!(sleepers.wake_one(), Some(bit));
        }
        assert!(!sleepers.any());
        assert_eq!(sleepers.wake_one(), None);
    }

    #[test]
    fn who_leaves_knows_whether_somebody_woke_it_and_disturbs_nobody() {
        let words = words();
        let sleepers = Sleepers::new(&words);
        for bit in [5, 6, 70] {
            sleepers.enter(bit);
        }
        assert!(sleepers.leave(6));
        assert!(!sleepers.leave(6), "it is not there any more");
        assert!(!sleepers.leave(7), "it never was");
        assert_eq!(sleepers.wake_one(), Some(5));
        assert!(!sleepers.leave(5), "a waker was first");
        assert!(sleepers.leave(70));
        assert!(!sleepers.any());
    }

    /// Of several wakers and the sleeper itself one clears a bit, and that one knows it.
    #[test]
    fn a_bit_is_cleared_once_whoever_does_it() {
        const ROUNDS: u32 = if cfg!(miri) { 20 } else { 500 };
        const BITS: [usize; 3] = [0, 1, 64];
        let words = words();
        let sleepers = Sleepers::new(&words);
        let (round, cleared, ready) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            for thread in 0..3 {
                let (round, cleared, ready) = (&round, &cleared, &ready);
                scope.spawn(move || {
                    for mine in 1..=ROUNDS {
                        while round.load(SeqCst) < mine {
                            thread::yield_now();
                        }
                        let woken = match thread {
                            0 => u32::from(sleepers.leave(BITS[mine as usize % 3])),
                            _ => std::iter::from_fn(|| sleepers.wake_one()).count() as u32,
                        };
                        cleared.fetch_add(woken, SeqCst);
                        ready.fetch_add(1, SeqCst);
                    }
                });
            }
            for this in 1..=ROUNDS {
                BITS.iter().for_each(|bit| sleepers.enter(*bit));
                round.store(this, SeqCst);
                while ready.load(SeqCst) < 3 * this {
                    thread::yield_now();
                }
                assert_eq!(cleared.load(SeqCst), 3 * this);
                assert!(!sleepers.any());
            }
        });
    }
}
