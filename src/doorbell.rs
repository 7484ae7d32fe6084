//! The doorbell: wakes a process that sleeps, and costs no syscall when nobody does.
//!
//! [`Sleepers`] say in shared memory who sleeps, so that nobody is rung needlessly and no wakeup is missed; a [`Bell`]
//! is what they sleep at.

mod sleepers;

pub use sleepers::Sleepers;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    time::Duration,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
};
use tokio::io::unix::AsyncFd;

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

    /// The same for a limited time.
    pub fn wait_at_most(&self, time: Duration) -> io::Result<()> {
        // What the kernel cannot count is for ever.
        let time = time.try_into().unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&time)) {
            Ok(0) | Err(Errno::INTR) => Ok(()),
            Ok(_) => self.wait(),
            Err(error) => Err(error.into()),
        }
    }

    /// Forgets the rings so far, without sleeping.
    pub fn drain(&self) -> io::Result<()> {
        self.wait()
    }

    /// Whether somebody rang. It stays so until it is drained.
    pub fn has_rung(&self) -> bool {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&at_once)) == Ok(1)
    }

    /// Another handle on the same bell.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Bell(self.0.try_clone()?))
    }
}

/// The bell of a descriptor that another process has made and handed on.
impl From<OwnedFd> for Bell {
    fn from(fd: OwnedFd) -> Self {
        Bell(fd)
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

/// A pollable [`Bell`] that a front waits for inside its runtime.
#[derive(Debug)]
pub struct AsyncBell(AsyncFd<Bell>);

impl AsyncBell {
    /// Registers the bell with the runtime of the caller.
    pub fn new(bell: Bell) -> io::Result<Self> {
        // SAFETY: `register` asks that the descriptor stays open and the same until the AsyncFd is dropped. The Bell
        // owns it, is owned by the AsyncFd from here on, and is only lent out by shared reference.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*},
        thread,
    };

    #[test]
    fn a_bell_that_is_polled_makes_nobody_sleep_and_no_program_inherits_one() {
        let bells = [Bell::pollable().unwrap(), Bell::blocking().unwrap()];
        bells[0].drain().unwrap();
        for bell in &bells {
            let flags = rustix::io::fcntl_getfd(bell).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
            bell.wait_at_most(Duration::ZERO).unwrap();
            assert!(!bell.has_rung());
            bell.ring().unwrap();
            bell.try_clone().unwrap().ring().unwrap();
            assert!(bell.has_rung());
            bell.wait_at_most(Duration::MAX).unwrap();
            assert!(!bell.has_rung(), "two rings are one");
            bell.ring().unwrap();
            bell.drain().unwrap();
            assert!(!bell.has_rung());
        }
    }

    #[test]
    fn a_front_wakes_once_for_the_rings_so_far() {
        let bell = Bell::pollable().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        runtime.block_on(async {
            let waited = AsyncBell::new(bell.try_clone().unwrap()).unwrap();
            for _ in 0..2 {
                bell.ring().unwrap();
                bell.ring().unwrap();
                waited.wait().await.unwrap();
                assert!(!bell.has_rung());
            }
        });
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
