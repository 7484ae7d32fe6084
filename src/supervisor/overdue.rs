//! Item timeouts: a worker that takes too long for an item is told to end, and then is ended.
//!
//! # What it promises
//!
//! - A worker is killed only if the item that it has *now* has been with it for longer than the pool's timeout and a
//!   grace: one that came to the end of its item in time, or in the grace, and took another lives on.
//! - It does not matter why it takes so long: a loop, a lock, a SIGSTOP.
//! - Pools without a timeout make no syscall for it, and while nobody works there is no timer.
//!
//! # Why that holds
//!
//! Each worker of a pool with a timeout has a timerfd, made before the fork. The worker sets it before it handles an
//! item and clears it after (of many that are [open](Running) at once it is the oldest one's); the supervisor polls it beside the pidfds. A timer that is set again forgets that it had
//! expired, so a readable one tells of the present item. Whether that is still the same one at the end of the grace
//! shows by a number that each setting carries in its interval, which is an hour and so many nanoseconds and is
//! otherwise of no use.
//!
//! Between the supervisor's last look and the arrival of its SIGKILL are some microseconds in which the worker may finish
//! after all. If it has begun another item by then, that one is given to another worker, as after any death.
//!
//! SIGTERM is blocked in workers, because a Ctrl-C or a service manager sends it to everybody and only the supervisor
//! may decide: a handler that wants to hear of it reads a signalfd and believes it if the sender is its parent, as `exec:`
//! does. Any other hears nothing and is killed when the grace is over.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    rc::Rc,
    time::{Duration, Instant},
};

use crate::{
    handler::{Failure, Handler, Item, Reply},
    process::Child,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::Signal,
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_gettime, timerfd_settime,
    },
};

/// The most time between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(1);
/// What the interval of a setting is without its number.
const HOUR: i64 = 3600;
const NEVER: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
const SECOND: u64 = 1_000_000_000;

/// The timer of one worker.
#[derive(Debug)]
pub struct ItemTimer {
    fd: OwnedFd,
    limit: Duration,
}

impl ItemTimer {
    fn new(limit: Duration) -> io::Result<Self> {
        let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        Ok(ItemTimer { fd, limit })
    }

    /// One that a supervisor has made for this process.
    pub fn of(fd: OwnedFd, limit: Duration) -> Self {
        ItemTimer { fd, limit }
    }

    /// The number of its descriptor and its nanoseconds, for [`ItemTimer::of`] in a worker's program.
    pub fn to_parts(&self) -> (RawFd, u64) {
        (self.fd.as_raw_fd(), u64::try_from(self.limit.as_nanos()).unwrap_or(u64::MAX))
    }

    fn set(&self, number: u32) {
        self.set_after(number, self.limit);
    }

    fn set_after(&self, number: u32, time: Duration) {
        let number = u64::from(number);
        // No time at all would not set it.
        let time = time.max(Duration::from_nanos(1));
        let it_value =
            Timespec { tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX), tv_nsec: time.subsec_nanos().into() };
        let it_interval = Timespec { tv_sec: HOUR + (number / SECOND) as i64, tv_nsec: (number % SECOND) as _ };
        self.settime(Itimerspec { it_interval, it_value });
    }

    fn clear(&self) {
        self.settime(Itimerspec { it_interval: NEVER, it_value: NEVER });
    }

    fn settime(&self, spec: Itimerspec) {
        // Fails only for what is no time or no timer.
        let _ = timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &spec);
    }

    /// The number of the present setting, if it has expired.
    fn expired(&self) -> Option<Timespec> {
        let number = || timerfd_gettime(&self.fd).ok().map(|spec| spec.it_interval);
        let before = number()?;
        let readable = poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&NEVER)) == Ok(1);
        // Had it been set again in between, it would be another's expiry that was seen.
        (readable && number() == Some(before)).then_some(before)
    }
}

impl AsFd for ItemTimer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A handler on a timer: the worker's side.
pub struct Timed<'a> {
    handler: &'a mut dyn Handler,
    timer: &'a ItemTimer,
    number: u32,
}

impl<'a> Timed<'a> {
    /// Handles by `handler`, and has the timer set meanwhile.
    pub fn new(handler: &'a mut dyn Handler, timer: &'a ItemTimer) -> Self {
        Timed { handler, timer, number: 0 }
    }
}

impl Handler for Timed<'_> {
    fn handle(&mut self, item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
        struct Cleared<'a>(&'a ItemTimer);
        impl Drop for Cleared<'_> {
            fn drop(&mut self) {
                self.0.clear();
            }
        }

        self.number = self.number.wrapping_add(1);
        self.timer.set(self.number);
        // A panic clears it, too.
        let _cleared = Cleared(self.timer);
        self.handler.handle(item, reply)
    }
}

