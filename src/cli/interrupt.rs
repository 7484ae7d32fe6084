//! Ctrl-C and SIGTERM for commands that have something to do yet: once they end in order, a second one ends them at once.

use std::thread;

use anyhow::Context as _;
use nix::sys::signal::{SigSet, Signal};
use tokio::sync::oneshot;

/// Tells of the first one. To be called before other threads are started, which would not have them blocked.
pub fn on_interrupt() -> anyhow::Result<oneshot::Receiver<Signal>> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    // Blocked here, and so in every thread that follows: they wait for whoever asks.
    signals.thread_block().context("cannot block signals")?;
    let (told, interrupted) = oneshot::channel();
    thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            // The run may be over.
            let _ = told.send(signal);
        }
        // From now on this thread is where they end the process, for it blocks them no more.
        let _ = signals.thread_unblock();
        loop {
            thread::park();
        }
    });
    Ok(interrupted)
}
