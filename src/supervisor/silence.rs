//! Detects workers that hold no item and do not take one that waits.
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
//! - It is told once, until it has been seen to respond: it has read its bell, gone to sleep, taken an item or completed one.
//!   That no item waits any more says nothing about it.
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
    /// The worker should take an item, or end.
    pub is_called: bool,
    /// The worker's bell was rung and it has not read the bell.
    pub is_rung: bool,
    /// The worker has announced that it sleeps.
    pub is_asleep: bool,
    pub holds_item: bool,
    /// How much it has completed.
    pub completed: u64,
}

impl Seen {
    /// Returns whether the same process has done something since the look `before`.
    fn has_acted_since(&self, before: &Seen) -> bool {
        self.completed != before.completed
            || self.holds_item
            || before.is_rung && !self.is_rung
            || !before.is_asleep && self.is_asleep
    }
}

/// What decides whether a worker should take an item, or end.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Items wait in the worker's pool, or the server has told all workers to end.
    pub is_wanted: bool,
    /// A program that has not attached yet hears no bell.
    pub has_arrived: bool,
    pub is_rung: bool,
    pub is_asleep: bool,
    /// The server does not drain.
    pub is_serving: bool,
    /// The worker was told to end for another one.
    pub is_retiring: bool,
}

impl Call {
    /// Returns whether the worker should take an item, or end. A worker that is awake looks for items without being rung, but
    /// in a drain it may be ending, which may take a while. A retiring worker takes no more items while the server serves.
    pub fn is_called(self) -> bool {
        let is_addressed = match self.is_serving {
            true => !self.is_retiring && (self.is_rung || !self.is_asleep),
            false => self.is_rung,
        };
        self.is_wanted && self.has_arrived && is_addressed
    }
}

/// What is known of one worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Silence {
    #[default]
    Responds,
    /// The latest look has seen this; the first look that has seen the worker like this was at that time.
    Suspect(Seen, Instant),
    /// The latest look has seen this, and it was told.
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
            Silence::Silent(before) if before.pid == seen.pid => {
                if seen.has_acted_since(&before) {
                    *self = Silence::Responds;
                    News::Back
                } else {
                    *self = Silence::Silent(seen);
                    News::None
                }
            }
            Silence::Suspect(before, at)
                if before.pid == seen.pid && is_suspicious && !seen.has_acted_since(&before) =>
            {
                if at + PAUSE <= now {
                    *self = Silence::Silent(seen);
                    News::Silent
                } else {
                    *self = Silence::Suspect(seen, at);
                    News::None
                }
            }
            _ => {
                *self = if is_suspicious { Silence::Suspect(seen, now) } else { Silence::Responds };
                News::None
            }
        }
    }

    /// Whether the worker does not respond.
    pub fn is_silent(&self) -> bool {
        matches!(self, Silence::Silent(_))
    }
}

/// Returns whether to kill a worker that holds no item, `told` after it was told to end.
pub fn must_end(is_silent: bool, told: Duration) -> bool {
    is_silent || told >= LAST_WORDS
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALLED: Seen =
        Seen { pid: 7, is_called: true, is_rung: true, is_asleep: false, holds_item: false, completed: 3 };

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
    fn only_an_act_of_a_silent_worker_shows_that_it_responds() {
        let awake = Seen { is_rung: false, ..CALLED };
        for (before, seen, news) in [
            (CALLED, CALLED, News::None),
            (CALLED, Seen { is_called: false, ..CALLED }, News::None),
            (awake, CALLED, News::None),
            (awake, Seen { is_called: false, ..awake }, News::None),
            (CALLED, Seen { pid: 8, ..CALLED }, News::None),
            (CALLED, Seen { completed: 4, ..CALLED }, News::Back),
            (CALLED, Seen { holds_item: true, ..CALLED }, News::Back),
            (CALLED, Seen { is_rung: false, ..CALLED }, News::Back),
            (CALLED, Seen { is_called: false, is_rung: false, ..CALLED }, News::Back),
            (awake, Seen { is_called: false, is_asleep: true, ..awake }, News::Back),
        ] {
            let (mut silence, now) = (Silence::Silent(before), Instant::now());
            assert_eq!(silence.look(seen, now), news, "{before:?} {seen:?}");
            let stays = news == News::None && before.pid == seen.pid;
            assert_eq!(silence.is_silent(), stays, "{before:?} {seen:?}");
            // It is not told again until the worker has responded.
            if stays {
                assert_eq!(silence.look(CALLED, now + PAUSE), News::None, "{before:?} {seen:?}");
            }
        }
    }

    #[test]
    fn a_retiring_worker_need_not_take_an_item_while_the_server_serves() {
        let all = Call {
            is_wanted: true,
            has_arrived: true,
            is_rung: true,
            is_asleep: false,
            is_serving: true,
            is_retiring: false,
        };
        for (call, is_called) in [
            (all, true),
            (Call { is_wanted: false, ..all }, false),
            (Call { has_arrived: false, ..all }, false),
            (Call { is_rung: false, ..all }, true),
            (Call { is_rung: false, is_asleep: true, ..all }, false),
            (Call { is_retiring: true, ..all }, false),
            (Call { is_retiring: true, is_rung: false, ..all }, false),
            (Call { is_serving: false, ..all }, true),
            (Call { is_serving: false, is_rung: false, ..all }, false),
            (Call { is_serving: false, is_retiring: true, ..all }, true),
        ] {
            assert_eq!(call.is_called(), is_called, "{call:?}");
        }
    }

    #[test]
    fn who_is_silent_or_takes_too_long_is_ended() {
        assert!(must_end(true, Duration::ZERO));
        assert!(!must_end(false, LAST_WORDS - Duration::from_nanos(1)));
        assert!(must_end(false, LAST_WORDS));
    }
}
