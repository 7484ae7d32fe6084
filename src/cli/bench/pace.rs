//! When the next item begins: at once in a closed loop, by the clock in an open one.
//!
//! Each item has a *due* time and its latency is measured from it. In a closed loop that is when its sender became
//! free. In an open loop it is the item's place on the schedule, however late a full window, a stalled server or the
//! generator itself lets it be sent: what waits is measured, not left out (no coordinated omission).

use std::{
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::sync::{Semaphore, watch};

/// More permits than there can be senders: lets each of them come, find the end and leave.
const FLOOD: usize = 1 << 40;

/// Leave to begin one item.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    /// Unique in this run, and unlike those of other runs.
    pub id: u64,
    /// What its latency is measured from.
    pub due: Instant,
    /// Whether it counts: it was due after the warm-up.
    pub measured: bool,
}

/// Hands out tickets until the run's end.
///
/// Only the permits are touched by another thread (the pacer's); the counters are atomics because senders share them,
/// not because they race.
pub struct Pace {
    begin: Instant,
    from: Instant,
    until: Option<Instant>,
    count: Option<u64>,
    first_id: u64,
    issued: AtomicU64,
    measured: AtomicU64,
    schedule: Option<Schedule>,
    /// Set once no item may begin any more, whoever found out.
    over: watch::Sender<bool>,
}

/// An open loop's: item n is due at begin + n / rate.
struct Schedule {
    rate: f64,
    taken: AtomicU64,
    /// One permit for each item that is due and not yet taken.
    due: Semaphore,
}

impl Pace {
    /// Warm-up from `begin` to `from`, measured from there `until` or for `count` items; open loop if there is a `rate`.
    pub fn new(
        begin: Instant,
        from: Instant,
        until: Option<Instant>,
        count: Option<u64>,
        rate: Option<f64>,
        first_id: u64,
    ) -> Self {
        let schedule = rate.map(|rate| Schedule { rate, taken: AtomicU64::new(0), due: Semaphore::new(0) });
        Self {
            begin,
            from,
            until,
            count,
            first_id,
            issued: AtomicU64::new(0),
            measured: AtomicU64::new(0),
            schedule,
            over: watch::Sender::new(false),
        }
    }

    /// Waits until an item may begin; `None` when the run is over.
    pub async fn next(&self) -> Option<Ticket> {
        let due = match &self.schedule {
            None => Instant::now(),
            Some(schedule) => {
                schedule.due.acquire().await.ok()?.forget();
                self.due(schedule.taken.fetch_add(1, Relaxed), schedule.rate)
            }
        };
        self.admit(due)
    }

    /// When item `n` of an open loop is due.
    fn due(&self, n: u64, rate: f64) -> Instant {
        self.begin + Duration::from_secs_f64(n as f64 / rate)
    }

    /// A ticket for an item that is due then, unless that is beyond the end.
    fn admit(&self, due: Instant) -> Option<Ticket> {
        if self.until.is_some_and(|until| due >= until) {
            self.end();
        }
        if *self.over.borrow() {
            return None;
        }
        let measured = due >= self.from;
        if measured && Some(self.measured.fetch_add(1, Relaxed) + 1) == self.count {
            self.end();
        }
        let id = self.first_id.wrapping_add(self.issued.fetch_add(1, Relaxed));
        Some(Ticket { id, due, measured })
    }

    /// Ends the run for all senders, those that wait for their time included.
    pub fn end(&self) {
        if !self.over.send_replace(true)
            && let Some(schedule) = &self.schedule
        {
            schedule.due.add_permits(FLOOD);
        }
    }

    /// Waits until no item may begin any more. In an open loop that is not before all that were due have begun.
    pub async fn over(&self) {
        // The sender is our own field, so the wait cannot fail.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }

    /// Waits until the time is up or the last item has begun: from then on there are only answers to wait for, and
    /// in an open loop what its schedule still owes.
    pub async fn time_is_up(&self) {
        let Some(until) = self.until else { return self.over().await };
        tokio::select! {
            () = self.over() => {}
            () = tokio::time::sleep_until(until.into()) => if self.schedule.is_none() {
                self.end();
            },
        }
    }

    /// Whether the run is over, so that there is nothing to reconnect for.
    pub fn is_over(&self) -> bool {
        *self.over.borrow() || self.until.is_some_and(|until| Instant::now() >= until)
    }

    /// How many measured items were begun.
    pub fn measured(&self) -> u64 {
        self.measured.load(Relaxed)
    }

    /// How many items the schedule wanted and no sender was free to begin.
    pub fn unsent(&self) -> u64 {
        match (&self.schedule, self.until) {
            (Some(schedule), Some(until)) if !*self.over.borrow() => {
                let wanted = ((until - self.begin).as_secs_f64() * schedule.rate).ceil() as u64;
                wanted.saturating_sub(schedule.taken.load(Relaxed))
            }
            _ => 0,
        }
    }

    /// Whether the last of `count` items was begun, so that the run's end is the last answer and not `until`.
    pub fn is_counted_out(&self) -> bool {
        self.count.is_some_and(|count| self.measured() >= count)
    }
}

/// The open loop's clock: a thread, because the runtime's timers are a millisecond coarse. Ends when dropped.
pub struct Pacer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Pacer {
    /// Starts to hand out a permit for each item as it becomes due.
    pub fn start(pace: Arc<Pace>, rate: f64) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::Builder::new()
            .name("bench-pacer".into())
            .spawn(move || tick(&pace, rate, &stopped))
            .context("cannot start the pacer thread")?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // The thread cannot fail; if it did, there would be nothing to undo.
            let _ = thread.join();
        }
    }
}

