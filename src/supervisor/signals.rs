//! The signals that tell a server to end.

use std::io;

use nix::sys::{
    signal::{SigSet, SigmaskHow, Signal},
    signalfd::{SfdFlags, SignalFd},
};

/// SIGTERM and SIGINT, which from now on wait to be read instead of ending the process. Dropping it gives them back
/// their effect.
pub struct Signals {
    pub(super) fd: SignalFd,
    /// `None` in a child, where both stay blocked.
    before: Option<SigSet>,
}

impl Signals {
    /// Blocks both. To be done before there is anything to clean up.
    pub fn block() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGTERM);
        mask.add(Signal::SIGINT);
        let before = mask.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Signals { fd, before: Some(before) })
    }

    /// Closes the descriptor and leaves both signals blocked: in a child, right after the fork.
    pub(super) fn leave(mut self) {
        self.before = None;
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        let Some(before) = self.before else { return };
        // What has come meanwhile was meant for what has ended by now.
        while let Ok(Some(_)) = self.fd.read_signal() {}
        // Fails only for a mask that is none.
        let _ = before.thread_set_mask();
    }
}
