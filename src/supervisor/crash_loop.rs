//! Crash loops: which deaths slow a pool down, and when a pool does not serve because of them.
//!
//! # What it promises
//!
//! - A worker that held an item when it died, died of the item. It is replaced at once, and `max_attempts` bounds how
//!   often one item can do that.
//! - A worker that died before it took its first item, within [`SETTLED`] of its start, died of its start. After each
//!   such death in a row the seat's next start is delayed more, and after [`FAILING`] of them the seat is failing.
//! - When workers of a pool died of [`DIFFERENT_ITEMS`] different items and the pool completed none in between, the
//!   handler is to blame. Then every seat of the pool is failing whose worker died of an item and has no successor that has
//!   stayed up, and each further death delays the next start more. Workers that are up and busy with long items stay live.
//! - A pool whose workers are all failing is NOT_SERVING. It serves again, by itself, when one of them has stayed up for
//!   [`SETTLED`]. Either change is logged once, with the kind of death.
//!
//! Why that holds: the registry says of such a worker that it is failing instead of live
//! ([`Liveness::Failing`](crate::segment::Liveness)), and a pool's health is whether one of its workers is live.
//!
//! [`Record`] and [`Suspects`] are the state machines. They take the time as an argument and do no I/O.

use std::time::{Duration, Instant};

use crate::dispatch::ItemKey;

/// A process that lived this long after it had attached was not killed by its own start.
const SETTLED: Duration = Duration::from_secs(1);
/// So many deaths before that in a row are a crash loop.
const FAILING: u32 = 5;
/// Deaths of so many different items, with no completion between them, are the handler's own.
const DIFFERENT_ITEMS: usize = 3;
const BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// Returns the delay before the start that follows the nth death of a crash loop.
fn backoff(nth: u32) -> Duration {
    match nth {
        0 => Duration::ZERO,
        n => BACKOFF.saturating_mul(1 << (n - 1).min(16)).min(MAX_BACKOFF),
    }
}

/// What a process had done when it died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// It had not taken an item yet.
    Unused,
    /// It had completed items and held none.
    Idle,
    /// It held an item.
    AtWork,
}

/// What a process died of, as the log names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiedOf {
    /// Its own start.
    Start,
    /// An item that it held.
    Item,
    /// Neither: it had stayed up, or had completed items, and held none.
    Other,
}

impl DiedOf {
    /// Returns the word for the log.
    pub fn name(self) -> &'static str {
        match self {
            DiedOf::Start => "start",
            DiedOf::Item => "item",
            DiedOf::Other => "other",
        }
    }
}

/// How the processes of one seat have fared.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// When the present process attached; none, if it has not, as while a program still imports what it needs.
    arrived: Option<Instant>,
    quick_deaths: u32,
    /// Whether the process before died of an item.
    died_of_item: bool,
    /// When the handler of the seat's pool was blamed last.
    blamed: Option<Instant>,
}

impl Record {
    /// Returns the record of a seat that never had a process.
    pub fn new() -> Self {
        Record { arrived: None, quick_deaths: 0, died_of_item: false, blamed: None }
    }

    /// A process was started.
    pub fn begin(&mut self) {
        self.arrived = None;
    }

    /// It has attached.
    pub fn arrive(&mut self, now: Instant) {
        self.arrived = Some(now);
    }

    /// Whether it has.
    pub fn has_arrived(&self) -> bool {
        self.arrived.is_some()
    }

    /// Notes that the process died. Returns what it died of, and how long to wait before the next is started: not at all
    /// after a death of an item, for which [`Suspects`] may know better.
    pub fn end(&mut self, now: Instant, when: Use) -> (DiedOf, Duration) {
        let stayed = self.arrived.is_some_and(|arrived| arrived + SETTLED <= now);
        let died_of = match when {
            Use::AtWork => DiedOf::Item,
            Use::Unused if !stayed => DiedOf::Start,
            Use::Unused | Use::Idle => DiedOf::Other,
        };
        self.died_of_item = died_of == DiedOf::Item;
        self.quick_deaths = if died_of == DiedOf::Start { self.quick_deaths.saturating_add(1) } else { 0 };
        (died_of, backoff(self.quick_deaths))
    }

    /// Returns whether the seat is failing if the handler of its pool is to blame for deaths. It is not if a living process is
    /// in it that has stayed up, or that has attached and whose predecessor did not die of an item.
    pub fn shares_blame(&self, has_process: bool, now: Instant) -> bool {
        let has_stayed_up = self.settles_at().is_some_and(|due| due <= now);
        !has_process || !self.has_arrived() || self.died_of_item && !has_stayed_up
    }

    /// Notes that the handler of its pool is to blame for deaths.
    pub fn blame(&mut self, now: Instant) {
        self.blamed = Some(now);
    }