fn tick(pace: &Pace, rate: f64, stop: &AtomicBool) {
    let Some(schedule) = &pace.schedule else { return };
    // The kernel's default slack would add 50 µs to each wait; without leave to lower it, waits are that much coarser.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
    let mut handed: u64 = 0;
    while !stop.load(Relaxed) && !pace.is_over() {
        // Items 0..=floor(elapsed × rate) are due.
        let due = (pace.begin.elapsed().as_secs_f64() * rate) as u64 + 1;
        if due > handed {
            schedule.due.add_permits((due - handed) as usize);
            handed = due;
        }
        let next = pace.due(handed, rate);
        let wake = pace.until.map_or(next, |until| next.min(until));
        thread::park_timeout(wake.saturating_duration_since(Instant::now()));
    }
    // The time is up, so every item of the schedule is due. Senders may take them all, and find the end behind the last.
    if !*pace.over.borrow() {
        schedule.due.add_permits(FLOOD);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn pace(until: Option<Instant>, count: Option<u64>, rate: Option<f64>, begin: Instant) -> Pace {
        Pace::new(begin, begin + SECOND, until, count, rate, 100)
    }

    #[test]
    fn the_warm_up_is_not_measured_and_the_end_is_the_end() {
        let begin = Instant::now();
        let pace = pace(Some(begin + 3 * SECOND), None, None, begin);
        assert!(!pace.admit(begin).unwrap().measured);
        assert!(pace.admit(begin + SECOND).unwrap().measured);
        assert!(pace.admit(begin + 3 * SECOND).is_none());
        assert!(pace.admit(begin + SECOND).is_none(), "over for every sender once it is for one");
        assert_eq!(pace.measured(), 1);
    }

    #[test]
    fn count_counts_measured_items_and_ids_are_unique() {
        let begin = Instant::now();
        let pace = pace(None, Some(2), None, begin);
        let dues = [begin, begin, begin + SECOND, begin + SECOND, begin + SECOND];
        let ids: Vec<_> = dues.map(|due| pace.admit(due).map(|ticket| ticket.id)).into();
        assert_eq!(ids, [Some(100), Some(101), Some(102), Some(103), None]);
        assert!(pace.is_counted_out());
    }

    #[tokio::test]
    async fn an_open_loop_measures_from_the_schedule_however_late_the_sender_is() {
        // A schedule that lies wholly in the past, as after a stall of ten seconds.
        let begin = Instant::now() - 10 * SECOND;
        let pace = Arc::new(pace(Some(begin + 2 * SECOND), None, Some(4.0), begin));
        let _pacer = Pacer::start(pace.clone(), 4.0).unwrap();
        let mut dues = Vec::new();
        while let Some(ticket) = pace.next().await {
            dues.push((ticket.due - begin).as_millis());
        }
        assert_eq!(dues, [0, 250, 500, 750, 1000, 1250, 1500, 1750]);
        assert_eq!(pace.measured(), 4);
        assert_eq!(pace.unsent(), 0);
    }

    #[tokio::test]
    async fn what_the_schedule_wanted_and_no_sender_took_is_counted() {
        let begin = Instant::now() - 10 * SECOND;
        let pace = Arc::new(pace(Some(begin + 2 * SECOND), None, Some(4.0), begin));
        let _pacer = Pacer::start(pace.clone(), 4.0).unwrap();
        for _ in 0..3 {
            assert!(pace.next().await.is_some());
        }
        assert_eq!(pace.unsent(), 5);
    }

    #[tokio::test]
    async fn nothing_begins_before_it_is_due() {
        let begin = Instant::now();
        let pace = Arc::new(pace(Some(begin + SECOND), Some(1), Some(200.0), begin));
        let _pacer = Pacer::start(pace.clone(), 200.0).unwrap();
        for _ in 0..10 {
            let ticket = pace.next().await.unwrap();
            assert!(Instant::now() >= ticket.due);
        }
    }
}
