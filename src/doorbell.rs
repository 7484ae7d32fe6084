//! The doorbell: wakes a process that sleeps, and costs no syscall when nobody does.
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

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use rustix::{
    event::{EventfdFlags, eventfd},
    io::Errno,
};

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
        self.words[bit / 64].load(Relaxed) & mask != 0 && self.words[bit / 64].fetch_and(!mask, Relaxed) & mask != 0
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

/// An eventfd. Made by the supervisor before it forks, so that every process can ring every other.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// A bell that is waited for with [`Bell::wait`].
    pub fn blocking() -> io::Result<Self> {
        Ok(Bell(eventfd(0, EventfdFlags::CLOEXEC)?))
    }

    /// A bell that is waited for with poll or epoll, and read with [`Bell::drain`].
    pub fn pollable() -> io::Result<Self> {
        Ok(Bell(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Wakes the process that waits here, now or the next time it does.
    pub fn ring(&self) -> io::Result<()> {
        loop {
            match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
                // EAGAIN: the counter is at its limit, so it is not zero, and that is all that matters.
                Ok(_) | Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sleeps until somebody rings; at once if somebody did. Also returns when a signal handler ran.
    pub fn wait(&self) -> io::Result<()> {
        match rustix::io::read(&self.0, &mut [0u8; 8]) {
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Forgets the rings so far, without sleeping.
    pub fn drain(&self) -> io::Result<()> {
        self.wait()
    }

    /// Another handle on the same bell.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Bell(self.0.try_clone()?))
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(not(loom))]
mod asynchronous {
    use std::io;

    use tokio::io::unix::AsyncFd;

    use super::Bell;

    /// A pollable [`Bell`] that a front waits for inside its runtime.
    #[derive(Debug)]
    pub struct AsyncBell(AsyncFd<Bell>);

    impl AsyncBell {
        /// Registers the bell with the runtime of the caller.
        pub fn new(bell: Bell) -> io::Result<Self> {
            // SAFETY: `register` asks that the descriptor stays open and the same until the AsyncFd is dropped. The
            // Bell owns it, is owned by the AsyncFd from here on, and is only lent out by shared reference.
            #[allow(unsafe_code)]
            let registered = unsafe { AsyncFd::register(bell) };
            Ok(AsyncBell(registered.map_err(|error| io::Error::other(error.to_string()))?))
        }

        /// Sleeps until somebody rings; at once if somebody did.
        pub async fn wait(&self) -> io::Result<()> {
            let mut ready = self.0.readable().await?;
            ready.clear_ready();
            self.0.get_ref().drain()
        }
    }
}
#[cfg(not(loom))]
pub use asynchronous::AsyncBell;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::{
        sync::atomic::{AtomicBool, AtomicU32},
        thread,
    };

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

    /// Two threads hand a token to and fro, sleeping each time: a lost wakeup hangs the test.
    #[test]
    fn no_wakeup_is_lost() {
        const ROUNDS: u32 = if cfg!(miri) { 20 } else { 20_000 };
        let words = [AtomicU64::new(0)];
        let bells = [Bell::blocking().unwrap(), Bell::blocking().unwrap()];
        let turn = AtomicU32::new(0);
        let slept = AtomicBool::new(false);
        let play = |me: usize| {
            let sleepers = Sleepers::new(&words);
            for round in 0..ROUNDS {
                let mine = round * 2 + me as u32;
                while turn.load(Acquire) != mine {
                    sleepers.enter(me);
                    if turn.load(Acquire) != mine {
                        slept.store(true, Relaxed);
                        bells[me].wait().unwrap();
                    }
                    sleepers.leave(me);
                }
                turn.store(mine + 1, Release);
                if let Some(other) = sleepers.wake_one() {
                    bells[other].ring().unwrap();
                }
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| play(0));
            scope.spawn(|| play(1));
        });
        assert!(slept.load(Relaxed));
    }
}