    /// Deaths in a row soon after a start.
    pub fn quick_deaths(&self) -> u32 {
        self.quick_deaths
    }

    /// Whether its processes are in a crash loop.
    pub fn is_failing(&self) -> bool {
        self.quick_deaths >= FAILING || self.blamed.is_some()
    }

    /// When the process that is in the seat will be one that stayed up, once it has attached.
    pub fn settles_at(&self) -> Option<Instant> {
        self.arrived.map(|arrived| self.blamed.map_or(arrived, |blamed| blamed.max(arrived)) + SETTLED)
    }

    /// It did.
    pub fn settle(&mut self) {
        self.quick_deaths = 0;
        self.blamed = None;
    }
}

/// The items that workers of one pool have died of since the pool completed one.
///
/// A worker may hold many items when it dies, and which one it died of is not known. So a death counts as one of another
/// item only if the worker held none of those before.
#[derive(Debug, Default)]
pub struct Suspects {
    /// The items of each death that counts, at most [`DIFFERENT_ITEMS`] of them.
    deaths: Vec<Vec<ItemKey>>,
    /// How many items the pool had completed at the death before.
    completed: u64,
    /// Deaths for which the handler was blamed.
    blamed: u32,
}

impl Suspects {
    /// Notes that a worker died that held these items, when the pool had `completed` so many. Returns how long to wait
    /// before the next is started if the handler is to blame; `None` if the items may be.
    pub fn add(&mut self, items: &[ItemKey], completed: u64) -> Option<Duration> {
        if completed != self.completed {
            self.clear();
        }
        self.completed = completed;
        let is_known = |item: &ItemKey| self.deaths.iter().any(|death| death.contains(item));
        if self.deaths.len() < DIFFERENT_ITEMS && !items.iter().any(is_known) {
            self.deaths.push(items.to_vec());
        }
        if self.deaths.len() < DIFFERENT_ITEMS {
            return None;
        }
        self.blamed = self.blamed.saturating_add(1);
        Some(backoff(self.blamed))
    }

    /// A worker of the pool has stayed up.
    pub fn clear(&mut self) {
        self.deaths.clear();
        self.blamed = 0;
    }
}

/// Which pools are known to be failing: they have been logged.
#[derive(Debug, Default)]
pub struct Verdicts {
    failing: u64,
}

impl Verdicts {
    /// Notes whether a pool fails; whether that is news.
    pub fn change(&mut self, pool: u16, fails: bool) -> bool {
        let bit = 1_u64 << pool;
        let before = self.failing & bit != 0;
        self.failing = if fails { self.failing | bit } else { self.failing & !bit };
        before != fails
    }
}