/// The items that a worker has open at once, on one timer: it is set for the oldest, whose time is over first.
#[derive(Debug)]
pub struct Timers {
    timer: ItemTimer,
    /// By number, in the order in which they began.
    began: RefCell<VecDeque<(u32, Instant)>>,
    number: Cell<u32>,
}

impl Timers {
    /// With no item yet.
    pub fn new(timer: ItemTimer) -> Rc<Self> {
        Rc::new(Timers { timer, began: RefCell::default(), number: Cell::new(0) })
    }

    /// One alone at a time, by [`Timed`].
    pub fn timer(&self) -> &ItemTimer {
        &self.timer
    }

    /// An item has begun.
    pub fn begin(self: &Rc<Self>) -> Running {
        let number = self.number.get().wrapping_add(1);
        self.number.set(number);
        let mut began = self.began.borrow_mut();
        began.push_back((number, Instant::now()));
        if began.len() == 1 {
            self.timer.set(number);
        }
        Running { timers: self.clone(), number }
    }

    fn end(&self, number: u32) {
        let mut began = self.began.borrow_mut();
        let Some(at) = began.iter().position(|(other, _)| *other == number) else { return };
        began.remove(at);
        match began.front() {
            _ if at > 0 => {}
            None => self.timer.clear(),
            Some(&(next, began)) => self.timer.set_after(next, self.timer.limit.saturating_sub(began.elapsed())),
        }
    }
}

/// An item is open. Dropped when it is not any more.
#[derive(Debug)]
pub struct Running {
    timers: Rc<Timers>,
    number: u32,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.timers.end(self.number);
    }
}

/// A worker on a timer: the supervisor's side.
#[derive(Debug)]
struct Watched {
    timer: ItemTimer,
    order: Option<Order>,
}

/// A worker was told to end.
#[derive(Debug)]
struct Order {
    /// Because of the item that began with this setting.
    setting: Timespec,
    /// When it will be killed; none once it has been.
    kill_at: Option<Instant>,
}

/// The timers of all workers, by their numbers.
#[derive(Debug)]
pub struct Watch {
    workers: Vec<Option<Watched>>,
}

impl Watch {
    /// With these timeouts, one for each worker.
    pub fn new(limits: impl IntoIterator<Item = Option<Duration>>) -> io::Result<Self> {
        let watched = |limit: Option<Duration>| {
            limit.map(|limit| Ok(Watched { timer: ItemTimer::new(limit)?, order: None })).transpose()
        };
        Ok(Watch { workers: limits.into_iter().map(watched).collect::<io::Result<_>>()? })
    }

    /// A worker's timer, if its pool has a timeout.
    pub fn timer(&self, worker: u16) -> Option<&ItemTimer> {
        self.workers.get(usize::from(worker))?.as_ref().map(|watched| &watched.timer)
    }

    /// Closes the timers of all workers but these: in a child, right after the fork.
    pub fn keep(&mut self, is_kept: impl Fn(u16) -> bool) {
        for (number, watched) in self.workers.iter_mut().enumerate() {
            *watched = watched.take().filter(|_| is_kept(number as u16));
        }
    }

    fn watched(&self) -> impl Iterator<Item = &Watched> {
        self.workers.iter().flatten()
    }

