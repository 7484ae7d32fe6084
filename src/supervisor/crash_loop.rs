//! Crash loops: processes that die soon after their start are replaced ever more slowly, and a pool of nothing but such
//! processes does not serve.
//!
//! # What it promises
//!
//! - A pool whose every worker has died [`FAILING`] times in a row soon after its start is NOT_SERVING, and stays so
//!   however often its workers are started: a worker of a crash loop counts as one that serves only when it has stayed
//!   up for [`SETTLED`] after it attached. Then the pool serves again, by itself.
//! - Who has completed an item did not die of its start, however soon it died.
//! - Either is logged once.
//!
//! Why that holds: the registry says of such a worker that it is failing instead of live
//! ([`Liveness::Failing`](crate::segment::Liveness)), and a pool's health is whether one of its workers is live.
//!
//! What clients send to such a pool is accepted all the same, and waits: the next start may be the one that works, and what
//! must not wait has a deadline.

use std::time::{Duration, Instant};

/// A process that lived this long after it had attached was not killed by its own start.
const SETTLED: Duration = Duration::from_secs(1);
/// So many deaths before that in a row are a crash loop.
const FAILING: u32 = 5;
const BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// How the processes of one seat have fared.
#[derive(Debug)]
pub struct Record {
    /// When the present process attached; none, if it has not, as while a program still imports what it needs.
    arrived: Option<Instant>,
    quick_deaths: u32,
}

impl Record {
    /// Of a seat that nobody was in.
    pub fn new() -> Self {
        Record { arrived: None, quick_deaths: 0 }
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

    /// It died, having completed an item or not; how long to wait before the next is started.
    pub fn end(&mut self, now: Instant, has_completed: bool) -> Duration {
        let stayed = has_completed || self.arrived.is_some_and(|arrived| arrived + SETTLED <= now);
        self.quick_deaths = if stayed { 0 } else { self.quick_deaths.saturating_add(1) };
        match self.quick_deaths {
            0 => Duration::ZERO,
            n => BACKOFF.saturating_mul(1 << (n - 1).min(16)).min(MAX_BACKOFF),
        }
    }

    /// Deaths in a row soon after a start.
    pub fn quick_deaths(&self) -> u32 {
        self.quick_deaths
    }

    /// Whether its processes are in a crash loop.
    pub fn is_failing(&self) -> bool {
        self.quick_deaths >= FAILING
    }

    /// When the process that is in the seat will be one that stayed up, once it has attached.
    pub fn settles_at(&self) -> Option<Instant> {
        self.arrived.map(|arrived| arrived + SETTLED)
    }

    /// It did.
    pub fn settle(&mut self) {
        self.quick_deaths = 0;
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
            assert_eq!(record.end(now, false), next, "{n}");
            assert_eq!((record.quick_deaths(), record.is_failing()), (n, n >= FAILING));
            next = (2 * next).min(MAX_BACKOFF);
        }
        record.begin();
        assert_eq!(record.settles_at(), None);
        record.arrive(now);
        assert!(record.is_failing(), "to be started is nothing yet");
        now += SETTLED;
        assert_eq!(record.settles_at(), Some(now));
        assert_eq!(record.end(now, false), Duration::ZERO);
        assert!(!record.is_failing());
    }

    #[test]
    fn who_is_seen_to_stay_up_is_in_no_crash_loop_any_more() {
        let now = Instant::now();
        let mut record = Record::new();
        while !record.is_failing() {
            record.end(now, false);
        }
        record.begin();
        record.arrive(now);
        record.settle();
        assert!(!record.is_failing());
        assert_eq!(record.end(now, false), BACKOFF, "the next loop begins anew");
    }

    #[test]
    fn who_has_completed_an_item_did_not_die_of_its_start() {
        let now = Instant::now();
        let mut record = Record::new();
        for _ in 0..2 {
            for _ in 1..FAILING {
                assert!(record.end(now, false) > Duration::ZERO);
            }
            assert_eq!(record.end(now, true), Duration::ZERO);
            assert!(!record.is_failing());
        }
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
