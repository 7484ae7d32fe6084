//! Workers that do not respond: those that items wait for, that hold none, and that do not come.
//!
//! A worker that was stopped, frozen or swapped out while it was idle is still the one that is rung for the next item. The
//! front wakes the next worker of the pool after a few milliseconds, so the item does not wait if there is another. This
//! module tells of the worker, and keeps a drain from waiting for it.
//!
//! # What it promises
//!
//! - A worker is called silent only after two looks, [`PAUSE`] apart, have seen the same: an item waits, the worker's bell
//!   has been rung and not read or it was not asleep, it holds no item, and it has completed none in between. A worker that is
//!   merely busy holds an item or completes some.
//! - It is told once, until it has been seen to respond.
//! - While nothing waits nobody looks: the front asks for a look when an item has waited for a second, and a drain
//!   looks at its workers by itself.
//!
//! Nothing is taken from a silent worker while the server serves: it may come back. In a drain it is killed, because it holds
//! nothing that could be lost.

use std::time::{Duration, Instant};

/// The time between two looks.
pub const PAUSE: Duration = Duration::from_millis(500);
/// How long a worker may take to end that responds, holds no item and was told to end. Longer than a Python worker gives its
/// threads and tasks.
pub const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a look at a worker has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub pid: u32,
    /// An item waits for it, or it was told to end: its bell was rung and not read, or it is awake and need not be rung.
    pub is_called: bool,
    pub holds_item: bool,
    /// How much it has completed.
    pub completed: u64,
}

/// What is known of one worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Silence {
    #[default]
    Responds,
    /// One look has seen this.
    Suspect(Seen, Instant),
    /// More looks have, and it was told.
    Silent(Seen),
}

/// What a look has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    None,
    /// It does not respond.
    Silent,
    /// It responds again.
    Back,
}

impl Silence {
    /// Takes note of a look at the worker.
    pub fn look(&mut self, seen: Seen, now: Instant) -> News {
        let is_suspicious = seen.is_called && !seen.holds_item;
        match *self {
            Silence::Silent(before) if before == seen => News::None,
            Silence::Silent(before) => {
                *self = Silence::Responds;
                // Another process in the same seat has nothing to be back from.
                if before.pid == seen.pid { News::Back } else { News::None }
            }
            Silence::Suspect(before, at) if before == seen && at + PAUSE <= now => {
                *self = Silence::Silent(seen);
                News::Silent
            }
            Silence::Suspect(before, _) if before == seen => News::None,
            _ if is_suspicious => {
                *self = Silence::Suspect(seen, now);
                News::None
            }
            _ => {
                *self = Silence::Responds;
                News::None
            }
        }
    }

    /// Whether the worker does not respond.
    pub fn is_silent(&self) -> bool {
        matches!(self, Silence::Silent(_))
    }
}

/// Whether a worker that was told to end is killed, which holds no item and was told so long ago.
pub fn must_end(is_silent: bool, told: Duration) -> bool {
    is_silent || told >= LAST_WORDS
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALLED: Seen = Seen { pid: 7, is_called: true, holds_item: false, completed: 3 };

    #[test]
    fn only_a_worker_that_two_looks_find_unchanged_is_silent() {
        // What the looks see, and after how much time.
        let half = PAUSE / 2;
        for (looks, is_silent) in [
            (&[(CALLED, PAUSE), (CALLED, PAUSE)][..], true),
            (&[(CALLED, PAUSE)], false),
            (&[(CALLED, PAUSE), (CALLED, half)], false),
            (&[(CALLED, PAUSE), (CALLED, half), (CALLED, half)], true),
            (&[(Seen { is_called: false, ..CALLED }, PAUSE); 2], false),
            (&[(Seen { holds_item: true, ..CALLED }, PAUSE); 2], false),
            (&[(CALLED, PAUSE), (Seen { completed: 4, ..CALLED }, PAUSE)], false),
            (&[(CALLED, PAUSE), (Seen { pid: 8, ..CALLED }, PAUSE)], false),
            (&[(CALLED, PAUSE), (Seen { is_called: false, ..CALLED }, PAUSE), (CALLED, PAUSE)], false),
        ] {
            let (mut silence, mut now) = (Silence::default(), Instant::now());
            for (seen, later) in looks {
                now += *later;
                silence.look(*seen, now);
            }
            assert_eq!(silence.is_silent(), is_silent, "{looks:?}");
        }
    }

    #[test]
    fn an_episode_is_told_once_and_so_is_its_end() {
        let (mut silence, mut now) = (Silence::default(), Instant::now());
        let mut look = |seen| {
            now += PAUSE;
            silence.look(seen, now)
        };
        assert_eq!([CALLED; 4].map(&mut look), [News::None, News::Silent, News::None, News::None]);
        assert_eq!(look(Seen { completed: 4, ..CALLED }), News::Back);
        let again = Seen { completed: 4, ..CALLED };
        assert_eq!([again; 3].map(&mut look), [News::None, News::Silent, News::None]);
        assert_eq!(look(Seen { pid: 8, ..again }), News::None, "another process");
    }

    #[test]
    fn who_is_silent_or_takes_too_long_is_ended() {
        assert!(must_end(true, Duration::ZERO));
        assert!(!must_end(false, LAST_WORDS - Duration::from_nanos(1)));
        assert!(must_end(false, LAST_WORDS));
    }
}
