//! Orphans: what descendants of this process leave behind when they die becomes this process's to reap.
//!
//! That is how a nursery's workers become the supervisor's children. Others come along, such as programs that a handler
//! has started and that outlive their worker; they are reaped so that they do not pile up. Children that the program had
//! before it began to serve are its own to wait for.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, BorrowedFd},
    time::Instant,
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};

use crate::process;

/// This process adopts orphans for as long as this lives.
#[derive(Debug)]
pub struct Orphans {
    fd: SignalFd,
    earlier: BTreeSet<u32>,
    /// When to look for the dead without a signal: there was no descriptor to look by.
    pub again_at: Option<Instant>,
}

impl Orphans {
    /// From now on.
    pub fn adopt() -> io::Result<Self> {
        let earlier = process::children()?.into_iter().collect();
        let mask = Self::mask();
        mask.thread_block()?;
        let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        process::adopt_orphans(true)?;
        Ok(Orphans { fd, earlier, again_at: None })
    }

    fn mask() -> SigSet {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask
    }

    /// Children that are dead and that nobody has reaped. `is_known` is who is waited for elsewhere.
    pub fn dead(&self, is_known: impl Fn(u32) -> bool) -> io::Result<Vec<u32>> {
        while self.fd.read_signal()?.is_some() {}
        let is_stranger = |pid: &u32| !self.earlier.contains(pid) && !is_known(*pid) && process::is_dead_child(*pid);
        Ok(process::children()?.into_iter().filter(is_stranger).collect())
    }
}

impl AsFd for Orphans {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Orphans {
    fn drop(&mut self) {
        // Neither fails once it has been done. In a child the first does nothing: adopting orphans is not inherited.
        let _ = process::adopt_orphans(false);
        let _ = Self::mask().thread_unblock();
    }
}
