//! The registry: what is in each participant's slot. The supervisor writes it; fronts read from it which pools have workers, and
//! a worker whether it is to end.
//!
//! It holds no handle on any process: only the supervisor's pidfds tell who is dead.

use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use super::{Segment, Slot, layout::BLOCK};
use crate::{crash_point::crash_point, process};

const RETIRING: u32 = 5;

/// What the registry says of a participant slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// Nobody is in the slot.
    Free,
    /// The process with this pid is, and has not attached yet.
    Starting(u32),
    /// The process with this pid is.
    Live(u32),
    /// The process with this pid is, and those before it kept dying: do not count on it. With the pid 0 there is none: the next
    /// is started later.
    Failing(u32),
    /// The process with this pid is, and is to end when it has done what it has in work.
    Retiring(u32),
    /// It has died and its items are being given back.
    Dead,
}

/// One line of the registry. Written by the supervisor.
#[repr(C)]
pub(super) struct Registration {
    /// 0 free, 1 live, 2 dead, 3 live and failing, 4 starting, 5 retiring.
    state: AtomicU32,
    pid: AtomicU32,
    start: AtomicU64,
}

impl Segment {
    fn registration(&self, slot: Slot) -> &Registration {
        let Some(n) = self.layout.participant(slot) else { panic!("no such participant") };
        self.control.at(self.layout.registry + n * BLOCK)
    }

    /// What the registry says of a slot.
    pub fn liveness(&self, slot: Slot) -> Liveness {
        let line = self.registration(slot);
        match line.state.load(Acquire) {
            0 => Liveness::Free,
            1 => Liveness::Live(line.pid.load(Relaxed)),
            3 => Liveness::Failing(line.pid.load(Relaxed)),
            4 => Liveness::Starting(line.pid.load(Relaxed)),
            RETIRING => Liveness::Retiring(line.pid.load(Relaxed)),
            _ => Liveness::Dead,
        }
    }

    /// The supervisor's: what is in the slot now. Whoever looks at the registry is told by the epoch.
    pub fn set_liveness(&self, slot: Slot, liveness: Liveness) {
        let line = self.registration(slot);
        let state = match liveness {
            Liveness::Free => 0,
            Liveness::Live(pid) | Liveness::Failing(pid) | Liveness::Starting(pid) | Liveness::Retiring(pid) => {
                line.pid.store(pid, Relaxed);
                // Unreadable only if the process is gone already, and then its death is about to be seen.
                line.start.store(process::start_time(pid).unwrap_or(0), Relaxed);
                match liveness {
                    Liveness::Starting(_) => 4,
                    Liveness::Retiring(_) => RETIRING,
                    Liveness::Failing(_) => 3,
                    _ => 1,
                }
            }
            Liveness::Dead => 2,
        };
        crash_point!("registry.written");
        line.state.store(state, Release);
        crash_point!("registry.stated");
        self.header().epoch.fetch_add(1, Release);
    }

    /// Whether the participant in a slot is to end when it has done what it has in work. Ring it after setting that.
    #[inline]
    pub fn is_retiring(&self, slot: Slot) -> bool {
        // Relaxed: it is told to do less, and nothing was published for it.
        self.registration(slot).state.load(Relaxed) == RETIRING
    }
}