const _: () = assert!(crate::segment::MAX_POOLS <= u64::BITS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quick_deaths_are_answered_ever_more_slowly_until_one_stays_up() {
        let mut now = Instant::now();
        let mut record = Record::new();
        let mut next = BACKOFF;
        for n in 1..40 {
            record.begin();
            assert!(!record.has_arrived());
            if n % 2 == 0 {
                record.arrive(now);
                assert!(record.has_arrived());
                now += SETTLED / 2;
            } else {
                // However long it takes, who dies before it has attached dies of its start.
                now += 2 * SETTLED;
            }
            assert_eq!(record.end(now, Use::Unused), (DiedOf::Start, next), "{n}");
            assert_eq!((record.quick_deaths(), record.is_failing()), (n, n >= FAILING));
            next = (2 * next).min(MAX_BACKOFF);
        }
        record.begin();
        assert_eq!(record.settles_at(), None);
        record.arrive(now);
        assert!(record.is_failing(), "to be started is nothing yet");
        now += SETTLED;
        assert_eq!(record.settles_at(), Some(now));
        assert_eq!(record.end(now, Use::Unused), (DiedOf::Other, Duration::ZERO));
        assert!(!record.is_failing());
    }

    #[test]
    fn who_is_seen_to_stay_up_is_in_no_crash_loop_any_more() {
        let now = Instant::now();
        let mut record = Record::new();
        while !record.is_failing() {
            record.end(now, Use::Unused);
        }
        record.begin();
        record.arrive(now);
        record.settle();
        assert!(!record.is_failing());
        assert_eq!(record.end(now, Use::Unused), (DiedOf::Start, BACKOFF), "the next loop begins anew");
    }

    #[test]
    fn only_a_death_before_the_first_item_is_one_of_the_start() {
        for (when, stayed, died_of) in [
            (Use::Unused, false, DiedOf::Start),
            (Use::Unused, true, DiedOf::Other),
            (Use::Idle, false, DiedOf::Other),
            (Use::Idle, true, DiedOf::Other),
            (Use::AtWork, false, DiedOf::Item),
            (Use::AtWork, true, DiedOf::Item),
        ] {
            let begin = Instant::now();
            let mut record = Record::new();
            // One death short of a crash loop.
            for _ in 1..FAILING {
                record.end(begin, Use::Unused);
            }
            record.begin();
            record.arrive(begin);
            let now = if stayed { begin + SETTLED } else { begin };
            let delay = if died_of == DiedOf::Start { BACKOFF * 16 } else { Duration::ZERO };
            assert_eq!(record.end(now, when), (died_of, delay), "{when:?} {stayed}");
            assert_eq!(record.is_failing(), died_of == DiedOf::Start);
        }
    }

    #[test]
    fn deaths_of_three_different_items_in_a_row_are_the_handlers_own() {
        let key = |n: u32| ItemKey { index: n, offered: 7 };
        // The items of each death, what the pool had completed by then, and whether the handler is blamed.
        type Deaths<'a> = &'a [(&'a [u32], u64, bool)];
        let table: &[Deaths<'_>] = &[
            &[(&[1], 0, false), (&[2], 0, false), (&[3], 0, true), (&[3], 0, true), (&[4], 0, true)],
            &[(&[1], 0, false), (&[1], 0, false), (&[1], 0, false), (&[1], 0, false)],
            &[(&[1], 0, false), (&[2], 0, false), (&[1], 0, false), (&[2], 0, false), (&[3], 0, true)],
            // A completion in between.
            &[
                (&[1], 0, false),
                (&[2], 0, false),
                (&[3], 1, false),
                (&[4], 1, false),
                (&[5], 1, true),
                (&[6], 2, false),
            ],
            // Item 1 may be to blame for each death.
            &[(&[1, 2], 0, false), (&[1, 3], 0, false), (&[4, 1], 0, false), (&[5], 0, false), (&[6, 7], 0, true)],
        ];
        for deaths in table {
            let mut suspects = Suspects::default();
            for (nth, (items, completed, is_blamed)) in deaths.iter().enumerate() {
                let items: Vec<_> = items.iter().map(|n| key(*n)).collect();
                assert_eq!(suspects.add(&items, *completed).is_some(), *is_blamed, "{deaths:?}, death {nth}");
            }
        }
        let mut suspects = Suspects::default();
        let mut die = |n| suspects.add(&[key(n)], 0);
        assert_eq!([1, 2, 3, 4, 5].map(&mut die), [None, None, Some(BACKOFF), Some(2 * BACKOFF), Some(4 * BACKOFF)]);
        suspects.clear();
        let same_record = ItemKey { index: 1, offered: 8 };
        assert_eq!(suspects.add(&[key(1)], 0), None);
        assert_eq!(suspects.add(&[same_record], 0), None);
        assert_eq!(suspects.add(&[key(2)], 0), Some(BACKOFF), "it begins anew");
    }

    #[test]
    fn a_handler_is_blamed_only_in_seats_without_a_worker_that_stays_up() {
        let begin = Instant::now();
        // What the process before did when it died, if there was one; whether there is a process; for how long it has been
        // up, if it has attached.
        for (before, has_process, up, shares_blame) in [
            (Some(Use::AtWork), false, Some(10 * SETTLED), true),
            (None, true, None, true),
            (Some(Use::AtWork), true, None, true),
            (Some(Use::AtWork), true, Some(SETTLED / 2), true),
            (Some(Use::AtWork), true, Some(SETTLED), false),
            (Some(Use::Idle), true, Some(Duration::ZERO), false),
            (None, true, Some(Duration::ZERO), false),
            (None, true, Some(10 * SETTLED), false),
        ] {
            let (mut record, now) = (Record::new(), begin + up.unwrap_or_default());
            if let Some(when) = before {
                record.end(begin, when);
            }
            record.begin();
            if up.is_some() {
                record.arrive(begin);
            }
            assert_eq!(record.shares_blame(has_process, now), shares_blame, "{before:?} {has_process} {up:?}");
        }
    }

    #[test]
    fn who_is_blamed_has_to_stay_up_from_then_on() {
        let begin = Instant::now();
        let mut record = Record::new();
        record.begin();
        record.arrive(begin);
        assert!(!record.is_failing());
        let later = begin + 3 * SETTLED;
        record.blame(later);
        assert!(record.is_failing());
        assert_eq!(record.settles_at(), Some(later + SETTLED));
        record.settle();
        assert!(!record.is_failing());
    }

    #[test]
    fn a_verdict_is_news_once() {
        let mut verdicts = Verdicts::default();
        assert!(!verdicts.change(63, false));
        assert!(verdicts.change(63, true) && !verdicts.change(63, true));
        assert!(!verdicts.change(0, false));
        assert!(verdicts.change(63, false));
    }
}