    /// Each of them is readable once there is something to do.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.watched().filter(|watched| watched.order.is_none()).map(|watched| watched.timer.fd.as_fd())
    }

    /// When there is something to do in any case.
    pub fn due(&self) -> Option<Instant> {
        self.watched().filter_map(|watched| watched.order.as_ref()?.kill_at).min()
    }

    /// Tells workers that are over their time to end, and ends those that have been told. `describe` returns the words of the
    /// log for the worker with a number and a pid, and for the items that it holds.
    pub fn enforce<'c>(
        &mut self,
        now: Instant,
        child: impl Fn(u16) -> Option<&'c Child>,
        describe: impl Fn(u16, u32) -> (String, String),
    ) -> io::Result<()> {
        for (number, watched) in self.workers.iter_mut().enumerate() {
            let (Some(watched), Some(child)) = (watched, child(number as u16)) else { continue };
            let limit = watched.timer.limit;
            match &mut watched.order {
                None => {
                    let Some(setting) = watched.timer.expired() else { continue };
                    let (process, item) = describe(number as u16, child.pid());
                    tracing::warn!(item_timeout = ?limit, "{process} takes too long for its {item}: it is told to end");
                    child.signal(Signal::TERM)?;
                    watched.order = Some(Order { setting, kill_at: Some(now + GRACE.min(limit)) });
                }
                Some(order) if order.kill_at.is_some_and(|at| at <= now) => {
                    if watched.timer.expired() == Some(order.setting) {
                        child.signal(Signal::KILL)?;
                        order.kill_at = None;
                    } else {
                        let (process, _) = describe(number as u16, child.pid());
                        tracing::info!("{process} ended its item after all");
                        watched.order = None;
                    }
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Forgets a dead worker, so that its successor finds the timer as if it were new. Returns the limit if the worker was
    /// ended because its item took longer than that.
    pub fn bury(&mut self, worker: u16) -> Option<Duration> {
        let watched = self.workers.get_mut(usize::from(worker))?.as_mut()?;
        let order = watched.order.take();
        let ended = order.is_some_and(|order| watched.timer.expired() == Some(order.setting));
        watched.timer.clear();
        ended.then_some(watched.timer.limit)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::ExitStatusExt as _,
        panic::{self, AssertUnwindSafe},
        process::{self, Command, Stdio},
    };

    use super::*;
    use crate::{
        dispatch::{Bells, Front, Kind, Offer, Request, Topology, Worker},
        segment::{Geometry, Segment, SegmentOwner, Slot},
    };

    const LIMIT: Duration = Duration::from_millis(5);

    /// What stands for a worker. It lives until it is ended or waited for.
    fn process() -> (process::Child, Child) {
        let process = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let child = Child::adopted(process.id()).unwrap();
        (process, child)
    }

    fn no_words(_: u16, _: u32) -> (String, String) {
        Default::default()
    }

    /// A worker's item that began with this number has been in work for too long.
    fn overstay(watch: &Watch, number: u32) {
        let timer = watch.timer(0).unwrap();
        timer.set(number);
        until(|| timer.expired().is_some());
    }

    #[test]
    fn who_takes_too_long_is_told_and_ended_when_the_grace_is_over() {
        let mut watch = Watch::new([Some(LIMIT), None]).unwrap();
        assert!(watch.timer(1).is_none() && watch.timer(2).is_none());
        let now = Instant::now();
        let (mut told, first) = process();
        let (mut ended, second) = process();
        watch.enforce(now, |_| Some(&first), no_words).unwrap();
        assert_eq!((watch.fds().count(), watch.due()), (1, None), "nobody works");
        assert!(watch.bury(0).is_none(), "who dies then dies of something else");

        overstay(&watch, 1);
        watch.enforce(now, |_| Some(&first), no_words).unwrap();
        assert_eq!(told.wait().unwrap().signal(), Some(Signal::TERM.as_raw()));
        let due = now + LIMIT;
        assert_eq!((watch.fds().count(), watch.due()), (0, Some(due)));
        watch.enforce(due - Duration::from_nanos(1), |_| Some(&second), no_words).unwrap();
        assert_eq!(watch.due(), Some(due));
        watch.enforce(due, |_| Some(&second), no_words).unwrap();
        assert_eq!(ended.wait().unwrap().signal(), Some(Signal::KILL.as_raw()));
        assert_eq!((watch.fds().count(), watch.due()), (0, None), "once");

        assert_eq!(watch.bury(0), Some(LIMIT));
        assert_eq!(watch.fds().count(), 1);
        assert_eq!(watch.timer(0).unwrap().expired(), None, "its successor begins anew");
    }

    #[test]
    fn who_ends_the_item_in_the_grace_lives_on_whatever_it_does_next() {
        let mut watch = Watch::new([Some(LIMIT)]).unwrap();
        let (mut process, child) = process();
        let now = Instant::now();
        for number in [1, 3] {
            overstay(&watch, number);
            watch.enforce(now, |_| Some(&child), no_words).unwrap();
            match number {
                // Another item, which is over its time as well.
                1 => overstay(&watch, 2),
                _ => watch.timer(0).unwrap().clear(),
            }
            watch.enforce(now + LIMIT, |_| Some(&child), no_words).unwrap();
            assert_eq!((watch.fds().count(), watch.due()), (1, None));
        }
        overstay(&watch, 4);
        watch.enforce(now, |_| Some(&child), no_words).unwrap();
        watch.timer(0).unwrap().clear();
        assert!(watch.bury(0).is_none(), "it died of something else");
        assert_eq!(process.wait().unwrap().signal(), Some(Signal::TERM.as_raw()));
    }

    #[test]
    fn a_timer_is_set_while_a_handler_is_at_work_however_that_ends() {
        let geometry = Geometry {
            items: 4,
            fronts: 1,
            workers: 1,
            pools: 1,
            request_bytes: 4096,
            result_bytes: 4096,
            letter_bytes: 0,
        };
        let owner = SegmentOwner::create(&format!("unit-timed-{}", process::id()), geometry).unwrap();
        let (topology, bells) = (Topology::new([1]), Bells::new(1, 1).unwrap());
        let view = |slot| Segment::attach(owner.object(), owner.name(), slot).unwrap();
        let views = [Slot::Front(0), Slot::Worker(0)].map(view);
        let (mut front, _) = Front::attach(&views[0], topology.clone(), bells.clone(), 0);
        let mut worker = Worker::attach(&views[1], topology, bells, 0).unwrap();
        let offer = Offer {
            pool: 0,
            priority: 0,
            id: 1,
            offered: 0,
            deadline: 0,
            kind: Kind::Call,
            subscription: &[],
            metadata: &[],
        };
        front.offer(&offer, &mut Request::default()).unwrap();
        let claimed = worker.take().unwrap();

        let timer = ItemTimer::new(Duration::from_secs(3600)).unwrap();
        let is_set = || timerfd_gettime(&timer.fd).unwrap().it_value != NEVER;
        let mut times = 0;
        let mut handler = |_: &Item<'_>, _: &mut Reply<'_, '_>| {
            assert!(is_set());
            times += 1;
            if times == 1 { Err(Failure::cancelled()) } else { panic!("its handler's own") }
        };
        let mut timed = Timed::new(&mut handler, &timer);
        for _ in 0..2 {
            let (item, mut reply) = worker.open(&claimed, 0).unwrap();
            let handled = panic::catch_unwind(AssertUnwindSafe(|| timed.handle(&item, &mut reply)));
            assert!(!matches!(handled, Ok(Ok(()))) && !is_set());
        }
        assert_eq!(times, 2);
    }

    #[test]
    fn a_program_gets_the_timer_by_the_number_of_its_descriptor() {
        for (limit, nanos) in [(LIMIT, 5_000_000), (Duration::MAX, u64::MAX)] {
            let timer = ItemTimer::new(limit).unwrap();
            assert_eq!(timer.to_parts(), (timer.as_fd().as_raw_fd(), nanos));
        }
    }

    fn until(what: impl Fn() -> bool) {
        let begin = Instant::now();
        while !what() {
            assert!(begin.elapsed() < Duration::from_secs(30));
            std::thread::yield_now();
        }
    }

    #[test]
    fn of_many_open_items_the_oldest_is_timed() {
        let limit = Duration::from_millis(5);
        let timers = Timers::new(ItemTimer::new(limit).unwrap());
        let setting = |number: i64| Timespec { tv_sec: HOUR, tv_nsec: number };
        let mut items = [1, 2, 3].map(|_| Some(timers.begin()));
        until(|| timers.timer.expired() == Some(setting(1)));
        // Whoever goes that is not the oldest changes nothing.
        items[1] = None;
        assert_eq!(timers.timer.expired(), Some(setting(1)));
        // The next has been at work for long enough, too.
        items[0] = None;
        until(|| timers.timer.expired() == Some(setting(3)));
        items[2] = None;
        assert_eq!(timers.timer.expired(), None);
        assert_eq!(timerfd_gettime(&timers.timer.fd).unwrap().it_value, NEVER, "nobody works");
        let _next = timers.begin();
        until(|| timers.timer.expired() == Some(setting(4)));
    }

    #[test]
    fn a_timer_tells_of_its_present_setting_only() {
        let timer = ItemTimer::new(Duration::from_millis(5)).unwrap();
        assert_eq!(timer.expired(), None, "nothing was begun");
        timer.set(1);
        until(|| timer.expired().is_some());
        let first = timer.expired();
        assert_eq!(timer.expired(), first, "looking at it changes nothing");
        timer.clear();
        assert_eq!(timer.expired(), None, "the item is over");
        timer.set(2);
        until(|| timer.expired().is_some());
        assert_ne!(timer.expired(), first, "another item");
        for number in [3_000_000_000, u32::MAX] {
            timer.set(number);
            until(|| timer.expired().is_some());
        }
        let longest = ItemTimer::new(Duration::MAX).unwrap();
        longest.set(1);
        assert_eq!(longest.expired(), None);
        assert_ne!(timerfd_gettime(&longest.fd).unwrap().it_value, NEVER, "it is set all the same");
    }
}
